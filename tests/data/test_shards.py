"""A prepared corpus says of each shard what is in it."""

import errno
import json

import numpy as np
import pytest

from lm.config import ConfigError
from lm.data import corpus, prepare, shards
from lm.data.settings import Config
from tools import inspect_data


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 2000)
    monkeypatch.setattr(prepare, "SHARD", 12_000)
    rows = [{"text": f"document {i} of many, " * (1 + i % 13)} for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = Config(path=(str(tmp_path / "a.jsonl"),), tokenizer="byte")
    corpus.prepare_in(tmp_path / "made", cfg)
    return tmp_path / "made"


def test_each_shard_has_its_documents_and_tokens_and_they_sum_to_the_split(folder):
    text, counts = corpus.load(folder), shards.read_manifest(folder)["shards"]
    for split in (text.train, text.validation):
        names = sorted(name for name in counts if name.startswith(split.name))
        assert names == sorted(file.name for file in folder.glob(f"{split.name}-*"))
        assert len(names) > 4
        begin = 1  # behind the first end of text
        for name in names:
            stream = np.fromfile(folder / name, text.train.tokens.dtype)[begin:]
            ends = int((stream == split.end_of_text).sum())
            assert counts[name] == {"documents": ends, "tokens": len(stream)}
            begin = 0
        for kind in ("documents", "tokens"):
            total = sum(counts[name][kind] for name in names)
            assert total == text.report[split.name][kind] > 0


def test_they_are_shown_and_a_folder_without_them_still_opens(folder, capsys):
    counts = shards.read_manifest(folder)["shards"]
    assert inspect_data.main([str(folder), "--shards"]) == 0
    said = capsys.readouterr().out
    for name, shard in counts.items():
        line = f"  {name}: {shard['documents']:,} documents, {shard['tokens']:,} tokens\n"
        assert line in said
    body = json.loads((folder / "manifest.json").read_text())["body"]
    body.pop("shards")
    shards.write_manifest(folder, body)
    fingerprint = corpus.build(Config(path=(str(folder),))).fingerprint
    assert fingerprint == body["fingerprint"]
    assert inspect_data.main([str(folder)]) == 0
    capsys.readouterr()
    assert inspect_data.main([str(folder), "--shards"]) == 2
    assert "--shards: the corpus was prepared before they" in capsys.readouterr().err


def damage(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_what_passes_is_no_damage(tmp_path, monkeypatch):
    """As too many open files at that moment: the file is compared when it can be."""
    monkeypatch.setattr(shards, "_DIGESTED", 0)
    monkeypatch.setattr(shards, "_WAIT", 0.0)
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some text, " * 100)
    text = corpus.build(Config(path=(str(tmp_path / "a.txt"),), tokenizer="byte"))
    real, failures = shards.recorded, iter(range(3))

    def recorded(file):
        if next(failures, None) is not None:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(file)

    monkeypatch.setattr(shards, "recorded", recorded)
    found_meanwhile(text)
    assert next(failures, None) is None and text.unchecked
    monkeypatch.setattr(shards, "_TRIES", 1)
    failures = iter(range(99))
    with pytest.raises(shards.Damaged, match="Too many open files"):
        found_meanwhile(text)
    (entry,) = (tmp_path / "cache/corpora").iterdir()
    assert (entry / shards.MANIFEST).exists(), "it is not made again for that"


def test_a_stray_copy_of_rows_is_not_looked_at(tmp_path):
    from lm.data import packing

    (tmp_path / "rows" / "best_fit-32.old").mkdir(parents=True)
    assert packing.load(tmp_path, fingerprint="x") == ({}, {})


def found_meanwhile(text):
    shards.Check(text.unchecked, made_again=corpus.made_again()).finish(lambda: False)


@pytest.mark.parametrize("name", ["train-00000.tokens", "validation.origins"])
def test_a_large_corpus_of_the_cache_that_is_damaged_is_made_again(
    tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(shards, "_DIGESTED", 0)
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some text, " * 100)
    cfg = Config(path=(str(tmp_path / "a.txt"),), tokenizer="byte")
    text = corpus.build(cfg)
    found_meanwhile(text)
    (entry,) = (tmp_path / "cache/corpora").iterdir()
    damage(entry / name)
    with pytest.raises(ConfigError, match=rf"{name} of the cache is damaged .*start again"):
        found_meanwhile(corpus.build(cfg))
    assert corpus.build(cfg).fingerprint == text.fingerprint
    assert "damaged cache entry" in capsys.readouterr().err
    found_meanwhile(corpus.build(cfg))


def test_a_large_corpus_of_the_users_that_is_damaged_stays(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "_DIGESTED", 0)
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    damage(folder / "train.starts")
    names = sorted(folder.rglob("*"))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"train\.starts is damaged .*restore it"):
            found_meanwhile(corpus.load(folder))
    assert sorted(folder.rglob("*")) == names
