"""Checkpoints of every format that was ever read load, evaluate as they did, and their runs go on."""

import json
import shutil
from pathlib import Path

import pytest

from lm import checkpoint, config, manifests, stored, train
from lm.metrics import read_rows
from tools import evaluate

FOLDER = Path(__file__).parent / "fixtures" / "checkpoints"  # of make_checkpoints.py
FORMATS = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(params=FORMATS)
def run(request, tmp_path, monkeypatch):
    """The folder of the run, in a folder where its text is found."""
    shutil.copytree(FOLDER / request.param, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def test_there_is_one_of_each_format_and_it_is_small():
    assert list(map(str, manifests.READ)) == FORMATS
    for name in FORMATS:
        files = [path for path in (FOLDER / name).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 100_000


def test_it_is_whole(run):
    folder = run / "checkpoints"
    assert manifests.problem(folder, 4) == stored.problem(folder, 4) == ""
    manifest = manifests.read(folder, 4)
    described = 2 if manifest["format"] == 2 else 3  # shape, type; fingerprint
    assert {len(values) for values in manifest["arrays"].values()} == {described}


def test_it_evaluates_as_it_did(run):
    expected = json.loads((run / "expected.json").read_text())
    flags = ["--workdir", str(run), "--json", "scores.json", "--config.mesh.data=8"]
    assert evaluate.main(flags) == 0
    found = json.loads((run / "scores.json").read_text())
    assert found["loss"] == pytest.approx(expected["eval/loss"], rel=1e-5)


def test_its_run_goes_on(run):
    again = config.from_json((run / "config.json").read_text(), where="config.json")
    again.mesh.data = 8
    again.train.num_steps = 6
    train.run(again, run)
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [5, 6, 6]
    assert manifests.good_steps(run / "checkpoints") == [6]
    assert manifests.read(run / "checkpoints", 6)["format"] == manifests.FORMAT
    assert checkpoint.load(run).config.train.num_steps == 6
