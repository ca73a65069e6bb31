"""Where documents come from: the user's files, and what every Python carries."""

import dataclasses
import functools
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.config import ConfigError
from lm.data import documents, library
from lm.data.documents import TABLES, Document, Fields

EMBEDDED = ("python_docs", "python_source", "python_pairs")
NAMES = (*EMBEDDED, "text", "jsonl", "tsv", "csv")


_READERS: dict[str, Callable[..., Iterator[Document]]] = {
    "text": documents.text,
    "jsonl": documents.jsonl,
    **{name: functools.partial(documents.table, delimiter=TABLES[name]) for name in TABLES},
}


@dataclass(frozen=True)
class Source:
    """The documents of one source, to be read any number of times in the same order."""

    name: str  # one of NAMES
    parts: tuple[str, ...]  # read one after the other: files, or the source's own name
    fields: Fields  # of JSONL and tables
    on_invalid: str  # replace or refuse

    # What was parsed is kept: the embedded corpora are small and parsing takes seconds.
    _kept: list[Document] = dataclasses.field(default_factory=list, repr=False, compare=False)

    def __iter__(self) -> Iterator[Document]:
        for part in range(len(self.parts)):
            yield from self.read(part)

    def read(self, part: int, start: int = 0) -> Iterator[Document]:
        """Yield the documents of `parts[part]` in order, beginning with number `start`, counted from 0.

        A record that is empty or broken counts, and is yielded without text.
        """
        if self.name in _READERS:
            yield from _READERS[self.name](
                Path(self.parts[part]), start=start, fields=self.fields, on_invalid=self.on_invalid
            )
            return
        if not self._kept:
            self._kept.extend(library.READERS[self.name](library.library_files()))
        yield from self._kept[start:]

    @property
    def paired(self) -> bool:
        """Whether each document has a second text."""
        return self.name == "python_pairs" or len(self.fields.names) == 2

    def fingerprint(self) -> str:
        """Return a hex digest of the files' bytes and the settings; names do not count."""
        digest = hashlib.blake2b(f"{self.name} {self.on_invalid} ".encode(), digest_size=16)
        of_records = self.name == "jsonl" or self.name in TABLES
        digest.update("\0".join(self.fields).encode() if of_records else b"")
        embedded = self.name in EMBEDDED
        for file in library.library_files() if embedded else map(Path, self.parts):
            digest.update(file.suffix.encode() if file.suffix in (".gz", ".zst") else b"")
            with documents.explained(file), file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "blake2b").digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Joined:
    """A source to train on and, after it, one of the same kind to evaluate on."""

    training: Source
    validation: Source

    def __iter__(self) -> Iterator[Document]:
        yield from self.training
        yield from self.validation

    def read(self, part: int, start: int = 0) -> Iterator[Document]:
        """See `Source.read`; the parts of both are counted through."""
        if part < self.training_parts:
            return self.training.read(part, start)
        return self.validation.read(part - self.training_parts, start)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of both."""
        return (*self.training.parts, *self.validation.parts)

    @property
    def training_parts(self) -> int:
        """How many of the parts are trained on."""
        return len(self.training.parts)

    @property
    def name(self) -> str:
        """The name of the source to train on."""
        return self.training.name

    @property
    def fields(self) -> Fields:
        """The fields of both."""
        return self.training.fields

    @property
    def paired(self) -> bool:
        """Whether each document has a second text."""
        return self.training.paired

    def fingerprint(self) -> str:
        """Return a hex digest of both."""
        return f"{self.training.fingerprint()} {self.validation.fingerprint()}"


def open_source(name: str, *, path: Sequence[str], fields: Fields, on_invalid: str) -> Source:
    """Return the source that `resolve(name, path)` names, over the files that `path` names.

    Raises ConfigError for a missing or empty file, an empty glob, files of two kinds.
    """
    resolved = resolve(name, path)
    if resolved in EMBEDDED and not library.library_files():
        raise ConfigError(
            f"data.source={name}: no Python files in {library.library_folder()}; "
            "set data.path to your own text"
        )
    files = () if resolved in EMBEDDED else tuple(_expand(path))
    for file in files:
        if name in EMBEDDED and path and kind(file.name) != resolved:
            raise ConfigError(
                f"data.path: {file} looks like {kind(file.name)} and {path[0]} like {resolved}; "
                "set data.source to text or jsonl"
            )
    return Source(resolved, tuple(map(str, files)) or (resolved,), fields, on_invalid)


def resolve(name: str, path: Sequence[str]) -> str:
    """Return the source that is read: with a path, its suffix decides unless `name` is of files.

    Raises ConfigError for an unknown name, files without a path, a path of two kinds.
    """
    if name not in NAMES:
        raise ConfigError(f"data.source={name}: no such source; use one of {', '.join(NAMES)}")
    if name not in EMBEDDED and not path:
        raise ConfigError(f"data.source={name}: no files named; set data.path to a file or glob")
    if name not in EMBEDDED or not path:
        return name
    kinds = sorted({kind(item) for item in path})
    if len(kinds) > 1:
        raise ConfigError(
            f"data.path={','.join(path)}: both {' and '.join(kinds)}; set data.source"
        )
    return kinds[0]


def kind(path: str) -> str:
    """Return "jsonl", "tsv", "csv" or "text" by the suffix, with `.gz` and `.zst` set aside."""
    suffix = path.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    return suffix if suffix in ("jsonl", *TABLES) else "text"


def _expand(path: Sequence[str]) -> Iterator[Path]:
    """Yield the files that paths and globs name, a glob's in order of name."""
    for item in path:
        pattern = os.path.expanduser(item)
        if os.path.exists(pattern) or not glob.has_magic(pattern):
            found = [pattern]
        else:
            found = sorted(
                name for name in glob.glob(pattern, recursive=True) if Path(name).is_file()
            )
        if not found:
            raise ConfigError(
                f"data.path={item}: no file matches; check the pattern (and quote it)"
            )
        for file in map(Path, found):
            if file.is_dir():
                raise ConfigError(f"data.path={item}: a folder; name its files, as in {item}/*")
            if not os.path.exists(file):
                raise ConfigError(f"data.path={item}: no such file; check the path")
            if not file.is_file():
                raise ConfigError(
                    f"data.path={item}: no regular file, which is read more than once"
                )
            yield file
