"""Documents that were there before."""

import random

import pytest

from lm.data import cleaning
from lm.data.cleaning import duplicates

RANDOM = random.Random(0)
TEXT = [f"w{RANDOM.randrange(10**6)}" for _ in range(400)]


def kept(step, texts):
    cleaner = cleaning.open_cleaner(step)
    memory = cleaner.duplicates()
    return [not memory.admit(cleaner.clean(text)).dropped_by for text in texts]


def changed(share):
    """TEXT with every k-th word another, so that a share of its 5-grams is."""
    words = list(TEXT)
    for i in range(0, len(words), round(5 / share)):
        words[i] = f"x{i}"
    return " ".join(words)


def test_exact_duplicates_are_of_the_whole_text():
    texts = ["a b", "a  b", "a b", "A b", "a b "]
    assert kept("exact_duplicates", texts) == [True, True, False, True, True]
    assert kept("whitespace;exact_duplicates", texts) == [True, True, False, True, False]


def test_near_duplicates_share_most_n_grams():
    # A twentieth of the 5-grams differ: Jaccard 0.95 / 1.05 = 0.90; a fifth: 0.67; half: 0.33.
    texts = [" ".join(TEXT), changed(0.05), changed(0.2), changed(0.5)]
    assert kept("near_duplicates", texts) == [True, False, True, True]
    assert kept("near_duplicates threshold=0.5", texts) == [True, False, False, True]
    assert kept("near_duplicates permutations=64", texts)[:2] == [True, False]
    assert kept("near_duplicates", ["A b, c d e f.", "a B c d -- E f"]) == [True, False]


def test_texts_shorter_than_an_n_gram_are_compared_whole_and_those_without_words_never():
    texts = [
        "one two",
        "One, two!",
        "two one",
        "...",
        "...",
        "春眠不觉晓，处处闻啼鸟。",
        "春眠不觉晓处处闻啼鸟",
    ]
    assert kept("near_duplicates", texts) == [True, False, True, True, True, True, False]


def test_a_document_is_compared_with_those_that_stayed():
    cleaner = cleaning.open_cleaner("gopher_quality min_words=2; exact_duplicates; near_duplicates")
    memory = cleaner.duplicates()
    texts = [
        "to",
        "The cat and the dog have that.",
        "to",
        "The cat and the dog have that.",
        "the cat AND the dog have that",
    ]
    results = [memory.admit(cleaner.clean(text)) for text in texts]
    assert [result.dropped_by for result in results] == [
        "gopher_quality", "", "gopher_quality", "exact_duplicates", "near_duplicates",
    ]  # fmt: skip
    assert [len(result.sizes) for result in results] == [2, 4, 2, 3, 4]
    assert cleaner.duplicates().admit(cleaner.clean(texts[1])).text  # a new memory knows nothing


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95])
def test_bands_find_nine_of_ten_at_the_threshold(threshold):
    bands = duplicates._bands(threshold, 128)
    found = 1 - (1 - threshold ** (128 // bands)) ** bands
    assert 128 % bands == 0 and found >= 0.9
