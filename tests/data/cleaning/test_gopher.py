"""The rules of MassiveText, by hand: each at its bound and past it."""

import numpy as np
import pytest

from lm.data import cleaning
from lm.data.cleaning import gopher, segmentation

PROSE = "The cats and the dogs have to be with that elephant over there. " * 5  # 65 words


def fault(text, step="gopher_quality"):
    return cleaning.open_cleaner(step).clean(text).reason


@pytest.mark.parametrize(
    ("text", "step", "reason"),
    [
        (PROSE, "", ""),
        ("the of " * 25, "min_word_length=0", ""),
        ("the of " * 24 + "the", "min_word_length=0", "min_words"),  # 49
        (PROSE, "max_words=64", "max_words"),
        ("to be an " * 20, "", "min_word_length"),  # 2
        ("thorough considerations of the " * 20, "max_word_length=7.5", ""),  # (8 + 14 + 2 + 3) / 4 = 6.75
        ("thorough considerations of the " * 20, "max_word_length=6.7", "max_word_length"),
        (PROSE + "# " * 7, "", ""),  # 7 of 72
        (PROSE + "# " * 8, "", "max_symbols"),  # 8 of 73
        (PROSE + "and... " * 8, "", "max_symbols"),
        ("- " + PROSE.replace(". ", ".\n- ", 3) + "\nplain", "", ""),  # 4 of 5
        ("\n".join([f"• {PROSE}"] * 9 + [PROSE]), "", ""),
        ("\n".join([f"• {PROSE}"] * 10 + [PROSE]), "", "max_bullet_lines"),
        ("\n".join([PROSE + "…"] * 3 + [PROSE] * 7), "", ""),
        ("\n".join([PROSE + "…"] * 4 + [PROSE] * 6), "", "max_ellipsis_lines"),
        (PROSE + "1984 " * 16, "", ""),  # 65 of 81
        (PROSE + "1984 " * 17, "", "min_alphabetic"),
        (PROSE + "1984 " * 65, "min_alphabetic=0.5", ""),
        ("Der Hund und die Katze sind sehr alt. " * 10, "", "min_stop_words"),
        ("The ancient philosopher wrote seven books. " * 10, "", "min_stop_words"),  # one of them
        ("Der Hund und die Katze sind sehr alt. " * 10, "stop_words=der,die,und", ""),
        ("Der Hund und die Katze sind sehr alt. " * 10, "min_stop_words=0", ""),
        ("我们今天去学校学习语文和数学，老师很好。" * 4, "", ""),
        ("我们今天去学校学习语文和数学，老师很好。" * 2, "", "min_words"),  # 36
        ("그는 오늘 학교에 가서 수학을 공부했다. " * 10, "min_stop_words=0", ""),
    ],
)  # fmt: skip
def test_quality(text, step, reason):
    assert fault(text, f"gopher_quality {step}") == reason


def unlike(count, start=0):
    """Words of four letters, each another."""
    return [f"{'abcdefghij'[i % 10]}{i:03}" for i in range(start, start + count)]


def test_duplicate_n_grams_are_counted_once_where_they_overlap():
    words = segmentation.words("aa bb cc aa bb dd aa bb cc")  # 18 letters
    shares = gopher._ngram_shares(words, 4)
    # "aa bb" thrice is 12 letters, "aa bb cc" twice is 12; duplicate: "aa bb", "aa bb", "bb cc".
    assert np.allclose(shares[0], [0, 0, 12 / 18, 12 / 18, 0])
    assert np.allclose(shares[1], [0, 0, 10 / 18, 6 / 18, 0])
    repeated = gopher._ngram_shares(segmentation.words("a " * 10), 10)
    assert np.allclose(
        repeated[0, 2:], [1, 1, 1, 1, 1, 1, 1, 1, 0]
    )  # what stands once is no repeat
    assert np.allclose(repeated[1, 2:], [0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0])


def test_of_the_most_frequent_n_grams_the_longest_counts():
    words = segmentation.words("a b x a b y aaaa bbbb z aaaa bbbb")  # "aaaa bbbb" twice: 16 of 23
    assert gopher._ngram_shares(words, 2)[0, 2] == pytest.approx(16 / 23)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (unlike(100), ""),
        (unlike(95) + unlike(5), ""),  # 5 of 100
        (unlike(90) + unlike(10), ""),  # 10 of 100 are in duplicate 5- to 10-grams: at the bound
        (unlike(89) + unlike(11), "duplicate_ngrams 10"),
        (unlike(88) + unlike(6) + unlike(6, 20), ""),  # 12 of 100, in duplicate 5- and 6-grams
        (unlike(84) + unlike(8) + unlike(8, 20), "duplicate_ngrams 5"),
        (
            [w for i in range(10) for w in ("some", "word", *unlike(7, 7 * i))],
            "top_ngrams 2",
        ),  # 20 of 90
        (
            [w for i in range(8) for w in ("one", "more", "word", *unlike(12, 12 * i))],
            "top_ngrams 3",
        ),
    ],
)
def test_repetition_of_words(words, reason):
    assert fault(" ".join(words), "gopher_repetition") == reason


def test_repetition_of_lines_and_paragraphs():
    lines = [" ".join(unlike(6, 6 * i)) for i in range(10)]
    long = " ".join(unlike(40, 500))
    assert fault("\n".join(lines), "gopher_repetition") == ""
    short = ["a"] * 4
    assert fault("\n".join(lines[:7] + short), "gopher_repetition") == ""  # 3 of 11
    assert (
        fault("\n".join([*lines[:7], *short, "a"]), "gopher_repetition") == "duplicate_lines"
    )  # 4 of 12
    assert (
        fault("\n".join([*lines, long, long]), "gopher_repetition") == "duplicate_line_characters"
    )
    assert fault("\n\n".join(["x\ny", "x\nz", *lines]), "gopher_repetition") == ""
    paragraphs = ["p\nq"] * 5 + lines[:7]  # 4 of 12 paragraphs, 8 of 17 lines
    assert (
        fault("\n \n".join(paragraphs), "gopher_repetition duplicate_lines=1")
        == "duplicate_paragraphs"
    )
    assert (
        fault("\n\n\n\n" + "\n\n".join(lines), "gopher_repetition") == ""
    )  # blank lines are no lines
