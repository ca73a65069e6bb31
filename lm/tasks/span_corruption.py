"""Restore spans that were cut out of a text.

"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", Raffel et al. 2019
(arXiv 1910.10683), section 3.1.4: of n tokens round(corruption_rate * n) are cut, in spans of `mean_span`
tokens on average, uniformly among all ways to cut them so that the first token stays and the last goes. The
source has a sentinel where each span was, the target each sentinel and its span; both end with end of text,
as in T5's code (the paper's target ends with one more sentinel). n is the most that fits
`source_length`, and the target's length follows from it. As in T5, a row is one text, whatever documents it
is of.

With `isolate_documents` each document of a row is corrupted by itself, closed by end of text in source and
target, and reads nothing of its neighbours. The row's spans are shared out among its documents by length, at
random where they do not come out even, and those too short for one are not asked for anything; n is then
`source_length` - 1, so that they fit uncut.
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
from lm.tasks.seq2seq import batch_of, pair_batch


@dataclass(frozen=True)
class Config:
    name: str = "span_corruption"  # the objective, a file of lm/tasks
    source_length: int = 128  # tokens of the corrupted text, sentinels and end of text included
    corruption_rate: float = 0.15  # share of the tokens that is cut out
    mean_span: float = 3.0  # tokens of a span, on average
    dynamic: bool = True  # other spans each epoch; false = the same ones always
    packing: str = "split"  # split the stream, best_fit of whole documents, or pad: one a row
    isolate_documents: bool = False  # documents of a row do not see each other

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
        """Whether the documents of a row are kept apart."""
        return self.isolate_documents

    def _cut(self, tokens: int) -> tuple[int, int]:
        """Return how many of `tokens` are cut, and in how many spans."""
        cut = min(max(1, round(tokens * self.corruption_rate)), tokens - 1)
        return cut, max(1, round(cut / self.mean_span))

    @property
    def sizes(self) -> tuple[int, int]:
        """How many tokens of the text make a row, and the length of its target."""
        if (
            self.isolate_documents
        ):  # each span may be the only one of its document, which has an end
            cut, spans = self._cut(self.source_length - 1)
            return self.source_length - 1, cut + 2 * spans
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

    def pieces(
        self, split: Any, indices: np.ndarray, *, epochs: np.ndarray | None = None
    ) -> list[list[tuple[int, int]]]:
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
        places = zip(indices.tolist(), epochs.tolist(), strict=True)
        made = [
            (window(split, i, self.cfg.packing, self.stride), random_of(self.seed, epoch, i))
            for i, epoch in places
        ]
        sizes, end = (
            {"source_length": self.source_length, "length": self.row_length},
            split.end_of_text,
        )
        if self.cfg.isolate_documents:
            return batch_of([self._documents(*each, end) for each in made], **sizes)
        return pair_batch([self._row(*each) for each in made], start=self.start, end=end, **sizes)

    def _row(self, tokens: np.ndarray, random: np.random.Generator) -> tuple[Any, Any]:
        """Return (source, target) of a text, without end of text; too short a text has no target."""
        if len(tokens) < 2:
            return tokens, tokens[:0]
        cut, spans = self.cfg._cut(len(tokens))
        return self._corrupt(tokens, cut, min(spans, len(tokens) - cut), random)

    def _documents(
        self, tokens: np.ndarray, random: np.random.Generator, end: int
    ) -> list[tuple[Any, Any, Any]]:
        """Return (source, inputs, targets) of each document of a row."""
        documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)
        texts = [text[text != end] for text in documents if len(text)]
        sizes = np.array([len(text) for text in texts], np.int64)
        cut, spans = self.cfg._cut(max(len(tokens), 2))
        shares = np.cumsum(sizes) * spans / max(sizes.sum(), 1)
        spans_of = np.minimum(np.diff(np.floor(shares + random.random()), prepend=0), sizes // 2)
        cut_of = np.diff(np.floor(np.cumsum(spans_of) * cut / spans), prepend=0)
        cut_of = np.minimum(cut_of, sizes - spans_of)
        made: list[tuple[Any, Any, Any]] = []
        for text, tokens_out, number in zip(texts, cut_of, spans_of, strict=True):
            if not number:
                made.append(([*text, end], [], []))
                continue
            source, target = self._corrupt(text, int(tokens_out), int(number), random)
            made.append(([*source, end], [self.start, *target], [*target, end]))
        return made if spans_of.any() else []

    def _corrupt(
        self, tokens: np.ndarray, cut: int, spans: int, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what is left of a text and what was cut out, with sentinels."""
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
