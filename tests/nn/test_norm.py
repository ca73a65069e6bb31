import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.nn.norm import Norm

EPSILON = 1e-5


def expected(x, kind, scale, bias):
    x = x.astype(np.float64)
    if kind == "layernorm":
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + EPSILON
        ) * scale + bias
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_equals_numpy_with_scale_and_bias_off_their_start(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, (2, 5, 8)).astype(np.float32)
    x[0, 0] = 1e-3  # where epsilon counts
    scale, bias = rng.normal(size=(2, 8)).astype(np.float32)
    module = Norm(kind, bias=True, epsilon=EPSILON)
    params = {"scale": scale} if kind == "rmsnorm" else {"scale": scale, "bias": bias}
    y = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(y, expected(x, kind, scale, bias), atol=2e-6)


def test_computes_in_float32_and_returns_the_type_of_its_input():
    x = np.random.default_rng(0).normal(100.0, 1.0, (3, 64)).astype(np.float32)
    rounded = jnp.asarray(x, jnp.bfloat16)
    params = {"scale": np.ones(64, np.float32)}
    y = Norm("layernorm").apply({"params": params}, rounded)
    assert y.dtype == jnp.bfloat16
    exact = expected(np.asarray(rounded, np.float32), "layernorm", 1.0, 0.0)
    np.testing.assert_allclose(y.astype(np.float32), exact, atol=2**-7)  # one rounding, at the end


@pytest.mark.parametrize(
    ("kind", "names"), [("layernorm", {"scale", "bias"}), ("rmsnorm", {"scale"})]
)
def test_starts_as_the_identity_and_only_layernorm_has_a_bias(kind, names):
    params = nn.unbox(Norm(kind, bias=True).init(jax.random.key(0), jnp.zeros((1, 4))))["params"]
    assert set(params) == names
    np.testing.assert_array_equal(params["scale"], 1)
    assert not params.get("bias", jnp.zeros(1)).any()
