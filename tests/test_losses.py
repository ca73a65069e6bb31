"""The chunked loss against plain formulas, in value, gradient, memory and sharding."""

import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from ml_collections import ConfigDict

from lm import experiment, losses, placement, sharding
from lm.nn import linear

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


def test_equal_logits_share_the_answer():
    """So that a model that has learned nothing is right by chance, not always or never."""
    params, x, targets, weights = make()
    params = {**params, "bias": jnp.zeros_like(params["bias"]).at[3:5].set(1.0)}
    targets = targets.at[:, ::2].set(0).at[:, 1::2].set(3)
    _, sums = chunked(untied, params, x * 0, targets, weights)
    np.testing.assert_allclose(sums["correct"], weights[:, 1::2].sum() / 2, rtol=TOLERANCE)


def test_finite_differences_agree_in_float64():
    with jax.enable_x64(True):
        params, x, targets, weights = make(dtype=jnp.float64, params_dtype=jnp.float64)

        def in_float64(params, x):
            return x @ params["kernel"] + params["bias"][None, None]

        @jax.jit
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
        loss = lambda x: function(tied, params, x, targets, weights) / weights.sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(x)

    assert_close(mean(lambda *args: objective(*args, chunk=5)), mean(plain))


def temporaries(function, *args):
    """Return the bytes that the compiled function needs besides arguments and results."""
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
    loops = [
        e for e in jax.make_jaxpr(jax.grad(loss))(params, x).eqns if e.primitive.name == "scan"
    ]
    carried = {var.aval.shape for loop in loops for var in loop.outvars}
    assert params["embedding"].shape in carried and params["elsewhere"].shape not in carried


MESHES = [(4, 1, 1), (1, 4, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8)]


