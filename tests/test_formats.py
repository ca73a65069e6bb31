"""Checkpoints of every format that was ever read load, evaluate as they did, and their runs go on.

So do those of every kind of state there is.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from lm import (
    checkpoint,
    config,
    experiment,
    fingerprint,
    manifests,
    sharding,
    signals,
    stored,
    train,
)
from lm.metrics import read_rows
from tools import evaluate

FOLDER = Path(__file__).parent / "fixtures" / "checkpoints"  # of make_checkpoints.py
STATES = FOLDER.with_name("states")
FORMATS = sorted(path.name for path in FOLDER.iterdir())
# Of all files of a fixture: none is ever made anew.
DIGESTS = {
    "2": "c3566229d36c5949af06dbebbc4b854346bfcce2a4b0180b96043f83eae9c9b7",
    "3": "f53e4cd93925488110a912091c10f53b1c7819f5b64876bb7f9790b81d53c7ee",
    "bert": "368379ca71003e2768e1a7397e41dcdd0dfcc36d414ed7776bdab5f27d9af3a1",
    "gpt_groups": "683101749dce972c7920ec8ccf1acf2d5d67e63931400e664228cdbaa6d6af21",
    "gpt_skipped": "306b2150a897f650517a509fc3c70f663b3f4a4893f2a797ef51169c72e4ec91",
    "lstm_carry": "37c6e34d59f8778f85c396c15873f8e54d245afe3a6da8f95a3d891e36ac2b1e",
    "ngram": "566a09afe2c7a51df7130051892ebe87aacfeb0e8584078cb003108844b1a66e",
    "t5": "06b94836f8b171c504c9989a436939de5896df0a6f8e4411841bd3d23fd72c25",
}
CLOSE = 1e-4  # relative, to what another version of jax rounds to


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


def test_those_of_states_are_small():
    files = [path for path in STATES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000


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


def digest_of(folder):
    """Return the SHA-256 of the names and contents of all files of a folder."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(
            f"{path.relative_to(folder).as_posix()}\0{manifests.hash_file(path)}\n".encode()
        )
    return found.hexdigest()


def test_no_fixture_was_made_anew():
    found = [path for folder in (FOLDER, STATES) for path in folder.iterdir()]
    assert {path.name: digest_of(path) for path in found} == DIGESTS


@pytest.fixture(params=sorted(path.name for path in STATES.iterdir()))
def state_of(request, tmp_path, monkeypatch):
    """The folder of a run of a kind of state, in a folder where its text is found; the kind."""
    shutil.copytree(STATES / request.param, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run", request.param


PARTS = {  # of a state, besides step, healthy and what every family that learns by gradients has
    "gpt_skipped": {"ema", "spikes"},
    "gpt_groups": {"local"},
    "lstm_carry": {"carry"},
    "ngram": {"counts"},
    "bert": set(),
    "t5": set(),
}


def test_a_state_of_every_kind_is_restored_and_goes_on(state_of):
    """Onto eight devices, bit for bit; its scores and those of one step more are what they were."""
    run, kind = state_of
    manifest = manifests.read(run / "checkpoints", 4)
    parts = {name.partition(".")[0] for name in manifest["arrays"]} - {"step", "healthy"}
    assert parts - {"params", "opt_state"} == PARTS[kind]
    expected = json.loads((run / "expected.json").read_text())
    again = config.from_json((run / "config.json").read_text(), where="config.json")
    made = experiment.build(again)
    assert made.mesh.size == 8
    with sharding.use(made.mesh):
        *_, eval_step, abstract = experiment.jitted(made)
        arrays = stored.restore(run / "checkpoints", 4, stored.flatten(abstract))
        prints = {name: about[2] for name, about in manifest["arrays"].items()}
        assert fingerprint.each(arrays) == prints
        state = stored.unflatten(abstract, arrays)
        scores = train.score(made, eval_step, state, signals.Stop())
    assert scores == pytest.approx(expected["saved"], rel=CLOSE)
    after = train.run(again, run)
    assert {name: after[name] for name in expected["after"]} == pytest.approx(
        expected["after"], rel=CLOSE
    )
    last = manifests.read(run / "checkpoints", 5)
    assert last.get("skipped") == manifest.get("skipped")
    assert bool(last.get("skipped")) == (kind == "gpt_skipped")
