"""Predict masked tokens from both sides.

"BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", Devlin et al. 2018
(arXiv 1810.04805); masks drawn anew each epoch: RoBERTa, Liu et al. 2019 (1907.11692).

Row r is [CLS], a window of n = length - 2 tokens (`lm.tasks.window`), and [SEP]; with `next_sentence`
[CLS] A [SEP] B [SEP], where A and B are the halves of that window, or B the second half of another row's. Of
the tokens a share is chosen; of these 80% become [MASK], 10% another token, 10% stay. As RoBERTa's full
sentences, a row is one text, whatever documents it is of; `isolate_documents` keeps these apart.

What differs: A and B are halves of a window and not sentences of one document; a row has exactly
max(1, round(mask_rate * tokens)) masked tokens, or with whole words at most so many.
"""

import re
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


@dataclass(frozen=True)
class Config:
    name: str = "masked_lm"  # the objective, a file of lm/tasks
    length: int = 128  # tokens a row, [CLS] and [SEP] included
    mask_rate: float = 0.15  # share of the tokens that is predicted
    dynamic: bool = True  # other masks each epoch; false = the same ones always
    whole_word: bool = False  # a word is masked whole or not at all
    next_sentence: bool = False  # rows of two parts, and whether they follow each other
    packing: str = "split"  # split the stream, best_fit of whole documents, or pad: one a row
    isolate_documents: bool = False  # documents of a row do not see each other

    def __post_init__(self):
        check_positive(self, length=8)
        check_packing(self.packing)
        if self.next_sentence and self.packing != "split":
            raise ConfigError(
                f"task.packing={self.packing}: the halves of a row follow each other in the stream, for "
                "task.next_sentence; use task.packing=split"
            )
        check_share(self, "mask_rate")
        if self.next_sentence and self.isolate_documents:
            raise ConfigError(
                "task.next_sentence=True: its two parts must see each other; "
                "use task.isolate_documents=False"
            )

    @property
    def packed(self) -> bool:
        """Whether the documents of a row are kept apart."""
        return self.isolate_documents


# Scripts that write no spaces: Thai to Burmese, Khmer, kana, Han.
_RANGES = ("\u0e00-\u109f", "\u1780-\u17ff", "\u3040-\u31ff", "\u3400-\u9fff", "\uf900-\ufaff",
           "\uff66-\uff9f", "\U00020000-\U0003ffff")  # fmt: skip
UNSPACED = re.compile(f"[{''.join(_RANGES)}]")


def _goes_on(character: str) -> bool:
    """Return whether a word goes on over a character; each of Han is one, as in BERT, and of kana or Thai."""
    return character.isalnum() and not UNSPACED.match(character)