@pytest.mark.parametrize("data, fsdp, tensor", MESHES)
def test_sharded_is_one_device_and_never_gathers_logits(data, fsdp, tensor):
    params, *batch = make()
    chunk = 4

    def head(params, x):
        table = sharding.gather(params["embedding"], ("vocab", "embed"))
        return tied(params | {"embedding": table}, x)

    def loss(params, x, targets, weights):
        return objective(head, params, x, targets, weights, chunk=chunk, z_loss=0.1)

    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    expected = function(params, *batch)
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = sharding.make_mesh(sharding.Config(data, fsdp, tensor), devices)
    axes = {"embedding": ("vocab", "embed"), "kernel": (), "bias": (), "elsewhere": ()}
    params = jax.device_put(params, sharding.shardings(mesh, axes, params))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    with sharding.use(mesh):
        compiled = function.lower(params, *batch).compile()
    assert_close(compiled(params, *batch), expected, 1e-6)
    gathers = [
        tuple(int(size) for size in dims.split(","))
        for dims in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", compiled.as_text())
    ]
    # The table once where it is split by fsdp, and nothing else.
    assert {tuple(sorted(dims)) for dims in gathers} <= {tuple(sorted((PADDED // tensor, D)))}
    assert bool(gathers) == (fsdp > 1)


@pytest.mark.parametrize("max_scored", [L, 5])
@pytest.mark.parametrize("data, tensor", [(2, 1), (1, 2)])
def test_positions_that_are_split_stay_where_they_are(data, tensor, max_scored):
    """A chunk has its share of each device's; of scored ones the features go to a part each, no row whole."""
    params, x, targets, weights = make()
    weights = jnp.where(jnp.arange(L)[None] % 3 == 0, weights, 0)  # at most four of a row

    def head(params, x):
        return sharding.constrain(tied(params, x), "act_batch", "act_length", "act_vocab")

    def loss(params, x, targets, weights):
        options = {"chunk": 2, "max_scored": max_scored, "whole_rows": True}
        total, sums = chunked(head, params, x, targets, weights, **options)
        return total, sums

    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    expected, (d_params, dx) = function(params, x, targets, weights)
    parts = 3
    mesh = sharding.make_mesh(
        sharding.Config(data, 1, tensor, context=parts), jax.devices()[: data * tensor * parts]
    )
    with sharding.use(mesh):
        named = {"x": x, "targets": targets, "weights": weights}
        placed = placement.place_batch(mesh, {k: np.asarray(v) for k, v in named.items()})
        compiled = function.lower(params, *placed.values()).compile()
        found = compiled(params, *placed.values())
    order = placement.columns(L, parts)
    assert_close(found, (expected, (d_params, dx[:, order])), 1e-6)
    sizes = [
        math.prod(int(size) for size in dims.split(","))
        for dims in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", compiled.as_text())
    ]
    assert max(sizes, default=0) < B // data * L * D


FULL = {"B": 8, "L": 1024, "D": 768, "V": 50304}


def full_size(layout, chunk):
    """Return (abstract arguments, plain and chunked value_and_grad) at the size of GPT-2 small.

    The plain one is optax on the logits of an einsum, the chunked one ours with the head of our models.
    """
    B, L, D, V = FULL.values()
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    head = shape(V, D) if layout == "vd" else shape(D, V)
    arguments = head, shape(B, L, D), shape(B, L, dtype=jnp.int32), shape(B, L)

    def full(w, x, t, weights):
        logits = jnp.einsum(f"bld,{layout}->blv", x, w)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, t) * weights)

    def ours(w, x, t, weights):
        head = lambda w, x: linear.product(x, w, layout == "vd")  # noqa: E731
        return losses.cross_entropy(head, w, x, t, weights, max_scored=L, chunk=chunk)[0]

    return arguments, *(jax.jit(jax.value_and_grad(f, argnums=(0, 1))) for f in (full, ours))


@pytest.mark.parametrize("layout", ["vd", "dv"])
def test_temporary_memory_is_a_fifth_of_full_logits(layout):
    arguments, full, ours = full_size(layout, chunk=0)
    assert temporaries(ours, *arguments) <= 0.2 * temporaries(full, *arguments)


@pytest.mark.measure
@pytest.mark.parametrize("layout", ["vd", "dv"])
def test_time_is_little_more_than_that_of_the_matrix_products(layout):
    """At most 0.6 of full logits, or, where products are slow, 1.2 of the three that any way needs."""
    shapes, full, ours = full_size(layout, chunk=0)
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s.shape), s.dtype) for s in shapes[:2])
    targets = jnp.asarray(rng.integers(0, FULL["V"], shapes[2].shape), jnp.int32)
    part = x[:1]

    @jax.jit
    def product(w, x):
        return jnp.einsum(f"bld,{layout}->blv", x, w)

    def products(w, x, *_):
        for _ in range(3 * FULL["B"]):
            product(w, part).block_until_ready()

    seconds = {"full": [], "ours": [], "products": []}
    for _ in range(3):
        for name, function in (("full", full), ("ours", ours), ("products", products)):
            start = time.perf_counter()
            jax.block_until_ready(function(w, x, targets, jnp.ones(targets.shape)))
            seconds[name].append(time.perf_counter() - start)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    print({name: f"{value:.1f} s" for name, value in median.items()})
    assert median["ours"] <= max(0.6 * median["full"], 1.2 * median["products"])


class Room(Exception):
    pass


@pytest.mark.parametrize(
    ("sizes", "ways"),
    [
        ({"stage": 4, "data": 2}, 2),
        ({"data": 2, "tensor": 2, "context": 2}, 8),
        ({"dcn": 2, "data": 4}, 8),
        ({"dcn": 2, "data": 4, "local_steps": 5}, 4),
    ],
)
def test_a_chunks_room_is_that_of_the_devices_its_logits_are_split_over(
    tiny, monkeypatch, sizes, ways
):
    """Stages and groups that train apart hold all of theirs."""

    def look(*_, shards, **how):
        raise Room(shards)

    layers = {"model__num_layers": 4, "model__scan": True}
    made = experiment.build(tiny(mesh=ConfigDict(sizes), data__batch_size=16, **layers))
    monkeypatch.setattr(losses, "cross_entropy", look)
    _, train_step, _, abstract = experiment.jitted(made)
    with sharding.use(made.mesh), pytest.raises(Room, match=rf"^{ways}\b"):
        batch = placement.place_batch(made.mesh, made.batches[0])
        train_step.lower(abstract, batch)
