"""What training reaches: the losses that the README promises, by whole runs of users' own commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm import metrics

ROOT = Path(__file__).parent.parent
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"


def trained(workdir, name, *fields):
    """Return (last scores, tokens trained on, parameters) of an experiment with fields set."""
    words = [sys.executable, "-m", "lm.main", "--config", f"experiments/{name}.py"]
    words += ["--workdir", str(workdir), *(f"--config.{field}" for field in fields)]
    one_device = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    run = subprocess.run(words, cwd=ROOT, env=one_device, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    config = json.loads((workdir / "config.json").read_text())
    steps, rows = config["train"]["num_steps"], config["data"]["batch_size"]
    (parameters,) = (line for line in run.stdout.splitlines() if " parameters" in line)
    size = int(parameters.partition(" parameters")[0].rpartition(" ")[2].replace(",", ""))
    scores = [row for row in metrics.read_rows(workdir / "metrics.jsonl") if "eval/loss" in row]
    return scores[-1], int(steps) * rows * config["task"]["length"], size


@pytest.mark.measure
@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="tiny Shakespeare is not beside the project")
def test_shakespeare_char_is_below_1_65_nats_at_step_2000(tmp_path):
    scores, tokens, size = trained(tmp_path, "shakespeare_char", f"data.path={SHAKESPEARE}")
    assert (scores["step"], tokens) == (2000, 2000 * 12 * 64)
    assert size == pytest.approx(0.80e6, rel=0.02)
    assert scores["eval/loss"] <= 1.65


@pytest.mark.measure
def test_gpt_tiny_beats_an_lstm_of_its_size_on_the_same_bytes(tmp_path):
    same = ("task.length=128", "data.batch_size=32", "train.num_steps=300", "optim.schedule=linear")
    ours, tokens, size = trained(tmp_path / "gpt", "gpt_tiny")
    lstm, read, other = trained(
        tmp_path / "lstm", "lstm_small", "model.model_dim=200", "model.dropout=0", *same
    )
    assert read == tokens and other == pytest.approx(size, rel=0.02)
    assert ours["eval/bits_per_byte"] < lstm["eval/bits_per_byte"] - 0.05
