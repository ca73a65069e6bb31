"""The same bits on any number of devices, for every kind of model and optimizer; and what is refused."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lm import config as config_lib
from lm import experiment, placement, sharding, trail, train
from lm.config import ConfigError
from tests.test_train import StopAfter, arrays_of, rows_of

ROOT = Path(__file__).parent.parent
TWO, MIXED = {"data": 2}, {"data": 2, "fsdp": 4}
SOME = [{"data": 4}, {"fsdp": 8}, MIXED]  # the programs go by the number of devices alone
GPT = {"name": "gpt", "num_layers": 2, "model_dim": 32, "num_heads": 2, "dropout": 0.1}
FAMILIES = {
    "gpt": {"train": {"accumulate_steps": 2, "z_loss": 1e-4}},
    "experts": {"model": {**GPT, "num_experts": 4, "expert_dim": 16, "scan": True}},
    "lstm": {
        "model": {"name": "rnn", "model_dim": 32, "dropout": 0.1, "weight_dropout": 0.1},
        "data": {"order": "stream"},
    },
    "linear_rnn": {"model": {"name": "linear_rnn", "num_layers": 1, "model_dim": 32, "num_heads": 2}},
    "bert": {
        "task": {"name": "masked_lm", "length": 32, "next_sentence": True},
        "model": {**GPT, "name": "bert", "next_sentence": True},
    },
    "t5": {
        "task": {"name": "span_corruption", "source_length": 32},
        "model": {**GPT, "name": "t5", "num_layers": 1, "head_dim": 16},
    },
}  # fmt: skip
OPTIMIZERS = ("adam", "rmsprop", "sgd", "adafactor", "lion", "muon")


def made_of(mesh, *, shards=8, **sections):
    """Return an experiment of eight steps on as many devices as its mesh has."""
    config = {
        "data": {"source": "python_docs", "tokenizer": "byte", "batch_size": 16},
        "task": {"name": "causal_lm", "length": 16},
        "model": GPT,
        "mesh": {"data": 1, **mesh},
        "optim": {"clip_norm": 0.5},
        "train": {"num_steps": 8, "exact_reduction": shards},
    }
    for name, fields in sections.items():
        config[name] = fields if "name" in fields and name != "optim" else config[name] | fields
    count = int(np.prod([mesh.get(axis, 1) for axis in sharding.ORDER]))
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:count]
        patch.setattr(sharding.jax, "devices", lambda: devices)
        complete = config_lib.complete(ConfigDict(config), experiment.SCHEMA)
        return experiment.build(complete)


def bits(mesh, *, steps=8, **sections):
    """Return {name: bytes} of the state after `steps` steps and of the metrics of each."""
    made = made_of(mesh, **sections)
    with sharding.use(made.mesh):
        init, train_step, _, _ = experiment.jitted(made)
        state, sums = init(), []
        for number in range(steps):
            batch = placement.place_batch(made.mesh, made.batches[number])
            state, found = train_step(state, batch)
            sums.append(jax.device_get(found))
        leaves = jax.tree_util.tree_leaves_with_path((jax.device_get(state), sums))
    assert all(found["healthy"] for found in sums) and state.step == steps
    return {sharding.path_name(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def assert_same(meshes, **how):
    expected = bits(TWO, **how)
    for mesh in meshes:
        found = bits(mesh, **how)
        assert found.keys() == expected.keys()
        differs = [name for name in found if found[name] != expected[name]]
        assert not differs, (mesh, differs[:5])


@pytest.mark.optimized
def test_meshes_give_the_same_bits():
    small = {"model": {**GPT, "num_layers": 1}, "train": {"accumulate_steps": 2}}
    assert_same([{"fsdp": 2}, {"fsdp": 4}, {"data": 8}], steps=3, **small)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [pytest.param("gpt", marks=pytest.mark.optimized), *(f for f in FAMILIES if f != "gpt")],
)
def test_families_give_the_same_bits_on_all_meshes(family):
    assert_same(SOME, **FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_give_the_same_bits(name):
    model = {**GPT, "num_layers": 1}
    mesh = (MIXED, {"fsdp": 8})[list(OPTIMIZERS).index(name) % 2]
    assert_same([mesh], steps=4, model=model, optim={"name": name, "ema_decay": 0.9})


@pytest.mark.slow
def test_other_counts_of_shards_and_the_usual_step_differ():
    """So the comparison can fail: sums in another order have other bits, and mean the same."""
    usual, found = bits(TWO, shards=0), bits({"fsdp": 8}, shards=0)
    assert usual != found
    assert bits(TWO, shards=8) != bits(TWO, shards=16)
    losses = []
    for shards in (0, 8):
        found = bits(TWO, shards=shards, model={**GPT, "dropout": 0.0})
        values = [value for name, value in found.items() if name.endswith("loss/0")]
        losses.append(np.frombuffer(b"".join(values), np.float32))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def exact(tiny, mesh, **overrides):
    """Return the config of a run of eight steps."""
    fields = {"data__batch_size": 16, "train__num_steps": 8, "train__exact_reduction": 8}
    fields |= {"train__fingerprint_every_steps": 1, "mesh": ConfigDict({"data": 1, **mesh})}
    return tiny(**fields | overrides)


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh_bit_for_bit(tiny, tmp_path, monkeypatch):
    def run(mesh, folder):
        devices = jax.local_devices()[: int(np.prod(list(mesh.values())))]
        with monkeypatch.context() as patch:
            patch.setattr(sharding.jax, "devices", lambda: devices)
            train.run(exact(tiny, mesh), tmp_path / folder)

    run({"data": 2}, "whole")
    with monkeypatch.context() as patch:
        StopAfter(patch, 4)
        with pytest.raises(train.Interrupted):
            run({"data": 8}, "parts")
    run({"fsdp": 4}, "parts")
    assert_runs_alike(tmp_path / "parts", tmp_path / "whole")


def assert_runs_alike(left, right):
    """All of training has the same bits: fingerprints, metrics, the last checkpoint."""
    prints = [(folder / trail.FILE).read_text().splitlines() for folder in (left, right)]
    assert len(prints[0]) == 8 and list(map(json.loads, prints[0])) == list(
        map(json.loads, prints[1])
    )
    assert "gradients." in prints[0][7]
    rows = [
        [{k: v for k, v in row.items() if k.startswith("train/")} for row in rows_of(folder)]
        for folder in (left, right)
    ]
    assert rows[0] == rows[1]
    a, b = arrays_of(left, 8), arrays_of(right, 8)
    assert {n: x.tobytes() for n, x in a.items()} == {n: x.tobytes() for n, x in b.items()}


@pytest.mark.slow
def test_processes_have_the_bits_of_one(tiny, tmp_path):
    """Of products long enough that XLA on a CPU splits their sums by its threads (`startup.set_threads`)."""
    config = exact(tiny, {}, data__batch_size=32, task__length=128, model__model_dim=128)
    file = tmp_path / "small.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({config.to_dict()!r}, type_safe=False)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    for processes, devices, axis in [
        (1, 8, "data"),
        (2, 1, "data"),
        (2, 1, "fsdp"),
        (1, 2, "data"),
    ]:
        folder = tmp_path / f"{processes}_{devices}_{axis}"
        done = subprocess.run(
            [sys.executable, "-m", "tools.launch", f"--processes={processes}", "--grace=30",
             f"--devices_per_process={devices}", f"--logs={folder}.logs", "--",
             sys.executable, "-m", "lm.main", "--config", str(file), "--workdir", str(folder),
             "--config.mesh.data=1", f"--config.mesh.{axis}={processes * devices}"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.args}{done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert_runs_alike(folder, tmp_path / "1_8_data")


REFUSED = {
    "train.exact_reduction=6: ": ({"data": 2}, {"shards": 6}),
    "train.exact_reduction=-1: ": ({"data": 2}, {"shards": -1}),
    "train.exact_reduction=4: 8 devices": ({"data": 8}, {"shards": 4}),
    "train.exact_reduction=8 and mesh.tensor=2": ({"tensor": 2}, {}),
    "train.exact_reduction=8 and mesh.context=2": ({"context": 2}, {}),
    "train.exact_reduction=8 and mesh.expert=2": ({"expert": 2}, {"model": {**GPT, "num_experts": 2}}),
    "train.exact_reduction=8 and mesh.stage=2": ({"stage": 2}, {"model": {**GPT, "scan": True}}),
    "train.exact_reduction=8 and mesh.local_steps=3": ({"dcn": 2, "local_steps": 3}, {}),
    "train.exact_reduction=8: model.name='ngram'": ({"data": 2}, {"model": {"name": "ngram"}}),
    "data.batch_size=16 does not divide by 32": ({"data": 2}, {"train": {"accumulate_steps": 4}}),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_go_together_is_refused(words):
    mesh, sections = REFUSED[words]
    with pytest.raises(ConfigError) as error:
        made_of(mesh, **sections)
    assert words in str(error.value) and "\n" not in str(error.value)


@functools.cache
def gradients_on(count):
    made = made_of({"data": count}, model={**GPT, "num_layers": 1})
    with sharding.use(made.mesh):
        state = experiment.jitted(made)[0]()
        batch = placement.place_batch(made.mesh, made.batches[0])
        return jax.device_get(experiment.gradients_of(made)(state, batch))


def test_one_device_differs_by_rounding_alone():
    for found, expected in zip(
        jax.tree.leaves(gradients_on(1)), jax.tree.leaves(gradients_on(2)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
