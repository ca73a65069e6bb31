"""Corpora that are ready to train on: opened where they were prepared, or made in the cache first.

A split is one stream, EOT d0 EOT d1 EOT ... dn EOT: end of text also begins the next document, so every
token and every closing EOT is predicted exactly once.

The cache is addressed by content: the source's bytes, the tokenizer's settings, the split. What is damaged
there is made again; in a folder of the user's it is an error.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import ConfigError
from lm.data import cleaning, external, mixture, packing, prepare, shards, sources, tokenizers
from lm.data.mixture import Mixture
from lm.data.settings import Config
from lm.data.shards import ORIGIN, SPLITS
from lm.data.tokenizers import Tokenizer

_STALE = 7 * 86400  # seconds after which a killed run's unfinished folder is removed


@dataclass(frozen=True)
class Split:
    """The token stream of one split.

    `tokens` [1 + tokens + documents] is EOT d0 EOT ... dn EOT; `starts` int64 [documents] are the
    positions of each document's leading EOT; `num_bytes` is the text's size in UTF-8. Where the data is
    `paired`, documents 2i and 2i + 1 are a text and what belongs to it: a target or a label. `origins`
    [documents] are the part of the source and the record in it that each document comes from.
    """

    name: str
    tokens: Any  # an array or a lm.data.shards.Tokens
    starts: np.ndarray
    num_bytes: int
    paired: bool = False
    origins: np.ndarray | None = None
    plans: dict[tuple[str, int], packing.Plan] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def end_of_text(self) -> int:
        """The id between documents: every stream begins with it."""
        return int(self.tokens[0])

    @property
    def num_inputs(self) -> int:
        """How many places of the stream have a next token."""
        return len(self.tokens) - 1

    @property
    def num_pairs(self) -> int:
        """How many pairs there are; 0 where the data has none."""
        return len(self.starts) // 2 if self.paired else 0

    def span(self, document: int) -> tuple[int, int]:
        """Return where in the stream the text of a document begins, and its length in tokens."""
        begin, following = int(self.starts[document]) + 1, document + 1
        end = int(self.starts[following]) if following < len(self.starts) else self.num_inputs
        return begin, end - begin

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of both texts of a pair."""
        (begin, length), (second, size) = self.span(2 * index), self.span(2 * index + 1)
        return self.tokens[begin : begin + length], self.tokens[second : second + size]

    def plan(self, name: str, capacity: int) -> packing.Plan:
        """Return the plan `name` of rows of `capacity` tokens, made once."""
        if (name, capacity) not in self.plans:
            self.plans[name, capacity] = packing.make(name, self.starts, self.num_inputs, capacity)
        return self.plans[name, capacity]


@dataclass(frozen=True)
class Corpus:
    """Two splits, their tokenizer, a digest of all their tokens, and counts to report."""

    tokenizer: Tokenizer
    train: Split
    validation: Split
    fingerprint: str
    report: dict[str, Any]
    parts: tuple[str, ...] = ()  # of the source: files, mostly
    mixed: tuple[
        tuple[str, "Corpus"], ...
    ] = ()  # of a mixture; the splits are then those of the first

    @property
    def members(self) -> tuple["Corpus", ...]:
        """The corpora of a mixture, or this one."""
        return tuple(member for _, member in self.mixed) or (self,)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the corpora of a mixture; none where there is one alone."""
        return tuple(name for name, _ in self.mixed)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the documents, sorted; none where the data has no label field."""
        return tuple(self.report["labels"])

    def summary(self) -> str:
        """Return what the corpus is, in a line."""
        if self.mixed:
            return "; ".join(f"{name}: {member.summary()}" for name, member in self.mixed)
        r = self.report
        unit, each = ("pairs", 2) if r["paired"] else ("documents", 1)
        counts = "; ".join(
            f"{name} {r[name]['documents'] // each:,} {unit}, {r[name]['tokens']:,} tokens"
            for name in SPLITS
        )
        replaced = f"; {r['replaced']:,} invalid bytes replaced" if r["replaced"] else ""
        empty = (
            f"; {r['empty_documents']:,} empty documents left out" if r["empty_documents"] else ""
        )
        broken = sum(r.get("broken", {}).values())
        empty += f"; {broken:,} broken records skipped" if broken else ""
        dropped = sum(step["dropped"] for step in r.get("clean", {}).values())
        empty += f"; {dropped:,} dropped by cleaning" if dropped else ""
        sizes = f"{r['bytes']:,} bytes, {self.tokenizer.name} of {self.tokenizer.vocab_size:,}"
        return f"{r['source']}, {sizes}; {counts}{replaced}{empty}"


