"""Nothing takes for ever: what takes longer than allowed ends the process, with a word and every stack.

Each thing that a run does has a time limit: a step with its batch, a compilation, an evaluation, the
writing of a checkpoint, and to stop once it was asked to. A thread counts its own seconds, so that a process
that was suspended is not taken for one that hangs. At the limit it says what took so long and where each
thread is, saves what can be saved, and ends the process with `exits.HUNG`.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax

from lm import exits, peers, signals

COMPILING, EVALUATING, SAVING = "compiling", "evaluating", "saving"
STOPPING, ENDING = "stopping", "ending"
LONGEST = threading.TIMEOUT_MAX / 2  # seconds that a thread can wait, and more beside
COMPARING = "comparing files"  # of a large corpus, with their digests; of any length
COPYING = "copying"  # the last copy of a checkpoint, which limits itself


class Limit(NamedTuple):
    """How long something may take: seconds, 0 for ever, and the field that says so."""

    seconds: float
    field: str


def limits(cfg: Mapping[str, Any]) -> dict[str, Limit]:
    """Return how long each thing that a run does may take, by the sections of its config."""

    def limit(section: str, field: str) -> Limit:
        return Limit(min(getattr(cfg[section], field), LONGEST), f"{section}.{field}")

    return {
        peers.TRAINING: limit("train", "step_timeout_seconds"),
        COMPILING: limit("train", "compile_timeout_seconds"),
        ENDING: limit("train", "compile_timeout_seconds"),
        EVALUATING: limit("eval", "timeout_seconds"),
        SAVING: limit("checkpoint", "timeout_seconds"),
        STOPPING: limit("checkpoint", "grace_seconds"),
    }


class Watchdog:
    """Watches one run in this process, from `start` on, on a thread of its own.

    Args:
      limits: of what is done, by its name; what has none may take for ever.
      others: the run's other processes, who are told what this one does and why it ends.
    """

    def __init__(self, limits: Mapping[str, Limit], others: peers.Alone):
        self._limits, self._others = limits, others
        self._doing: tuple[str, int] = ("starting", 0)
        self._state: Any = None
        self._lock = threading.Lock()
        self._ending = False
        self._closed = threading.Event()
        shortest = min((limit.seconds for limit in limits.values() if limit.seconds), default=100.0)
        self._pause = max(0.05, min(5.0, shortest / 20))

    def start(
        self,
        writing: Callable[[], int | None],
        stop: signals.Stop,
        save: Callable[[int, Any], None],
    ) -> None:
        """Begin to watch.

        Args:
          writing: returns the step of the checkpoint in flight, or None.
          stop: says whether the run is asked to stop.
          save: saves the state before a step; called on another thread, while the run's own is held.
        """
        self._writing, self._stop, self._save = writing, stop, save
        threading.Thread(target=self._watch, daemon=True).start()

    def at(self, doing: str, step: int, state: Any = None) -> None:
        """Note what the run does from here, and the state before `step` if it can be saved meanwhile.

        Never returns where the process is about to end: the state is then another thread's.
        """
        with self._lock:
            held = self._ending
            self._doing, self._state = (doing, step), state
        if held:
            threading.Event().wait()
        self._others.at(doing, step)

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        spent: dict[tuple[str, int], float] = {}
        then = time.monotonic()
        while not self._closed.wait(self._pause):
            now = time.monotonic()
            # A longer time is one in which nothing of this process ran.
            passed, then = min(now - then, 2 * self._pause), now
            doing = self._now()
            spent = {what: spent.get(what, 0.0) + passed for what in doing}
            for (name, step), seconds in spent.items():
                limit = self._limit(name)
                if limit is not None and 0 < limit.seconds < seconds:
                    self._end(name, step, limit)

    def _limit(self, name: str) -> Limit | None:
        """Return how long something may take: of a stop half, where there is something to save after it."""
        limit = self._limits.get(name)
        if limit and name == STOPPING and self._state is not None and jax.process_count() == 1:
            return Limit(limit.seconds / 2, f"half of {limit.field}")
        return limit

    def _now(self) -> list[tuple[str, int]]:
        """Return what is done now."""
        found = [self._doing]
        if self._stop.asked and self._doing[0] not in (ENDING, COPYING):
            found.append((STOPPING, 0))
        if (step := self._writing()) is not None and self._doing != (SAVING, step):
            found.append((SAVING, step))
        return found

    def _end(self, name: str, step: int, limit: Limit) -> NoReturn:
        with self._lock:
            self._ending, state, at = True, self._state, self._doing
        parts = [name] if name == STOPPING else [f"{name}, step {step}"]
        if name in (STOPPING, SAVING) and at != (name, step):
            parts.append(f"at {at[0]}, step {at[1]}")
        why = f"{', '.join(parts)}, took longer than {limit.seconds:g} s ({limit.field})"
        last = threading.Timer(self._grace() + 30.0, os._exit, (exits.HUNG,))
        last.daemon = True  # nobody may read what is said here
        with contextlib.suppress(RuntimeError):  # no more threads
            last.start()
        try:
            print(f"error: {why}; where each thread is:", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):  # a notebook's standard error is no file
                faulthandler.dump_traceback(all_threads=True)
            self._others.say_left(why, exits.HUNG)
            saved = "what was saved before is kept"
            if name != SAVING:
                seconds = limit.seconds if name == STOPPING else self._grace()
                saved = self._rescued(at[1], state, seconds)
            then = (
                f"the same command resumes; raise {limit.field.split()[-1]} where it was too short"
            )
            print(f"{saved}; {then}", file=sys.stderr, flush=True)
        finally:
            os._exit(exits.HUNG)

    def _grace(self) -> float:
        """Return the seconds that there are to save what can be saved."""
        return self._limits.get(STOPPING, Limit(0.0, "")).seconds or 60.0

    def _rescued(self, step: int, state: Any, limit: float) -> str:
        """Save what can be saved, in `limit` seconds; return what came of it, in a line."""
        said = [f"nothing more could be saved in {limit:g} s"]

        def work() -> None:
            try:
                if (writing := self._writing()) is not None:
                    while self._writing() == writing:
                        time.sleep(0.05)
                    said[0] = f"the checkpoint of step {writing} was waited for"
                if state is not None and jax.process_count() == 1:
                    self._save(step, state)
                    said[0] = f"step {step} is saved"
                elif writing is None:
                    said[0] = "there was nothing more that could be saved"
            except BaseException as error:  # also what is meant to end the run
                said[0] = f"step {step} could not be saved: {str(error) or type(error).__name__}"

        working = threading.Thread(target=work, daemon=True)
        try:
            working.start()
        except RuntimeError as error:
            return f"nothing more could be saved: {error}"
        working.join(limit)
        return said[0]
