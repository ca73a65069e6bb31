"""What a run that goes on has behind its checkpoint goes to a side file: nothing that was written is lost."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from lm import manifests


def is_kept(step: float, names: Iterable[str], after: int, scored: bool) -> bool:
    """Return whether what has these names at a step is neither later than `after` nor made again."""
    again = step == after and not scored and any(name.startswith("eval") for name in names)
    return step <= after and not again


def divide(path: Path, parts: Sequence[tuple[bool, bytes]], *, side: str) -> Path | None:
    """Leave the kept parts in the file at `path`; move the others to `side`, its * numbered."""
    moved = b"".join(part for keep, part in parts if not keep)
    if not moved:
        return None
    names = (path.with_name(side.replace("*", str(n))) for n in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    # In this order: a kill in between leaves rows in both files, never in none.
    manifests.write_whole(aside, moved)
    manifests.write_whole(path, b"".join(part for keep, part in parts if keep))
    return aside
