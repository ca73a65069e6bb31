"""Does a run give the same numbers again, and why do two runs differ.

    python -m tools.verify runs/mine     # from the last checkpoint with later records, to the end
    python -m tools.verify runs/mine --steps 200:300
    python -m tools.verify --compare runs/mine runs/other

The first takes the steps of a run again, from its checkpoint, and names the first step and quantity (batch,
parameter, gradient, metric, score) that is not what was recorded, or should be recorded and is not. The
second says where the numbers part, and what differs there in config, code, versions, devices and data.
Nothing in a run is changed. Exit code 0 for the same, 1 for a difference, 2 for a mistake.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm import command, exits, startup
from lm import config as config_lib
from tools import rows

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
    record, folder = rows.Record(workdir), (workdir / "checkpoints").absolute()
    good = [step for step in manifests.good_steps(folder) if not manifests.problem(folder, step)]
    first, last = _stretch(steps, record, good, workdir)
    start = max((step for step in good if step <= first), default=0)
    config = _as_then(config, workdir, start, last)
    experiment.prepare(config)
    hardware.use_compilation_cache(corpus.cache_folder() / "programs")
    made = experiment.build(config)
    data = receipt.read_json(workdir / "data.json")
    if data.get("fingerprint") != made.corpus.fingerprint:
        raise config_lib.ConfigError(
            f"{workdir}: its data has changed since; restore what data.path names"
        )
    then = record.receipt(start).get("environment") or receipt.environment(workdir)
    for name, now in experiment.environment(made).items():
        if then.get(name, now) != now:
            print(f"notice: another {name}: {then[name]} -> {now}; numbers may differ by rounding")
    with sharding.use(made.mesh):
        init, _, _, abstract = jitted = experiment.jitted(made)
        if start in good:
            arrays = stored.restore(folder, start, stored.flatten(abstract))
            state = stored.unflatten(abstract, arrays)
        else:
            state = initial.fresh_state(made, init)
        print(f"steps {start} to {last} again, {len(record.steps(first, last))} of them recorded")
        skipped = guard.read(workdir, folder, start)
        repeat = _Repeat(made, jitted, record, skipped)
        yield from repeat.run(state, range(start, last + 1), first)


def _as_then(config: Any, workdir: Path, first: int, last: int) -> Any:
    """Return the config with what step `first` was trained with, where a later start has changed it.

    Raises ConfigError where what the numbers of a step go by was changed between `first` and `last`.
    """
    from lm import experiment, receipt, recorder
    from lm import workdir as workdirs

    def then(step: int) -> dict[str, Any]:
        found = receipt.config_at(workdir, step).items()
        kept = ("optim.", "train.", "eval.")
        return {n: value for n, value in found if n.startswith(kept) or n in workdirs.FREE}

    # With another one of these no stretch is the same, beside the state.
    of_steps = (*recorder.OF_NUMBERS, "train.num_steps")
    at_first = then(first)
    changed: list[str] = []
    starts = {found.get("first_step", 0) for found in receipt.read_all(workdir)}
    for at in sorted(step for step in starts if first < step < last and at_first):
        new = [name for name, value in then(at).items() if at_first.get(name, value) != value]
        if others := [n for n in new if n.startswith(of_steps) and n not in workdirs.FREE]:
            raise config_lib.ConfigError(
                f"--steps: {', '.join(others)} changed at step {at}, and steps are taken from {first} on; "
                f"verify up to {at}, or from a checkpoint after it on"
            )
        changed += [name for name in new if name not in changed]
    if changed:
        print(f"notice: {', '.join(changed)}: all steps are taken with what step {first} had")
    return config_lib.with_defaults({**config_lib.flatten(config), **at_first}, experiment.SCHEMA)


def _stretch(steps: str, record: rows.Record, good: list[int], workdir: Path) -> tuple[int, int]:
    """Return the first and last step to compare."""
    end = record.last
    if steps:
        asked = re.fullmatch(r"(\d{1,18}):(\d{1,18})", steps)
        first, last = map(int, asked.groups()) if asked else (0, 0)
        if first >= last:
            raise config_lib.ConfigError(f"--steps={steps:.40}: write A:B, such as 200:300")
        if last > end:
            raise config_lib.ConfigError(f"--steps={steps}: {workdir} has records up to step {end}")
    else:
        first, last = max((step for step in good if step < end), default=0), end
    if not record.steps(first, last):
        raise config_lib.ConfigError(
            f"{workdir}: nothing is recorded after step {first} up to {last}"
        )
    return first, last


class _Repeat:
    """Takes steps again, but for `skipped` ones, and compares them with their record."""

    def __init__(self, made, jitted, record: rows.Record, skipped: Mapping[int, str]):
        from lm import trail

        self._made, self._record, self._skipped = made, record, skipped
        _, self._train_step, self._eval_step, _ = jitted
        self._fingerprints = trail.Fingerprints(made)
        self._eval_every = made.steps_of("eval", "every_steps")

    def run(self, state, steps: range, first: int) -> Iterator[str]:
        """Take all `steps` but the last; yield what differs in the first, from `first` on, that does."""
        from lm import guard, placement

        for now in steps:
            differs = self._at(now, state) if now >= first else []
            ending = now == steps[-1]
            if not ending or self._wanted(rows.TRAIL, now):
                batch = placement.place_batch(self._made.mesh, self._made.batches[now])
                if not differs and now >= first and self._wanted(rows.TRAIL, now):
                    found = self._fingerprints.of_step(state, batch)
                    differs = rows.different(self._record.of(rows.TRAIL, now), found, at=now)
            if not ending and not differs:
                if now in self._skipped:
                    state, sums = guard.at_step(state, now + 1), {}
                else:
                    state, sums = self._train_step(state, batch)
                    sums.pop("healthy")
                if now >= first and self._wanted(rows.TRAIN, now + 1):
                    differs = self._row(now + 1, sums)
            for name, at, then, again in differs[:_SHOWN]:
                yield f"step {at}: {name} is {again}, and was {then}"
            if differs:
                return

    def _wanted(self, kind: str, step: int) -> bool:
        """Return whether a kind is recorded at a step, or should be."""
        in_words = self._eval_every > 0 and step % self._eval_every == 0
        return bool(self._record.of(kind, step)) or self._record.due(kind, step, in_words=in_words)

    def _at(self, now: int, state) -> list[rows.Difference]:
        """Return what differs in a state: its checkpoint, its evaluation."""
        from lm import signals, train

        differs: list[rows.Difference] = []
        if saved := self._record.saved(now):
            found = self._fingerprints.of_state(state)
            if self._record.begins(now):  # what was saved may have been read into other arrays
                common = self._record.alike(now, state)
                saved, found = ({n: x[n] for n in common} for x in (saved, found))
            differs = rows.different(saved, found, at=now)
        if not differs and self._wanted(rows.EVAL, now):
            scores = train.score(self._made, self._eval_step, state, signals.Stop())
            differs = rows.different(self._record.of(rows.EVAL, now), scores, at=now)
        return differs

    def _row(self, step: int, sums) -> list[rows.Difference]:
        """Return what differs in the row of a step that came to `sums`."""
        from lm import log

        found, recorded = log.row_of(sums), self._record.of(rows.TRAIN, step)
        mode = self._record.setting("train.on_bad_step", rows.TRAIN, step) or "stop"
        if rows.SKIPPED in recorded or mode != "stop":
            found[rows.SKIPPED] = float(sum(number < step for number in self._skipped))
        return rows.different(recorded, found, at=step)


def compare(left: Path, right: Path) -> Iterator[str]:
    """Yield why two runs differ, and where their numbers part.

    Why: by the receipts of the starts that took the steps where they part; else by the newest.
    """
    one, two = (rows.Record(workdir) for workdir in (left, right))
    for workdir, record in ((left, one), (right, two)):
        if not record.receipts:
            raise config_lib.ConfigError(f"{workdir}: no receipts there; give the folder of a run")
    if not any(record.rows or record.marks for record in (one, two)):
        raise config_lib.ConfigError(
            f"{left} and {right}: nothing is recorded in either; give runs that have taken steps"
        )
    causes, differ = rows.part(one, two)
    starts = {receipt.get("first_step") for record in (one, two) for receipt in record.receipts}
    steps = [step for step in causes if step == causes.start or step in starts]
    pairs = [(one.receipt(step), two.receipt(step)) for step in steps]
    found = [_why(*pair) for pair in pairs or [(one.receipts[-1], two.receipts[-1])]]
    yield from dict.fromkeys(itertools.chain.from_iterable(found))
    for name, step, was, now in differ[:_SHOWN]:
        yield f"numbers: they part at step {step}: {name} {was} -> {now}"
    if one.last != two.last:
        same = "" if differ else f"; up to step {min(one.last, two.last)} the numbers are the same"
        yield f"length: the last step recorded is {one.last} -> {two.last}{same}"


def _why(one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    """Yield what differs in two receipts."""
    a, b = one.get("config", {}), two.get("config", {})
    for name in sorted({*a, *b}):
        (left, of_left), (right, of_right) = (x.get(name, (rows.MISSING, "")) for x in (a, b))
        if left != right:
            yield f"config: {name} {left!r} ({of_left}) -> {right!r} ({of_right})"
    for part in ("code", "packages", "environment", "variables", "data"):
        a, b = one.get(part, {}), two.get(part, {})
        for name in sorted({*a, *b}):
            if a.get(name) != b.get(name):
                left, right = (x.get(name, rows.MISSING) for x in (a, b))
                yield f"{part}: {name} {left!r} -> {right!r}"


if __name__ == "__main__":
    sys.exit(main())
