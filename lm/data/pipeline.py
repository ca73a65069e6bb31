"""Rows to batches: the batch of step s is a pure function of (settings, seed, s).

There is no iterator state: `Batches[step]` is arithmetic, on any count of hosts. Rows are shuffled
by a keyed bijection, a Feistel network (Luby and Rackoff 1988) over the next power of four walked
until it falls below the number of rows, so that a row of any epoch is O(1) and nothing is stored.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from lm.config import ConfigError
from lm.data import sources, subwords, tokenizers

Batch = dict[str, np.ndarray]
_ROUNDS = 6


@dataclass(frozen=True)
class Config:
    # A path's suffix decides, unless it names a kind of file.
    source: str = "python_docs"  # python_docs, python_source, python_pairs, text, jsonl, tsv or csv
    path: tuple[str, ...] = ()  # your own text: files and globs, .gz and .zst as they are
    field: str = "text"  # name of the text in a JSON line or a table
    source_field: str = ""  # of pairs: the source's or the labelled text's name, or column number
    target_field: str = ""  # of pairs: the target's name, or column number
    label_field: str = ""  # of labelled texts: the label's name, or column number
    on_invalid: str = "replace"  # bytes that are not UTF-8: replace (and count) or refuse
    tokenizer: str = "sentencepiece"  # byte, char, word, sentencepiece, byte_bpe or file (given)
    tokenizer_path: str = ""  # of tokenizer=file: tokenizer.json, llama2.c's .bin, or a folder
    vocab_size: int = 4096  # ids, special ones included
    sentencepiece_model: str = "unigram"  # unigram or bpe
    unknown: str = "bytes"  # a character without a piece: bytes, unk (one id for all) or refuse
    user_symbols: tuple[str, ...] = ()  # texts that are one piece each wherever they stand
    validation_fraction: float = 0.1  # of the documents; of the characters below 100 documents
    batch_size: int = 32  # sequences an update, over all devices and hosts
    order: str = "shuffle"  # shuffle, or stream: row b goes on where it stopped a step ago
    prefetch_threads: int = 2  # threads that make batches; 0 makes them in the loop
    prefetch_batches: int = 8  # batches made ahead

    ONLY_FOR: ClassVar[dict[str, tuple[str, tuple]]] = {
        "vocab_size": ("tokenizer", ("sentencepiece", "byte_bpe", "word")),
        "sentencepiece_model": ("tokenizer", ("sentencepiece",)),
        "unknown": ("tokenizer", ("sentencepiece",)),
        "user_symbols": ("tokenizer", ("sentencepiece", "byte_bpe")),
        "tokenizer_path": ("tokenizer", ("file",)),
    }

    def __post_init__(self):
        path = (self.path,) if isinstance(self.path, str) else self.path
        parts = tuple(part.strip() for item in path for part in item.split(",") if part.strip())
        object.__setattr__(self, "path", parts)
        self._check_fields(sources.resolve(self.source, parts))
        _one_of("on_invalid", self.on_invalid, ("replace", "refuse"))
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

    def _check_fields(self, source: str) -> None:
        given = {
            name: getattr(self, name)
            for name in ("field", "source_field", "target_field", "label_field")
            if getattr(self, name) != ("text" if name == "field" else "")
        }
        if given and source not in ("jsonl", *sources.TABLES):
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

    Order "shuffle": row g = step * batch_size + b of an endless sequence in which every epoch is a
    permutation of all rows. Order "stream": row b walks stream b, one of `batch_size` contiguous
    parts of num_rows // batch_size rows (up to batch_size - 1 rows at the end are never read), and
    begins again with position 0. With `once`, rows are empty after the first epoch: nothing is read
    twice. Raises ConfigError where the sizes do not fit.
    """

    def __init__(
        self,
        split: Any,
        task: Task,
        *,
        batch_size: int,
        seed: int,
        order: str,
        once: bool = False,
        host_index: int = 0,
        host_count: int = 1,
    ):
        self.split, self.task, self.seed, self.once = split, task, seed, once
        self.batch_size, self.stream = batch_size, order == "stream"
        self.num_rows = _num_rows(split, task)
        self._slice = _host_slice("data.batch_size", batch_size, host_index, host_count)
        if self.stream:
            _check_context("data.order=stream", task)
            if self.num_rows < batch_size:
                raise ConfigError(
                    f"data.batch_size={batch_size}: more streams than the {self.num_rows} rows of "
                    f"the {split.name} split; use fewer, more text, or data.order=shuffle"
                )

    @property
    def steps_per_epoch(self) -> float:
        """How many batches read every row once; with streams, every row that is read."""
        steps = self.num_rows / self.batch_size
        return float(int(steps)) if self.stream else steps

    def __getitem__(self, step: int) -> Batch:
        """Return this host's rows of the batch of `step`: arrays [batch_size / hosts, length]."""
        places = np.arange(self._slice.start, self._slice.stop, dtype=np.int64)
        if self.stream:
            window = self.num_rows // self.batch_size
            starts = places * window
            indices = starts + step % window
            return self.task.rows(self.split, indices, stream_starts=starts * self.task.max_scored)
        places += step * self.batch_size
        epochs, inside = np.divmod(places, self.num_rows)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            inside[here] = permute(inside[here], self.num_rows, seed=self.seed, epoch=epoch)
        if self.once:
            inside[epochs > 0] = self.num_rows
        return self.task.rows(self.split, inside, epochs=epochs)


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
            _check_context(f"eval.streams={streams}", task)
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


def permute(indices: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Map int64 `indices` below `size` one to one below `size`, another way each seed and epoch."""
    key = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(key, np.uint64)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    values = _feistel(indices.astype(np.uint64), keys, half)
    while len(outside := np.flatnonzero(values >= size)):
        values[outside] = _feistel(values[outside], keys, half)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64) -> np.ndarray:
    """Permute the numbers below 4**half; the round function is SplitMix64's finalizer."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        mixed = right + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << half) | right


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


def _check_context(what: str, task: Task) -> None:
    if task.row_length != task.max_scored:
        raise ConfigError(
            f"task.context={task.row_length - task.max_scored}: {what} reads every token once and "
            "carries state instead; use task.context=0"
        )
