"""Metrics: (sum, weight) pairs until the last moment, and the writers that record their means.

A writer has three methods: `write(step, values)`, where `step` is the number of steps passed,
`sync()`, after which every row written so far survives a crash, and `close()`.

Resuming at step s first moves what lies behind s aside (`move_rows_aside`, and of TensorBoard's events): a
run's record holds each step once, and a side file keeps what was replaced.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm.auto import tqdm

from lm import aside, tensorboard, weights_and_biases
from lm.config import ConfigError

TIMED = ("tokens_per_second", "steps_per_second", "mfu")  # of a row
Metrics = Mapping[str, tuple[Any, Any]]  # name -> (sum, weight), floats or scalar arrays


def add(left: Metrics, right: Metrics) -> dict[str, tuple[Any, Any]]:
    """Return the metrics of two batches together; a name that one lacks counts nothing there."""
    total = dict(left)
    for name, (value, weight) in right.items():
        old_value, old_weight = total.get(name, (0.0, 0.0))
        total[name] = (old_value + value, old_weight + weight)
    return total


def summarize(metrics: Metrics) -> dict[str, float]:
    """Return each metric's weighted mean; NaN where nothing was weighed."""
    means = {}
    for name, (value, weight) in metrics.items():
        divisor = float(weight)
        means[name] = float(value) / divisor if divisor else math.nan
    return means


class Writer(Protocol):
    """What records rows of a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values after `step` updates."""

    def sync(self) -> None:
        """Return when every row written survives a crash."""

    def close(self) -> None:
        """Write what is left and let go of files."""


class Jsonl:
    """Append rows to a file, one JSON object a line, `step` first.

    JSON has no NaN or infinity: they are written as null, which `read_rows` reads as NaN.

    Attributes:
      mark: [how many rows there are, a hash of all in them that a run which is repeated has again].
    """

    def __init__(self, path: str | Path):
        self._path = path = Path(path)
        if path.exists():
            _repair(path)
        self._count, self._hash = 0, hashlib.sha256()
        for line in _lines(path) if path.exists() else []:
            self._add(json.loads(line))
        self._file = open(path, "a+b")  # noqa: SIM115 (open as long as the run)
        self._folder = path.parent.stat()
        self._end = os.fstat(self._file.fileno()).st_size

    def _add(self, row: Mapping[str, Any]) -> None:
        self._count += 1
        self._hash.update(_lasting(row))

    @property
    def mark(self) -> list[Any]:
        return [self._count, self._hash.hexdigest()]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        row = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.append({"step": int(step), **row})

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row as it is; where the file was replaced or deleted meanwhile, to the one of its name."""
        if self._is_replaced():
            self._say("was replaced or deleted; going on in the file of that name")
            if self._path.exists() and not self._path.is_file():
                raise OSError(f"{self._path}: no plain file any more; move it away")
            self._file.close()
            self._file = open(self._path, "a+b")  # noqa: SIM115
            self._end_line()
        elif os.fstat(self._file.fileno()).st_size != self._end:
            self._say("was changed by another program; going on behind what is there")
            self._end_line()
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self._end = os.fstat(self._file.fileno()).st_size
        self._add(row)

    def _say(self, words: str) -> None:
        print(f"warning: {self._path} {words}", file=sys.stderr, flush=True)

    def _end_line(self) -> None:
        """End a line that is begun, so that the next row is whole."""
        size = os.fstat(self._file.fileno()).st_size
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._file.write(b"\n")

    def _is_replaced(self) -> bool:
        """Return whether another file, or none, has the name in the folder that this one is in."""
        try:
            if not os.path.samestat(self._path.parent.stat(), self._folder):
                return False  # the folder itself was moved: another may have its name
            return not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except OSError as error:
            return isinstance(error, FileNotFoundError) and self._path.parent.is_dir()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_rows(path: str | Path, *, numbers: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; a last line that a kill left half-written is left out.

    Raises ConfigError, naming the line, for any other line that is not a JSON object with a step, and, where
    `numbers` are wanted, for one that holds something else.
    """
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            values = json.loads(line)
            row = {key: math.nan if v is None else v for key, v in values.items()}
            rows.append({**row, "step": int(values["step"])})
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
            raise ConfigError(
                f"{path}:{number}: not a JSON object with a step; delete that line"
            ) from None
        for key, value in row.items() if numbers else ():
            if not isinstance(value, int | float):
                said = repr(value)[:40]
                raise ConfigError(f"{path}:{number}: {key} is {said}, no number; delete that line")
    return rows


