"""Files to documents: text, JSON lines and tables. One function a format, and what they share.

Every reader yields the records of one file in order from number `start` on. What is broken is refused with
its place, or skipped, as `Reading.on_broken` says; a record that is skipped is yielded without text.
"""

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from lm.config import ConfigError
from lm.data import files

_BYTE_ORDER_MARK = "\ufeff"
_PIECE = 1 << 24  # bytes of a text that are read at a time
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

    In a table a number is a column, counted from 0, and then there is no line of names. Elsewhere
    "a.b" is field b of the record that is field a, unless a field has that very name.
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

    def setting(self, field: str) -> str:
        """Return which setting names a field that is read."""
        named = {
            self.label: "label_field",
            self.target: "target_field",
            self.source: "source_field",
        }
        return f"data.{named.get(field, 'field')}"


class Reading(NamedTuple):
    """What is read of a record, and what is done with invalid bytes and with broken records."""

    fields: Fields = Fields()
    on_invalid: str = "replace"  # or refuse
    on_broken: str = "refuse"  # or skip
    max_bytes: int = 1 << 28  # of a record or a text file

    def too_long(self, where: str) -> str:
        """Return what is said of a record, at `where`, of more than `max_bytes`."""
        return (
            f"data.path: {where} is longer than data.max_document_bytes={self.max_bytes}, which takes some "
            "15 times as much memory; divide it, or raise that"
        )

    def broken(self, kind: str, message: str) -> Document:
        """Return what stands for a record that is skipped, or raise ConfigError with `message`."""
        if self.on_broken == "refuse":
            raise ConfigError(f"{message}, or set data.on_broken=skip")
        return Document("", broken=kind)


def text(file: str, start: int, reading: Reading) -> Iterator[Document]:
    """Yield a file as one document, line ends as they are."""
    yield from itertools.islice(_damage_told(_text(file, reading), reading), start, None)


