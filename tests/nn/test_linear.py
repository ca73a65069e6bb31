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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inputs", [3, 40])  # of one row 40 are taken in eight parts
@pytest.mark.parametrize("lead", [(), (1, 1), (5,), (2, 5)])
def test_the_product_and_its_gradient_by_hand_are_those_of_jax(lead, inputs, transposed):
    rng = np.random.default_rng(2)
    shapes = (*lead, inputs), (4, inputs) if transposed else (inputs, 4), (*lead, 4)
    x, kernel, dy = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    def both(function):
        values = jax.value_and_grad(lambda x, k: (function(x, k) * dy).sum(), argnums=(0, 1))
        return function(x, kernel), *jax.tree.leaves(jax.jit(values)(x, kernel))

    ours = both(lambda x, kernel: product(x, kernel, transposed))
    theirs = both(lambda x, kernel: jnp.matmul(x, kernel.T if transposed else kernel))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_parts_of_one_row_are_summed_wide():
    rng = np.random.default_rng(3)
    x, kernel = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1, 1024), (1024, 64))
    )
    exact = np.float64(x.astype("f")) @ np.float64(kernel.astype("f"))
    error = np.abs(np.float64(product(x, kernel).astype("f")) - exact).max()
    assert error <= 2**-8 * np.abs(exact).max(), "of one rounding"
