"""Where the rows of a batch come from: corpus, row, documents, and the places in them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm.data.pipeline import Batches
from lm.data.streams import Corpus


def of_step(
    batches: Batches, members: Sequence[Corpus], names: Sequence[str], step: int
) -> list[dict[str, Any]]:
    """Return of each row of the batch of `step`, of all hosts: what it is of and its documents, in words.

    The places are those that its inputs are made of, before noise and masks. `members` are the corpora of
    `batches.splits` and `names` their names, where there are several.
    """
    size = batches.batch_size
    if batches.stream:
        window = batches.num_rows // size
        rows = np.arange(size) * window + step % window
        owners, epochs = np.zeros(size, np.int64), np.full(size, step // window)
    else:
        owners, rows, epochs = batches.locate(np.arange(size) + step * size)
    found = []
    for owner, row, epoch in zip(owners.tolist(), rows, epochs, strict=True):
        name = f"{names[owner]} " if len(members) > 1 else ""
        task: Any = batches.task
        documents = [
            line
            for begin, length in task.pieces(
                members[owner].train, np.array([row]), epochs=np.array([epoch])
            )[0]
            for line in _documents(members[owner], begin, begin + length)
        ]
        found.append({"row": f"{name}row {row:,} of epoch {epoch}", "documents": documents})
    return found


def _documents(member: Corpus, begin: int, end: int) -> Iterator[str]:
    """Yield the documents that places `begin` to `end` of the training stream are of."""
    split = member.train
    first = max(int(np.searchsorted(split.starts, begin, side="right")) - 1, 0)
    for document in range(first, int(np.searchsorted(split.starts, end, side="left"))):
        start, length = split.span(document)
        low, high = max(begin, start), min(end, start + length)
        if low >= high:
            continue
        origin = ""
        if split.origins is not None:
            part, record = split.origins[document].tolist()
            origin = f"{member.parts[part]} record {record}, "
        yield f"{origin}document {document:,}, tokens {low - start:,} to {high - start:,} of {length:,}"
