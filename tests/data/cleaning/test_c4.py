"""The rules of C4, by hand."""

import pytest

from lm.data import cleaning

GOOD = "The cat sat on the mat."


def clean(text, step="c4 min_sentences=1"):
    return cleaning.open_cleaner(step).clean(text)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (GOOD, GOOD),
        ('  He said that it was "so"', 'He said that it was "so"'),
        ("The cat sat on the mat", ""),
        ("The cat sat on the...", ""),
        ("The cat sat down.", ""),  # four words
        ("The cat[1] sat[citation needed] on [edit] the mat.[12][]", "The cat sat on  the mat."),
        ("The cat [[1]] sat on it.", "The cat [[1]] sat on it."),
        ("Please enable JavaScript to see this page.", ""),
        ("By this you accept our Cookie Policy.", ""),
        (f"{'x' * 1001} sat on the mat.", ""),
        (f"{'x' * 1000} sat on the mat.", f"{'x' * 1000} sat on the mat."),
        ("今天我们去学校。", "今天我们去学校。"),
        ("他说：“今天去。”", "他说：“今天去。”"),
        ("今天我们去学校，", ""),
        ("去吧。", ""),
        ("漢" * 1500 + "。", "漢" * 1500 + "。"),
    ],
)
def test_lines(line, kept):
    assert clean(f"{GOOD}\n{line}\n").text == f"{GOOD}\n{kept}".strip()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{GOOD}\n{GOOD} {GOOD}", ""),
        (f"{GOOD}\n{GOOD}", "min_sentences"),
        (f"{GOOD} {GOOD} {GOOD}\nLorem ipsum dolor sit amet, that is.", "lorem ipsum"),
        (f"{GOOD} {GOOD} {GOOD}\nint main of it {{ return 0; }}.", "curly_brackets"),
        (f"{GOOD} {GOOD} {GOOD}\nint main() {{", ""),  # not in a line that stays
        ("今天我们去学校。明天去吗？不去！", ""),
    ],
)
def test_documents(text, reason):
    assert clean(text, "c4").reason == reason


def test_curly_brackets_may_stay():
    assert clean("Let x be in the set {1, 2}.", "c4 min_sentences=1 curly_brackets=true").text
