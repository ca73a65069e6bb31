"""Words between spaces as tokens, as in the Penn Treebank of language models (Mikolov et al. 2010).

The vocabulary is closed: the most frequent words of the training text; every other word is <unk>, as is what
the text itself writes so. A newline is the token <eos>. What differs here: spaces are not kept, so that
decode(encode(x)) is x only where words are one space apart; in `token_bytes` a word has the space after it.
"""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lm.config import ConfigError
from lm.data import tokenizers

UNKNOWN_WORD, NEWLINE = "<unk>", "<eos>"
_MOST_WORDS = 1 << 22  # counted at once, about half a gigabyte; then rare ones are counted anew


class Word(tokenizers.Tokenizer):
    """The words given; <unk> and <eos> are the first ids, end of text is the last."""

    name, counts_bytes = "word", False

    def __init__(self, words: Sequence[str]):
        self.words = [UNKNOWN_WORD, NEWLINE, *words]
        self.end_of_text = len(self.words)
        self.stop_tokens = (self.end_of_text,)
        self.vocab_size = len(self.words) + 1
        sizes = [len(word.encode()) + 1 for word in self.words]
        sizes[1] = 1  # of the newline itself
        self.token_bytes = np.array([*sizes, 0], np.int32)
        self.fingerprint = f"word-{tokenizers.digest(chr(0).join(self.words).encode())}"
        self._ids = {word: i for i, word in enumerate(self.words) if word != NEWLINE}

    def encode(self, text: str) -> np.ndarray:
        ids: list[int] = []
        for line in tokenizers.checked(text).split("\n"):
            ids.extend(self._ids.get(word, 0) for word in line.split())
            ids.append(1)
        return np.array(ids[:-1], np.int32)  # the last line has no newline after it

    def decode(self, ids: Iterable[int]) -> str:
        words = []
        for i in map(int, ids):
            if i == self.end_of_text:
                continue
            known = self.words[i] if i < self.vocab_size else tokenizers.UNKNOWN
            words.append("\n" if i == 1 else known)
        return " ".join(words).replace(" \n", "\n").replace("\n ", "\n")

    def decode_behind(self, before: str, ids: Iterable[int]) -> str:
        known = self.encode(before).tolist()
        text = self.decode([*known, *ids])[len(self.decode(known)) :]
        return text.lstrip(" ") if before[-1:].isspace() else text

    def piece(self, index: int) -> str:
        return f" {self.decode([index])}"

    def _settings(self) -> dict[str, Any]:
        return {"words": self.words[2:]}


def _frequent(counts: collections.Counter[str]) -> collections.Counter[str]:
    """Return the counts of more than the median, at most half of them (Manku and Motwani 2002)."""
    least = sorted(counts.values())[len(counts) // 2]
    return collections.Counter({word: count for word, count in counts.items() if count > least})


def train(texts: Iterable[str], *, vocab_size: int) -> Word:
    """Return the tokenizer of the most frequent words, at most `vocab_size` ids in all.

    Words of one frequency come in order of code points. Raises ConfigError for a size without room for one.
    """
    if vocab_size < 4:
        raise ConfigError(
            f"data.vocab_size={vocab_size}: <unk>, <eos> and end of text take 3; use 4 or more"
        )
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text.split())
        if len(counts) > _MOST_WORDS:
            counts = _frequent(counts)
    for word in (UNKNOWN_WORD, NEWLINE):
        counts.pop(word, None)
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return Word(words[: vocab_size - 3])
