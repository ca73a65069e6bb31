import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import sharding
from lm.nn.linear import Linear
from lm.nn.transformer import SCANNED, UNROLLED, Stack

B, L, D, N = 2, 6, 8, 3


class Block(nn.Module):
    """Two products with weights, one without (as attention's), and dropout."""

    rate: float
    train: bool
    decode: bool

    @nn.compact
    def __call__(self, x, scale):
        init = nn.initializers.normal(0.5)
        linear = functools.partial(Linear, dtype=scale.dtype, kernel_init=init)
        h = linear((D, D), ("embed", "mlp"), name="up")(x)
        scores = jnp.einsum("bld,bsd->bls", h, h)
        h = jnp.tanh(jnp.einsum("bls,bsd->bld", jax.nn.softmax(scores), h))
        h = nn.Dropout(self.rate, deterministic=not self.train)(h * scale)
        return x + linear((D, D), ("mlp", "embed"), name="down")(h)


def stack(rate=0.0, **options):
    return Stack(Block, {"rate": rate}, N, **options)


def inputs(dtype=np.float32):
    x = np.random.default_rng(1).normal(size=(B, L, D)).astype(dtype)
    return x, np.full((1, 1, 1), 0.7, dtype)


@functools.cache
def unrolled_params():
    init = functools.partial(stack().init, train=False, decode=False)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(1), *inputs()))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def restack(params):
    layers = [params[UNROLLED.format(layer)] for layer in range(N)]
    return {SCANNED: jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


def loss(module, params, rng=None, dtype=np.float32):
    options = {"rngs": {"dropout": rng}} if rng is not None else {}
    y = module.apply(
        {"params": params}, *inputs(dtype), train=rng is not None, decode=False, **options
    )
    return jnp.square(y).sum()


def exact_gradient(module, params):
    """Return value and gradient in float64, where rounding hides nothing."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        function = functools.partial(loss, module, dtype=np.float64)
        return jax.device_get(jax.jit(jax.value_and_grad(function))(params))


@functools.cache
def plain_gradient():
    return exact_gradient(stack(), unrolled_params())


@pytest.mark.parametrize(
    "options",
    [{"scan": True}, {"remat": "dots"}, {"remat": "full"}, {"scan": True, "remat": "full"}],
    ids=str,
)
def test_scanned_and_rematerialised_layers_equal_the_plain_loop(options):
    params = unrolled_params()
    given = restack(params) if options.get("scan") else params
    value, gradient = exact_gradient(stack(**options), given)
    expected, expected_gradient = plain_gradient()
    if options.get("scan"):
        expected_gradient = restack(expected_gradient)
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13 * np.abs(b).max()),
        gradient,
        expected_gradient,
    )


@pytest.mark.parametrize("scan", [False, True])
def test_rematerialising_saves_less_for_the_gradient(scan):
    params = restack(unrolled_params()) if scan else unrolled_params()

    def saved_bytes(remat):
        residuals = jax.eval_shape(
            lambda params: jax.vjp(functools.partial(loss, stack(scan=scan, remat=remat)), params)[
                1
            ],
            params,
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    none, dots, full = map(saved_bytes, ("none", "dots", "full"))
    width = B * L * D * 4  # one activation
    assert dots - full == N * width, "of products with kernels, the gradient needs the first"
    assert none - dots >= N * 2 * B * L * L * 4, "dots drops the products without weights"
    assert full <= sum(leaf.size * 4 for leaf in jax.tree.leaves(params)) + (N + 3) * width


class Dropping(nn.Module):
    """Dropout alone."""

    train: bool
    decode: bool

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=not self.train)(x)


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_is_another_in_every_layer(scan):
    module = Stack(Dropping, {}, N, scan=scan)
    apply = jax.jit(functools.partial(module.apply, train=True, decode=False))
    y = apply({}, np.ones((4, 64, 64), np.float32), rngs={"dropout": jax.random.key(0)})
    assert (y != 0).mean() == pytest.approx(0.5**N, abs=0.02)


def test_a_rematerialised_pass_repeats_its_dropout():
    """The gradient is of the mask that the value was made with: a finite difference agrees."""
    module, params = stack(rate=0.5, scan=True, remat="full"), restack(unrolled_params())
    function = jax.jit(jax.value_and_grad(functools.partial(loss, module)))
    first, other = jax.random.key(3), jax.random.key(4)
    value, gradient = function(params, first)
    assert function(params, other)[0] != value
    move = jax.tree.map(lambda g: 2e-3 * g / np.linalg.norm(g), gradient)
    ahead, _ = function(jax.tree.map(np.add, params, move), first)
    behind, _ = function(jax.tree.map(np.subtract, params, move), first)
    slope = sum(
        float((g * m).sum()) for g, m in zip(*map(jax.tree.leaves, (gradient, move)), strict=True)
    )
    assert float(ahead - behind) / 2 == pytest.approx(slope, rel=2e-2)


def test_scanned_layers_start_apart_and_name_their_axis():
    init = functools.partial(stack(scan=True).init, train=False, decode=False)
    boxed = jax.jit(init)(jax.random.key(1), *inputs())["params"]
    assert sharding.logical_axes(boxed)[SCANNED]["up"]["kernel"] == ("layers", "embed", "mlp")
    params = nn.unbox(boxed)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, restack(unrolled_params()))
    up = params[SCANNED]["up"]["kernel"]
    assert not np.allclose(up[0], up[1]) and not np.allclose(up[1], up[2])
