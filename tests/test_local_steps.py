"""Groups of devices that train apart: the algorithm by hand, on any mesh, silent between meetings."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lm import config as config_lib
from lm import experiment, placement, sharding, step, train
from lm.config import ConfigError
from tests.test_train import StopAfter, arrays_of, assert_same_run, rows_of

EVERY, STEPS, RATE, DECAY = 3, 7, 0.7, 0.9
GPT = {"name": "gpt", "num_layers": 2, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2}


def made_of(mesh, *, model=None, optim=None, train=None):
    """Return an experiment of seven steps, of sixteen rows, on as many devices as its mesh has."""
    config = ConfigDict({
        "data": {"source": "python_docs", "tokenizer": "byte", "batch_size": 16},
        "task": {"name": "causal_lm", "length": 16},
        "model": {**GPT, **(model or {})},
        "mesh": {"data": 1, **mesh},
        "optim": {
            "name": "sgd", "momentum": 0.9, "peak_lr": 0.1, "clip_norm": 0.0,
            "outer_lr": RATE, "outer_momentum": DECAY, **(optim or {}),
        },
        "train": {"num_steps": STEPS, **(train or {})},
    })  # fmt: skip
    return experiment.build(config_lib.complete(config, experiment.SCHEMA))


@functools.cache
def by_hand(replicas, every=EVERY):
    """Return (losses, outer parameters) of the algorithm written out: each group alone on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.jax, "devices", lambda: [jax.local_devices()[0]])
        made = made_of({})
    one = jax.jit(
        functools.partial(
            step.train_step, model=made.model, tx=made.tx, objective=made.objective, seed=0
        )
    )
    with sharding.use(made.mesh):
        init = step.make_init(
            made.model, made.tx, seed=0, shape=(STEPS, 16, 16), average=False, stateful=False
        )
        outer = jax.jit(init)()
        momentum = jax.tree.map(np.zeros_like, outer.params)
        theta, groups, losses = jax.device_get(outer.params), [outer] * replicas, []
        for number in range(STEPS):
            batch = made.batches[number]
            rows = [np.array_split(np.arange(16), replicas)[r] for r in range(replicas)]
            done = [
                one(g, {k: v[own] for k, v in batch.items()})
                for g, own in zip(groups, rows, strict=True)
            ]
            groups = [state for state, _ in done]
            losses.append(
                sum(float(s["loss"][0]) for _, s in done)
                / sum(float(s["loss"][1]) for _, s in done)
            )
            if (number + 1) % every and number + 1 < STEPS:
                continue
            own = [jax.device_get(state.params) for state in groups]
            mean = jax.tree.map(lambda *leaves: sum(leaves) / replicas, *own)
            delta = jax.tree.map(np.subtract, theta, mean)
            momentum = jax.tree.map(lambda m, d: DECAY * m + d, momentum, delta)
            theta = jax.tree.map(lambda t, d, m: t - RATE * (d + DECAY * m), theta, delta, momentum)
            groups = [dataclasses.replace(state, params=theta) for state in groups]
    return losses, theta


def run(made, *, batches=None):
    """Return (losses, final state) of all steps of an experiment on its mesh."""
    with sharding.use(made.mesh):
        init, train_step, _, _ = experiment.jitted(made)
        state, losses = init(), []
        for number in range(made.num_steps):
            batch = (batches or made.batches)[number]
            state, sums = train_step(state, placement.place_batch(made.mesh, batch))
            losses.append(float(sums["loss"][0] / sums["loss"][1]))
        return losses, jax.device_get(state), sums


def assert_equal(tree, wanted, tolerance=1e-5):
    for (path, found), leaf in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(wanted), strict=True
    ):
        error = np.linalg.norm(found - leaf) / max(np.linalg.norm(leaf), 1e-3)
        assert error < tolerance, (sharding.path_name(path), error)


@pytest.fixture
def on(monkeypatch):
    """Return made_of, the mesh of which has just the devices that it asks for."""
    devices = jax.devices()

    def build(mesh, **sections):
        count = int(np.prod([n for axis, n in mesh.items() if axis in sharding.ORDER]))
        monkeypatch.setattr(sharding.jax, "devices", lambda: devices[:count])
        return made_of(mesh, **sections)

    return build


