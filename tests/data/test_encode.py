"""Documents are cleaned whole: those that are cut for validation too, and of pairs the target as well."""

import dataclasses
import json

import pytest

from lm.data import corpus
from lm.data.settings import Config

MASKED = "mask kinds=email"


def documents(split, tokenizer):
    """Read a split's texts back from its stream."""
    return [
        tokenizer.decode(split.tokens[begin : begin + length])
        for begin, length in map(split.span, range(len(split.starts)))
    ]


def built(folder, cfg):
    corpus.prepare_in(folder, dataclasses.replace(cfg, tokenizer="byte"))
    made = corpus.load(folder)
    return [documents(split, made.tokenizer) for split in (made.train, made.validation)], made


def test_a_document_is_cut_for_validation_after_it_was_cleaned(tmp_path):
    page = tmp_path / "page.txt"
    lines = "".join(f"<p>Line {i} of the page.</p>" for i in range(100))
    page.write_text(f"<!DOCTYPE html><html><body>{lines}</body></html>")
    cfg = Config(path=(str(page),), clean=("html",))
    ((train,), (validation,)), made = built(tmp_path / "page", cfg)
    assert "<" not in train + validation
    assert (train + validation).split() == " ".join(
        f"Line {i} of the page." for i in range(100)
    ).split()
    assert 0.08 < len(validation) / len(train + validation) < 0.12
    assert made.report["clean"]["html"]["documents"] == 1


@pytest.mark.parametrize("fraction", [0.3, 0.45, 0.6])
def test_what_is_masked_across_the_cut_does_not_leak(tmp_path, fraction):
    file = tmp_path / "a.txt"
    file.write_text("Write to somebody.unknown@example.org today.")
    cfg = Config(path=(str(file),), clean=(MASKED,), validation_fraction=fraction)
    ((train,), (validation,)), _ = built(tmp_path / "made", cfg)
    assert train + validation == "Write to <EMAIL> today."


def test_what_a_step_leaves_of_a_document_may_be_in_one_split_alone(tmp_path):
    file = tmp_path / "a.jsonl"
    texts = ["a" * 100, "b" * 5 + "\0" * 95, "c" * 30]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cfg = Config(path=(str(file),), clean=("control",), validation_fraction=0.55)
    parts, _ = built(tmp_path / "made", cfg)
    assert parts == [["a" * 100], ["b" * 5, "c" * 30]]


EVALUATION = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def pairs(tmp_path, second, **fields):
    """120 pairs, of which one has a target of its own."""
    rows = [
        (f"this is the source with the number {i} me@example.org\0", f"target {i}")
        for i in range(119)
    ]
    rows.append(("the last source of all of them", second))
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"s": s, "t": t}) + "\n" for s, t in rows))
    (tmp_path / "test.txt").write_text(EVALUATION)
    cfg = Config(path=(str(file),), source_field="s", **fields)
    parts, made = built(tmp_path / "made", cfg)
    texts = [text for part in parts for text in part]
    return dict(zip(texts[::2], texts[1::2], strict=True)), made


def test_of_a_pair_what_writes_text_is_for_the_target_too(tmp_path):
    found, made = pairs(
        tmp_path,
        "Write to you@example.org\u0007 or sch\u00c3\u00b6n  \n",
        target_field="t",
        clean=("mojibake", "control", "whitespace", MASKED, "gopher_quality min_words=6"),
    )
    assert found["this is the source with the number 7 <EMAIL>"] == "target 7"
    assert found["the last source of all of them"] == "Write to <EMAIL> or sch\u00f6n\n"
    report = made.report["clean"]
    assert report["mask"]["changed"] == 120
    assert report["mojibake"]["changed"] == 1
    assert not any(step["dropped"] for step in report.values())


def test_a_pair_whose_target_is_of_an_evaluation_is_dropped(tmp_path):
    steps = (f"overlap path={tmp_path}/test.txt",)
    found, made = pairs(tmp_path, f"It is {EVALUATION}.", target_field="t", clean=steps)
    assert len(found) == 119 and "the last source of all of them" not in found
    assert made.report["clean"]["overlap"]["dropped"] == 1


def test_a_pair_whose_target_a_step_leaves_empty_is_dropped(tmp_path):
    found, made = pairs(tmp_path, "\0", target_field="t", clean=("control",))
    assert len(found) == 119
    assert made.report["clean"]["control"]["reasons"] == {"empty": 1}


def test_a_label_stays_as_it_is(tmp_path):
    steps = ("control", "whitespace", MASKED, f"overlap path={tmp_path}/test.txt")
    label = f"a@example.org {EVALUATION}\0 "
    found, made = pairs(tmp_path, label, label_field="t", clean=steps)
    assert found["the last source of all of them"] == label and label in made.labels
    assert found["this is the source with the number 7 <EMAIL>"] == "target 7"
