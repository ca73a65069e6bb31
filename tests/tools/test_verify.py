"""`tools.verify`: a run is the same again; of one that is not, the first step and quantity is named."""

import hashlib
import json
import shutil

import pytest
from ml_collections import ConfigDict

from lm import manifests, trail, train
from tools import rows, verify


@pytest.fixture(scope="module")
def run(text_file, tmp_path_factory):
    """The workdir of a run that has ended."""
    workdir = tmp_path_factory.mktemp("verified") / "run"
    train.run(config_of(text_file), workdir, {"optim.peak_lr": "command line"})
    return workdir


def config_of(text_file, **optim):
    return ConfigDict({
        "data": {"path": (str(text_file),), "tokenizer": "byte", "batch_size": 8},
        "task": {"length": 16},
        "model": {"name": "gpt", "num_layers": 1, "model_dim": 32, "num_heads": 2, "dropout": 0.1},
        "optim": {"name": "adamw", "peak_lr": 1e-2, "warmup": 2, **optim},
        "train": {"num_steps": 6, "log_every_steps": 1, "sample_tokens": 0, "fingerprint_every_steps": 1},
        "eval": {"every_steps": 3, "max_tokens": 512},
        "checkpoint": {"every_steps": 2, "keep": 2},
    }, type_safe=False)  # fmt: skip


