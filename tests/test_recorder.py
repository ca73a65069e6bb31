"""The NaN matrix: a fault anywhere changes no parameter, is recorded whole, and `tools.replay` names it."""

import json
import math
import re
import types
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from lm import anatomy, experiment, losses, manifests, peers, recorder, train
from lm import config as config_lib
from lm.data import tokenizers
from lm.exits import Diverged
from lm.nn import embed
from tests.test_guard import BAD, killed_at, spike
from tests.test_train import arrays_of, assert_same_run
from tools import recorded as recorded_lib
from tools import replay

MARK = 7  # a byte that no text has: the faults below come of it


def mark(batch, row):
    for name in ("inputs", "targets"):
        batch[name] = batch[name].copy()
        batch[name][row] = MARK


def mark_one(patch):
    """Mark row 3 of the batch of step BAD."""
    from lm.data import pipeline

    original = pipeline.Batches.__getitem__

    def batch(self, number):
        found = original(self, number)
        if number == BAD:
            mark(found, 3)
        return found

    patch.setattr(pipeline.Batches, "__getitem__", batch)


@pytest.fixture
def marked(monkeypatch):
    mark_one(monkeypatch)


def bad_loss(patch):
    original = losses.cross_entropy

    def cross_entropy(logits, params, x, targets, weights, **options):
        total, sums = original(logits, params, x, targets, weights, **options)
        hit = (targets == MARK).any()
        return jnp.where(hit, jnp.nan, total), {
            **sums,
            "loss": jnp.where(hit, jnp.inf, sums["loss"]),
        }

    patch.setattr(losses, "cross_entropy", cross_entropy)


def bad_gradient(patch):
    """The square root's slope at 0, times 0: of one parameter, the loss being as ever."""
    original = losses.cross_entropy

    def cross_entropy(logits, params, x, targets, weights, **options):
        total, sums = original(logits, params, x, targets, weights, **options)
        flag = jnp.where((targets == MARK).any(), 0.0, 1.0)
        kernel = params["layers"]["block_1"]["mlp_norm"]["scale"]
        return total + jnp.sqrt(flag + 0 * kernel.sum()) - flag, sums

    patch.setattr(losses, "cross_entropy", cross_entropy)


def bad_embedding(patch):
    original = embed.Embed.__call__

    def __call__(self, tokens):
        x = original(self, tokens)
        return jnp.where((tokens == MARK)[..., None], jnp.log(x * 0 - 1), x)

    patch.setattr(embed.Embed, "__call__", nn.module.wrap_method_once(__call__))


def bad_weights(patch):
    """Of the marked row alone: so of one part of an accumulated batch, of one shard."""
    from lm.data import pipeline

    original = pipeline.Batches.__getitem__

    def batch(self, number):
        found = original(self, number)
        hit = (found["inputs"] == MARK).any(axis=1, keepdims=True)
        return {**found, "weights": np.where(hit, np.nan, found["weights"]).astype(np.float32)}

    patch.setattr(pipeline.Batches, "__getitem__", batch)


FAULTS = {
    "loss": (bad_loss, {}, ["forward: every module's result is finite; the loss"]),
    "gradient": (
        bad_gradient, {"model__num_layers": 2},
        ["forward: finite", r"1 of \d+ gradients are not finite, that of layers.block_1.mlp_norm.scale first",
         r"operation: \w+ .*\n.*\n.*test_recorder.py:.*\nthe first NaN: mul .*\n.*\n.*test_recorder.py:\d+"],
    ),
    "part": (
        bad_weights, {"train__accumulate_steps": 2, "mesh": {"data": 2}},
        ["in 1 of its 2 parts: part 1", "batch weights: 16 numbers are not finite"],
    ),
    "data": (bad_weights, {"mesh": {"data": 8}}, ["row 3, shard 3 of 8 (bad alone)"]),
    "fsdp": (bad_weights, {"mesh": {"data": 1, "fsdp": 8}}, ["row 3, shard 3 of 8 (bad alone)"]),
    "embedding": (
        bad_embedding, {},
        ["(Embed.__call__) is the first with numbers that are not finite, 512 of 512",
         r"operation: log .*\n.*\n.*test_recorder.py:\d+"],
    ),
}  # fmt: skip
PLAIN = [("gradient", "stop"), ("part", "skip")]


