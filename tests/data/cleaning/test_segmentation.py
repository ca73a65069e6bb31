"""Words of any script, by hand."""

import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.cleaning import segmentation


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("", []),
        (" \n\t ", []),
        ("The cat's  mat.", [3, 5, 4]),
        ("我们今天去。", [3] * 5),  # the full stop is no word
        ("说：“去”", [3, 1, 4]),  # an opening quote is one, a closing one belongs to its word
        ("GPT模型v2 好", [3, 3, 3, 2, 3]),
        ("カタカナ、ひらがな", [3] * 8),
        ("안녕 하세요.", [4, 7]),  # Korean has spaces; a syllable is two letters
        ("नमस्ते दुनिया", [6, 6]),  # vowel signs belong to their word
    ],
)
def test_words_and_their_lengths(text, letters):
    words = segmentation.words(text)
    assert words.letters.tolist() == letters
    assert len(words.hashes) == len(words.alphabetic) == len(words.unspaced) == len(letters)


def test_what_is_a_letter_and_what_has_no_spaces():
    words = segmentation.words("a1 22 -- 漢 かb 한국")
    assert words.alphabetic.tolist() == [True, False, False, True, True, True, True]
    assert words.unspaced.tolist() == [False, False, False, True, True, False, False]


def test_equal_words_have_equal_hashes_wherever_they_stand(monkeypatch):
    words = segmentation.words("cat dog cat. cat 漢 dog漢")
    a, b, c, d, e, f, g = words.hashes.tolist()
    assert a == d and b == f and e == g and len({a, b, c, e}) == 4
    text = "the cat 漢字 of the dog\n" * 30
    whole = segmentation.words(text)
    monkeypatch.setattr(segmentation, "_BLOCK", 50)
    segmentation.words.cache_clear()
    for one, other in zip(whole, segmentation.words(text), strict=True):
        assert np.array_equal(one, other)


def test_content_words_are_without_case_punctuation_and_width():
    one = segmentation.content_words("“The CAT’s” Straße, ＡＢＣ１２ café—ﬁn 漢，字")
    other = segmentation.content_words("the cat s STRASSE abc12 cafe\u0301 fin 漢字")
    assert np.array_equal(one.hashes, other.hashes) and len(one.hashes) == 9


@given(st.text(st.characters(), max_size=60))
def test_words_between_spaces_are_those_of_split(text):
    if segmentation.UNSPACED.search(text) or any("\u3000" <= c <= "\uffff" for c in text):
        return
    words = segmentation.words(text)
    assert len(words.hashes) == len(text.split())
    assert len(set(words.hashes.tolist())) == len(set(text.split()))


def test_ngrams_are_of_words_in_a_row():
    hashes = segmentation.words("a b c a b d").hashes
    pairs = segmentation.ngrams(hashes, 2).tolist()
    assert len(pairs) == 5 and pairs[0] == pairs[3] and len(set(pairs)) == 4
    assert segmentation.ngrams(hashes, 6).shape == (1,) and segmentation.ngrams(
        hashes, 7
    ).shape == (0,)
    assert np.array_equal(segmentation.words("d c").hashes[::-1], segmentation.words("c d").hashes)
    swapped = [segmentation.ngrams(segmentation.words(t).hashes, 2)[0] for t in ("c d", "d c")]
    assert swapped[0] != swapped[1]


def test_lines_and_sentences():
    assert segmentation.count_sentences("新しい手法を提案する．実験で示した．考察する．") == 3
    assert segmentation.count_words("don't stop me") == 3
    assert segmentation.count_words("他说GPT很好。") == 5
    assert segmentation.count_letters("ab漢字") == 8 and segmentation.count_letters("한국 é") == 6
    for line in ("End.", 'He said "yes."', "Really?! ", "去。", "「去。」", "（好！）", "यह है।"):
        assert segmentation.ends_sentence(line), line
    for line in ("No end", "comma,", "去，", "", '"'):
        assert not segmentation.ends_sentence(line), line
    assert segmentation.count_sentences('One. Two?! "Three." 3.5 and e.g. that... End.') == 6
    assert segmentation.count_sentences("去。好！！走？no") == 3
    start = time.perf_counter()
    assert segmentation.count_sentences("." * 200_000 + "x") == 0
    assert time.perf_counter() - start < 3  # quadratic is half a minute


@pytest.mark.parametrize("form", ["NFC", "NFKD"])
def test_long_runs_of_marks_are_divided_and_normalised_in_linear_time(form):
    for text in ("cafe\u0301 ﬁ ｱ", "e" + "\u0315\u0316" * 10):
        assert segmentation.normalized(text, form) == unicodedata.normalize(form, text)
    start = time.perf_counter()
    for mark in ("\u0315\u0316", "\u0344", "\U0001e94a\u0316"):
        found = segmentation.normalized("e" + mark * 20_000, form)
        assert segmentation.normalized(found, form) == found == unicodedata.normalize(form, found)
        assert all(len(run) <= 31 for run in found.split("\u034f"))
    assert time.perf_counter() - start < 3  # 2 s each as Python has it
