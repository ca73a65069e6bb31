"""Words of any script as arrays, in time linear in the text.

A word is what stands between spaces; in scripts that write no spaces (Han, kana, Thai, Lao, Tibetan,
Burmese, Khmer) every character is a word, and punctuation belongs to the word before it. Lengths are in
letters of an alphabet: such a character counts as 3 and a Hangul syllable as 2, as a text in Chinese has
about a third of the characters of its translation into English (0.30 over the paragraphs of XQuAD).
"""

import functools
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np

_SPACE, _SOLID, _WORD, _LETTER, _START = 1, 2, 4, 8, 16
_UNSPACED = ((0x0E00, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029),
             (0x3031, 0x303C), (0x3041, 0x312F), (0x31A0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
             (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF))  # fmt: skip
_EASTERN_PUNCTUATION = ((0x3001, 0x3003), (0x3008, 0x3020), (0x3030, 0x3030), (0x303D, 0x303F),
                        (0xFE30, 0xFE4F), (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40),
                        (0xFF5B, 0xFF65))  # fmt: skip
_HANGUL = (0xAC00, 0xD7A3)
_SYLLABLE = re.compile(f"[{chr(_HANGUL[0])}-{chr(_HANGUL[1])}]")
_ASSIGNED = 0x33480  # code points above are unassigned, private, or tags and selectors
_BLOCK = 1 << 20  # characters that are in arrays at a time

_unspaced = "".join(f"{chr(first)}-{chr(last)}" for first, last in _UNSPACED)
UNSPACED = re.compile(f"[{_unspaced}]")
_BREAK = re.compile(rf"[\s{_unspaced}]")
_PIECE = re.compile(rf"[{_unspaced}]|[^\W{_unspaced}]+")

TERMINAL = ".!?…。！？｡．؟۔।॥։።။។៕"
_CLOSING = " \t\"'”’»›)]}」』）】》〉〕］"
# The marks are looked behind, so that a long run of them is tried once.
_SENTENCE_END = re.compile(r"(?<![.!?…؟۔։።])[.!?…؟۔։።]++[\"'”’»›)\]}]*+(?!\S)|[。．！？｡।॥။។៕]++")

_KEY = np.uint64(0x9E3779B97F4A7C15)
_BASE = 0xD6E8FEB86659FD93  # odd, so that it has an inverse modulo 2^64


class Words(NamedTuple):
    """Arrays over the words of a text, in their order."""

    hashes: np.ndarray  # uint64; none where they were not asked for
    letters: np.ndarray  # int64: the word's length
    alphabetic: np.ndarray  # bool: it has a letter
    unspaced: np.ndarray  # bool: it is one character of a script without spaces


@functools.lru_cache(maxsize=2)
def words(text: str, *, hashed: bool = True) -> Words:
    """Return the words between spaces, with the punctuation that touches them; hashes take half the time."""
    parts = [_segmented(block, content=False, hashed=hashed) for block in _blocks(text)]
    return _concatenated(parts)


@functools.lru_cache(maxsize=2)
def content_words(text: str) -> Words:
    """Return the words without case, compatibility forms and punctuation: to compare documents by."""
    folded = normalized(text, "NFKC").casefold()
    return _concatenated(
        [_segmented(block, content=True, hashed=True) for block in _blocks(folded)]
    )


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return a hash, uint64, of every `n` words in a row; none where there are fewer."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = hashes[:count]
    for k in range(1, n):
        total = longer(total, hashes[k : k + count])
    return _mixed(total)


def longer(hashes: np.ndarray, next_words: np.ndarray) -> np.ndarray:
    """Return the hashes of n-grams made longer by a word each."""
    return hashes * np.uint64(_BASE) + next_words


def count_words(line: str) -> int:
    """Return how many words a line has."""
    return len(_PIECE.findall(line)) if UNSPACED.search(line) else len(line.split())


def count_letters(line: str) -> int:
    """Return the length of a line in letters of an alphabet."""
    if line.isascii():
        return len(line)
    return len(line) + 2 * len(UNSPACED.findall(line)) + len(_SYLLABLE.findall(line))


def ends_sentence(line: str) -> bool:
    """Return whether a line ends with what ends a sentence, in quotes or brackets or not."""
    return line.rstrip(_CLOSING).endswith(tuple(TERMINAL))


def count_sentences(text: str) -> int:
    """Return how many ends of sentences there are: a mark before a space, or an eastern mark."""
    return sum(1 for _ in _SENTENCE_END.finditer(text))


def normalized(text: str, form: str) -> str:
    """Return a text in a Unicode normal form, in linear time.

    Normalisation sorts a run of combining marks in quadratic time; so a run of more than 30 is
    divided by U+034F, as in the Stream-Safe Text Format (Unicode Standard Annex 15, section 13).
    """
    if text.isascii():
        return text
    possible, long_run = _long_runs()
    while True:
        if possible.search(text):
            text = long_run.sub("\\g<0>\u034f", text)
        before, text = text, unicodedata.normalize(cast(Any, form), text)
        if text == before or not (possible.search(text) and long_run.search(text)):
            return text


@functools.cache
def _long_runs() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return patterns of what may be a run of over 30 marks, found 30 times faster, and of what is one."""
    marks = "".join(chr(code) for code in range(_ASSIGNED) if unicodedata.combining(chr(code)))
    rough = "".join(mark for mark in marks if mark < "\U00010000") + "\U00010000-\U0001ffff"
    return re.compile(f"[{rough}][{rough}]{{30}}"), re.compile(f"[{marks}]{{30}}(?=[{marks}])")


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return flags and length in letters, each uint8, of every code point."""
    flags = np.zeros(0x110000, np.uint8)
    for code in range(_ASSIGNED):
        character = chr(code)
        category = unicodedata.category(character)[0]
        flags[code] = (
            _SPACE * character.isspace()
            | _WORD * (category in "LMN")
            | _START * (category in "LN")
            | _LETTER * character.isalpha()
        )
    letters = np.ones(0x110000, np.uint8)
    for first, last in _UNSPACED:
        part = flags[first : last + 1]
        part[(part & _START) > 0] |= _SOLID
        letters[first : last + 1] = 3
    for first, last in _EASTERN_PUNCTUATION:
        flags[first : last + 1] |= _SPACE
    letters[_HANGUL[0] : _HANGUL[1] + 1] = 2
    return flags, letters


def _blocks(text: str) -> Iterator[np.ndarray]:
    """Yield the code points of the text in blocks that end where a word ends."""
    start = 0
    while start < len(text):
        found = _BREAK.search(text, start + _BLOCK)
        end = found.start() if found else len(text)
        yield np.frombuffer(text[start:end].encode("utf-32-le", "surrogatepass"), np.uint32)
        start = end


def _segmented(codes: np.ndarray, *, content: bool, hashed: bool) -> Words:
    flag_table, letter_table = _tables()
    flags, lengths = flag_table.take(codes), letter_table.take(codes)
    first, last = _borders(flags, content)
    letters = last - first + 1
    if len(codes) and lengths.max() > 1:
        total = np.cumsum(lengths, dtype=np.int64)
        letters = total[last] - total[first] + lengths[first]
    alphabetic = (
        np.bitwise_or.reduceat(flags, first) if len(first) else flags[:0]
    )  # to the next word
    return Words(
        _hashes(codes, first, last) if hashed else np.empty(0, np.uint64),
        letters,
        (alphabetic & _LETTER) > 0,
        (flags[first] & _SOLID) > 0,
    )


def _borders(flags: np.ndarray, content: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the first and the last character of every word."""
    inside = np.zeros(len(flags) + 2, bool)  # one more at both ends
    inside[1:-1] = (flags & _WORD) > 0 if content else (flags & _SPACE) == 0
    solid = (flags & _SOLID) > 0
    if not solid.any():
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        return edges[::2], edges[1::2] - 1
    after_solid = np.zeros(len(flags), bool)
    after_solid[1:] = solid[:-1]
    begins = inside[1:-1] & (~inside[:-2] | solid | (after_solid & ((flags & _START) > 0)))
    ends = inside[1:-1] & ~inside[2:]
    ends[:-1] |= begins[1:] & inside[1:-2]
    return np.flatnonzero(begins), np.flatnonzero(ends)


def _hashes(codes: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return a polynomial hash of codes[first] ... codes[last] for each pair, by prefix sums."""
    powers, inverses = _powers(1 << max(20, (len(codes) - 1).bit_length()))
    terms = _mixed(codes.astype(np.uint64)) * powers[: len(codes)]
    sums = np.cumsum(terms, dtype=np.uint64)
    return _mixed((sums[last] - sums[first] + terms[first]) * inverses[first])


@functools.lru_cache(maxsize=1)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    def of(base: int) -> np.ndarray:
        factors = np.full(size, base, np.uint64)
        factors[0] = 1
        return np.multiply.accumulate(factors)

    return of(_BASE), of(pow(_BASE, -1, 1 << 64))


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values + _KEY) * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(32)
    values *= np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(29))


def _concatenated(parts: list[Words]) -> Words:
    if not parts:
        return Words(
            np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, bool), np.empty(0, bool)
        )
    return Words(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
