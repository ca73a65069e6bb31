"""Files to documents: text, JSON lines and tables, compressed or not. One function a format."""

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from lm.config import ConfigError

_BYTE_ORDER_MARK = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
TABLES = {"tsv": "\t", "csv": ","}  # what separates the columns


class Document(NamedTuple):
    """One text, how many invalid byte sequences in it were replaced by U+FFFD, and what belongs to it.

    `second` is a target or a label, where the data has pairs. A record that is skipped has no text, and
    `broken` is the kind of what is wrong with it, so that the records after it keep their numbers.
    """

    text: str
    replaced: int = 0
    second: str | None = None
    broken: str = ""


class Fields(NamedTuple):
    """Names of what is read of a record: the text, or a source and a target, or a source and a label.

    In a table a number is a column, counted from 0, and then there is no line of names.
    """

    text: str = "text"
    source: str = ""
    target: str = ""
    label: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are read, in order: one, or two for pairs."""
        second = self.target or self.label
        return (self.source, second) if second else (self.source or self.text,)


def text(file: Path, *, start: int, fields: Fields, on_invalid: str) -> Iterator[Document]:
    """Yield a file as one document, line ends as they are."""
    if start:
        return
    with opened(file) as handle:
        raw = handle.read()
    if b"\0" in raw[:4096]:
        raise ConfigError(
            f"data.path: {file} is no UTF-8 text (it holds NUL bytes); convert it, or name another"
        )
    content, replaced, *_ = _decode(raw, 0, file, on_invalid)
    content = content.removeprefix(_BYTE_ORDER_MARK)
    if not content:
        raise ConfigError(f"data.path: {file} is empty; name a file that holds text")
    yield Document(content, replaced)


def jsonl(file: Path, *, start: int, fields: Fields, on_invalid: str) -> Iterator[Document]:
    """Yield the strings in `fields` of every line's JSON object; blank lines are skipped."""
    offset = number = record = 0
    with opened(file) as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                if record >= start:
                    yield _record(line, offset, f"{file}:{number}", fields, on_invalid)
                record += 1
            offset += len(line)
    if not number:
        raise ConfigError(f"data.path: {file} is empty; name a file that holds JSON lines")


def table(
    file: Path, *, start: int, fields: Fields, on_invalid: str, delimiter: str
) -> Iterator[Document]:
    """Yield the cells in `fields` of every line; CSV has quotes, and lines in them, and TSV has not."""
    with opened(file) as handle:
        raw = handle.read()
    content, replaced, *_ = _decode(raw, 0, file, on_invalid)
    content = content.removeprefix(_BYTE_ORDER_MARK)
    if delimiter == "\t":
        lines: Iterator[list[str]] = (
            line.removesuffix("\r").split("\t") for line in content.split("\n") if line.strip()
        )
    else:
        lines = _csv_lines(content, file)
    columns = _columns(file, fields, lines)
    for number, cells in enumerate(lines, 1):
        if number <= start:
            continue
        if max(columns) >= len(cells):
            raise ConfigError(
                f"data.path: {file}: row {number} has {len(cells)} columns and {max(columns) + 1} are "
                "needed; repair that row"
            )
        text, *second = (cells[column] for column in columns)
        yield Document(text, replaced if number == 1 else 0, second[0] if second else None)


def _csv_lines(content: str, file: Path) -> Iterator[list[str]]:
    csv.field_size_limit(2**31 - 1)  # of characters: a cell may be a book
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        yield from (cells for cells in reader if cells)
    except csv.Error as error:
        raise ConfigError(
            f"data.path: {file}: line {reader.line_num}: {error}; repair the quotes, or use .tsv"
        ) from None


def whole(content: str) -> Document:
    """Return a text as a document, lone surrogates, which no UTF-8 holds, replaced and counted."""
    return Document(*_SURROGATE.subn("\ufffd", content))


def _columns(file: Path, fields: Fields, lines: Iterator[list[str]]) -> list[int]:
    """Return the columns of `fields`; a line of names is taken from `lines` unless they are numbers."""
    if all(name.isdecimal() and len(name) < 10 for name in fields.names):
        return [int(name) for name in fields.names]
    names = next(lines, [])
    for name in fields.names:
        if name not in names:
            raise ConfigError(
                f"data.path: {file} has no column {name!r} (it has {', '.join(names) or 'none'}); name it "
                "in data.source_field, data.target_field or data.label_field, or give column numbers"
            )
    return [names.index(name) for name in fields.names]


def _record(line: bytes, offset: int, where: str, fields: Fields, on_invalid: str) -> Document:
    content, replaced, *_ = _decode(line, offset, where, on_invalid)
    try:
        record = json.loads(content.removeprefix(_BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data.path: {where}: not JSON ({error}); repair that line") from None
    texts = []
    for field in fields.names:
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            holds = ", ".join(map(str, record)) if isinstance(record, dict) else "no object"
            raise ConfigError(
                f"data.field={field}: {where} has no text by that name (it holds {holds}); "
                "set data.field (of pairs: data.source_field and the other) or repair that line"
            )
        text, surrogates, *_ = whole(record[field])
        replaced += surrogates
        if surrogates and on_invalid == "refuse":
            raise ConfigError(
                f"data.on_invalid=refuse: {where}: a lone surrogate is not text; replace counts it"
            )
        texts.append(text)
    return Document(texts[0], replaced, texts[1] if texts[1:] else None)


def _decode(raw: bytes, offset: int, file: Path | str, on_invalid: str) -> Document:
    """Decode UTF-8; each invalid sequence counts once and becomes U+FFFD, or is refused."""
    try:
        return Document(raw.decode())
    except UnicodeDecodeError as error:
        if on_invalid == "refuse":
            raise ConfigError(
                f"data.on_invalid=refuse: {file}: byte {offset + error.start} is not UTF-8; "
                "convert the file, or use replace, which counts such bytes"
            ) from None
    replaced = raw.decode(errors="replace")
    return Document(replaced, replaced.count("\ufffd") - raw.count("\ufffd".encode()))


class _Zstandard(io.RawIOBase):
    """Decompress frames; unlike zstandard's own reader, a truncated one raises EOFError."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._unread = b""  # compressed bytes after a frame's end
        self._ready = b""
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._unread or self._raw.read(1 << 16)
            if not data:
                if self._inside:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            if not self._inside:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(data)
            self._inside = not self._frame.eof
            self._unread = self._frame.unused_data if self._frame.eof else b""
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


@contextlib.contextmanager
def explained(file: Path, field: str = "data.path") -> Iterator[None]:
    """Turn what goes wrong while `file` is read into a ConfigError that names `field`."""
    try:
        yield
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        message = f"{field}: {file} is damaged ({error}); restore it, or decompress it by hand"
        raise ConfigError(message) from error
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {file} ({error.strerror or error})") from error


@contextlib.contextmanager
def opened(file: Path, field: str = "data.path") -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed by its suffix."""
    with explained(file, field), file.open("rb") as raw:
        if file.suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw)  # type: ignore[misc]
        elif file.suffix == ".zst":
            yield io.BufferedReader(_Zstandard(raw), 1 << 16)
        else:
            yield raw
