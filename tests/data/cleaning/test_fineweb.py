"""The rules of FineWeb, by hand."""

import pytest

from lm.data import cleaning

SENTENCES = [
    f"This is the line with the number {i} and it ends as a sentence does." for i in range(30)
]
MENU = [f"An entry of the menu that has the number {i} and no full stop" for i in range(100)]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (SENTENCES, ""),
        (["", "  "], "empty"),
        (SENTENCES[:12] + MENU[:88], ""),  # 12 of 100
        (SENTENCES[:11] + MENU[:89], "min_terminal_lines"),
        (SENTENCES[:4] + [f"Only {i}." for i in range(8)], ""),  # 8 of 12
        (SENTENCES[:4] + [f"Only {i}." for i in range(9)], "max_short_lines"),  # 9 of 13
        (SENTENCES[:9] + SENTENCES[:1], ""),  # 1 of 10, all of one length
        (SENTENCES[:8] + SENTENCES[:1], "max_duplicate_characters"),  # 1 of 9
        ([f"今天我们去第{i}个学校学习。" for i in range(9)], ""),  # 13 characters are 36 letters
        ([f"去第{i}校。" for i in range(9)], "max_short_lines"),
        (['She said "it is late."', "(And it was late, so they went home.)"], ""),
    ],
)
def test_rules(lines, reason):
    assert cleaning.open_cleaner("fineweb").clean("\n".join(lines)).reason == reason


def test_newlines_are_counted_by_the_word():
    cleaner = cleaning.open_cleaner("fineweb")
    words = "Donaudampfschifffahrtsgesellschaftskapitän sitzt."
    assert (
        cleaner.clean("\n".join(f"{i}{words}" for i in range(9))).reason == "max_newlines"
    )  # 8 of 18
