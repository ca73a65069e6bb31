"""Experts: the layer is a loop over tokens, capacity drops by position, and a mesh changes nothing."""

import dataclasses
import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lm import config as config_lib
from lm import experiment, models, muon, placement, sharding, step
from lm.config import ConfigError
from lm.models import gpt, t5
from lm.nn import moe
from lm.nn.transformer import SOWN

D, E, F, ROWS, LENGTH, VOCAB = 6, 4, 5, 3, 8, 99
SEGMENTS = np.array([[1] * 8, [1, 1, 1, 2, 2, 0, 0, 0], [0, 1, 1, 0, 1, 1, 1, 1]], np.int32)


def layer(**options):
    defaults = {"num_experts": E, "experts_per_token": 2, "expert_dim": F, "activation": "relu"}
    init = nn.initializers.normal(1.0)
    defaults |= {"dtype": jnp.float32, "kernel_init": init, "out_init": init}
    return moe.MoE(**{**defaults, "balance_loss": 1.0, "router_z_loss": 1.0, **options})


@functools.cache
def tokens():
    return np.random.default_rng(0).normal(size=(ROWS, LENGTH, D)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def applied(module, params, x, segments):
    return module.apply({"params": params}, x, segments, mutable=[*SOWN])


def run(module, x=None, params=None):
    """Return (parameters, output [B, L, D], what was sown)."""
    x = tokens() if x is None else x
    params = params or nn.unbox(jax.jit(module.init)(jax.random.key(0), x, SEGMENTS))["params"]
    return params, *jax.tree.map(np.asarray, applied(module, params, x, SEGMENTS))


def by_hand(module, params, x, room=LENGTH):
    """Return (output, p, choices by token, number dropped), one token after the other."""
    up, down = params["up"]["kernel"], params["down"]["kernel"]
    y, p = np.zeros_like(x), np.asarray(jax.nn.softmax(x @ params["router"]["kernel"]))
    chosen, dropped = {}, 0
    for row, taken in enumerate(np.zeros((ROWS, E), int)):
        for place in np.flatnonzero(SEGMENTS[row]):
            best = np.argsort(-p[row, place])[: module.experts_per_token]
            chosen[row, place] = best
            gates = p[row, place, best]
            for expert, gate in zip(
                best, gates / (gates.sum() if len(best) > 1 else 1), strict=True
            ):
                taken[expert] += 1
                dropped += taken[expert] > room
                if taken[expert] <= room:
                    h = np.tensordot(x[row, place], up[expert], 1)
                    h = np.maximum(h, 0) if h.ndim == 1 else jax.nn.silu(h[0]) * h[1]
                    y[row, place] += gate * (h @ down[expert])
    return y, p, chosen, dropped


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "swiglu", "experts_per_token": 1},
        {"capacity_factor": 0.75, "experts_per_token": 3},
        {"activation": "swiglu", "capacity_factor": 1.0},
    ],
)
def test_the_layer_is_a_loop_over_tokens(options):
    module = layer(**options)
    params, found, sown = run(module)
    factor, count = module.capacity_factor, module.experts_per_token
    room = moe.capacity(LENGTH, count, E, factor) if factor else LENGTH
    expected, _, chosen, dropped = by_hand(module, params, tokens(), room)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if factor:
        assert dropped > 0
        assert sown["reports"]["tokens_dropped"][0] == (dropped, count * len(chosen))


def test_losses_are_means_over_rows_of_what_their_tokens_lose():
    module = layer()
    params, _, sown = run(module)
    _, p, chosen, _ = by_hand(module, params, tokens())
    balance = z = 0.0
    fullest = mean = 0
    for row in range(ROWS):
        places = np.flatnonzero(SEGMENTS[row])
        share = sum(np.bincount(chosen[row, place], minlength=E) for place in places)
        fullest, mean = fullest + share.max(), mean + share.mean()
        balance += E * (share / share.sum() * p[row, places].mean(0)).sum() / 1
        logits = tokens()[row, places] @ params["router"]["kernel"]
        z += np.square(np.asarray(jax.nn.logsumexp(logits, axis=-1))).mean()
    (found,), weight = sown["losses"]["balance_loss"], ROWS
    np.testing.assert_allclose(found, (balance, weight), rtol=1e-5)
    np.testing.assert_allclose(sown["losses"]["router_z_loss"][0], (z, weight), rtol=1e-5)
    np.testing.assert_allclose(sown["reports"]["expert_load"][0], (fullest, mean))


