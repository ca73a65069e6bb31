import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.nn.attention import (
    Attention,
    attend,
    causal_attend,
    causal_mask,
    flash_attend,
)
from lm.nn.rotary import Rotary

B, L, D, H, K = 2, 9, 12, 4, 6
BASE = 100.0
INIT = nn.initializers.normal(1.0)
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
POSITIONS = np.tile(np.arange(L), (B, 1)) + np.array([[0], [5]])


def make(num_kv_heads=H, **options):
    """Return the layer and parameters of which none stands at 0 or 1."""
    layer = Attention(H, num_kv_heads, K, jnp.dtype("float32"), INIT, INIT, **options)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs(), **context())["params"]
    draw = normal(0)
    return layer, jax.tree.map(lambda leaf: 0.4 * draw(*leaf.shape), nn.unbox(shapes))


def normal(seed, dtype=jnp.float32):
    """Return a function from a shape to normal numbers."""
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.normal(size=shape).astype(dtype)


def inputs():
    return normal(1)(B, L, D)


def context(window=0, segments=None):
    return {
        "mask": causal_mask(L, window=window, segments_BL=segments),
        "positions_BL": jnp.asarray(POSITIONS),
    }


@functools.cache
def compiled(layer):
    return jax.jit(layer.apply)


def run(layer, params, x, **options):
    return compiled(layer)({"params": params}, x, **options)


def reference(x, params, *, rope=False, window=L, segments=None):
    """Attention head by head, query by query."""
    kernel, out = params["qkv"]["kernel"], params["out"]["kernel"]
    num_groups, repeats = kernel.shape[1], kernel.shape[2] - 2
    bias = params["qkv"].get("bias", np.zeros(kernel.shape[1:]))
    y = np.zeros(x.shape) + params["out"].get("bias", 0.0)
    for b, h in np.ndindex(len(x), num_groups * repeats):
        g, r = divmod(h, repeats)
        q, k, v = (x[b] @ kernel[:, g, i] + bias[g, i] for i in (r, repeats, repeats + 1))
        if "query_norm" in params:
            q, k = (
                a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-5) * params[f"{name}_norm"]["scale"]
                for a, name in ((q, "query"), (k, "key"))
            )
        if rope:
            q, k = rotated(q, POSITIONS[b]), rotated(k, POSITIONS[b])
        for i in range(L):
            seen = list(range(max(0, i - window + 1), i + 1))
            if segments is not None:
                seen = [j for j in seen if segments[b, j] == segments[b, i]]
            scores = np.exp(k[seen] @ q[i] / np.sqrt(K))
            y[b, i] += scores @ v[seen] / scores.sum() @ out[h]
    return y


