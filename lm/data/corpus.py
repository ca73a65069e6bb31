"""Corpora that are ready to train on: opened where they were prepared, or made in the cache first.

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
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import ConfigError, plain
from lm.data import (
    cleaning,
    external,
    files,
    mixture,
    packing,
    plans,
    prepare,
    shards,
    sources,
    tokenizers,
)
from lm.data.mixture import Mixture
from lm.data.settings import FIELDS, Config
from lm.data.shards import ORIGIN, SPLITS
from lm.data.streams import Corpus, Split
from lm.data.tokenizers import Tokenizer
from lm.data.writer import JOURNAL, LOCK

# Fields that are about reading a corpus, not about what is in it.
_READING = (
    "source", "path", "batch_size", "epochs", "order", "prefetch_threads", "prefetch_batches",
    "mixture_temperature",
)  # fmt: skip
OF_TOKENIZER = [
    "tokenizer",
    "tokenizer_path",
    "vocab_size",
    "sentencepiece_model",
    "unknown",
    "user_symbols",
]
_STALE = 7 * 86400  # seconds after which a killed run's unfinished folder is removed


def build(cfg: Config, *, tokenizer: Tokenizer | None = None) -> Corpus:
    """Return the corpus of the frozen `data` section: a prepared one, or from the cache, made first.

    With `tokenizer`, that one encodes instead of a new one. Raises ConfigError for what the sources and
    tokenizers refuse, an empty split, a cache that cannot be written, a prepared corpus that is damaged.
    """
    if cfg.mixture:
        return _mixed(cfg, tokenizer)
    if folder := prepared_folder(cfg):
        corpus = load(folder)
        _check_settings(cfg, folder, corpus.settings)
        if tokenizer and tokenizer.fingerprint != corpus.tokenizer.fingerprint:
            raise ConfigError(
                f"data.path={folder}: it was prepared with another tokenizer; prepare the text again with "
                "data.tokenizer=file and data.tokenizer_path, the folder tokenizer/ of the run"
            )
    else:
        corpus = _cached(cfg, tokenizer)
    _check(cfg, corpus)
    folder, splits = (
        cache_folder() / "plans" / corpus.fingerprint,
        (corpus.train, corpus.validation),
    )
    kept = plans.Kept(
        folder, fingerprint=corpus.fingerprint, splits=splits, unchecked=corpus.unchecked
    )
    train, validation = (dataclasses.replace(split, kept=kept) for split in splits)
    return dataclasses.replace(corpus, train=train, validation=validation)


# The fields that say how corpora are mixed; the rest of `data` changes their fingerprint.
MIXING = ("data.mixture", "data.mixture_stages", "data.mixture_temperature")


def _members(
    cfg: Config, tokenizer: Tokenizer | None
) -> tuple[dict[str, Config], Tokenizer | None]:
    """Return the `data` section of each corpus of a mixture by its name, and their tokenizer.

    It is that of the first corpus that is prepared; where none is, one is trained on all training splits.
    """
    members: dict[str, Config] = {}
    paths = [name for name, _ in cfg.mixture]
    places = [(name, ()) if name in sources.EMBEDDED else (cfg.source, (name,)) for name in paths]
    fields = [sources.resolve(*place) in sources.WITH_FIELDS for place in places]
    none = {name: getattr(Config, name) for name in FIELDS}
    for short, (source, path), some in zip(mixture.names(paths), places, fields, strict=True):
        members[short] = dataclasses.replace(
            cfg,
            mixture=(),
            mixture_stages=(),
            source=source,
            path=path,
            **({} if some or not any(fields) else none),  # of records, where others have them
        )
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
    try:
        return tokenizers.load(folder)
    except ConfigError:  # missing, or damaged
        shutil.rmtree(folder, ignore_errors=True)
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
    folder = Path(os.path.expanduser(cfg.path[0]))
    if (folder / LOCK).is_file() and not (folder / shards.MANIFEST).exists():
        raise ConfigError(
            f"data.path={folder}: its preparation is not finished; give that command again"
        )
    return folder if shards.is_prepared(folder) else None


def _check_settings(cfg: Config, folder: Path, settings: dict[str, Any]) -> None:
    """Refuse, or say of a tokenizer, what a corpus that was prepared with `settings` overrules."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        own = settings.get(field.name, field.default)
        if field.name in _READING or value == field.default or plain(own) == plain(value):
            continue
        said = f"data.{field.name}={value}: {folder} was prepared with {own!r}"
        if field.name not in OF_TOKENIZER:
            raise ConfigError(f"{said}; set it to that, or prepare the text again")
        print(f"notice: {said}, which holds")


def load(folder: Path, *, thorough: bool = False) -> Corpus:
    """Return the corpus in `folder`; see `lm.data.shards.read_manifest` for what is checked."""
    body = shards.read_manifest(folder, thorough=thorough)
    found, of_plans = packing.load(folder, fingerprint=body["fingerprint"], thorough=thorough)
    train, validation = (_split(folder, body, name, found) for name in SPLITS)
    tokenizer = tokenizers.load(folder / "tokenizer")
    return Corpus(
        tokenizer,
        train,
        validation,
        body["fingerprint"],
        body["report"],
        tuple(body["parts"]),
        body["settings"],
        {**body["unchecked"], **of_plans},
    )


