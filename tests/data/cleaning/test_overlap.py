"""Documents that hold text of an evaluation."""

import json
import pickle

import pytest

from lm.data import cleaning

TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
WORDS = TEXT.split()
HAN = "落霞与孤鹜齐飞秋水共长天一色渔舟唱晚"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "test.txt").write_text(f"{TEXT}\n{HAN}")
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": TEXT, "answer": HAN, "text": "short"})
    )
    return tmp_path


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("So: " + " ".join(WORDS[:13]) + ", he said.", True),
        ("So: " + " ".join(WORDS[:12]) + ", he said.", False),
        ("ONE, two -- three\nfour “five” six; seven eight nine ten eleven twelve! Thirteen", True),
        (TEXT.replace("seven", "seven and"), False),
        ("曰：" + HAN[:7] + "，" + HAN[7:13] + "。", True),
        (HAN[:12], False),
        ("", False),
    ],
)
def test_thirteen_words_in_a_row(files, text, dropped):
    cleaner = cleaning.open_cleaner(f"overlap path={files}/test.txt")
    assert (cleaner.clean(text).reason == "shared words") == dropped


def test_fields_of_records_and_shorter_ngrams(files):
    steps = {
        field: cleaning.open_cleaner(f"overlap ngram=5 path={files}/*.jsonl field={field}")
        for field in ("question", "answer", "question,answer", "text")
    }
    for field, cleaner in steps.items():
        assert bool(cleaner.clean(" ".join(WORDS[3:8])).reason) == ("question" in field)
        assert bool(cleaner.clean(HAN[3:8]).reason) == ("answer" in field)


def test_the_fingerprint_is_of_the_content_and_not_of_its_place(files):
    first = cleaning.open_cleaner(f"overlap path={files}/test.txt").fingerprint
    (files / "moved.txt").write_bytes((files / "test.txt").read_bytes())
    assert cleaning.open_cleaner(f"overlap path={files}/moved.txt").fingerprint == first
    (files / "moved.txt").write_text("other")
    assert cleaning.open_cleaner(f"overlap path={files}/moved.txt").fingerprint != first


def test_workers_receive_the_index_and_need_no_files(files):
    sent = pickle.dumps(cleaning.open_cleaner(f"overlap path='{files}/test.txt'"))
    (files / "test.txt").unlink()
    assert pickle.loads(sent).clean(TEXT).dropped_by == "overlap"