def on_devices(patch, count):
    """Let there be so many devices: fewer take less time to simulate."""
    patch.setattr(jax, "devices", lambda: jax.local_devices()[:count])


@pytest.mark.parametrize(
    ("fault", "mode"),
    [
        pytest.param(fault, mode, marks=() if (fault, mode) in PLAIN else pytest.mark.slow)
        for fault in FAULTS
        for mode in ("stop", "skip", "rollback")
    ],
)
def test_a_fault_changes_nothing_and_is_named(
    tiny, tmp_path, monkeypatch, marked, capsys, fault, mode
):
    break_it, options, words = FAULTS[fault]
    break_it(monkeypatch)
    on_devices(monkeypatch, math.prod(options.get("mesh", {}).values()))
    options = {name: ConfigDict(v) if isinstance(v, dict) else v for name, v in options.items()}
    config = tiny(
        **options, train__on_bad_step=mode, checkpoint__every_steps=1, checkpoint__keep=9,
        eval__every_steps=0, train__recordings=2,
    )  # fmt: skip
    if mode == "stop":
        with pytest.raises(Diverged, match=f"step {BAD + 1}: the (loss|gradient) is not finite"):
            train.run(config, tmp_path / "run")
        after = None
    else:
        train.run(config, tmp_path / "run")
        after = arrays_of(tmp_path / "run", BAD + 1)
        killed_at(BAD + 2, config, tmp_path / "cut")
        train.run(config, tmp_path / "cut")
        assert_same_run(tmp_path / "run", tmp_path / "cut", 6)

    folder = tmp_path / "run" / "recorder" / str(BAD)
    before, recorded = arrays_of(tmp_path / "run", BAD), arrays_of(folder, BAD)
    for name, array in before.items():
        np.testing.assert_array_equal(recorded[name], array, err_msg=name)
        if after and name != "step":
            np.testing.assert_array_equal(after[name], array, err_msg=name)
    assert (recorded["batch.inputs"][3] == MARK).all()
    made = experiment.build(config)
    batch = made.batches[BAD]
    assert {name for name in recorded if name.startswith("batch.")} == {f"batch.{n}" for n in batch}
    for name, array in batch.items():
        np.testing.assert_array_equal(recorded[f"batch.{name}"], array, err_msg=name)
    assert manifests.problem(folder / "checkpoints", BAD) == ""
    assert (folder / "config.json").read_bytes() == (tmp_path / "run/config.json").read_bytes()
    assert tokenizers.load(folder / "tokenizer").fingerprint == made.corpus.tokenizer.fingerprint
    record = json.loads((folder / "record.json").read_text())
    assert record["step"] == BAD and record["seed"] == 0 and len(record["rows"]) == 8
    assert record["versions"] == {name: version(name) for name in recorder.PACKAGES}
    assert record["versions"]["jax"] == jax.__version__
    assert record["code"] == peers.code_version()
    assert record["environment"] == experiment.environment(made)
    assert "document 0, tokens" in record["rows"][3]["documents"][0]
    norms = {n: np.linalg.norm(x) for n, x in before.items() if n.startswith("params.")}
    for name, norm in norms.items():
        found = record["parameters"][name.removeprefix("params.")]
        assert found["norm"] == pytest.approx(norm, rel=1e-5) and found["not_finite"] == 0
    bad = [name for name, found in record["gradients"].items() if found["not_finite"]]
    assert len(bad) == {"gradient": 1, "loss": 0}.get(fault, len(norms))
    assert not list(folder.parent.glob("*.partial"))

    capsys.readouterr()
    flags = ["--no_jit"] if fault in ("gradient", "embedding") else []
    assert replay.main([str(folder), *flags]) == 0
    said = capsys.readouterr().out
    assert "row 3" in said and "row 2" not in said
    for word in words:
        assert word in said or re.search(word, said), (word, said)


def recorded(tiny, tmp_path, monkeypatch, **options):
    """Return the recording of a bad batch, as the replay has it."""
    bad_weights(monkeypatch)
    with pytest.raises(Diverged):
        train.run(tiny(train__recordings=1, **options), tmp_path / "run")
    return recorded_lib.Recorded(tmp_path / "run" / "recorder" / str(BAD), "float32")


