"""What becomes of a chunk of documents: cleaned, assigned to a split, encoded, and sieved for repeats."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lm.data.cleaning import Cleaned, Cleaner
from lm.data.shards import ORIGIN
from lm.data.splits import Item, Rule
from lm.data.tokenizers import Tokenizer
from lm.data.writer import Encoded


@dataclass(frozen=True)
class Chunk:
    """Documents that follow each other."""

    items: list[Item]
    following: tuple[int, int]  # part and record of the document that comes next
    counts: Counter  # of what was read


class Worked(NamedTuple):
    """What a worker made of a chunk."""

    encoded: Encoded  # of the documents that were not dropped
    items: np.ndarray  # [texts], which document of the chunk each text is of
    cleaned: list[Cleaned]  # of each document, its text left out


@dataclass(frozen=True)
class Encoder:
    """Clean, assign and encode documents: all that a worker does."""

    rule: Rule
    tokenizer: Tokenizer
    labelled: bool
    cleaner: Cleaner | None = None

    def encode(self, chunk: Chunk, *, tokens: bool = True) -> Worked:
        """Return the tokens of a chunk; without `tokens`, what became of its documents alone."""
        kept, cleaned = clean(self.cleaner, chunk.items, labelled=self.labelled)
        kept = kept if tokens else []
        texts = [text for _, item in kept for text in item.texts]
        repeats = [len(item.texts) for _, item in kept]
        end = np.array([self.tokenizer.end_of_text])
        ids = self.tokenizer.encode_all(texts)
        sizes = np.array([len(text.encode()) for text in texts], np.int64)
        splits_of = [self.rule.split_of(item) for _, item in kept]
        labels = np.full(len(texts), None)
        if self.labelled:
            labels[1::2] = texts[1::2]
        origins = np.array([(item.part, item.record) for _, item in kept], ORIGIN)
        encoded = Encoded(
            tokens=np.concatenate([end[:0], *(part for one in ids for part in (one, end))]).astype(
                dtype_for(self.tokenizer)
            ),
            lengths=np.array([len(one) + 1 for one in ids], np.int64),
            sizes=sizes,
            splits=np.repeat(np.array(splits_of, np.uint8), repeats),
            origins=np.repeat(origins, repeats),
            following=chunk.following,
            counts=chunk.counts,
            labels=labels,
        )
        numbers = np.repeat(np.array([number for number, _ in kept], np.int64), repeats)
        return Worked(encoded, numbers, cleaned)


def clean(
    cleaner: Cleaner | None, items: list[Item], *, labelled: bool
) -> tuple[list[tuple[int, Item]], list[Cleaned]]:
    """Return what is kept, with the number of the document that it is of, and what became of each.

    A label stays as it is.
    """
    kept: list[tuple[int, Item]] = []
    about = []
    for number, item in enumerate(items):
        texts = item.texts
        if cleaner is not None:
            cleaned = cleaner.clean(texts[0], "" if labelled else "".join(texts[1:]))
            texts = (cleaned.text, *(texts[1:] if labelled else (cleaned.second,)))[: len(texts)]
            about.append(cleaned._replace(text="", second=""))
        kept += ((number, part) for part in item.cleaned(texts))
    return kept, about


class Sieve:
    """Drops documents that are like earlier ones, in their order, and counts what cleaning did."""

    def __init__(self, cleaner: Cleaner | None, counts: dict[str, Any]):
        self._duplicates = cleaner.duplicates() if cleaner else None
        self._report = cleaner.report() if cleaner else None
        if self._report and counts:
            self._report.counts = counts

    def pass_on(self, worked: Worked, *, count: bool = True) -> Encoded:
        """Return the texts that are kept; those of a start before, seen again, are not counted."""
        if self._duplicates is None or self._report is None:
            return worked.encoded
        dropped = []
        for number, cleaned in enumerate(worked.cleaned):
            if not cleaned.dropped_by:
                cleaned = self._duplicates.admit(cleaned)
                if cleaned.dropped_by:
                    dropped.append(number)
            if count:
                self._report.add(cleaned)
        return worked.encoded.only(~np.isin(worked.items, dropped))

    @property
    def counts(self) -> dict[str, Any]:
        """What each step did so far."""
        return self._report.counts if self._report else {}


def dtype_for(tokenizer: Tokenizer) -> np.dtype:
    """Return the type of the tokens on disk."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