def _lines(path: str | Path) -> list[bytes]:
    """Return the lines of a file, each with its newline: what is damaged may have other ends inside.

    Raises ConfigError where it is no plain file, as a pipe, which would be waited for.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{path}: no plain file; move it away")
    with open(path, "rb") as file:
        return file.readlines()


def untimed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without what a run that is repeated differs in."""
    return {name: value for name, value in row.items() if name not in TIMED}


def _repair(path: Path) -> None:
    """Cut off a last line that has no end: a kill came while it was written."""
    data = b"".join(_lines(path))
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def move_rows_aside(path: str | Path, *, after: int, scored: bool = True) -> Path | None:
    """Move the rows of steps > `after` of metrics.jsonl to metrics.<n>.jsonl; None if it has none.

    So with rows of an evaluation at `after` that is not `scored`: it is made again. Return the side file,
    which is whole on disk before a row leaves the file.
    """
    path = Path(path)
    if not path.exists():
        return None
    _repair(path)
    kept = [aside.is_kept(row["step"], row, after, scored) for row in read_rows(path)]
    parts = list(zip(kept, _lines(path), strict=True))
    return aside.divide(path, parts, side=f"{path.stem}.*{path.suffix}")


def _lasting(row: Mapping[str, Any]) -> bytes:
    """Return what a row says that a run which is repeated says again."""
    return json.dumps(untimed(row)).encode()


def check_rows(path: str | Path, mark: Sequence[Any], at: int) -> str:
    """Move aside the rows that were added since a file had this `mark` (see `Jsonl`) at step `at`.

    Those of the evaluation there are not. Return what was wrong with the rows, "" for nothing.
    """
    path, (count, expected) = Path(path), mark
    lines = _lines(path) if path.exists() else []
    if len(lines) < count:
        return f"{path}: {len(lines)} rows are there of the {count} that were written"
    found, rows = hashlib.sha256(), [json.loads(line) for line in lines]
    for row in rows[:count]:
        found.update(_lasting(row))
    if found.hexdigest() != expected:
        return f"{path}: its rows are not what was written"
    own = [True] * count + [_is_score(row, at) for row in rows[count:]]
    parts = list(zip(own, lines, strict=True))
    moved = aside.divide(path, parts, side=f"{path.stem}.*{path.suffix}")
    return f"{path}: rows were added that the run did not write; moved to {moved}" if moved else ""


def _is_score(row: Mapping[str, Any], at: int) -> bool:
    """Return whether a row is of an evaluation at step `at`."""
    return row["step"] == at and all(name == "step" or name.startswith("eval") for name in row)


