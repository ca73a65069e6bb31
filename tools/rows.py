"""The numbers that a run recorded, by step and kind, and whether its settings call for them there."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lm.config import ConfigError

# Kinds of numbers, in the order in which a step is compared, and how often a run records each.
TRAIN, EVAL, TRAIL = "train", "eval", "trail"
EVERY = {
    TRAIN: "train.log_every_steps",
    EVAL: "eval.every_steps",
    TRAIL: "train.fingerprint_every_steps",
}
LENGTH = "train.num_steps"
SKIPPED = "train/skipped"
MISSING = "missing"


class Record:
    """The numbers of a run: `rows` of metrics.jsonl and `marks` of fingerprints.jsonl, by step."""

    def __init__(self, workdir: Path):
        from lm import metrics, receipt, trail

        path = workdir / "metrics.jsonl"
        if not path.is_file():
            raise ConfigError(f"{workdir}: no metrics.jsonl there; give the folder of a run")
        self._folder = workdir / "checkpoints"
        self.rows: dict[int, dict[str, float]] = {}
        for row in metrics.read_rows(path):
            values = {name: value for name, value in metrics.untimed(row).items() if name != "step"}
            self.rows.setdefault(int(row["step"]), {}).update(values)
        marks = workdir / trail.FILE
        found: list[Any] = metrics.read_rows(marks) if marks.exists() else []
        self.marks = {row["step"]: _marks_of(row, marks) for row in found}
        self.receipts = receipt.read_all(workdir)

    @functools.cached_property
    def last(self) -> int:
        """The last step with a record."""
        return max([*self.rows, *self.marks], default=0)

    def steps(self, first: int, last: int) -> list[int]:
        """Return the steps after `first` up to `last` that have a record."""
        return sorted(step for step in {*self.rows, *self.marks} if first < step <= last)

    def of(self, kind: str, step: int) -> dict[str, Any]:
        """Return the numbers of a kind at a step; {} where there are none."""
        if kind == TRAIL:
            return self.marks.get(step, {})
        return {n: v for n, v in self.rows.get(step, {}).items() if n.startswith(kind)}

    def saved(self, step: int) -> dict[str, str]:
        """Return the fingerprints in the manifest of a checkpoint of this run; {} where there are none."""
        from lm import manifests

        manifest = manifests.read(self._folder, step) or {}
        if manifests.is_foreign(manifest, manifests.run_of(self._folder)):
            return {}
        return {
            name: about[2] for name, about in manifest.get("arrays", {}).items() if len(about) > 2
        }

    def begins(self, step: int) -> bool:
        """Return whether a start of the run went on from `step`, maybe with other settings."""
        return any(found.get("first_step") == step for found in self.receipts)

    def alike(self, step: int, state: Any) -> list[str]:
        """Return which arrays of `state` the checkpoint of `step` has, of the same shape and type."""
        from lm import manifests, stored

        saved = (manifests.read(self._folder, step) or {}).get("arrays", {})
        return [
            name
            for name, x in stored.flatten(state).items()
            if saved.get(name, ())[:2] == [list(x.shape), str(x.dtype)]
        ]

    def receipt(self, taken: int) -> dict[str, Any]:
        """Return the receipt of the start that took the step after `taken`; {} where none tells."""
        from lm import receipt

        return receipt.in_force(self.receipts, taken)

    def setting(self, name: str, kind: str, step: int) -> Any:
        """Return a field of the start that recorded a kind at a step; None where no receipt tells."""
        # A row of metrics is of the step that led to its step; the trail is of the next one.
        found = self.receipt(step if kind == TRAIL else max(step - 1, 0))
        return found.get("config", {}).get(name, [None])[0]

    def due(self, kind: str, step: int, *, in_words: bool) -> bool:
        """Return whether the run's settings call for a kind at a step.

        At its last step they do not: a run may be stopped between two of its rows. `in_words` is the answer
        where they say how often in words, such as "2 epochs".
        """
        every, length = (self.setting(name, kind, step) for name in (EVERY[kind], LENGTH))
        if every is None or step >= self.last:
            return False
        if kind != TRAIL and step == length:
            return True
        if isinstance(every, str):
            return in_words
        if kind == TRAIN and step < 2:
            return step == 1
        return every > 0 and step % every == 0


def _marks_of(row: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Return the fingerprints in a row. Raises ConfigError where they are no object of texts."""
    found = row.get("fingerprints")
    if not isinstance(found, dict) or not all(isinstance(mark, str) for mark in found.values()):
        raise ConfigError(
            f"{path}: the row of step {row['step']} has no fingerprints by name; delete that line"
        )
    return found


class Difference(NamedTuple):
    name: str
    step: int
    recorded: Any
    found: Any


def different(
    recorded: Mapping[str, Any], found: Mapping[str, Any], *, at: int
) -> list[Difference]:
    """Return what differs at a step, what one side lacks last. NaN is NaN, as infinity is: see `Jsonl`."""
    names = [*recorded, *(name for name in found if name not in recorded)]
    pairs = [
        Difference(name, at, _plain(recorded.get(name, MISSING)), _plain(found.get(name, MISSING)))
        for name in names
    ]
    differ = [pair for pair in pairs if repr(pair.recorded) != repr(pair.found)]
    return sorted(differ, key=lambda pair: MISSING in (pair.recorded, pair.found))


def _plain(value: Any) -> Any:
    return math.nan if isinstance(value, float) and not math.isfinite(value) else value


def part(left: Record, right: Record) -> tuple[range, list[Difference]]:
    """Return what differs at the first step at which two runs do, and which steps may be the cause.

    Nothing differs where one run is only shorter.
    """
    before, end = 0, min(left.last, right.last)
    for step in sorted({*left.steps(-1, end), *right.steps(-1, end)}):
        found = [*_differ(left, right, TRAIN, step), *_differ(left, right, EVAL, step)]
        if (one := left.saved(step)) and (two := right.saved(step)):
            found += different(one, two, at=step)
        last = step if found else step + 1
        found += _differ(left, right, TRAIL, step)
        if found:
            # The loss is one step behind: it may be the update before that differs.
            return range(max(before - 1, 0), max(last, 1)), found
        before = step
    return range(0), []


def _differ(left: Record, right: Record, kind: str, step: int) -> list[Difference]:
    """Return what differs in a kind at a step, but for what a run is not asked to record there."""
    one, two = dict(left.of(kind, step)), dict(right.of(kind, step))
    alike = all(
        left.setting(name, kind, step) == right.setting(name, kind, step)
        for name in (EVERY[kind], LENGTH)
    )
    for mine, other, record in ((one, two, right), (two, one, left)):
        if not other and not record.due(kind, step, in_words=alike):
            return []
        if SKIPPED not in other and record.setting("train.on_bad_step", kind, step) == "stop":
            mine.pop(SKIPPED, None)
    return different(one, two, at=step)
