"""Compressed streams of bytes, read in order: many that follow each other, each whole or an error.

A file may hold several streams (gzip calls them members, zstd frames), as files that were joined do. Where
one is damaged, those after it are found again by the bytes that each begins with.
"""

import bz2
import io
import lzma
import os
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import zstandard

CHUNK = 1 << 16  # bytes that are read at a time
_MEMORY = 1 << 30  # bytes that an .xz may ask for: `xz -9` takes 65 MB


class Corrupt(Exception):
    """A stream that is damaged or cut off; `begin` is the place of its first byte."""

    def __init__(self, error: Exception | str, begin: int):
        super().__init__(f"{error}, in the stream that begins at byte {begin:,}")
        self.begin = begin


class _Stream:
    """What the streams of two libraries have in common with `bz2.BZ2Decompressor`."""

    _inner: Any

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


class _Gzip(_Stream):
    """A gzip member, with the methods of `bz2.BZ2Decompressor`."""

    def __init__(self):
        self._inner = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def decompress(self, data: bytes, size: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, size)

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail


class _Zstandard(_Stream):
    """A zstd frame, with the methods of `bz2.BZ2Decompressor`; sizes are not asked for."""

    needs_input = True

    def __init__(self):
        self._inner = zstandard.ZstdDecompressor().decompressobj()

    def decompress(self, data: bytes, size: int) -> bytes:
        return self._inner.decompress(data)


class _Kind(NamedTuple):
    """How a stream is decompressed, and what tells that one begins."""

    begin: Callable[[], Any]
    magic: bytes  # empty where nothing tells a stream's beginning
    piece: int = CHUNK  # bytes at a time
    early: bool = False  # whether something comes of the first piece


def _lzma() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=_MEMORY)


KINDS = {
    ".gz": _Kind(_Gzip, b"\x1f\x8b\x08", early=True),
    ".zst": _Kind(_Zstandard, b"\x28\xb5\x2f\xfd", 1 << 11),  # of which at most 64 MiB come
    ".bz2": _Kind(bz2.BZ2Decompressor, b"BZh"),
    ".xz": _Kind(_lzma, b"\xfd7zXZ\0"),
    ".lzma": _Kind(_lzma, b""),
}
_ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError, ValueError)


class Streams(io.RawIOBase):
    """What is in the streams of `raw`, which is read on from byte `begin`. Raises Corrupt."""

    def __init__(self, raw: BinaryIO, suffix: str, begin: int = 0):
        self._raw, self._kind = raw, KINDS[suffix]
        self._read = self._begin = begin  # bytes up to here, and where the present stream begins
        self._stream: Any = None
        self._unread = b""  # what was read and is of the next stream
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            self._ready = memoryview(b"")  # else what it was a part of is held
            if self._stream is None and not self._starts():
                return 0
            data = self._unread
            if not data and self._stream.needs_input:
                data = self._more()
                if not data:
                    raise Corrupt("it is cut off", self._begin)
            self._unread = b""
            try:
                self._ready = memoryview(self._stream.decompress(data, CHUNK))
            except _ERRORS as error:
                raise Corrupt(error, self._begin) from error
            if self._stream.eof:
                self._stream, self._unread = None, self._stream.unused_data
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _starts(self) -> bool:
        """Begin the next stream, behind zeros that fill up the last one; return whether there is one."""
        filled = self._kind.magic in (
            KINDS[".gz"].magic,
            KINDS[".xz"].magic,
        )  # with zeros, as tar does
        while not (rest := self._unread.lstrip(b"\0" if filled else b"")):
            self._unread = self._more()
            if not self._unread:
                return False
        self._begin, self._unread = self._read - len(rest), rest
        self._stream = self._kind.begin()
        return True

    def _more(self) -> bytes:
        data = self._raw.read(self._kind.piece)
        self._read += len(data)
        return data


def skip(raw: BinaryIO, size: int) -> None:
    """Go on by `size` bytes: not every file system can seek."""
    if size > 0 and raw.seekable():
        raw.seek(size, os.SEEK_CUR)
        return
    while size > 0 and (data := raw.read(min(size, 1 << 20))):
        size -= len(data)


def next_stream(raw: BinaryIO, suffix: str, begin: int) -> int | None:
    """Return where the first stream behind byte `begin` is whose beginning can be read; None without."""
    kind = KINDS[suffix]
    if not kind.magic:
        return None
    place, data = begin + 1, b""
    skip(raw, place)
    while True:
        found = data.find(kind.magic)
        if found < 0:
            found = max(0, len(data) - len(kind.magic) + 1)
        place, data = place + found, data[found:]
        while len(data) < CHUNK and (more := raw.read(CHUNK)):
            data += more
        if data.startswith(kind.magic):
            if _opens(kind, data[: kind.piece]):
                return place
            place, data = place + 1, data[1:]
        elif kind.magic not in data and len(data) < CHUNK:
            return None


def _opens(kind: _Kind, data: bytes) -> bool:
    """Return whether a stream begins with `data`: by chance its magic stands anywhere."""
    stream = kind.begin()
    try:
        return bool(stream.decompress(data, CHUNK)) or stream.eof or not kind.early
    except _ERRORS:
        return False
