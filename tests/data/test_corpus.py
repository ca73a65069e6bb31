"""The split is what it says, streams account for every byte, and the cache is whole or absent."""

import concurrent.futures
import dataclasses
import errno
import gzip
import inspect
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm import manifests
from lm.config import ConfigError
from lm.data import corpus, tokenizers
from lm.data.settings import Config

SHAKESPEARE = Path(__file__).parents[3] / "shared/data/tinyshakespeare/input.txt"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_jsonl(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Config(path=(str(file),), tokenizer="byte")


def texts_of(built, split):
    """Read a split's documents back from its stream."""
    ends = [*split.starts[1:], len(split.tokens) - 1]
    pairs = zip(split.starts, ends, strict=True)
    return [built.tokenizer.decode(split.tokens[start + 1 : end]) for start, end in pairs]


def entries(cache):
    return [f for f in (cache / "corpora").iterdir() if not f.name.startswith(".")]


def assert_equal(one, two):
    assert one.fingerprint == two.fingerprint
    for name in ("train", "validation"):
        np.testing.assert_array_equal(getattr(one, name).tokens, getattr(two, name).tokens)
        np.testing.assert_array_equal(getattr(one, name).starts, getattr(two, name).starts)


def test_many_documents_are_split_by_their_content_alone(tmp_path, cache):
    texts = [f"document {i}\n" for i in range(1000)]
    built = corpus.build(write_jsonl(tmp_path / "a.jsonl", texts))
    train, validation = (texts_of(built, s) for s in (built.train, built.validation))
    assert sorted(train + validation) == sorted(texts)
    assert 60 < len(validation) < 140
    assert train == [text for text in texts if text in set(train)]  # in order
    # A document stays where it is when others come and go.
    more = corpus.build(write_jsonl(tmp_path / "b.jsonl", [f"new {i}" for i in range(99)] + texts))
    assert set(validation) <= set(texts_of(more, more.validation))
    assert set(train) <= set(texts_of(more, more.train))


def test_few_documents_are_split_at_the_last_characters(tmp_path, cache):
    texts = ["0123456789", "abcdé", "", "fghij"]
    cfg = dataclasses.replace(write_jsonl(tmp_path / "a.jsonl", texts), validation_fraction=0.4)
    built = corpus.build(cfg)
    assert texts_of(built, built.train) == ["0123456789", "ab"]
    assert texts_of(built, built.validation) == ["cdé", "fghij"]
    assert built.report["documents"] == 3
    assert built.report["empty_documents"] == 1


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE} is not on this machine")
def test_tiny_shakespeare_is_split_like_nanogpt(cache):
    built = corpus.build(Config(path=(str(SHAKESPEARE),), tokenizer="char"))
    text = SHAKESPEARE.read_text()
    assert built.tokenizer.vocab_size == 66  # 65 characters and end of text
    assert (len(built.train.tokens) - 2, len(built.validation.tokens) - 2) == (1003854, 111540)
    assert texts_of(built, built.train) == [text[:1003854]]
    assert texts_of(built, built.validation) == [text[1003854:]]
    assert built.train.tokens.dtype == np.uint16


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=130
    ),
    tokenizer=st.sampled_from(["byte", "char"]),
)
@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_streams_account_for_every_byte_once(tmp_path, cache, texts, tokenizer):
    cfg = write_jsonl(tmp_path / "a.jsonl", texts)
    built = corpus.build(dataclasses.replace(cfg, tokenizer=tokenizer, validation_fraction=0.0))
    stream = built.train.tokens
    assert built.tokenizer.token_bytes[stream].sum() == sum(len(t.encode()) for t in texts)
    assert built.train.num_bytes == sum(len(t.encode()) for t in texts)
    assert texts_of(built, built.train) == texts
    # Every document is closed, and none holds an end of text.
    np.testing.assert_array_equal(
        np.flatnonzero(stream == built.tokenizer.end_of_text),
        [*built.train.starts, len(stream) - 1],
    )


