"""A prepared corpus on disk: its files, what makes them whole, and a stream over many shards.

`manifest.json`, written last, has every file's size and SHA-256, and in `shards` each one's documents and
tokens (not counting the first end of text); a folder without one is unfinished. Files:
`tokenizer/`; `train-00000.tokens`, ... and the same of validation, little-endian uint16 or uint32, one
stream cut anywhere between documents; `train.starts`, int64, where each document's leading end of text is in
the stream; `train.origins`, for each document the part of the source (uint32) and the record in it (int64).
"""

import bisect
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm import manifests
from lm.config import ConfigError
from lm.manifests import hash_file, write_whole

SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
PLAN = "about.json"  # the manifest of a plan of rows
ORIGIN = np.dtype([("part", "<u4"), ("record", "<i8")])
_TRIES, _WAIT = 20, 3.0  # of a file in the background, seconds apart
_DIGESTED = (
    64 << 20
)  # bytes that are checked by digest when a corpus is opened, so that a start is quick


class Damaged(ConfigError):
    """A file of a prepared corpus that cannot be used; `cached`, one that the next start makes again."""

    def __init__(self, file: Path, why: str, cached: bool = False):
        super().__init__(
            f"data.path: {file} of the cache is damaged ({why}); start again, which makes it anew"
            if cached
            else f"data.path: {file} is damaged ({why}); restore it, or prepare the corpus again elsewhere"
        )
        self.file, self.why, self.cached = file, why, cached

    def __reduce__(self):
        return Damaged, (self.file, self.why, self.cached)


class Tokens(Sequence[Any]):
    """The tokens of a stream that lies in several arrays, by place or by slice."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self.shards = list(shards)
        self.dtype = self.shards[0].dtype
        self._ends = np.cumsum([len(shard) for shard in self.shards]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place):
        """Return the token at `place`, or the tokens of a slice of step 1 (a view, within a shard)."""
        if not isinstance(place, slice):
            place = range(len(self))[place]
            number = bisect.bisect_right(self._ends, place)
            return self.shards[number][place - self._ends[number] + len(self.shards[number])]
        begin, end, step = place.indices(len(self))
        assert step == 1, step
        number = bisect.bisect_right(self._ends, begin)
        if end <= begin:
            return self.shards[0][:0]
        pieces = []
        while begin < end:
            shard, first = self.shards[number], self._ends[number] - len(self.shards[number])
            pieces.append(shard[begin - first : end - first])
            begin, number = self._ends[number], number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def __array__(self, dtype=None, copy=None):
        return np.concatenate(self.shards).astype(dtype or self.dtype)


def view(file: Path, dtype: Any) -> np.ndarray:
    """Return the array in `file`, read as it is used; an empty one where there is nothing."""
    if not file.exists() or not file.stat().st_size:
        return np.zeros(0, dtype)
    # A plain view: slicing numpy's memmap class costs ten times a row's copy.
    return np.memmap(file, dtype, "r").view(np.ndarray)


def recorded(file: Path) -> dict[str, Any]:
    """Return a file's size and SHA-256."""
    return {"size": file.stat().st_size, "sha256": hash_file(file)}


def go_on(digest: Any, file: Path, begin: int, end: int) -> None:
    """Update a digest with the bytes of a file from `begin` up to `end`."""
    with file.open("rb") as handle:
        handle.seek(begin)
        while begin < end and (data := handle.read(min(end - begin, 1 << 20))):
            digest.update(data)
            begin += len(data)


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Write the manifest, which makes `folder` whole: of a kill it is there or not."""
    text = json.dumps(body)
    whole = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
    write_whole(folder / MANIFEST, json.dumps(whole))


def is_prepared(folder: str | Path) -> bool:
    """Return whether a folder holds a corpus whose preparation is finished."""
    return Path(os.path.expanduser(folder), MANIFEST).is_file()


def read_manifest(folder: Path, *, thorough: bool = False) -> dict[str, Any]:
    """Return the manifest of a whole folder.

    Every file's size is checked, and digests up to 64 MB in all, or with `thorough` each; those left are in
    `unchecked` of what is returned. Raises Damaged for what is missing or changed.
    """
    try:
        whole = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        body, files = whole["body"], whole["body"]["files"]
        if whole["sha256"] != hashlib.sha256(json.dumps(body).encode()).hexdigest():
            raise ValueError("its digest is another")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(folder / MANIFEST, str(error)) from None
    return {**body, "unchecked": check_files(folder, files, thorough=thorough)}


def check_files(
    folder: Path, files: dict[str, dict[str, Any]], *, thorough: bool
) -> dict[Path, dict[str, Any]]:
    """Raise Damaged for a file that is not as recorded: by its size, and its digest up to 64 MB in all.

    Returns the files whose digest is still to be compared, and what is recorded of them.
    """
    left, unchecked = _DIGESTED, {}
    for name, record in files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else -1
        if size != record["size"]:
            raise Damaged(file, "missing" if size < 0 else f"{size} bytes of {record['size']}")
        if thorough or size <= left:
            left -= size
            if recorded(file) != record:
                raise Damaged(file, "its SHA-256 is another")
        else:
            unchecked[file] = record
    return unchecked


class Check:
    """Compares digests in a thread, while training goes on: those that opening a large corpus left out.

    What is damaged below a folder of `made_again` loses its manifest, so that the next start makes it again.
    """

    def __init__(
        self, unchecked: Mapping[Path, dict[str, Any]], *, made_again: Sequence[Path] = ()
    ):
        self._unchecked, self._damaged = dict(unchecked), list[Damaged]()
        self._made_again = made_again
        self._thread = threading.Thread(target=self._compare, name="digests", daemon=True)
        self._thread.start()

    def raise_found(self) -> None:
        """Raise Damaged for a file that was found not to be as recorded."""
        if self._damaged:
            raise self._damaged[0]

    def finish(self, asked: Callable[[], bool]) -> None:
        """Wait until all files are compared, or one has `asked` to stop. Raises what `raise_found` raises."""
        while self._thread.is_alive() and not asked():
            self._thread.join(0.2)
        self.raise_found()

    def _compare(self) -> None:
        for file, record in self._unchecked.items():
            passing = False
            try:
                if _recorded_in_time(file) == record:
                    continue
                why = "its SHA-256 is another"
            except OSError as error:
                why, passing = error.strerror or str(error), error.errno in manifests.PASSING
            given_up = not passing and any(map(file.is_relative_to, self._made_again))
            self._damaged.append(Damaged(file, why, given_up and _give_up(file)))


def _recorded_in_time(file: Path) -> dict[str, Any]:
    """Return what `recorded` does; an error that passes is waited for."""
    for left in reversed(range(_TRIES)):
        try:
            return recorded(file)
        except OSError as error:
            if not left or error.errno not in manifests.PASSING:
                raise
            time.sleep(_WAIT)
    raise AssertionError


def _give_up(file: Path) -> bool:
    """Move the manifest of what `file` is a part of aside; return whether there is none now."""
    try:
        for folder in (file.parent, file.parent.parent):
            for manifest in (folder / MANIFEST, folder / PLAN):
                if manifest.exists():
                    manifest.replace(manifest.with_name(f"{manifest.name}.damaged"))
    except OSError:  # a cache that is only read
        return False
    return True
