"""Which of several corpora each row is of: exact proportions, by arithmetic alone.

Row g of an endless sequence belongs to the first corpus where g w / W, rounded, goes up by one (w its weight,
W the sum of all), and else to one of the others, among which the rows that are left are shared out in the
same way. So after any number of rows each corpus has its share but for a row or two, and after every W rows
exactly; and which row of its corpus it is needs no memory either.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from lm.config import ConfigError
from lm.data import files

_MOST = 1 << 20  # sum of the integer weights: with fewer than 2**42 rows nothing overflows
_PATTERN = re.compile(r"[*?\[]")


def names(paths: Sequence[str]) -> list[str]:
    """Return what the corpora at `paths`, or embedded ones, are called: the shortest that tells them apart.

    It is a file's name up to its first dot, or a database's; where that has a pattern in it or is another's
    too, the name of the folder, or of the collection; else the whole path. Raises ConfigError for a path that
    is there twice.
    """
    found = [_names(path) for path in paths]
    level = [0] * len(found)
    while True:
        chosen = [of[at] for of, at in zip(found, level, strict=True)]
        again = [
            number
            for number, name in enumerate(chosen)
            if not name or _PATTERN.search(name) or Counter(chosen)[name] > 1
        ]
        if not again:
            return chosen
        longer = [number for number in again if level[number] < 2]
        if not longer:
            raise ConfigError(
                f"data.mixture: {files.printable(paths[again[0]])} is named twice; name it once"
            )
        for number in longer:
            level[number] += 1


def _names(path: str) -> tuple[str, str, str]:
    path = files.printable(path)
    last = PurePosixPath(path)
    first, _, rest = last.name.partition(".")
    second = rest if path.startswith("mongodb") and files.is_remote(path) else last.parent.name
    return first or path, second, re.sub(r"[^\w.-]+", "_", path).strip("_.")


@dataclass(frozen=True)
class Mixture:
    """Weights of the corpora, integers, from a first row on: one entry a stage, the first from row 0."""

    stages: tuple[tuple[int, tuple[int, ...]], ...]

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for each of `rows` [R] its corpus and the number of rows of that corpus before it."""
        firsts = np.array([first for first, _ in self.stages])
        stage_of = np.searchsorted(firsts, rows, side="right") - 1
        corpora, indices = np.zeros_like(rows), np.zeros_like(rows)
        for stage in np.unique(stage_of).tolist():
            here = stage_of == stage
            first, weights = self.stages[stage]
            owner, index = _share_out(rows[here] - first, weights)
            corpora[here], indices[here] = owner, index + self.counts(first)[owner]
        return corpora, indices

    def until(self, row: int) -> "Mixture":
        """Return what of this mixture decides the rows before `row`."""
        return Mixture(tuple(stage for stage in self.stages if stage[0] < row))

    def counts(self, num_rows: int) -> np.ndarray:
        """Return how many of the first `num_rows` rows are of each corpus: int64 [corpora]."""
        total = np.zeros(len(self.stages[0][1]), np.int64)
        ends = [first for first, _ in self.stages[1:]] + [num_rows]
        for (first, weights), end in zip(self.stages, ends, strict=True):
            left = max(min(end, num_rows) - first, 0)
            for number, weight in enumerate(weights):
                taken = _taken(left, weight, sum(weights[number:]))
                total[number] += taken
                left -= taken
        return total


def _share_out(rows: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the owner of each of `rows` [R], and its rows before."""
    owners = np.full_like(rows, len(weights) - 1)
    indices, left = np.zeros_like(rows), rows.copy()
    free = np.ones(len(rows), bool)
    for number, weight in enumerate(weights[:-1]):
        before = _taken(left, weight, sum(weights[number:]))
        mine = free & (_taken(left + 1, weight, sum(weights[number:])) > before)
        owners[mine], indices[mine] = number, before[mine]
        free &= ~mine
        left -= before
    return owners, np.where(free, left, indices)


def _taken(rows: Any, weight: int, whole: int) -> Any:
    """Return how many of the first `rows` one of `weight` out of `whole` takes: its share, rounded."""
    return (2 * rows * weight + whole) // (2 * whole) if whole else 0 * rows


def make(
    weights: Sequence[float],
    *,
    stages: Sequence[tuple[int, Sequence[float]]] = (),
    temperature: float = 1.0,
    sizes: Sequence[int],
    batch_size: int,
) -> Mixture:
    """Return the mixture of `weights`, and of others from a step on.

    A weight is relative, and 0 stands for the corpus's size in tokens; it is raised to 1 / `temperature`
    (Arivazhagan et al. 2019, arXiv 1907.05019): above 1 small corpora count more. `stages` are (first step,
    weights), where 0 is nothing. Raises ConfigError for what is no mixture.
    """
    own = [weight or size for weight, size in zip(weights, sizes, strict=True)]
    all_stages = [(0, own), *stages]
    made = []
    for number, (step, values) in enumerate(all_stages):
        if len(values) != len(weights):
            raise ConfigError(
                f"data.mixture_stages: {len(values)} weights from step {step} on, and data.mixture has "
                f"{len(weights)} corpora; give one weight for each"
            )
        if number and step <= all_stages[number - 1][0]:
            raise ConfigError(
                f"data.mixture_stages: step {step} does not come after {all_stages[number - 1][0]}; give the "
                "stages in order, the first after step 0"
            )
        field = "mixture_stages" if number else "mixture"
        made.append((step * batch_size, integers(values, temperature, field=f"data.{field}")))
    return Mixture(tuple(made))


def check_temperature(temperature: float) -> None:
    """Raise ConfigError for a temperature at which weights are no numbers."""
    if not 0.01 <= temperature <= 100:
        raise ConfigError(
            f"data.mixture_temperature={temperature}: use a number from 0.01 to 100, such as 2"
        )


def integers(
    weights: Sequence[float], temperature: float = 1.0, *, field: str = "data.mixture"
) -> tuple[int, ...]:
    """Return the smallest integers in proportion to weights ** (1 / temperature); of many digits, nearly."""
    check_temperature(temperature)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ConfigError(
            f"{field}: weights {', '.join(map(str, weights))} are no proportions; give positive numbers"
        )
    if temperature != 1:
        most = max(weights)
        weights = [float(weight / most) ** (1 / temperature) for weight in weights]
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) > _MOST:
        total = sum(whole)
        whole = [max(round(Fraction(weight * _MOST, total)), min(weight, 1)) for weight in whole]
    return tuple(whole)
