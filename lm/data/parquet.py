"""Parquet files, and Arrow's tables in general, to documents; only the columns that are read are loaded."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from lm.config import ConfigError
from lm.data import files
from lm.data.documents import Document, Reading, decode

_BUFFER = 1 << 20  # bytes of a column that are read at a time
_BATCH = 16 << 20  # bytes, about, of a row group that are in memory at a time
_TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_AT_ONCE = 64  # rows that are Python objects at a time


def read(file: str, start: int, reading: Reading) -> Iterator[Document]:
    """Yield a document for every row of a Parquet file from number `start` on.

    A row group that is damaged gives as many broken records as it has rows left. Raises ConfigError for
    a file that is none, a column that is missing or no text, and what `reading` refuses.
    """
    pyarrow = installed()
    name = files.printable(file)
    with files.opened(file, seek=True) as handle:
        try:
            parquet = pyarrow.parquet.ParquetFile(
                handle,
                buffer_size=_BUFFER,
                pre_buffer=False,  # else a row group is in memory whole
                page_checksum_verification=True,
            )
        except (pyarrow.ArrowException, OSError) as error:
            _reraise_unless_damage(error)
            message = (
                f"data.path: {name} is no Parquet file, or damaged ({_line(error)}); restore it"
            )
            yield from [reading.broken("damaged file", message)][start:]
            return
        for field in reading.fields.names:
            _path(parquet.schema_arrow, field, name)
        first = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if first + rows > start:
                texts = _group(parquet, group, reading, name, first)
                yield from itertools.islice(texts, max(0, start - first), None)
            first += rows


def _group(parquet: Any, group: int, reading: Reading, name: str, first: int) -> Iterator[Document]:
    """Yield the documents of one row group, of which `first` is the first row's number."""
    about = parquet.metadata.row_group(group)
    size = max(1, _BATCH * about.num_rows // max(1, about.total_byte_size))
    names = list(reading.fields.names)
    batches = parquet.iter_batches(size, [group], names, use_threads=False)
    done = 0
    while done < about.num_rows:
        try:
            batch = next(batches)
        except (OSError, ValueError, StopIteration) as error:  # Arrow's own are of these kinds
            _reraise_unless_damage(error)
            message = (
                f"data.path: {name}: row {first + done}: row group {group} is damaged ({_line(error)}); "
                "restore the file"
            )
            for _ in range(done, about.num_rows):
                yield reading.broken("damaged row group", message)
            return
        columns = columns_of(batch, reading, name)
        yield from documents(columns, reading, f"{name}: row", first + done)
        done += batch.num_rows


def installed() -> Any:
    """Return the package pyarrow, or raise ConfigError."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("data.source=parquet needs pyarrow; pip install -e '.[data]'") from None
    return pyarrow


def columns_of(table: Any, reading: Reading, where: str) -> list[Any]:
    """Return the columns that are read, as Arrow arrays of bytes, null where a row has none.

    Raises ConfigError for a column that is not there, or is no text; a label may be a number.
    """
    pyarrow, fields = installed(), reading.fields
    types, columns = pyarrow.types, []
    for name in fields.names:
        path = _path(table.schema, name, where)
        column = table.column(path[0])
        column = pyarrow.compute.struct_field(column, path[1:]) if path[1:] else column
        if types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        kind = column.type
        if (types.is_integer(kind) and name == fields.label) or types.is_null(kind):
            column = column.cast(pyarrow.string())
        elif not any(getattr(types, f"is_{known}")(kind) for known in _TEXTS):
            raise ConfigError(
                f"data.field={name}: {where}: a column of {kind} is no text; name another"
            )
        columns.append(column.cast(pyarrow.large_binary()))
    return columns


def _path(schema: Any, name: str, where: str) -> list[str]:
    """Return the names that lead to a field of an Arrow schema, or raise ConfigError."""
    path = [name] if name in schema.names else name.split(".")
    found = schema
    for part in path:
        index = found.get_field_index(part) if hasattr(found, "get_field_index") else -1
        if index < 0:
            raise ConfigError(
                f"data.field={name}: {where} has no column by that name (it has "
                f"{', '.join(schema.names)}); set data.field (of pairs: data.source_field and the other)"
            )
        found = found.field(index).type
    return path


def documents(
    columns: Sequence[Any], reading: Reading, where: str, first: int
) -> Iterator[Document]:
    """Yield a document for each row of columns of bytes; the rows are numbered from `first`."""
    for start in range(0, len(columns[0]), _AT_ONCE):
        parts = [column.slice(start, _AT_ONCE).to_pylist() for column in columns]
        for number, cells in enumerate(zip(*parts, strict=True), first + start):
            if None in cells:
                field = reading.fields.names[cells.index(None)]
                yield reading.broken(
                    "no such text",
                    f"data.field={field}: {where} {number} has no text by that name; repair that row",
                )
                continue
            if max(map(len, cells)) > reading.max_bytes:
                yield reading.broken("too long", reading.too_long(f"{where} {number}"))
                continue
            texts = [decode(cell, f"{where} {number}", reading.on_invalid) for cell in cells]
            replaced = sum(count for _, count in texts)
            yield Document(texts[0][0], replaced, texts[1][0] if texts[1:] else None)


def _reraise_unless_damage(error: BaseException) -> None:
    """Raise again what the system says and Arrow does not: a disk or a network that fails."""
    if isinstance(error, ConfigError) or (isinstance(error, OSError) and error.errno):
        raise error


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
