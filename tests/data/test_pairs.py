"""Pairs and labels: what is read of tables and JSON lines, how they are split, that pairs stay together."""

import json

import numpy as np
import pytest

from lm.config import ConfigError
from lm.data import corpus, prepare
from lm.data.settings import Config


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))


def build(path, content, **fields):
    path.write_text(content)
    return corpus.build(Config(path=(str(path),), tokenizer="byte", **fields))


def pairs_of(built, split):
    made = getattr(built, split)
    decode = built.tokenizer.decode
    return [tuple(map(decode, made.pair(i))) for i in range(made.num_pairs)]


def everything(built):
    return pairs_of(built, "train") + pairs_of(built, "validation")


def test_a_table_without_names_has_numbered_columns(tmp_path):
    content = "Hi.\t嗨。\tby a\nRun!\t跑！\tby b\nGo on.\t繼續。\tby c\n\n"
    built = build(
        tmp_path / "a.tsv", content, source_field="0", target_field="1", validation_fraction=0.3
    )
    assert pairs_of(built, "train") == [("Hi.", "嗨。"), ("Run!", "跑！")]
    assert pairs_of(built, "validation") == [("Go on.", "繼續。")]
    assert built.labels == ()


def test_a_table_with_names_and_quotes(tmp_path):
    content = 'text,category\r\n"a, ""b""\nc",two\r\nlast,one\r\n'
    built = build(tmp_path / "a.csv", content, source_field="text", label_field="category")
    assert everything(built) == [('a, "b"\nc', "two"), ("last", "one")]
    assert built.labels == ("one", "two")


def test_json_lines_with_two_fields(tmp_path):
    rows = [{"q": "x" * i, "a": str(i)} for i in (1, 2, 3)]
    text = "\n".join(map(json.dumps, rows))
    built = build(tmp_path / "a.jsonl", text, source_field="q", target_field="a")
    assert everything(built) == [(row["q"], row["a"]) for row in rows]


def test_many_pairs_are_split_by_their_source(tmp_path):
    """The same source never is on both sides; each pair is there once."""
    rows = [(f"source {i % 150}", f"target {i}") for i in range(400)]
    content = "".join(f"{a}\t{b}\n" for a, b in rows)
    built = build(
        tmp_path / "a.tsv", content, source_field="0", target_field="1", validation_fraction=0.2
    )
    train, validation = (pairs_of(built, split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(rows) and 40 < len(validation) < 120
    assert not {a for a, _ in train} & {a for a, _ in validation}


def test_pairs_with_an_empty_side_are_left_out_and_counted(tmp_path):
    built = build(tmp_path / "a.tsv", "a\tb\n\tc\nd\t\ne\tf\n", source_field="0", target_field="1")
    assert everything(built) == [("a", "b"), ("e", "f")]
    assert built.report["empty_documents"] == 2


def test_the_embedded_pairs():
    built = corpus.build(Config(source="python_pairs", tokenizer="byte"))
    pairs = everything(built)
    assert len(pairs) > 1000
    assert all(body and summary and "\n" not in summary for body, summary in pairs)
    assert len({body for body, _ in pairs}) == len(pairs)
    assert np.mean([len(summary) < len(body) for body, summary in pairs]) > 0.8


@pytest.mark.parametrize(
    ("name", "content", "fields", "words"),
    [
        ("a.tsv", "a\tb\nc\n", {"source_field": "0", "target_field": "1"}, "row 2 has 1 columns"),
        ("a.csv", "x,y\n1,2\n", {"source_field": "x", "target_field": "z"}, "no column 'z'"),
        (
            "a.csv",
            'x,y\n1,"2\n' + "a" * 200_000,
            {"source_field": "x", "target_field": "y"},
            "line 3: unexpected end",
        ),
        ("a.csv", "x,y\n1,2\n", {"source_field": "9" * 5000, "target_field": "0"}, "no column"),
        (
            "a.csv",
            "text,y\nHello, world,pos\n",
            {"source_field": "text", "label_field": "y"},
            "row 1 has 3 columns and the line of names 2",
        ),
        (
            "a.jsonl",
            '{"q": "x", "l": 1.5}',
            {"source_field": "q", "label_field": "l"},
            "data.label_field=l: .*:1 has no",
        ),
        (
            "a.jsonl",
            '{"q": "x"}',
            {"field": "b", "source_field": "q", "label_field": "l"},
            "data.field=b: of pairs",
        ),
        ("a.tsv", "a\tb\n", {"source_field": "0"}, "data.source_field=0"),
        ("a.tsv", "a\tb\n", {"target_field": "0"}, "give both"),
        (
            "a.tsv",
            "a\tb\n",
            {"source_field": "0", "target_field": "1", "label_field": "1"},
            "label_field=1",
        ),
        (
            "a.txt",
            "a",
            {"source_field": "0", "target_field": "1"},
            "only for JSON lines and tables",
        ),
        (
            "a.jsonl",
            '{"q": "x"}',
            {"source_field": "q", "target_field": "a"},
            "a.jsonl:1 has no text",
        ),
    ],
)
def test_a_mistake_is_named(tmp_path, name, content, fields, words):
    with pytest.raises(ConfigError, match=words):
        build(tmp_path / name, content, **fields)


def test_too_many_labels_are_no_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_MOST_LABELS", 3)
    content = "".join(f"text {i}\tlabel {i}\n" for i in range(5))
    with pytest.raises(ConfigError, match=r"is it data\.target_field"):
        build(tmp_path / "a.tsv", content, source_field="0", label_field="1")


def test_labels_may_be_whole_numbers_and_lines_may_end_with_empty_cells(tmp_path):
    rows = "".join(json.dumps({"t": "x" * i, "l": i % 2}) + "\n" for i in range(1, 5))
    assert build(tmp_path / "a.jsonl", rows, source_field="t", label_field="l").labels == ("0", "1")
    table = "t,l\na,b,,\nc,d\n"
    built = build(tmp_path / "a.csv", table, source_field="t", label_field="l")
    assert sorted(everything(built)) == [("a", "b"), ("c", "d")]