def build(cfg: Config, *, tokenizer: Tokenizer | None = None) -> Corpus:
    """Return the corpus of the frozen `data` section: a prepared one, or from the cache, made first.

    With `tokenizer`, that one encodes instead of a new one. Raises ConfigError for what the sources and
    tokenizers refuse, an empty split, a cache that cannot be written, a prepared corpus that is damaged.
    """
    if cfg.mixture:
        return _mixed(cfg, tokenizer)
    if folder := prepared_folder(cfg):
        corpus = load(folder)
        if tokenizer and tokenizer.fingerprint != corpus.tokenizer.fingerprint:
            raise ConfigError(
                f"data.path={folder}: it was prepared with another tokenizer; prepare the text again with "
                "data.tokenizer=file and data.tokenizer_path, the folder tokenizer/ of the run"
            )
    else:
        corpus = _cached(cfg, tokenizer)
    _check(cfg, corpus)
    return corpus


def _members(
    cfg: Config, tokenizer: Tokenizer | None
) -> tuple[dict[str, Config], Tokenizer | None]:
    """Return the `data` section of each corpus of a mixture by its name, and their tokenizer.

    It is that of the first corpus that is prepared; where none is, one is trained on all training splits.
    """
    members: dict[str, Config] = {}
    for name, _ in cfg.mixture:
        embedded = name in sources.EMBEDDED
        member = dataclasses.replace(
            cfg,
            mixture=(),
            mixture_stages=(),
            source=name if embedded else cfg.source,
            path=() if embedded else (name,),
        )
        short = Path(name).name.partition(".")[0] or name
        if short in members:
            raise ConfigError(
                f"data.mixture: two corpora are called {short}; rename a file or folder, or name one once"
            )
        members[short] = member
    prepared = [folder for member in members.values() if (folder := prepared_folder(member))]
    if tokenizer is None and prepared:
        tokenizer = tokenizers.load(prepared[0] / "tokenizer")
    if tokenizer is None and cfg.tokenizer not in ("file", "byte"):
        tokenizer = _trained_on_all(cfg, list(members.values()))
    return members, tokenizer


def _mixed(cfg: Config, tokenizer: Tokenizer | None) -> Corpus:
    """Return the corpora of `data.mixture` as one."""
    members, tokenizer = _members(cfg, tokenizer)
    mixed = tuple((name, build(member, tokenizer=tokenizer)) for name, member in members.items())
    first = mixed[0][1]
    if any(member.train.paired != first.train.paired for _, member in mixed):
        raise ConfigError(
            "data.mixture: some corpora have pairs and others have not; mix one kind alone"
        )
    labels = sorted({label for _, member in mixed for label in member.labels})
    return Corpus(
        first.tokenizer,
        first.train,
        first.validation,
        tokenizers.digest(" ".join(f"{n} {member.fingerprint}" for n, member in mixed).encode()),
        {"labels": labels, "mixture": {name: member.report for name, member in mixed}},
        mixed=mixed,
    )


def mixture_of(cfg: Config, text: Corpus) -> Mixture | None:
    """Return how the corpora of `text` are mixed by the frozen `data` section; None for one alone."""
    if not text.mixed:
        return None
    return mixture.make(
        [weight for _, weight in cfg.mixture],
        stages=cfg.mixture_stages,
        temperature=cfg.mixture_temperature,
        sizes=[member.train.num_inputs for member in text.members],
        batch_size=cfg.batch_size,
    )


