"""What is done about a bad step: to stop, to skip it, or to go back and leave its batch out.

A step is bad when its loss or gradient is not finite, or when it is a spike. The compiled step then keeps
the state as it was, now and in every step after, until it is told here how to go on: so nothing need be
known in time, and a run that meets no bad step does what it would do without this.

Skipped steps keep their numbers. They are listed in `<workdir>/skipped.json`, durably before the run goes on,
and with each checkpoint; a run that resumes before one of them leaves it out again, whatever its reason was.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import (
    checkpoint,
    distributed,
    experiment,
    manifests,
    peers,
    receipt,
    recorder,
    sharding,
    signals,
    spikes,
    step,
    watchdog,
)
from lm import config as config_lib
from lm.config import ConfigError
from lm.exits import DIVERGED, Diverged, Ended
from lm.log import Log

FILE = "skipped.json"
ADVICE = "Lower optim.peak_lr, lengthen optim.warmup or set optim.clip_norm"


class RolledBack(Ended):
    """The run begins again at its last good checkpoint, without the batches that are now listed."""

    code, again = DIVERGED, True


def again_when_rolled_back(run: Callable) -> Callable:
    """Return `run`, called again as often as it raises RolledBack; where a signal came it then stops."""

    @functools.wraps(run)
    def repeated(*args, **options):
        asked = math.inf
        while True:
            try:
                with signals.already(asked):
                    return run(*args, **options)
            except RolledBack as back:
                print(back)
                asked = back.stop_asked

    return repeated


class Guard:
    """Takes the steps of a run. `skipped` says of each step that is left out, counted from 0, why."""

    def __init__(
        self,
        made: experiment.Experiment,
        workdir: Path,
        saver: checkpoint.Checkpointer,
        log: Log,
        train_step: Callable,
        first: int,
        watch: watchdog.Watchdog,
    ):
        self._made, self._workdir, self._saver, self._log = made, workdir, saver, log
        self._train_step, self._cfg, self._watch = train_step, made.cfg["train"], watch
        self.skipped = read(workdir, saver.folder, first)
        self._before: Any = None  # the batch of the step before
        self.begun = False  # whether a step was taken, and so its program is there
        log.count_skipped = self.count if self._cfg.on_bad_step != "stop" or self.skipped else None

    def count(self, now: int) -> int:
        """Return how many of the steps before `now` were left out."""
        return sum(number < now for number in self.skipped)

    def listed(self, now: int) -> dict[str, str]:
        """Return those of them, for the checkpoint of `now`."""
        return {str(number): why for number, why in sorted(self.skipped.items()) if number < now}

    def take(self, now: int, state: step.TrainState, batch: step.Batch) -> tuple[Any, Any]:
        """Take step `now`; return (the state after it, its metrics or None where it is left out).

        Raises Diverged or RolledBack, of the step before.
        """
        if now in self.skipped:
            state = self.settle(now, state)
            return self._leave_out(state, now), None
        state, sums = self._train_step(state, batch)
        self.begun = True
        self._log.one_late(now + 1, sums)
        if not self._log.healthy:  # the step before: this one has changed nothing
            state = self._after_bad(state, now - 1)
            self._watch.at(peers.TRAINING, now)
            state, sums = self._train_step(state, batch)
            self._log.one_late(now + 1, sums)
        self._before = batch
        return state, sums

    def settle(self, now: int, state: step.TrainState) -> step.TrainState:
        """Return the state before `now`, when all steps before it are known to be good or left out."""
        self._log.catch_up()
        return state if self._log.healthy else self._after_bad(state, now - 1)

    def save(
        self, now: int, state: step.TrainState, scores: Mapping[str, float], **how: bool
    ) -> None:
        """Start to save step `now`: rows first, and nothing that is not finite (Diverged)."""
        self._watch.at(watchdog.SAVING, now)
        self._save(now, state, scores, **how)

    def _save(
        self, now: int, state: step.TrainState, scores: Mapping[str, float], **how: bool
    ) -> None:
        self._check_finite(now, state)
        self._log.sync()
        more = {"skipped": self.listed(now), "rows": self._log.mark}
        self._saver.save(now, state, scores, more, **how)

    def rescue(self, now: int, state: step.TrainState) -> None:
        """Save the state before step `now`, if it is not, while the run itself does something that hangs."""
        if now in self._saver.done:
            return
        self._log.catch_up()
        if not self._log.healthy:
            raise Diverged(f"step {now} was bad")
        with sharding.use(self._made.mesh):
            self._save(now, state, {}, wait=True)

    def _check_finite(self, now: int, state: step.TrainState) -> None:
        """Refuse to save parameters that are not finite: a finite gradient can make them."""
        if _finite(state):
            return
        if self._cfg.on_bad_step == "rollback":
            self._go_back(self._last_taken(now), "parameters were not finite after it")
        raise Diverged(f"step {now}: parameters are not finite, and are not saved; {self._kept()}")

    def _after_bad(self, state: step.TrainState, bad: int) -> step.TrainState:
        """Return the state after step `bad`, which `state` is still before, or raise."""
        self._watch.at(watchdog.COMPILING, bad)  # what looks into it
        why, finite = self._why(), _finite(state)
        if not finite:
            why += ", nor are the parameters before it"
        self._record(state, bad, why)
        if self._cfg.on_bad_step == "rollback":
            self._go_back(bad if finite else self._last_taken(bad), why)
        if self._cfg.on_bad_step == "skip" and finite:
            self._add([bad], why)
            self._log.forget(f"step {bad + 1} is skipped: {why}")
            return self._leave_out(state, bad)
        raise Diverged(f"step {bad + 1}: {why}; nothing was updated with it, and {self._kept()}")

    def _why(self) -> str:
        """Return what was wrong with the last step that was read."""
        metric, values = self._cfg.spike_metric, self._log.bad
        for name, words in (("loss", "loss"), ("grad_norm", "gradient")):
            if not np.isfinite(values.get(name, 0.0)):
                return f"the {words} is not finite"
        return (
            f"its {metric} of {values[metric]:.6g} is {values['zscore']:.3g} standard deviations above the "
            "running mean"
        )

    def _record(self, state: step.TrainState, bad: int, why: str) -> None:
        """Keep step `bad` for `tools.replay`; where that fails it is said, and the run goes on."""
        if not self._cfg.recordings:
            return
        try:
            said = recorder.write(
                self._workdir, self._made, bad, at_step(state, bad), self._before,
                why=why, metrics=self._log.bad,
            )  # fmt: skip
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, OSError):
                raise  # the others are told so
            print(f"notice: step {bad + 1} could not be recorded: {error}", file=sys.stderr)
        else:
            self._log.say(said)

    def _leave_out(self, state: step.TrainState, number: int) -> step.TrainState:
        """Return the state after step `number` without its update."""
        self._log.left_out(number + 1)
        return at_step(state, number + 1)

    def _go_back(self, bad: int, why: str) -> None:
        """List step `bad`, with those before it that are asked for, and raise RolledBack."""
        self._saver.settle()
        good = [step for step in manifests.good_steps(self._saver.folder) if step <= bad]
        back = int(distributed.from_first(str(good[-1] if good else 0)))
        first = max(back, bad + 1 - self._cfg.rollback_batches)
        chosen = [number for number in range(first, bad + 1) if number not in self.skipped]
        if not chosen:
            raise Diverged(
                f"step {bad + 1}: {why}; to go back is not to leave it out; {self._kept()}"
            )
        self._add(chosen, why)
        steps = f"step {bad + 1}" if len(chosen) == 1 else f"steps {chosen[0] + 1} to {bad + 1}"
        raise RolledBack(f"back to step {back}, to go on without {steps}: {why}")

    def _last_taken(self, now: int) -> int:
        """Return the last step before `now` that was not left out."""
        return next(number for number in range(now - 1, -2, -1) if number not in self.skipped)

    def _add(self, numbers: list[int], why: str) -> None:
        """List steps as left out, in a file that survives a crash. Raises Diverged when they are too many."""
        if len(self.skipped) + len(numbers) > self._cfg.max_skips:
            raise Diverged(
                f"step {numbers[-1] + 1}: {why}; {len(self.skipped)} steps are left out already "
                f"(train.max_skips={self._cfg.max_skips}; with more it goes on), and {self._kept()}"
            )
        self.skipped |= dict.fromkeys(numbers, why)
        if jax.process_index() == 0:
            listed = {str(n): self.skipped[n] for n in sorted(self.skipped)}
            run = {"identity": self._saver.identity} if self._saver.identity else {}
            manifests.write_sealed(self._workdir / FILE, {**run, **listed})

    def _kept(self) -> str:
        self._saver.settle()
        good = manifests.good_steps(self._saver.folder)
        kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        return f"{kept}. {ADVICE}"


def at_step(state: step.TrainState, number: int) -> step.TrainState:
    """Return `state` as the healthy one before step `number`."""
    places = (state.step.sharding, state.healthy.sharding)
    make = jax.jit(lambda: (jnp.int32(number), jnp.ones((), bool)), out_shardings=places)
    now, healthy = make()
    return dataclasses.replace(state, step=now, healthy=healthy)


def _finite(state: step.TrainState) -> bool:
    return bool(step.all_finite((state.params, state.local)))


def with_spikes_of(
    made: experiment.Experiment, workdir: Path, state: step.TrainState
) -> step.TrainState:
    """Return a checkpoint's state, what spikes are told by begun anew where it is of another metric."""
    old = config_lib.with_defaults(checkpoint.read_config(workdir), experiment.SCHEMA)
    if not state.spikes or old.train.spike_metric == made.cfg["train"].spike_metric:
        return state
    places = jax.tree.map(lambda x: x.sharding, state.spikes)
    return dataclasses.replace(state, spikes=jax.jit(spikes.begin, out_shardings=places)())


