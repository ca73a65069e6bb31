import numpy as np
import pytest

from lm.nn import ngram_tree, smoothing


def level_of(counts):
    """Return a level of n-grams with these counts after one context."""
    counts, places = np.array(counts), np.arange(len(counts))
    return ngram_tree.Level(np.zeros_like(places), places, counts, counts, 1)


def test_modified_kneser_ney_by_hand():
    """n1..n4 = 6, 3, 2, 1: Y = 1/2, D1 = 1 - 3/6, D2 = 2 - 1.5 * 2/3, D3 = 3 - 2 * 1/2."""
    level = level_of([1] * 6 + [2] * 3 + [3] * 2 + [4])
    ((share, backoff),) = smoothing.modified_kneser_ney([level])
    np.testing.assert_allclose(share * 22, [0.5] * 6 + [1] * 3 + [1] * 2 + [2], rtol=1e-15)
    np.testing.assert_allclose(backoff, [(6 * 0.5 + 3 * 1 + 3 * 2) / 22], rtol=1e-15)


@pytest.mark.parametrize(
    ("counts", "discounts"),
    [
        ([5, 6, 7], None),  # none that occur once
        ([1, 1, 2], None),  # none that occur three times
        ([1, 2, 2, 3, 3, 3], [1 / 5, 1.1, 3]),  # D2 = 2 - 3 * 1/5 * 3/2, D3 = 3 - 0
        ([1, 2, 3, 3, 3], None),  # D2 = 2 - 3 * 1/3 * 3 = -1
        ([1, 1, 1, 2, 3, 4, 4, 4, 4, 4], None),  # D3 = 3 - 4 * 3/5 * 5 < 0
    ],
    ids=str,
)
def test_counts_that_give_no_discount_take_the_fallback(counts, discounts):
    ((share, backoff),) = smoothing.modified_kneser_ney([level_of(counts)])
    taken = np.array(discounts or [0.5, 1.0, 1.5])[np.minimum(counts, 3) - 1]
    np.testing.assert_allclose(share, (np.array(counts) - taken) / sum(counts), atol=1e-15)
    np.testing.assert_allclose(backoff, [taken.sum() / sum(counts)])


def test_kneser_ney_by_hand():
    """n1, n2 = 6, 3: D = 6 / 12; 0.75 where it is given; 1/2 where nothing occurs once."""
    level = level_of([1] * 6 + [2] * 3 + [4])
    for given, counts, discount in (
        (0.0, level.raw, 0.5),
        (0.75, level.raw, 0.75),
        (0.0, [2, 3], 0.5),
    ):
        level = level_of(counts)
        ((share, backoff),) = smoothing.kneser_ney([level], discount=given)
        np.testing.assert_allclose(share, (level.raw - discount) / level.raw.sum())
        np.testing.assert_allclose(backoff, [discount * len(level.raw) / level.raw.sum()])


def test_a_node_that_counts_nothing_has_no_share_and_its_childless_context_backs_off_whole():
    parent, token = np.array([0, 0, 1]), np.array([0, 1, 0])
    counts = np.array([2, 0, 0])
    level = ngram_tree.Level(parent, token, counts, counts, 3)
    for split in (
        smoothing.modified_kneser_ney([level]),
        smoothing.kneser_ney([level], discount=0.5),
        smoothing.jelinek_mercer([level], [0.5]),
        smoothing.add_k([level], k=0.5, vocab_size=4),
    ):
        share, backoff = split[0]
        assert share[0] > 0 and not share[1:].any() and (backoff[1:] == 1).all()
        np.testing.assert_allclose(share[0] + backoff[0], 1)


def likelihood(grams, weights, vocab_size):
    """Return the log-likelihood of every n-gram's token when it is itself not counted, one by one."""
    total = 0.0
    for left_out, gram in enumerate(grams):
        others = grams[:left_out] + grams[left_out + 1 :]
        p = 1 / vocab_size
        for n in range(1, len(gram) + 1):
            same = [other[-n:] for other in others if len(other) >= n]
            after = [other[-1] for other in same if other[:-1] == gram[-n:-1]]
            if after:
                weight = weights[n - 1]
                p = weight * after.count(gram[-1]) / len(after) + (1 - weight) * p
        total += np.log(p)
    return total


def test_weights_by_leaving_one_out_are_the_most_likely():
    rng = np.random.default_rng(0)
    tokens = [0]
    for _ in range(80):  # each token likes its successor
        tokens.append((tokens[-1] + 1) % 5 if rng.random() < 0.6 else int(rng.integers(5)))
    tokens[40] = 5  # a token that is new, when it is left out
    tokens = np.array(tokens)
    lengths = np.minimum(np.arange(80) + 2, 3)[None]
    levels, paths = ngram_tree.grow(
        tokens[None, :-1], tokens[None, 1:], lengths, order=3, vocab_size=6
    )
    weights = smoothing.leave_one_out(levels, paths, vocab_size=6)
    grams = [tuple(tokens[max(0, t - 1) : t + 2].tolist()) for t in range(80)]
    best = likelihood(grams, weights, 6)
    assert all(0 < weight < 1 for weight in weights)
    for row in range(3):
        for change in (-0.05, 0.05):
            moved = list(weights)
            moved[row] = min(max(moved[row] + change, 0.0), 0.9999)
            if moved != weights:
                assert likelihood(grams, moved, 6) < best


def test_weights_of_no_text_at_all():
    zeros = np.zeros((1, 3), np.uint8)
    levels, paths = ngram_tree.grow(zeros, zeros, zeros, order=2, vocab_size=5)
    assert smoothing.leave_one_out(levels, paths, vocab_size=5) == [0.5, 0.5]
