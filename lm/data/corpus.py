"""Documents to tokens on disk: split, tokenizer, and a cache that is whole or absent.

A split is one stream, EOT d0 EOT d1 EOT ... dn EOT: end of text also begins the next document, so
every token and every closing EOT is predicted exactly once.

The cache is addressed by content: the source's bytes, the tokenizer's settings, the split. An
entry is written beside its place and renamed into it, so that a killed run leaves nothing that
looks whole, and of two runs at once either may win. Files are checked against recorded sizes and
small ones against a digest; what fails is rebuilt.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lm.config import ConfigError
from lm.data import external, sources, tokenizers
from lm.data.pipeline import Config
from lm.data.tokenizers import Tokenizer

FORMAT = 2  # part of every key: raise it when extraction, split or layout changes
_FEW = 100  # documents; below, the split is by characters
_BATCH = 1 << 22  # characters encoded at a time
_DIGESTED = 16 << 20  # bytes; larger files are checked by size alone, so that a start is quick
_MOST_LABELS = 10_000
_STALE = 86400  # seconds after which a killed run's unfinished folder is removed
_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Split:
    """The token stream of one split.

    `tokens` [1 + tokens + documents] is EOT d0 EOT ... dn EOT; `starts` int64 [documents] are the
    positions of each document's leading EOT; `num_bytes` is the text's size in UTF-8. Where the data is
    `paired`, documents 2i and 2i + 1 are a text and what belongs to it: a target or a label.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    num_bytes: int
    paired: bool = False

    @property
    def end_of_text(self) -> int:
        """The id between documents: every stream begins with it."""
        return int(self.tokens[0])

    @property
    def num_pairs(self) -> int:
        """How many pairs there are; 0 where the data has none."""
        return len(self.starts) // 2 if self.paired else 0

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of both texts of a pair."""
        first, second = self.starts[2 * index : 2 * index + 2]
        last = 2 * index + 2
        end = self.starts[last] if last < len(self.starts) else len(self.tokens) - 1
        return self.tokens[first + 1 : second], self.tokens[second + 1 : end]


@dataclass(frozen=True)
class Corpus:
    """Two splits, their tokenizer, a digest of all their tokens, and counts to report."""

    tokenizer: Tokenizer
    train: Split
    validation: Split
    fingerprint: str
    report: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the documents, sorted; none where the data has no label field."""
        return tuple(self.report["labels"])

    def summary(self) -> str:
        """Return what the corpus is, in a line."""
        r = self.report
        splits = "; ".join(
            f"{name} {r[name]['documents']:,} documents, {r[name]['tokens']:,} tokens"
            for name in _SPLITS
        )
        replaced = f"; {r['replaced']:,} invalid bytes replaced" if r["replaced"] else ""
        broken = sum(count for name, count in r.items() if name.startswith("broken: "))
        skipped = f"; {broken:,} broken records skipped" if broken else ""
        empty = f"; {n:,} empty documents left out" if (n := r["empty_documents"]) else ""
        sizes = f"{r['bytes']:,} bytes, {self.tokenizer.name} of {self.tokenizer.vocab_size:,}"
        return f"{r['source']}, {sizes}; {splits}{replaced}{empty}{skipped}"