def test_shared_experts_meet_every_token():
    params, found, _ = run(layer(shared_experts=2))
    up, down = params["shared"]["up"]["kernel"], params["shared"]["down"]["kernel"]
    assert up.shape == (D, 2 * F)
    expected, *_ = by_hand(layer(), params, tokens())
    expected = expected + np.maximum(tokens() @ up, 0) @ down
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_room_goes_to_the_first_of_a_row_and_never_to_padding():
    """All tokens want the same two experts, each of which has room for three tokens of a row."""
    module = layer(capacity_factor=0.75)
    params, *_ = run(module)
    params["router"]["kernel"] = jnp.zeros((D, E))
    _, found, _ = run(module, params=params)
    served = [[0, 1, 2], [0, 1, 2], [1, 2, 4]]
    assert [np.flatnonzero(row.any(-1)).tolist() for row in found] == served
    # What comes later in the row changes nothing.
    other = tokens().copy()
    other[:, 4:] += 1
    np.testing.assert_array_equal(run(module, other, params)[1][:, :4], found[:, :4])


def test_room_is_at_least_one_and_at_most_the_row():
    assert moe.capacity(1, 2, 8, 1.0) == 1
    assert moe.capacity(10, 2, 8, 1.25) == 4
    assert moe.capacity(10, 2, 8, 9.0) == 10


def test_a_loss_without_weight_is_not_there():
    _, _, sown = run(layer(balance_loss=0.0, router_z_loss=0.0))
    assert "losses" not in sown


# In a model.


def tiny(family=gpt, **options):
    fields = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "num_experts": 8, "expert_dim": 48}
    fields |= {"scan": True} | ({"head_dim": 8} if family is t5 else {})
    cfg = family.Config(**{**fields, **options})
    sizes = {"vocab_size": VOCAB, "max_length": 16, "packed": True}
    return models.build(models.resolve(cfg, **sizes), decode_length=16)