class Task:
    """Rows of a split's stream, by index."""

    KINDS: ClassVar = ("masked",)
    source_length, num_classes = 0, 0
    text_bytes, whole_rows = False, False

    def __init__(self, cfg: Config, setting: Setting):
        self.cfg, self.seed, tokenizer = cfg, setting.seed, setting.tokenizer
        self.row_length = cfg.length
        self.max_scored = max(1, round(cfg.mask_rate * cfg.length))
        self.ids = special_ids(tokenizer, ("cls", "sep", "mask"))
        self.cls, self.sep = self.ids["cls"], self.ids["sep"]
        self.gaps = (self.ids["mask"],) * cfg.length
        self.names = {i: f"[{name.upper()}]" for name, i in self.ids.items()}
        self.vocab_size = max(tokenizer.vocab_size, 1 + max(self.ids.values()))
        self.stride = cfg.length - (3 if cfg.next_sentence else 2)
        # What may be masked, or stand for a masked token: all but the special ones.
        self._common = np.ones(self.vocab_size, bool)
        self._common[[tokenizer.end_of_text, *self.ids.values(), *tokenizer.specials.values()]] = 0
        self._drawn = np.flatnonzero(self._common[: tokenizer.vocab_size]).astype(np.int32)
        if cfg.whole_word:
            texts = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
            texts += [""] * (self.vocab_size - len(texts))
            self._begins = np.array([_goes_on(text[:1]) for text in texts])
            self._ends = np.array([_goes_on(text[-1:]) for text in texts])

    def num_rows(self, split: Any) -> int:
        """Return how many rows hold every token of `split` once."""
        return num_windows(split, self.cfg.packing, self.stride)

    def pieces(
        self, split: Any, indices: np.ndarray, *, epochs: np.ndarray | None = None
    ) -> list[list[tuple[int, int]]]:
        """Return (begin, length) of the parts of the stream in each row."""
        if not self.cfg.next_sentence:
            return [self._pieces(split, i) for i in indices.tolist()]
        places = zip(indices.tolist(), self._epochs(indices, epochs).tolist(), strict=True)
        return [
            list(self._halves(split, i, random_of(self.seed, epoch, i))[0])
            if i < self.num_rows(split)
            else []
            for i, epoch in places
        ]

    def rows(
        self,
        split: Any,
        indices: np.ndarray,
        *,
        epochs: np.ndarray | None = None,
        stream_starts: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Return rows `indices` [R] as a batch [R, length]; past the last one, empty rows."""
        indices = np.asarray(indices, np.int64)
        epochs = self._epochs(indices, epochs)
        shape = (len(indices), self.row_length)
        batch: dict[str, np.ndarray] = {
            name: np.zeros(shape, np.int32)
            for name in ("inputs", "targets", "segments", "positions", "types")
        }
        batch["weights"] = np.zeros(shape, np.float32)
        if self.cfg.next_sentence:
            batch["labels"] = np.full(len(indices), -1, np.int32)
        else:
            del batch["types"]
        for place, index in enumerate(indices.tolist()):
            if index < self.num_rows(split):
                row = {name: array[place : place + 1].reshape(-1) for name, array in batch.items()}
                self._fill(row, split, index, int(epochs[place]))
        return batch

    def _epochs(self, indices: np.ndarray, epochs: np.ndarray | None) -> np.ndarray:
        """Return the epochs that the randomness of rows is of."""
        fixed = epochs is None or not self.cfg.dynamic
        return np.zeros(len(indices), np.int64) if fixed else np.asarray(epochs)

    def _fill(self, row: dict[str, np.ndarray], split: Any, index: int, epoch: int) -> None:
        """Write one row of a batch, given as views."""
        random = random_of(self.seed, epoch, index)
        if self.cfg.next_sentence:
            halves, follows = self._halves(split, index, random)
            first, second = (split.tokens[begin : begin + size] for begin, size in halves)
            tokens = np.concatenate([[self.cls], first, [self.sep], second, [self.sep]])
            row["types"][len(first) + 2 : len(tokens)] = 1
            row["labels"][:] = 0 if follows else 1
        else:
            text = window(split, index, self.cfg.packing, self.stride)
            tokens = np.concatenate([[self.cls], text, [self.sep]])
        size = len(tokens)
        row["targets"][:size] = tokens
        row["segments"][:size], row["positions"][:size] = self._documents(tokens, split)
        chosen = self._choose(tokens, random)
        row["weights"][chosen] = 1
        draw = random.random(len(chosen))
        shown = np.where(draw < 0.8, self.ids["mask"], tokens[chosen])
        other = self._drawn[random.integers(len(self._drawn), size=len(chosen))]
        row["inputs"][:size] = tokens
        row["inputs"][chosen] = np.where((draw >= 0.8) & (draw < 0.9), other, shown)

    def _pieces(self, split: Any, index: int) -> list[tuple[int, int]]:
        return window_pieces(split, index, self.cfg.packing, self.stride)

    def _halves(
        self, split: Any, index: int, random: np.random.Generator
    ) -> tuple[tuple[tuple[int, int], ...], bool]:
        """Return (begin, length) of the parts A and B of a row, and whether B follows A."""
        ((begin, size),) = self._pieces(split, index)
        first, second = (begin, size // 2), (begin + size // 2, size - size // 2)
        others = self.num_rows(split) - 1
        follows = random.random() < 0.5 or not others
        if not follows:
            away = 1 + int(random.integers(others))
            ((begin, size),) = self._pieces(split, (index + away) % (others + 1))
            second = begin + size // 2, size - size // 2
        return (first, second), follows

    def _documents(self, tokens: np.ndarray, split) -> tuple[np.ndarray, np.ndarray]:
        """Return the segment and the position of each token of a row."""
        places = np.arange(len(tokens))
        if not self.cfg.isolate_documents:
            return np.ones(len(tokens), np.int32), places
        borders = (tokens == split.end_of_text) & (places > 0)
        latest = np.maximum.accumulate(np.where(borders, places, 0))
        return 1 + np.cumsum(borders), places - latest

    def _choose(self, tokens: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return the places of the tokens to predict."""
        places = np.flatnonzero(self._common[tokens])
        count = min(max(1, round(self.cfg.mask_rate * len(places))), self.max_scored, len(places))
        if not self.cfg.whole_word:
            return np.sort(random.permutation(places)[:count])
        starts = ~self._begins[tokens[places]] | ~self._ends[tokens[places - 1]]
        starts |= np.diff(places, prepend=-2) > 1
        words = np.split(places, np.flatnonzero(starts)[1:]) if len(places) else []
        chosen: list[int] = []
        for number in random.permutation(len(words)).tolist():
            if len(chosen) + len(words[number]) <= count:
                chosen += words[number].tolist()
        return np.array(sorted(chosen), np.int64)