def test_sentencepiece_is_trained_on_the_training_split_alone(tmp_path, cache):
    text = inspect.getsource(inspect)
    cfg = Config(path=(str(tmp_path / "a.txt"),), vocab_size=500, validation_fraction=0.5)
    (tmp_path / "a.txt").write_text(text + "q" * len(text))
    first = corpus.build(cfg)
    (tmp_path / "a.txt").write_text(text + "z" * len(text))
    second = corpus.build(cfg)
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    assert first.fingerprint != second.fingerprint


def test_a_given_tokenizer_encodes_other_text_whole(tmp_path, cache):
    cfg = write_jsonl(tmp_path / "a.jsonl", ["some text", "more"])
    given = tokenizers.train("char", ["abcdefghijklmnopqrstuvwxyz "], vocab_size=0, model="")
    built = corpus.build(dataclasses.replace(cfg, validation_fraction=1.0), tokenizer=given)
    assert built.tokenizer.fingerprint == given.fingerprint
    assert texts_of(built, built.validation) == ["some text", "more"]
    assert built.train.num_bytes == 0
    (tmp_path / "a.jsonl").write_text('{"text": "Text"}\n')
    with pytest.raises(ConfigError, match=r"'T' \(U\+0054\) at position 0"):
        corpus.build(cfg, tokenizer=given)


def test_wide_vocabularies_take_wide_tokens(tmp_path, cache):
    cfg = write_jsonl(tmp_path / "a.jsonl", ["".join(map(chr, range(0x10000, 0x20001)))])
    built = corpus.build(dataclasses.replace(cfg, tokenizer="char", validation_fraction=0.0))
    assert built.train.tokens.dtype == np.uint32
    assert built.train.tokens.max() == built.tokenizer.end_of_text == 0x10001


@pytest.mark.parametrize(("fraction", "split"), [(0.9999, "train"), (1e-9, "validation")])
def test_an_empty_split_is_an_error(tmp_path, cache, fraction, split):
    cfg = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(100)])
    cfg = dataclasses.replace(cfg, validation_fraction=fraction)
    if split == "train":
        (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    with pytest.raises(ConfigError, match=rf"validation_fraction=.*the {split} split is empty"):
        corpus.build(cfg)
    with pytest.raises(ConfigError, match="split is empty"):  # from the cache as well
        corpus.build(cfg)


def test_what_was_built_is_found_by_content_not_by_path(tmp_path, cache, monkeypatch):
    cfg = write_jsonl(tmp_path / "a.jsonl", ["some text", "more"])
    first = corpus.build(cfg)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    monkeypatch.setattr(corpus.prepare, "prepare", None)  # a build would fail
    second = corpus.build(
        dataclasses.replace(cfg, path=(str(tmp_path / "b.jsonl"),), batch_size=7, vocab_size=9)
    )
    assert_equal(first, second)


@pytest.mark.parametrize(
    "change",
    [{"tokenizer": "char"}, {"validation_fraction": 0.5}, {"vocab_size": 501}],
)
def test_other_settings_give_another_corpus(tmp_path, cache, change):
    text = inspect.getsource(inspect)
    (tmp_path / "a.txt").write_text(text)
    cfg = Config(path=(str(tmp_path / "a.txt"),), vocab_size=500)
    assert (
        corpus.build(cfg).fingerprint
        != corpus.build(dataclasses.replace(cfg, **change)).fingerprint
    )
    assert len(entries(cache)) == 2


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE_DIR", "/one")
    assert corpus.cache_folder() == Path("/one")
    monkeypatch.delenv("LM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert corpus.cache_folder() == Path("/two/lm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/three")
    assert corpus.cache_folder() == Path("/three/.cache/lm")


@pytest.mark.parametrize(
    "name", ["train-00000.tokens", "train.starts", "manifest.json", "tokenizer"]
)
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_entry_is_built_again(tmp_path, cache, capsys, name, damage):
    cfg = write_jsonl(tmp_path / "a.jsonl", ["some text", "more"])
    first = corpus.build(cfg)
    (entry,) = entries(cache)
    file = entry / name / "tokenizer.json" if name == "tokenizer" else entry / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-3])
    if damage == "changed":
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert_equal(first, corpus.build(cfg))
    assert "damaged cache entry" in capsys.readouterr().err
    assert entries(cache) == list((cache / "corpora").iterdir()) == [entry]


