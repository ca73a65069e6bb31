"""Which pieces of a stream stand in each row: planned once, so that any row is a lookup.

Plans are made and kept by the preparation, or at the first start (`lm.data.plans`).

- split: the stream is cut every `capacity` tokens, wherever documents end; no table is needed.
- best_fit: a document longer than a row is cut at multiples of `capacity`; what is left of it and the
  shorter documents are put together by best-fit decreasing, so that none is cut without need ("Fewer
  Truncations Improve Language Modeling", Ding et al. 2024, arXiv 2404.10830).
- pad: each document, or each `capacity` tokens of one, has a row of its own.

A piece is [begin, begin + length) of the stream's places as inputs, the next token of each as its target; a
document has one input more than tokens, the end of text before it.

What differs from the paper: packing runs over windows of 2**20 documents, so that a corpus need not fit in
memory; a row stands at the place of its first piece, so that a part of a corpus is like the whole.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import manifests
from lm.data import shards

FORMAT = 1  # raise it when the same documents are packed otherwise
_WINDOW = 1 << 20  # documents packed at a time
_FOLDER, _ABOUT = "rows", shards.PLAN
_FILES = {"first": np.int64, "begins": np.int64, "lengths": np.int32}


class Plan(NamedTuple):
    """Row r has the pieces first[r] to first[r + 1]: arrays [rows + 1], [pieces], [pieces]."""

    first: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.first) - 1

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """Return (begin, length) of each piece of a row, in order."""
        where = slice(int(self.first[row]), int(self.first[row + 1]))
        return list(zip(self.begins[where].tolist(), self.lengths[where].tolist(), strict=True))


def make(name: str, starts: np.ndarray, num_inputs: int, capacity: int) -> Plan:
    """Return the plan of all `windows`, in memory."""
    parts = list(_joined(windows(name, starts, num_inputs, capacity)))
    return Plan(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def windows(name: str, starts: np.ndarray, num_inputs: int, capacity: int) -> Iterator[Plan]:
    """Yield the plan `name` ("best_fit" or "pad") of the documents that begin at `starts` [documents].

    Of each window of documents it is a plan of its own. `num_inputs` is where the last one ends, and
    `capacity` the tokens of a row.
    """
    for low in range(0, len(starts), _WINDOW):
        high = low + _WINDOW
        end = starts[high] if high < len(starts) else num_inputs
        ends = np.append(starts[low + 1 : high], end)
        begins, lengths = _cut(starts[low:high], ends, capacity)
        rows = _best_fit(lengths, capacity) if name == "best_fit" else np.arange(len(lengths))
        yield _table(rows, begins, lengths)


def _joined(parts: Iterable[Plan]) -> Iterator[Plan]:
    """Yield what is to stand one after the other in the arrays of one plan."""
    pieces = 0
    for part in parts:
        yield part._replace(first=part.first[:-1] + pieces)
        pieces += len(part.begins)
    yield Plan(np.full(1, pieces, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32))


def _cut(starts: np.ndarray, ends: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return begins and lengths of the pieces of documents, none longer than `capacity`."""
    counts = -(-(ends - starts) // capacity)
    last = np.cumsum(counts)
    inside = np.arange(last[-1]) - np.repeat(last - counts, counts)
    begins = np.repeat(starts, counts) + inside * capacity
    return begins, np.minimum(np.repeat(ends, counts) - begins, capacity)


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each piece [pieces], by best-fit decreasing.

    Pieces of one length are placed together: the fullest rows that still take one take as many as they can.
    """
    rows = np.zeros(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    sizes, firsts = np.unique(-lengths[order], return_index=True)
    open_rows: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # by the room left
    has_room = np.zeros(capacity + 1, bool)
    num_rows = 0
    for size, pieces in zip((-sizes).tolist(), np.split(order, firsts[1:]), strict=True):
        while len(pieces):
            room = size + int(has_room[size:].argmax())
            if has_room[room]:
                bins = np.concatenate(open_rows[room])
            else:
                room = capacity
                bins = num_rows + np.arange(-(-len(pieces) // (room // size)))
                num_rows += len(bins)
            each = room // size
            used = min(-(-len(pieces) // each), len(bins))
            open_rows[room] = [bins[used:]] if used < len(bins) else []
            has_room[room] = used < len(bins)
            bins = bins[:used]
            placed = pieces[: used * each]
            rows[placed] = np.repeat(bins, each)[: len(placed)]
            pieces = pieces[used * each :]
            left = [(bins, room - each * size)]
            if len(placed) < used * each:  # the last row took fewer
                last = len(placed) - (used - 1) * each
                left = [(bins[:-1], room - each * size), (bins[-1:], room - last * size)]
            for some, rest in left:
                if len(some) and rest:
                    open_rows[rest].append(some)
                    has_room[rest] = True
    return rows


def _table(rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> Plan:
    """Return the plan of pieces with their rows, which are ordered by their first pieces."""
    earliest = np.full(int(rows.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(earliest, rows, begins)
    rank = np.empty(len(earliest), np.int64)
    rank[np.argsort(earliest)] = np.arange(len(earliest))
    order = np.lexsort((begins, rank[rows]))
    first = np.append(0, np.cumsum(np.bincount(rank[rows], minlength=len(earliest))))
    return Plan(first.astype(np.int64), begins[order], lengths[order].astype(np.int32))


def save(
    folder: Path, name: str, capacity: int, plans: Mapping[str, Iterable[Plan]], *, fingerprint: str
) -> None:
    """Keep the plan of each split in a prepared corpus that is locked, whole or not at all.

    It is given by its windows, which are written as they come. `fingerprint` is of the corpus: a plan of
    another one is never taken.
    """
    place = folder / _FOLDER / f"{name}-{capacity}"
    place.parent.mkdir(exist_ok=True)
    for left in place.parent.glob(".*"):  # by a process that was killed: the corpus is locked
        shutil.rmtree(left, ignore_errors=True)
    unfinished = place.with_name(f".{place.name}")
    unfinished.mkdir()
    try:
        files = {}
        for split, parts in plans.items():
            places = {part: unfinished / f"{split}.{part}" for part in _FILES}
            with contextlib.ExitStack() as stack:
                opened = {p: stack.enter_context(file.open("wb")) for p, file in places.items()}
                for plan in _joined(parts):
                    for part, dtype in _FILES.items():
                        opened[part].write(getattr(plan, part).astype(dtype).tobytes())
            for file in places.values():
                files[file.name] = shards.recorded(file)
                manifests.sync(file)
        about = unfinished / _ABOUT
        about.write_text(json.dumps({"format": FORMAT, "fingerprint": fingerprint, "files": files}))
        manifests.sync(about)
        if place.exists() and (place / _ABOUT).read_bytes() == about.read_bytes():
            return  # a run may be reading it
        shutil.rmtree(place, ignore_errors=True)
        os.replace(unfinished, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def drop_damaged(folder: Path) -> None:
    """Remove the plans of a corpus that are damaged: they are soon made again."""
    for place in (folder / _FOLDER).glob("[!.]*"):
        try:
            files = json.loads((place / _ABOUT).read_text())["files"]
            shards.check_files(place, files, thorough=True)
        except (OSError, ValueError, LookupError, TypeError):  # Damaged is a ValueError
            shutil.rmtree(place)


def load(
    folder: Path, *, fingerprint: str, thorough: bool = False
) -> tuple[dict[tuple[str, int], dict[str, Plan]], dict[Path, dict[str, Any]]]:
    """Return the plans that `save` kept for a corpus, by name and capacity, by split; and unchecked files.

    Raises Damaged for one that is not whole; what is checked is as in `lm.data.shards.read_manifest`.
    """
    found: dict[tuple[str, int], dict[str, Plan]] = {}
    unchecked: dict[Path, dict[str, Any]] = {}
    for place in sorted((folder / _FOLDER).glob("[!.]*")):
        name, _, capacity = place.name.rpartition("-")
        if capacity.isdecimal() and (read := _read(place, fingerprint, thorough)):
            found[name, int(capacity)] = read[0]
            unchecked |= read[1]
    return found, unchecked


def read(
    folder: Path, name: str, capacity: int, *, fingerprint: str
) -> tuple[dict[str, Plan], dict[Path, dict[str, Any]]] | None:
    """Return the plan that `save` kept of each split, and unchecked files; None where there is none.

    Raises what `load` raises.
    """
    place = folder / _FOLDER / f"{name}-{capacity}"
    return _read(place, fingerprint, False) if place.exists() else None


def _read(
    place: Path, fingerprint: str, thorough: bool
) -> tuple[dict[str, Plan], dict[Path, dict[str, Any]]] | None:
    if (files := _files(place, fingerprint)) is None:
        return None
    unchecked = shards.check_files(place, files, thorough=thorough)
    return {
        split: Plan(*(shards.view(place / f"{split}.{p}", dtype) for p, dtype in _FILES.items()))
        for split in shards.SPLITS
    }, unchecked


def _files(place: Path, fingerprint: str) -> dict[str, dict[str, Any]] | None:
    """Return what is recorded of a plan's files; None for a plan of another corpus or format."""
    try:
        about = json.loads((place / _ABOUT).read_text())
        same = (about["format"], about["fingerprint"]) == (FORMAT, fingerprint)
        return dict(about["files"]) if same else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise shards.Damaged(place / _ABOUT, str(error)) from None