def _at_most(handle: BinaryIO, size: int) -> bytes:
    """Return what is left of a file, up to `size` bytes: a reader's own `read` takes all of them first."""
    pieces: list[bytes] = []
    while size > 0 and (piece := handle.read(min(size, _PIECE))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _text(file: str, reading: Reading) -> Iterator[Document]:
    name = files.printable(file)
    with files.opened(file) as handle:
        raw = _at_most(handle, reading.max_bytes + 1)
    if len(raw) > reading.max_bytes:
        yield reading.broken("too long", reading.too_long(name))
        return
    if b"\0" in raw[:4096]:
        yield reading.broken(
            "no text",
            f"data.path: {name} is no UTF-8 text (it holds NUL bytes); convert it, name another",
        )
        return
    content, replaced = decode(raw, name, reading.on_invalid)
    content = content.removeprefix(_BYTE_ORDER_MARK)
    if content:
        yield Document(content, replaced)
    else:
        yield reading.broken(
            "empty file", f"data.path: {name} is empty; name a file that holds text"
        )


def jsonl(file: str, start: int, reading: Reading) -> Iterator[Document]:
    """Yield the strings in the fields of every line's JSON object; blank lines are skipped."""
    name = files.printable(file)
    lines = itertools.islice(_json_streams(file, name, reading), start, None)
    for line in lines:
        yield line if isinstance(line, Document) else _of_json(line, reading)


def _lines(handle: BinaryIO, max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Yield each line and its size; nothing of one with more than `max_bytes`, its end left out."""
    while raw := handle.readline(max_bytes + 2):
        size = len(raw)
        if size > max_bytes and len(raw.removesuffix(b"\n").removesuffix(b"\r")) > max_bytes:
            while raw and not raw.endswith(b"\n"):
                raw = handle.readline(1 << 20)
                size += len(raw)
            raw = b""
        yield raw, size


class _Line(NamedTuple):
    """A line, where it is (its file and number, from 1), and the number of its first byte, from 0."""

    raw: bytes
    where: str
    offset: int


def _json_streams(file: str, name: str, reading: Reading) -> Iterator[_Line | Document]:
    """Yield the lines of a file; where a compressed stream is damaged go on with the next one."""
    begin: int | None = 0
    while begin is not None:
        try:
            yield from _json_lines(file, name, reading, begin)
            return
        except files.Damaged as error:
            yield reading.broken("damaged file", f"{error} (lines read before it was known stay)")
            begin = files.next_stream(file, error.begin)


def _json_lines(file: str, name: str, reading: Reading, begin: int) -> Iterator[_Line | Document]:
    offset = number = 0
    place = f"{name}, from its byte {begin:,} on" if begin else name
    with files.opened(file, begin=begin) as handle:
        for number, (raw, size) in enumerate(_lines(handle, reading.max_bytes), 1):
            if size > len(raw):
                yield reading.broken("too long", reading.too_long(f"{place}:{number}"))
            elif raw.strip():
                yield _Line(raw, f"{place}:{number}", offset)
            offset += size
    if not number and not begin:
        yield reading.broken(
            "empty file", f"data.path: {name} is empty; name a file that holds JSON lines"
        )


def _of_json(line: _Line, reading: Reading) -> Document:
    where = line.where
    content, replaced = decode(line.raw, where, reading.on_invalid, line.offset)
    try:
        record = json.loads(content.removeprefix(_BYTE_ORDER_MARK))
        del content  # a line may be most of the memory
    except (ValueError, RecursionError) as error:
        return reading.broken(
            "no JSON", f"data.path: {where}: not JSON ({error}); repair that line"
        )
    document = of_record(record, where, reading)
    return document._replace(replaced=document.replaced + replaced) if replaced else document


def of_record(record: Any, where: str, reading: Reading) -> Document:
    """Return the strings in the fields of a record, lone surrogates in them replaced and counted."""
    texts, replaced = [], 0
    for field in reading.fields.names:
        value = _value(record, field)
        if field == reading.fields.label and type(value) is int:
            value = str(value)
        if not isinstance(value, str):
            holds = ", ".join(map(str, record)) if isinstance(record, Mapping) else "no object"
            return reading.broken(
                "no such text",
                f"{reading.fields.setting(field)}={field}: {where} has no text by that name (it holds "
                f"{holds}); set that, or repair that record",
            )
        if len(value) > reading.max_bytes:
            return reading.broken("too long", reading.too_long(where))
        content, surrogates, *_ = whole(value)
        replaced += surrogates
        if surrogates and reading.on_invalid == "refuse":
            raise ConfigError(
                f"data.on_invalid=refuse: {where}: a lone surrogate, or a byte that is not UTF-8, is not "
                "text; replace counts it"
            )
        texts.append(content)
    return Document(texts[0], replaced, texts[1] if texts[1:] else None)


def _value(record: Any, name: str) -> Any:
    """Return the field of a record by its name, or by a dotted path to it; None where there is none."""
    if not isinstance(record, Mapping):
        return None
    if name in record or "." not in name:
        return record.get(name)
    first, _, rest = name.partition(".")
    return _value(record.get(first), rest)


def table(file: str, start: int, reading: Reading, *, delimiter: str) -> Iterator[Document]:
    """Yield the cells in the fields of every line; CSV has quotes, and lines in them, and TSV has not."""
    name = files.printable(file)
    rows = _damage_told(_rows(file, name, delimiter, reading), reading)
    names, before, width = reading.fields.names, 0, sys.maxsize
    if (first := next(rows, None)) is None:
        message = f"data.path: {name} is empty; name a file that holds rows"
        yield from [reading.broken("empty file", message)][start:]
        return
    if all(field.isdecimal() and len(field) < 10 for field in names):
        columns = [int(field) for field in names]
        rows = itertools.chain([first], rows)
    elif isinstance(first, Document):  # without the line of names nothing can be read
        yield from [first][start:]
        return
    else:
        columns, width = _columns(name, names, first.cells), len(first.cells)
        before = first.replaced  # bytes of the line of names; the first row's count
    for number, row in enumerate(itertools.islice(rows, start, None), start + 1):
        if isinstance(row, Document):
            yield row
        elif any(row.cells[width:]):  # a delimiter that stands in a text cuts it in two
            yield reading.broken(
                "ragged row",
                f"data.path: {name}: row {number} has {len(row.cells)} columns and the line of names {width} "
                f"(line {row.line}); repair that row, such as by quotes",
            )
        elif max(columns) < len(row.cells):
            text, *second = (row.cells[column] for column in columns)
            replaced = row.replaced + (before if number == 1 else 0)
            yield Document(text, replaced, second[0] if second else None)
        else:
            yield reading.broken(
                "ragged row",
                f"data.path: {name}: row {number} has {len(row.cells)} columns and {max(columns) + 1} are "
                f"needed (line {row.line}); repair that row",
            )


def _columns(name: str, wanted: Sequence[str], names: list[str]) -> list[int]:
    """Return where the wanted names stand in the line of names."""
    for field in wanted:
        if field not in names:
            raise ConfigError(
                f"data.path: {name} has no column {field!r} (it has {', '.join(names)}); name it "
                "in data.source_field, data.target_field or data.label_field, or give column numbers"
            )
    return [names.index(field) for field in wanted]


class _Row(NamedTuple):
    """The cells of a row, the number of its last line, and the replaced bytes since the row before."""

    cells: list[str]
    line: int
    replaced: int


class _TextLines:
    """The lines of a table as text, how many were taken, and how many bytes were replaced in them."""

    def __init__(self, handle: BinaryIO, name: str, reading: Reading):
        self.number = self.replaced = 0
        self._handle, self._name, self._reading = handle, name, reading

    def __iter__(self) -> Iterator[str | None]:
        """Yield each line, None for one that is too long."""
        offset = 0
        for raw, size in _lines(self._handle, self._reading.max_bytes):
            self.number += 1
            content, replaced = decode(raw, self._name, self._reading.on_invalid, offset)
            self.replaced += replaced
            line = content if offset else content.removeprefix(_BYTE_ORDER_MARK)
            yield line if size == len(raw) else None
            offset += size

    def too_long(self) -> str:
        """Return what is said of the line that was taken last, and of a row that it is in."""
        return self._reading.too_long(f"{self._name}:{self.number}")


def _rows(file: str, name: str, delimiter: str, reading: Reading) -> Iterator[_Row | Document]:
    """Yield the rows that are not empty, the line of names too where there is one."""
    with files.opened(file) as handle:
        lines = _TextLines(handle, name, reading)
        counted = 0
        for cells in _tsv(lines, reading) if delimiter == "\t" else _csv(lines, name, reading):
            if isinstance(cells, Document):
                yield cells
            else:
                yield _Row(cells, lines.number, lines.replaced - counted)
                counted = lines.replaced


def _tsv(lines: _TextLines, reading: Reading) -> Iterator[list[str] | Document]:
    for line in lines:
        if line is None:
            yield reading.broken("too long", lines.too_long())
        elif line.strip():
            yield line.removesuffix("\n").removesuffix("\r").split("\t")


def _csv(lines: _TextLines, name: str, reading: Reading) -> Iterator[list[str] | Document]:
    csv.field_size_limit(2**31 - 1)  # of characters: a cell may be a book
    size = 0  # of the row that is read: a quote that is not closed takes every line after it

    def parts() -> Iterator[str]:
        nonlocal size
        for line in lines:
            size += len(line or "")
            if line is None or size > reading.max_bytes + 2:  # where its row ends is not known
                raise files.Damaged(lines.too_long())
            # A lone carriage return ends a line as well, in files of old.
            yield from io.StringIO(line, newline="") if "\r" in line else (line,)

    rows = csv.reader(parts(), strict=True)
    while True:
        size = 0
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on with the next line
            yield reading.broken(
                "bad quotes",
                f"data.path: {name}: line {rows.line_num}: {error}; repair the quotes, use .tsv",
            )
        else:
            if cells:
                yield cells


def _damage_told(records: Iterator[Any], reading: Reading) -> Iterator[Any]:
    """Yield the records of a file; where it is damaged its rest is one broken record."""
    try:
        yield from records
    except files.Damaged as error:
        yield reading.broken("damaged file", str(error))


def whole(content: str) -> Document:
    """Return a text as a document, lone surrogates, which no UTF-8 holds, replaced and counted."""
    try:
        content.isascii() or content.encode()  # many times as fast as looking for one
    except UnicodeEncodeError:
        return Document(*_SURROGATE.subn("\ufffd", content))
    return Document(content)


def decode(raw: bytes, where: str, on_invalid: str, offset: int = 0) -> tuple[str, int]:
    """Decode UTF-8; each invalid sequence counts once and becomes U+FFFD, or is refused.

    `offset` is the place of the first byte in the file that `where` names.
    """
    try:
        return raw.decode(), 0
    except UnicodeDecodeError as error:
        if on_invalid == "refuse":
            raise ConfigError(
                f"data.on_invalid=refuse: {where}: byte {offset + error.start} is not UTF-8; "
                "convert the file, or use replace, which counts such bytes"
            ) from None
    replaced = raw.decode(errors="replace")
    return replaced, replaced.count("\ufffd") - raw.count("\ufffd".encode())
