"""Where documents come from: files, datasets, databases, and what every Python carries.

A source has parts, each read in order and from any record on, so that preparation can share the work and be
resumed, and so that part and number say where a document came from.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm.config import ConfigError
from lm.data import documents, files, huggingface, library, mongodb, parquet
from lm.data.documents import TABLES, Document, Fields, Reading
from lm.data.huggingface import WHOLE, Dataset

EMBEDDED = library.NAMES
_FILES: dict[str, Callable[[str, int, Reading], Iterator[Document]]] = {
    "text": documents.text,
    "jsonl": documents.jsonl,
    **{name: functools.partial(documents.table, delimiter=TABLES[name]) for name in TABLES},
    "parquet": parquet.read,
}
_READERS: dict[str, Callable[[Any, int, Reading], Iterator[Document]]] = {
    **dict.fromkeys(EMBEDDED, library.read),
    **_FILES,
    "huggingface": huggingface.read,
    "mongodb": mongodb.read,
}
NAMES = tuple(_READERS)
WITH_FIELDS = tuple(name for name in NAMES if name not in (*EMBEDDED, "text"))
# Of a user in a URL; of MongoDB's it may have a "/" in it, or stand in an option.
_PASSWORD = re.compile(
    r"(?<!github)://[^/]*:[^/]*@|^mongodb[^/]*//.*:.*@|[?&;]\w*password=", re.IGNORECASE
)


@dataclass(frozen=True)
class Source:
    """The documents of one source, to be read any number of times in the same order."""

    name: str  # one of NAMES
    parts: tuple[str, ...]  # read one after the other: files, shards, a collection, printable
    reading: Reading
    places: tuple[Any, ...] = field(repr=False)  # what the reader of each part is given

    def __iter__(self) -> Iterator[Document]:
        for part in range(len(self.parts)):
            yield from self.read(part)

    def read(self, part: int, start: int = 0) -> Iterator[Document]:
        """Yield the documents of `parts[part]` in order, beginning with number `start`, counted from 0.

        A record that is empty or broken counts, and is yielded without text.
        """
        return _READERS[self.name](self.places[part], start, self.reading)

    @property
    def fields(self) -> Fields:
        """The names of what is read of a record."""
        return self.reading.fields

    @property
    def paired(self) -> bool:
        """Whether each document has a second text."""
        return self.name == "python_pairs" or len(self.fields.names) == 2

    def fingerprint(self) -> str:
        """Return a hex digest of the content and the settings; names of files do not count.

        The content of a dataset of the hub's is its commit, of a remote file its checksum or time, of a
        collection its size and last record.
        """
        reading = self.reading
        settings = f"{self.name} {reading.on_invalid} {reading.on_broken} "
        if reading.on_broken == "skip":
            settings += f"{reading.max_bytes} "
            if self.name == "jsonl" and any(files.packing(str(part)) for part in self.parts):
                settings += "streams "  # what is read behind damage
            if self.name == "tsv":
                settings += "lines "  # what is read behind one that is too long
        digest = hashlib.blake2b(settings.encode(), digest_size=16)
        if self.name in WITH_FIELDS:
            digest.update("\0".join(self.fields).encode())
        for mark in self._marks():
            digest.update(mark)
        return digest.hexdigest()

    def states(self, *, anew: bool = False) -> dict[str, Any]:
        """Return what changes when a part does while it is read, of all but embedded text and the hub's.

        Without `anew` a remote file's may be what was known of it when it was found.
        """
        if self.name == "mongodb":
            return dict(zip(self.parts, mongodb.marks(self.places), strict=True))
        parts, places = self.parts, self.places
        if self.name in EMBEDDED or self.name == "huggingface":
            parts = places = () if self.name in EMBEDDED else huggingface.local_files(self.places)
        return dict(zip(parts, files.states(places, anew=anew), strict=True))

    def _marks(self) -> Iterator[bytes]:
        if self.name == "huggingface":
            yield from huggingface.marks(self.places)
        elif self.name == "mongodb":
            yield from mongodb.marks(self.places)
        else:
            embedded = self.name in EMBEDDED
            for file in map(str, library.library_files() if embedded else self.places):
                yield files.packing(file).encode()
                yield files.mark(file)


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

    def states(self, *, anew: bool = False) -> dict[str, Any]:
        """See `Source.states`."""
        return self.training.states(anew=anew) | self.validation.states(anew=anew)

    def fingerprint(self) -> str:
        """Return a hex digest of both."""
        return f"{self.training.fingerprint()} {self.validation.fingerprint()}"


def open_source(
    name: str,
    *,
    path: Sequence[str],
    fields: Fields,
    on_invalid: str,
    on_broken: str = "refuse",
    max_bytes: int = 1 << 28,
    dataset: Dataset = WHOLE,
) -> Source:
    """Return the source that `resolve(name, path)` names, over what `path` names.

    Raises ConfigError for a missing or empty file, an empty glob, files of two kinds, a dataset or collection
    that is not there.
    """
    resolved = resolve(name, path)
    if resolved in EMBEDDED:
        if not library.library_files():
            raise ConfigError(
                f"data.source={name}: no Python files in {library.library_folder()}; "
                "set data.path to your own text"
            )
        named: list[tuple[str, Any]] = [(resolved, resolved)]
    elif resolved == "huggingface":
        named = list(huggingface.locate(path, dataset))
    elif resolved == "mongodb":
        named = list(mongodb.locate(path))
    else:
        named = [(files.printable(file), file) for file in files.expand(path)]
        for part, file in named:
            if resolved == "parquet" and (packed := files.packing(file)):
                raise ConfigError(
                    f"data.path: {part}: Parquet is read at any place, and {packed} from its beginning; "
                    "decompress it, as its columns are compressed anyway"
                )
            if name in EMBEDDED and kind(file) != resolved:
                raise ConfigError(
                    f"data.path: {part} looks like {kind(file)} and {path[0]} like {resolved}; "
                    "set data.source to text or jsonl"
                )
    parts, places = zip(*named, strict=True)
    return Source(resolved, parts, Reading(fields, on_invalid, on_broken, max_bytes), places)


def resolve(name: str, path: Sequence[str]) -> str:
    """Return the source that is read: with a path, its suffix decides unless `name` is of files.

    Raises ConfigError for an unknown name, files without a path, a path of two kinds or with a password.
    """
    if name not in NAMES:
        raise ConfigError(f"data.source={name}: no such source; use one of {', '.join(NAMES)}")
    refuse_passwords("path", path)
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


def refuse_passwords(field: str, paths: Sequence[str]) -> None:
    """Raise ConfigError for a password in one of the paths of a field of `data`."""
    if any(map(_PASSWORD.search, paths)):
        raise ConfigError(
            f"data.{field}: a password in it would be written into a run's files; leave it out and set the "
            f"environment variable {mongodb.PASSWORD} for MongoDB, what fsspec's file system asks for else"
        )


def kind(path: str) -> str:
    """Return which source a path is of: a database's by its scheme, files' by their suffix, else text.

    A suffix of compression is set aside.
    """
    if path.startswith(("mongodb://", "mongodb+srv://")):
        return "mongodb"
    suffix = files.bare(path).removesuffix(files.packing(path)).rpartition(".")[2]
    if suffix == "ndjson":
        return "jsonl"
    if suffix == "json":
        raise ConfigError(
            f"data.path={path}: JSON; set data.source=jsonl if each line is a record, or text"
        )
    return suffix if suffix in _FILES else "text"
