"""Pretrained word vectors: word2vec's text and binary files, and GloVe's.

word2vec: "Distributed Representations of Words and Phrases and their Compositionality", Mikolov et al. 2013
(arXiv 1310.4546); GloVe: "GloVe: Global Vectors for Word Representation", Pennington et al. 2014.

A text file has a line for each word: the word and its numbers; word2vec's begins with a line of the count of
words and of numbers. The binary file has that line too, then for each word its bytes, a space and float32
numbers. In a text file a word may have spaces in it, as some of GloVe's have. Compressed files are
read as they are.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lm.config import ConfigError
from lm.data import files

_LONGEST_WORD = 10_000  # bytes; a longer one is no word but a file of another kind
_LARGEST = 1 << 16  # numbers of a vector, at most


def read(path: str | Path, ids: Mapping[str, int], *, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids [N] int64, vectors [N, D] float32) of the words of `ids` that the file has.

    Of a word that is there twice the first counts. Raises ConfigError, naming `field`, for a missing,
    damaged or foreign file, vectors of two sizes, or numbers that are not finite.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{field}={path}: no such file; give word2vec's or GloVe's vectors")
    found: dict[int, np.ndarray] = {}
    sizes = set()
    for word, vector in _vectors(file, field):
        sizes.add(len(vector))
        if len(sizes) > 1:
            raise ConfigError(
                f"{field}={path}: vectors of {sorted(sizes)} numbers; repair the file"
            )
        index = ids.get(word)
        if index is not None and index not in found:
            found[index] = vector.copy()  # a view would keep its whole block of the file
    if not sizes:
        raise ConfigError(f"{field}={path}: no vectors in it; give word2vec's or GloVe's")
    vectors = np.array([*found.values()], np.float32).reshape(len(found), sizes.pop())
    if not np.isfinite(vectors).all():
        raise ConfigError(f"{field}={path}: numbers that are not finite; repair the file")
    return np.array([*found], np.int64), vectors


def _vectors(file: Path, field: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every (word, vector) of a file of either kind."""
    with files.opened(file, field) as handle:
        first = handle.readline(_LONGEST_WORD * 20)
        counts = first.split()
        header = len(counts) == 2 and all(part.isdigit() and len(part) < 20 for part in counts)
        if not header:
            word, vector = _of_line(first, 1, file, field)
            yield word, vector
            yield from _lines(handle, 2, len(vector), file, field)
            return
        number, size = map(int, counts)
        if not 0 < size <= _LARGEST:
            raise ConfigError(f"{field}={file}: vectors of {size} numbers; repair the file")
        second = handle.readline(_LONGEST_WORD + 32 * size)
        if len(second.split()) == size + 1 and _is_text(second):
            yield _of_line(second, 2, file, field)
            found = 2
            for pair in _lines(handle, 3, size, file, field):
                yield pair
                found += 1
            if found <= number:
                raise _cut_off(file, field, found, number)
        else:
            yield from _binary(second, handle, number, size, file, field)


def _is_text(line: bytes) -> bool:
    return all(map(_is_number, line.split()[1:]))


def _is_number(part: bytes) -> bool:
    try:
        float(part)
    except ValueError:
        return False
    return True


def _lines(
    handle, number: int, size: int, file: Path, field: str
) -> Iterator[tuple[str, np.ndarray]]:
    for line in handle:
        if line.strip():
            yield _of_line(line, number, file, field, size)
        number += 1


def _cut_off(file: Path, field: str, number: int, count: int) -> ConfigError:
    return ConfigError(
        f"{field}={file}: cut off or damaged at word {number} of {count}; get it again"
    )


def _of_line(
    line: bytes, number: int, file: Path, field: str, size: int = 0
) -> tuple[str, np.ndarray]:
    """Return a line's word and vector; of `size` numbers, where it is known, and the rest is the word."""
    fields = line.rstrip().split(b" ")
    spaces = len(fields) - 1 - size if size else 0  # in the word: GloVe has such
    if spaces > 0 and _is_number(fields[spaces]):
        spaces = 0
    spaces = max(spaces, 0)
    word, numbers = b" ".join(fields[: spaces + 1]), fields[spaces + 1 :]
    try:
        if not numbers:
            raise ValueError
        return word.decode(errors="replace"), np.array([float(n) for n in numbers], np.float32)
    except ValueError:
        raise ConfigError(
            f"{field}={file}: line {number} is no word and its numbers; give word2vec's or GloVe's vectors"
        ) from None


def _binary(rest: bytes, handle, count: int, size: int, file: Path, field: str):
    """Yield the vectors of word2vec's binary file, of which `rest` is read already."""
    begin = 0  # in `rest`, of the word that is next
    for number in range(1, count + 1):
        while (at := rest.find(b" ", begin)) < 0 or len(rest) < at + 1 + 4 * size:
            more = handle.read(1 << 20)
            if not more or (at < 0 and len(rest) - begin > _LONGEST_WORD):
                raise _cut_off(file, field, number, count)
            rest, begin = rest[begin:] + more, 0
        word = rest[begin:at].lstrip(b"\n").decode(errors="replace")
        yield word, np.frombuffer(rest, "<f4", size, at + 1)
        begin = at + 1 + 4 * size
