"""A progress bar over what is read: bytes of files as they lie there, or of text where there are none."""

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from lm.data import files
from lm.data.encode import Chunk


def bar(inputs: Sequence[Any], description: str) -> tqdm:
    """Return a bar over sources that stays away from quick work and is short in a log file."""
    sizes = [_sizes(source) for source in inputs]
    total = None if None in sizes else sum(sum(size or ()) for size in sizes)
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(
        desc=description, total=total, unit="B", unit_scale=True, delay=2, mininterval=interval
    )


def told(chunks: Iterator[Chunk], bar: tqdm, source: Any) -> Iterator[Chunk]:
    """Yield the chunks of a source, and move the bar to where reading is."""
    if bar.total is None:
        for chunk in chunks:
            bar.update(sum(len(text) for item in chunk.items for text in item.texts))
            yield chunk
        return
    begin, sizes = bar.n, _sizes(source) or []
    before = [0, *itertools.accumulate(sizes)]
    for chunk in chunks:
        part, record = chunk.following
        reached = begin + before[part]
        if record:  # inside of a part, which is at its end where it is no longer open
            place = files.position()
            reached += sizes[part] if place is None else place
        bar.update(max(0, reached - bar.n))
        yield chunk
    bar.update(begin + sum(sizes) - bar.n)


def _sizes(source: Any) -> list[int] | None:
    """Return how many bytes each part has; None where one is no file of this machine."""
    sizes = [os.path.getsize(part) for part in source.parts if os.path.isfile(part)]
    return sizes if len(sizes) == len(source.parts) else None