def digest_of(workdir):
    return {
        p: hashlib.sha256(p.read_bytes()).hexdigest() for p in workdir.rglob("*") if p.is_file()
    }


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def change(path, step, edit):
    """Rewrite the row of `step` in a file of JSON lines."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["step"] == step:
            edit(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("flags", [[], ["--steps=4:6"], ["--steps=1:5"]])
def test_a_run_is_the_same_again_and_unchanged(run, capsys, flags):
    before = digest_of(run)
    assert verify.main([str(run), *flags]) == 0
    assert capsys.readouterr().out.endswith("the same\n")
    assert digest_of(run) == before


@pytest.mark.parametrize("part", ["batch", "gradients", "params"])
def test_a_fingerprint_that_differs_is_named(copy, capsys, part):
    names = []

    def flip(row):
        names.append(next(name for name in row["fingerprints"] if name.startswith(f"{part}.")))
        row["fingerprints"][names[0]] = "0" * 16

    change(copy / trail.FILE, 5, flip)
    assert verify.main([str(copy), "--steps=4:6"]) == 1
    assert f"step 5: {names[0]} is " in capsys.readouterr().out


def without(path, step, *kinds):
    """Take the rows of `step` whose names begin with one of `kinds` out of a file of JSON lines."""

    def is_one(row):
        return row["step"] == step and any(n.startswith(k) for n in row for k in kinds)

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if not is_one(row)]
    assert len(kept) == len(rows) - 1
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def test_only_the_first_of_two_steps_that_differ_is_named(run, copy, capsys):
    for step in (2, 4):
        change(copy / "metrics.jsonl", step, lambda row: row.update({"train/loss": 1.0}))
        change(copy / trail.FILE, step, lambda row: row["fingerprints"].update(step="0" * 16))
    assert verify.main([str(copy), "--steps=0:6"]) == 1
    said = capsys.readouterr().out
    assert "step 2: train/loss is " in said and "step 4: " not in said
    assert verify.main(["--compare", str(run), str(copy)]) == 1
    said = capsys.readouterr().out
    assert "part at step 2: train/loss" in said and "part at step 2: step " in said
    assert "step 4" not in said


@pytest.mark.parametrize(
    ("file", "step", "kind", "name"),
    [
        ("metrics.jsonl", 2, "train/", "train/loss"),
        ("metrics.jsonl", 3, "eval/", "eval/loss"),
        (trail.FILE, 3, "fingerprints", "step"),
    ],
)
def test_a_middle_row_that_is_missing_is_named(run, copy, capsys, file, step, kind, name):
    without(copy / file, step, kind)
    for later in ("metrics.jsonl", trail.FILE):
        change(copy / later, 5, lambda row: row.update({"train/loss": 1.0, "fingerprints": {}}))
    assert verify.main([str(copy), "--steps=0:6"]) == 1
    said = capsys.readouterr().out.splitlines()[1:]
    assert said and all(line.startswith(f"step {step}: ") for line in said), said
    assert all(line.endswith(", and was missing") for line in said)
    for pair, way in (((run, copy), "{} -> missing"), ((copy, run), "missing -> {}")):
        assert verify.main(["--compare", *map(str, pair)]) == 1
        said = capsys.readouterr().out.splitlines()
        assert said and all(f"numbers: they part at step {step}: " in line for line in said), said
        assert all(("-> missing" in line) == (way[0] == "{") for line in said)


@pytest.mark.parametrize(
    ("file", "part", "name"),
    [
        ("metrics.jsonl", None, "train/grad_norm"),
        ("metrics.jsonl", None, "eval/accuracy"),
        (trail.FILE, "fingerprints", "batch.inputs"),
    ],
)
def test_a_quantity_that_is_missing_is_named(run, copy, capsys, file, part, name):
    change(copy / file, 3, lambda row: (row[part] if part else row).pop(name, None))
    assert verify.main([str(copy), "--steps=2:6"]) == 1
    said = capsys.readouterr().out
    assert f"step 3: {name} is " in said and "and was missing" in said
    assert verify.main(["--compare", str(run), str(copy)]) == 1
    assert f"part at step 3: {name} " in capsys.readouterr().out


def test_a_score_that_differs_is_named(copy, capsys):
    def worse(row):
        if "eval/loss" in row:
            row["eval/loss"] += 1e-6

    change(copy / "metrics.jsonl", 3, worse)
    assert verify.main([str(copy), "--steps=2:6"]) == 1
    assert "step 3: eval/loss is " in capsys.readouterr().out
    assert verify.main([str(copy), "--steps=4:6"]) == 0


def test_a_shorter_run_is_said_to_be_shorter(run, text_file, tmp_path, copy, capsys):
    shorter = shutil.copytree(run, tmp_path / "shorter")
    for file in ("metrics.jsonl", trail.FILE):
        lines = (shorter / file).read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["step"] < 5]
        (shorter / file).write_text("\n".join([*kept, ""]))
    assert verify.main([str(shorter), "--steps=0:4"]) == 0
    capsys.readouterr()
    assert verify.main(["--compare", str(run), str(shorter)]) == 1
    assert capsys.readouterr().out == (
        "length: the last step recorded is 6 -> 4; up to step 4 the numbers are the same\n"
    )


def test_rows_that_are_not_asked_for_are_no_difference(run, text_file, tmp_path, capsys):
    config = config_of(text_file)
    config.train.log_every_steps, config.train.fingerprint_every_steps = 4, 3
    config.eval.every_steps, config.train.on_bad_step = 2, "skip"
    train.run(config, tmp_path)
    for pair in ((run, tmp_path), (tmp_path, run)):
        capsys.readouterr()
        assert verify.main(["--compare", *map(str, pair)]) == 1
        said = capsys.readouterr().out
        assert "config: train.log_every_steps" in said and "numbers" not in said, said
    assert verify.main([str(tmp_path), "--steps=0:6"]) == 0
    without(tmp_path / "metrics.jsonl", 4, "train/")
    capsys.readouterr()
    assert verify.main([str(tmp_path), "--steps=0:6"]) == 1
    assert "step 4: train/" in capsys.readouterr().out
    assert verify.main(["--compare", str(run), str(tmp_path)]) == 1
    assert "part at step 4: train/" in capsys.readouterr().out


@pytest.mark.slow
def test_the_reason_is_of_the_start_that_took_the_step(text_file, tmp_path, capsys):
    """The newest starts are alike; an earlier one was not."""
    for name, rate in (("one", 1e-2), ("two", 1e-3)):
        for steps, peak in ((2, 1e-2), (4, rate), (6, 1e-2)):
            config = config_of(text_file, peak_lr=peak, schedule="constant", warmup=0)
            config.train.num_steps = steps
            train.run(config, tmp_path / name)
    capsys.readouterr()
    assert verify.main(["--compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "config: optim.peak_lr 0.01 (file) -> 0.001 (file)"
    assert said[1].startswith("numbers: they part at step 3: train/learning_rate")


def test_the_last_step_is_compared_too(copy, capsys):
    def flip(row):
        row["fingerprints"] |= dict.fromkeys(row["fingerprints"], "0" * 16)

    marks = [json.loads(line)["step"] for line in (copy / trail.FILE).read_text().splitlines()]
    change(copy / trail.FILE, marks[-1], flip)
    assert verify.main([str(copy), f"--steps={marks[-1] - 1}:{marks[-1]}"]) == 1
    assert f"step {marks[-1]}: " in capsys.readouterr().out


def test_a_loss_that_differs_is_named(copy, capsys):
    change(copy / "metrics.jsonl", 5, lambda row: row.update({"train/loss": 1.0}))
    assert verify.main([str(copy)]) == 1
    assert "step 5: train/loss is " in capsys.readouterr().out


def test_two_runs_of_the_same(run, copy, capsys):
    assert verify.main(["--compare", str(run), str(copy)]) == 0
    assert capsys.readouterr().out == "the same\n"


@pytest.mark.parametrize("found", [None, [], "marks", {"step": 1}, "left out"])
def test_a_row_without_fingerprints_is_named(run, copy, capsys, found):
    def spoil(row):
        row["fingerprints"] = found
        if found == "left out":
            del row["fingerprints"]

    change(copy / trail.FILE, 3, spoil)
    for flags in ([str(copy)], ["--compare", str(run), str(copy)]):
        assert verify.main(flags) == 2
        said = capsys.readouterr().err
        assert f"{copy / trail.FILE}: the row of step 3 has no fingerprints" in said
        assert said.count("\n") == 1 and "delete that line" in said


def test_a_checkpoint_of_another_run_is_no_record(run, copy):
    assert rows.Record(copy).saved(6) == rows.Record(run).saved(6) != {}
    manifests.write_sealed(copy / manifests.IDENTITY, {"identity": "of another run"})
    assert rows.Record(copy).saved(6) == {}


def test_runs_without_a_record_are_not_called_the_same(copy, tmp_path, capsys):
    (copy / "metrics.jsonl").write_text("")
    (copy / trail.FILE).unlink()
    other = shutil.copytree(copy, tmp_path / "other")
    assert verify.main(["--compare", str(copy), str(other)]) == 2
    assert "nothing is recorded in either" in capsys.readouterr().err


def test_why_two_runs_differ(run, text_file, tmp_path, capsys):
    train.run(config_of(text_file, peak_lr=2e-2), tmp_path)
    capsys.readouterr()
    assert verify.main(["--compare", str(run), str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "config: optim.peak_lr 0.01 (command line) -> 0.02 (file)" in said
    # The first step is the same but for the rate that is reported.
    assert "they part at step 1: train/learning_rate" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give one RUN"),
        (["{run}", "--steps=4"], "write A:B"),
        (["{run}", "--steps=4:99"], "up to step 6"),
        (["{run}", f"--steps={'9' * 5000}:1"], "999: write A:B"),
        (["{empty}"], "no config.json"),
        (["--compare", "{run}", "{empty}"], "no metrics.jsonl"),
        (["--compare", "{run}", "{bare}"], "no receipts"),
        (["--compare", "{run}", "{run}", "--steps=1:2"], "give one RUN"),
    ],
)
def test_mistakes(run, tmp_path, capsys, flags, words):
    (empty := tmp_path / "empty").mkdir()
    (bare := tmp_path / "bare").mkdir()
    shutil.copy(run / "metrics.jsonl", bare)
    flags = [flag.format(run=run, empty=empty, bare=bare) for flag in flags]
    assert verify.main(flags) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and len(said) < 300


def test_steps_before_a_change_are_taken_as_they_were(text_file, tmp_path, capsys):
    config = config_of(text_file)
    config.train.num_steps, config.checkpoint.keep = 4, 9
    train.run(config, tmp_path)
    config.train.num_steps, config.optim.peak_lr = 8, 1e-3
    train.run(config, tmp_path)
    assert verify.main([str(tmp_path), "--steps=2:4"]) == 0
    assert verify.main([str(tmp_path), "--steps=4:8"]) == 0
    capsys.readouterr()
    assert verify.main([str(tmp_path), "--steps=2:8"]) == 2
    assert "changed at step 4, and steps are taken from 2" in capsys.readouterr().err


def test_a_change_that_was_taken_back_is_a_change(text_file, tmp_path, capsys):
    config = config_of(text_file)
    config.checkpoint.keep = 9
    for num_steps, rate in ((2, 1e-2), (4, 1e-3), (6, 1e-2)):
        config.train.num_steps, config.optim.peak_lr = num_steps, rate
        train.run(config, tmp_path)
    capsys.readouterr()
    assert verify.main([str(tmp_path), "--steps=0:6"]) == 2
    assert "optim.peak_lr" in (said := capsys.readouterr().err) and "changed at step 2" in said


def test_a_start_that_reads_what_was_saved_into_other_types_is_no_difference(text_file, tmp_path):
    config = config_of(text_file)
    config.train.num_steps, config.checkpoint.keep = 4, 9
    train.run(config, tmp_path)
    config.train.num_steps, config.optim.moments_dtype = 6, "bfloat16"
    train.run(config, tmp_path)
    assert verify.main([str(tmp_path), "--steps=4:6"]) == 0


def test_spikes_that_are_looked_for_from_a_step_on_are_a_change(text_file, tmp_path, capsys):
    config = config_of(text_file)
    config.train.num_steps, config.checkpoint.keep = 6, 1
    train.run(config, tmp_path)
    config.train.num_steps, config.train.spike_zscore = 8, 9.0
    train.run(config, tmp_path)
    capsys.readouterr()
    assert verify.main([str(tmp_path), "--steps=5:8"]) == 2
    assert "changed at step 6" in capsys.readouterr().err
