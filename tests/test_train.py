"""The loop: what it writes, that it resumes bit for bit, and what it refuses."""

import fcntl
import functools
import json
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lm import checkpoint, exits, experiment, hardware, log, manifests, models, train
from lm import workdir as workdirs
from lm.config import ConfigError
from lm.data import corpus, pipeline, shards
from lm.metrics import read_rows, untimed


def rows_of(workdir):
    """Rows of a run without the times that differ from run to run."""
    return [untimed(row) for row in read_rows(workdir / "metrics.jsonl")]


def arrays_of(workdir, step):
    """All arrays of a checkpoint, restored by name alone."""
    folder = workdir / "checkpoints"
    manifest = manifests.read(folder, step)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=device)
        for name, (shape, dtype, *_) in manifest["arrays"].items()
    }
    return jax.device_get(checkpoint.restore(folder.absolute(), step, wanted))


def assert_same_run(left, right, step):
    assert rows_of(left) == rows_of(right)
    a, b = arrays_of(left, step), arrays_of(right, step)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


class StopAfter:
    """Stands in for the signals: asks to stop once `step` batches were taken."""

    def __init__(self, monkeypatch, step):
        taken = 0
        original = train.place_ahead

        def counting(made, first, *rest):
            nonlocal taken
            for batch in original(made, first, *rest):
                taken += 1
                if taken == step:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

        monkeypatch.setattr(train, "place_ahead", counting)


ENCODER = {"name": "bert", "num_layers": 1, "model_dim": 32, "num_heads": 2}


def test_utilisation_counts_every_position_not_the_scored_ones(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(hardware.PEAK_FLOPS, "cpu", 1e12)
    config = tiny(
        model=ConfigDict(ENCODER), task=ConfigDict({"name": "masked_lm", "length": 20}),
        eval__every_steps=0,
    )  # fmt: skip
    train.run(config, tmp_path)
    cfg = experiment.build(config).cfg["model"]
    flops = models.flops_per_token(cfg, 20, 0.15) * 20 / 3  # 15 % of 20 positions are scored
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "mfu" in row]
    assert rows
    for row in rows:
        mfu = row["tokens_per_second"] * flops / 1e12 / len(jax.devices())
        assert row["mfu"] == pytest.approx(mfu, rel=1e-6)


def test_utilisation_is_never_of_less_than_the_steps_themselves_reach(tiny, tmp_path, monkeypatch):
    """Whatever a busy moment at the start has measured."""
    monkeypatch.setattr(hardware, "measure_matmul_flops", lambda *args, **options: 1e-3)
    monkeypatch.setattr(hardware, "_seen", {})
    train.run(tiny(), tmp_path)
    shares = [row["mfu"] for row in read_rows(tmp_path / "metrics.jsonl") if "mfu" in row]
    assert len(shares) > 2 and max(shares) == 1 and min(shares) > 0


@pytest.mark.parametrize("section", ["task", "model"])
def test_next_sentence_is_asked_of_the_task_and_the_model(tiny, tmp_path, section):
    sections = {"task": {"name": "masked_lm", "length": 20}, "model": dict(ENCODER)}
    sections[section]["next_sentence"] = True
    with pytest.raises(ConfigError, match=r"task\.next_sentence=.*set both or neither"):
        train.run(tiny(**{name: ConfigDict(s) for name, s in sections.items()}), tmp_path)


def test_a_run_writes_what_it_promises(tiny, tmp_path, capsys):
    final = train.run(tiny(train__sample_tokens=8), tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 3, 6]
    last = [row for row in rows if "eval/loss" in row][-1]
    for name in ("eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy"):
        assert final[name] == last[name]
    for name in ("train/grad_norm", "train/learning_rate", "tokens_per_second", "mfu"):
        assert name in rows[-2]
    assert last["eval/loss"] < rows[0]["eval/loss"] < np.log(384)
    assert manifests.good_steps(tmp_path / "run" / "checkpoints") == [2, 4, 6]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["vocab_size"] == 257 and config["model"]["max_length"] == 16
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    said = capsys.readouterr().out
    assert "sample:" in said and "inputs" in said, "one decoded batch at the start"


