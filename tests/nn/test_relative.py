import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import sharding
from lm.nn.relative import RelativeBias, buckets

# Of transformers' T5 (5.23, torch 2.13), 32 buckets up to 128, distances -300 to 300: (bucket, how often).
BIDIRECTIONAL = [
    (15, 210), (14, 27), (13, 18), (12, 14), (11, 9), (10, 7), (9, 4), (8, 4), (7, 1), (6, 1), (5, 1),
    (4, 1), (3, 1), (2, 1), (1, 1), (0, 1), (17, 1), (18, 1), (19, 1), (20, 1), (21, 1), (22, 1), (23, 1),
    (24, 4), (25, 4), (26, 7), (27, 9), (28, 14), (29, 18), (30, 27), (31, 210),
]  # fmt: skip
CAUSAL = [
    (31, 188), (30, 14), (29, 12), (28, 10), (27, 10), (26, 8), (25, 7), (24, 6), (23, 6), (22, 5), (21, 4),
    (20, 4), (19, 3), (18, 3), (17, 2), (16, 3), (15, 1), (14, 1), (13, 1), (12, 1), (11, 1), (10, 1),
    (9, 1), (8, 1), (7, 1), (6, 1), (5, 1), (4, 1), (3, 1), (2, 1), (1, 1), (0, 301),
]  # fmt: skip
H, BUCKETS, FAR = 3, 8, 10


@pytest.mark.parametrize(("bidirectional", "runs"), [(True, BIDIRECTIONAL), (False, CAUSAL)])
def test_the_buckets_are_those_of_t5(bidirectional, runs):
    expected = np.repeat(*np.transpose(runs))
    found = buckets(
        np.arange(-300, 301), bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    np.testing.assert_array_equal(found, expected)


def make(bidirectional):
    module = RelativeBias(H, bidirectional, BUCKETS, FAR, nn.initializers.normal(1.0))
    table = np.random.default_rng(0).normal(size=(BUCKETS, H)).astype(np.float32)
    return module, {"bias": table}


def looked_up(table, distances, bidirectional):
    """One lookup for each pair."""
    index = buckets(distances, bidirectional=bidirectional, num_buckets=BUCKETS, max_distance=FAR)
    return jnp.moveaxis(jnp.asarray(table)[index], -1, -3)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_the_bias_and_its_gradient_are_those_of_a_lookup_for_each_pair(length, bidirectional):
    module, params = make(bidirectional)
    distances = np.arange(length)[None] - np.arange(length)[:, None]
    weights = np.random.default_rng(1).normal(size=(1, H, length, length)).astype(np.float32)

    def gradient(function):
        return jax.jit(jax.grad(lambda params: (function(params) * weights).sum()))(params)

    def plain(params):
        return looked_up(params["bias"], distances, bidirectional)[None]

    def ours(params):
        return module.apply({"params": params}, length, num_rows=6)

    assert ours(params).shape == (1, H, length, length) and ours(params).dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(ours)(params), plain(params))
    np.testing.assert_allclose(
        gradient(ours)["bias"], gradient(plain)["bias"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_distances_of_a_step_find_the_same_biases(bidirectional):
    module, params = make(bidirectional)
    positions, slots = np.array([[0], [17], [39]]), np.arange(40)
    distances = slots[None, None] - positions[:, :, None]  # [B, 1, S]
    found = jax.jit(lambda d: module.apply({"params": params}, d, method="at"))(distances)
    assert found.shape == (3, H, 1, 40)
    whole = module.apply({"params": params}, 40, num_rows=3)
    for b, (position,) in enumerate(positions):
        np.testing.assert_array_equal(found[b, :, 0], whole[0, :, position])


def test_the_table_names_its_axes():
    module, _ = make(True)
    boxed = jax.jit(lambda: module.init(jax.random.key(0), 4, num_rows=1))()["params"]
    assert sharding.logical_axes(boxed) == {"bias": ("relpos", "heads")}


def test_each_share_of_the_batch_has_a_copy_on_its_device():
    module, params = make(True)
    expected = module.apply({"params": params}, 5, num_rows=8)
    with sharding.use(sharding.make_mesh(sharding.Config(4, 2, 1))):
        apart = jax.jit(lambda: module.apply({"params": params}, 5, num_rows=16))()
        odd = jax.jit(lambda: module.apply({"params": params}, 5, num_rows=12))()
    assert apart.shape == (8, H, 5, 5) and apart.sharding.shard_shape(apart.shape) == (1, H, 5, 5)
    np.testing.assert_array_equal(apart, np.broadcast_to(expected, apart.shape))
    np.testing.assert_array_equal(odd, expected)
