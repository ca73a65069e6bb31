"""What a run says of its training steps while it goes: rows of metrics, and a trace of some steps."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lm import experiment, hardware, metrics


def row_of(sums: Any) -> dict[str, float]:
    """Return what a row says of the metrics of a step."""
    means = metrics.summarize(jax.device_get(sums))
    row = {f"train/{name}": value for name, value in means.items()}
    # A corpus of which the batch has no row has no loss.
    return {k: v for k, v in row.items() if k.count("/") == 1 or not math.isnan(v)}


class Log:
    """Rows of training metrics, each read one step late, so that the device never waits for the host."""

    def __init__(self, made: experiment.Experiment, writers: metrics.Writers):
        self.latest: dict[str, float] = {}
        self._made, self._writers, self.say = made, writers, writers.say
        self._every = made.cfg["train"].log_every_steps
        self._flops_per_step = made.flops_per_position * made.positions_per_step
        hardware.peak_flops()  # before the devices are busy
        self._waiting: tuple[int, Any] | None = None
        self.healthy = True  # whether the last step that was read was
        self.bad: dict[str, float] = {}  # the metrics of the last one that was not
        # How many steps were left out, in each row; None = none, ever: rows say nothing of it.
        self.count_skipped: Callable[[int], int] | None = None
        self._since: tuple[int, float] | None = None  # step and time that rates are counted from
        self._tokens = 0.0  # scored since then

    def one_late(self, now: int, sums: Any) -> None:
        """Take the metrics of step `now`; write the row before it, if one is due."""
        self.catch_up()
        self._waiting = (now, sums)

    def catch_up(self) -> None:
        """Write the row that waits, if one is due, and see whether its step was healthy."""
        if self._waiting is None:
            return
        (now, sums), self._waiting = self._waiting, None
        # Waits for the step, and is one word with the device.
        healthy, tokens = jax.device_get((sums.pop("healthy"), sums["tokens"][0]))
        self.healthy = bool(healthy)
        if not self.healthy:
            self.bad = metrics.summarize(jax.device_get(sums))
            if self.count_skipped:
                return  # its row is one of a step that is left out, or none
        self._tokens += float(tokens)
        if now % self._every == 0 or now in (1, self._made.num_steps):
            row = row_of(sums)
            if self.count_skipped:
                row["train/skipped"] = self.count_skipped(now)
            self.latest = {**row, **self._rates(now)}
            self._writers.write(now, self.latest)
        if self._since is None:  # the first step compiles: it is no measure of speed
            self._count_from(now)

    def forget(self, why: str) -> None:
        """Say `why` a step was bad, and take what comes as after a good one."""
        self._writers.say(why)
        self.healthy, self._waiting = True, None

    def left_out(self, now: int) -> None:
        """Write the row of a step without an update."""
        if self.count_skipped:
            self._writers.write(now, {"train/skipped": self.count_skipped(now)})
        self.pause(now)

    @property
    def mark(self) -> list[Any]:
        """What tells the rows so far from others; [] in a process that writes none."""
        return self._writers.mark

    def sync(self) -> None:
        """Bring all rows that are written to the disk."""
        self._writers.sync()

    def pause(self, now: int) -> None:
        """Count rates from here: what came before was not training."""
        hardware.measure_again()
        if self._since is not None:
            self._count_from(now)

    def _count_from(self, now: int) -> None:
        self._since, self._tokens = (now, time.perf_counter()), 0.0

    def _rates(self, now: int) -> dict[str, float]:
        if self._since is None or self._since[0] >= now:
            return {}
        then, start = self._since
        seconds = time.perf_counter() - start
        rate, tokens = (now - then) / seconds, self._tokens / seconds
        self._count_from(now)
        flops = self._flops_per_step / self._made.mesh.size
        # One step may have run before: its metrics are read when the next is on its way.
        mfu = hardware.utilisation(rate * flops, surely=(now - then - 1) / seconds * flops)
        return {"tokens_per_second": tokens, "steps_per_second": rate, "mfu": mfu}


def profiled(made: experiment.Experiment, first: int) -> range:
    """Return which steps are traced: from the tenth of this process on, or the last ones of fewer."""
    num_steps, count = made.num_steps, made.cfg["train"].profile_steps
    start = first + max(0, min(9, num_steps - first - count))
    return range(start, min(start + count, num_steps))


class Profile:
    """Traces `steps` into `workdir`/profile, of the first process: those of a host would share a file."""

    def __init__(self, workdir: Path, steps: range):
        self._folder = workdir / "profile"
        self._steps = steps if jax.process_index() == 0 else range(0)
        self._on = False

    def before(self, now: int) -> None:
        """Begin the trace, if step `now` is its first."""
        if self._steps and now == self._steps.start:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, now: int, sums: Any) -> None:
        """End the trace, if step `now`, whose results are `sums`, is its last."""
        if self._on and now == self._steps.stop - 1:
            jax.block_until_ready(sums)
            self.close()

    def close(self) -> None:
        """End the trace, if there is one."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