def test_load_gives_config_model_and_params(tiny, tmp_path):
    train.run(tiny(), tmp_path)
    config, model, params = checkpoint.load(tmp_path)
    assert config.task.length == 16
    tokens = np.zeros((1, 4), np.int32)
    batch = {"inputs": tokens, "segments": tokens + 1, "positions": tokens}
    both = functools.partial(model.apply, method=lambda m, batch: m.logits(m(batch)))
    logits = jax.jit(both)({"params": params}, batch)
    assert logits.shape == (1, 4, 384) and np.isfinite(logits).all()


@pytest.mark.optimized
@pytest.mark.parametrize("stop_at", [1, 4])
def test_an_interrupted_run_resumes_bit_for_bit(tiny, tmp_path, monkeypatch, stop_at):
    config = tiny(optim__ema_decay=0.9)
    train.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        StopAfter(patch, stop_at)
        with pytest.raises(train.Interrupted, match=f"stopped at step {stop_at}"):
            train.run(config, tmp_path / "cut")
    train.run(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 6)


@pytest.mark.optimized
def test_a_stateful_run_resumes_bit_for_bit(tiny, tmp_path, monkeypatch):
    config = tiny(
        model={"name": "rnn", "cell": "lstm", "num_layers": 1, "model_dim": 32},
        data__order="stream",
        eval__streams=8,
        train__accumulate_steps=1,
    )
    train.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        with pytest.raises(train.Interrupted):
            train.run(config, tmp_path / "cut")
    train.run(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 6)
    assert any("carry" in name for name in arrays_of(tmp_path / "cut", 6))


def test_a_killed_run_loses_only_what_was_not_saved(tiny, tmp_path):
    """Rows after the last good checkpoint are moved aside and made again, the same."""
    config = tiny()
    train.run(config, tmp_path / "whole")
    train.run(config, tmp_path / "cut")
    for step in (4, 6):
        (tmp_path / "cut" / "checkpoints" / str(step) / "manifest.json").unlink()
    train.run(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 6)
    moved = read_rows(tmp_path / "cut" / "metrics.1.jsonl")
    assert {row["step"] for row in moved} == {3, 4, 5, 6}


@pytest.mark.optimized
def test_resumes_on_another_mesh(tiny, tmp_path):
    config = tiny()
    train.run(config, tmp_path / "whole")
    for step in (4, 6):
        (tmp_path / "whole" / "checkpoints" / str(step) / "manifest.json").unlink()
    before = rows_of(tmp_path / "whole")
    config.mesh = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
    train.run(config, tmp_path / "whole")
    after = rows_of(tmp_path / "whole")
    assert [row["step"] for row in after] == [row["step"] for row in before]
    for old, new in zip(before, after, strict=True):
        for key in ("train/loss", "eval/loss"):
            if key in old:
                np.testing.assert_allclose(new[key], old[key], rtol=1e-4)


def test_a_finished_run_repeats_nothing(tiny, tmp_path):
    config = tiny()
    final = train.run(config, tmp_path)
    rows = rows_of(tmp_path)
    again = train.run(config, tmp_path)
    assert rows_of(tmp_path) == rows
    assert again["eval/loss"] == final["eval/loss"]