def _split(folder: Path, body: dict[str, Any], name: str, found: dict) -> Split:
    files = sorted(file for file in body["files"] if file.startswith(f"{name}-"))
    arrays = [shards.view(folder / file, np.dtype(body["dtype"])) for file in files]
    return Split(
        name,
        arrays[0] if len(arrays) == 1 else shards.Tokens(arrays),
        shards.view(folder / f"{name}.starts", np.int64),
        body["report"][name]["bytes"],
        body["report"]["paired"],
        shards.view(folder / f"{name}.origins", ORIGIN),
        {key: made[name] for key, made in found.items()},
    )


def cache_folder() -> Path:
    """Return the user's cache folder: LM_CACHE_DIR, else lm in XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("LM_CACHE_DIR"):
        return Path(os.path.expanduser(folder))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "lm")


def made_again() -> tuple[Path, ...]:
    """Return the folders of what is made again where it is gone."""
    return cache_folder() / "corpora", cache_folder() / "plans"


def prepare_in(
    folder: Path, cfg: Config, *, tokenizer: Tokenizer | None = None, workers: int = 0
) -> list[Path]:
    """Prepare the corpus of the frozen `data` section in `folder`, or go on with it; return its folder.

    Of a mixture each corpus is prepared in a folder of its own below, and these are returned.
    """
    if not cfg.mixture:
        if prepared := prepared_folder(cfg):
            raise ConfigError(
                f"data.path={prepared}: it is a prepared corpus; train on it as it is"
            )
        _prepare(folder, cfg, tokenizer, workers)
        return [folder]
    if (folder / shards.MANIFEST).exists() or (folder / JOURNAL).exists():
        raise ConfigError(f"{folder}: it holds a corpus, not several; name an empty folder")
    members, tokenizer = _members(cfg, tokenizer)
    places = []
    for name, member in members.items():
        places.append(prepared_folder(member) or folder / name)
        if places[-1] == folder / name:
            _prepare(folder / name, member, tokenizer, workers)
    return places


def _prepare(folder: Path, cfg: Config, tokenizer: Tokenizer | None, workers: int) -> None:
    source, given = _inputs(cfg, tokenizer)
    states = source.states()  # before what the key is of
    key = _key(cfg, source, given)
    prepare.prepare(folder, cfg, source, key=key, states=states, tokenizer=given, workers=workers)
    _check(cfg, load(folder))


def _inputs(cfg: Config, tokenizer: Tokenizer | None) -> tuple[Any, Tokenizer | None]:
    def opened(path: tuple[str, ...]) -> sources.Source:
        return sources.open_source(
            cfg.source,
            path=path,
            fields=cfg.fields,
            on_invalid=cfg.on_invalid,
            on_broken=cfg.on_broken,
            max_bytes=cfg.max_document_bytes,
            dataset=cfg.dataset,
        )

    source: Any = opened(cfg.path)
    if cfg.validation_path:
        other = opened(cfg.validation_path)
        if other.name != source.name:
            raise ConfigError(
                f"data.validation_path={','.join(cfg.validation_path)}: {other.name}, and data.path is "
                f"{source.name}; use files of one kind"
            )
        trained = set(map(files.real, source.parts))
        if both := [part for part in other.parts if files.real(part) in trained]:
            raise ConfigError(
                f"data.validation_path: {both[0]} is in data.path too; train on it or evaluate on it"
            )
        source = sources.Joined(source, other)
    if tokenizer is None and cfg.tokenizer == "file":
        tokenizer = external.open_tokenizer(cfg.tokenizer_path)
    return source, tokenizer


def _cached(cfg: Config, tokenizer: Tokenizer | None) -> Corpus:
    source, tokenizer = _inputs(cfg, tokenizer)
    states = source.states()
    key = _key(cfg, source, tokenizer)
    folder = cache_folder() / "corpora" / key
    try:
        if (folder / shards.MANIFEST).exists():
            with contextlib.suppress(shards.Damaged):
                return load(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        prepare.prepare(
            folder, cfg, source, key=key, states=states, tokenizer=tokenizer, repair=True
        )
    except OSError as error:
        raise ConfigError(
            f"cannot use the token cache in {cache_folder()} ({error.strerror or error}: "
            f"{error.filename or folder}); "
            "set the environment variable LM_CACHE_DIR to a folder to write in, with room"
        ) from error
    return load(folder)


def _remove_stale(parent: Path) -> None:
    """Remove what killed runs left unfinished and nobody went on with."""
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
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
    encoder: Any = settings
    if tokenizer:  # with the roles that files beside its own give
        encoder = [tokenizer.fingerprint, sorted(getattr(tokenizer, "specials", {}).items())]
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
