"""Attention of rows that are split over devices, against attention of whole rows."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import placement, sharding
from lm.config import ConfigError
from lm.nn import attention, context
from lm.nn.relative import RelativeBias

B, G, R, L, S, K = 2, 2, 2, 48, 30, 8
PARTS = 3
TILED = ("packed_window", "relative", "cross")

CASES = {
    "causal": {},
    "packed_window": {"packed": True, "window": 9},  # of a chunk and a half: blocks are all masked
    "relative": {"packed": True, "bias": True, "scale": 1.0},
    "encoder": {"causal": False, "packed": True, "bias": True},
    "cross": {"causal": False, "packed": True, "source": S},
}


def mesh():
    """Return one on which heads are split too."""
    return sharding.make_mesh(sharding.Config(1, 1, 2, context=PARTS), jax.devices()[: 2 * PARTS])


def segments(length, seed):
    """Return rows of three documents, and padding."""
    ends = np.sort(np.random.default_rng(seed).integers(0, length, (B, 3)), axis=1)
    ends[:, -1] = length - 3
    number = 1 + (np.arange(length)[None, :, None] >= ends[:, None]).sum(axis=2)
    return np.where(number > 3, 0, number).astype(np.int32)


def case(*, causal=True, window=0, packed=False, bias=False, source=0, scale=0.0):
    """Return (arrays, function of whole rows, function of rows that are split)."""
    rng = np.random.default_rng(0)
    shapes = {"query": (B, G, R, L, K), "key": (B, G, source or L, K)}
    shapes["value"] = shapes["key"]
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if bias:
        arrays["bias"] = rng.normal(size=(G * R, 2 * L)).astype(np.float32)
    of_queries = segments(L, 1)
    of_keys = segments(source, 2) if source else of_queries

    def mask():
        if causal:
            return attention.causal_mask(
                L, window=window, segments_BL=of_queries if packed else None
            )
        return attention.segment_mask(of_queries, of_keys)

    def whole(arrays):
        score_bias = None
        if bias:
            distance = np.arange(L)[None] - np.arange(L)[:, None] + L - 1
            score_bias = arrays["bias"][:, distance].reshape(1, G, R, L, L)
        function = attention.causal_attend if causal else attention.attend
        return function(
            arrays["query"],
            arrays["key"],
            arrays["value"],
            mask(),
            score_bias=score_bias,
            scale=scale,
        )

    def split(arrays, *, way):
        order, order_of_keys = (placement.columns(n, PARTS) for n in (L, source or L))
        pairs = mask()
        pairs = dataclasses.replace(
            pairs,
            **{
                name: array if array is None else array[:, places]
                for name, array, places in (
                    ("segments_BL", pairs.segments_BL, order),
                    ("source_segments_BS", pairs.source_segments_BS, order_of_keys),
                )
            },
        )
        out = context.attend(
            arrays["query"][:, :, :, order],
            arrays["key"][:, :, order_of_keys],
            arrays["value"][:, :, order_of_keys],
            pairs,
            values_HW=arrays.get("bias"),
            scale=scale,
            way=way,
        )
        return out[:, :, :, np.argsort(order)]

    real = (of_queries > 0 if packed else np.ones((B, L)))[:, None, None, :, None]
    return arrays, real, whole, split


PLAIN = [("packed_window", "ring"), ("encoder", "gather")]
SLOW = [pair for pair in itertools.product(CASES, context.WAYS) if pair not in PLAIN]
SLOWLY = [pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW]


@pytest.mark.parametrize(("name", "way"), PLAIN + SLOWLY)
def test_split_rows_are_whole_rows(name, way, monkeypatch):
    """The output at every real position, and the gradients of queries, keys, values and the bias."""
    if name in TILED:
        monkeypatch.setattr(context, "TILE", 3)  # of 5 or 8 keys: two tiles of 4, and five of 1
    arrays, real, whole, split = case(**CASES[name])
    weights = np.random.default_rng(3).normal(size=(B, G, R, L, K)) * real

    def run(function):
        def total(arrays):
            out = function(arrays)
            return (out * weights).sum(), out

        (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
        return {"out": out * real, **gradient}

    expected = run(whole)
    with sharding.use(mesh()):
        found = run(functools.partial(split, way=way))
    for key, array in expected.items():
        error = np.linalg.norm(found[key] - array) / np.linalg.norm(array)
        assert error < 1e-6, (key, error)


@pytest.mark.parametrize("way", context.WAYS)
def test_keys_travel_as_the_way_says(way):
    """Ring: c - 1 hops forward; back c - 1 more of keys and values, and c of their gradients."""
    arrays, _, _, split = case()
    with sharding.use(mesh()):
        total = lambda arrays: split(arrays, way=way).sum()  # noqa: E731
        jaxpr = str(jax.make_jaxpr(jax.grad(total))(arrays))
    assert jaxpr.count("ppermute[") == (3 * PARTS - 2 if way == "ring" else 0)
    assert jaxpr.count("all_gather[") == (0 if way == "ring" else 2)
    assert jaxpr.count("reduce_scatter[") == (0 if way == "ring" else 1)


@pytest.mark.parametrize("way", context.WAYS)
def test_no_array_of_all_pairs_is_kept(way):
    """What the gradient keeps grows with a row's length, not with its square."""

    def kept(length):
        shape = jax.ShapeDtypeStruct
        query, key = shape((B, G, R, length, K), jnp.float32), shape((B, G, length, K), jnp.float32)
        pairs = context.Pairs(None, None, causal=True)
        with sharding.use(mesh()):
            _, pull = jax.eval_shape(
                lambda *a: jax.vjp(lambda *a: context.attend(*a, pairs, way=way), *a),
                query,
                key,
                key,
            )
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(512) == 2 * kept(256)


def test_small_keys_are_gathered_and_large_ones_go_round():
    with sharding.use(mesh()):
        assert context.choose_way("", 1, 8) == "gather"
        assert context.choose_way("", 2, 8) == context.choose_way("", 8, 8) == "ring"
        assert context.choose_way("gather", 8, 8) == "gather"


def test_every_device_has_an_early_and_a_late_chunk():
    order = placement.columns(16, 4).reshape(4, 4)
    np.testing.assert_array_equal(order[0], [0, 1, 14, 15])
    np.testing.assert_array_equal(order[3], [6, 7, 8, 9])
    pairs = np.tril(np.ones((16, 16)))[order]  # keys that the queries of each device see
    assert len({part.sum() for part in pairs}) == 1


def test_a_length_that_does_not_split_is_refused():
    batch = {"inputs": np.zeros((4, 16), np.int32)}
    with pytest.raises(ConfigError, match=r"mesh\.context=3.*16 positions.*multiple of 6"):
        placement.place_batch(mesh(), batch)


def test_a_bias_by_distance_is_that_of_all_pairs():
    bias = RelativeBias(3, True, 8, 16, kernel_init=jax.nn.initializers.normal(1.0))
    params = bias.init(jax.random.key(0), 8, num_rows=2)
    pairs_HLL = bias.apply(params, 8, num_rows=2)[0]
    values_HW = bias.apply(params, 8, method="by_distance")
    distance = np.arange(8)[None] - np.arange(8)[:, None] + 7
    np.testing.assert_array_equal(values_HW[:, distance], pairs_HLL)
