"""Files on this machine and on any file system that fsspec knows, compressed or not.

A path with "://" in it is a URL (s3://, gs://, https://, hf://, memory://, zip://...::s3://...): fsspec opens
it, and finds keys and passwords where it looks for them (the environment, its own settings), never here.
"""

import contextlib
import errno
import glob
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lm.config import ConfigError
from lm.data import compressed

# Of archives, and of compressed files that are not decompressed here.
_REFUSED = (
    ".7z", ".br", ".lz", ".lz4", ".lzo", ".rar", ".snappy", ".sz", ".tar", ".tbz2", ".tgz", ".txz", ".z",
    ".zip",
)  # fmt: skip
# What tells one content of a remote file from another, as the file systems name it.
_MARKS = ("ETag", "etag", "md5Hash", "crc32c", "sha256", "generation", "blob_id", "content_md5")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
_OPEN: list[BinaryIO] = []


class Damaged(ConfigError):
    """A file that can be read only in part; `begin` is where its damaged compressed stream begins."""

    begin: int | None = None


def expand(path: Sequence[str]) -> Iterator[str]:
    """Yield the files that paths, URLs and globs name, a glob's in order of name.

    Raises ConfigError for a missing file, a folder, a glob that matches nothing, a file named twice.
    """
    seen = set()
    for item in path:
        item = item.removeprefix("file://")
        for file in _remote_files(item) if is_remote(item) else _local_files(item):
            if (place := real(file)) in seen:
                raise ConfigError(f"data.path: {printable(file)} is named twice; name it once")
            seen.add(place)
            _refuse_archive(file)
            yield file


def _refuse_archive(file: str) -> None:
    suffix = os.path.splitext(bare(file).removesuffix(packing(file)))[1]
    if suffix in _REFUSED:
        raise ConfigError(
            f"data.path: {printable(file)}: {suffix} is not read, but {', '.join(compressed.KINDS)} are; "
            "unpack it"
        )


