"""The one table of exit codes: complete, told apart, and what the README says."""

import re
from pathlib import Path

import pytest

from lm import exits, main, train
from lm.data import pipeline

ROOT = Path(__file__).parent.parent
CODES = {k: v for k, v in vars(exits).items() if k.isupper() and isinstance(v, int)}


def test_every_code_has_a_meaning_and_no_two_are_the_same():
    assert len(set(CODES.values())) == len(CODES)
    assert set(exits.MEANINGS) == set(CODES.values())


def test_the_readme_has_the_table():
    text = (ROOT / "README.md").read_text().split("### How a run ends")[1].split("\n### ")[0]
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert {int(code): words for code, words in rows} == exits.MEANINGS


def test_no_other_place_has_a_code_of_its_own():
    """A number that stands for an end is written in one file."""
    numbers = rf"(return|exit\(|== |= )\s*({'|'.join(str(c) for c in CODES.values() if c > 4)})\b"
    for path in [*(ROOT / "lm").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for line in path.read_text().splitlines() if path.name != "exits.py" else []:
            assert not re.search(numbers, line) or "SIGPIPE" in line, f"{path}: {line}"


@pytest.mark.parametrize("end", exits.Ended.__subclasses__())
def test_main_ends_with_the_code_of_the_exception(end, tiny, tmp_path, monkeypatch, capsys):
    experiment = tmp_path / "small.py"
    experiment.write_text(
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()"
    )

    def ended(*args, **kwargs):
        raise end("words")

    monkeypatch.setattr(train, "run", ended)
    assert main.main(["--config", str(experiment), "--workdir", str(tmp_path)]) == end.code
    said = capsys.readouterr()
    assert ("error: words" in said.err) == end.error
    assert ("to resume" in said.out) == (not end.error)


def test_data_that_ends_is_told_and_saved(tiny, tmp_path, monkeypatch):
    whole = pipeline.prefetch

    def short(batches, start, stop, **options):
        return whole(batches, start, min(stop, 3), **options)

    monkeypatch.setattr(pipeline, "prefetch", short)
    with pytest.raises(exits.DataEnded, match="ended at step 3 of 6, which is saved"):
        train.run(tiny(), tmp_path)
    assert (tmp_path / "checkpoints" / "3" / "manifest.json").exists()