def batch_of(rows=16, length=12):
    """Return rows of two documents and padding, of several lengths; T5 reads them as its source too."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    ends = (length - np.arange(rows) % 5)[:, None]
    places = np.arange(length, dtype=np.int32)[None]
    segments = np.where(places < ends, 1 + (places >= 5), 0).astype(np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments,
        "positions": np.where(places >= 5, places - 5, np.repeat(places, rows, 0)),
        "weights": (segments > 0).astype(np.float32),
    }
    more = {"source": "inputs", "source_segments": "segments", "source_positions": "positions"}
    return batch | {name: batch[ours] for name, ours in more.items()}


def jitted_step(model, mesh, accumulate=1, tx=None):
    """Return (state, step) on a mesh, which must be in use."""
    tx = tx or optax.sgd(0.1, momentum=0.9)
    init = step.make_init(model, tx, seed=0, shape=(9, 16, 12), average=False, stateful=False)
    axes, _ = step.parameter_axes(model)
    placed = step.state_shardings(mesh, jax.eval_shape(init), axes)
    objective = step.Objective(max_scored=12, vocab_size=VOCAB)
    function = functools.partial(
        step.train_step, model=model, tx=tx, objective=objective, seed=0, accumulate=accumulate
    )
    return jax.jit(init, out_shardings=placed)(), jax.jit(function, out_shardings=(placed, None))


def train(model, mesh, *, num_steps=5, look=True, **options):
    """Return (metrics of each step, final parameters, each token's experts at the start)."""
    with sharding.use(mesh):
        state, one = jitted_step(model, mesh, **options)
        batch, rows = placement.place_batch(mesh, batch_of()), []
        apply = jax.jit(lambda p, b: model.apply({"params": p}, b, mutable=["intermediates"])[1])
        experts = jax.device_get(apply(state.params, batch)) if look else {}
        for _ in range(num_steps):
            state, sums = one(state, batch)
            assert bool(sums.pop("healthy"))
            rows.append({name: float(a / b) for name, (a, b) in sums.items()})
        return rows, jax.device_get(state.params), experts


def assert_alike(found, expected):
    rows, params, experts = found
    jax.tree.map(np.testing.assert_array_equal, experts, expected[2])
    for ours, theirs in zip(rows, expected[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), params, expected[1]
    )
    assert all(error < 1e-5 for error in jax.tree.leaves(errors)), errors


def one_device():
    return sharding.make_mesh(sharding.Config(), jax.devices()[:1])


@pytest.mark.parametrize("factor", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_accumulation_is_one_batch(factor):
    model = tiny(num_layers=1, scan=factor > 0, capacity_factor=factor)
    whole = train(model, one_device(), num_steps=2, look=False)
    parts = train(model, one_device(), num_steps=2, look=False, accumulate=4)
    assert {"balance_loss", "router_z_loss"} <= set(whole[0][0])
    assert all(row["expert_load"] >= 1 for row in whole[0])
    assert_alike(parts, whole)


MESHES = [{"expert": 8}, {"data": 2, "expert": 4}, {"expert": 2, "fsdp": 2, "tensor": 2}]
MIXED = [
    {"data": 4, "expert": 2}, {"fsdp": 2, "expert": 4}, {"fsdp": 4, "expert": 2},
    {"tensor": 2, "expert": 4}, {"tensor": 4, "expert": 2}, {"data": 2, "fsdp": 2, "expert": 2},
    {"data": 2, "tensor": 2, "expert": 2}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]  # fmt: skip
CASES = [(*kind, sizes) for kind in ((gpt, 0.0), (gpt, 1.0), (t5, 0.0)) for sizes in MESHES]
CASES += [(gpt, 0.0, sizes) for sizes in MIXED]


@functools.cache
def reference(family, factor, **options):
    return train(tiny(family, capacity_factor=factor, **options), one_device())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "factor", "sizes"), CASES, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_every_mesh_is_one_device(family, factor, sizes):
    """Five steps of 16 ragged rows of 12 tokens."""
    mesh = sharding.make_mesh(sharding.Config(**{"data": 1, **sizes}))
    found = train(tiny(family, capacity_factor=factor), mesh)
    assert_alike(found, reference(family, factor))


def collectives(module, mesh):
    """Return how often each collective is in the gradient of a layer."""
    x, segments = np.zeros((16, LENGTH, D), np.float32), np.ones((16, LENGTH), np.int32)
    boxed = jax.eval_shape(module.init, jax.random.key(0), x, segments)["params"]
    shapes = nn.unbox(boxed)
    placed = (
        sharding.shardings(mesh, sharding.logical_axes(boxed), shapes),
        *((sharding.batch_sharding(mesh),) * 2),
    )

    def total(params, x, segments):
        return jnp.square(module.apply({"params": params}, x, segments)).sum()

    with sharding.use(mesh):
        gradient = jax.jit(
            jax.grad(total, argnums=(0, 1)), in_shardings=placed, out_shardings=placed[:2]
        )
        text = gradient.lower(shapes, x, segments).compile().as_text()
    return Counter(re.findall(r" (all-to-all|reduce-scatter|all-gather)\(", text))


def test_tokens_reach_experts_by_all_to_all_with_capacity_and_by_gathering_without():
    mesh = sharding.make_mesh(sharding.Config(data=1, expert=8))
    wide = {"num_experts": 8, "expert_dim": 512}  # else it is too small to be split
    found = collectives(layer(capacity_factor=1.0, **wide), mesh)
    assert found == {"all-to-all": 4}  # there and back, forward and backward
    found = collectives(layer(**wide), mesh)
    # Tokens, choices and gates, and the gradient; sums, and the gradients of tokens and gates.
    assert found == {"all-gather": 4, "reduce-scatter": 3}


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "expert": 2}, {"data": 2, "tensor": 2}])
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_in_bfloat16_a_mesh_rounds_as_one_device_does(factor, sizes):
    """What several devices have alike or each a part of is summed in float32."""
    module = layer(capacity_factor=factor, dtype=jnp.bfloat16, expert_dim=4)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), tokens(), SEGMENTS))["params"]
    x, segments = (np.concatenate([array] * 8) for array in (tokens(), SEGMENTS))
    x = x.astype(jnp.bfloat16)

    def gradients(mesh):
        boxed = jax.eval_shape(module.init, jax.random.key(0), x, segments)["params"]
        placed = sharding.shardings(mesh, sharding.logical_axes(boxed), nn.unbox(boxed))

        def total(params, x):
            return jnp.square(module.apply({"params": params}, x, segments)).sum(dtype=jnp.float32)

        with sharding.use(mesh):
            inputs = (placed, sharding.batch_sharding(mesh))
            found, dx = jax.jit(jax.grad(total, (0, 1)), in_shardings=inputs)(params, x)
        return jax.device_get([dx, *(found[name]["kernel"] for name in ("up", "down"))])

    mesh = sharding.make_mesh(sharding.Config(**sizes), jax.devices()[: math.prod(sizes.values())])
    for found, expected in zip(gradients(mesh), gradients(one_device()), strict=True):
        difference = np.float32(found) - np.float32(expected)
        assert np.linalg.norm(difference) < 2**-7 * np.linalg.norm(np.float32(expected))


