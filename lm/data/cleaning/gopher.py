"""The rules of MassiveText: Scaling Language Models (Rae et al. 2021, arXiv 2112.11446), appendix A.1.

Thresholds are the paper's, each an argument; a share is passed only when it is above (or below) its
bound. What differs here: a word is what stands between spaces (the paper does not say), of scripts without
spaces a character (see `segmentation`).
"""

import collections
import math
import re
from dataclasses import dataclass

import numpy as np

from lm.data.cleaning import segmentation
from lm.data.cleaning.step import Step, check_least, check_share

_PARAGRAPH_END = re.compile(r"\n\s*?\n")
_BULLETS = ("•", "‣", "▪", "●", "◦", "-", "*", "・")
_ELLIPSES = ("...", "…")
_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_WORD_CHARACTERS = 1.5  # of a word, on average, in scripts without spaces


@dataclass(frozen=True)
class GopherQuality(Step):
    """Drop what is not made of words and sentences (section A.1.1, "Quality filtering").

    Length of words and stop words are not asked of a document most of whose words are characters of scripts
    without spaces. The stop words are English: for other languages give theirs, for several those of all.
    """

    min_words: int = 50  # of the document
    max_words: int = 100_000  # of the document
    min_word_length: float = 3.0  # mean over the document, in characters
    max_word_length: float = 10.0  # mean over the document, in characters
    max_symbols: float = 0.1  # hash signs a word; ellipses a word
    max_bullet_lines: float = 0.9  # share of lines that begin with a bullet
    max_ellipsis_lines: float = 0.3  # share of lines that end with an ellipsis
    min_alphabetic: float = 0.8  # share of words that have a letter
    min_stop_words: int = 2  # different ones
    stop_words: tuple[str, ...] = _STOP_WORDS  # words of which any text has some

    def __post_init__(self):
        check_least(self, min_words=0, max_words=1, min_stop_words=0)
        check_share(self, "max_bullet_lines", "max_ellipsis_lines", "min_alphabetic")

    def __call__(self, text: str) -> tuple[str, str]:
        return text, self._fault(text)

    def _fault(self, text: str) -> str:
        words = segmentation.words(text, hashed=False)
        count = len(words.letters)
        if count < max(self.min_words, 1):
            return "min_words"
        if count > self.max_words:
            return "max_words"
        spaced = words.unspaced.mean() <= 0.5
        length = words.letters.mean()
        if spaced and not self.min_word_length <= length <= self.max_word_length:
            return "min_word_length" if length < self.min_word_length else "max_word_length"
        ellipses = sum(map(text.count, _ELLIPSES))
        if max(text.count("#"), ellipses) / count > self.max_symbols:
            return "max_symbols"
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        if sum(line.startswith(_BULLETS) for line in lines) / len(lines) > self.max_bullet_lines:
            return "max_bullet_lines"
        if sum(line.endswith(_ELLIPSES) for line in lines) / len(lines) > self.max_ellipsis_lines:
            return "max_ellipsis_lines"
        if words.alphabetic.mean() < self.min_alphabetic:
            return "min_alphabetic"
        if spaced and not self._has_stop_words(text):
            return "min_stop_words"
        return ""

    def _has_stop_words(self, text: str) -> bool:
        pattern = rf"\b(?:{'|'.join(map(re.escape, self.stop_words))})\b"
        seen: set[str] = set()
        for match in re.finditer(pattern, text, re.IGNORECASE) if self.stop_words else ():
            seen.add(match[0].lower())
            if len(seen) >= self.min_stop_words:
                break
        return len(seen) >= self.min_stop_words


