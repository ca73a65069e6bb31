"""A receipt says what a run's numbers depend on, where each value is from, and is never overwritten."""

import json
import shutil
import subprocess
import types

import jax
import pytest

from lm import main, manifests, receipt, train
from lm.config import ConfigError


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Return a folder that stands in for the repository, not yet one of git's."""
    (tmp_path / "code" / "lm").mkdir(parents=True)
    (tmp_path / "code" / "lm" / "receipt.py").write_text("one\n")
    monkeypatch.setattr(receipt, "_ROOT", tmp_path / "code")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return tmp_path / "code"


def test_the_code_is_named_by_its_commit_and_what_differs(code, tmp_path):
    assert receipt._code(tmp_path)["commit"] == "not a repository"
    git(code, "init", "-q")
    git(code, "add", "-A")
    git(code, "commit", "-qm", "first")
    clean = receipt._code(tmp_path)
    assert len(clean["commit"]) == 40 and clean["diff"] == ""
    (code / "lm" / "receipt.py").write_text("two\n")
    (code / "lm" / "new.py").write_text("three\n")
    changed = receipt._code(tmp_path)
    text = (tmp_path / changed["diff"]).read_text()
    assert changed["commit"] == clean["commit"]
    assert "-one" in text and "+two" in text and "+three" in text


def test_what_differs_is_told_the_same_whatever_git_is_set_to(code, tmp_path, monkeypatch):
    git(code, "init", "-q")
    (code / "lm" / "image").write_bytes(b"\0one")
    git(code, "add", "-A")
    git(code, "commit", "-qm", "first")
    (code / "lm" / "receipt.py").write_text("two\n")
    (code / "lm" / "image").write_bytes(b"\0two")
    (code / "lm" / "new.py").write_text("three\n")
    plain = receipt._code(tmp_path)
    assert "GIT binary patch" in (tmp_path / plain["diff"]).read_text()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings := tmp_path / "settings"))
    settings.write_text("[color]\nui = always\n[diff]\nexternal = echo\nnoprefix = true\n")
    assert receipt._code(tmp_path) == plain
    settings.write_text("[diff]\nalgorithm = none of git's\n")
    assert receipt._code(tmp_path) == {**plain, "diff": "unknown"}


def test_of_a_package_that_is_there_twice_the_imported_one_counts(tmp_path, monkeypatch):
    for version in ("2", "1"):
        folder = tmp_path / version / f"twice-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: twice\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path / version))
    assert receipt.packages.__wrapped__()["twice"] == "1"


def test_code_that_lies_in_another_repository_is_not_of_it(code, tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "of something else")
    assert receipt._code(tmp_path)["commit"] == "not a repository"


def test_every_value_has_its_origin(tiny):
    config = tiny()
    resolved = {"seed": 0, "model": {"num_layers": 1, "vocab_size": 257}}
    resolved |= {"optim": {"peak_lr": 1e-2}, "eval": {"every_steps": 3}}
    said = {"optim.peak_lr": "sweep", "eval.every_steps": "command line"}
    made = types.SimpleNamespace(config=resolved)
    found = receipt.origins(config, made, said)
    assert found["optim.peak_lr"] == "sweep" and found["eval.every_steps"] == "command line"
    assert found["seed"] == found["model.num_layers"] == "file"
    assert found["model.vocab_size"] == "derived"


def test_a_run_writes_one_a_start(tiny, tmp_path):
    train.run(tiny(), tmp_path, {"optim.peak_lr": "sweep"})
    train.run(tiny(train__num_steps=8), tmp_path)
    first, second = (json.loads(p.read_text()) for p in sorted(tmp_path.glob("receipts/*.json")))
    assert first["config"]["optim.peak_lr"] == [0.01, "sweep"]
    assert first["config"]["optim.schedule"][1] == "default"
    assert first["config"]["train.num_steps"] == [6, "file"]
    assert (first["first_step"], second["first_step"]) == (0, 6)
    assert second["config"]["train.num_steps"] == [8, "file"]
    assert first["packages"]["jax"] == first["environment"]["jax"] == jax.__version__
    assert "xla_force_host_platform_device_count" in first["variables"]["XLA_FLAGS"]
    assert first["data"]["tokenizer"] == "byte"
    data = json.loads((tmp_path / "data.json").read_text())
    assert first["data"]["corpus"] == data["fingerprint"]
    assert first["seeds"] == {"seed": 0} and first["code"]["digest"]


def test_the_command_line_says_which_fields_it_set(tiny, tmp_path, monkeypatch):
    path, seen = tmp_path / "small.py", {}
    path.write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()")

    def keep(config, workdir, origins):
        seen.update(origins)

    monkeypatch.setattr(train, "run", keep)
    flags = ["--config.seed=1", "--config.optim.peak_lr=1", "--swept=optim.peak_lr"]
    assert main.main(["--config", str(path), "--workdir", str(tmp_path), *flags]) == 0
    assert seen == {"seed": "command line", "optim.peak_lr": "sweep"}


def test_killed_as_it_is_written_the_next_start_writes_it(tiny, tmp_path, monkeypatch):
    train.run(tiny(train__num_steps=2), tmp_path)
    before = (tmp_path / "receipts" / "0001.json").read_bytes()
    (tmp_path / "receipts" / "0002.json.partial").write_text("{")
    train.run(tiny(train__num_steps=3), tmp_path)
    assert (tmp_path / "receipts" / "0001.json").read_bytes() == before
    assert receipt.last(tmp_path)["first_step"] == 2
    path = tmp_path / "receipts" / "0002.json"
    manifests.write_sealed(path, {"config": 3})
    texts = path.read_text(), before.decode().replace('"digest"', '"digits"')
    for text, why in zip(texts, ("it has no config", "it has no digest"), strict=True):
        path.write_text(text)
        for read in (receipt.last, receipt.read_all):
            with pytest.raises(ConfigError, match=rf"0002\.json: damaged \({why}"):
                read(tmp_path)
    shutil.rmtree(tmp_path / "receipts")
    manifests.write_whole(tmp_path / "environment.json", '{"dtype": "of an earlier version"}')
    assert receipt.environment(tmp_path) == {"dtype": "of an earlier version"}
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(ConfigError, match=r"environment\.json: damaged"):
        receipt.environment(tmp_path)


def test_a_copy_that_something_puts_there_is_no_receipt(tiny, tmp_path):
    train.run(tiny(train__num_steps=2), tmp_path)
    folder = tmp_path / "receipts"
    shutil.copy(folder / "0001.json", folder / "0001 (conflicted copy).json")
    shutil.copy(folder / "0001.json", folder / "1a.json")
    train.run(tiny(train__num_steps=3), tmp_path)
    assert receipt.last(tmp_path) == receipt.read_json(folder / "0002.json")
    text = (folder / "0002.json").read_text()
    assert '"first_step": 2' in text
    (folder / "0002.json").write_text(text.replace('"first_step": 2', '"first_step": 0'))
    with pytest.raises(ConfigError, match=r"0002\.json: damaged"):
        train.run(tiny(train__num_steps=4), tmp_path)


def test_receipts_that_cannot_be_listed_are_not_written_over(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(receipt, "_all", lambda workdir: [])
    for _ in range(2):
        train.run(tiny(train__num_steps=3, checkpoint__every_steps=0), tmp_path)
    assert sorted(path.name for path in (tmp_path / "receipts").glob("*.json"))[:2] == [
        "0001.json",
        "0002.json",
    ]