def rotated(x, positions):
    """Each pair (i, i + K/2) as a complex number, turned."""
    z = x[:, : K // 2] + 1j * x[:, K // 2 :]
    z = z * np.exp(1j * positions[:, None] * BASE ** (-2 * np.arange(K // 2) / K))
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "bias": True},
        {"num_kv_heads": 1, "rotary": Rotary(BASE), "qk_norm_epsilon": 1e-5},
        {"window": 3, "segments": SEGMENTS},
    ],
    ids=["heads", "groups-bias", "rotary-norm", "window-segments"],
)
def test_equals_numpy(options):
    options = dict(options)
    segments, window = options.pop("segments", None), options.get("window", 0)
    layer, params = make(**options)
    x = inputs()
    y = run(layer, params, x, **context(window, segments))
    expected = reference(x, params, rope="rotary" in options, window=window or L, segments=segments)
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_grouped_queries_equal_heads_with_repeated_keys_and_values():
    options = {"rotary": Rotary(BASE), "qk_norm_epsilon": 1e-5}
    grouped, params = make(num_kv_heads=2, **options)
    full, _ = make(num_kv_heads=H, **options)
    kernel = params["qkv"]["kernel"]  # [D, 2, 2 queries + key + value, K]
    heads = [kernel[:, g, [r, 2, 3]] for g in range(2) for r in range(2)]
    repeated = {**params, "qkv": {"kernel": np.stack(heads, axis=1)}}
    x = inputs()
    expected = run(full, repeated, x, **context())
    np.testing.assert_allclose(run(grouped, params, x, **context()), expected, atol=1e-5)


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant():
    layer, params = make(qk_norm_epsilon=1e-5)
    x, kernel = inputs(), params["qkv"]["kernel"]
    factor = np.array([9.0, 5.0, 1.0], np.float32)[:, None]  # query, key, value
    larger = {**params, "qkv": {"kernel": kernel * factor}}
    y = run(layer, params, x, **context())
    np.testing.assert_allclose(run(layer, larger, x, **context()), y, atol=1e-3)
    plain, without = make()
    larger = {**without, "qkv": {"kernel": without["qkv"]["kernel"] * factor}}
    before = run(plain, without, x, **context())
    assert np.abs(run(plain, larger, x, **context()) - before).max() > 0.1


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one", "segments"])
def test_the_mask_is_what_it_says(window, segments):
    mask = np.asarray(causal_mask(L, window=window, segments_BL=segments))
    assert mask.shape == (1 if segments is None else B, L, L)
    for b, i, j in np.ndindex(*mask.shape):
        seen = j <= i and (not window or i - j < window)
        same = segments is None or segments[b, i] == segments[b, j]
        assert mask[b, i, j] == (seen and same), (b, i, j)


def test_a_query_with_nothing_to_see_gives_numbers_and_gradients():
    query, key = jnp.ones((1, 1, 2, 3, K)), jnp.ones((1, 1, 3, K))

    def loss(query):
        return attend(query, key, key, jnp.zeros((1, 3, 3), bool)).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(query)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_softmax_of_bfloat16_is_of_float32_scores():
    """Scores of about 40 would be rounded to quarters in bfloat16."""
    draw = normal(0, jnp.bfloat16)
    query, key, value = (
        (40 * draw(1, 1, 2, 8, 64)).astype(jnp.bfloat16),
        draw(1, 1, 8, 64),
        draw(1, 1, 8, 64),
    )
    out = jax.jit(attend)(query, key, value, np.ones((1, 8, 8), bool))
    assert out.dtype == jnp.bfloat16
    q, k, v = (np.asarray(x, np.float64)[0, 0] for x in (query, key, value))
    scores = np.exp(q @ k.T / 8 - (q @ k.T / 8).max(-1, keepdims=True))
    exact = scores / scores.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(np.asarray(out, np.float32)[0, 0], exact, atol=2e-2)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's kernel runs on a GPU")
@pytest.mark.parametrize("window", [0, 5])
def test_the_fused_kernel_equals_the_plain_one(window):
    draw = normal(0, jnp.bfloat16)
    query, key, value = draw(2, 2, 3, 64, 32), draw(2, 2, 64, 32), draw(2, 2, 64, 32)
    fused = jax.jit(functools.partial(flash_attend, window=window))(query, key, value)
    plain = jax.jit(attend)(query, key, value, causal_mask(64, window=window))
    np.testing.assert_allclose(fused.astype(jnp.float32), plain.astype(jnp.float32), atol=2e-2)


@pytest.mark.parametrize("length", [127, 256, 390, 514])
def test_blocks_of_queries_leave_out_only_what_is_masked(length):
    draw = normal(3)
    query, key, value = draw(2, 2, 3, length, 4), draw(2, 2, length, 4), draw(2, 2, length, 4)
    segments = np.cumsum(draw(2, length) > 1.5, axis=1)
    for mask in causal_mask(length, window=150), causal_mask(length, segments_BL=segments):
        blocks, whole = (jax.jit(f)(query, key, value, mask) for f in (causal_attend, attend))
        np.testing.assert_allclose(blocks, whole, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("length", [9, 260])
def test_the_gradient_by_hand_is_that_of_the_formula(length):
    draw = normal(5)
    query, key, value = draw(2, 2, 3, length, 4), draw(2, 2, length, 4), draw(2, 2, length, 4)
    wanted = draw(2, 2, 3, length, 4)
    segments = np.cumsum(draw(2, length) > 1.2, axis=1)
    mask = causal_mask(length, window=length // 2, segments_BL=segments)
    if length < 256:
        mask = mask.at[0, 3].set(False)  # a query with nothing to see; in blocks it averages others

    def formula(query, key, value):
        scores = jnp.einsum("bgrlk,bgsk->bgrls", query, key) / 4**0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
        return jnp.einsum("bgrls,bgsk->bgrlk", weights, value)

    def gradients(function):
        loss = lambda *operands: (function(*operands) * wanted).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)

    blocks = lambda *operands: causal_attend(*operands, mask)  # noqa: E731
    whole = lambda *operands: attend(*operands, mask)  # noqa: E731
    expected = gradients(formula)
    for ours in (whole, *([] if length < 256 else [blocks])):
        for a, b in zip(gradients(ours), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_without_causality_the_mask_alone_says_what_is_seen():
    layer, params = make(causal=False, bias=True, scale=0.7)
    x, mask = inputs(), SEGMENTS[:, :, None] == SEGMENTS[:, None]
    y = run(layer, params, x, mask=jnp.asarray(mask), positions_BL=jnp.asarray(POSITIONS))
    expected = np.zeros(x.shape) + params["out"]["bias"]
    kernel, bias = params["qkv"]["kernel"], params["qkv"]["bias"]
    for b, h in np.ndindex(B, H):
        q, k, v = (x[b] @ kernel[:, h, i] + bias[h, i] for i in range(3))
        for i in range(L):
            scores = np.exp(0.7 * k[mask[b, i]] @ q[i])
            expected[b, i] += scores @ v[mask[b, i]] / scores.sum() @ params["out"]["kernel"][h]
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("copies", [1, 2, 4], ids=["one-for-all", "of-two-rows", "of-each-row"])
@pytest.mark.parametrize("length", [9, 260])
def test_scores_and_their_gradient_take_a_bias(length, copies):
    """Against the formula, for heads in groups, whole and in blocks."""
    draw = normal(7)
    query, key, value = draw(4, 2, 3, length, 4), draw(4, 2, length, 4), draw(4, 2, length, 4)
    bias, wanted = draw(copies, 2, 3, length, length), draw(4, 2, 3, length, 4)
    mask = causal_mask(length, window=length // 2)

    def formula(query, key, value, bias):
        scores = 0.3 * jnp.einsum("bgrlk,bgsk->bgrls", query, key)
        scores += jnp.repeat(bias, 4 // copies, axis=0)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
        return jnp.einsum("bgrls,bgsk->bgrlk", weights, value)

    def of(function):
        def ours(query, key, value, bias):
            return function(query, key, value, mask, score_bias=bias, scale=0.3)

        return ours

    def both(function):
        loss = lambda *operands: (function(*operands) * wanted).sum()  # noqa: E731
        make = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        return make(query, key, value, bias)

    expected, gradients = both(formula)
    assert np.abs(gradients[3]).max() > 0.01
    for ours in (of(attend), of(causal_attend)):
        value_of_ours, found = both(ours)
        np.testing.assert_allclose(value_of_ours, expected, rtol=1e-4, atol=1e-3)
        for a, b in zip(found, gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_the_bias_of_a_layer_is_one_number_a_head_and_pair():
    """With one number added to a head's scores of all keys nothing changes; on one key, all looks there."""
    layer, params = make(num_kv_heads=2)
    x = inputs()
    y = run(layer, params, x, **context())
    same = jnp.ones((1, H, L, L)) * jnp.arange(H).reshape(1, H, 1, 1)
    np.testing.assert_allclose(
        run(layer, params, x, **context(), score_bias_NHLS=same), y, atol=1e-5
    )
    first = jnp.zeros((1, H, L, L)).at[:, 2, :, 0].set(1e4)
    at_first = run(layer, params, x, **context(), score_bias_NHLS=first)
    kernel, out = params["qkv"]["kernel"], params["out"]["kernel"]  # head 2: query 0 of group 1
    value = x[:, 0] @ kernel[:, 1, 3]
    others = {**params, "out": {"kernel": out * (np.arange(H) != 2)[:, None, None]}}
    expected = np.asarray(run(layer, others, x, **context())) + (value @ out[2])[:, None]
    np.testing.assert_allclose(at_first, expected, atol=2e-5)
