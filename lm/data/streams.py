"""What is trained on: splits of a corpus, each one stream of tokens.

A stream is EOT d0 EOT d1 EOT ... dn EOT: end of text also begins the next document, so every token and every
closing EOT is predicted exactly once.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.data import packing
from lm.data.shards import SPLITS
from lm.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Split:
    """The token stream of one split.

    `tokens` [1 + tokens + documents] is EOT d0 EOT ... dn EOT; `starts` int64 [documents] are the
    positions of each document's leading EOT; `num_bytes` is the text's size in UTF-8. Where the data is
    `paired`, documents 2i and 2i + 1 are a text and what belongs to it: a target or a label. `origins`
    [documents] are the part of the source and the record in it that each document comes from.
    """

    name: str
    tokens: Any  # an array or a lm.data.shards.Tokens
    starts: np.ndarray
    num_bytes: int
    paired: bool = False
    origins: np.ndarray | None = None
    plans: dict[tuple[str, int], packing.Plan] = dataclasses.field(default_factory=dict, repr=False)
    kept: Callable[[str, str, int], packing.Plan] | None = None  # other plans: see lm.data.plans

    @property
    def end_of_text(self) -> int:
        """The id between documents: every stream begins with it."""
        return int(self.tokens[0])

    @property
    def num_inputs(self) -> int:
        """How many places of the stream have a next token."""
        return len(self.tokens) - 1

    @property
    def num_pairs(self) -> int:
        """How many pairs there are; 0 where the data has none."""
        return len(self.starts) // 2 if self.paired else 0

    def span(self, document: int) -> tuple[int, int]:
        """Return where in the stream the text of a document begins, and its length in tokens."""
        begin, following = int(self.starts[document]) + 1, document + 1
        end = int(self.starts[following]) if following < len(self.starts) else self.num_inputs
        return begin, end - begin

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of both texts of a pair."""
        (begin, length), (second, size) = self.span(2 * index), self.span(2 * index + 1)
        return self.tokens[begin : begin + length], self.tokens[second : second + size]

    def plan(self, name: str, capacity: int) -> packing.Plan:
        """Return the plan `name` of rows of `capacity` tokens, made once."""
        if (name, capacity) not in self.plans and self.kept:
            self.plans[name, capacity] = self.kept(self.name, name, capacity)
        elif (name, capacity) not in self.plans:
            self.plans[name, capacity] = packing.make(name, self.starts, self.num_inputs, capacity)
        return self.plans[name, capacity]


@dataclass(frozen=True)
class Corpus:
    """Two splits, their tokenizer, a digest of all their tokens, and counts to report."""

    tokenizer: Tokenizer
    train: Split
    validation: Split
    fingerprint: str
    report: dict[str, Any]
    parts: tuple[str, ...] = ()  # of the source: files, mostly
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # that it was prepared with
    unchecked: dict[Path, dict[str, Any]] = dataclasses.field(default_factory=dict)  # files
    mixed: tuple[
        tuple[str, "Corpus"], ...
    ] = ()  # of a mixture; the splits are then those of the first

    @property
    def members(self) -> tuple["Corpus", ...]:
        """The corpora of a mixture, or this one."""
        return tuple(member for _, member in self.mixed) or (self,)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the corpora of a mixture; none where there is one alone."""
        return tuple(name for name, _ in self.mixed)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the documents, sorted; none where the data has no label field."""
        return tuple(self.report["labels"])

    def summary(self) -> str:
        """Return what the corpus is, in a line."""
        if self.mixed:
            return "; ".join(f"{name}: {member.summary()}" for name, member in self.mixed)
        r = self.report
        unit, each = ("pairs", 2) if r["paired"] else ("documents", 1)
        counts = "; ".join(
            f"{name} {r[name]['documents'] // each:,} {unit}, {r[name]['tokens']:,} tokens"
            for name in SPLITS
        )
        replaced = f"; {r['replaced']:,} invalid bytes replaced" if r["replaced"] else ""
        empty = (
            f"; {r['empty_documents']:,} empty documents left out" if r["empty_documents"] else ""
        )
        broken = sum(r.get("broken", {}).values())
        empty += f"; {broken:,} broken records skipped" if broken else ""
        dropped = sum(step["dropped"] for step in r.get("clean", {}).values())
        empty += f"; {dropped:,} dropped by cleaning" if dropped else ""
        sizes = f"{r['bytes']:,} bytes, {self.tokenizer.name} of {self.tokenizer.vocab_size:,}"
        return f"{r['source']}, {sizes}; {counts}{replaced}{empty}"
