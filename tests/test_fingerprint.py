"""Fingerprints: of the bits alone, the same on every mesh, and another when one bit is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import fingerprint, sharding

jitted = jax.jit(fingerprint.of)
DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool", "uint32"]


def some(shape=(16, 8, 3), dtype="float32", seed=0):
    drawn = np.random.default_rng(seed).normal(size=shape) * 100
    return np.asarray(drawn.astype(jnp.dtype(dtype)))


def by_hand(x):
    """In Python's own integers."""
    size = x.dtype.itemsize
    bits = np.ascontiguousarray(x).view(f"uint{8 * size}").ravel()
    sums = [0, 0]
    for place, word in enumerate(map(int, bits)):
        for lane, start in enumerate(fingerprint.LANES):
            h = (place + start) % 2**32
            h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
            h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
            sums[lane] += word * ((h ^ (h >> 16)) | 1)
    return [total % 2**32 for total in sums]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_it_says(dtype):
    x = some(dtype=dtype)
    assert jitted(x).tolist() == by_hand(x)


def test_of_no_dimension_and_of_no_element():
    assert jitted(np.float32(3)).tolist() == by_hand(np.full((1,), 3, np.float32))
    assert jitted(np.zeros((0, 4), np.float32)).tolist() == [0, 0]


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1}])
def test_a_mesh_changes_nothing(sizes):
    mesh = sharding.make_mesh(
        sharding.Config(**sizes), jax.devices()[: np.prod(list(sizes.values()))]
    )
    axes = jax.sharding.PartitionSpec(("data", "fsdp"), "tensor")
    x = some()
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, axes))
    assert fingerprint.shown(jitted(placed)) == fingerprint.shown(jitted(x))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 16 * 8 * 3 - 1), st.integers(0, 31))
def test_every_bit_counts_twice(place, bit):
    x = some()
    changed = x.copy()
    changed.ravel().view(np.uint32)[place] ^= np.uint32(1 << bit)
    before, after = jitted(x), jitted(changed)
    assert (before != after).all()


def test_places_and_signs_of_zero_count():
    x = some()
    assert (jitted(x) != jitted(x[::-1].copy())).any()
    assert (jitted(np.float32([0.0])) != jitted(np.float32([-0.0]))).all()


def test_all_of_a_state_at_once():
    arrays = {"a": some(), "b": some(dtype="bfloat16")}
    found = fingerprint.of_all({name: jnp.asarray(x) for name, x in arrays.items()})
    assert {name: value.tolist() for name, value in found.items()} == {
        name: jitted(x).tolist() for name, x in arrays.items()
    }
    assert len(fingerprint.shown(found["a"])) == 16