INSIDE = [
    {"dcn": 2},
    {"dcn": 2, "data": 2, "tensor": 2},
    pytest.param({"dcn": 2, "fsdp": 4}, marks=pytest.mark.slow),
    pytest.param({"dcn": 2, "fsdp": 2, "context": 2}, marks=pytest.mark.slow),
    pytest.param({"dcn": 4, "tensor": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh", INSIDE, ids=str)
def test_it_is_the_algorithm_written_out(on, mesh):
    losses, state, sums = run(on({**mesh, "local_steps": EVERY}))
    expected, theta = by_hand(mesh["dcn"])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_equal(state.params, theta)
    assert_equal(jax.tree.map(lambda x: x[1], state.local["params"]), theta)  # all have met
    assert float(sums["tokens"][0] / sums["tokens"][1]) == 256


@pytest.mark.slow
def test_stages_inside_groups(on):
    model = {"scan": True}
    expected, whole, _ = run(on({"dcn": 2, "local_steps": EVERY}, model=model))
    mesh = {"dcn": 2, "stage": 2, "data": 2, "local_steps": EVERY}
    losses, state, _ = run(on(mesh, model=model))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_equal(state.params, whole.params)


@pytest.mark.slow
def test_experts_inside_groups(on):
    model = {"num_experts": 4, "experts_per_token": 2, "expert_dim": 16}
    losses, state, _ = run(on({"dcn": 2, "local_steps": EVERY}, model=model))
    found, split, _ = run(on({"dcn": 2, "expert": 4, "local_steps": EVERY}, model=model))
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert_equal(split.params, state.params)


def test_meeting_in_each_step_in_the_mean_is_data_parallelism(on):
    """One step of SGD is linear in the gradient: the mean of the groups is the step of the mean."""
    plain = {"momentum": 0.0, "outer_lr": 1.0, "outer_momentum": 0.0}
    apart, state, _ = run(on({"dcn": 2, "local_steps": 1}, optim=plain))
    together, expected, _ = run(on({"dcn": 2}, optim=plain))
    np.testing.assert_allclose(apart, together, rtol=1e-5)
    assert_equal(state.params, expected.params)


def test_groups_exchange_only_numbers_between_meetings(on):
    """Collectives of more than single numbers stand in the branch of the meeting alone."""
    made = on({"dcn": 2, "local_steps": EVERY})
    with sharding.use(made.mesh):
        _, train_step, _, abstract = experiment.jitted(made)
        batch = placement.place_batch(made.mesh, made.batches[0])
        text = train_step.lower(abstract, batch).compile().as_text()
    computations = re.split(r"\n(?=(?:ENTRY )?%?[\w.]+ \()", text)
    branches = set(re.findall(r"(?:true|false)_computation=%?([\w.]+)", text))
    branches |= set(
        re.findall(r"[\w.]+", " ".join(re.findall(r"branch_computations=\{(.*?)\}", text)))
    )
    assert branches
    outside = inside = 0
    for computation in computations:
        name = re.match(r"(?:ENTRY )?%?([\w.]+)", computation)[1]
        for line in computation.splitlines():
            moved = re.search(r" = (.*?) (?:all-|reduce-scatter|collective-)[\w-]*\(", line)
            if not moved:
                continue
            large = any(dims for dims in re.findall(r"\w+\[([\d,]*)\]", moved[1]))
            inside += large and name in branches
            outside += large and name not in branches
    assert inside > 0 and outside == 0


def test_a_gradient_that_is_not_finite_stops_all_groups(on):
    made = on({"dcn": 2, "local_steps": EVERY})
    bad = {name: array.copy() for name, array in made.batches[1].items()}
    bad["weights"][0, 0] = np.inf  # a row of the first group
    with sharding.use(made.mesh):
        init, train_step, _, _ = experiment.jitted(made)
        state, _ = train_step(init(), placement.place_batch(made.mesh, made.batches[0]))
        before = jax.device_get(state)
        state, sums = train_step(state, placement.place_batch(made.mesh, bad))
        after = jax.device_get(state)
    assert not sums["healthy"] and not after.healthy and after.step == before.step == 1
    for part in ("params", "opt_state", "local"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))


def test_dropout_differs_between_groups(on):
    """Both groups see the same rows: without noise of their own they would stay equal."""
    made = on({"dcn": 2, "local_steps": 4}, model={"dropout": 0.5}, train={"num_steps": 1})
    same = {name: np.concatenate([array[:8]] * 2) for name, array in made.batches[0].items()}
    made = dataclasses.replace(made, num_steps=2)
    with sharding.use(made.mesh):
        init, train_step, _, _ = experiment.jitted(made)
        state, _ = train_step(init(), placement.place_batch(made.mesh, same))
        kernels = jax.tree.leaves(jax.device_get(state.local["params"]))
    assert any((kernel[0] != kernel[1]).any() for kernel in kernels)


@pytest.mark.parametrize("stop_at", [4])
def test_a_run_resumes_between_meetings_bit_for_bit(tiny, tmp_path, monkeypatch, stop_at):
    mesh = {"dcn": 2, "data": -1, "local_steps": 5}
    config = tiny(mesh=ConfigDict(mesh), data__batch_size=8)
    train.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        StopAfter(patch, stop_at)
        with pytest.raises(train.Interrupted):
            train.run(config, tmp_path / "parts")
    train.run(config, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole", config.train.num_steps)
    met = [row["train/met"] for row in rows_of(tmp_path / "whole") if "train/met" in row]
    assert met == [0, 0, 0, 0, 1, 1]  # after the fifth step, and after the last
    names = arrays_of(tmp_path / "whole", config.train.num_steps)
    assert any(name.startswith("local.params.") and len(x) == 2 for name, x in names.items())
    # Other groups would be another run; layers stored another way are the same one.
    config.mesh.dcn = 4
    config.train.num_steps += 1
    with pytest.raises(ConfigError, match="the groups that train apart, 2 -> 4"):
        train.run(config, tmp_path / "parts")
    config.mesh.dcn, config.model.scan = 2, not config.model.get("scan", False)
    train.run(config, tmp_path / "parts")


def test_what_does_not_go_together_is_refused(on):
    for sections, word in [
        ({"optim": {"ema_decay": 0.9}}, "optim.ema_decay=0"),
        ({"model": {"name": "ngram"}}, "learns by counting"),
    ]:
        with pytest.raises(ConfigError, match=word):
            if "model" in sections:
                config = {"model": {"name": "ngram"}, "mesh": {"local_steps": 2}}
                experiment.build(config_lib.complete(ConfigDict(config), experiment.SCHEMA))
            else:
                on({"dcn": 2, "local_steps": EVERY}, **sections)
    with pytest.raises(ConfigError, match=r"mesh.local_steps=-1"):
        sharding.Config(local_steps=-1)