@pytest.mark.parametrize("broken", [False, True])
def test_runs_at_once_agree_and_leave_one_entry(tmp_path, cache, broken):
    cfg = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(300)])
    if broken:
        corpus.build(cfg)
        (entries(cache)[0] / "manifest.json").write_text("{")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        first, *others = pool.map(corpus.build, [cfg] * 6)
    for other in others:
        assert_equal(first, other)
    assert len(list((cache / "corpora").iterdir())) == 1


def test_the_same_bytes_are_not_the_same_text_under_another_suffix(tmp_path, cache):
    content = gzip.compress(b"some text, long enough to be cut in two. " * 20, mtime=0)
    for name in ("a.txt.gz", "a.txt"):
        (tmp_path / name).write_bytes(content)
    corpus.build(Config(path=(str(tmp_path / "a.txt.gz"),), tokenizer="byte"))
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        corpus.build(Config(path=(str(tmp_path / "a.txt"),), tokenizer="byte"))


def test_a_full_disk_is_an_error_that_names_the_fix(tmp_path, cache, monkeypatch):
    cfg = write_jsonl(tmp_path / "a.jsonl", ["some text", "more"])

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifests, "sync", full)
    with pytest.raises(ConfigError, match=r"No space left.*LM_CACHE_DIR"):
        corpus.build(cfg)
    monkeypatch.undo()
    monkeypatch.setenv("LM_CACHE_DIR", str(cache))
    assert texts_of(corpus.build(cfg), corpus.build(cfg).train)  # with room again it goes on


def test_what_nobody_went_on_with_is_removed_after_a_week(tmp_path, cache):
    left = cache / "corpora" / "left"
    for name in ("left", "fresh"):
        (cache / "corpora" / name).mkdir(parents=True)
    os.utime(left, (0, 0))
    cfg = write_jsonl(tmp_path / "a.jsonl", ["some text", "more"])
    corpus.build(cfg)
    assert not left.exists() and (cache / "corpora" / "fresh").exists()


def test_folds_are_apart_and_cover_all(tmp_path, cache):
    texts = [f"document {i}\n" for i in range(300)]
    cfg = write_jsonl(tmp_path / "a.jsonl", texts)
    built = [corpus.build(dataclasses.replace(cfg, fold=f"{i}/4")) for i in range(4)]
    parts = [texts_of(one, one.validation) for one in built]
    assert sorted(text for part in parts for text in part) == sorted(texts)
    for one, part in zip(built, parts, strict=True):
        assert 45 < len(part) < 110
        assert sorted(texts_of(one, one.train) + part) == sorted(texts)
    for fold in ("4/4", "1", "-1/3", "a/b"):
        with pytest.raises(ConfigError, match=rf"data.fold={fold}: not i/k"):
            dataclasses.replace(cfg, fold=fold)
    with pytest.raises(ConfigError, match=r"data.validation_fraction=0.2: data.fold decides"):
        dataclasses.replace(cfg, fold="0/2", validation_fraction=0.2)


def test_files_for_validation_are_given(tmp_path, cache):
    write_jsonl(tmp_path / "b.jsonl", ["x", "y"])
    cfg = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(150)])
    built = corpus.build(dataclasses.replace(cfg, validation_path=(str(tmp_path / "b.jsonl"),)))
    assert texts_of(built, built.validation) == ["x", "y"]
    assert len(texts_of(built, built.train)) == 150
    assert built.validation.origins["part"].tolist() == [1, 1]
    assert built.parts == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    with pytest.raises(ConfigError, match=r"set data\.path"):
        Config(validation_path="b.jsonl")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "again.jsonl").symlink_to(tmp_path / "a.jsonl")
    for other, words in (
        ("b.txt", "text, and data.path is jsonl"),
        ("a.jsonl", "is in data.path too"),
        ("again.jsonl", "is in data.path too"),
    ):
        with pytest.raises(ConfigError, match=words):
            corpus.build(dataclasses.replace(cfg, validation_path=(str(tmp_path / other),)))
