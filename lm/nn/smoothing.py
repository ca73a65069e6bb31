"""Smoothed probabilities of n-grams from their exact counts, in float64 by numpy on the host.

"An empirical study of smoothing techniques for language modeling", Chen and Goodman 1999 (modified
Kneser-Ney, in its interpolated form); "Improved backing-off for m-gram language modeling", Kneser and
Ney 1995; "Interpolated estimation of Markov source parameters from sparse data", Jelinek and Mercer
1980.

With c the counts, every smoothing here is of the form

    p(w | h) = share(h w) + backoff(h) p(w | h without its first token),

below which the shortest context falls back on the uniform distribution over the vocabulary: a token
never seen has a probability too, and they sum to one over the vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from lm.nn.ngram_tree import Level

Split = tuple[np.ndarray, np.ndarray]  # share [n] of a level's nodes, backoff [m] of their parents
FALLBACK = np.array([0.5, 1.0, 1.5])  # KenLM's, for text too small or too strange for the formula
_EM_STEPS = 50
_EM_PREDICTIONS = 1 << 20  # as many tell the few weights apart to more digits than matter


def modified_kneser_ney(levels: Sequence[Level]) -> list[Split]:
    """Return each level's split with three discounts: of the counts 1, 2, and 3 or more.

    With n_i the number of n-grams of the count i, Y = n_1 / (n_1 + 2 n_2) and D_i = i - (i + 1) Y n_{i+1}
    / n_i. A level where one of them is not in (0, i] takes `FALLBACK`.
    """
    return [_discounted(level, _modified(level.adjusted)) for level in levels]


def kneser_ney(levels: Sequence[Level], *, discount: float) -> list[Split]:
    """Return each level's split with one discount; 0 = n_1 / (n_1 + 2 n_2) of each level.

    A level where no n-gram has the count 1 takes 1/2.
    """

    def one(counts: np.ndarray) -> np.ndarray:
        n1, n2 = ((counts == i).sum() for i in (1, 2))
        return np.full(3, discount or (n1 / (n1 + 2 * n2) if n1 else FALLBACK[0]))

    return [_discounted(level, one(level.adjusted)) for level in levels]


def jelinek_mercer(levels: Sequence[Level], weights: Sequence[float]) -> list[Split]:
    """Return each level's split by its weight: that for the relative frequency, the rest to go on."""
    splits = []
    for level, weight in zip(levels, weights, strict=True):
        totals = level.totals(level.raw)
        share = weight * level.raw / np.maximum(totals, 1)[level.parent]
        splits.append((share, np.where(totals > 0, 1 - weight, 1.0)))
    return splits


def add_k(levels: Sequence[Level], *, k: float, vocab_size: int) -> list[Split]:
    """Return each level's split of (c(h w) + k) / (c(h) + k V); its backoff is to uniform at once."""
    splits = []
    for level in levels:
        totals = level.totals(level.raw) + k * vocab_size
        splits.append((level.raw / totals[level.parent], k * vocab_size / totals))
    return splits


def leave_one_out(levels: Sequence[Level], paths: np.ndarray, *, vocab_size: int) -> list[float]:
    """Return Jelinek-Mercer weights [order] by EM on the text's own predictions.

    Each is made from the counts of all the others, so that none is certain of itself. Jelinek and Mercer
    1980 held out a text for it, and let the weights depend on how often a context was seen; here there is
    one an order.
    """
    paths = paths[:, :: -(-paths.shape[1] // _EM_PREDICTIONS) or 1]
    frequency, seen = np.zeros(paths.shape), np.zeros(paths.shape, bool)
    for row, (level, nodes) in enumerate(zip(levels, paths, strict=True)):
        here = np.flatnonzero(nodes >= 0)
        totals = level.totals(level.raw)[level.parent[nodes[here]]]
        seen[row, here] = totals > 1
        frequency[row, here] = (level.raw[nodes[here]] - 1) / np.maximum(totals - 1, 1)
    weights = np.full(len(levels), 0.5)
    for _ in range(_EM_STEPS):
        mixed = [np.full(paths.shape[1], 1 / vocab_size)]
        for weight, share, has in zip(weights, frequency, seen, strict=True):
            mixed.append(np.where(has, weight * share + (1 - weight) * mixed[-1], mixed[-1]))
        arriving = np.ones(paths.shape[1])  # probability that the longer contexts were passed by
        for row in reversed(range(len(weights))):
            chosen = seen[row] * arriving * weights[row] * frequency[row] / mixed[row + 1]
            if reached := (seen[row] * arriving).sum():
                weights[row] = chosen.sum() / reached
            arriving = arriving - chosen
    return np.minimum(weights, 0.9999).tolist()  # what was never seen keeps a share


def _modified(counts: np.ndarray) -> np.ndarray:
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return FALLBACK
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    within = (discounts > 0) & (discounts <= [1, 2, 3])
    return discounts if within.all() else FALLBACK


def _discounted(level: Level, discounts: np.ndarray) -> Split:
    """Return (c - D(c)) / c(h), and for the backoff what was taken of c(h) in all."""
    counts = level.adjusted
    taken = np.where(counts > 0, discounts[np.clip(counts, 1, 3) - 1], 0.0)
    totals = level.totals(counts)
    share = (counts - taken) / np.maximum(totals, 1)[level.parent]
    return share, np.where(totals > 0, level.totals(taken) / np.maximum(totals, 1), 1.0)
