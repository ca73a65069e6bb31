"""A corpus is prepared, looked into and measured by commands, as a user would type them."""

import argparse
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tokenizers import Tokenizer, models

from lm import config as config_lib
from lm import experiment, manifests, workdir
from lm.data import corpus
from tools import bench_data, bench_prepare, inspect_data, prepare_data


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    words = ["tree", "house", "river", "stone", "cloud"]
    lines = [" ".join(rng.choice(words, int(rng.integers(3, 90)))) for _ in range(150)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


PREPARE = ("--tokenizer", "byte", "--workers", "0", "--config.task.length=64")


def test_prepared_with_its_rows_and_shown(text, capsys):
    packing = "--config.task.packing=best_fit"
    assert prepare_data.main(["--source", "a.jsonl", *PREPARE, packing, "--out", "made"]) == 0
    said = capsys.readouterr().out
    assert "made: jsonl" in said and "--config.data.path=made" in said
    built = corpus.load(text.parent / "made")
    assert list(built.train.plans) == [("best_fit", 64)]
    assert built.train.plans["best_fit", 64].lengths.sum() == built.train.num_inputs
    assert inspect_data.main(["made", "--verify", "--out", "lengths.png", "--rows", "2"]) == 0
    said = capsys.readouterr().out
    for words in ("every file is as", "bytes a token", "tokens a document: least", "row 1:", "' '"):
        assert words in said, words
    assert np.asarray(Image.open("lengths.png")).std() > 5


@pytest.mark.parametrize("name", ["jsonl", "text", "huggingface"])
def test_a_name_of_a_source_is_no_path(text, capsys, name):
    """The file's suffix would have it read as JSON lines; of a folder each line of its files is a row."""
    if name == "huggingface":
        pytest.importorskip("datasets")
        (text.parent / "folder").mkdir()
        text = text.rename(text.parent / "folder" / "a.jsonl").parent
    flags = ["--source", name, f"--config.data.path={text}", *PREPARE, "--out", "made"]
    assert prepare_data.main(flags) == 0, capsys.readouterr().err
    report = corpus.load(text.parent / "made").report
    assert (report["source"], report["documents"]) == (name, 1 if name == "text" else 150)


# Of three documents, by hand: aab, é (of two bytes) and aaaaa.
BY_HAND = {
    "byte": (
        "train: 3 documents, 13 tokens, 10 bytes, 1.00 bytes a token; 4 of 256 ids used (1.6%)",
        "most frequent: 'a' 70.00%, 'b' 10.00%, '\ufffd' 10.00%, '\ufffd' 10.00%",
        "tokens a document: least 2, median 3, 90% up to 5, most 5",
        {2: 1, 3: 1, 5: 1},
    ),
    "char": (
        "train: 3 documents, 12 tokens, 10 bytes, 1.11 bytes a token; 3 of 3 ids used (100.0%)",
        "most frequent: 'a' 77.78%, 'b' 11.11%, 'é' 11.11%",
        "tokens a document: least 1, median 3, 90% up to 5, most 5",
        {1: 1, 3: 1, 5: 1},
    ),
}


@pytest.mark.parametrize("tokenizer", BY_HAND)
def test_what_is_shown_of_three_documents_is_what_a_hand_counts(text, capsys, tokenizer):
    text.write_text('{"text": "aab"}\n{"text": "é"}\n{"text": "aaaaa"}\n')
    flags = [f"--tokenizer={tokenizer}", "--config.data.validation_fraction=0", "--workers", "0"]
    assert prepare_data.main(["--source", "a.jsonl", *flags, "--out", "made"]) == 0
    capsys.readouterr()
    assert inspect_data.main(["made", "--shards", "--rows", "0"]) == 0
    said = capsys.readouterr().out
    counts, frequent, lengths, bins = BY_HAND[tokenizer]
    for line in (counts, frequent, lengths):
        assert f"\n{line}\n" in said
    rows = [line.split() for line in said.splitlines() if " to " in line and "document" not in line]
    assert {int(row[0]): int(row[3]) for row in rows} == dict.fromkeys(range(1, 6), 0) | bins
    assert all(
        row[0] == row[2] and (row[3:] == ["1", "#" * 40] or row[3:] == ["0"]) for row in rows
    )
    assert f"train-00000.tokens: 3 documents, {counts.split(', ')[1]}\n" in said


def test_what_a_step_saw_is_where_it_says(text, capsys):
    flags = [
        "--config.data.path=a.jsonl",
        "--config.data.tokenizer=byte",
        "--config.task.length=64",
    ]
    flags += ["--config.data.batch_size=8", "--config.task.packing=pad"]
    (text.parent / "e.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'model': {'name': 'ngram'}})\n"
    )
    assert inspect_data.main(["--config", "e.py", "--step", "4", *flags]) == 0
    said = capsys.readouterr().out
    assert said.count("a.jsonl record") == 8
    made = experiment.build(
        config_lib.override(config_lib.load("e.py"), [f[9:] for f in flags], experiment.SCHEMA)
    )
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    batch = made.batches[4]
    for row, line in enumerate([x for x in said.splitlines() if "record" in x]):
        record, rest = line.split("record ")[1].split(", ", 1)
        low, high = rest.split("tokens ")[1].split(" of ")[0].split(" to ")
        seen = bytes(t for t in batch["inputs"][row] if t < 256).decode().rstrip("\0")
        assert seen == lines[int(record)][int(low) : int(high)]


def test_a_run_is_shown_the_text_that_it_was_trained_on(text, capsys):
    given = ["data.path=a.jsonl", "data.tokenizer=byte", "task.length=64", "data.batch_size=8"]
    config = config_lib.override(ConfigDict({"data": {}, "task": {}}), given, experiment.SCHEMA)
    made = experiment.build(config)
    run = text.parent / "run"
    workdir.write_files(run, made, 0, {})
    assert inspect_data.main(["run"]) == inspect_data.main(["run", "--step", "1"]) == 0
    assert made.corpus.fingerprint in capsys.readouterr().out
    assert inspect_data.main(["run", "--step", "1", "--out", "x.png"]) == 2
    assert "--out=x.png: a step has no histogram" in capsys.readouterr().err
    manifests.write_sealed(run / "skipped.json", {"1": "its loss was a spike"})
    for step, left_out in (("0", False), ("1", True)):
        assert inspect_data.main(["run", "--step", step]) == 0
        assert ("left out: its loss was a spike" in capsys.readouterr().out) == left_out
    with text.open("a") as file:
        file.write('{"text": "another tree"}\n')
    for more in ([], ["--step", "1"]):
        assert inspect_data.main(["run", *more]) == 2
        assert "trained on other text" in capsys.readouterr().err


def test_what_cleaning_did_is_shown(text, capsys):
    clean = "--config.data.clean=whitespace;gopher_quality min_words=20 min_stop_words=0"
    with text.open("a") as file:
        file.write('{"text": "two words"}\nbroken\n')
    skip = "--config.data.on_broken=skip"
    assert prepare_data.main(["--source", "a.jsonl", *PREPARE, clean, skip, "--out", "made"]) == 0
    assert "dropped by cleaning" in capsys.readouterr().out
    assert inspect_data.main(["made"]) == 0
    said = capsys.readouterr().out
    assert "gopher_quality: of 151 documents changed 0 and dropped" in said
    assert "characters fewer" in said and "skipped: 1 " in said
    dropped = corpus.load(text.parent / "made").report["clean"]["gopher_quality"]
    assert sum(dropped["reasons"].values()) == dropped["dropped"] > 1


def test_a_mixture_is_prepared_corpus_by_corpus(text, capsys):
    (text.parent / "b.txt").write_text("another text of its own. " * 200)
    mixed = "--config.data.mixture=a.jsonl=3,b.txt=1"
    assert prepare_data.main([*PREPARE, mixed, "--out", "mix"]) == 0
    assert "--config.data.mixture=mix/a=3.0,mix/b=1.0" in capsys.readouterr().out
    assert corpus.load(text.parent / "mix/a").train.num_bytes
    assert corpus.load(text.parent / "mix/b").train.num_bytes


@pytest.mark.parametrize(
    ("tool", "argv", "words"),
    [
        (prepare_data, ["--source", "a.jsonl", "--out", "x", "--workers", "-1"], "--workers=-1"),
        (prepare_data, ["--source", "none.jsonl", "--out", "x"], "none.jsonl: no such file"),
        (
            prepare_data,
            ["--source", "mongodb", "--out", "x"],
            "data.source=mongodb: no files named",
        ),
        (
            prepare_data,
            ["--source", "a.jsonl", "--config.data.path=b.jsonl", "--out", "x"],
            "--source=a.jsonl: --config.data.path=b.jsonl names another",
        ),
        (
            prepare_data,
            ["--source", "python_docs", "--config.data.path=b.jsonl", "--out", "x"],
            "--source=python_docs: --config.data.path=b.jsonl names another",
        ),
        (prepare_data, ["--source", "a.jsonl", "--tokenizer", "bite", "--out", "x"], "bite"),
        (inspect_data, [], "a folder or --config"),
        (inspect_data, ["."], "neither a prepared corpus"),
        (inspect_data, ["x", "--rows", "-1"], "--rows=-1"),
        (bench_data, ["--length", "0"], "--length=0"),
        (bench_prepare, ["a.jsonl", "--tokenizer", "none.json"], "none.json"),
        (bench_prepare, ["a.jsonl", "--tokenizer", "x", "--rounds", "0"], "--rounds=0"),
        (bench_prepare, ["a.jsonl", "--tokenizer", "x", "--workers", "0"], "--workers=0"),
    ],
)
def test_a_mistake_is_one_line(text, capsys, tool, argv, words):
    assert tool.main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: ")


def test_batches_are_measured_beside_a_peer(text, capsys):
    flags = [
        "--tokens",
        "200000",
        "--length",
        "128",
        "--rows",
        "4",
        "--steps",
        "5",
        "--rounds",
        "2",
    ]
    assert bench_data.main(flags) == 0
    said = capsys.readouterr().out
    assert "ours over grain" in said and "times as fast as ArrayRecord" in said


def test_rows_are_those_that_the_model_of_a_run_reads(text, capsys):
    """A decoder that classifies reads text and label, an encoder [CLS] and the text."""
    labelled = text.parent / "labels.tsv"
    labelled.write_text("".join(f"{i % 2}\ttree {i}\n" for i in range(40)))
    flags = [f"--config.data.path={labelled}", "--config.data.source_field=1", "--config.data.label_field=0",
             "--config.data.tokenizer=byte", "--rows", "999"]  # fmt: skip
    for name, shown in (("gpt", False), ("bert", True)):
        (text.parent / "e.py").write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config():\n    return ConfigDict({{'model': {{'name': '{name}'}},"
            " 'task': {'name': 'classify'}})\n"
        )
        assert inspect_data.main(["--config", "e.py", *flags]) == 0
        said = capsys.readouterr().out
        assert "row 1:" in said and "row 40:" not in said
        assert (", 1 scored" in said) == shown


def test_both_sides_write_tokens_alone(text):
    """A column that is not encoded is nobody's work."""
    datasets = pytest.importorskip("datasets")
    text.write_text('{"text": "a tree", "note": "long"}\n' * 4)
    Tokenizer(models.WordLevel({"a": 0, "tree": 1}, unk_token="a")).save("tokenizer.json")
    args = argparse.Namespace(file=str(text), tokenizer="tokenizer.json", workers=None, out="out")
    assert bench_prepare._datasets(args) > 0
    assert datasets.load_from_disk("out/saved").column_names == ["ids"]
