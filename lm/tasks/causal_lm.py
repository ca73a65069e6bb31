"""Predict the next token: every token and every closing end of text of a stream, once each.

Row r scores the inputs r * length to (r + 1) * length - 1 of the stream, after up to `context`
tokens of weight 0 before them. The last row may be shorter.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lm.tasks import Setting, check_positive


@dataclass(frozen=True)
class Config:
    name: str = "causal_lm"  # the objective, a file of lm/tasks
    length: int = 256  # tokens scored a row
    context: int = 0  # tokens of weight 0 before them, in training and evaluation
    isolate_documents: bool = True  # documents of a row do not see each other

    def __post_init__(self):
        check_positive(self, length=1, context=0)

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

    def num_rows(self, split: Any) -> int:
        """Return how many rows score every target of `split` once."""
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
        num_inputs = len(split.tokens) - 1
        scored = np.asarray(indices, np.int64) * self.cfg.length
        ends = np.minimum(scored + self.cfg.length, num_inputs)
        begins = np.maximum(scored - self.cfg.context, 0)
        sizes = np.where(scored < num_inputs, ends - begins, 0)
        window = np.zeros((len(scored), self.row_length + 1), split.tokens.dtype)
        for row, begin, size in zip(window, begins.tolist(), sizes.tolist(), strict=True):
            if size:
                row[: size + 1] = split.tokens[begin : begin + size + 1]
        places = np.arange(self.row_length, dtype=np.int32)
        borders = (window[:, :-1] == split.tokens[0]) & self.cfg.isolate_documents
        # The place of the latest border; before the first one, so far to the left of the row as the
        # document began.
        before = begins - self._origins(split, begins, stream_starts)
        latest = np.where(borders, places, -before[:, None].astype(np.int32))
        np.maximum.accumulate(latest, axis=1, out=latest)
        batch = {
            "inputs": window[:, :-1].astype(np.int32),
            "targets": window[:, 1:].astype(np.int32),
            "segments": np.cumsum(borders, axis=1, dtype=np.int32) + ~borders[:, :1],
            "positions": places - latest,
            "weights": (places >= (scored - begins)[:, None]).astype(np.float32),
        }
        for row in np.flatnonzero(sizes < self.row_length):
            for values in batch.values():
                values[row, sizes[row] :] = 0
        return batch

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
