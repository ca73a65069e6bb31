import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.nn.mlp import ACTIVATIONS, MLP

D, F = 6, 10


def expected(x, up, up_bias, down, down_bias, activation):
    h = np.tensordot(x, up, 1) + up_bias
    if activation == "swiglu":
        gate, value = h[..., 0, :], h[..., 1, :]
        h = gate / (1 + np.exp(-gate)) * value
    elif activation == "relu2":
        h = np.maximum(h, 0) ** 2
    elif activation == "gelu_erf":
        h = 0.5 * h * (1 + np.vectorize(math.erf)(h / np.sqrt(2)))
    else:
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return h @ down + down_bias


@pytest.mark.parametrize("activation", ["gelu", "gelu_erf", "relu2", "swiglu"])
def test_equals_numpy(activation):
    assert activation in ACTIVATIONS
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, D)).astype(np.float32)
    hidden = (2, F) if activation == "swiglu" else (F,)
    up, up_bias, down, down_bias = (
        rng.normal(size=shape).astype(np.float32) for shape in ((D, *hidden), hidden, (F, D), (D,))
    )
    params = {"up": {"kernel": up, "bias": up_bias}, "down": {"kernel": down, "bias": down_bias}}
    init = nn.initializers.normal(1.0)
    module = MLP(F, activation, jnp.dtype("float32"), init, init, bias=True)
    y = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(
        y, expected(x, up, up_bias, down, down_bias, activation), rtol=1e-4, atol=1e-5
    )


def test_the_two_gelus_are_not_the_same():
    x = jnp.linspace(-3, 3, 61)
    apart = np.abs(ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_erf"](x)).max()
    assert 1e-4 < apart < 1e-3


def test_the_second_product_starts_by_its_own_initialiser():
    module = MLP(F, "relu2", jnp.dtype("float32"), nn.initializers.ones, nn.initializers.zeros)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, D))))["params"]
    assert params["up"]["kernel"].all() and not params["down"]["kernel"].any()
    assert set(params["up"]) == set(params["down"]) == {"kernel"}


def test_relu_and_gated_gelu_equal_numpy():
    rng = np.random.default_rng(0)
    x, down = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, D), (F, D)))
    init = nn.initializers.normal(1.0)
    for activation, shape in (("relu", (D, F)), ("geglu", (D, 2, F))):
        up = rng.normal(size=shape).astype(np.float32)
        params = {"up": {"kernel": up}, "down": {"kernel": down}}
        y = jax.jit(MLP(F, activation, jnp.dtype("float32"), init, init).apply)(
            {"params": params}, x
        )
        h = np.tensordot(x, up, 1)
        if activation == "geglu":
            gate, h = h[..., 0, :], h[..., 1, :]
            h = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * h
        else:
            h = np.maximum(h, 0)
        np.testing.assert_allclose(y, h @ down, rtol=1e-4, atol=1e-5)