def set_aside(workdir: Path, folder: Path, made: experiment.Experiment) -> None:
    """Move aside what another config, which saved nothing to go on from, says there of itself."""
    if jax.process_index() > 0 or manifests.good_steps(folder):
        return
    if not (workdir / "config.json").exists():
        return
    if recorder.is_of_another(workdir, made):
        for name in (FILE, recorder.FOLDER, manifests.IDENTITY):
            if aside := manifests.move_aside(workdir / name):
                print(f"{name} is of another config, which saved nothing: moved to {aside}")


def read(workdir: Path, folder: Path, first: int) -> dict[int, str]:
    """Return the steps that a run which begins at `first` leaves out, the same in all processes."""
    found: Mapping[str, Any] = {}
    if jax.process_index() == 0:
        found = dict((manifests.read(folder, first) or {}).get("skipped", {}))
        if (workdir / FILE).exists():
            listed = receipt.read_json(workdir / FILE, sealed=True)
            if manifests.is_foreign(listed, manifests.run_of(folder)):
                raise ConfigError(f"{workdir / FILE}: another run's; restore this run's own file")
            found |= {name: why for name, why in listed.items() if name != "identity"}
        if bad := next((name for name in found if not name.isdecimal()), ""):
            raise ConfigError(f"{workdir / FILE}: damaged ({bad!r} is no step); restore the file")
    found = json.loads(distributed.from_first(json.dumps(found)))
    return {int(number): str(why) for number, why in found.items()}