def is_remote(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def printable(path: str) -> str:
    """Return a path without what a URL has behind its "?": it may be signed."""
    return path.partition("?")[0] if is_remote(path) else path


def real(path: str) -> str:
    """Return what is the same of all paths of one file."""
    return path if is_remote(path) else os.path.realpath(path)


def bare(path: str) -> str:
    """Return a path in small letters, without what a URL has around the file's name.

    Of a chain of fsspec's, such as simplecache::s3://bucket/x.jsonl, the first link has it that is a URL.
    """
    links = printable(path).split("::") if is_remote(path) else [path]
    return next((link for link in links if is_remote(link)), links[0]).lower()


def packing(path: str) -> str:
    """Return the suffix that says how a file is compressed, "" where it is not."""
    return next((suffix for suffix in compressed.KINDS if bare(path).endswith(suffix)), "")


def mark(path: str) -> bytes:
    """Return what changes when the file does: a digest of its bytes.

    Of a remote file its size and its checksum or else its times, and only where it has none of them its
    bytes: reading them would be a download.
    """
    if not is_remote(path):
        with explained(path), open(path, "rb") as handle:
            return hashlib.file_digest(handle, "blake2b").digest()
    size, known = _about(path)
    if known:
        return hashlib.blake2b(repr([printable(path), size, known]).encode()).digest()
    digest = hashlib.blake2b()
    with _raw(path) as handle:
        while data := handle.read(1 << 20):
            digest.update(data)
    return digest.digest()


def states(paths: Sequence[str], *, anew: bool = False) -> Iterator[Any]:
    """Yield of each file what changes with it and is known without reading it; with `anew`, asked for again.

    That is its size, and its time or a remote one's checksum; None for one of this machine that is gone.
    """
    systems: list[Any] = []
    for path in paths:
        if is_remote(path):
            system, _ = _connect(path)
            if anew and system not in systems:
                systems.append(system)
                system.invalidate_cache()
            yield _about(path)
        else:
            stat = os.stat(path) if os.path.exists(path) else None
            yield stat and (stat.st_size, stat.st_mtime_ns)


def _about(url: str) -> tuple[int | None, list[tuple[str, str]]]:
    """Return the size of a remote file and its checksum, or else its times; neither where none is known."""
    system, name = _connect(url)
    with _asked(url):
        info = system.info(name)
    found = ({key: str(info[key]) for key in names if info.get(key)} for names in (_MARKS, _TIMES))
    return info.get("size"), sorted(next(filter(None, found), {}).items())


def _local_files(item: str) -> Iterator[str]:
    pattern = os.path.expanduser(item)
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        found = [pattern]
    else:
        found = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not found:
        raise ConfigError(f"data.path={item}: no file matches; check the pattern (and quote it)")
    for file in map(Path, found):
        if file.is_dir():
            raise ConfigError(
                f"data.path={item}: a folder; name its files, as in {item}/*, or set "
                "data.source=huggingface"
            )
        if not os.path.exists(file):
            raise ConfigError(f"data.path={item}: no such file; check the path")
        if not file.is_file():
            raise ConfigError(f"data.path={item}: no regular file, which is read more than once")
        yield str(file)


def _remote_files(item: str) -> Iterator[str]:
    system, name = _connect(item)
    chain = item.partition("::")[1] + item.partition("::")[2]
    with _asked(item):
        # A "?" begins a query, as in https://host/file.txt?version=3, and is no pattern.
        if "*" in printable(item) or "[" in printable(item):
            matches = system.glob(name, detail=True)
            names = sorted(name for name in matches if matches[name]["type"] == "file")
            found = [system.unstrip_protocol(name) + chain for name in names]
        else:
            try:
                folder = system.info(name)["type"] == "directory"
            except FileNotFoundError:
                found = []
            else:
                found = [item]
                if folder:
                    raise ConfigError(f"data.path={item}: a folder; name its files, as in {item}/*")
    if not found:
        raise ConfigError(f"data.path={printable(item)}: no such file; check the path or pattern")
    yield from found


def _connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the file's name in it."""
    try:
        import fsspec
    except ImportError:
        raise ConfigError(
            f"data.path={printable(url)}: a URL needs fsspec; pip install -e '.[data]'"
        ) from None
    with _asked(url):
        return fsspec.core.url_to_fs(url)


@contextlib.contextmanager
def _asked(url: str) -> Iterator[None]:
    """Turn what goes wrong with a remote file system into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # every file system has errors of its own kind
        message = str(error).partition("\n")[0].replace(url, printable(url))
        raise ConfigError(
            f"data.path={printable(url)}: {type(error).__name__} ({message}); check the URL, what its file "
            "system needs installed, and your keys"
        ) from error


class _Remote(io.RawIOBase):
    """A file of fsspec's whose errors, of any kind, are OSErrors."""

    def __init__(self, url: str, seek: bool):
        system, name = _connect(url)
        # Read in order an HTTP server need not know of ranges, and is asked once.
        in_order = {} if seek or "https" not in system.protocol else {"block_size": 0}
        self._seek = seek
        with _asked(url):
            self._file = system.open(name, "rb", **in_order)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seek

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # every file system has errors of its own kind
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def explained(file: str | Path, field: str = "data.path") -> Iterator[None]:
    """Turn what goes wrong while `file` is read into a ConfigError that names `field`."""
    name = printable(str(file))
    try:
        yield
    except compressed.Corrupt as error:
        message = f"{field}: {name} is damaged ({error}); restore it, or decompress it by hand"
        damaged = Damaged(message)
        damaged.begin = error.begin
        raise damaged from error
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {name} ({error.strerror or error})") from error


@contextlib.contextmanager
def opened(
    file: str | Path, field: str = "data.path", *, seek: bool = False, begin: int = 0
) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed by its suffix; in order, or anywhere with `seek`.

    `begin` is the place of a compressed stream to begin with.
    """
    kind = packing(str(file))
    with explained(file, field), _raw(str(file), seek) as raw:
        _OPEN.append(raw)
        try:
            if kind:
                compressed.skip(raw, begin)
                yield io.BufferedReader(compressed.Streams(raw, kind, begin), compressed.CHUNK)
            else:
                yield raw
        finally:
            _OPEN.remove(raw)


def position() -> int | None:
    """Return how far the file that was opened last and is open was read, in bytes as they lie there."""
    return _OPEN[-1].tell() if _OPEN else None


def next_stream(file: str, begin: int | None) -> int | None:
    """Return where behind byte `begin`, where one is damaged, the next compressed stream begins."""
    if begin is None:
        return None
    with explained(file), _raw(file) as raw:
        return compressed.next_stream(raw, packing(file), begin)


def _raw(file: str, seek: bool = False) -> BinaryIO:
    if is_remote(file):
        return io.BufferedReader(_Remote(file, seek), compressed.CHUNK)
    return open(file, "rb")
