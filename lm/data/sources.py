"""Where documents come from: the user's files, and prose and code that every Python carries.

One function a source; each yields its documents in the same order every time. The embedded sources
read the standard library's files with `ast` and never import them: importing runs code.
"""

import ast
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import decode_source
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import zstandard

from lm.config import ConfigError

EMBEDDED = ("python_docs", "python_source")
NAMES = (*EMBEDDED, "text", "jsonl")
_EXCLUDED = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"),
    *("site-packages", "dist-packages"),
}
_MIN_DOCSTRING = 40  # characters; shorter ones ("See above.") teach nothing
_BYTE_ORDER_MARK = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One text, and how many invalid byte sequences in it were replaced by U+FFFD."""

    text: str
    replaced: int = 0


@dataclass(frozen=True)
class Source:
    """The documents of one source, to be read any number of times in the same order."""

    name: str  # one of NAMES
    files: tuple[Path, ...]
    field: str  # of JSONL
    on_invalid: str  # replace or refuse

    # What was parsed is kept: the embedded corpora are small and parsing takes seconds.
    _kept: list[Document] = dataclasses.field(default_factory=list, repr=False, compare=False)

    def __iter__(self) -> Iterator[Document]:
        if self.name == "jsonl":
            yield from jsonl(self.files, field=self.field, on_invalid=self.on_invalid)
        elif self.name == "text":
            yield from text(self.files, on_invalid=self.on_invalid)
        elif self._kept:
            yield from self._kept
        else:
            documents = []
            read = python_docs if self.name == "python_docs" else python_source
            for document in read(self.files):
                documents.append(document)
                yield document
            self._kept.extend(documents)

    def fingerprint(self) -> str:
        """Return a hex digest of the files' bytes and the settings; names do not count."""
        digest = hashlib.blake2b(f"{self.name} {self.on_invalid} ".encode(), digest_size=16)
        digest.update(self.field.encode() if self.name == "jsonl" else b"")
        for file in self.files:
            digest.update(file.suffix.encode() if file.suffix in (".gz", ".zst") else b"")
            with _explained(file), file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "blake2b").digest())
        return digest.hexdigest()


def open_source(name: str, *, path: Sequence[str], field: str, on_invalid: str) -> Source:
    """Return the source that `resolve(name, path)` names, over the files that `path` names.

    Raises ConfigError for a missing or empty file, an empty glob, files of two kinds.
    """
    resolved = resolve(name, path)
    files = tuple(_library_files()) if resolved in EMBEDDED else tuple(_expand(path))
    if resolved in EMBEDDED and not files:
        raise ConfigError(
            f"data.source={name}: no Python files in {_library()}; set data.path to your own text"
        )
    for file in files:
        if name in EMBEDDED and path and kind(file.name) != resolved:
            raise ConfigError(
                f"data.path: {file} looks like {kind(file.name)} and {path[0]} like {resolved}; "
                "set data.source to text or jsonl"
            )
    return Source(resolved, files, field, on_invalid)


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
        raise ConfigError(f"data.path={','.join(path)}: both text and JSONL; set data.source")
    return kinds[0]


def kind(path: str) -> str:
    """Return "jsonl" or "text" by the suffix, with `.gz` and `.zst` set aside."""
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    return "jsonl" if name.endswith(".jsonl") else "text"


def text(files: Iterable[Path], *, on_invalid: str) -> Iterator[Document]:
    """Yield each file as one document, line ends as they are."""
    for file in files:
        with _open(file) as handle:
            raw = handle.read()
        if b"\0" in raw[:4096]:
            raise ConfigError(
                f"data.path: {file} is no UTF-8 text (it holds NUL bytes); convert it, or name another"
            )
        content, replaced = _decode(raw, 0, file, on_invalid)
        content = content.removeprefix(_BYTE_ORDER_MARK)
        if not content:
            raise ConfigError(f"data.path: {file} is empty; name a file that holds text")
        yield Document(content, replaced)


def jsonl(files: Iterable[Path], *, field: str, on_invalid: str) -> Iterator[Document]:
    """Yield the string in `field` of every line's JSON object; blank lines are skipped."""
    for file in files:
        offset, number = 0, 0
        with _open(file) as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield _record(line, offset, f"{file}:{number}", field, on_invalid)
                offset += len(line)
        if not number:
            raise ConfigError(f"data.path: {file} is empty; name a file that holds JSON lines")


