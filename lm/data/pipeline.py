"""Rows to batches: the batch of step s is a pure function of (settings, seed, s).

There is no iterator state: `Batches[step]` is arithmetic, on any count of hosts.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lm.config import ConfigError
from lm.data import tokenizers
from lm.data.mixture import Mixture
from lm.data.shuffle import permute

Batch = dict[str, np.ndarray]
_BLOCK = 4096  # places that are shuffled at a time


class Task(Protocol):
    """What is asked of a task: see `lm.tasks`; a split is a `lm.data.streams.Split`."""

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

    def steps_in(self, epochs: int) -> int:
        """Return how many batches have the rows of so many epochs; the last one may have more."""
        if self.stream:
            return epochs * (self.num_rows // self.batch_size)
        return -(-epochs * self.num_rows // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        """Return this host's rows of the batch of `step`: arrays [batch_size / hosts, length]."""
        places = np.arange(self._slice.start, self._slice.stop, dtype=np.int64)
        if self.stream:
            window = self.num_rows // self.batch_size
            starts = places * window
            indices = starts + step % window
            return self.task.rows(
                self.splits[0],
                indices,
                stream_starts=starts * self.task.max_scored,
                epochs=np.full_like(places, step // window),
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
