"""Predict the next token: every token and every closing end of text of a stream, once each.

Packed as "split", row r scores the inputs r * length to (r + 1) * length - 1 of the stream, after up to
`context` tokens of weight 0 before them; the last row may be shorter. Otherwise a row holds the pieces of
documents that its plan says (`lm.data.packing`).
"""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lm import augment
from lm.config import ConfigError
from lm.tasks import Setting, check_packing, check_positive


@dataclass(frozen=True)
class Config(augment.Noise):
    name: str = "causal_lm"  # the objective, a file of lm/tasks
    length: int = 256  # tokens scored a row
    context: int = 0  # tokens of weight 0 before them, in training and evaluation
    packing: str = "split"  # split the stream, best_fit of whole documents, or pad: one a row
    isolate_documents: bool = True  # documents of a row do not see each other

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, length=1, context=0)
        check_packing(self.packing)
        if self.context and self.packing != "split":
            raise ConfigError(
                f"task.context={self.context}: a row of packing={self.packing!r} is no part of a stream; use "
                "task.context=0, or task.packing=split"
            )

    @property
    def packed(self) -> bool:
        """Whether the documents of a row are kept apart."""
        return self.isolate_documents


class Task:
    """Rows of a split's stream, by index."""

    KINDS: ClassVar = ("causal",)
    source_length, num_classes = 0, 0
    text_bytes, whole_rows = True, False
    gaps: ClassVar[tuple[int, ...]] = ()
    names: ClassVar[dict[int, str]] = {}

    def __init__(self, cfg: Config, setting: Setting):
        self.cfg = cfg
        self.row_length = cfg.context + cfg.length
        self.max_scored = cfg.length
        self.vocab_size = setting.tokenizer.vocab_size
        self._augment = None
        if cfg.noisy:
            self._augment = augment.Augmenter(cfg, setting.tokenizer, setting.seed)

    def num_rows(self, split: Any) -> int:
        """Return how many rows score every target of `split` once."""
        if self.cfg.packing != "split":
            return split.plan(self.cfg.packing, self.cfg.length).num_rows
        return -(-(len(split.tokens) - 1) // self.cfg.length)

    def rows(
        self,
        split: Any,
        indices: np.ndarray,
        *,
        epochs: np.ndarray | None = None,
        stream_starts: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Return rows `indices` [R] as a batch [R, row_length]; past the last one, empty rows.

        `stream_starts` [R], for recurrent training that goes on from row to row, are the places in
        the stream where each row's stream begins: positions then count since the document's begin
        or that place, whichever is later, and not since the row's begin.
        """
        indices = np.asarray(indices, np.int64)
        shape = (len(indices), self.row_length)
        inputs, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
        weights = np.zeros(shape, np.float32)
        places = np.arange(self.row_length, dtype=np.int32)
        before, context = self._before(split, indices, stream_starts)
        for row, pieces in enumerate(self.pieces(split, indices)):
            at = first = 0
            for number, (begin, length) in enumerate(self._documents(split, pieces), 1):
                tokens, here = split.tokens[begin : begin + length + 1], slice(at, at + length)
                inputs[row, here], targets[row, here] = tokens[:-1], tokens[1:]
                segments[row, here], positions[row, here] = number, places[:length]
                at, first = at + length, first or length
            if not self.cfg.isolate_documents:
                segments[row, :at], positions[row, :at], first = 1, places[:at], at
            positions[row, :first] += before[row]
            weights[row, context[row] : at] = 1
            if self._augment and epochs is not None:
                inputs[row, :at] = self._augment(
                    inputs[row, :at],
                    int(epochs[row]),
                    int(indices[row]),
                    segments=segments[row, :at],
                )
        return {
            "inputs": inputs,
            "targets": targets,
            "segments": segments,
            "positions": positions,
            "weights": weights,
        }

    def pieces(
        self, split: Any, indices: np.ndarray, *, epochs: np.ndarray | None = None
    ) -> list[list[tuple[int, int]]]:
        """Return (begin, length) of the parts of the stream in each row."""
        if self.cfg.packing != "split":
            plan = split.plan(self.cfg.packing, self.cfg.length)
            return [plan.pieces(i) if i < plan.num_rows else [] for i in indices.tolist()]
        num_inputs = len(split.tokens) - 1
        ends = np.minimum((indices + 1) * self.cfg.length, num_inputs)
        begins = np.maximum(indices * self.cfg.length - self.cfg.context, 0)
        there = indices * self.cfg.length < num_inputs
        spans = zip(begins.tolist(), (ends - begins).tolist(), there, strict=True)
        return [[(begin, size)] if is_there else [] for begin, size, is_there in spans]

    def _documents(self, split: Any, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the pieces of a row, cut where documents begin that are to be kept apart."""
        if self.cfg.packing != "split" or not self.cfg.isolate_documents or not pieces:
            return pieces
        ((begin, length),) = pieces
        inside = np.searchsorted(split.starts, (begin + 1, begin + length))
        edges = [begin, *split.starts[slice(*inside)].tolist(), begin + length]
        return [(low, high - low) for low, high in itertools.pairwise(edges)]

    def _before(
        self, split: Any, indices: np.ndarray, stream_starts: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return how far before a row its first document began, and how many of its tokens are context."""
        if self.cfg.packing != "split":
            return np.zeros_like(indices), np.zeros_like(indices)
        scored = indices * self.cfg.length
        begins = np.maximum(scored - self.cfg.context, 0)
        return begins - self._origins(split, begins, stream_starts), scored - begins

    def _origins(
        self, split: Any, begins: np.ndarray, stream_starts: np.ndarray | None
    ) -> np.ndarray:
        """Return where in the stream position 0 of each row's first token's document is."""
        if stream_starts is None:
            return begins
        if not self.cfg.isolate_documents:
            return np.asarray(stream_starts)
        documents = np.searchsorted(split.starts, begins, side="right") - 1
        return np.maximum(split.starts[documents], stream_starts)
