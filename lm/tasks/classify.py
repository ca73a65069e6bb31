"""Say which label a text has.

An encoder classifies [CLS] text [SEP] at its first position, as BERT does (Devlin et al. 2018, arXiv
1810.04805). A decoder, or an encoder-decoder, writes the label's text after the text, as T5 does (Raffel et
al. 2019, 1910.10683), and a row is right when all of the label is. The data names its label by
`data.label_field`.
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lm import augment
from lm.config import ConfigError
from lm.tasks import Setting, check_positive, seq2seq, special_ids


@dataclass(frozen=True)
class Config(augment.SourceNoise):
    name: str = "classify"  # the objective, a file of lm/tasks
    length: int = 128  # tokens of the text, [CLS] and [SEP] or end of text included
    label_length: int = 16  # tokens of a label's text, for families that write it

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, length=3, label_length=2)

    @property
    def packed(self) -> bool:
        """Whether the documents of a row are kept apart: a row has but one."""
        return False


class Task:
    """Labelled texts of a split, by index."""

    KINDS: ClassVar = ("masked", "source", "causal")
    text_bytes, whole_rows = False, True
    gaps: ClassVar[tuple[int, ...]] = ()
    names: ClassVar[dict[int, str]] = {}

    def __init__(self, cfg: Config, setting: Setting):
        self.cfg, self.tokenizer = cfg, setting.tokenizer
        if not setting.labels:
            raise ConfigError(
                "task.name='classify': the data has no labels; name their field in data.label_field"
            )
        self.labels, self.at_first = setting.labels, setting.kind == "masked"
        self.text_length = cfg.length - (
            2 if self.at_first else 1
        )  # tokens of a text that are read
        # By its tokens: some tokenizers read two texts alike, and give back neither.
        self._numbers = {tuple(self.tokenizer.encode(x)): i for i, x in enumerate(self.labels)}
        self._check_labels()
        if not self.at_first:
            noise = {name: getattr(cfg, name) for name in cfg.noises()}
            texts = seq2seq.Config(source_length=cfg.length, length=cfg.label_length, **noise)
            written = self._written = seq2seq.Task(texts, setting)
            self.row_length, self.source_length = written.row_length, written.source_length
            self.max_scored, self.num_classes = written.max_scored, 0
            self.vocab_size, self.start = written.vocab_size, written.start
            return
        self.row_length, self.source_length, self.max_scored = cfg.length, 0, 1
        self.num_classes = len(self.labels)
        self._augment = None
        if cfg.noisy:
            self._augment = augment.Augmenter(cfg, setting.tokenizer, setting.seed)
        # As for masked_lm, whose parameters such a model starts from.
        ids = special_ids(self.tokenizer, ("cls", "sep", "mask"))
        self.cls, self.sep = ids["cls"], ids["sep"]
        self.vocab_size = max(self.tokenizer.vocab_size, 1 + max(ids.values()))

    def _check_labels(self) -> None:
        for label in self.labels:
            needed = len(self.tokenizer.encode(label)) + 1
            if needed > self.cfg.label_length and not self.at_first:
                raise ConfigError(
                    f"task.label_length={self.cfg.label_length}: the label {label!r} takes {needed} tokens; "
                    f"use {needed} or more"
                )
        if len(self._numbers) < len(self.labels):
            kept = {self.labels[number] for number in self._numbers.values()}
            lost = next(label for label in self.labels if label not in kept)
            raise ConfigError(
                f"data.tokenizer: it reads the label {lost!r} as another one; choose one that tells "
                "all labels apart"
            )

    def num_rows(self, split: Any) -> int:
        """Return how many labelled texts `split` has."""
        return split.num_pairs

    def pieces(
        self, split: Any, indices: np.ndarray, *, epochs: np.ndarray | None = None
    ) -> list[list[tuple[int, int]]]:
        """Return (begin, length) of the parts of the stream in each row."""
        if not self.at_first:
            return self._written.pieces(split, indices, epochs=epochs)
        return seq2seq.pair_pieces(
            split, indices, (self.row_length - 2, sys.maxsize), self._augment, epochs
        )

    def rows(
        self,
        split: Any,
        indices: np.ndarray,
        *,
        epochs: np.ndarray | None = None,
        stream_starts: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Return rows `indices` [R] as a batch; past the last one, empty rows."""
        if not self.at_first:
            return self._written.rows(split, indices, epochs=epochs)
        shape = (len(indices), self.row_length)
        batch = {
            name: np.zeros(shape, np.int32)
            for name in ("inputs", "targets", "segments", "positions")
        }
        batch["weights"] = np.zeros(shape, np.float32)
        for row, index in enumerate(np.asarray(indices).tolist()):
            if index >= split.num_pairs:
                continue
            text, label = split.pair(index)
            if self._augment and epochs is not None:
                text = self._augment(text, int(epochs[row]), index)
            tokens = [self.cls, *text[: self.text_length], self.sep]
            batch["inputs"][row, : len(tokens)] = tokens
            batch["segments"][row, : len(tokens)] = 1
            batch["positions"][row, : len(tokens)] = np.arange(len(tokens))
            batch["targets"][row, 0] = self._numbers[tuple(label)]
            batch["weights"][row, 0] = 1
        return batch
