from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.nn import ngram_tree


def rows_of(rng, num_rows, length, order, vocab_size):
    """Return random (inputs, targets, lengths); targets are not always the next inputs."""
    inputs = rng.integers(0, vocab_size, (num_rows, length))
    targets = np.roll(inputs, -1, axis=1)
    other = rng.random(inputs.shape) < 0.2
    targets = np.where(other, rng.integers(0, vocab_size, inputs.shape), targets)
    most = np.minimum(np.arange(length) + 2, order)
    return inputs, targets, rng.integers(0, most + 1, inputs.shape)


def grams_of(inputs, targets, lengths):
    """Return every counted n-gram as a tuple, in order of row and place."""
    return [
        (*inputs[r, t - lengths[r, t] + 2 : t + 1].tolist(), int(targets[r, t]))
        for r, t in zip(*np.nonzero(lengths), strict=True)
    ]


def names_of(levels):
    """Return the tuple of tokens that each node of each level stands for."""
    names = [[()]]
    for level in levels:
        pairs = zip(level.parent.tolist(), level.token.tolist(), strict=True)
        names.append([(*names[-1][parent], token) for parent, token in pairs])
    return names[1:]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.sampled_from((2, 5, 50_000)),
    st.integers(1, 4),
    st.integers(1, 12),
)
def test_the_tree_holds_what_dictionaries_of_tuples_hold(seed, order, vocab_size, num_rows, length):
    rng = np.random.default_rng(seed)
    inputs, targets, lengths = rows_of(rng, num_rows, length, order, min(vocab_size, 7))
    if vocab_size > 7:  # far apart, so that keys are large
        inputs, targets = (x * (vocab_size // 7) for x in (inputs, targets))
    grams = grams_of(inputs, targets, lengths)
    levels, paths = ngram_tree.grow(inputs, targets, lengths, order=order, vocab_size=vocab_size)
    raw = Counter(gram[-n:] for gram in grams for n in range(1, len(gram) + 1))
    left = defaultdict(set)
    for gram in raw:
        left[gram[1:]].add(gram[0])
    begins = Counter(gram for gram in grams if len(gram) < order)
    names = names_of(levels)
    for n, (level, here) in enumerate(zip(levels, names, strict=True), 1):
        assert here == sorted(set(here)) and level.num_parents == len(
            names[n - 2] if n > 1 else [0]
        )
        wanted = {gram for gram in raw if len(gram) == n}
        # Nodes that count nothing are there only to begin longer n-grams.
        assert wanted <= set(here) and {name for name in here if name not in wanted} <= {
            gram[:n] for gram in raw if len(gram) > n
        }
        for name, number, adjusted in zip(here, level.raw, level.adjusted, strict=True):
            assert number == raw[name]
            assert adjusted == (number if n == order else len(left[name]) + begins[name])
    assert paths.shape == (order, len(grams))
    for gram, path in zip(grams, paths.T, strict=True):
        for n, node in enumerate(path, 1):
            assert node == -1 if n > len(gram) else names[n - 1][node] == gram[-n:]


def test_nothing_counted_is_an_empty_tree():
    zeros = np.zeros((2, 3), np.uint8)
    levels, paths = ngram_tree.grow(zeros, zeros, zeros, order=3, vocab_size=5)
    assert [len(level.token) for level in levels] == [0, 0, 0] and paths.shape == (3, 0)


@pytest.mark.parametrize("size", [20, 10**18])
def test_ranks_by_table_and_by_sorting_are_the_same(size):
    keys = np.random.default_rng(0).integers(0, 20, 100) * (size // 20)
    distinct, ranks = ngram_tree.rank(keys, size)
    np.testing.assert_array_equal(distinct, sorted(set(keys.tolist())))
    np.testing.assert_array_equal(distinct[ranks], keys)