def test_rows_too_few_for_the_mesh_are_computed_all_the_same():
    params, expected, _ = run(layer())
    with sharding.use(sharding.make_mesh(sharding.Config(data=2, expert=4))):
        found = jax.jit(lambda p, x: layer().apply({"params": p}, x, SEGMENTS))(params, tokens())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_with_capacity_a_neighbour_may_take_room_and_decoding_drops_nothing():
    """What the docstring says: the full pass of a model without capacity is what is decoded."""
    tight = tiny(num_layers=1, scan=False, capacity_factor=0.5)
    free = tiny(num_layers=1, scan=False)
    params = nn.unbox(jax.jit(lambda: step.init_variables(tight, jax.random.key(0)))())["params"]
    batch = batch_of(rows=2)
    apply = functools.partial(jax.jit, static_argnums=0)(
        lambda model, batch: model.apply({"params": params}, batch)
    )
    other = {**batch, "inputs": np.where(batch["segments"] == 1, 7, batch["inputs"])}
    second = batch["segments"] == 2
    for model, isolated in ((free, True), (tight, False)):
        both = [np.asarray(apply(model, rows))[second] for rows in (batch, other)]
        assert np.array_equal(*both) == isolated
    alone = {**batch, "segments": np.ones_like(batch["segments"])}
    alone["positions"] = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    prompt = {name: array[:, :4] for name, array in alone.items()}
    decode = jax.jit(functools.partial(tight.apply, decode=True, mutable=["cache"]))
    x, new = decode({"params": params}, prompt)
    found = [x]
    for place in range(4, 8):
        token = {name: array[:, place : place + 1] for name, array in alone.items()}
        variables = {"params": params, "cache": nn.unbox(new["cache"])}
        x, new = decode(variables, token)
        found.append(x)
    full = apply(free, alone)[:, :8]
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), full, atol=1e-5)


# Around it.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts": 2, "experts_per_token": 3}, "use at most the 2 of model.num_experts"),
        ({"num_experts": 2, "expert_dim": 8, "mlp_dim": 8}, "leave one of the two 0"),
        ({"num_experts": -1}, "use 0 or more"),
        ({"num_experts": 2, "experts_per_token": 0}, "use 1 or more"),
        ({"num_experts": 2, "capacity_factor": -0.5}, "use 0 or more"),
    ],
)
@pytest.mark.parametrize("family", [gpt, t5])
def test_fields_that_do_not_fit_are_refused(family, fields, words):
    with pytest.raises(ConfigError, match=words):
        family.Config(**fields)


def test_experts_have_no_biases():
    with pytest.raises(ConfigError, match="bias_in=attention"):
        gpt.Config(num_experts=2, bias=True)
    gpt.Config(num_experts=2, bias=True, bias_in="attention")


@pytest.mark.parametrize("family", ["gpt", "t5"])
def test_fields_of_experts_are_refused_where_there_are_none(family):
    config = config_lib.complete({"model": {"name": family}}, experiment.SCHEMA)
    with pytest.raises(ConfigError, match=r"used only under a set model\.num_experts, and"):
        config_lib.override(config, ["model.capacity_factor=1.25"], experiment.SCHEMA)
    config_lib.override(
        config, ["model.num_experts=4", "model.capacity_factor=1.25"], experiment.SCHEMA
    )


def test_flops_and_parameters_are_of_the_experts_in_use():
    options = {"num_experts": 8, "experts_per_token": 2, "shared_experts": 1, "expert_dim": 64}
    dense = gpt.Config(num_layers=3, model_dim=32, num_heads=4, vocab_size=VOCAB, mlp_dim=3 * 64)
    sparse = dataclasses.replace(dense, mlp_dim=0, **options)
    router = 3 * 32 * 8  # of three layers
    flops = [models.flops_per_token(cfg, 16) for cfg in (dense, sparse)]
    assert flops[1] - flops[0] == 6 * router

    def parameters(cfg):
        axes, shapes = step.parameter_axes(
            models.build(models.resolve(cfg, vocab_size=VOCAB, max_length=16, packed=True))
        )
        return step.count_parameters(shapes), models.active_parameters(cfg, axes, shapes)

    (count, active), (all_experts, met) = parameters(dense), parameters(sparse)
    assert count == active and met == count + router
    assert all_experts == met + 3 * 6 * 2 * 32 * 64


def test_muon_takes_each_expert_as_a_matrix_and_leaves_the_router():
    axes, shapes = step.parameter_axes(tiny(activation="swiglu", scan=False))
    found = muon.matrices(shapes, axes)["layers"]["block_0"]["mlp"]
    assert found["up"]["kernel"] == optax.contrib.MuonDimensionNumbers((1,), (3,))
    assert found["down"]["kernel"] == optax.contrib.MuonDimensionNumbers((1,), (2,))
    assert isinstance(found["router"]["kernel"], optax.MaskedNode)


@pytest.mark.parametrize("capacity", [0.0, 2.0])
def test_remat_of_dots_keeps_the_products_of_experts(capacity):
    """As of a dense layer, the gradient repeats attention's scores and sums alone."""

    def products(**fields):
        model = tiny(num_layers=1, scan=False, capacity_factor=capacity, **fields)
        params = nn.unbox(jax.eval_shape(lambda: step.init_variables(model, jax.random.key(0))))[
            "params"
        ]
        loss = lambda params: model.apply({"params": params}, batch_of(rows=2)).sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products(remat="dots") - products(remat="none") == 2
    assert products(remat="full") - products(remat="none") > 4
