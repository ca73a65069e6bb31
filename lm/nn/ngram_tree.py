"""Exact n-gram counts as a tree, by numpy on the host.

A node of level k is a distinct n-gram of k tokens; its parent is the n-gram without its last token. A
level's nodes are sorted by (parent, token), so that a node is the rank of an integer below 2^63
whatever the order and the vocabulary: nothing is hashed and nothing collides.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Level:
    """The distinct n-grams of k tokens, sorted by (parent, token).

    Attributes:
      parent: [n] node of level k - 1: the first k - 1 tokens.
      token: [n] the last token.
      raw: [n] times that it was predicted; 0 where it only begins a longer one.
      adjusted: [n] Kneser-Ney's count: at the highest order `raw`; below it the distinct tokens seen to
        the left, and one for each time that nothing stood there (the first tokens of a document).
      num_parents: nodes of level k - 1.
    """

    parent: np.ndarray
    token: np.ndarray
    raw: np.ndarray
    adjusted: np.ndarray
    num_parents: int

    def totals(self, counts: np.ndarray) -> np.ndarray:
        """Return the sum [num_parents] of `counts` [n] over the children of each parent, in float64."""
        return np.bincount(self.parent, weights=counts, minlength=self.num_parents)


def grow(
    inputs: np.ndarray, targets: np.ndarray, lengths: np.ndarray, *, order: int, vocab_size: int
) -> tuple[list[Level], np.ndarray]:
    """Return the levels 1 to `order` of what rows predict, and each prediction's path through them.

    Args:
      inputs: [R, L] token of each place; the context of a prediction ends with the input of its place.
      targets: [R, L] token that is predicted.
      lengths: [R, L] tokens of the n-gram to count, its target included: at most `order`, and at most 2
        more than the place's number in its row; 0 = none.

    Returns:
      The levels, and nodes [order, N] of the N predictions: at k - 1 that of the last k tokens, -1 where
      fewer were to be counted.
    """
    inputs, targets, lengths = (np.ravel(x) for x in (inputs, targets, lengths))
    places = np.flatnonzero(lengths)
    needed = _needed(lengths, order)
    paths = np.full((order, len(places)), -1, np.int64)
    contexts = np.zeros(len(lengths), np.int64)  # node of the last k - 1 inputs
    levels: list[Level] = []
    for k in range(1, order + 1):
        long = lengths[places] >= k
        grams = places[long]
        # Of most places, the last k inputs are what the place before predicted. Where that was not
        # counted they are a node with the count 0.
        counted = np.zeros(len(lengths), bool)
        counted[1:] = (lengths[:-1] >= k) & (targets[:-1] == inputs[1:])
        others = np.flatnonzero((needed >= k) & ~counted)
        before = contexts[others - 1] if k > 1 else 0
        keys = np.concatenate([
            contexts[grams] * vocab_size + targets[grams],
            before * vocab_size + inputs[others],
        ])  # fmt: skip
        num_parents = len(levels[-1].token) if levels else 1
        distinct, ranks = rank(keys, num_parents * vocab_size)
        paths[k - 1, long] = ranks[: len(grams)]
        raw = np.bincount(ranks[: len(grams)], minlength=len(distinct))
        parent, token = np.divmod(distinct, vocab_size)
        levels.append(Level(parent, token, raw, raw, num_parents))
        contexts[grams] = ranks[: len(grams)]
        contexts = np.roll(contexts, 1)
        contexts[others] = ranks[len(grams) :]
    return _adjusted(levels, paths, lengths[places]), paths


def _needed(lengths: np.ndarray, order: int) -> np.ndarray:
    """Return the longest context, in tokens, that an n-gram at or after each place takes from there."""
    needed = np.maximum(lengths.astype(np.int64) - 1, 0)
    for _ in range(order - 1):
        needed[:-1] = np.maximum(needed[:-1], needed[1:] - 1)
    return needed


def _adjusted(levels: list[Level], paths: np.ndarray, lengths: np.ndarray) -> list[Level]:
    """Return the levels with Kneser-Ney's counts."""
    done = levels[-1:]
    for k in range(len(levels) - 1, 0, -1):
        level, longer = levels[k - 1], levels[k]
        suffix = np.zeros(len(longer.raw), np.int64)
        long = lengths > k
        suffix[paths[k][long]] = paths[k - 1][long]
        adjusted = np.bincount(suffix[longer.raw > 0], minlength=len(level.raw))
        adjusted += np.bincount(paths[k - 1][lengths == k], minlength=len(level.raw))
        done.append(dataclasses.replace(level, adjusted=adjusted))
    return done[::-1]


def rank(keys: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct of `keys`, integers below `size`, in order, and each key's index in them."""
    if size > 4 * len(keys):
        distinct, ranks = np.unique(keys, return_inverse=True)
        return distinct, ranks.reshape(-1)
    # Few integers are possible: a table of them all is several times faster than sorting.
    present = np.zeros(size, bool)
    present[keys] = True
    return np.flatnonzero(present), (np.cumsum(present) - 1)[keys]
