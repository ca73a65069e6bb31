"""Shuffle rows by a keyed bijection: a row of any epoch is O(1), and nothing is stored.

A Feistel network (Luby and Rackoff 1988) over the next power of four, walked until it falls below the number
of rows.
"""

import hashlib

import numpy as np

_ROUNDS = 6


def permute(
    indices: np.ndarray, size: int, *, seed: int, epoch: int, corpus: int = 0
) -> np.ndarray:
    """Map int64 `indices` below `size` one to one below `size`, another way each seed, epoch and corpus."""
    name = f"{seed} {epoch}" + (f" {corpus}" if corpus else "")
    key = hashlib.blake2b(name.encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(key, np.uint64)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    values = _feistel(indices.astype(np.uint64), keys, half)
    while len(outside := np.flatnonzero(values >= size)):
        values[outside] = _feistel(values[outside], keys, half)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64) -> np.ndarray:
    """Permute the numbers below 4**half; the round function is SplitMix64's finalizer."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        mixed = right + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << half) | right
