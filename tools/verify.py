"""Does a run give the same numbers again, and why do two runs differ.

    python -m tools.verify runs/mine     # from the last checkpoint with later records, to the end
    python -m tools.verify runs/mine --steps 200:300
    python -m tools.verify --compare runs/mine runs/other

The first takes the steps of a run again, from its checkpoint, and names the first step and quantity (batch,
parameter, gradient, metric) that is not what was recorded; the second lists what differs in config, code,
versions, devices and data, and where the numbers part. Nothing in a run is changed. Exit code 0 for the same,
1 for a difference, 2 for a mistake.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lm import command, exits, startup
from lm import config as config_lib

_SHOWN = 5


def main(argv: list[str] | None = None) -> int:
    """Read the flags, print what differs, return the exit code."""
    parser = command.Parser(
        prog="python -m tools.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="*", metavar="RUN", help="a run's workdir")
    parser.add_argument("--steps", default="", metavar="A:B", help="updates after step A, up to B")
    parser.add_argument("--compare", nargs=2, metavar="RUN", help="two runs' workdirs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(argv)

    def work() -> int:
        if (
            bool(args.compare) == bool(args.run)
            or len(args.run) > 1
            or (args.compare and args.steps)
        ):
            raise config_lib.ConfigError(
                "give one RUN, with --steps=A:B or without, or --compare and two"
            )
        if args.compare:
            return _say(compare(*map(Path, args.compare)))
        return _say(verify(Path(args.run[0]), args.steps))

    return command.exit_on_user_error(work, debug=args.debug)


def _say(lines: Iterator[str]) -> int:
    """Print what differs as it is found; return the exit code."""
    count = 0
    for count, line in enumerate(lines, start=1):  # noqa: B007
        print(line, flush=True)
    if not count:
        print("the same")
    return exits.FAILED if count else exits.FINISHED


def verify(workdir: Path, steps: str = "") -> Iterator[str]:
    """Take the steps of a run again; yield what is not as recorded, of the first such step.

    Raises:
      ConfigError: no run, no record in `steps`, or data that is not the run's.
    """
    startup.prepare()
    from lm import (
        checkpoint,
        experiment,
        flags,
        guard,
        hardware,
        initial,
        manifests,
        receipt,
        sharding,
        stored,
    )
    from lm.data import corpus

    config = config_lib.with_defaults(checkpoint.read_config(workdir), experiment.SCHEMA)
    record, folder = Record(workdir), (workdir / "checkpoints").absolute()
    good = [step for step in manifests.good_steps(folder) if not manifests.problem(folder, step)]
    first, last = _stretch(steps, record, good, workdir)
    start = max((step for step in good if step <= first), default=0)
    config = _as_then(config, workdir, start, last)
    startup.set_threads(config.train.exact_reduction)
    sizes = {axis: config.mesh[axis] for axis in sharding.ORDER}
    flags.set_flags(startup.platform(), sizes, config.mesh.xla_flags)
    hardware.use_compilation_cache(corpus.cache_folder() / "xla")
    made = experiment.build(config)
    data = receipt.read_json(workdir / "data.json")
    if data.get("fingerprint") != made.corpus.fingerprint:
        raise config_lib.ConfigError(
            f"{workdir}: its data has changed since; restore what data.path names"
        )
    for name, now in experiment.environment(made).items():
        if (then := receipt.environment(workdir).get(name, now)) != now:
            print(f"notice: another {name}: {then} -> {now}; numbers may differ by rounding")
    with sharding.use(made.mesh):
        init, train_step, _, abstract = experiment.jitted(made)
        if start in good:
            arrays = stored.restore(folder, start, stored.flatten(abstract))
            state = stored.unflatten(abstract, arrays)
        else:
            state = initial.fresh_state(made, init)
        print(f"steps {start} to {last} again, {len(record.steps(first, last))} of them recorded")
        skipped = guard.read(workdir, folder, start)
        yield from _repeat(made, train_step, state, record, range(start, last), first, skipped)


def _as_then(config: Any, workdir: Path, first: int, last: int) -> Any:
    """Return the config with what step `first` was trained with, where a later start has changed it."""
    from lm import experiment, receipt

    def then(step: int) -> dict[str, Any]:
        found = receipt.config_at(workdir, step).items()
        return {name: value for name, value in found if name.startswith(("optim.", "train."))}

    at_first, at_last = then(first), then(last - 1)
    if changed := [name for name, value in at_last.items() if at_first.get(name) != value]:
        print(f"notice: {', '.join(changed)}: all steps are taken with what step {first} had")
    return config_lib.with_defaults({**config_lib.flatten(config), **at_first}, experiment.SCHEMA)


def _stretch(steps: str, record: "Record", good: list[int], workdir: Path) -> tuple[int, int]:
    """Return the first and last step to compare."""
    end = record.last
    if steps:
        begin, colon, stop = steps.partition(":")
        if not (colon and begin.isdecimal() and stop.isdecimal() and int(begin) < int(stop)):
            raise config_lib.ConfigError(f"--steps={steps}: write A:B, such as 200:300")
        first, last = int(begin), int(stop)
        if last > end:
            raise config_lib.ConfigError(f"--steps={steps}: {workdir} has records up to step {end}")
    else:
        first, last = max((step for step in good if step < end), default=0), end
    if not record.steps(first, last):
        raise config_lib.ConfigError(
            f"{workdir}: nothing is recorded after step {first} up to {last}"
        )
    return first, last


def _repeat(
    made, train_step, state, record: "Record", steps: range, first: int, skipped: Mapping[int, str]
) -> Iterator[str]:
    """Take `steps` but for `skipped` ones; yield what differs in the first, from `first` on, that does."""
    import jax

    from lm import guard, metrics, placement, trail

    fingerprints = trail.Fingerprints(made)
    for now in steps:
        batch = placement.place_batch(made.mesh, made.batches[now])
        differs: list[Difference] = []
        if now >= first and (marks := record.marks.get(now)):
            differs = different(marks, fingerprints.of_step(state, batch), at=now)
        if now in skipped:
            state, sums = guard.at_step(state, now + 1), {}
        else:
            state, sums = train_step(state, batch)
            sums.pop("healthy")
        row = {k: v for k, v in record.rows.get(now + 1, {}).items() if k.startswith("train/")}
        if now >= first and row:
            means = metrics.summarize(jax.device_get(sums))
            found = {f"train/{name}": value for name, value in means.items()}
            differs = differs or different(row, found, at=now + 1)
        if now + 1 >= first and (saved := record.saved(now + 1)):
            differs = differs or different(saved, fingerprints.of_state(state), at=now + 1)
        if now + 1 == steps.stop and (marks := record.marks.get(steps.stop)):
            differs = differs or different(marks, fingerprints.of_state(state), at=steps.stop)
        for name, at, then, again in differs[:_SHOWN]:
            yield f"step {at}: {name} is {again}, and was {then}"
        if differs:
            return


class Record:
    """The numbers of a run: `rows` of metrics.jsonl and `marks` of fingerprints.jsonl, by step."""

    def __init__(self, workdir: Path):
        from lm import metrics, trail

        path = workdir / "metrics.jsonl"
        if not path.is_file():
            raise config_lib.ConfigError(
                f"{workdir}: no metrics.jsonl there; give the folder of a run"
            )
        self._folder = workdir / "checkpoints"
        self.rows: dict[int, dict[str, float]] = {}
        for row in metrics.read_rows(path):
            values = {name: value for name, value in metrics.untimed(row).items() if name != "step"}
            self.rows.setdefault(int(row["step"]), {}).update(values)
        marks = workdir / trail.FILE
        found: list[Any] = metrics.read_rows(marks) if marks.exists() else []
        self.marks = {int(row["step"]): row["fingerprints"] for row in found}

    @property
    def last(self) -> int:
        """The last step with a record."""
        return max([*self.rows, *self.marks], default=0)

    def steps(self, first: int, last: int) -> list[int]:
        """Return the steps after `first` up to `last` that have a record."""
        return sorted(step for step in {*self.rows, *self.marks} if first < step <= last)

    def saved(self, step: int) -> dict[str, str]:
        """Return the fingerprints in the manifest of a checkpoint; {} where there are none."""
        from lm import manifests

        arrays = (manifests.read(self._folder, step) or {}).get("arrays", {})
        return {name: about[2] for name, about in arrays.items() if len(about) > 2}


class Difference(NamedTuple):
    name: str
    step: int
    recorded: Any
    found: Any


def different(
    recorded: Mapping[str, Any], found: Mapping[str, Any], *, at: int
) -> list[Difference]:
    """Return what differs at a step. NaN is NaN; what one side lacks is left out."""
    pairs = [
        Difference(name, at, recorded[name], found[name]) for name in recorded if name in found
    ]
    return [pair for pair in pairs if repr(pair.recorded) != repr(pair.found)]


def compare(left: Path, right: Path) -> Iterator[str]:
    """Yield why the newest starts of two runs differ, and where their numbers part."""
    from lm import receipt

    receipts = [receipt.last(workdir) for workdir in (left, right)]
    for workdir, found in zip((left, right), receipts, strict=True):
        if not found:
            raise config_lib.ConfigError(f"{workdir}: no receipts there; give the folder of a run")
    a, b = (dict(found["config"]) for found in receipts)
    for name in sorted({*a, *b}):
        (one, of_one), (two, of_two) = a.get(name, ("missing", "")), b.get(name, ("missing", ""))
        if one != two:
            yield f"config: {name} {one!r} ({of_one}) -> {two!r} ({of_two})"
    for part in ("code", "packages", "environment", "variables", "data"):
        one, two = (found.get(part, {}) for found in receipts)
        for name in sorted({*one, *two}):
            if one.get(name) != two.get(name):
                yield f"{part}: {name} {one.get(name, 'missing')!r} -> {two.get(name, 'missing')!r}"
    yield from _part(Record(left), Record(right))


def _part(left: Record, right: Record) -> Iterator[str]:
    """Yield where the numbers of two runs part."""
    for step in sorted({*left.rows, *left.marks} & {*right.rows, *right.marks}):
        # A row of metrics is of the step that led to its step; the fingerprints are of the next one.
        found = different(left.rows.get(step, {}), right.rows.get(step, {}), at=step)
        found += different(left.saved(step), right.saved(step), at=step)
        found += different(left.marks.get(step, {}), right.marks.get(step, {}), at=step)
        for name, _, one, two in found[:_SHOWN]:
            yield f"numbers: they part at step {step}: {name} {one} -> {two}"
        if found:
            break
    if left.last != right.last:
        yield f"numbers: the last step recorded is {left.last} -> {right.last}"


if __name__ == "__main__":
    sys.exit(main())
