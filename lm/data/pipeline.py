"""Rows to batches: the batch of step s is a pure function of (settings, seed, s).

There is no iterator state: `Batches[step]` is arithmetic, on any count of hosts.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from lm.config import ConfigError
from lm.data import sources, splits, subwords, tokenizers
from lm.data.mixture import Mixture
from lm.data.shuffle import permute

Batch = dict[str, np.ndarray]
_BLOCK = 4096  # places that are shuffled at a time


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
    order: str = "shuffle"  # shuffle, or stream: row b goes on where it stopped a step ago
    prefetch_threads: int = 2  # threads that make batches; 0 makes them in the loop
    prefetch_batches: int = 8  # batches made ahead

    ONLY_FOR: ClassVar[dict[str, tuple[str, tuple]]] = {
        "dataset_config": ("source", ("huggingface",)),
        "dataset_split": ("source", ("huggingface",)),
        "revision": ("source", ("huggingface",)),
        "vocab_size": ("tokenizer", ("sentencepiece", "byte_bpe", "word")),
        "sentencepiece_model": ("tokenizer", ("sentencepiece",)),
        "unknown": ("tokenizer", ("sentencepiece",)),
        "user_symbols": ("tokenizer", ("sentencepiece", "byte_bpe")),
        "tokenizer_path": ("tokenizer", ("file",)),
    }

    def __post_init__(self):
        for name in ("path", "validation_path"):
            object.__setattr__(self, name, _paths(getattr(self, name)))
        self._check_fields(sources.resolve(self.source, self.path))
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
        least = {"vocab_size": 1, "batch_size": 1, "prefetch_threads": 0, "prefetch_batches": 1}
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
        if self.mixture_stages and not self.mixture:
            raise ConfigError("data.mixture_stages: used only with data.mixture; give it too")
        if not self.mixture_temperature > 0:
            raise ConfigError(
                f"data.mixture_temperature={self.mixture_temperature}: use a positive number, such as 2"
            )
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
            for name in ("field", "source_field", "target_field", "label_field")
            if getattr(self, name) != ("text" if name == "field" else "")
        }
        if given and source not in sources.WITH_FIELDS:
            name, value = next(iter(given.items()))
            raise ConfigError(
                f"data.{name}={value}: used only for JSON lines and tables; leave it out, or name such a "
                "file by data.source=jsonl, tsv or csv, or by a data.path that ends so"
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


class Task(Protocol):
    """What is asked of a task: see `lm.tasks`; a split is a `lm.data.corpus.Split`."""

    @property
    def row_length(self) -> int: ...
    @property
    def max_scored(self) -> int: ...
    def num_rows(self, split: Any) -> int: ...
    def rows(
        self,
        split: Any,
        indices: np.ndarray,
        *,
        epochs: np.ndarray | None = None,
        stream_starts: np.ndarray | None = None,
    ) -> Batch: ...


class Batches:
    """Training batches by step: rows b of this host out of the global batch.

    Order "shuffle": row g = step * batch_size + b of an endless sequence. `mixture` says which of `splits`
    it is of, and of each of them every epoch is a permutation of all its rows. Order "stream": row b walks
    stream b, one of `batch_size` contiguous parts of num_rows // batch_size rows (up to batch_size - 1 rows
    at the end are never read), and begins again with position 0. With `once`, rows are empty after a split's
    first epoch: nothing is read twice. Raises ConfigError where the sizes do not fit.

    With several splits, a batch also has `corpus` int32 [R]: which of them each row is of.
    """

    def __init__(
        self,
        splits: Sequence[Any],
        task: Task,
        *,
        batch_size: int,
        seed: int,
        order: str,
        mixture: Mixture | None = None,
        once: bool = False,
        host_index: int = 0,
        host_count: int = 1,
    ):
        self.splits, self.task, self.seed, self.once = splits, task, seed, once
        self.mixture, self.batch_size, self.stream = mixture, batch_size, order == "stream"
        self.rows_of = [_num_rows(split, task) for split in splits]
        self.num_rows = sum(self.rows_of)
        self._slice = _host_slice("data.batch_size", batch_size, host_index, host_count)
        self._permuted = functools.lru_cache(4 * len(splits))(self._permute_block)
        assert mixture or len(splits) == 1, "several splits need a mixture"
        if self.stream:
            if mixture:
                raise ConfigError(
                    "data.mixture: data.order=stream reads one corpus from end to end; use shuffle"
                )
            _check_whole_stream("data.order=stream", task)
            if self.num_rows < batch_size:
                raise ConfigError(
                    f"data.batch_size={batch_size}: more streams than the {self.num_rows} rows of "
                    f"the {splits[0].name} split; use fewer, more text, or data.order=shuffle"
                )

    @property
    def steps_per_epoch(self) -> float:
        """How many batches have as many rows as there are; with streams, as are read."""
        steps = self.num_rows / self.batch_size
        return float(int(steps)) if self.stream else steps

    def __getitem__(self, step: int) -> Batch:
        """Return this host's rows of the batch of `step`: arrays [batch_size / hosts, length]."""
        places = np.arange(self._slice.start, self._slice.stop, dtype=np.int64)
        if self.stream:
            window = self.num_rows // self.batch_size
            starts = places * window
            indices = starts + step % window
            return self.task.rows(
                self.splits[0], indices, stream_starts=starts * self.task.max_scored
            )
        corpora, indices, epochs = self.locate(places + step * self.batch_size)
        if not self.mixture:
            return self.task.rows(self.splits[0], indices, epochs=epochs)
        batch: Batch = {"corpus": corpora.astype(np.int32)}
        for number in np.unique(corpora).tolist():
            here = corpora == number
            rows = self.task.rows(self.splits[number], indices[here], epochs=epochs[here])
            for name, values in rows.items():
                if name not in batch:
                    batch[name] = np.zeros((len(places), *values.shape[1:]), values.dtype)
                batch[name][here] = values
        return batch

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the split, the row and the epoch of each of `places` [R] in the sequence."""
        corpora = np.zeros_like(places)
        if self.mixture:
            corpora, places = self.mixture.locate(places)
        sizes = np.array(self.rows_of)[corpora]
        epochs, inside = np.divmod(places, sizes)
        blocks = inside // _BLOCK
        together = zip(corpora.tolist(), epochs.tolist(), blocks.tolist(), strict=True)
        for corpus, epoch, block in sorted(set(together)):
            here = (corpora == corpus) & (epochs == epoch) & (blocks == block)
            inside[here] = self._permuted(corpus, epoch, block)[inside[here] % _BLOCK]
        if self.once:
            inside = np.where(epochs > 0, sizes, inside)
        return corpora, inside, epochs

    def _permute_block(self, corpus: int, epoch: int, block: int) -> np.ndarray:
        """Return the rows at _BLOCK places of an epoch, made at once because numpy's calls cost most.

        Each corpus has a permutation of its own; the first one's is that of a corpus alone.
        """
        size = self.rows_of[corpus]
        places = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, size))
        return permute(places, size, seed=self.seed, epoch=epoch, corpus=corpus)


class EvalBatches(Sequence[Batch]):
    """A fixed prefix of a split, in order: ceil(max_tokens / length) rows, 0 for all.

    The last batch is filled with empty rows (weights and segments 0). With `streams` the prefix is
    cut into that many contiguous parts and a batch is one row of each, whatever `batch_size` is.
    """

    def __init__(
        self,
        split: Any,
        task: Task,
        *,
        batch_size: int,
        max_tokens: int = 0,
        streams: int = 0,
        host_index: int = 0,
        host_count: int = 1,
    ):
        self.split, self.task, self.streams = split, task, streams
        self.num_rows = _num_rows(split, task)
        if max_tokens:
            self.num_rows = min(self.num_rows, -(-max_tokens // task.max_scored))
        size, name = (streams, "eval.streams") if streams else (batch_size, "eval.batch_size")
        if streams:
            _check_whole_stream(f"eval.streams={streams}", task)
        self._slice = _host_slice(name, size, host_index, host_count)
        self._size, self._len = size, -(-self.num_rows // size)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index):
        """Return this host's rows of batch `index`: arrays [batch_size / hosts, length]."""
        if not 0 <= index < self._len:
            raise IndexError(index)
        places = np.arange(self._slice.start, self._slice.stop, dtype=np.int64)
        if self.streams:
            starts = places * self._len
            indices = starts + index
        else:
            indices = places + index * self._size
        # An index past the prefix is moved past the split, where every row is empty.
        indices[indices >= self.num_rows] = self.task.num_rows(self.split)
        if self.streams:
            return self.task.rows(self.split, indices, stream_starts=starts * self.task.max_scored)
        return self.task.rows(self.split, indices)