def test_an_earlier_versions_run_resumes(tiny, tmp_path):
    """Its config lacks the fields added since; those have defaults under which nothing changes."""
    final = train.run(tiny(), tmp_path)
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    del old["model"]["matmul_dtype"], old["optim"]["moments_dtype"], old["mesh"]["local_steps"]
    path.write_text(json.dumps(old))
    assert train.run(tiny(), tmp_path)["eval/loss"] == final["eval/loss"]
    del old["model"]["model_dim"]  # whose default is not this run's value
    path.write_text(json.dumps(old))
    with pytest.raises(ConfigError, match=r"another config: model\.model_dim"):
        train.run(tiny(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"seed": -1}, "seed=-1: use a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296: use a whole number"),
        ({"model__model_dim": 64}, "model.model_dim 32 -> 64"),
        ({"task__length": 8}, "task.length 16 -> 8"),
        ({"data__batch_size": 16}, "data.batch_size 8 -> 16"),
        ({"data__validation_fraction": 0.2}, "data's content, tokenizer or split"),
        ({"data__tokenizer": "char"}, "tokenizer"),
    ],
)
def test_a_workdir_of_another_config_is_refused(tiny, tmp_path_factory, finished, changes, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        train.run(tiny(**changes), finished)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """The workdir of a run of `tiny` that has ended; nobody writes to it."""
    workdir = tmp_path_factory.mktemp("finished")
    train.run(tiny(train__num_steps=2), workdir)
    return workdir


def test_changes_of_optim_are_listed_and_the_old_config_kept(tiny, tmp_path, capsys):
    train.run(tiny(train__num_steps=2), tmp_path)
    train.run(tiny(train__num_steps=4, optim__peak_lr=5e-3), tmp_path)
    said = capsys.readouterr().out
    assert "optim.peak_lr: 0.01 -> 0.005" in said and "train.num_steps: 2 -> 4" in said
    assert json.loads((tmp_path / "receipts" / "0001.json").read_text())["config"][
        "optim.peak_lr"
    ] == [1e-2, "file"]
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["peak_lr"] == 5e-3
    before = json.loads((tmp_path / "config.2.json").read_text())
    assert (before["optim"]["peak_lr"], before["train"]["num_steps"]) == (1e-2, 2)
    train.run(tiny(train__num_steps=4, optim__peak_lr=5e-3), tmp_path)
    assert not (tmp_path / "config.4.json").exists(), "nothing changed"


def test_no_old_config_is_ever_overwritten(tiny, tmp_path):
    for rate in (1e-2, 2e-2, 3e-2):
        train.run(tiny(train__num_steps=2, optim__peak_lr=rate), tmp_path)
    kept = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("receipts/*.json"))]
    assert [found["config"]["optim.peak_lr"][0] for found in kept] == [1e-2, 2e-2, 3e-2]
    trained = json.loads((tmp_path / "config.2.json").read_text())
    assert trained["optim"]["peak_lr"] == 1e-2, "what came to step 2"


def test_another_environment_is_listed(tiny, tmp_path, capsys):
    train.run(tiny(train__num_steps=2), tmp_path)
    assert "another" not in capsys.readouterr().out
    path = tmp_path / "receipts" / "0001.json"
    found = json.loads(path.read_text())
    assert found["environment"]["dtype"] == "float32"
    found["environment"]["dtype"] = "bfloat16"
    manifests.write_sealed(path, found)
    train.run(tiny(train__num_steps=3), tmp_path)
    assert "another dtype bfloat16 -> float32" in capsys.readouterr().out


def test_a_workdir_is_held_by_one_run(tiny, tmp_path):
    with workdirs.alone_in(tmp_path):
        mark = (tmp_path / "lock").read_text()
        with pytest.raises(ConfigError, match="another process"):
            train.run(tiny(), tmp_path)
        assert mark and (tmp_path / "lock").read_text() == mark, "its other processes look for it"
    assert train.run(tiny(), tmp_path)["eval/loss"] > 0


def test_who_looks_for_a_moment_whether_a_run_has_a_workdir_keeps_none_from_it(tmp_path):
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.3, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with workdirs.alone_in(tmp_path):
            assert (tmp_path / "lock").read_text()


def test_another_host_may_see_the_workdir_late(tmp_path, monkeypatch):
    """As over NFS, which remembers for a while that something was not there."""
    workdir, began = tmp_path / "run", time.monotonic()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(workdirs.distributed, "from_first", lambda value: "mark")
    monkeypatch.setattr(workdirs, "SEEN_SECONDS", 0.5, raising=False)
    with (
        pytest.raises(ConfigError, match="process 1 does not see there"),
        workdirs.alone_in(workdir),
    ):
        pass
    monkeypatch.setattr(workdirs, "SEEN_SECONDS", 60)

    def appear():
        workdir.mkdir()
        (workdir / "lock").write_text("mark")

    late = threading.Timer(0.5, appear)
    late.start()
    with workdirs.alone_in(workdir):
        late.join()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("again", [True, False])
