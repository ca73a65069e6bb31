"""What an array's bits are, in 64 bits: the same on any mesh, in any order of summing, on any device.

An element's bits, as an unsigned integer, times an odd number that its place in the array gives, summed
modulo 2^32; two such sums with other numbers are the fingerprint. Integers wrap and so sum exactly. One
element that differs always changes both sums; of several, one in 2^64 may not. It finds accidents, not
forgeries.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

LANES = (0x9E3779B9, 0x85EBCA6B)  # where the two sums' numbers start


def words(x: jax.Array) -> jax.Array:
    """Return the bits of `x` as uint32, of x's shape; of 64 bits, both halves in a last axis of two."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(size, 4)}")).astype(jnp.uint32)


def of(x: jax.Array) -> jax.Array:
    """Return the fingerprint of an array, uint32 [2]; to be jitted, of sharded arrays too."""
    bits = words(x)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride)
    numbers = tuple(bits * _odd(place, lane) for lane in LANES)
    # Both in one reduction: the sum of whole numbers alone takes XLA fifteen times as long on a CPU.
    zeros = (np.uint32(0),) * len(numbers)
    return jnp.stack(jax.lax.reduce(numbers, zeros, _add, tuple(range(bits.ndim))))


def _add(ones: tuple[jax.Array, ...], others: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(one + other for one, other in zip(ones, others, strict=True))


def _odd(place: jax.Array, lane: int) -> jax.Array:
    """Return an odd number for every place: of the finalizer of MurmurHash3 (Appleby, public domain)."""
    x = place + np.uint32(lane)
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)) | np.uint32(1)


_of_all = jax.jit(lambda arrays: {name: of(x) for name, x in arrays.items()})


def of_all(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the fingerprint of each array, on the devices: nothing is waited for."""
    return _of_all(dict(arrays))


_of_one = jax.jit(of)


def each(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Return the fingerprint of each array as `shown`, one after the other: less to compile than `of_all`."""
    return {name: shown(_of_one(x)) for name, x in arrays.items()}


def shown(found: jax.Array | np.ndarray) -> str:
    """Return a fingerprint as 16 hexadecimal digits."""
    first, second = np.asarray(found)
    return f"{int(first):08x}{int(second):08x}"
