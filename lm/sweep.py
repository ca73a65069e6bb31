"""Sweeps: an experiment file's `sweep()` returns a list of points, each a dict of dotted overrides.

    from lm import sweep as sweep_lib

    def sweep():
        return sweep_lib.grid(
            sweep_lib.zipped({"model.num_layers": [2, 4], "model.model_dim": [128, 256]}),
            {"optim.peak_lr": [1e-3, 3e-4], "seed": [0, 1, 2]},
        )

is 2 x 2 x 3 points. `python -m tools.sweep` runs them.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Point = dict[str, Any]  # "section.field" -> value
_MAX_NAME = 120  # bytes; file systems allow 255, and TensorBoard shows the whole name


def grid(*axes: Mapping[str, Sequence[Any]] | Iterable[Point]) -> list[Point]:
    """Return every combination, the last axis fastest; an axis is {field: values} or points.

    Raises ValueError for an axis without values, and for a field that two axes set.
    """
    several: list[list[Point]] = []
    for axis in axes:
        if isinstance(axis, Mapping):
            several += [[{key: value} for value in _values(key, axis[key])] for key in axis]
        else:
            several.append(list(axis))
    points = []
    for parts in itertools.product(*several):
        point: Point = {}
        for part in parts:
            if twice := point.keys() & part.keys():
                raise ValueError(f"{min(twice)}: set by two axes of a grid; keep one")
            point |= part
        points.append(point)
    return points


def zipped(fields: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Return one point for each position: the first values together, then the second ones.

    Raises ValueError where the fields have unequal numbers of values.
    """
    columns = {key: _values(key, values) for key, values in fields.items()}
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{key} {len(values)}" for key, values in columns.items())
        raise ValueError(f"{lengths}: zipped needs equally many values of each")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def chain(*sweeps: Iterable[Point]) -> list[Point]:
    """Return the points of several sweeps, one after the other."""
    return list(itertools.chain(*sweeps))


def _values(key: str, values: Sequence[Any]) -> list[Any]:
    found = (
        [] if isinstance(values, str | bytes) or not isinstance(values, Iterable) else list(values)
    )
    if not found:
        raise ValueError(f"{key}={values!r}: give a list of at least one value")
    return found


def assignments(point: Point) -> list[str]:
    """Return a point as the command line's "section.field=value"."""
    return [f"{key}={value}" for key, value in point.items() if key != "name"]


def name(point: Point) -> str:
    """Return a folder's name for a point, such as "peak_lr=0.001,seed=0".

    A point's own "name", which is no field, or one made of its fields. It depends on this point alone, so
    that a sweep that grows finds its finished points. Where characters are replaced or cut off, a hash of
    the whole keeps names apart.
    """
    point = dict(point)
    if given := point.pop("name", ""):
        return str(given)
    short = [key.rpartition(".")[2] for key in point]
    keys = short if len(set(short)) == len(short) else list(point)
    words = ",".join(f"{k}={v}" for k, v in zip(keys, point.values(), strict=True)) or "default"
    safe = re.sub(r"[^A-Za-z0-9_.,=+%-]+", "_", words)[:_MAX_NAME].strip(".")
    if safe == words:
        return words
    digest = hashlib.sha256("\n".join(assignments(point)).encode()).hexdigest()
    return f"{safe}-{digest[:8]}"