def test_of_an_exact_run_every_shard_is_of_the_whole_batch(tiny, tmp_path, monkeypatch, marked):
    mesh = ConfigDict({"data": 8})
    found = recorded(tiny, tmp_path, monkeypatch, mesh=mesh, train__exact_reduction=8)
    weights = [float(found.arguments(part)[-1]) for part in found.parts()]
    assert weights == [7 * 16.0] * 8  # the bad row counts for nothing


def test_of_one_group_its_own_parameters_are_taken(tiny, tmp_path, monkeypatch, marked):
    mesh = ConfigDict({"data": 8, "local_steps": 5})
    found = recorded(tiny, tmp_path, monkeypatch, mesh=mesh)
    arrays = arrays_of(tmp_path / "run" / "recorder" / str(BAD), BAD)
    params = found.arguments(next(found.parts()))[0]
    own, outer = (arrays[f"{part}params.embed.embedding"] for part in ("local.", ""))
    assert not np.array_equal(own[0], outer)
    np.testing.assert_array_equal(params["embed"]["embedding"], own[0])


PARTS = ConfigDict({"data": 4, "tensor": 2})


def test_a_model_with_a_kernel_of_gpus_is_taken_again_anywhere(tiny, tmp_path):
    config = config_lib.complete(tiny(model__kernel="cudnn"), experiment.SCHEMA)
    manifests.write_whole(tmp_path / "config.json", config_lib.to_json(config))
    assert recorded_lib._model(tmp_path, "float32").cfg.kernel == "xla"


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        *(
            pytest.param(metric, options, marks=pytest.mark.slow)
            for metric, options in (
                ("grad_norm", {"mesh": PARTS, "train__accumulate_steps": 2, "model__dropout": 0.1}),
                ("loss", {"mesh": PARTS, "train__accumulate_steps": 2, "model__dropout": 0.1}),
                ("grad_norm", {"mesh": ConfigDict({"data": 8, "local_steps": 5})}),
                ("grad_norm", {"mesh": ConfigDict({"data": 8}), "train__exact_reduction": 8}),
            )
        ),
    ],
)
def test_a_spike_is_taken_again_by_what_it_was_a_spike_of(
    tiny, tmp_path, monkeypatch, capsys, metric, options
):
    spike(monkeypatch, 7)
    config = tiny(
        train__num_steps=10, train__spike_zscore=3.0, train__spike_steps=5, optim__peak_lr=2e-2,
        train__spike_metric=metric, train__recordings=1, **options,
    )  # fmt: skip
    with pytest.raises(Diverged, match=f"its {metric} of"):
        train.run(config, tmp_path)
    folder = tmp_path / "recorder" / "7"
    path = folder / "record.json"
    record = json.loads(path.read_text())
    assert replay.main([str(folder)]) == 0
    found = re.search(rf"reproduced: {metric} (\S+), then (\S+)\n", capsys.readouterr().out)
    assert found and float(found[1]) == pytest.approx(record["metrics"][metric], rel=1e-4)
    record["metrics"][metric] *= 1.02
    path.write_text(json.dumps(record))
    assert replay.main([str(folder)]) == 2, "its digest is of another number"
    manifests.write_sealed(path, record)
    assert replay.main([str(folder)]) == 1
    assert f"not reproduced: {metric}" in capsys.readouterr().out


