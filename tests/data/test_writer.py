"""The journal of a preparation has of each shard what is new, and one of before is gone on with."""

import json

import pytest

from lm.data import corpus, prepare, shards, writer
from lm.data.settings import Config


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A preparation that was cut off behind its fifth shard, and its config."""
    monkeypatch.setattr(prepare, "CHUNK", 2000)
    monkeypatch.setattr(prepare, "SHARD", 6000)
    rows = [{"text": f"document {i} of many, " * (1 + i % 13)} for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = Config(path=(str(tmp_path / "a.jsonl"),), tokenizer="byte")
    end_shard = prepare.Writer.end_shard

    def cut(self):
        end_shard(self)
        if self._shard == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare.Writer, "end_shard", cut)
        corpus.prepare_in(tmp_path / "begun", cfg)
    corpus.prepare_in(tmp_path / "whole", cfg)
    return tmp_path / "begun", cfg


def test_a_tokenizer_that_was_damaged_meanwhile_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 2000)
    (tmp_path / "a.txt").write_text("some text of the letters a, b and c. " * 200)
    cfg = Config(path=(str(tmp_path / "a.txt"),), tokenizer="char")
    corpus.prepare_in(tmp_path / "whole", cfg)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_finish", killed)
        corpus.prepare_in(tmp_path / "begun", cfg)
    file = tmp_path / "begun/tokenizer/tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(file.read_text().replace("abc", "acb"))
    assert json.loads(file.read_text()) != content
    corpus.prepare_in(tmp_path / "begun", cfg)
    assert files(tmp_path / "begun") == files(tmp_path / "whole")


def files(folder):
    return {f.name: f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def lines(folder):
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_a_line_has_the_files_of_its_shard_alone(begun):
    folder, _ = begun
    first, *others = lines(folder)
    assert first["format"] == 2 and len(others) == 5
    for number, line in enumerate(others):
        assert sorted(line["files"]) == [f"{s}-{number:05}.tokens" for s in shards.SPLITS]


def test_what_the_lists_hold_is_summed_once(begun, monkeypatch):
    folder, cfg = begun
    documents, read = lines(folder)[-1]["documents"], {}
    go_on = shards.go_on

    def counted(digest, file, begin, end):
        if file.suffix != ".tokens":  # those are summed as they are found again
            read[file.name] = read.get(file.name, 0) + end - begin
        go_on(digest, file, begin, end)

    monkeypatch.setattr(shards, "go_on", counted)
    corpus.prepare_in(folder, cfg)
    widths = writer._WIDTHS.items()
    assert read == {name: documents[name.split(".")[0]] * width for name, width in widths}
    assert files(folder) == files(folder.with_name("whole"))


@pytest.mark.parametrize("newline", [True, False])
def test_one_of_before_is_gone_on_with(begun, newline):
    """It had no number, and in each line the files of all lines."""
    folder, cfg = begun
    first, *others = lines(folder)
    first.pop("format")
    so_far = {}
    for line in others:
        line["files"] = so_far = so_far | line["files"]
    text = "".join(json.dumps(line) + "\n" for line in (first, *others))
    (folder / "journal.jsonl").write_text(text if newline else text[:-1])
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.tokens")}
    corpus.prepare_in(folder, cfg)
    assert files(folder) == files(folder.with_name("whole"))
    kept = [file for file in before if file.stat().st_mtime_ns == before[file]]
    assert len(kept) == 10, "of five shards"


def test_a_journal_that_is_damaged_is_read_up_to_there(begun):
    folder, cfg = begun
    journal = folder / "journal.jsonl"
    raw = journal.read_bytes().splitlines(keepends=True)
    raw[3] = b"\xff" + raw[3][1:]
    journal.write_bytes(b"".join(raw))
    corpus.prepare_in(folder, cfg)
    assert files(folder) == files(folder.with_name("whole"))
