"""Notices, menus and lines again and again."""

import pytest

from lm.data import cleaning


def clean(text, step="boilerplate"):
    return cleaning.open_cleaner(step).clean(text).text


@pytest.mark.parametrize(
    ("line", "stays"),
    [
        ("© 2024 Example Ltd. All rights reserved.", False),
        ("This site uses cookies. Accept all cookies?", False),
        ("Skip to content", False),
        ("  Home | About us | Contact ", False),
        ("首页 > 新闻 > 登录", False),
        ("版权所有 © 某公司", False),
        ("Home", True),
        ("Home is where the heart is | a novel", True),
        ("A | b", True),
        ("", True),
        ("The court found that the privacy policy, which had been in force since the year before, did not "
         "name "
         "the companies to which the data had been sold, and that no user could have agreed to that.", True),
    ],
)  # fmt: skip
def test_lines(line, stays):
    expected = f"One.\n{line}\nTwo.\n" if stays else "One.\nTwo.\n"
    assert clean(f"One.\n{line}\nTwo.\n") == expected


def test_repeats_of_a_line_beyond_three_are_taken_out_unless_it_is_short():
    text = "\n".join(f"ROMEO:\nLine {i}.\nRead the whole story here" for i in range(5))
    assert clean(text).count("ROMEO:") == 5
    assert clean(text).count("Read the whole story here") == 3
    assert clean(text, "boilerplate repeats=1").count("Read the whole story here") == 1
    assert clean(text, "boilerplate min_repeat_length=6").count("ROMEO:") == 3
    assert clean("x\n\n\n\n\n\ny") == "x\n\n\n\n\n\ny"
    assert clean("悠哉悠哉。\n" * 5) == "悠哉悠哉。\n" * 5
