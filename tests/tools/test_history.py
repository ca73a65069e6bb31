"""One table and one picture of models trained on the same text, and what is asked for by a wrong name."""

import csv
import json
import math

import jax
import pytest

from lm import config as config_lib
from lm import main
from tools import history, sweep


@pytest.mark.slow
def test_a_model_is_trained_once_and_put_into_table_and_picture(text_file, tmp_path, capfd):
    flags = [
        *("--workdir", str(tmp_path), "--only", "trigram_kneser_ney"),
        *(f"--config.data.path={text_file}", "--config.data.tokenizer=byte"),
        "--config.eval.max_tokens=512",
    ]
    assert history.main(flags) == 0
    with (tmp_path / "history.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == "trigram_kneser_ney" and row["year"] == "1999"
    assert 0 < float(row["bits per byte"]) < 4 and int(row["parameters"]) > 100
    assert row["sample"].startswith(history.PROMPT)
    assert "trigram_kneser_ney" in (tmp_path / "history.md").read_text()
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    capfd.readouterr()
    assert history.main(flags) == 0
    assert "trigram_kneser_ney: finished" in capfd.readouterr().out


def test_some_models_again_keep_the_rows_of_the_others(tmp_path, monkeypatch, capsys):
    def run(path, workdir, *, fixed, only):
        assert only == ["gpt"]
        ended = [("gpt", 0), ("lstm", 0), ("bert", 1)]
        rows = [{"name": name, "exit_code": code} for name, code in ended]
        (tmp_path / "sweep.json").write_text(json.dumps(rows))
        return 1

    def result(workdir, name, year, paper):
        numbers = dict.fromkeys(history.COLUMNS, 1.0)
        return {**numbers, "model": name, "year": year, "paper": paper, "sample": "x"}

    monkeypatch.setattr(history.sweep_tool, "run", run)
    monkeypatch.setattr(history, "result", result)
    assert history.main(["--workdir", str(tmp_path), "--only", "gpt"]) == 1
    with (tmp_path / "history.csv").open(newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["lstm", "gpt"]
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("\n| ") == 3


@pytest.mark.parametrize(("name", "near"), [("lstn", "lstm"), ("gpt9", "gpt2")])
def test_a_model_that_is_not_there_is_named(tmp_path, capsys, name, near):
    assert history.main(["--workdir", str(tmp_path), "--only", name]) == 2
    said = capsys.readouterr().err
    assert name in said and near in said and len(said.splitlines()) == 1


def test_the_minutes_are_those_of_training_however_often_it_was_stopped():
    rows = [
        {"step": 0, "eval/loss": 3.0},
        {"step": 1, "train/tokens": 100.0},
        {"step": 21, "train/tokens": 100.0, "steps_per_second": 0.5},
        {"step": 21, "eval/loss": 2.0},
        {"step": 22, "train/tokens": 100.0},  # resumed
        {"step": 32, "train/tokens": 7.0, "steps_per_second": 0.25},
    ]
    assert history.minutes(rows) == pytest.approx((20 * 2 + 10 * 4) / 60)


@pytest.mark.slow
def test_every_model_has_its_row_from_two_steps(text_file, tmp_path, monkeypatch):
    def run_point(command, path, folder, given, *, swept):
        """Run a point in this process, on one device: it takes longer to begin and to compile than to run."""
        flags = [f"--config.{assignment}" for assignment in given]
        return main.main(["--config", str(path), "--workdir", str(folder), *flags])

    monkeypatch.setattr(sweep, "_run_point", run_point)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    flags = [
        *("--workdir", str(tmp_path), f"--config.data.path={text_file}"),
        *("--config.data.tokenizer=byte", "--config.data.batch_size=4"),
        *("--config.train.num_steps=2", "--config.eval.max_tokens=256"),
    ]
    assert history.main(flags) == 0
    with (tmp_path / "history.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == sorted(rows, key=lambda name: int(rows[name]["year"]))
    assert set(rows) == set(config_lib.call("experiments/history.py", "papers"))
    for name, row in rows.items():
        encoder = name in ("bert", "roberta")
        assert math.isnan(float(row["bits per byte"])) == encoder, name
        assert 0 < float(row["nats"]) < 20 and float(row["training FLOPs"]) > 0, name
        assert row["sample"].startswith(history.MASKED if encoder else history.PROMPT), name
