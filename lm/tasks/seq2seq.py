"""Write a text given another one: translation, summaries, or how a text goes on.

"Sequence to Sequence Learning with Neural Networks", Sutskever et al. 2014 (arXiv 1409.3215). With data that
has pairs (`data.source_field` and `data.target_field`, or the source `python_pairs`) row r is pair r, both
texts cut to fit and closed by end of text. With plain text the stream is cut as for `causal_lm`: row r is
asked for `length` tokens, and its source is what comes before them, closed by end of text: how the stream
goes on, whatever documents it is of, so these are not kept apart.

A decoder-only family reads source and target in one row, and only the target is scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lm import augment
from lm.config import ConfigError
from lm.tasks import Setting, causal_lm, check_positive


@dataclass(frozen=True)
class Config(augment.SourceNoise):
    name: str = "seq2seq"  # the objective, a file of lm/tasks
    source_length: int = 128  # tokens of the source, its end of text included
    length: int = 128  # tokens of the target, its end of text included

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, source_length=2, length=2)

    @property
    def packed(self) -> bool:
        """Whether the documents of a row are kept apart: a row has but one."""
        return False


class Task:
    """Pairs of a split, or windows of its stream, by index."""

    KINDS: ClassVar = ("source", "causal")
    num_classes, text_bytes, whole_rows = 0, True, True
    gaps: ClassVar[tuple[int, ...]] = ()
    names: ClassVar[dict[int, str]] = {}

    def __init__(self, cfg: Config, setting: Setting):
        self.cfg, self.in_one_row = cfg, setting.kind == "causal"
        self.source_length = 0 if self.in_one_row else cfg.source_length
        if self.in_one_row:
            self.text_length = cfg.source_length - 1  # of a prompt, cut as in training
        self.row_length = cfg.length + (cfg.source_length if self.in_one_row else 0)
        self.max_scored = cfg.length
        self.vocab_size, self.start = setting.tokenizer.vocab_size, setting.target_start
        self._augment = None
        if cfg.noisy:
            self._augment = augment.Augmenter(cfg, setting.tokenizer, setting.seed)
        # Of a source, one place is for its end of text; one token before the target is no context.
        context = cfg.source_length if self.in_one_row else cfg.source_length - 2
        window = causal_lm.Config(length=cfg.length, context=context, isolate_documents=False)
        self._windows = causal_lm.Task(window, setting)

    def num_rows(self, split: Any) -> int:
        """Return how many rows score every pair, or every token of the stream, once."""
        if self.cfg.noisy and not split.paired:
            raise ConfigError(
                "task.drop_tokens and its like: noise is for the sources of pairs, and this data has none; "
                "leave it out, or name pairs by data.source_field and data.target_field"
            )
        return split.num_pairs if split.paired else self._windows.num_rows(split)

    def pieces(
        self, split: Any, indices: np.ndarray, *, epochs: np.ndarray | None = None
    ) -> list[list[tuple[int, int]]]:
        """Return (begin, length) of the parts of the stream in each row."""
        if not split.paired:
            return self._windows.pieces(split, indices)
        limits = self.cfg.source_length - 1, self.cfg.length - 1
        return pair_pieces(split, indices, limits, self._augment, epochs)

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
        if split.paired:
            none = (np.zeros(0, np.int32),) * 2
            pairs = [split.pair(i) if i < split.num_pairs else none for i in indices.tolist()]
            if self._augment and epochs is not None:
                places = zip(pairs, epochs.tolist(), indices.tolist(), strict=True)
                pairs = [(self._augment(a, epoch, row), b) for (a, b), epoch, row in places]
            sizes = {"source_length": self.cfg.source_length, "length": self.cfg.length}
            if self.in_one_row:
                return one_row_batch(pairs, end=split.end_of_text, **sizes)
            return pair_batch(pairs, start=self.start, end=split.end_of_text, **sizes)
        windows = self._windows.rows(split, indices)
        return windows if self.in_one_row else self._apart(windows, split.end_of_text)

    def _apart(self, windows: dict[str, np.ndarray], end: int) -> dict[str, np.ndarray]:
        """Return windows with the tokens before the scored ones as a source of their own."""
        rows: list[list[tuple[Any, Any, Any]]] = []
        for row in range(len(windows["inputs"])):
            scored = np.flatnonzero(windows["weights"][row])
            if not len(scored):
                rows.append([])
                continue
            first, stop = scored[0], scored[-1] + 1
            known, targets = windows["inputs"][row, : first + 1], windows["targets"][row]
            asked = targets[first:stop]
            rows.append([([*known, end], [self.start, *asked[:-1]], asked)])
        return batch_of(rows, source_length=self.cfg.source_length, length=self.cfg.length)


def pair_pieces(
    split: Any,
    indices: np.ndarray,
    limits: tuple[int, int],
    noise: augment.Augmenter | None = None,
    epochs: np.ndarray | None = None,
) -> list[list[tuple[int, int]]]:
    """Return (begin, length) in the stream of what is read of both texts of each pair, cut to `limits`.

    Deleted spans are in it: it reaches as far as the last token that is left.
    """
    found = []
    for place, index in enumerate(indices.tolist()):
        spans = []
        if index < split.num_pairs:
            spans = [split.span(2 * index + part) for part in range(2)]
            most = limits[0]
            if noise and epochs is not None:
                most = noise.reach(spans[0][1], most, int(epochs[place]), index)
            spans = [
                (begin, min(size, limit))
                for (begin, size), limit in zip(spans, (most, limits[1]), strict=True)
            ]
        found.append(spans if spans and spans[1][1] else [])
    return found


def pair_batch(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    source_length: int,
    length: int,
    start: int,
    end: int,
) -> dict[str, np.ndarray]:
    """Return a batch of the kind "source" of (source, target) tokens, cut to fit, each closed by `end`.

    The decoder reads `start` and the target, and is asked for the target and `end`. A pair without a
    target is an empty row.
    """
    rows = []
    for source, target in pairs:
        source, target = source[: source_length - 1], target[: length - 1]
        whole = ([*source, end], [start, *target], [*target, end])
        rows.append([whole] if len(target) else [])
    return batch_of(rows, source_length=source_length, length=length)


def one_row_batch(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, source_length: int, length: int, end: int
) -> dict[str, np.ndarray]:
    """Return a batch of the kind "causal": `end`, source, `end`, target; only the target is scored."""
    width = source_length + length
    batch = {
        name: np.zeros((len(pairs), width), np.int32)
        for name in ("inputs", "targets", "segments", "positions")
    }
    batch["weights"] = np.zeros((len(pairs), width), np.float32)
    for row, (source, target) in enumerate(pairs):
        if not len(target):
            continue
        source, target = source[: source_length - 1], target[: length - 1]
        tokens = np.array([end, *source, end, *target, end], np.int32)
        size = len(tokens) - 1
        batch["inputs"][row, :size], batch["targets"][row, :size] = tokens[:-1], tokens[1:]
        batch["segments"][row, :size] = 1
        batch["positions"][row, :size] = np.arange(size)
        batch["weights"][row, len(source) + 1 : size] = 1
    return batch


def batch_of(
    rows: Sequence[Sequence[tuple[Any, Any, Any]]], *, source_length: int, length: int
) -> dict[str, np.ndarray]:
    """Return a batch of rows of documents, each (source, inputs, targets), padded on the right."""
    widths = dict.fromkeys(("inputs", "targets", "segments", "positions"), length)
    widths |= {f"source{name}": source_length for name in ("", "_segments", "_positions")}
    batch = {name: np.zeros((len(rows), width), np.int32) for name, width in widths.items()}
    batch["weights"] = np.zeros((len(rows), length), np.float32)
    for row, documents in enumerate(rows):
        read = asked = 0
        for number, (source, inputs, targets) in enumerate(documents, 1):
            here = slice(read, read := read + len(source))
            batch["source"][row, here] = source
            batch["source_segments"][row, here] = number
            batch["source_positions"][row, here] = np.arange(len(source))
            here = slice(asked, asked := asked + len(inputs))
            batch["inputs"][row, here], batch["targets"][row, here] = inputs, targets
            batch["segments"][row, here] = number
            batch["positions"][row, here] = np.arange(len(inputs))
            batch["weights"][row, here] = 1
    return batch
