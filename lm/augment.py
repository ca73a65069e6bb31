"""Noise on the tokens that a model reads, in training alone; what it is asked for stays.

Blanked and replaced tokens: "Data Noising as Smoothing in Neural Network Language Models", Xie et al. 2017
(arXiv 1703.02573). Swapped and deleted ones: "EDA: Easy Data Augmentation Techniques", Wei and Zou 2019
(1901.11196).

What differs: a replacement is drawn evenly and not by how frequent it is; neighbours are swapped, not words
anywhere; what is deleted are spans. Each token's fate is drawn by itself, so a share is an expectation.
"""

import functools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lm.config import ConfigError

MEAN_SPAN = 3  # tokens of a deleted span, on average


@dataclass(frozen=True)
class Noise:
    drop_tokens: float = 0.0  # share of the tokens read that are blanked, in training
    replace_tokens: float = 0.0  # share of the tokens read that become any other, in training
    swap_tokens: float = 0.0  # share of the tokens read that swap with the next, in training

    def __post_init__(self):
        for field in self.noises():
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"task.{field}={getattr(self, field)}: use a share in [0, 1)")

    @classmethod
    def noises(cls) -> tuple[str, ...]:
        """The names of the noises that there are."""
        kinds = (base for base in cls.__mro__ if base in (Noise, SourceNoise))
        return tuple(field.name for field in fields(next(kinds)))

    @property
    def noisy(self) -> bool:
        """Whether there is any noise."""
        return any(getattr(self, name) for name in self.noises())


@dataclass(frozen=True)
class SourceNoise(Noise):
    delete_spans: float = 0.0  # share of the source's tokens that are cut out in spans, in training


class Augmenter:
    """Adds the noise of a task's config to tokens; end of text and special tokens stay."""

    def __init__(self, cfg: Noise, tokenizer: Any, seed: int):
        self._cfg, self._seed, self._end = cfg, seed, tokenizer.end_of_text
        self._blank = tokenizer.specials.get("mask", self._end)
        special = [self._end, *tokenizer.specials.values()]
        self._drawn = np.setdiff1d(np.arange(tokenizer.vocab_size), special)
        self._special = np.array(special)

    def __call__(
        self, tokens: np.ndarray, epoch: int, row: int, *, segments: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the noisy tokens of a row; a pure function of the arguments and the seed.

        Those of different `segments`, the documents of a row that are kept apart, never swap.
        """
        random = self._random(epoch, row)
        cfg, tokens = self._cfg, tokens[self._kept(len(tokens), random)]
        common = ~np.isin(tokens, self._special)
        if cfg.swap_tokens:
            chosen = (random.random(len(tokens)) < cfg.swap_tokens) & common
            chosen[:-1] &= common[1:]
            if segments is not None:
                chosen[:-1] &= segments[1:] == segments[:-1]
            for place in np.flatnonzero(chosen[:-1]):
                tokens[[place, place + 1]] = tokens[[place + 1, place]]
        if cfg.replace_tokens:
            chosen = (random.random(len(tokens)) < cfg.replace_tokens) & common
            tokens[chosen] = random.choice(self._drawn, int(chosen.sum()))
        if cfg.drop_tokens:
            chosen = (random.random(len(tokens)) < cfg.drop_tokens) & common
            tokens[chosen] = self._blank
        return tokens

    def reach(self, size: int, limit: int, epoch: int, row: int) -> int:
        """Return how far into the `size` tokens of a row the first `limit` that are left reach."""
        kept = np.flatnonzero(self._kept(size, self._random(epoch, row)))
        return int(kept[limit - 1]) + 1 if limit < len(kept) else size

    def _random(self, epoch: int, row: int) -> np.random.Generator:
        sequence = np.random.SeedSequence((self._seed, epoch, row, 1))
        return np.random.Generator(np.random.Philox(sequence))

    def _kept(self, size: int, random: np.random.Generator) -> np.ndarray:
        """Return which of `size` tokens are left when spans are deleted: never none."""
        rate = getattr(self._cfg, "delete_spans", 0.0)
        if not rate:
            return np.ones(size, bool)
        begins = random.random(size) < _begin_rate(rate)
        ends = np.where(begins, np.arange(size) + random.geometric(1 / MEAN_SPAN, size), 0)
        gone = np.maximum.accumulate(ends) > np.arange(size)
        return ~gone | gone.all()


@functools.cache
def _begin_rate(share: float) -> float:
    """Return how often spans, which may overlap, begin where a `share` of the tokens is to lie in one."""
    # How likely a span that begins k tokens before reaches so far.
    reach = (1 - 1 / MEAN_SPAN) ** np.arange(200)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        kept = np.prod(1 - middle * reach)
        low, high = (middle, high) if kept > 1 - share else (low, middle)
    return high
