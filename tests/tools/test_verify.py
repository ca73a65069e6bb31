"""`tools.verify`: a run is the same again; of one that is not, the first step and quantity is named."""

import hashlib
import json
import shutil

import pytest
from ml_collections import ConfigDict

from lm import trail, train
from tools import verify


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
        (["{empty}"], "no config.json"),
        (["--compare", "{run}", "{empty}"], "no receipts"),
        (["--compare", "{run}", "{run}", "--steps=1:2"], "give one RUN"),
    ],
)
def test_mistakes(run, tmp_path, capsys, flags, words):
    flags = [flag.format(run=run, empty=tmp_path) for flag in flags]
    assert verify.main(flags) == 2
    assert words in capsys.readouterr().err


def test_steps_before_a_change_are_taken_as_they_were(text_file, tmp_path, capsys):
    config = config_of(text_file)
    config.train.num_steps, config.checkpoint.keep = 4, 9
    train.run(config, tmp_path)
    config.train.num_steps, config.optim.peak_lr = 8, 1e-3
    train.run(config, tmp_path)
    assert verify.main([str(tmp_path), "--steps=2:4"]) == 0
    assert verify.main([str(tmp_path), "--steps=4:8"]) == 0
    capsys.readouterr()
    assert verify.main([str(tmp_path), "--steps=2:8"]) == 1
    assert "optim.peak_lr" in capsys.readouterr().out.splitlines()[0]
