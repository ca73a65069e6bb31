"""Objectives: what a row of tokens asks of a model. One file each; the folder is the registry.

A batch is a dict of arrays [R, row_length]: `inputs`, `targets`, `segments`, `positions` int32 and
`weights` float32. Segments are 0 on padding, which is always on the right, and 1, 2, ... for the
documents of a row; position 0 resets recurrent state; weights say what is scored. Rows of the kind
"source" also have `source`, `source_segments`, `source_positions` [R, source_length]; "masked" rows may
have `types` [R, row_length] and `labels` [R] (-1: none), int32.

`lm/tasks/<name>.py` exports `Config`, a frozen dataclass with the property `packed` (a row may hold several
documents that must not see each other), and `Task(cfg, setting)`, which has

- `KINDS`: the kinds of rows that it can make, of which the family accepts one: "causal", "masked", "source";
- `row_length`, `source_length` (0 = no source), and `max_scored`, a static bound on scored positions a row;
- `vocab_size`, its own special tokens included; `num_classes`, where position 0 is to be classified, else 0,
  and `labels`, the names of the classes;
- `start`, the token that a target begins with, of "source" rows; `cls` and `sep`, that "masked" rows begin
  and end with;
- `gaps`, the tokens for the gaps that a prompt leaves open, in their order, and `names`, how its own special
  tokens are shown;
- `text_bytes`: every byte of a text is scored once, so that bits per byte mean something;
- `whole_rows`: whether the share of rows that are all right is reported;
- `pieces(split, indices, *, epochs=None)`, (begin, length) of the parts of the stream that each row reads,
  before noise; what a row is asked for may go on for one token;
- `num_rows(split)` and `rows(split, indices, *, epochs=None, stream_starts=None)`: a pure function of its
  arguments and the setting's seed. `epochs` [R] says how often a row was seen before; None in evaluation.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.config import ConfigError

PACKINGS = ("split", "best_fit", "pad")  # see lm.data.packing


class Setting(NamedTuple):
    """What a task is made for: the kind of rows that the family reads, and the corpus."""

    kind: str
    tokenizer: Any  # a lm.data.tokenizers.Tokenizer
    labels: tuple[str, ...] = ()  # the corpus's, where its documents have one each
    seed: int = 0
    start: int = -1  # token that a target begins with; -1 = end of text

    @property
    def target_start(self) -> int:
        """The token that a target begins with."""
        return self.tokenizer.end_of_text if self.start < 0 else self.start


def config_class(name: str) -> type:
    """Return the `Config` of the task `name`. Raises ConfigError, with the nearest, for no task."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in names:
        nearest = difflib.get_close_matches(str(name), names, n=1)
        fix = f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(names)}"
        raise ConfigError(f"task.name={name}: no such task; {fix}")
    return importlib.import_module(f"lm.tasks.{name}").Config


def kinds(cfg: Any) -> tuple[str, ...]:
    """Return the kinds of rows that the task of the frozen `cfg` can make, best first."""
    return importlib.import_module(type(cfg).__module__).Task.KINDS


def kind_for(kinds: Sequence[str], accepts: frozenset[str]) -> str:
    """Return the first of a task's kinds of rows that a family accepts. Raises ConfigError without one."""
    for kind in kinds:
        if kind in accepts:
            return kind
    raise ConfigError(
        f"task.name: it makes rows for {' or '.join(kinds)} models, and model.name is "
        f"{' or '.join(sorted(accepts))}; change one of them"
    )


def build(cfg: Any, setting: Setting) -> Any:
    """Return the task that the frozen `cfg`, a task's `Config`, describes."""
    return importlib.import_module(type(cfg).__module__).Task(cfg, setting)


def special_ids(tokenizer: Any, names: Sequence[str]) -> dict[str, int]:
    """Return the id of each special token: the tokenizer's own, else one after its vocabulary."""
    fresh = iter(range(tokenizer.vocab_size, tokenizer.vocab_size + len(names)))
    own = tokenizer.specials
    return {name: own[name] if name in own else next(fresh) for name in names}


def num_windows(split: Any, packing: str, capacity: int) -> int:
    """Return how many windows hold every token of `split` once."""
    if packing == "split":
        return -(-(len(split.tokens) - 1) // capacity)
    return split.plan(packing, capacity).num_rows


def window_pieces(split: Any, index: int, packing: str, capacity: int) -> list[tuple[int, int]]:
    """Return (begin, length) of the parts of the stream in a row of at most `capacity` tokens.

    Packed as "split", row r has the stream's tokens from 1 + r * capacity on; otherwise documents, or pieces
    of them, and the ends of text behind them, as the plan says. Past the last row there is nothing.
    """
    if packing == "split":
        begin = 1 + index * capacity
        size = min(capacity, len(split.tokens) - begin)
        return [(begin, size)] if size > 0 else []
    plan = split.plan(packing, capacity)
    pieces = plan.pieces(index) if index < plan.num_rows else []
    return [(begin + 1, length) for begin, length in pieces]


def window(split: Any, index: int, packing: str, capacity: int) -> np.ndarray:
    """Return the tokens, int32, of the pieces of a row."""
    pieces = window_pieces(split, index, packing, capacity)
    tokens = [split.tokens[begin : begin + length] for begin, length in pieces]
    return np.concatenate([np.zeros(0, np.int32), *tokens]).astype(np.int32)


def random_of(seed: int, epoch: int, row: int) -> np.random.Generator:
    """Return the randomness of a row, which depends on nothing else."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, row))))


def check_positive(cfg: Any, **least: int) -> None:
    """Raise ConfigError for a field of a task's config that is below its least value."""
    for name, value in least.items():
        if getattr(cfg, name) < value:
            raise ConfigError(f"task.{name}={getattr(cfg, name)}: too small; use {value} or more")


def check_share(cfg: Any, *names: str) -> None:
    """Raise ConfigError for a field of a task's config that is no share in (0, 1)."""
    for name in names:
        if not 0 < getattr(cfg, name) < 1:
            raise ConfigError(f"task.{name}={getattr(cfg, name)}: use a share in (0, 1)")


def check_packing(packing: str) -> None:
    """Raise ConfigError for a `task.packing` that there is not."""
    if packing not in PACKINGS:
        raise ConfigError(f"task.packing={packing}: no such packing; use {', '.join(PACKINGS)}")