def build(cfg: Config, *, tokenizer: Tokenizer | None = None) -> Corpus:
    """Return the corpus of `cfg` from the cache, made first where missing.

    With `tokenizer`, that one encodes instead of a new one. Documents are split by a hash of their
    content, fewer than 100 at the last `validation_fraction` of the characters. Raises ConfigError
    for what the sources and tokenizers refuse, an empty split, a cache that cannot be written.
    """
    source = sources.open_source(
        cfg.source,
        path=cfg.path,
        fields=cfg.fields,
        on_invalid=cfg.on_invalid,
        on_broken=cfg.on_broken,
        dataset=cfg.dataset,
    )
    if tokenizer is None and cfg.tokenizer == "file":
        tokenizer = external.open_tokenizer(cfg.tokenizer_path)
    folder = cache_folder() / "corpora" / _key(cfg, source, tokenizer)
    corpus = _load(folder)
    if corpus is None:
        with _writing():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder.parent)
            unfinished = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
            try:
                _write(unfinished, cfg, source, tokenizer)
                _place(unfinished, folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        corpus = _load(folder)
        assert corpus is not None, folder
    _check(cfg, corpus)
    return corpus


def cache_folder() -> Path:
    """Return the user's cache folder: LM_CACHE_DIR, else lm in XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("LM_CACHE_DIR"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lm"


def _key(cfg: Config, source: sources.Source, tokenizer: Tokenizer | None) -> str:
    settings: list[Any] = [cfg.tokenizer, None, None]
    if cfg.tokenizer == "sentencepiece":
        settings[1:] = [cfg.vocab_size, cfg.sentencepiece_model]
    if cfg.tokenizer == "word":
        settings[1] = cfg.vocab_size
    encoder = tokenizer.fingerprint if tokenizer else settings
    parts = [FORMAT, source.fingerprint(), encoder, cfg.validation_fraction]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _check(cfg: Config, corpus: Corpus) -> None:
    """Refuse an empty split, unless the fraction 0 or 1 asks for it."""
    fraction = cfg.validation_fraction
    for split, asked in ((corpus.train, fraction < 1), (corpus.validation, fraction > 0)):
        if asked and not split.num_bytes:
            raise ConfigError(
                f"data.validation_fraction={fraction}: the {split.name} split is empty "
                f"({corpus.report['documents']} documents in all); change it or use more text"
            )


class _Cut:
    """Which split a document, or each part of it, belongs to."""

    def __init__(self, fraction: float, survey: dict[str, int]):
        self.fraction = fraction
        self.by_hash = survey["documents"] >= _FEW
        self.characters = int(survey["characters"] * (1 - fraction))
        self.pairs = int(survey["documents"] * (1 - fraction))

    def parts(self, source: sources.Source) -> Iterator[tuple[str, str]]:
        """Yield (split, text) in order; a document across the cut comes in two, a pair stays whole."""
        before = number = 0
        for text, _, second, _ in source:
            if second is not None:
                if not (text and second):
                    continue
                last = (
                    _hash_fraction(text) < self.fraction if self.by_hash else number >= self.pairs
                )
                number += 1
                yield from ((_SPLITS[last], part) for part in (text, second))
                continue
            if self.by_hash:
                yield _SPLITS[_hash_fraction(text) < self.fraction], text
                continue
            cut = min(max(self.characters - before, 0), len(text))
            before += len(text)
            yield from ((s, t) for s, t in zip(_SPLITS, (text[:cut], text[cut:]), strict=True) if t)


def _hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _survey(source: sources.Source) -> dict[str, Any]:
    """Return counts of the documents, and the labels where they have one."""
    counts = Counter(documents=0, empty_documents=0, characters=0, bytes=0, replaced=0)
    labels: set[str] = set()
    for text, replaced, second, kind in _progress(source, "reading", unit=" documents"):
        whole = bool(text) and second != ""
        counts["documents" if whole else f"broken: {kind}" if kind else "empty_documents"] += 1
        counts["characters"] += len(text)
        counts["bytes"] += len(text.encode()) + len((second or "").encode())
        counts["replaced"] += replaced
        if whole and second is not None and source.fields.label:
            labels.add(second)
            if len(labels) > _MOST_LABELS:
                raise ConfigError(
                    f"data.label_field={source.fields.label}: more than {_MOST_LABELS} labels; is it "
                    "data.target_field?"
                )
    return {**counts, "labels": sorted(labels)}


def _write(folder: Path, cfg: Config, source: sources.Source, tokenizer: Tokenizer | None) -> None:
    """Fill `folder` with the tokenizer, both splits and the meta data."""
    survey = _survey(source)
    cut = _Cut(cfg.validation_fraction, survey)
    if tokenizer is None:
        # An alphabet is no knowledge of the text: it is taken whole, so that both splits encode.
        wanted = _SPLITS if cfg.tokenizer == "char" else ("train",)
        tokenizer = tokenizers.train(
            cfg.tokenizer,
            (text for split, text in cut.parts(source) if split in wanted),
            vocab_size=cfg.vocab_size,
            model=cfg.sentencepiece_model,
        )
    tokenizer.save(folder / "tokenizer")
    splits = _encode(folder, tokenizer, cut.parts(source), survey["bytes"])
    digests = [tokenizer.fingerprint, *(splits[name].pop("digest") for name in _SPLITS)]
    names = {"source": source.name, "files": len(source.parts), "paired": source.paired}
    report = {**names, **survey, "split": "hash" if cut.by_hash else "characters", **splits}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    body = {
        "fingerprint": hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest(),
        "dtype": _dtype(tokenizer).name,
        "report": report,
        "files": {file.relative_to(folder).as_posix(): _recorded(file) for file in files},
    }
    text = json.dumps(body)
    meta = {"body": body, "digest": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    for file in (*files, folder / "meta.json", folder / "tokenizer", folder):
        _sync(file)


def _encode(
    folder: Path, tokenizer: Tokenizer, parts: Iterator[tuple[str, str]], num_bytes: int
) -> dict[str, dict[str, Any]]:
    """Write each split's stream into `folder`; return its counts and its tokens' digest."""
    dtype = _dtype(tokenizer)
    begin = np.array([tokenizer.end_of_text], dtype)
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context((folder / f"{s}.tokens").open("wb")) for s in _SPLITS}
        digests = {split: hashlib.blake2b(begin.tobytes(), digest_size=16) for split in _SPLITS}
        starts: dict[str, list[int]] = {split: [] for split in _SPLITS}
        sizes = dict.fromkeys(_SPLITS, 0)
        ends = dict.fromkeys(_SPLITS, 0)
        for file in files.values():
            file.write(begin.tobytes())
        bar = _progress(None, "encoding", total=num_bytes, unit="B", unit_scale=True)
        for batch in _batched(parts):
            encoded = tokenizer.encode_all([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                data = np.append(ids, tokenizer.end_of_text).astype(dtype).tobytes()
                files[split].write(data)
                digests[split].update(data)
                starts[split].append(ends[split])
                ends[split] += len(ids) + 1
                sizes[split] += len(text.encode())
            bar.update(sum(sizes.values()) - bar.n)
        bar.close()
    for split in _SPLITS:
        (folder / f"{split}.starts").write_bytes(np.array(starts[split], np.int64).tobytes())
    return {
        split: {
            "documents": len(starts[split]),
            "bytes": sizes[split],
            "tokens": ends[split],
            "digest": digests[split].hexdigest(),
        }
        for split in _SPLITS
    }


def _batched(parts: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for split, text in parts:
        if text:
            batch.append((split, text))
            size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _recorded(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if size > _DIGESTED:
        return {"size": size}
    return {"size": size, "digest": hashlib.sha256(file.read_bytes()).hexdigest()}


def _load(folder: Path) -> Corpus | None:
    """Return the entry in `folder`; None where there is none or where it is damaged (said)."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        body = meta["body"]
        whole = meta["digest"] == hashlib.sha256(json.dumps(body).encode()).hexdigest()
        for name, recorded in body["files"].items():
            size = (folder / name).stat().st_size
            whole = whole and recorded == (
                _recorded(folder / name) if "digest" in recorded else {"size": size}
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        print(f"{folder}: a damaged cache entry; building it again", file=sys.stderr, flush=True)
        return None
    train, validation = (
        Split(
            name,
            # A plain view: slicing numpy's memmap class costs ten times a row's copy.
            np.memmap(folder / f"{name}.tokens", np.dtype(body["dtype"]), "r").view(np.ndarray),
            np.fromfile(folder / f"{name}.starts", np.int64),
            body["report"][name]["bytes"],
            body["report"]["paired"],
        )
        for name in _SPLITS
    )
    tokenizer = tokenizers.load(folder / "tokenizer")
    return Corpus(tokenizer, train, validation, body["fingerprint"], body["report"])


def _place(unfinished: Path, folder: Path) -> None:
    """Rename a whole entry into its place, over a damaged one, unless another run was first."""
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # else two runs may take a new entry for the damaged one
        if _load(folder) is None:
            if folder.exists():
                aside = folder.with_name(f"{unfinished.name}.damaged")
                os.replace(folder, aside)
                shutil.rmtree(aside, ignore_errors=True)
            os.replace(unfinished, folder)
            os.fsync(handle)
    finally:
        os.close(handle)


def _remove_stale(parent: Path) -> None:
    for folder in parent.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _STALE:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write the token cache in {cache_folder()} ({error.strerror or error}); "
            "set the environment variable LM_CACHE_DIR to a folder with room"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _progress(items: Any, description: str, **options: Any) -> Any:
    """Return a progress bar that stays away from quick work and is short in a log file."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(items, description, delay=2, mininterval=interval, **options)
