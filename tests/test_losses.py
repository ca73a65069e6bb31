"""The chunked loss against plain formulas, in value, gradient, memory and sharding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from lm import losses, sharding

TOLERANCE = 1e-5
B, L, D, V, PADDED = 4, 12, 8, 27, 32


def tied(params, x):
    logits = jnp.einsum("bcd,vd->bcv", x.astype(jnp.float32), params["embedding"])
    return jnp.where(jnp.arange(logits.shape[-1])[None, None] < V, logits, -1e9)


def untied(params, x):
    logits = x.astype(jnp.float32) @ params["kernel"] + params["bias"][None, None]
    return jnp.where(jnp.arange(logits.shape[-1])[None, None] < V, logits, -1e9)


def make(seed=0, dtype=jnp.float32, params_dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(B, L, D)), dtype)
    targets = jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.5, 2, (B, L)) * (rng.uniform(size=(B, L)) < 0.7))
    params = {
        "embedding": jnp.asarray(rng.normal(size=(PADDED, D)), params_dtype),
        "kernel": jnp.asarray(rng.normal(size=(D, PADDED)), params_dtype),
        "bias": jnp.asarray(rng.normal(size=(PADDED,)), params_dtype),
        "elsewhere": jnp.ones((5, 7), params_dtype),
    }
    return params, x, targets, weights.astype(jnp.float32)


def plain(logits_fn, params, x, targets, weights, *, z_loss=0.0, label_smoothing=0.0):
    """The objective from its definition, on full logits."""
    logits = logits_fn(params, x)[..., :V]
    wanted = optax.smooth_labels(jax.nn.one_hot(targets, V), label_smoothing)
    loss = optax.softmax_cross_entropy(logits, wanted)
    return jnp.sum(weights * (loss + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2))


def chunked(logits_fn, params, x, targets, weights, **options):
    options = {"max_scored": L, "vocab_size": V} | options
    return losses.cross_entropy(logits_fn, params, x, targets, weights, **options)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(1e-30, np.abs(np.asarray(b, np.float64)).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def grad(function, *args, **options):
    return jax.jit(
        jax.value_and_grad(
            lambda p, x: function(args[0], p, x, *args[3:], **options), argnums=(0, 1)
        )
    )(args[1], args[2])


def objective(*args, **options):
    return chunked(*args, **options)[0]


@pytest.mark.parametrize("logits_fn", [tied, untied])
@pytest.mark.parametrize("chunk", [0, 1, 4, 5, 12])
def test_value_and_gradient_are_those_of_optax_on_full_logits(logits_fn, chunk):
    params, x, targets, weights = make()
    ours = grad(objective, logits_fn, params, x, targets, weights, chunk=chunk)
    theirs = grad(plain, logits_fn, params, x, targets, weights)
    assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{"z_loss": 0.3}, {"label_smoothing": 0.2}])
def test_penalties_follow_their_definitions_over_real_columns(options):
    params, x, targets, weights = make()
    ours = grad(objective, untied, params, x, targets, weights, chunk=5, **options)
    theirs = grad(plain, untied, params, x, targets, weights, **options)
    assert_close(ours, theirs)


def test_sums_are_pure_loss_weight_correct_and_penalty():
    params, x, targets, weights = make()
    logits = np.asarray(tied(params, x), np.float64)
    targets = targets.at[0].set(logits[0].argmax(-1))  # else few are right
    lse = np.log(np.exp(logits).sum(-1))
    loss = lse - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    _, sums = chunked(tied, params, x, targets, weights, z_loss=0.3, label_smoothing=0.2, chunk=5)
    expected = {
        "loss": (weights * loss).sum(),
        "weight": weights.sum(),
        "correct": (weights * (logits.argmax(-1) == targets)).sum(),
        "z_loss": 0.3 * (weights * lse**2).sum(),
    }
    assert sums.keys() == expected.keys()
    for name, value in sums.items():
        assert value.dtype == jnp.float32 and value.shape == ()
        np.testing.assert_allclose(value, expected[name], rtol=TOLERANCE, err_msg=name)


def test_the_first_of_equal_logits_is_the_answer():
    params, x, targets, weights = make()
    targets = targets.at[:, ::2].set(0).at[:, 1::2].set(3)
    _, sums = chunked(tied, params, x * 0, targets, weights)
    np.testing.assert_allclose(sums["correct"], weights[:, ::2].sum(), rtol=TOLERANCE)


def test_finite_differences_agree_in_float64():
    with jax.enable_x64(True):
        params, x, targets, weights = make(dtype=jnp.float64, params_dtype=jnp.float64)

        def in_float64(params, x):
            return x @ params["kernel"] + params["bias"][None, None]

        def function(kernel, bias, x):
            return objective(
                in_float64, params | {"kernel": kernel, "bias": bias}, x, targets, weights,
                vocab_size=PADDED, z_loss=0.1, label_smoothing=0.1, chunk=5,
            )  # fmt: skip

        check_grads(
            function, (params["kernel"], params["bias"], x), order=1, modes=["rev"], rtol=1e-6
        )


def test_scored_positions_are_gathered_in_order():
    params, x, targets, weights = make()
    scored = int((weights != 0).sum(axis=1).max())
    assert scored < L
    seen = []

    def spy(params, x):
        seen.append(x.shape)
        return tied(params, x)

    ours = grad(objective, spy, params, x, targets, weights, max_scored=scored, chunk=100)
    assert_close(ours, grad(plain, tied, params, x, targets, weights))
    assert set(seen) == {(B, scored, D)}
    gathered, _, kept = losses._gather_scored(x, targets, weights, scored)
    row = np.flatnonzero(np.asarray(weights[0]))
    np.testing.assert_array_equal(gathered[0, : len(row)], x[0, row])
    np.testing.assert_array_equal(kept[0, : len(row)], weights[0, row])


def test_a_row_beyond_max_scored_is_not_dropped_in_silence():
    params, x, targets, weights = make()
    value, sums = chunked(tied, params, x, targets, weights, max_scored=3)
    assert np.isnan(value) and np.isnan(sums["weight"])


def test_no_weight_is_zero_and_not_nan():
    params, x, targets, weights = make()
    value, gradient = grad(objective, untied, params, x, targets, weights * 0, chunk=5, z_loss=1.0)
    assert value == 0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


def test_bfloat16_features_keep_float32_sums():
    params, x, targets, weights = make(dtype=jnp.bfloat16)
    value, (_, dx) = grad(objective, tied, params, x, targets, weights, chunk=5)
    expected, _ = grad(plain, tied, params, x.astype(jnp.float32), targets, weights)
    assert value.dtype == jnp.float32 and dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, expected, rtol=TOLERANCE)


def test_gradient_scales_with_what_follows():
    params, x, targets, weights = make()

    def mean(function):
        return jax.grad(lambda x: function(tied, params, x, targets, weights) / weights.sum())(x)

    assert_close(mean(lambda *args: objective(*args, chunk=5)), mean(plain))


def temporaries(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_unused_parameters_cost_nothing():
    params, x, targets, weights = make()

    def loss(params, x):
        # As a layer would: the features depend on what the head does not use.
        features = x * params["elsewhere"].sum()
        return objective(tied, params, features, targets, weights, chunk=3)

    shape = lambda n: params | {"elsewhere": jax.ShapeDtypeStruct((n, n), jnp.float32)}  # noqa: E731
    small, large = (temporaries(jax.grad(loss), shape(n), x) for n in (1, 2048))
    assert large - small < 2**20 < 2048 * 2048 * 4


def test_sharded_is_one_device_and_never_gathers_logits():
    params, x, targets, weights = make()
    function = jax.value_and_grad(
        lambda p, x, t, w: objective(tied, p, x, t, w, chunk=4, z_loss=0.1), argnums=(0, 1)
    )
    expected = jax.jit(function)(params, x, targets, weights)
    for sizes in ({"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.make_mesh(sharding.Config(**sizes))
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        head = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
        whole = NamedSharding(mesh, PartitionSpec())
        spread = {
            k: jax.device_put(v, head if k == "embedding" else whole) for k, v in params.items()
        }
        batch = [jax.device_put(a, rows) for a in (x, targets, weights)]
        with sharding.use(mesh):
            compiled = jax.jit(function).lower(spread, *batch).compile()
            assert_close(compiled(spread, *batch), expected, 1e-6)
        gathers = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", compiled.as_text())
        sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in gathers]
        # A chunk's logits on one device hold B / shards * chunk * V values.
        assert all(size <= PADDED * D for size in sizes), gathers