def prefetch(
    batches: Any, start: int, stop: int, *, threads: int, buffer: int
) -> Iterator[tuple[int, Batch]]:
    """Yield (step, batches[step]) from `start` up to `stop`, made ahead by Grain's read threads."""
    import grain  # here, because it imports jax: seconds that preparing data need not pay

    steps = grain.MapDataset.range(start, stop).map(lambda step: (int(step), batches[int(step)]))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffer, threads))
    with contextlib.closing(iter(steps.to_iter_dataset(options))) as iterator:
        yield from iterator


def describe_batch(
    batch: Batch, tokenizer: tokenizers.Tokenizer, *, rows: int = 1, width: int = 0
) -> str:
    """Return the first `rows` rows in words: for each run of one document and one weight, where it
    is, its weight, and the text of its inputs and targets, cut to `width` characters (0 = whole)."""
    lines = []
    for row in range(min(rows, len(batch["inputs"]))):
        segments, weights = batch["segments"][row], batch["weights"][row]
        tokens = int((segments > 0).sum())
        lines.append(
            f"row {row}: {tokens} tokens of {int(segments.max(initial=0))} documents, "
            f"{int((weights > 0).sum())} scored, {len(segments) - tokens} padding"
        )
        changes = (np.diff(segments) != 0) | (np.diff(weights) != 0)
        for run in np.split(np.arange(len(segments)), np.flatnonzero(changes) + 1):
            first, last = run[0], run[-1]
            if segments[first]:
                lines.append(
                    f"  {first}-{last}: document {segments[first]}, "
                    f"position {batch['positions'][row, first]}, weight {weights[first]:g}"
                )
                for name in ("inputs", "targets"):
                    lines.append(f"    {name:7} {_words(batch[name][row, run], tokenizer)}")
    return "\n".join(
        line if len(line) <= width or not width else f"{line[: width - 4]} ..." for line in lines
    )


