"""The sides of `tools.bench_data`: this project's batches, Grain over ArrayRecord, datasets and PyTorch.

Each has the same documents, and gives batches of [rows, length] tokens in a shuffled order. Only the standard
library and numpy are needed to import this file.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench_pipe import serve


class Sides:
    """What a process serves: one side, chosen in `prepare`."""

    def prepare(
        self, kind: str, folder: str, work: str, length: int, rows: int, threads: int
    ) -> str:
        """Make ready to read batches, and return the side's library and version."""
        sides = {
            "ours": _ours,
            "grain": _grain,
            "datasets": _datasets,
            "datasets_rows": _datasets_rows,
        }
        side = sides[kind]
        self._positions = length * rows
        self._batches, library = side(Path(folder), Path(work), length, rows, threads)
        next(self._batches)
        return library

    def read(self, steps: int) -> float:
        """Return the positions a second of `steps` batches."""
        start = time.perf_counter()
        for _ in range(steps):
            next(self._batches)
        return steps * self._positions / (time.perf_counter() - start)

    def wait(self, rate: float, steps: int) -> float:
        """Return the share of its time that a loop of `rate` positions a second waits for batches."""
        busy, waited = self._positions / rate, 0.0
        for _ in range(steps):
            time.sleep(busy)  # as the host does while a device computes
            start = time.perf_counter()
            next(self._batches)
            waited += time.perf_counter() - start
        return waited / (waited + busy * steps)

    def random_rows(self, folder: str, work: str, length: int, count: int) -> dict[str, float]:
        """Return the seconds in which `count` random rows of `length` tokens are read, by format."""
        return _random_rows(Path(folder), Path(work), length, count)


def _ours(
    folder: Path, work: Path, length: int, rows: int, threads: int
) -> tuple[Iterator[Any], str]:
    from lm import tasks
    from lm.data import corpus, pipeline
    from lm.tasks import causal_lm

    text = corpus.load(folder)
    cfg = causal_lm.Config(length=length, packing="best_fit")
    task = causal_lm.Task(cfg, tasks.Setting("causal", text.tokenizer))
    batches = pipeline.Batches([text.train], task, batch_size=rows, seed=0, order="shuffle")
    if threads:
        made = pipeline.prefetch(batches, 0, 1 << 40, threads=threads, buffer=8)
        return (batch for _, batch in made), f"lm, {threads} threads"
    return (batches[step] for step in itertools.count()), "lm, no threads"


def _documents(folder: Path) -> Iterator[np.ndarray]:
    """Yield the tokens of each training document, end of text included."""
    tokens = np.fromfile(folder / "train-00000.tokens", np.uint16)
    starts = np.append(np.fromfile(folder / "train.starts", np.int64), len(tokens) - 1)
    yield from (tokens[a + 1 : b + 1] for a, b in itertools.pairwise(starts.tolist()))


def _grain(
    folder: Path, work: Path, length: int, rows: int, threads: int
) -> tuple[Iterator[Any], str]:
    """Documents in ArrayRecord, shuffled, packed first-fit, in batches: Grain's own parts."""
    import grain
    from array_record.python import array_record_module

    file = str(work / "documents.array_record")
    writer = array_record_module.ArrayRecordWriter(file, "group_size:1")
    for document in _documents(folder):
        for begin in range(0, len(document), length):  # a pack takes no longer ones
            writer.write(document[begin : begin + length].tobytes())
    writer.close()
    source = grain.sources.ArrayRecordDataSource([file])
    dataset = grain.MapDataset.source(source).shuffle(seed=0).repeat()
    parsed = dataset.map(
        lambda record: {"tokens": np.frombuffer(record, np.uint16).astype(np.int32)}
    )
    options = grain.ReadOptions(num_threads=threads or 1, prefetch_buffer_size=500)
    packed = grain.experimental.FirstFitPackIterDataset(
        parsed.to_iter_dataset(options), length_struct={"tokens": length}, num_packing_bins=rows
    )
    return iter(packed.batch(rows)), f"grain, ArrayRecord, first fit, {threads or 1} threads"


