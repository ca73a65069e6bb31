import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import sharding
from lm.nn.attention import segment_mask
from lm.nn.cross_attention import CrossAttention

B, L, S, D, E, H, K = 2, 5, 7, 12, 8, 3, 4
SEGMENTS = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]], np.int32)
SOURCES = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 0, 0, 0]], np.int32)
INIT = nn.initializers.normal(1.0)


def make(**options):
    """Return the layer and parameters of which none stands at 0 or 1."""
    layer = CrossAttention(H, K, jnp.dtype("float32"), INIT, INIT, INIT, **options)
    x, context = inputs()
    shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x, **context))["params"]
    rng = np.random.default_rng(0)
    return layer, jax.tree.map(
        lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(np.float32), shapes
    )


def inputs():
    rng = np.random.default_rng(1)
    x, source = (rng.normal(size=shape).astype(np.float32) for shape in ((B, L, D), (B, S, E)))
    return x, {"segments_BL": SEGMENTS, "source_BSD": source, "source_segments_BS": SOURCES}


def test_a_mask_of_segments_hides_padding_from_all():
    mask = np.asarray(segment_mask(SEGMENTS, SOURCES))
    assert mask.shape == (B, L, S)
    for b, i, j in np.ndindex(*mask.shape):
        assert mask[b, i, j] == (SEGMENTS[b, i] == SOURCES[b, j] != 0), (b, i, j)


@pytest.mark.parametrize("options", [{}, {"bias": True, "scale": 1.0}], ids=str)
def test_equals_numpy(options):
    layer, params = make(**options)
    x, context = inputs()
    source, y = context["source_BSD"], jax.jit(layer.apply)({"params": params}, x, **context)

    def bias(name):
        return params[name].get("bias", 0.0)

    query = np.tensordot(x, params["query"]["kernel"], 1) + bias("query")
    both = np.tensordot(source, params["key_value"]["kernel"], 1) + bias("key_value")
    expected = np.zeros((B, L, D)) + bias("out")
    scale = options.get("scale", K**-0.5)
    for b, i, h in np.ndindex(B, L, H):
        seen = SOURCES[b] == SEGMENTS[b, i]
        if not SEGMENTS[b, i]:
            continue
        key, value = both[b, seen, h, 0], both[b, seen, h, 1]
        weights = np.exp(scale * key @ query[b, i, h])
        expected[b, i] += weights @ value / weights.sum() @ params["out"]["kernel"][h]
    real = SEGMENTS > 0
    np.testing.assert_allclose(y[real], expected[real], atol=2e-5)


def test_the_source_is_read_once_and_remembered():
    layer, params = make(bias=True)
    x, context = inputs()
    expected = layer.apply({"params": params}, x, **context)
    run = functools.partial(layer.apply, decode=True, mutable=["cache"])
    first, new = run({"params": params}, x[:, :1], **{**context, "segments_BL": SEGMENTS[:, :1]})
    axes = sharding.logical_axes(new["cache"])
    assert axes["key"] == axes["value"] == ("act_batch", "act_heads", None, None)
    np.testing.assert_allclose(first[:, 0], expected[:, 0], atol=1e-6)
    cache = nn.unbox(new["cache"])
    for i in range(1, L):
        y, new = run(
            {"params": params, "cache": cache}, x[:, i : i + 1],
            segments_BL=SEGMENTS[:, i : i + 1], source_BSD=None, source_segments_BS=None,
        )  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, nn.unbox(new["cache"]), cache)
        np.testing.assert_allclose(y[:, 0], expected[:, i], atol=1e-6)


def test_another_source_takes_the_place_of_the_first():
    layer, params = make()
    x, context = inputs()
    run = functools.partial(layer.apply, decode=True, mutable=["cache"])
    _, new = run({"params": params}, x, **{**context, "source_BSD": context["source_BSD"] + 1})
    y, new = run({"params": params, "cache": nn.unbox(new["cache"])}, x, **context)
    np.testing.assert_allclose(y, layer.apply({"params": params}, x, **context), atol=1e-6)
    last, _ = run(
        {"params": params, "cache": nn.unbox(new["cache"])}, x, segments_BL=SEGMENTS,
        source_BSD=None, source_segments_BS=None,
    )  # fmt: skip
    np.testing.assert_allclose(last, y, atol=1e-6)
