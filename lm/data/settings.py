"""What the section `data` of a config says: every field with its default, and what fits together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lm.config import SET, ConfigError
from lm.data import cleaning, mixture, shards, sources, splits, subwords, tokenizers

MOST_TOKENS = 1 << 24  # of a vocabulary
FIELDS = ("field", "source_field", "target_field", "label_field")  # what is read of a record


@dataclass(frozen=True)
class Config:
    # Embedded are python_docs, python_source and python_pairs; kinds of files text, jsonl, tsv, csv and
    # parquet. A path's suffix or scheme decides, unless this names another than the embedded ones.
    source: str = "python_docs"  # an embedded text, a kind of file, huggingface or mongodb
    path: tuple[str, ...] = ()  # your text: files, globs and URLs; a dataset; a collection
    dataset_config: str = ""  # of huggingface: the dataset's configuration, where it has several
    dataset_split: str = "train"  # of huggingface: the dataset's split that is read
    revision: str = ""  # of huggingface: the hub's branch, tag or commit; "" is the newest
    field: str = "text"  # name of the text in a record or a table; a.b is b in a
    source_field: str = ""  # of pairs: the source's or the labelled text's name, or column number
    target_field: str = ""  # of pairs: the target's name, or column number
    label_field: str = ""  # of labelled texts: the label's name, or column number
    mixture: tuple[tuple[str, float], ...] = ()  # (path or source, weight; 0 = its size) of several
    mixture_stages: tuple[tuple[int, tuple[float, ...]], ...] = ()  # (from a step on, weights)
    mixture_temperature: float = 1.0  # weights are raised to 1 / this
    on_invalid: str = "replace"  # bytes that are not UTF-8: replace (and count) or refuse
    on_broken: str = "refuse"  # files and records that cannot be read: refuse or skip (and count)
    max_document_bytes: int = 1 << 28  # of a record or a text file; a longer one cannot be read
    clean: tuple[str, ...] = ()  # steps, as "language keep=en", in order; see lm/data/cleaning
    tokenizer: str = "sentencepiece"  # byte, char, word, sentencepiece, byte_bpe or file (given)
    tokenizer_path: str = ""  # of tokenizer=file: tokenizer.json, llama2.c's .bin, or a folder
    vocab_size: int = 4096  # ids, special ones included
    sentencepiece_model: str = "unigram"  # unigram or bpe
    unknown: str = "bytes"  # a character without a piece: bytes, unk (one id for all) or refuse
    user_symbols: tuple[str, ...] = ()  # texts that are one piece each wherever they stand
    validation_fraction: float = 0.1  # of the documents; of the characters below 100 documents
    validation_path: tuple[str, ...] = ()  # files to evaluate on; all of path is then trained on
    fold: str = ""  # i/k: the i-th of k parts of the documents is for validation, the others train
    batch_size: int = 32  # sequences an update, over all devices and hosts
    epochs: int = 0  # passes, the last batch filled up from the next, then exit code 4; 0 = endless
    order: str = "shuffle"  # shuffle, or stream: row b goes on where it stopped a step ago
    prefetch_threads: int = 2  # threads that make batches; 0 makes them in the loop
    prefetch_batches: int = 8  # batches made ahead

    ONLY_FOR: ClassVar = {
        "dataset_config": ("source", ("huggingface",)),
        "dataset_split": ("source", ("huggingface",)),
        "revision": ("source", ("huggingface",)),
        "vocab_size": ("tokenizer", ("sentencepiece", "byte_bpe", "word")),
        "sentencepiece_model": ("tokenizer", ("sentencepiece",)),
        "unknown": ("tokenizer", ("sentencepiece",)),
        "user_symbols": ("tokenizer", ("sentencepiece", "byte_bpe")),
        "tokenizer_path": ("tokenizer", ("file",)),
        "mixture_temperature": ("mixture", SET),
        "prefetch_batches": ("prefetch_threads", SET),
    }

    def __post_init__(self):
        for name in ("path", "validation_path"):
            object.__setattr__(self, name, _paths(getattr(self, name)))
        sources.refuse_passwords("validation_path", self.validation_path)
        sources.refuse_passwords("mixture", [name for name, _ in self.mixture])
        object.__setattr__(self, "clean", cleaning.split_steps(self.clean))
        source = sources.resolve(self.source, self.path)
        prepared = len(self.path) == 1 and shards.is_prepared(self.path[0])
        if not (prepared or self.mixture):  # what it was prepared with is compared; of each corpus
            self._check_fields(source)
        self._check_split()
        self._check_mixture()
        _one_of("on_invalid", self.on_invalid, ("replace", "refuse"))
        _one_of("on_broken", self.on_broken, ("refuse", "skip"))
        _one_of("tokenizer", self.tokenizer, tokenizers.NAMES)
        if self.tokenizer == "file" and not self.tokenizer_path:
            raise ConfigError(
                "data.tokenizer=file: no file is given; set data.tokenizer_path to a tokenizer.json, a "
                "llama2.c .bin, or the folder tokenizer/ of a run"
            )
        _one_of("sentencepiece_model", self.sentencepiece_model, ("unigram", "bpe"))
        _one_of("unknown", self.unknown, subwords.UNKNOWNS)
        if self.tokenizer in ("sentencepiece", "byte_bpe"):
            subwords.check_symbols(self.tokenizer, self.user_symbols)
        _one_of("order", self.order, ("shuffle", "stream"))
        if not 0 <= self.validation_fraction <= 1:
            raise ConfigError(
                f"data.validation_fraction={self.validation_fraction}: not a fraction; "
                "use a number from 0 to 1, such as 0.1"
            )
        if self.vocab_size > MOST_TOKENS:
            raise ConfigError(f"data.vocab_size={self.vocab_size}: use {MOST_TOKENS} or fewer")
        least = {
            "max_document_bytes": 1,
            "vocab_size": 1,
            "batch_size": 1,
            "epochs": 0,
            "prefetch_threads": 0,
            "prefetch_batches": 1,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(
                    f"data.{name}={getattr(self, name)}: too small; use {value} or more"
                )

    @property
    def fields(self) -> sources.Fields:
        """The names of what is read of a record."""
        return sources.Fields(self.field, self.source_field, self.target_field, self.label_field)

    def _check_mixture(self) -> None:
        if self.mixture and self.path:
            raise ConfigError(
                f"data.path={','.join(self.path)}: data.mixture names the corpora; leave one of them out"
            )
        if self.mixture and self.epochs:
            raise ConfigError(
                f"data.epochs={self.epochs}: the corpora of a mixture end at steps of their own; use "
                "train.num_steps"
            )
        if self.mixture_stages and not self.mixture:
            raise ConfigError("data.mixture_stages: used only with data.mixture; give it too")
        mixture.check_temperature(self.mixture_temperature)
        for name, weight in self.mixture:
            if not 0 <= weight < float("inf"):
                raise ConfigError(
                    f"data.mixture: {name}={weight} is no weight; use 0, for the corpus's size, or more"
                )

    def _check_split(self) -> None:
        if self.fold:
            splits.parse_fold(self.fold)
        for name, value in (("fold", self.fold), ("validation_path", self.validation_path)):
            if value and self.validation_fraction != 0.1:
                raise ConfigError(
                    f"data.validation_fraction={self.validation_fraction}: data.{name} decides what is "
                    "for validation; give one of the two"
                )
        if self.fold and self.validation_path:
            raise ConfigError(
                f"data.fold={self.fold}: data.validation_path decides what is for validation; give one of "
                "the two"
            )
        if self.validation_path and not self.path:
            raise ConfigError(
                f"data.validation_path={','.join(self.validation_path)}: used with files to train on; set "
                "data.path"
            )

    @property
    def dataset(self) -> sources.Dataset:
        """Which part of a dataset is read."""
        return sources.Dataset(self.dataset_config, self.dataset_split, self.revision)

    def _check_fields(self, source: str) -> None:
        given = {
            name: getattr(self, name)
            for name in FIELDS
            if getattr(self, name) != getattr(Config, name)
        }
        if given and source not in sources.WITH_FIELDS:
            name, value = next(iter(given.items()))
            raise ConfigError(
                f"data.{name}={value}: used only for JSON lines and tables; leave it out, or name such a "
                "file by data.source=jsonl, tsv or csv, or by a data.path that ends so"
            )
        if "field" in given and len(given) > 1:
            raise ConfigError(
                f"data.field={self.field}: of pairs and labelled texts data.source_field names the text; "
                "give that alone"
            )
        if self.target_field and self.label_field:
            raise ConfigError(
                f"data.label_field={self.label_field}: there is data.target_field={self.target_field} "
                "already; give one of the two"
            )
        if bool(self.source_field) != bool(self.target_field or self.label_field):
            raise ConfigError(
                f"data.source_field={self.source_field}: pairs have a data.source_field and a "
                "data.target_field, or a data.label_field; give both"
            )


def _paths(path: str | Sequence[str]) -> tuple[str, ...]:
    items = (path,) if isinstance(path, str) else path
    parts = [[item] if os.path.exists(item) else item.split(",") for item in items]
    return tuple(part.strip() for some in parts for part in some if part.strip())


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"data.{name}={value}: not an option; use {' or '.join(choices)}")