def _trained_on_all(cfg: Config, members: list[Config]) -> Tokenizer:
    """Return the tokenizer of a mixture from the cache, trained first where missing."""
    inputs = [_inputs(member, None)[0] for member in members]
    keys = [_key(member, source, None) for member, source in zip(members, inputs, strict=True)]
    folder = cache_folder() / "tokenizers" / tokenizers.digest(" ".join(keys).encode())
    if not (folder / "tokenizer.json").exists():
        trained = prepare.train(cfg, inputs)
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        trained.save(unfinished)
        with contextlib.suppress(OSError):  # another process was first
            unfinished.rename(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
    return tokenizers.load(folder)


def prepared_folder(cfg: Config) -> Path | None:
    """Return the folder that data.path names, where it is a prepared corpus."""
    if len(cfg.path) != 1:
        return None
    folder = Path(cfg.path[0]).expanduser()
    return folder if (folder / shards.MANIFEST).is_file() else None


def load(folder: Path, *, thorough: bool = False) -> Corpus:
    """Return the corpus in `folder`; see `lm.data.shards.read_manifest` for what is checked."""
    body = shards.read_manifest(folder, thorough=thorough)
    plans = packing.load(folder, fingerprint=body["fingerprint"])
    train, validation = (_split(folder, body, name, plans) for name in SPLITS)
    tokenizer = tokenizers.load(folder / "tokenizer")
    parts = tuple(body["parts"])
    return Corpus(tokenizer, train, validation, body["fingerprint"], body["report"], parts)


def _split(folder: Path, body: dict[str, Any], name: str, plans: dict) -> Split:
    files = sorted(file for file in body["files"] if file.startswith(f"{name}-"))
    arrays = [shards.view(folder / file, np.dtype(body["dtype"])) for file in files]
    return Split(
        name,
        arrays[0] if len(arrays) == 1 else shards.Tokens(arrays),
        shards.view(folder / f"{name}.starts", np.int64),
        body["report"][name]["bytes"],
        body["report"]["paired"],
        shards.view(folder / f"{name}.origins", ORIGIN),
        {key: made[name] for key, made in plans.items()},
    )


def cache_folder() -> Path:
    """Return the user's cache folder: LM_CACHE_DIR, else lm in XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("LM_CACHE_DIR"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lm"


def prepare_in(
    folder: Path, cfg: Config, *, tokenizer: Tokenizer | None = None, workers: int = 0
) -> list[Path]:
    """Prepare the corpus of the frozen `data` section in `folder`, or go on with it; return its folder.

    Of a mixture each corpus is prepared in a folder of its own below, and these are returned.
    """
    members, folders = {"": cfg}, [folder]
    if cfg.mixture:
        members, tokenizer = _members(cfg, tokenizer)
        folders = [folder / name for name in members]
    for place, member in zip(folders, members.values(), strict=True):
        source, given = _inputs(member, tokenizer)
        key = _key(member, source, given)
        prepare.prepare(place, member, source, key=key, tokenizer=given, workers=workers)
    return folders


def _inputs(cfg: Config, tokenizer: Tokenizer | None) -> tuple[Any, Tokenizer | None]:
    def opened(path: tuple[str, ...]) -> sources.Source:
        return sources.open_source(
            cfg.source,
            path=path,
            fields=cfg.fields,
            on_invalid=cfg.on_invalid,
            on_broken=cfg.on_broken,
            dataset=cfg.dataset,
        )

    source: Any = opened(cfg.path)
    if cfg.validation_path:
        source = sources.Joined(source, opened(cfg.validation_path))
    if tokenizer is None and cfg.tokenizer == "file":
        tokenizer = external.open_tokenizer(cfg.tokenizer_path)
    return source, tokenizer


def _cached(cfg: Config, tokenizer: Tokenizer | None) -> Corpus:
    source, tokenizer = _inputs(cfg, tokenizer)
    key = _key(cfg, source, tokenizer)
    folder = cache_folder() / "corpora" / key
    if (folder / shards.MANIFEST).exists():
        with contextlib.suppress(shards.Damaged):
            return load(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        prepare.prepare(folder, cfg, source, key=key, tokenizer=tokenizer, repair=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write the token cache in {cache_folder()} ({error.strerror or error}); "
            "set the environment variable LM_CACHE_DIR to a folder with room"
        ) from error
    return load(folder)


def _remove_stale(parent: Path) -> None:
    """Remove what killed runs left unfinished and nobody went on with."""
    for folder in parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            unfinished = not (folder / shards.MANIFEST).exists()
            if unfinished and time.time() - folder.stat().st_mtime > _STALE:
                shutil.rmtree(folder, ignore_errors=True)


def _key(cfg: Config, source: Any, tokenizer: Tokenizer | None) -> str:
    """Return a digest of all that a corpus depends on."""
    settings: list[Any] = [cfg.tokenizer, None, None]
    if cfg.tokenizer == "sentencepiece":
        settings[1:] = [cfg.vocab_size, cfg.sentencepiece_model, cfg.unknown, cfg.user_symbols]
    if cfg.tokenizer == "byte_bpe":
        settings[1:] = [cfg.vocab_size, cfg.user_symbols]
    if cfg.tokenizer == "word":
        settings[1] = cfg.vocab_size
    encoder = tokenizer.fingerprint if tokenizer else settings
    parts = [prepare.FORMAT, source.fingerprint(), encoder, cfg.validation_fraction, cfg.fold]
    if cfg.clean:
        parts.append(cleaning.open_cleaner(cfg.clean).fingerprint)
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
