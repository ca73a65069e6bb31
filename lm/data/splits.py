"""Which split a document belongs to.

By a hash of its content, so that it stays where it is when others come and go; with `data.fold` one of k such
parts is for validation; with `data.validation_path` its file decides. Fewer than 100 documents are cut at the
last `validation_fraction` of the characters, pairs at the last of the pairs; the document that is cut is
cleaned before, as a whole.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from lm.config import ConfigError
from lm.data.documents import Document
from lm.data.shards import SPLITS

TRAIN, VALIDATION = range(len(SPLITS))
_BY_HASH = -1
_FEW = 100  # documents; below, the split is by characters


class Item(NamedTuple):
    """A text, or a pair of texts, of one record of the source."""

    part: int
    record: int
    texts: tuple[str, ...]
    split: int = _BY_HASH  # index of SPLITS
    cut: int = 0  # of a text that is in both splits: its characters for training

    def cleaned(self, texts: tuple[str, ...]) -> Iterator["Item"]:
        """Yield what is left of the item by its cleaned texts: two items of a text that is cut.

        It is cut at the same share of its characters as before it was cleaned.
        """
        if not self.cut:
            if all(texts):
                yield self._replace(texts=texts)
            return
        cut = len(texts[0]) * self.cut // len(self.texts[0])
        for split, text in ((TRAIN, texts[0][:cut]), (VALIDATION, texts[0][cut:])):
            if text:
                yield Item(self.part, self.record, (text,), split)


@dataclass(frozen=True)
class Rule:
    """How documents are split; of the numbers, those that `by` needs are used."""

    by: str  # hash, fold, files or characters
    fraction: float = 0.0
    fold: tuple[int, int] = (0, 1)  # i of k
    training_parts: int = 0  # parts of the source that come before those for validation
    characters: int = 0  # for training
    pairs: int = 0  # for training

    def items(self, part: int, record: int, document: Document, before: Counter) -> Iterator[Item]:
        """Yield what is encoded of a document, which is for one split unless the cut by characters is in it.

        `before` counts the "documents" and "characters" that were read before it.
        """
        texts = (document.text,) if document.second is None else (document.text, document.second)
        if not all(texts):
            return
        if self.by == "files":
            yield Item(part, record, texts, VALIDATION if part >= self.training_parts else TRAIN)
        elif self.by != "characters":
            yield Item(part, record, texts)
        elif len(texts) == 2:
            yield Item(
                part, record, texts, VALIDATION if before["documents"] >= self.pairs else TRAIN
            )
        else:
            cut = max(self.characters - before["characters"], 0)
            inside = 0 < cut < len(document.text)
            yield Item(part, record, texts, TRAIN if cut else VALIDATION, cut if inside else 0)

    def split_of(self, item: Item) -> int:
        """Return the index of the item's split, after its text was cleaned."""
        if item.split != _BY_HASH:
            return item.split
        place = hash_fraction(item.texts[0])
        if self.by == "fold":
            return VALIDATION if int(place * self.fold[1]) == self.fold[0] else TRAIN
        return VALIDATION if place < self.fraction else TRAIN


def rule(cfg: Any, source: Any) -> Rule:
    """Return the rule of the frozen `data` section; up to 100 documents are read where they decide."""
    if cfg.validation_path:
        return Rule("files", training_parts=source.training_parts)
    if cfg.fold:
        return Rule("fold", fold=parse_fold(cfg.fold))
    number = characters = 0
    for document in source:
        number += bool(document.text) and document.second != ""
        characters += len(document.text)
        if number >= _FEW:
            return Rule("hash", fraction=cfg.validation_fraction)
    keep = 1 - cfg.validation_fraction
    return Rule("characters", characters=int(characters * keep), pairs=int(number * keep))


def parse_fold(fold: str) -> tuple[int, int]:
    """Return (i, k) of "i/k". Raises ConfigError for another form."""
    first, _, count = fold.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count) < 10_000):
        raise ConfigError(
            f"data.fold={fold}: not i/k with i below k; use 0/5, 1/5, ... 4/5 for five folds"
        )
    return int(first), int(count)


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
