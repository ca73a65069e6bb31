"""Which checkpoints of a run are kept, and how the others go. Files and folders only, no arrays.

Kept are the newest, those at every K-th step, the best by a metric, and those that are pinned: a file
`<step>.pinned` beside the folder. What is newest is told by the step, never by a clock. A checkpoint goes
by its new name first, `<step>.deleting`, so that a kill on the way leaves nothing that looks like one.
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from lm import manifests

PINNED = "pinned"
DELETING = "deleting"


def pin(folder: Path, step: int) -> None:
    """Mark the checkpoint of `step` as one that is never deleted."""
    manifests.write_whole(folder / f"{step}.{PINNED}", "")


def unpin(folder: Path, step: int) -> None:
    """Take the mark of `pin` away."""
    (folder / f"{step}.{PINNED}").unlink(missing_ok=True)
    manifests.sync(folder)


def pinned(folder: Path) -> set[int]:
    """Return the steps that are pinned."""
    found = (re.fullmatch(rf"(\d+)\.{PINNED}", path.name) for path in folder.iterdir())
    return {int(match[1]) for match in found if match}


def kept(folder: Path, newest: int, every: int, best_metric: str) -> set[int]:
    """Return the finished steps that are kept.

    Args:
      newest: how many of the newest.
      every: those at multiples of this step too; 0 for none.
      best_metric: the one with the lowest of this too; "" for none.
    """
    steps = manifests.good_steps(folder)
    found = set(steps[-newest:]) | (pinned(folder) & set(steps))
    if every:
        found |= {step for step in steps if step % every == 0}
    if best_metric and (best := manifests.best_step(folder, best_metric)) is not None:
        found.add(best)
    return found


def delete(folder: Path, steps: Iterable[int]) -> list[str]:
    """Delete the checkpoints of `steps`, and what an earlier call left; return what failed, in words.

    What fails stays, whole or under its new name, and the next call tries it again.
    """
    failed = []
    for step in sorted(steps):
        try:
            (folder / str(step)).rename(_free_name(folder, step))
        except OSError as error:
            failed.append(f"checkpoint {step} is not deleted: {error}; it is tried again later")
    for path in sorted(folder.glob(f"*.{DELETING}*")):
        try:
            shutil.rmtree(path)
        except OSError as error:
            failed.append(f"{path} is not deleted: {error}; it is tried again later")
    return failed


def _free_name(folder: Path, step: int) -> Path:
    number = 0
    while (name := folder / f"{step}.{DELETING}{number}").exists():
        number += 1
    return name