def _is_screen(stream: TextIO) -> bool:
    """Return whether a bar would be seen: some terminals, of a log or a container, have no width."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class Console:
    """Show progress: a bar in a terminal or notebook, else a plain line every `seconds`.

    Rows of an evaluation (names that begin with "eval") get a line each.
    """

    def __init__(
        self,
        *,
        first_step: int,
        num_steps: int,
        stream: TextIO | None = None,
        bar: bool | None = None,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        if bar is None:
            bar = "ipykernel" in sys.modules or _is_screen(stream or sys.stderr)
        self._stream, self._num_steps = stream, num_steps
        self._clock, self._seconds = clock, seconds
        self._start: tuple[int, float] | None = None  # step and time of the first row
        self._said = -math.inf
        self._bar = None
        if bar:
            self._bar = tqdm(
                total=num_steps, initial=first_step, unit="step", file=stream, dynamic_ncols=True
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        evaluation = {k: v for k, v in values.items() if k.startswith("eval")}
        if evaluation:
            words = "  ".join(
                f"{name} {value:,.0f}" if name.endswith("/tokens") else f"{name} {value:.4g}"
                for name, value in evaluation.items()
            )
            self.say(f"step {step}  {words}")
        if len(evaluation) < len(values):
            self._progress(step, values)

    def _progress(self, step: int, values: Mapping[str, float]) -> None:
        words = _progress_words(values)
        if self._bar is not None:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = self._clock()
        self._start = self._start or (step, now)
        if now - self._said < self._seconds and step < self._num_steps:
            return
        self._said = now
        first, began = self._start
        left = ""
        if first < step < self._num_steps:
            seconds_left = (self._num_steps - step) * (now - began) / (step - first)
            left = f"  {tqdm.format_interval(seconds_left)} left"
        self.say(f"step {step}/{self._num_steps}  {words}{left}")

    def say(self, text: str) -> None:
        """Print lines without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream or sys.stdout)
        else:
            print(text, file=self._stream or sys.stdout, flush=True)

    def sync(self) -> None:
        pass  # nothing here outlives the process

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _progress_words(values: Mapping[str, float]) -> str:
    words = []
    if "train/loss" in values:
        words.append(f"loss {values['train/loss']:.4f}")
    if "tokens_per_second" in values:
        words.append(f"{tqdm.format_sizeof(values['tokens_per_second'])} tokens/s")
    if math.isfinite(values.get("mfu", math.nan)):
        words.append(f"MFU {values['mfu']:.1%}")
    return "  ".join(words)


class Writers:
    """Several writers as one; `say` prints lines beside the progress."""

    def __init__(self, writers: Sequence[Writer], *, console: Console | None = None):
        self._writers = [*writers, console] if console else list(writers)
        self._console = console

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    @property
    def mark(self) -> list[Any]:
        """The mark of the rows of metrics.jsonl; [] where there is none."""
        return next((writer.mark for writer in self._writers if isinstance(writer, Jsonl)), [])

    def say(self, text: str) -> None:
        """Print lines for a person; nowhere else are they kept."""
        if self._console:
            self._console.say(text)

    def sync(self) -> None:
        for writer in self._writers:
            writer.sync()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def open_writers(
    workdir: str | Path,
    *,
    resume_step: int | None,
    scored: bool = True,
    mark: Sequence[Any] = (),
    num_steps: int,
    wandb_project: str = "",
    config: Mapping[str, Any] | None = None,
) -> Writers:
    """Open the writers of a run in `workdir`: metrics.jsonl, tensorboard/, the console.

    `resume_step` is the restored checkpoint's step; rows of later steps are moved aside, and those of its own
    evaluation unless it is `scored`. None is a run from its start: all rows are. `mark` is of the rows when
    that checkpoint was saved: where they are not those any more it is said. Only process 0 calls it.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    kept = -1 if resume_step is None else resume_step
    move_rows_aside(workdir / "metrics.jsonl", after=kept, scored=scored)
    tensorboard.move_events_aside(workdir / "tensorboard", after=kept, scored=scored)
    if mark and (problem := check_rows(workdir / "metrics.jsonl", mark, kept)):
        print(f"warning: {problem}; training goes on as it would", file=sys.stderr, flush=True)
    writers: list[Writer] = [
        Jsonl(workdir / "metrics.jsonl"),
        tensorboard.TensorBoard(workdir / "tensorboard", first_step=kept + 1),
    ]
    if wandb_project:
        writers.append(weights_and_biases.Run(workdir, project=wandb_project, config=config or {}))
    return Writers(writers, console=Console(first_step=max(kept, 0), num_steps=num_steps))
