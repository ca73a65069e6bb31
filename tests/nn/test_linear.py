import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import sharding
from lm.nn.linear import Linear, product

NORMAL = nn.initializers.normal(1.0)


def make(shape, axes, num_inputs, *, dtype=jnp.float32, bias=True):
    module = Linear(shape, axes, jnp.dtype(dtype), NORMAL, num_inputs=num_inputs, bias=bias)
    x = np.random.default_rng(0).normal(size=(2, 3, *shape[:num_inputs])).astype(np.float32)
    return module, x


@pytest.mark.parametrize(
    ("shape", "axes", "num_inputs", "formula"),
    [
        ((6, 5), ("embed", "mlp"), 1, "bld,df->blf"),
        ((6, 2, 5), ("embed", "gate", "mlp"), 1, "bld,dgf->blgf"),
        ((4, 3, 6), ("heads", "kv", "embed"), 2, "blhk,hkd->bld"),
    ],
)
def test_equals_numpy_and_names_every_axis(shape, axes, num_inputs, formula):
    module, x = make(shape, axes, num_inputs)
    boxed = jax.jit(module.init)(jax.random.key(0), x)["params"]
    assert sharding.logical_axes(boxed) == {"kernel": axes, "bias": axes[num_inputs:]}
    params = nn.unbox(boxed)
    assert params["kernel"].shape == shape and not params["bias"].any()
    bias = np.random.default_rng(1).normal(size=shape[num_inputs:]).astype(np.float32)
    y = jax.jit(module.apply)({"params": {**params, "bias": bias}}, x)
    np.testing.assert_allclose(y, np.einsum(formula, x, params["kernel"]) + bias, atol=1e-5)


def test_computes_in_its_type_from_float32_parameters():
    module, x = make((6, 5), ("embed", "mlp"), 1, dtype=jnp.bfloat16, bias=False)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x))["params"]
    assert set(params) == {"kernel"} and params["kernel"].dtype == jnp.float32
    assert module.apply({"params": params}, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_the_gradient_by_hand_is_that_of_the_product(lead):
    rng = np.random.default_rng(2)
    x, kernel, dy = (
        rng.normal(size=s).astype(np.float32) for s in ((*lead, 3), (3, 4), (*lead, 4))
    )

    def gradients(function):
        return jax.jit(jax.grad(lambda x, k: (function(x, k) * dy).sum(), argnums=(0, 1)))(
            x, kernel
        )

    for ours, theirs in zip(gradients(product), gradients(jnp.matmul), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