def python_docs(files: Iterable[Path]) -> Iterator[Document]:
    """Yield the language reference's topics, then a document of docstrings for each module.

    A docstring stands below its dotted name. Repeats are dropped: a docstring seen before, and a
    topic of which a longer one holds more than half (the reference nests its sections).
    """
    seen: set[str] = set()
    yield from map(_whole, _unique_topics(_library() / "pydoc_data" / "topics.py", seen))
    for file in files:
        tree = _parsed(file)[1]
        parts = []
        for name, docstring in _docstrings(tree, _module(file)) if tree else ():
            if len(docstring) >= _MIN_DOCSTRING and docstring not in seen:
                seen.add(docstring)
                parts.append(f"{name}\n\n{docstring}")
        if parts:
            yield _whole("\n\n\n".join(parts) + "\n")


def python_source(files: Iterable[Path]) -> Iterator[Document]:
    """Yield every file that is valid Python, `pydoc_data.topics` (prose in quotes) left out."""
    for file in files:
        source, tree = _parsed(file)
        if tree and _module(file) != "pydoc_data.topics":
            yield _whole(source)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _library_files() -> list[Path]:
    """Return the standard library's files without its tests, in an order of names alone."""
    root = _library()
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - _EXCLUDED
        # _sysconfigdata is this machine's build settings: no text, and different everywhere.
        python = (f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata"))
        names += [PurePosixPath(Path(folder, file).relative_to(root).as_posix()) for file in python]
    return [root / name for name in sorted(names)]


def _module(file: Path) -> str:
    parts = file.relative_to(_library()).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)


def _parsed(file: Path) -> tuple[str, ast.Module | None]:
    """Return a file's text and its tree; None where it is not valid Python (templates)."""
    try:
        source = decode_source(file.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            return source, ast.parse(source)
    except (SyntaxError, ValueError):
        return "", None


def _unique_topics(file: Path, seen: set[str]) -> list[str]:
    """Return the topics in order of name, repeats left out; their paragraphs go into `seen`."""
    tree = _parsed(file)[1] if file.exists() else None
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)] if tree else []
    topics = {key: value for node in dicts for key, value in ast.literal_eval(node).items()}
    unique = {}
    for name, topic in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [part for part in topic.split("\n\n") if len(part) >= _MIN_DOCSTRING]
        repeated = sum(len(part) for part in paragraphs if part in seen)
        if 2 * repeated <= sum(len(part) for part in paragraphs):
            unique[name] = topic
        seen.update(paragraphs)
    return [unique[name] for name in sorted(unique)]


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a module, class or function and of those inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        docstring := ast.get_docstring(node)
    ):
        yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child, name)


def _whole(content: str) -> Document:
    return Document(*_SURROGATE.subn("\ufffd", content))


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
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        message = f"data.path: {file} is damaged ({error}); restore it, or decompress it by hand"
        raise ConfigError(message) from error
    except OSError as error:
        raise ConfigError(f"data.path: cannot read {file} ({error.strerror or error})") from error


@contextlib.contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed by its suffix."""
    with _explained(file), file.open("rb") as raw:
        if file.suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw)  # type: ignore[misc]
        elif file.suffix == ".zst":
            yield io.BufferedReader(_Zstandard(raw), 1 << 16)
        else:
            yield raw


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


def _record(line: bytes, offset: int, where: str, field: str, on_invalid: str) -> Document:
    content, replaced = _decode(line, offset, where, on_invalid)
    try:
        record = json.loads(content.removeprefix(_BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data.path: {where}: not JSON ({error}); repair that line") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        holds = ", ".join(map(str, record)) if isinstance(record, dict) else "no object"
        raise ConfigError(
            f"data.field={field}: {where} has no text by that name (it holds {holds}); "
            "set data.field or repair that line"
        )
    document = _whole(record[field])
    if document.replaced and on_invalid == "refuse":
        raise ConfigError(
            f"data.on_invalid=refuse: {where}: a lone surrogate is not text; replace counts it"
        )
    return Document(document.text, document.replaced + replaced)