def _datasets(
    folder: Path, work: Path, length: int, rows: int, threads: int
) -> tuple[Iterator[Any], str]:
    """Documents in Arrow, shuffled by PyTorch's loader, packed as they come: the next that fits."""
    import datasets
    import torch

    pieces = [
        document[begin : begin + length].astype(np.int32)
        for document in _documents(folder)
        for begin in range(0, len(document), length)
    ]
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"tokens": pieces}).save_to_disk(str(work / "documents"))
    documents = datasets.load_from_disk(str(work / "documents")).with_format("numpy")
    options: dict[str, Any] = {"batch_size": rows, "shuffle": True, "num_workers": threads}

    def packed() -> Iterator[Any]:
        batch, row, at = _empty(rows, length), 0, 0
        while True:
            for several in torch.utils.data.DataLoader(documents, **options, collate_fn=list):
                for tokens in (one["tokens"] for one in several):
                    if at + len(tokens) > length:
                        row, at = row + 1, 0
                        if row == rows:
                            yield {name: torch.from_numpy(x) for name, x in batch.items()}
                            batch, row = _empty(rows, length), 0
                    here = slice(at, at + len(tokens))
                    batch["input_ids"][row, here] = tokens
                    batch["segment_ids"][row, here] = 1 + batch["segment_ids"][row, at - 1] * (
                        at > 0
                    )
                    batch["position_ids"][row, here] = np.arange(len(tokens))
                    at += len(tokens)

    return packed(), f"datasets {datasets.__version__}, documents, {threads} workers"


def _empty(rows: int, length: int) -> dict[str, np.ndarray]:
    names = ("input_ids", "segment_ids", "position_ids")
    return {name: np.zeros((rows, length), np.int32) for name in names}


def _datasets_rows(
    folder: Path, work: Path, length: int, rows: int, threads: int
) -> tuple[Iterator[Any], str]:
    """Rows that were joined and cut beforehand, with what tells documents apart, through PyTorch's loader."""
    import datasets
    import torch

    documents = list(_documents(folder))
    sizes = [len(document) for document in documents]
    columns = {
        "input_ids": np.concatenate(documents),
        "segment_ids": np.repeat(np.arange(len(documents)), sizes),
        "position_ids": np.concatenate([np.arange(size) for size in sizes]),
    }
    cut = len(columns["input_ids"]) // length * length
    tables = {
        name: list(x[:cut].astype(np.int32).reshape(-1, length)) for name, x in columns.items()
    }
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(tables).save_to_disk(str(work / "rows"))
    rows_of = datasets.load_from_disk(str(work / "rows")).with_format("torch")

    def endless() -> Iterator[Any]:
        while True:
            yield from torch.utils.data.DataLoader(
                rows_of, batch_size=rows, shuffle=True, num_workers=threads, drop_last=True
            )

    return (
        endless(),
        f"datasets {datasets.__version__}, rows cut before, {threads} workers",
    )


def _random_rows(folder: Path, work: Path, length: int, count: int) -> dict[str, float]:
    """Read the same rows from a memory-mapped file and from ArrayRecord, several at a time in both."""
    from array_record.python import array_record_module

    tokens = np.memmap(folder / "train-00000.tokens", np.uint16, "r").view(np.ndarray)
    num_rows = len(tokens) // length
    file = str(work / "rows.array_record")
    if not Path(file).exists():
        writer = array_record_module.ArrayRecordWriter(file, "group_size:1,uncompressed")
        for row in range(num_rows):
            writer.write(tokens[row * length : (row + 1) * length].tobytes())
        writer.close()
    reader = array_record_module.ArrayRecordReader(file)
    places = np.random.default_rng(0).integers(num_rows, size=(count // 32, 32))
    start = time.perf_counter()
    for batch in places.tolist():
        np.stack([np.frombuffer(record, np.uint16) for record in reader.read(batch)])
    middle = time.perf_counter()
    for batch in places.tolist():
        np.stack([tokens[row * length : (row + 1) * length] for row in batch])
    return {"array_record": middle - start, "memory_map": time.perf_counter() - middle}


if __name__ == "__main__":
    serve(Sides())
    sys.exit()
