import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import sharding
from lm.nn.embed import Embed, Head, finish_logits, pad_vocab

V, D = 130, 8
NORMAL = nn.initializers.normal(1.0)


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (128, 128), (129, 256), (50_257, 50_304)])
def test_pad_vocab(size, padded):
    assert pad_vocab(size) == padded


def test_the_table_is_looked_up_and_is_the_tied_head():
    module = Embed(V, D, jnp.dtype("float32"), NORMAL)
    tokens = np.array([[0, 5, 129]])
    boxed = jax.jit(module.init)(jax.random.key(0), tokens)["params"]
    assert sharding.logical_axes(boxed) == {"embedding": ("vocab", "embed")}
    table = nn.unbox(boxed)["embedding"]
    assert table.shape == (256, D)
    x = jax.jit(module.apply)({"params": {"embedding": table}}, tokens)
    np.testing.assert_array_equal(x, np.asarray(table)[tokens])
    logits = module.apply({"params": {"embedding": table}}, x, method="attend")
    np.testing.assert_allclose(logits, np.asarray(x) @ np.asarray(table).T, atol=1e-5)


def test_a_head_of_its_own():
    module = Head(V, D, jnp.dtype("float32"), NORMAL)
    x = np.random.default_rng(0).normal(size=(1, 2, D)).astype(np.float32)
    boxed = jax.jit(module.init)(jax.random.key(0), x)["params"]
    assert sharding.logical_axes(boxed) == {"kernel": ("embed", "vocab")}
    kernel = nn.unbox(boxed)["kernel"]
    assert kernel.shape == (D, 256)
    logits = jax.jit(module.apply)({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(logits, x @ np.asarray(kernel), atol=1e-5)


@pytest.mark.parametrize("make", [Embed, Head])
def test_bfloat16_features_give_float32_logits(make):
    module = make(V, D, jnp.dtype("bfloat16"), NORMAL)
    x = jax.random.normal(jax.random.key(0), (1, 2, D)).astype(jnp.bfloat16)
    method = "attend" if make is Embed else None
    logits, variables = module.init_with_output(jax.random.key(0), x, method=method)
    kernel = jax.tree.leaves(nn.unbox(variables))[0]
    assert logits.dtype == kernel.dtype == jnp.float32
    rounded = np.asarray(kernel.astype(jnp.bfloat16), np.float32)
    exact = np.asarray(x, np.float32) @ (rounded.T if make is Embed else rounded)
    np.testing.assert_allclose(
        logits, exact, atol=1e-5
    )  # summed in float32, not rounded to bfloat16


def test_logits_are_capped_and_the_padding_stays_out_of_reach():
    logits = np.linspace(-100, 100, 256, dtype=np.float32)[None, None]
    plain = finish_logits(jnp.asarray(logits), V)
    np.testing.assert_array_equal(plain[..., :V], logits[..., :V])
    capped = finish_logits(jnp.asarray(logits), V, softcap=30.0)
    np.testing.assert_allclose(capped[..., :V], 30 * np.tanh(logits[..., :V] / 30), rtol=1e-5)
    for masked in (plain, capped):
        assert (masked[..., V:] <= -1e9).all() and np.isfinite(masked).all()
        assert jax.nn.softmax(masked)[..., V:].sum() == 0


def test_a_vocabulary_without_padding_is_left_whole():
    logits = jnp.ones((1, 1, 128))
    np.testing.assert_array_equal(finish_logits(logits, 128), logits)