def test_replay_says_when_it_is_not_bad_again(tiny, tmp_path, monkeypatch, marked, capsys):
    with monkeypatch.context() as patch:
        bad_embedding(patch)
        with pytest.raises(Diverged):
            train.run(tiny(train__recordings=1), tmp_path)
    assert replay.main([str(tmp_path / "recorder" / "3")]) == 1
    assert "not reproduced" in capsys.readouterr().out
    assert replay.main([str(tmp_path)]) == 2
    assert f"name one of {tmp_path / 'recorder' / '3'}" in capsys.readouterr().err
    record = tmp_path / "recorder" / "3"
    whole = (record / "record.json").read_text()
    unsealed = {name: value for name, value in json.loads(whole).items() if name != "digest"}
    (record / "record.json").write_text(json.dumps(unsealed))
    assert replay.main([str(record)]) == 2
    assert "record.json: damaged (it has no digest)" in capsys.readouterr().err
    (record / "record.json").write_text(whole)
    file = next(path for path in (record / "checkpoints").rglob("d/*") if path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert replay.main([str(record)]) == 2
    assert "is not what was written" in capsys.readouterr().err


def test_only_so_many_are_recorded_and_a_full_disk_is_no_end(
    tiny, tmp_path, poison, monkeypatch, capsys
):
    poison(1, 3)
    monkeypatch.chdir(tmp_path)
    train.run(tiny(train__on_bad_step="skip", train__recordings=1), "one")
    assert [path.name for path in (tmp_path / "one" / "recorder").iterdir()] == ["1"]
    said = capsys.readouterr().out
    assert "recorded: one/recorder/1; look into it" in said
    assert "step 4 is not recorded: 1 are in one/recorder already (train.recordings=1)" in said

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(recorder.anatomy, "norms", full)
    train.run(tiny(train__on_bad_step="skip", train__recordings=2), tmp_path / "full")
    assert "step 2 could not be recorded: No space left" in capsys.readouterr().err
    assert not list((tmp_path / "full" / "recorder").iterdir())
    assert_same_run(tmp_path / "one", tmp_path / "full", 6)


def test_what_another_config_recorded_makes_room(tiny, tmp_path, marked, monkeypatch, capsys):
    bad_weights(monkeypatch)
    config, folder = tiny(train__recordings=1), tmp_path / "recorder"
    for rate, said in (
        (1e-2, f"recorded: {folder / '3'};"),
        (1e-2, f"step 4 is recorded already: {folder / '3'};"),
        (5e-3, f"recorded: {folder / '3'};"),
    ):
        config.optim.peak_lr = rate
        with pytest.raises(Diverged):
            train.run(config, tmp_path)
        assert f"\n{said}" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["3", "3.aside0"]
    rates = [
        json.loads((folder / n / "config.json").read_text())["optim"] for n in ("3", "3.aside0")
    ]
    assert [section["peak_lr"] for section in rates] == [5e-3, 1e-2]


@pytest.mark.parametrize(
    ("field", "other"),
    [
        *((f"train.{name}", True) for name in (
            "init_from", "vectors", "spike_steps", "spike_zscore", "z_loss", "label_smoothing",
            "accumulate_steps", "exact_reduction",
        )),
        *((name, True) for name in ("seed", "optim.peak_lr", "model.num_layers", "mesh.local_steps")),
        *((f"train.{name}", False) for name in ("max_skips", "on_bad_step", "num_steps", "recordings")),
        ("mesh.data", False),
    ],
)  # fmt: skip
def test_a_run_with_other_steps_is_another(tiny, tmp_path, field, other):
    before = config_lib.complete(tiny(), experiment.SCHEMA)
    manifests.write_whole(tmp_path / "config.json", config_lib.to_json(before))
    after = {**config_lib.flatten(before), field: 7}
    made = types.SimpleNamespace(config=after)
    assert recorder.is_of_another(tmp_path, made) is other


def test_the_first_bad_operation_is_found_inside_of_loops_and_functions():
    @jax.jit
    def turn(carry, x):
        return carry + jnp.log(x), carry

    def total(x):
        return jax.lax.scan(turn, 0.0, x)[0] * 2

    (found,) = anatomy.bad_operations(total, np.array([1.0, 2.0, -1.0, 3.0], np.float32))
    assert found.name == "log" and "test_recorder.py" in found.source
    assert anatomy.bad_operations(total, np.ones(4, np.float32)) == []
    slope = jax.grad(lambda x: (jnp.sqrt(x * 0) * x).sum())
    infinite, nan = anatomy.bad_operations(slope, np.ones(3, np.float32))
    assert (infinite.name, nan.name) == ("div", "mul") and "test_recorder.py" in nan.source
    assert [bad.name for bad in anatomy.bad_operations(jnp.log, np.zeros(2, np.float32))] == ["log"]


def test_of_groups_that_train_apart_each_has_its_norms():
    parameters = {"a": jnp.ones((2, 3)), "layers": {"block": {"b": jnp.ones((2, 4))}}}
    state = types.SimpleNamespace(local={"params": parameters}, params={})
    found = recorder._parameter_norms(state)
    assert found["a"]["norm"] == pytest.approx([3**0.5] * 2)
    assert found["layers.block.b"]["norm"] == pytest.approx([2.0] * 2)