@dataclass(frozen=True)
class GopherRepetition(Step):
    """Drop what repeats itself (section A.1.1, "Repetition removal", table A1).

    Duplicate is what stands earlier in the document too. Characters of n-grams are counted once where
    they overlap, as a share of all characters that are not spaces; the most frequent n-gram must occur twice.
    In scripts without spaces an n-gram has half as many characters again, as a word there has about 1.5.
    """

    duplicate_lines: float = 0.30  # share of the lines
    duplicate_paragraphs: float = 0.30  # share of the paragraphs
    duplicate_line_characters: float = 0.20  # share of the characters
    duplicate_paragraph_characters: float = 0.20  # share of the characters
    top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)  # of characters, for n = 2, 3, 4
    duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)  # for n = 5 ... 10

    def __call__(self, text: str) -> tuple[str, str]:
        return text, self._fault(text)

    def _fault(self, text: str) -> str:
        for name, parts in (("line", text.split("\n")), ("paragraph", _PARAGRAPH_END.split(text))):
            number, characters = _duplicates(parts)
            if number > getattr(self, f"duplicate_{name}s"):
                return f"duplicate_{name}s"
            if characters > getattr(self, f"duplicate_{name}_characters"):
                return f"duplicate_{name}_characters"
        words = segmentation.words(text)
        longer = _WORD_CHARACTERS if len(words.unspaced) and words.unspaced.mean() > 0.5 else 1.0
        top = [(math.ceil(n * longer), n, bound) for n, bound in enumerate(self.top_ngrams, 2)]
        again = [(math.ceil(n * longer), n, b) for n, b in enumerate(self.duplicate_ngrams, 5)]
        shares = _ngram_shares(words, max((size for size, _, _ in top + again), default=0))
        for name, bounds, share in zip(
            ("top_ngrams", "duplicate_ngrams"), (top, again), shares, strict=True
        ):
            for size, n, bound in bounds:
                if share[size] > bound:
                    return f"{name} {n}"
        return ""


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """Return the shares, of all parts and of all their characters, that stood earlier too."""
    counts = collections.Counter(part for part in map(str.strip, parts) if part)
    repeated = sum(counts.values()) - len(counts)
    characters = sum(len(part) * count for part, count in counts.items())
    again = characters - sum(map(len, counts))
    return repeated / max(sum(counts.values()), 1), again / max(characters, 1)


def _ngram_shares(words: segmentation.Words, longest: int) -> np.ndarray:
    """Return shares of characters [2, longest + 1]: in the most frequent n-gram, in duplicate n-grams.

    A repeated n-gram begins with a repeated (n - 1)-gram, so that only those are looked at.
    """
    shares = np.zeros((2, longest + 1))
    size = len(words.hashes)
    position = np.concatenate([[0], np.cumsum(words.letters)])
    starts, hashes = np.arange(size), words.hashes
    for n in range(2, longest + 1):
        inside = starts + n <= size
        starts, hashes = starts[inside], hashes[inside]
        hashes = segmentation.longer(hashes, words.hashes[starts + n - 1])
        order = np.argsort(hashes, kind="stable")
        later = np.zeros(len(order) + 1, bool)  # in this order: equal to the one before
        later[1:-1] = hashes[order[1:]] == hashes[order[:-1]]
        if not later.any():
            break
        group = np.flatnonzero(~later)  # begins of the groups of equals, and the end
        counts, heads = np.diff(group), starts[order[group[:-1]]]
        letters = position[heads + n] - position[heads]
        most = np.argmax(counts * (letters.max() + 1) + letters)  # of the most frequent the longest
        shares[0, n] = _share(position, starts[order[group[most] : group[most + 1]]], n)
        shares[1, n] = _share(position, starts[order[later[:-1]]], n)
        repeated = np.zeros(len(order), bool)
        repeated[order[later[:-1] | later[1:]]] = True
        starts, hashes = starts[repeated], hashes[repeated]
    return shares


def _share(position: np.ndarray, starts: np.ndarray, n: int) -> float:
    """Return the share of the characters that are in the n-grams at `starts`, each counted once."""
    depth = np.zeros(len(position), np.int64)
    depth[starts] += 1
    depth[starts + n] -= 1
    inside = np.cumsum(depth[:-1]) > 0
    return float(np.diff(position)[inside].sum() / position[-1])
