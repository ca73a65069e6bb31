"""Whether to stop: asked by a signal to any process of the run, and answered the same in all of them."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import exits, preemption

_ASKED: ContextVar[float] = ContextVar("asked", default=math.inf)


@contextlib.contextmanager
def already(asked: float) -> Iterator[None]:
    """Let a run that begins in this context be asked to stop since that time, if it is not infinite."""
    token = _ASKED.set(asked)
    try:
        yield
    finally:
        _ASKED.reset(token)


class Stop:
    """A request to stop.

    Attributes:
      since: when a signal has asked, by time.monotonic; else infinite.
      waits: the request waits for the step; else it stops the process at once.
    """

    waits = False

    def __init__(self) -> None:
        self.since = _ASKED.get()
        self._again = False  # a process has asked to save again, and `save_again` has not said so
        self._mesh: Mesh | None = None
        self._before: jax.Array | None = None

    def ask(self, why: str = "") -> None:
        """Ask to stop after the step; a second time changes nothing."""
        first = not self.asked
        self.since = min(self.since, time.monotonic())
        if first:
            with contextlib.suppress(OSError):  # nobody may read it
                os.write(2, f"\n{why}stopping after this step, and saving it\n".encode())

    @property
    def asked(self) -> bool:
        """Whether a signal has asked, here or, once it is agreed, in another process."""
        return self.since < math.inf

    def until(self, seconds: float) -> float:
        """Return when `seconds` from the request on are over, by time.monotonic; never of 0, or of none."""
        return self.since + (seconds or math.inf)

    def begin(self, mesh: Mesh) -> None:
        """Let requests wait for the step from now on, and all processes of `mesh` answer together."""
        self.waits = True
        if jax.process_count() > 1:
            self._mesh = mesh
            every = PartitionSpec(mesh.axis_names)
            self._places = NamedSharding(mesh, every)
            whole = NamedSharding(mesh, PartitionSpec())
            self._any = jax.jit(lambda votes: votes.any(axis=0), out_shardings=whole)

    def agreed(self, again: bool = False) -> bool:
        """Return whether to stop now; every process asks as often, and each is told the same.

        Of several processes it is the answer of the time before, so that no device waits for a host: what
        it costs is one small collective beside a step. In it goes whether this one asks to save `again`.
        """
        if self._mesh is None:
            return self.asked
        mine = np.tile([self.asked, again], (len(self._mesh.local_devices), 1))
        votes = jax.make_array_from_process_local_data(self._places, mine, (self._mesh.size, 2))
        before, self._before = self._before, self._any(votes)
        stop, asked = (False, False) if before is None else np.asarray(before)
        self._again |= bool(asked)
        if stop:
            self.since = min(self.since, time.monotonic())
        return bool(stop)

    def save_again(self) -> bool:
        """Return whether one of several processes has asked so; told once, at the same step in all."""
        again, self._again = self._again, False
        return again


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGINT, SIGTERM, SIGHUP and a cloud's notice into a request to stop after the step.

    A second one is harmless.

    Before training begins there is nothing to save: the first signal is a KeyboardInterrupt with its number,
    and a notice stops the run after its first step.
    """
    stop, old, closed = Stop(), {}, threading.Event()
    raised = again = False

    def ask(number, frame):
        nonlocal raised
        if not (stop.waits or raised):
            raised, stop.since = True, time.monotonic()
            raise KeyboardInterrupt(number)
        stop.ask()

    with contextlib.suppress(
        ValueError
    ):  # only a main thread can: elsewhere signals are its caller's
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # By `nohup` and `disown` a run is to outlive its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                old[number] = signal.signal(number, ask)
    preemption.watch(lambda notice: stop.ask(f"notice of {notice}: "), closed)
    try:
        yield stop
    except exits.Ended as error:
        error.stop_asked, again = stop.since, error.again
        raise
    finally:
        closed.set()
        for number, handler in old.items():
            over = exits.ENDS_WITH_RUN.get() and not again
            signal.signal(number, signal.SIG_IGN if over else handler)
