"""The two pure steps: every mesh is one device, accumulation is one big batch, bad steps change nothing."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import models, placement, sharding, step
from lm.models import gpt, rnn

LENGTH, BATCH, VOCAB = 16, 16, 99


def make_batch(seed=0, ragged=True):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    weights = rng.integers(0, 2, (BATCH, LENGTH)) if ragged else np.ones((BATCH, LENGTH))
    weights[: BATCH // 4] = 0  # rows that score nothing at all
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((BATCH, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
        "weights": weights.astype(np.float32),
    }


def make_model(name, **options):
    sizes = {
        "gpt": {"num_layers": 3, "model_dim": 64, "num_heads": 8},
        "rnn": {"num_layers": 3, "model_dim": 64},
    }
    cfg = {"gpt": gpt, "rnn": rnn}[name].Config(**{**sizes[name], **options})
    return models.build(models.resolve(cfg, vocab_size=VOCAB, max_length=LENGTH, packed=True))


def one_device():
    return sharding.make_mesh(sharding.Config(), jax.devices()[:1])


def prepare(model, mesh, tx, *, accumulate=1, average=False, stateful=False, **objective):
    """Return (state, jitted step) on a mesh, which must be in use."""
    init = step.make_init(
        model, tx, seed=0, shape=(9, BATCH, LENGTH), average=average, stateful=stateful
    )
    axes, _ = step.parameter_axes(model)
    placed = step.state_shardings(mesh, jax.eval_shape(init), axes)
    function = functools.partial(
        step.train_step,
        model=model,
        tx=tx,
        objective=step.Objective(max_scored=LENGTH, vocab_size=VOCAB, **objective),
        seed=0,
        accumulate=accumulate,
        ema_decay=0.9 if average else 0.0,
    )
    jitted = jax.jit(function, donate_argnums=0, out_shardings=(placed, None))
    return jax.jit(init, out_shardings=placed)(), jitted


def train(model, mesh, *, num_steps=5, tx=None, **options):
    """Return (losses, gradient norms, final parameters, carry) of a few steps."""
    tx = tx or optax.sgd(0.1, momentum=0.9)
    with sharding.use(mesh):
        state, jitted = prepare(model, mesh, tx, **options)
        rows = []
        for index in range(num_steps):
            state, sums = jitted(state, placement.place_batch(mesh, make_batch(index)))
            rows.append([sums["loss"][0] / sums["loss"][1], sums["grad_norm"][0]])
        return np.array(rows), jax.device_get(state)


def relative_errors(tree, reference):
    norms = jax.tree.map(
        lambda a, b: np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30), tree, reference
    )
    return {sharding.path_name(p): e for p, e in jax.tree_util.tree_leaves_with_path(norms)}


def test_a_mixed_mesh_equals_one_device():
    rows, state = train(
        make_model("gpt", num_layers=1), sharding.make_mesh(sharding.Config(2, 2, 2)), num_steps=2
    )
    expected, expected_state = train(make_model("gpt", num_layers=1), one_device(), num_steps=2)
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    errors = relative_errors(state.params, expected_state.params)
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("name", ["gpt", "rnn"])
def test_accumulation_equals_one_big_batch(name):
    """Weights are ragged: some parts of the batch score nothing."""
    model = make_model(name, num_layers=1)
    stateful = name == "rnn"
    rows, state = train(model, one_device(), num_steps=2, stateful=stateful)
    parts, state_of_parts = train(model, one_device(), num_steps=2, accumulate=4, stateful=stateful)
    np.testing.assert_allclose(parts, rows, rtol=1e-5)
    errors = relative_errors(state_of_parts.params, state.params)
    assert all(error < 1e-5 for error in errors.values()), errors
    if stateful:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            state_of_parts.carry,
            state.carry,
        )


def test_split_rows_is_strided_and_joins_back():
    rows = jnp.arange(12)[:, None] * jnp.ones((1, 2), int)
    parts = sharding.split_rows(rows, 3)
    assert parts.shape == (3, 4, 2)
    np.testing.assert_array_equal(parts[1, :, 0], [1, 4, 7, 10])
    np.testing.assert_array_equal(sharding.join_rows(parts), rows)


def test_a_loss_that_is_not_finite_changes_nothing_now_or_later():
    model, mesh = make_model("gpt", num_layers=1), one_device()
    with sharding.use(mesh):
        state, jitted = prepare(model, mesh, optax.adam(1e-2), average=True)
        before = jax.device_get(state)
        bad = make_batch()
        bad["weights"][3, 2] = np.inf
        state, sums = jitted(state, placement.place_batch(mesh, bad))
        assert not np.isfinite(sums["loss"][0])
        state, _ = jitted(state, placement.place_batch(mesh, make_batch()))
        after = jax.device_get(state)
    assert not after.healthy and after.step == before.step == 0
    for part in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))


def test_the_average_follows_the_parameters():
    model, mesh = make_model("gpt", num_layers=1), one_device()
    with sharding.use(mesh):
        state, jitted = prepare(model, mesh, optax.sgd(0.1), average=True)
        start = jax.device_get(state.params)
        state, _ = jitted(state, placement.place_batch(mesh, make_batch()))
        state = jax.device_get(state)
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start, state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), state.ema, expected
    )
    assert state.averaged() is state.ema


class Sowing(nn.Module):
    """A model of one table that sows a penalty."""

    accepts = frozenset({"causal"})
    learns = "gradient"

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.table = self.param("table", init, (VOCAB, 8))

    def __call__(self, batch, *, train=False, decode=False):
        squares = jnp.square(self.table)
        self.sow("losses", "penalty", (0.5 * squares.sum(), jnp.asarray(float(squares.size))))
        return self.table[batch["inputs"]]

    def logits(self, x):
        return x @ self.table.T


@pytest.mark.parametrize("accumulate", [1, 4])
def test_sown_losses_are_added_and_logged(accumulate):
    mesh, rate = one_device(), 0.1
    batch = make_batch()
    batch["weights"][:] = 0  # the penalty alone is left
    with sharding.use(mesh):
        state, jitted = prepare(Sowing(), mesh, optax.sgd(rate), accumulate=accumulate)
        table = jax.device_get(state.params["table"])
        state, sums = jitted(state, placement.place_batch(mesh, batch))
    np.testing.assert_allclose(state.params["table"], table * (1 - rate / table.size), rtol=1e-5)
    total, weight = sums["penalty"]
    np.testing.assert_allclose(total / weight, 0.5 * np.square(table).mean(), rtol=1e-5)


def test_dropout_differs_by_step_and_repeats_with_the_seed():
    model = make_model("gpt", num_layers=1, dropout=0.5)
    first, _ = train(model, one_device(), num_steps=2, tx=optax.sgd(0.0))
    again, _ = train(model, one_device(), num_steps=2, tx=optax.sgd(0.0))
    np.testing.assert_array_equal(first, again)
    with sharding.use(one_device()) as mesh:
        state, jitted = prepare(model, mesh, optax.sgd(0.0))
        batch = placement.place_batch(mesh, make_batch())
        state, one = jitted(state, batch)
        state, two = jitted(state, batch)
    assert one["loss"][0] != two["loss"][0]


def test_eval_step_counts_bytes():
    model, batch = make_model("gpt", num_layers=1), make_batch()
    token_bytes = np.arange(VOCAB, dtype=np.int32)
    init = jax.jit(functools.partial(step.init_variables, model))
    params = nn.unbox(init(jax.random.key(0)))["params"]
    objective = step.Objective(max_scored=LENGTH, vocab_size=VOCAB)
    evaluate = jax.jit(functools.partial(step.eval_step, model=model, objective=objective))
    sums, carry = evaluate(params, {}, batch, token_bytes)
    assert carry == {}
    assert float(sums["bytes"][0]) == float(
        (token_bytes[batch["targets"]] * batch["weights"]).sum()
    )
