"""Characters and white space."""

import pytest

from lm.data import cleaning


def clean(step, text):
    return cleaning.open_cleaner(step).clean(text).text


def test_unicode_composes_and_leaves_full_width_alone():
    assert clean("unicode", "cafe\u0301 ﬁ，１２！ｱ") == "café ﬁ，１２！ｱ"
    assert clean("unicode form=NFKC", "ﬁ，１２！ｱ") == "fi,12!ア"
    assert clean("unicode form=NFD", "é") == "e\u0301"


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("schÃ¶n und schÃ¶ner", "schön und schöner"),
        ("The Mona Lisa doesnÃƒÂ¢Ã¢â€šÂ¬Ã¢â€žÂ¢t have eyebrows.", "The Mona Lisa doesn’t have eyebrows."),
        ("l’humanitÃ©", "l’humanité"),
        ("å®\x89å\x85¨", "安全"),
        ("“quotes”, ﬁ, &amp; and ＦＵＬＬ ｱ stay", "“quotes”, ﬁ, &amp; and ＦＵＬＬ ｱ stay"),
    ],
)  # fmt: skip
def test_mojibake_is_repaired_and_nothing_else(text, repaired):
    assert clean("mojibake", text) == repaired


def test_control_takes_out_what_is_invisible_and_keeps_joiners():
    assert (
        clean("control", "\ufeffa\0b\x1b[1m\tc\r\nd\re\x85f\u200bg\xadh\u202ei")
        == "ab[1m\tc\nd\ne\nfghi"
    )
    for text in ("👩\u200d👩\u200d👧", "می\u200cخواهم", "क्\u200dष", "❤\ufe0f"):
        assert clean("control", text) == text
    assert clean("control", "\r\0\n") == "\n"
    assert clean("control", "a\u2028b\u2029c\x1ed\x1fe") == "a\nb\nc\nde"


def test_whitespace_is_taken_from_ends_of_lines_and_documents():
    text = "\n \n  code:  \n\tx = 1\u3000\n\n \n\n\nend \t\n\n\n"
    assert clean("whitespace", text) == "  code:\n\tx = 1\n\nend\n"
    assert clean("whitespace blank_lines=0", text) == "  code:\n\tx = 1\nend\n"
    assert clean("whitespace blank_lines=2", "a\n\n\n\nb") == "a\n\n\nb"
    assert clean("whitespace", "　段落。") == "　段落。"  # the indent of a paragraph
