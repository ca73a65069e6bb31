"""Write the shards of a corpus, and the journal that lets a killed preparation go on."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lm import manifests
from lm.data import shards
from lm.data.shards import ORIGIN, SPLITS

JOURNAL = "journal.jsonl"
LOCK = ".lock"
# Of the journal. A line of 1, which has no number, names the files of the lines before it again.
_FORMAT = 2
# Lists of the documents, with the bytes of each entry.
_WIDTHS = {
    f"{split}.{kind}": width
    for split in SPLITS
    for kind, width in (("starts", 8), ("origins", ORIGIN.itemsize))
}


class Encoded(NamedTuple):
    """Encoded texts one after the other, each closed by end of text."""

    tokens: np.ndarray  # [tokens], in the type of the shards
    lengths: np.ndarray  # [texts], in tokens, end of text included
    sizes: np.ndarray  # [texts], bytes of UTF-8
    splits: np.ndarray  # [texts], index of SPLITS
    origins: np.ndarray  # [texts], ORIGIN
    following: tuple[int, int]  # part and record of the document that comes next
    counts: Counter  # of what was read and done
    labels: np.ndarray  # [texts], the label that a text is, None of the others

    def only(self, kept: np.ndarray) -> "Encoded":
        """Return the texts where `kept` [texts] is true."""
        return self._replace(
            tokens=self.tokens[np.repeat(kept, self.lengths)],
            lengths=self.lengths[kept],
            sizes=self.sizes[kept],
            splits=self.splits[kept],
            origins=self.origins[kept],
            labels=self.labels[kept],
        )


def _zeros() -> dict[str, int]:
    return dict.fromkeys(SPLITS, 0)


@dataclass
class Progress:
    """What all finished shards hold, and with which document the next one begins."""

    following: tuple[int, int] = (0, 0)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the shards
    lists: dict[str, str] = field(default_factory=dict)  # SHA-256 of what is in each list so far
    documents: dict[str, int] = field(default_factory=_zeros)
    tokens: dict[str, int] = field(default_factory=_zeros)  # the first end of text left out
    bytes: dict[str, int] = field(default_factory=_zeros)
    counts: dict[str, int] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    clean: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each step did


class Writer:
    """Append encoded texts to a folder; what `key` is prepared there already is kept."""

    def __init__(self, folder: Path, key: Mapping[str, Any], dtype: np.dtype, end_of_text: int):
        self.folder, self.key, self.dtype = folder, {**key, "format": _FORMAT}, dtype
        self.progress, self._shard = Progress(), 0
        self.shards: dict[str, dict[str, int]] = {}  # documents and tokens of each that is finished
        self._counted = (_zeros(), _zeros())  # documents and tokens in them all
        self._begin = np.array([end_of_text], dtype).tobytes()
        self._digests = {split: hashlib.blake2b(self._begin, digest_size=16) for split in SPLITS}
        self._open: dict[str, BinaryIO] = {}
        self._hashes: dict[str, Any] = {}
        self._sums: dict[str, Any] = {name: hashlib.sha256() for name in _WIDTHS}
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        self._lists = {name: self._continued(name) for name in _WIDTHS}
        self._journal = (folder / JOURNAL).open("a", encoding="utf-8")

    @property
    def shard_bytes(self) -> int:
        """Bytes of text in the shard that is being written."""
        return sum(self.progress.bytes.values()) - self._bytes_before

    def add(self, encoded: Encoded) -> None:
        """Write the texts of a chunk."""
        progress = self.progress
        owners = np.repeat(encoded.splits, encoded.lengths)
        for number, split in enumerate(SPLITS):
            here = encoded.splits == number
            if not here.any():
                continue
            data = encoded.tokens[owners == number].tobytes()
            self._write(split, data)
            self._digests[split].update(data)
            lengths = encoded.lengths[here]
            ends = progress.tokens[split] + np.cumsum(lengths)
            self._list(f"{split}.starts", (ends - lengths).astype("<i8").tobytes())
            self._list(f"{split}.origins", encoded.origins[here].tobytes())
            progress.documents[split] += len(lengths)
            progress.tokens[split] = int(ends[-1])
            progress.bytes[split] += int(encoded.sizes[here].sum())
        progress.following = encoded.following
        progress.counts = dict(Counter(progress.counts) + encoded.counts)
        progress.labels = sorted({*progress.labels, *encoded.labels} - {None})

    def end_shard(self) -> None:
        """Make what was written last, and say so in the journal."""
        for split in SPLITS if not self._shard else ():
            self._write(split, b"")  # the stream's first token, of an empty split too
        for handle in (*self._open.values(), *self._lists.values()):
            handle.flush()
            manifests.sync(Path(handle.name))
        new = {}
        for split, handle in self._open.items():
            size, digest = handle.tell(), self._hashes[split].hexdigest()
            new[Path(handle.name).name] = {"size": size, "sha256": digest}
            handle.close()
        self.progress.files |= new
        self._count(f"{split}-{self._shard:05d}.tokens" for split in self._open)
        self._open.clear()
        self._hashes.clear()
        self.progress.lists = {name: digest.hexdigest() for name, digest in self._sums.items()}
        self._shard += 1
        self._bytes_before = sum(self.progress.bytes.values())
        line = {"shard": self._shard, **asdict(self.progress), "files": new}
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        manifests.sync(self.folder / JOURNAL)

    def finish(self) -> dict[str, str]:
        """Close all files; return the digest of each split's whole stream."""
        for handle in self._lists.values():
            handle.close()
        self._journal.close()
        return {split: digest.hexdigest() for split, digest in self._digests.items()}

    def _count(self, names: Iterable[str]) -> None:
        """Put down what is in the shards `names`: what there is more than in those before."""
        documents, tokens = self._counted
        now = dict(self.progress.documents), dict(self.progress.tokens)
        for name in names:
            split = name.split("-")[0]
            self.shards[name] = {
                "documents": now[0][split] - documents[split],
                "tokens": now[1][split] - tokens[split],
            }
        self._counted = now

    def _list(self, name: str, data: bytes) -> None:
        self._lists[name].write(data)
        self._sums[name].update(data)

    def _write(self, split: str, data: bytes) -> None:
        if split not in self._open:
            self._open[split] = (self.folder / f"{split}-{self._shard:05d}.tokens").open("wb")
            self._hashes[split] = hashlib.sha256()
            data = data if self._shard else self._begin + data
        self._open[split].write(data)
        self._hashes[split].update(data)

    def _resume(self) -> None:
        """Take over the shards that an earlier preparation of the same finished, up to a damaged one."""
        journal, unfinished = self.folder / JOURNAL, self.folder / f".{JOURNAL}"
        lines = _lines(journal)
        first = next(lines, None)
        same = isinstance(first, dict) and {"format": _FORMAT, **first} == self.key
        with unfinished.open("w", encoding="utf-8") as kept:
            kept.write(json.dumps(self.key) + "\n")
            for line in lines if same else ():
                line["files"] = {
                    n: r for n, r in line["files"].items() if n not in self.progress.files
                }
                if not self._take(line):
                    break
                kept.write(json.dumps(line) + "\n")
        self._bytes_before = sum(self.progress.bytes.values())
        for file in self.folder.glob("*.tokens"):
            if file.name not in self.progress.files:
                file.unlink()
        unfinished.replace(journal)

    def _take(self, line: dict[str, Any]) -> bool:
        """Return whether what a line of the journal says is still there, and go on behind it."""
        new, files = line["files"], self.progress.files
        if not all(self._matches(name, new[name]) for name in new) or not self._take_lists(line):
            return False
        for name in sorted(new):
            split, number = name.removesuffix(".tokens").split("-")
            begin, end = 0 if int(number) else len(self._begin), new[name]["size"]
            shards.go_on(self._digests[split], self.folder / name, begin, end)
        self._shard = line["shard"]
        self.progress = Progress(**{k: v for k, v in line.items() if k != "shard"})
        self.progress.files = files | new
        self.progress.following = tuple(line["following"])
        self._count(new)
        return True

    def _take_lists(self, line: dict[str, Any]) -> bool:
        """Return whether the lists still begin with what `line` says, and go on with their sums."""
        sums = {}
        for name, width in _WIDTHS.items():
            file, split = self.folder / name, name.split(".")[0]
            begin, end = (of[split] * width for of in (self.progress.documents, line["documents"]))
            if not file.is_file() or file.stat().st_size < end:
                return False
            sums[name] = self._sums[name].copy()
            shards.go_on(sums[name], file, begin, end)
        if {name: digest.hexdigest() for name, digest in sums.items()} != line["lists"]:
            return False
        self._sums = sums
        return True

    def _matches(self, name: str, record: dict[str, Any]) -> bool:
        file = self.folder / name
        return file.is_file() and shards.recorded(file) == record

    def _continued(self, name: str) -> BinaryIO:
        """Open a list of the documents, cut to what the finished shards hold."""
        handle = (self.folder / name).open("ab")
        handle.truncate(self.progress.documents[name.split(".")[0]] * _WIDTHS[name])
        handle.seek(0, 2)
        return handle


def _lines(journal: Path) -> Iterator[Any]:
    """Yield the lines of a journal, up to one that is damaged or was cut off by a kill."""
    if journal.exists():
        with journal.open("rb") as handle, contextlib.suppress(ValueError):
            for line in handle:
                yield json.loads(line)


def begun_key(folder: Path) -> str | None:
    """Return the key of the corpus of which shards lie in `folder`; None where there are none."""
    try:
        with (folder / JOURNAL).open("rb") as handle:
            first, second = handle.readline(), handle.readline()
        return json.loads(first)["key"] if second else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def may_begin(folder: Path) -> bool:
    """Return whether `folder` holds nothing but what a preparation leaves that made no shard yet."""
    names = {file.name for file in folder.iterdir()}
    own = {LOCK, "tokenizer", JOURNAL, f".{JOURNAL}", f"{shards.MANIFEST}.partial"}
    if JOURNAL in names:  # which is written before these
        own |= {*_WIDTHS, *(name for name in names if name.endswith(".tokens"))}
    return names <= own