def _words(ids: np.ndarray, tokenizer: tokenizers.Tokenizer) -> str:
    """Return the text of `ids` on one line, with a sign where a document ends."""
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text))
    return " <end of text> ".join(repr(tokenizer.decode(part)) for part in parts)


def _paths(path: str | Sequence[str]) -> tuple[str, ...]:
    items = (path,) if isinstance(path, str) else path
    return tuple(part.strip() for item in items for part in item.split(",") if part.strip())


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"data.{name}={value}: not an option; use {' or '.join(choices)}")


def _num_rows(split: Any, task: Task) -> int:
    num_rows = task.num_rows(split)
    if not num_rows:
        raise ConfigError(
            f"the {split.name} split is empty; change data.validation_fraction or use more text"
        )
    return num_rows


def _host_slice(name: str, size: int, host_index: int, host_count: int) -> range:
    if size % host_count:
        raise ConfigError(
            f"{name}={size}: does not divide over {host_count} hosts; use a multiple of them"
        )
    share = size // host_count
    return range(host_index * share, (host_index + 1) * share)


def _check_whole_stream(what: str, task: Task) -> None:
    if task.row_length != task.max_scored:
        raise ConfigError(
            f"task.context={task.row_length - task.max_scored}: {what} reads every token once and "
            "carries state instead; use task.context=0"
        )
    if (packing := getattr(getattr(task, "cfg", None), "packing", "split")) != "split":
        raise ConfigError(
            f"task.packing={packing}: {what} reads the stream as it is; use task.packing=split"
        )
