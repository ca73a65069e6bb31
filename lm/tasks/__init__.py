"""Objectives: what a row of tokens asks of a model. One file each; the folder is the registry.

A batch is a dict of arrays [R, row_length]: `inputs`, `targets`, `segments`, `positions` int32 and
`weights` float32. Segments are 0 on padding, which is always on the right, and 1, 2, ... for the
documents of a row; position 0 resets recurrent state; weights say what is scored. A task has

- `row_length`, and `max_scored`, a static bound on scored positions a row;
- `packed`: a row may hold several documents that must not see each other;
- `kind`: "causal", what a model has to accept;
- `num_rows(split)` and `rows(split, indices, stream_starts=None)`.
"""

import difflib
import importlib
import pkgutil
from typing import Any

from lm.config import ConfigError


def config_class(name: str) -> type:
    """Return the `Config` of the task `name`. Raises ConfigError, with the nearest, for no task."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in names:
        nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
        raise ConfigError(f"task.name={name}: no such task; did you mean {nearest[0]}?")
    return importlib.import_module(f"lm.tasks.{name}").Config


def build(cfg: Any) -> Any:
    """Return the task that the frozen `cfg`, a task's `Config`, describes."""
    return importlib.import_module(type(cfg).__module__).Task(cfg)