def test_a_workdir_that_is_moved_is_left_alone(tiny, tmp_path, monkeypatch, capfd, again):
    """Another run may have taken its name: nothing of that one is written over or deleted."""
    here, there = tmp_path / "run", tmp_path / "moved"
    original = checkpoint.Checkpointer.save

    def save(self, step, *args, **options):
        if step == 4 and not there.exists():
            self.settle()
            here.rename(there)
            if again:
                (here / "checkpoints" / "2").mkdir(parents=True)
                (here / "lock").write_text("another's")
        return original(self, step, *args, **options)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", save)
    with pytest.raises(OSError, match="moved or taken away; give --workdir where it is now"):
        train.run(tiny(checkpoint__keep=1), here)
    assert manifests.good_steps(there / "checkpoints") == [2]
    left = [str(path.relative_to(here)) for path in sorted(here.rglob("*"))] if again else []
    assert left == (["checkpoints", "checkpoints/2", "lock"] if again else [])
    monkeypatch.setattr(checkpoint.Checkpointer, "save", original)
    train.run(tiny(checkpoint__keep=1), there)
    assert manifests.good_steps(there / "checkpoints")[-1] == 6


@pytest.mark.parametrize("name", ["config.json", "data.json", "receipts/0001.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"{}", b"[" * 100_000])
def test_a_damaged_file_is_named(tiny, tmp_path_factory, finished, name, content):
    workdir = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(finished, workdir)
    (workdir / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}|the data's content"):
        train.run(tiny(train__num_steps=2), workdir)


def test_parameters_of_a_run_with_another_tokenizer_are_said(tiny, text_file, tmp_path, capsys):
    (other := tmp_path / "other.txt").write_text(text_file.read_text().replace("t", "x"))
    paths = {"own": str(text_file), "other": str(other)}
    first = tmp_path / "first"
    train.run(tiny(train__num_steps=2, data__tokenizer="char"), first)
    file = {"data__tokenizer": "file", "data__tokenizer_path": str(first / "tokenizer")}
    for name, fields in (("own", file), ("other", {"data__tokenizer": "char"})):
        fields |= {"data__path": (paths[name],), "train__init_from": str(first)}
        train.run(tiny(train__num_steps=2, **fields), tmp_path / name)
        assert ("its tokenizer is another" in capsys.readouterr().out) == (name == "other")


def test_a_lost_description_of_the_data_is_made_again(tiny, tmp_path, finished):
    workdir = shutil.copytree(finished, tmp_path / "run")
    content = (workdir / "data.json").read_bytes()
    (workdir / "data.json").unlink()
    with pytest.raises(ConfigError, match="the data's content"):
        train.run(tiny(train__num_steps=2, data__validation_fraction=0.2), workdir)
    train.run(tiny(train__num_steps=2), workdir)
    assert (workdir / "data.json").read_bytes() == content


def test_rates_are_of_whole_steps(tiny, tmp_path, monkeypatch):
    """The last row, one step after another, has a rate like those before it."""
    options = {"train__log_every_steps": 20, "eval__every_steps": 0, "checkpoint__every_steps": 0}
    train.run(tiny(train__num_steps=41, **options), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["steps_per_second"] for row in rows if "steps_per_second" in row]
    assert len(rates) == 3
    assert rates[2] < 5 * rates[1]


def test_tokens_a_second_are_those_that_are_scored(tiny, tmp_path):
    """Of rows that are mostly padding, not what they have room for."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"cat {i}"}) + "\n" for i in range(200)))
    train.run(tiny(task__packing="pad", data__path=(str(texts),)), tmp_path / "run")
    rows = [r for r in read_rows(tmp_path / "run/metrics.jsonl") if "steps_per_second" in r]
    assert rows and all(row["train/tokens"] < 8 * 10 < 8 * 16 for row in rows)
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(
            row["train/tokens"] * row["steps_per_second"]
        )


@pytest.mark.parametrize("at", [3, 6])
def test_a_signal_during_an_evaluation_ends_it_and_is_saved(tiny, tmp_path, monkeypatch, at):
    """The run that resumes makes the evaluation up: rows and the checkpoints' scores are the same."""
    original, begun = pipeline.EvalBatches.__getitem__, []

    def batch(self, index):
        if index == 0:
            begun.append(self)
        if len(begun) == at // 3 * 2 + 1:  # before it, two a step: of the average and of the raw
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    config = tiny(checkpoint__every_steps=0, eval__batch_size=8, optim__ema_decay=0.9)
    monkeypatch.setattr(pipeline.EvalBatches, "__getitem__", batch)
    with pytest.raises(train.Interrupted, match=f"step {at}, which is saved"):
        train.run(config, tmp_path)
    assert manifests.good_steps(tmp_path / "checkpoints") == [at]
    monkeypatch.undo()
    train.run(config, tmp_path)
    train.run(config, tmp_path / "whole")
    assert_same_run(tmp_path, tmp_path / "whole", 6)
    both = [
        manifests.read(folder / "checkpoints", 6)["metrics"]
        for folder in (tmp_path, tmp_path / "whole")
    ]
    assert both[0] == both[1] and "eval/loss" in both[0]


def test_parameters_that_are_not_finite_are_never_saved(tiny, tmp_path):
    """Loss and gradient are finite; the update is what overflows."""
    config = tiny(train__num_steps=1, checkpoint__every_steps=1, optim__warmup=0)
    config.optim.update(peak_lr=9e18, weight_decay=9e18, lr_rules=((".*", 9e18),))
    with pytest.raises(exits.Diverged, match=r"parameters are not finite.*is 0|no checkpoint"):
        train.run(config, tmp_path)
    assert 1 not in manifests.good_steps(tmp_path / "checkpoints")


def test_fewer_steps_than_were_done_are_refused(tiny, tmp_path):
    train.run(tiny(train__num_steps=3), tmp_path)
    with pytest.raises(ConfigError, match=r"train\.num_steps=2.*at step 3"):
        train.run(tiny(train__num_steps=2), tmp_path)


def test_zero_is_never_but_for_the_last_step(tiny, tmp_path):
    train.run(tiny(eval__every_steps=0, checkpoint__every_steps=0), tmp_path)
    assert [row["step"] for row in rows_of(tmp_path) if "eval/loss" in row] == [6]
    assert manifests.good_steps(tmp_path / "checkpoints") == [6]


def test_a_profile_ends_with_the_run(tiny, tmp_path):
    train.run(tiny(train__num_steps=10, train__profile_steps=5), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("first", "num_steps", "count", "expected"),
    [(0, 100, 5, range(9, 14)), (0, 8, 3, range(5, 8)), (0, 3, 5, range(3)), (40, 44, 2, range(42, 44)),
     (0, 9, 0, range(9, 9))],
)  # fmt: skip
def test_as_many_steps_are_traced_as_there_are(first, num_steps, count, expected):
    section = SimpleNamespace(profile_steps=count)
    made = SimpleNamespace(num_steps=num_steps, cfg={"train": section})
    assert log.profiled(made, first) == expected


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("first", [True, False])
def test_layers_scanned_or_unrolled_resume_each_other(tiny, tmp_path, first):
    layers = {"model__num_layers": 3, "optim__schedule": "constant"}
    turned, straight = tmp_path / "turned", tmp_path / "straight"
    train.run(tiny(**layers, model__scan=first, train__num_steps=4), turned)
    train.run(tiny(**layers, model__scan=not first), turned)
    train.run(tiny(**layers, model__scan=first), straight)
    found, expected = (
        [row["train/loss"] for row in rows_of(workdir) if "train/loss" in row]
        for workdir in (turned, straight)
    )
    assert len(found) == 6
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_init_from_starts_at_the_parameters_of_another_run(tiny, tmp_path):
    final = train.run(tiny(), tmp_path / "first")
    train.run(tiny(train__init_from=str(tmp_path / "first"), seed=1), tmp_path / "second")
    first_row = rows_of(tmp_path / "second")[0]
    assert first_row["step"] == 0
    np.testing.assert_allclose(first_row["eval/loss"], final["eval/loss"], rtol=1e-6)


def test_a_run_goes_on_without_what_it_began_from(tiny, tmp_path):
    train.run(tiny(), tmp_path / "first")
    config = tiny(train__init_from=str(tmp_path / "first"), train__num_steps=2)
    train.run(config, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    config.train.num_steps = 3
    assert "eval/loss" in train.run(config, tmp_path / "second")


def test_divergence_stops_before_the_update(tiny, tmp_path, monkeypatch):
    original = train.place_ahead

    def poisoned(*args):
        for index, batch in enumerate(original(*args)):
            yield {**batch, "weights": batch["weights"] * (np.nan if index == 4 else 1)}

    monkeypatch.setattr(train, "place_ahead", poisoned)
    with pytest.raises(exits.Diverged, match=r"step 5: .*last good checkpoint is 4"):
        train.run(tiny(), tmp_path)
    assert manifests.good_steps(tmp_path / "checkpoints") == [2, 4]


def test_durations_in_epochs_and_tokens(tiny, tmp_path):
    from lm import experiment

    made = experiment.build(tiny(train__num_steps="2 epochs", eval__every_steps="1280 tokens"))
    assert made.num_steps == int(np.ceil(2 * made.batches.steps_per_epoch))
    assert made.steps_of("eval", "every_steps") == 10


def test_losses_after_three_steps_are_golden(tiny, tmp_path):
    """To re-baseline after a change that is meant to change numbers: put the printed row here."""
    train.run(tiny(train__num_steps=3, model__num_layers=2), tmp_path)
    losses = [row["train/loss"] for row in rows_of(tmp_path) if "train/loss" in row]
    np.testing.assert_allclose(losses, GOLDEN, rtol=2e-5, err_msg=f"got {losses}")


GOLDEN = [5.519066, 5.304986, 4.922070]


def test_a_mixture_reports_the_loss_of_each_corpus(tiny, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    config = tiny(
        data__path=(),
        data__mixture=((str(text_file), 3.0), (str(other), 1.0)),
        data__mixture_stages=((3, (1.0, 0.0)),),
        train__accumulate_steps=1,
    )
    train.run(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    trained = {row["step"]: row for row in rows if "train/loss" in row}
    for step in (1, 2, 3):
        row = trained[step]
        assert (row["train/words/tokens"], row["train/other/tokens"]) == (96, 32)
        mean = (3 * row["train/words/loss"] + row["train/other/loss"]) / 4
        assert mean == pytest.approx(row["train/loss"], rel=1e-6)
    for step in (4, 5, 6):
        assert trained[step]["train/words/loss"] == pytest.approx(trained[step]["train/loss"])
        assert "train/other/loss" not in trained[step]
    (scores,) = (row for row in rows if row["step"] == 6 and "eval/loss" in row)
    parts = [
        (scores[f"eval/{name}/loss"], scores[f"eval/{name}/tokens"]) for name in ("words", "other")
    ]
    whole = sum(loss * tokens for loss, tokens in parts) / sum(tokens for _, tokens in parts)
    assert scores["eval/loss"] == pytest.approx(whole)


def test_a_mixture_changes_only_from_here_on(tiny, text_file, tmp_path, capsys):
    (tmp_path / "other.txt").write_text(text_file.read_text()[::-1])
    paths = (str(text_file), str(tmp_path / "other.txt"))

    def run(steps, *weights, **changes):
        mixed = tuple(zip(paths, weights, strict=True))
        config = tiny(data__path=(), data__mixture=mixed, train__num_steps=steps, **changes)
        return train.run(config, tmp_path / "run")

    run(2, 3.0, 1.0)
    for wrong in (
        {"weights": (1.0, 1.0)},
        {"weights": (3.0, 1.0), "data__mixture_temperature": 2.0},
        {"weights": (3.0, 1.0), "data__mixture_stages": ((1, (1.0, 0.0)),)},
    ):
        weights = wrong.pop("weights")
        with pytest.raises(ConfigError, match=r"data\.mixture.* -> .*from step 2 on: a stage in"):
            run(3, *weights, **wrong)
    capsys.readouterr()
    run(3, 6.0, 2.0, data__mixture_stages=((2, (1.0, 0.0)),))  # the same proportions
    said = capsys.readouterr().out
    assert (
        "resuming with data.mixture: " in said and "resuming with data.mixture_stages: ()" in said
    )


def test_a_large_corpus_is_checked_while_a_run_trains(tiny, tmp_path, monkeypatch):
    """Opening it compares no digests here, as of a corpus beyond 64 MB; the run stops and names the file."""
    monkeypatch.setattr(shards, "_DIGESTED", 0)
    source = experiment.build(tiny()).cfg["data"]
    corpus.prepare_in(tmp_path / "prepared", source)
    config = tiny(data__path=(str(tmp_path / "prepared"),), train__num_steps=20)
    assert len(experiment.build(config).corpus.unchecked) > 5
    train.run(config, tmp_path / "whole")
    file = tmp_path / "prepared" / "train-00000.tokens"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(bytes(content))
    original, finish, ending = shards.recorded, shards.Check.finish, threading.Event()

    def late(path):
        ending.wait(60)
        return original(path)

    def finishing(self, asked):
        ending.set()
        finish(self, asked)

    for name in ("damaged", "late"):
        with pytest.raises(ConfigError, match=r"train-00000\.tokens is damaged \(its SHA-256"):
            train.run(config, tmp_path / name)
        # A run that is over before the files are compared says so then; what it trained is there.
        monkeypatch.setattr(shards, "recorded", late)
        monkeypatch.setattr(shards.Check, "finish", finishing)
    assert manifests.good_steps(tmp_path / "late" / "checkpoints")[-1] == 20


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"model__stage_repeats": 2, "eval__batch_size": 1},
            r"model\.stage_repeats=2: the 1 rows of eval\.batch_size .* in 1 parts through mesh\.stage=2",
        ),
        (
            {"model__microbatches": 3},
            r"model\.microbatches=3: a device has 2 rows of data\.batch_size .* divides 2, or 0",
        ),
    ],
)
def test_batches_that_do_not_flow_through_stages_are_refused_at_the_start(tiny, fields, words):
    """Not in the evaluation before the last save, and not by other parts than were asked for."""
    mesh = ConfigDict({"data": 4, "stage": 2})
    config = tiny(mesh=mesh, model__num_layers=4, model__scan=True, **fields)
    with pytest.raises(ConfigError, match=words):
        experiment.build(config)


@pytest.mark.slow
def test_stages_are_resumed_as_other_stages_and_sampled(tiny, tmp_path, capfd):
    """Scanned layers on four stages, then in one: the rows go on as those of a run on one mesh."""
    options = {"model__num_layers": 4, "model__scan": True, "train__sample_tokens": 4}
    whole = train.run(tiny(**options, train__num_steps=4), tmp_path / "whole")
    staged = {"data": 2, "stage": 4}
    more = {"model__microbatches": 4, "model__stage_repeats": 1}
    train.run(
        tiny(**options, **more, mesh=ConfigDict(staged), train__num_steps=2), tmp_path / "run"
    )
    final = train.run(tiny(**options, train__num_steps=4), tmp_path / "run")
    assert final["eval/loss"] == pytest.approx(whole["eval/loss"], rel=1e-4)
    assert capfd.readouterr().out.count("sample:") == 3
    with pytest.raises(
        ConfigError, match=r"mesh\.stage=4: stages are parts of a scan .*model\.scan"
    ):
        train.run(tiny(mesh=ConfigDict(staged)), tmp_path / "loop")
