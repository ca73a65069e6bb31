"""Restore spans that were cut out of a text.

"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", Raffel et al. 2019
(arXiv 1910.10683), section 3.1.4: of n tokens round(corruption_rate * n) are cut, in spans of `mean_span`
tokens on average, uniformly among all ways to cut them so that the first token stays and the last goes. The
source has a sentinel where each span was, the target each sentinel and its span; both end with end of text,
as in T5's code (the paper's target ends with one more sentinel). n is the most that fits
`source_length`, and the target's length follows from it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lm.config import ConfigError
from lm.tasks import (
    Setting,
    check_packing,
    check_positive,
    check_share,
    num_windows,
    random_of,
    special_ids,
    window,
    window_pieces,
)
from lm.tasks.seq2seq import pair_batch


@dataclass(frozen=True)
class Config:
    name: str = "span_corruption"  # the objective, a file of lm/tasks
    source_length: int = 128  # tokens of the corrupted text, sentinels and end of text included
    corruption_rate: float = 0.15  # share of the tokens that is cut out
    mean_span: float = 3.0  # tokens of a span, on average
    dynamic: bool = True  # other spans each epoch; false = the same ones always
    packing: str = "split"  # split the stream, best_fit of whole documents, or pad: one a row

    def __post_init__(self):
        check_positive(self, source_length=8, mean_span=1)
        check_packing(self.packing)
        check_share(self, "corruption_rate")
        raw = self.sizes[0]
        if sum(self._cut(raw)) >= raw:
            raise ConfigError(
                f"task.corruption_rate={self.corruption_rate}: too few tokens are left between the "
                "spans; lower it, or raise task.mean_span"
            )

    @property
    def packed(self) -> bool:
        """Whether the documents of a row are kept apart: never."""
        return False

    def _cut(self, tokens: int) -> tuple[int, int]:
        """Return how many of `tokens` are cut, and in how many spans."""
        cut = min(max(1, round(tokens * self.corruption_rate)), tokens - 1)
        return cut, max(1, round(cut / self.mean_span))

    @property
    def sizes(self) -> tuple[int, int]:
        """How many tokens of the text make a row, and the length of its target."""
        raw = self.source_length
        while True:
            cut, spans = self._cut(raw + 1)
            if raw + 1 - cut + spans + 1 > self.source_length:
                break
            raw += 1
        while raw > 2:
            cut, spans = self._cut(raw)
            if raw - cut + spans + 1 <= self.source_length:
                break
            raw -= 1
        cut, spans = self._cut(raw)
        return raw, cut + spans + 1


class Task:
    """Rows of a split's stream, by index."""

    KINDS: ClassVar = ("source",)
    num_classes = 0
    text_bytes, whole_rows = False, False

    def __init__(self, cfg: Config, setting: Setting):
        self.cfg, self.seed = cfg, setting.seed
        self.source_length = cfg.source_length
        self.stride, self.row_length = cfg.sizes
        self.max_scored = self.row_length
        _, spans = cfg._cut(self.stride)
        names = [f"sentinel_{number}" for number in range(spans)]
        ids = special_ids(setting.tokenizer, names)
        self.sentinels = np.array([ids[name] for name in names], np.int32)
        self.gaps = tuple(self.sentinels.tolist())
        self.names = {mark: f" [{number}] " for number, mark in enumerate(self.gaps)}
        self.start = setting.target_start
        self.vocab_size = max(setting.tokenizer.vocab_size, 1 + int(self.sentinels.max()))

    def num_rows(self, split: Any) -> int:
        """Return how many rows hold every token of `split` once."""
        return num_windows(split, self.cfg.packing, self.stride)

    def pieces(self, split: Any, indices: np.ndarray) -> list[list[tuple[int, int]]]:
        """Return (begin, length) of the parts of the stream in each row."""
        return [window_pieces(split, i, self.cfg.packing, self.stride) for i in indices.tolist()]

    def rows(
        self,
        split: Any,
        indices: np.ndarray,
        *,
        epochs: np.ndarray | None = None,
        stream_starts: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Return rows `indices` [R] as a batch; past the last one, empty rows."""
        indices = np.asarray(indices, np.int64)
        if epochs is None or not self.cfg.dynamic:
            epochs = np.zeros(len(indices), np.int64)
        pairs = []
        for index, epoch in zip(indices.tolist(), epochs.tolist(), strict=True):
            tokens = window(split, index, self.cfg.packing, self.stride)
            pairs.append(self._corrupt(tokens, random_of(self.seed, epoch, index)))
        return pair_batch(
            pairs,
            source_length=self.source_length,
            length=self.row_length,
            start=self.start,
            end=split.end_of_text,
        )

    def _corrupt(
        self, tokens: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, target) of a text, without end of text; too short a text has no target."""
        if len(tokens) < 2:
            return tokens, tokens[:0]
        cut, spans = self.cfg._cut(len(tokens))
        spans = min(spans, len(tokens) - cut)
        lengths = [_parts(len(tokens) - cut, spans, random), _parts(cut, spans, random)]
        edges = np.cumsum(np.stack(lengths, axis=1).reshape(-1))[:-1]
        pieces = np.split(tokens, edges)
        marks = [mark[None] for mark in self.sentinels[:spans]]
        kept = [x for pair in zip(pieces[::2], marks, strict=True) for x in pair]
        gone = [x for pair in zip(marks, pieces[1::2], strict=True) for x in pair]
        return np.concatenate(kept), np.concatenate(gone)


def _parts(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Return `count` positive numbers of sum `total`, uniformly among all such."""
    borders = np.sort(random.permutation(total - 1)[: count - 1]) + 1
    return np.diff(borders, prepend=0, append=total)
