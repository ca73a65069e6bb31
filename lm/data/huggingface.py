"""Datasets in Hugging Face's format: by name from its hub, or a folder of this machine.

A folder is one that `save_to_disk` wrote, or one of data files (JSON lines, CSV, Parquet, text). All but
the first are streamed: nothing is downloaded or converted before it is read.
"""

import functools
import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from lm.config import ConfigError
from lm.data import files, parquet
from lm.data.documents import Document, Reading

_COMMIT = re.compile("[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes
_PACKED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError)
_BATCH = 64  # rows that are loaded at a time


class Dataset(NamedTuple):
    """Which part of a dataset is read."""

    config: str = ""  # its configuration, where it has several
    split: str = "train"
    revision: str = ""  # of the hub: a branch, tag or commit


WHOLE = Dataset()


class Place(NamedTuple):
    """One shard of a split."""

    path: str
    dataset: Dataset  # of the hub: the revision is a commit
    shard: int
    shards: int


def locate(path: Sequence[str], dataset: Dataset) -> Iterator[tuple[str, Place]]:
    """Yield the printable name and the place of every shard of a dataset's split.

    Raises ConfigError for a dataset, a configuration, a split or a revision that is not there.
    """
    if len(path) != 1:
        raise ConfigError(
            f"data.path={','.join(path)}: name one dataset of the hub's or one folder"
        )
    name, version = os.path.expanduser(path[0]), ""
    if os.path.isdir(name):
        if dataset.revision:
            raise ConfigError(
                f"data.revision={dataset.revision}: {name} is a folder of this machine; leave it out"
            )
    elif not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"data.path={name}: no such folder, and no name of a dataset of the hub")
    else:
        dataset = dataset._replace(revision=_commit(name, dataset.revision))
        version = f"@{dataset.revision[:12]}"
    loaded = _load(name, dataset)
    shards = 1 if _is_saved(name) else loaded.num_shards
    about = "/".join(filter(None, (f"{name}{version}", dataset.config, dataset.split)))
    for shard in range(shards):
        yield f"{about}/{shard}", Place(name, dataset, shard, shards)


def read(place: Place, start: int, reading: Reading) -> Iterator[Document]:
    """Yield a document for every row of a shard from number `start` on."""
    data = _load(place.path, place.dataset)
    where = f"{place.path}, split {place.dataset.split}, shard {place.shard}"
    number = 0
    if _is_saved(place.path):  # mapped into memory: any row is at hand
        if start >= len(data):
            return
        data, number = data.select(range(start, len(data))), start
    else:
        data = data.shard(num_shards=place.shards, index=place.shard)
    tables = iter(data.with_format("arrow").iter(batch_size=_BATCH))
    while True:
        try:
            table = next(tables)
        except StopIteration:
            return
        except Exception as error:
            # Arrow's, and of `datasets` that of other columns; of a folder's files what they are packed in.
            damaged = (ValueError, *_PACKED) if os.path.isdir(place.path) else ValueError
            if not isinstance(error, damaged):  # of the network; they have no class in common
                raise _not_there(place.path, place.dataset, error) from error
            message = " ".join(str(error).split())[:300]
            record = reading.broken(
                "damaged file",
                f"data.path: {where}, after row {number}: {type(error).__name__} ({message}); repair it",
            )
            yield from [record] if number >= start else []
            return
        if number + table.num_rows > start:
            rows = _named_labels(table, data.features).slice(max(0, start - number))
            columns = parquet.columns_of(rows, reading, where)
            yield from parquet.documents(columns, reading, f"{where}: row", max(number, start))
        number += table.num_rows


def marks(places: Sequence[Place]) -> Iterator[bytes]:
    """Yield what changes when a dataset does: the hub's commit, or a digest of a folder's bytes."""
    path, dataset, *_ = places[0]
    yield repr(dataset).encode()
    if not os.path.isdir(path):
        yield path.encode()
        return
    for file in local_files(places):
        yield hashlib.blake2b(Path(file).relative_to(path).as_posix().encode()).digest()
        yield files.mark(file)


def local_files(places: Sequence[Place]) -> tuple[str, ...]:
    """Return the files below a dataset's folder; none of one of the hub's."""
    return tuple(str(file) for file in sorted(Path(places[0].path).rglob("*")) if file.is_file())


def _is_saved(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in _SAVED)


def _commit(name: str, revision: str) -> str:
    """Return the commit that a revision of the hub's stands for today."""
    if _COMMIT.fullmatch(revision):
        return revision
    _installed()
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision or None).sha or ""
    except Exception as error:  # they have no class in common
        raise _not_there(name, Dataset(revision=revision), error) from error


@functools.lru_cache(maxsize=4)
def _load(path: str, dataset: Dataset) -> Any:
    """Return the split, as a table in memory's map where it was saved as one, else as a stream."""
    datasets = _installed()
    try:
        if not _is_saved(path):
            return datasets.load_dataset(
                path,
                name=dataset.config or None,
                split=dataset.split,
                revision=dataset.revision or None,
                streaming=True,
            )
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, dict):
            return loaded[dataset.split]
    except Exception as error:  # they have no class in common
        raise _not_there(path, dataset, error) from error
    if str(loaded.split or dataset.split) != dataset.split:
        raise ConfigError(
            f"data.dataset_split={dataset.split}: {path} holds {loaded.split}; set that"
        )
    return loaded


def _not_there(path: str, dataset: Dataset, error: Exception) -> ConfigError:
    message = " ".join(str(error).split())[:300]
    return ConfigError(
        f"data.path={path}: {type(error).__name__} ({message}); check the name, data.dataset_config="
        f"{dataset.config!r}, data.dataset_split={dataset.split!r}, data.revision={dataset.revision!r}, "
        "and for the hub the network and HF_TOKEN"
    )


def _named_labels(table: Any, features: Any) -> Any:
    """Return a table whose numbers of classes are the names of these classes, null where one has none."""
    pyarrow = parquet.installed()
    for index, name in enumerate(table.schema.names):
        if classes := getattr((features or {}).get(name), "names", None):
            number = table.column(index)
            known = pyarrow.compute.if_else(pyarrow.compute.less(number, 0), None, number)
            names = pyarrow.array(classes, pyarrow.string()).take(known)
            table = table.set_column(index, name, names)
    return table


def _installed() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "data.source=huggingface needs datasets; pip install -e '.[data]'"
        ) from None
    datasets.disable_progress_bars()
    return datasets
