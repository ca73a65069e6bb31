"""Steps in an order: what is refused, what is counted, and what holds for every step and any text."""

import pickle
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.config import ConfigError
from lm.data import cleaning

EVERY_STEP = [
    *(name for name in cleaning.STEPS if name not in ("language", "overlap")),
    "language keep=en",
    "overlap path={}",
]
CHANGES = ["mojibake", "unicode", "control", "whitespace", "boilerplate", "c4", "mask"]

PIECES = [
    "The cat and the dog have to be with that.", "line of words that ends here.", "\n", "\n\n",
    " ", "\t", "\r\n", "\r", "\0", "\ufeff", "\u200b", "\ud800", "\ud83d", "\ude00", "e\u0301",
    "\u0344" * 9, "\u0315\u0316" * 9, "schÃ¶n", "â€œ", "Ã", "\x9d", "\xa0", "我们今天去。",
    "「はい」", "，", "안녕하세요", "[1]", "[", "]", "[edit", "citation needed]", "lorem ipsum",
    "javascript", "{", "privacy policy", "Home | About", "<p>", "</p>", "<html>", "<script>",
    "&lt;p&gt;", "<!--", "-->", "joe@example.com", "@", ".com", "+49 30 1234567",
    "4111 1111 1111 1111", "4111111111111111", "8.8.8.80", "2001:db8::1", "2606:4700::1111",
    "<EMAIL>", "<IP>", "-", ".", "...", "#",
]  # fmt: skip
any_text = st.lists(st.sampled_from(PIECES) | st.text(st.characters(), max_size=8), max_size=24)
TEXTS = any_text.map("".join)
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Return a function from a step to its cleaner, opened once."""
    evaluation = tmp_path_factory.mktemp("evaluation") / "test.txt"
    evaluation.write_text("one two three four five six seven eight nine ten eleven twelve thirteen")
    return {step: cleaning.open_cleaner(step.format(evaluation)) for step in EVERY_STEP}


@pytest.mark.parametrize("step", EVERY_STEP)
@QUICK
@given(text=TEXTS)
def test_any_text_is_taken_and_what_comes_out_is_text(opened, step, text):
    cleaned = opened[step].clean(text)
    cleaned.text.encode()  # raises on a lone surrogate
    assert bool(cleaned.dropped_by) == bool(cleaned.reason)
    assert not (cleaned.dropped_by and cleaned.text)


@pytest.mark.parametrize("step", CHANGES)
@QUICK
@given(text=TEXTS)
def test_what_is_clean_stays_as_it_is(opened, step, text):
    once = opened[step].clean(text).text
    assert opened[step].clean(once).text == once


def marks(n):
    return "a" + "\u0315\u0316" * (n // 2)


# What some rule, parser or regular expression may take quadratic time for; `n` characters each.
HOSTILE = {
    "one word": lambda n: "a" * n,
    "blanks": lambda n: "x" + " " * n + "x",
    "newlines": lambda n: "x" + "\n" * n + "x",
    "NULs": lambda n: "\0" * n,
    "lone surrogates": lambda n: "\ud800" * n,
    "combining marks": marks,
    "marks that become two": lambda n: "a" + "\u0344" * n,
    "a long line of Han": lambda n: "漢字一二三四五" * (n // 7),
    "digits": lambda n: "4" * n,
    "digits apart": lambda n: "41 " * (n // 3),
    "full stops": lambda n: "." * n + "x",
    "numbers and stops": lambda n: "1." * (n // 2),
    "no domain": lambda n: "a" * n + "@" + "b." * n,
    "colons": lambda n: "2a00:" * (n // 5),
    "brackets": lambda n: "[" * n + "]" * n,
    "open comments": lambda n: "<!--" * (n // 4) + "<html>",
    "deep": lambda n: "<html>" + "<div>" * (n // 5),
    "deep again and again": lambda n: "<html>" + ("<b>" * 400 + "</b>" * 400) * (n // 2800),
    "left open": lambda n: "<html>" + ("<a><b><i><u>" * 8 + "</a>" * 8) * (n // 128),
    "lists in lists": lambda n: "<html>" + "<ul><li>x" * (n // 9),
    "mojibake of mojibake": lambda n: "ÃƒÂ" * (n // 4),
    "one line again and again": lambda n: "The same line is here.\n" * (n // 23),
    "one word again and again": lambda n: "w " * (n // 2),
    "ligatures": lambda n: "\ufdfa" * (n // 8),
}


@pytest.mark.parametrize("step", EVERY_STEP)
def test_no_text_takes_more_than_linear_time(opened, step):
    opened[step].clean("What is made once, such as a table.")
    for name, make in HOSTILE.items():
        text, start = make(60_000), time.process_time()
        opened[step].clean(text)
        took = time.process_time() - start
        assert took < 3, (
            f"{name}: {took:.1f} s"
        )  # linear is 0.3 s at most; quadratic is 10 s or more


@pytest.mark.slow
@pytest.mark.parametrize("step", EVERY_STEP)
def test_a_document_of_50_megabytes_and_a_line_of_10(opened, step):
    prose = "The cat and the dog have to be with that, and so on. 我们今天去。\n"
    for text in (prose * (50_000_000 // len(prose.encode())), "x漢" * 2_500_000 + "x" * 5_000_000):
        start = time.perf_counter()
        opened[step].clean(text)
        assert time.perf_counter() - start < 120


def test_steps_run_in_their_order_and_are_counted():
    cleaner = cleaning.open_cleaner(
        ("whitespace", "c4 min_sentences=1", "gopher_quality min_words=6", "exact_duplicates")
    )
    assert cleaner.names == ("whitespace", "c4", "gopher_quality", "exact_duplicates")
    texts = [
        "The cat sat with that dog.  \nNo mark",  # changed twice
        "The cat sat with that dog.",  # then the same
        "The cat sat with that.",  # five words
        "",
        "No sentence",
    ]
    report, duplicates = cleaner.report(), cleaner.duplicates()
    results = [duplicates.admit(cleaner.clean(text)) for text in texts]
    for result in results:
        report.add(result)
    assert results[0].text == "The cat sat with that dog."
    assert results[0].changed == ("whitespace", "c4")
    assert results[0].sizes == (36, 34, 26, 26, 26)
    assert [(r.dropped_by, r.reason) for r in results[1:]] == [
        ("exact_duplicates", "seen before"),
        ("gopher_quality", "min_words"),
        ("", ""),
        ("c4", "min_sentences"),
    ]
    assert report.counts["c4"] == {
        "documents": 4,
        "changed": 1,
        "dropped": 1,
        "characters_before": 34 + 26 + 22 + 11,
        "characters_after": 26 + 26 + 22,
        "reasons": {"min_sentences": 1},
    }
    assert report.counts["exact_duplicates"]["characters_after"] == 26


def test_what_a_step_leaves_empty_is_dropped_and_what_was_empty_is_not():
    cleaner = cleaning.open_cleaner("control; gopher_quality")
    assert cleaner.clean("\0\0")[:3] == ("", "control", "empty")
    assert cleaner.clean("")[:3] == ("", "", "")


def test_a_cleaner_and_its_results_go_to_other_processes(opened):
    for cleaner in opened.values():
        copy = pickle.loads(pickle.dumps(cleaner))
        assert (copy.names, copy.fingerprint) == (cleaner.names, cleaner.fingerprint)
        one, other = (
            pickle.loads(pickle.dumps(c.clean("The cat and the dog.\n"))) for c in (cleaner, copy)
        )
        assert one[:5] == other[:5]
        duplicates = cleaner.duplicates()
        assert duplicates.admit(one)[:4] == one[:4]
        assert (duplicates.admit(other)[:4] != other[:4]) == bool(one.signatures)


def test_the_fingerprint_holds_all_that_the_result_depends_on(monkeypatch):
    def fingerprint(*steps):
        return cleaning.open_cleaner(steps).fingerprint

    assert fingerprint("unicode") == fingerprint("unicode form=NFC")
    assert (
        len(
            {
                fingerprint(*s)
                for s in [(), ("unicode",), ("unicode", "control"), ("control", "unicode")]
            }
        )
        == 4
    )
    assert fingerprint("unicode") != fingerprint("unicode form=NFKC")
    before = fingerprint("mojibake"), fingerprint("unicode")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    assert fingerprint("mojibake") != before[0] and fingerprint("unicode") == before[1]


def test_a_setting_is_one_string_a_tuple_or_a_list_split_at_commas():
    expected = ("unicode", "language keep=en,de", "mask kinds=email,ip", "c4")
    for setting in (
        "unicode; language keep=en,de;mask kinds=email,ip ; c4;",
        expected,
        ["unicode;language keep=en", "de;mask kinds=email", "ip", "c4"],
        ["unicode", "language keep=en", "de", "mask kinds=email", "ip;c4"],
    ):
        assert cleaning.split_steps(setting) == expected
    split = ["language keep=en", "de min_probability=0.5;mask kinds=email", "ip", "unicod form=NFC"]
    assert cleaning.split_steps(split) == (
        "language keep=en,de min_probability=0.5",
        "mask kinds=email,ip",
        "unicod form=NFC",  # misspelt, and refused as such
    )
    assert cleaning.split_steps("") == cleaning.split_steps(()) == ()
    assert cleaning.open_cleaner(()).clean("text\0").text == "text\0"


def test_a_step_may_come_twice():
    cleaner = cleaning.open_cleaner("unicode; html; unicode form=NFKC")
    assert cleaner.names == ("unicode", "html", "unicode#2")
    assert cleaner.clean("e\u0301ﬁ").changed == ("unicode", "unicode#2")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("unicod", r"data\.clean='unicod': unicod: no such step; did you mean unicode\?"),
        ("zzz", r"zzz: no such step; use one of html, "),
        ("unicode from=NFC", r"from: no such argument of unicode; did you mean form\?"),
        ("control all=1", r"all: no such argument of control; it has none; leave it out"),
        ("unicode NFC", r"data\.clean='unicode NFC': NFC: no value; write argument=value"),
        ("unicode form='NFC", r"No closing quotation; close the quotes"),
        ("unicode form=nfc", r"form=nfc: no such normal form; use one of NFC, "),
        ("gopher_quality min_words=few", r"min_words='few': expected int; for example min_words=100"),
        ("gopher_quality min_words=-1", r"min_words=-1: too small; use 0 or more"),
        ("fineweb max_short_lines=2", r"max_short_lines=2\.0: use a share from 0 to 1"),
        ("language", r"keep: no language; name those to keep, as in keep=en,de"),
        ("language keep=english", r"keep=english: no such language; use codes of ISO 639, of ace, "),
        ("mask kinds=name", r"kinds=name: no such kind; use some of email,ip,card,phone"),
        ("overlap", r"path: no file; name the evaluation's"),
        ("overlap path=/none.txt", r"data\.clean='overlap path=/none.txt': path=/none.txt: no such file"),
        ("near_duplicates permutations=100", r"permutations=100: use a power of two"),
        ("exact_duplicates;unicode", r"'unicode': stands after exact_duplicates, which compares"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_fix(steps, message):
    with pytest.raises(ConfigError, match=message) as error:
        cleaning.open_cleaner(steps)
    assert "\n" not in str(error.value) and str(error.value).startswith("data.clean=")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for step, package in (("html", "resiliparse"), ("language keep=en", "py3langid")):
        with pytest.raises(ConfigError, match=rf"{package}; pip install -e '.\[data\]'"):
            cleaning.open_cleaner(step)


def test_every_argument_has_its_help():
    from lm import config

    for name, step in cleaning.STEPS.items():
        assert step.__doc__, name
        for field in config.describe(step):
            assert field.comment, f"{name} {field.name}"
