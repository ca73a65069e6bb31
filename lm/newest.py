"""Which checkpoint a run goes on from: the newest that is good, of both places.

Looked at are the files of each, from the newest down, then the arrays as they are on the devices. What is
damaged or unfinished is moved aside and said.
"""

import os
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import jax

from lm import distributed, manifests, remote, stored
from lm.config import ConfigError


def good(
    folder: Path,
    say: Callable[[str], None],
    other: remote.Remote | None = None,
    without: Set[int] = frozenset(),
) -> int | None:
    """Return the newest step of which all files are good, None where none is; of `other` too, brought here.

    Those of `without` are passed over.

    Raises ConfigError where `other` or a file here cannot be read, and there is no checkpoint to go on from,
    and where `other` is another run's.
    """
    here = manifests.all_steps(folder)
    check_identity(folder, here)
    there, unread = other.seen() if other else ([], "")
    if other:
        other.check_own(there)
    forbidden = ""
    for step in sorted({*here, *there} - without, reverse=True):
        if step in here:
            if not (problem := manifests.problem(folder, step)):
                if unread:
                    say(f"{unread}; going on with checkpoint {step} here")
                return step
            if manifests.UNREADABLE in problem:
                forbidden = forbidden or f"checkpoint {step}: {problem}"
                say(f"checkpoint {step} is not used: {problem}; it stays where it is")
            else:
                if problem == manifests.FOREIGN:
                    check_began(folder, step)
                move_aside(folder, step, problem, say)
        if os.path.lexists(folder / str(step)):  # it keeps its place, and its name
            continue
        if other and step in there:
            if not (problem := other.fetch(step, newest=step > max(here, default=-1))):
                say(f"checkpoint {step} is taken from {other.url}")
                return step
            say(f"checkpoint {step} of {other.url} is not used: {problem}")
    if forbidden:
        raise ConfigError(
            f"{folder}: {forbidden}, and no other is good; let it be read, or move it away to begin anew"
        )
    if unread:
        raise ConfigError(
            f"checkpoint.remote: {unread}, and there is no good checkpoint in {folder}; wait until "
            "it can be read, or set checkpoint.remote='' to begin anew"
        )
    return None


def check_identity(folder: Path, steps: Sequence[int]) -> None:
    """Refuse a workdir whose name none of its checkpoints has: they are not another run's, but it is."""
    run, found = manifests.run_of(folder), set()
    for step in steps:
        if manifest := manifests.read(folder, step):
            found.add(manifest.get("identity") or run)
            if manifests.began_as(folder, step):
                return  # which is told of that one
    if run and found and run not in found:
        raise ConfigError(
            f"{folder.parent / manifests.IDENTITY}: not that of the run whose checkpoints are here; move it "
            "away to go on with them, or move them away to begin anew"
        )


def check_began(folder: Path, step: int) -> None:
    """Refuse a checkpoint of the run that began here before its identity was moved aside."""
    if began := manifests.began_as(folder, step):
        raise ConfigError(
            f"{folder / str(step)}: it is of the run that began here as {began.name} says; rename that to "
            f"{manifests.IDENTITY} to go on with it, or move the checkpoint away"
        )


def move_aside(folder: Path, step: int, problem: str, say: Callable[[str], None]) -> None:
    """Move aside a checkpoint that has a `problem`, and say so."""
    try:
        then = f"moved to {manifests.move_aside(folder / str(step))}"
    except OSError as error:
        then = f"it stays where it is: {error}"
    say(f"checkpoint {step} is not used: {problem}; {then}")


def restored(folder: Path, abstract: Any, say: Callable[[str], None]) -> tuple[int, Any] | None:
    """Return (step, state) of the newest good one, with the shapes and shardings of `abstract`, or None.

    All processes call it, and get the same.
    """
    first = jax.process_index() == 0
    passed: set[int] = set()
    while True:
        found = good(folder, say, without=passed) if first else None
        if not (told := distributed.from_first("" if found is None else str(found))):
            return None
        step = int(told)
        arrays = stored.restore(folder, step, stored.flatten(abstract))
        problems = distributed.from_all(stored.difference(folder, step, arrays))
        if not (problem := next(filter(None, problems), "")):
            return step, stored.unflatten(abstract, arrays)
        passed.add(step)
        if first:
            move_aside(folder, step, problem, say)
