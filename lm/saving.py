"""Writing one checkpoint: Orbax writes the arrays, a thread hashes what it wrote and makes it good.

What fails leaves nothing that looks like a checkpoint, and frees the room that it took.
"""

import contextlib
import functools
import itertools
import logging
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lm import distributed, exits, fingerprint, manifests
from lm.config import ConfigError
from lm.stored import flatten, handler

# Seconds: how long a save may take is for `lm.watchdog` to say, not for Orbax's 20 minutes.
FOREVER = 10**8
DATA_FILE = 2**26  # bytes: files of about this size can be hashed while the next are written
_SAVES = itertools.count(1)


@contextlib.contextmanager
def _taking_turns_often() -> Iterator[None]:
    """Within, threads take turns every 0.1 ms, not 5: a step waits here while others begin to write."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@functools.cache
def _say_failures_once() -> None:
    """Leave out the tracebacks of a save that fails in threads of Orbax's: `join` tells why, in a line."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value  # tensorstore's, whose writes end after Orbax has given up
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_of_a_save)


def _is_not_of_a_save(record: logging.LogRecord) -> bool:
    """Return whether what is logged is more than an error that a thread of Orbax's hands on besides."""
    in_thread = "orbax" in record.pathname and record.threadName != threading.main_thread().name
    left = record.name == "asyncio" and "exception was never retrieved" in str(record.msg)
    return not (record.exc_info and (in_thread or left))


class Writer:
    """Writes checkpoints into `folder`, one at a time, as long as the folder is not `gone`."""

    def __init__(self, folder: Path, gone: Callable[[], str] = str):
        self.folder, self._gone = folder.absolute(), gone  # absolute, as Orbax wants it
        if "[" in str(self.folder):
            raise ConfigError(
                f"{self.folder}: Orbax takes [ in a path for a pattern, and finishes no checkpoint there; "
                "use a path without"
            )
        _say_failures_once()
        self._number = 0  # of the save among all of this process, the same in all processes
        self._met = 0  # how often this process has waited for the others in it
        self._orbax = self._new()
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._made: os.stat_result | None = (
            None  # the folder of the save in flight, in the first process
        )

    def _new(self) -> ocp.AsyncCheckpointer:
        options = ocp.AsyncOptions(timeout_secs=FOREVER, barrier_sync_fn=self._meet)
        return ocp.AsyncCheckpointer(handler(), async_options=options)

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the writers of all processes; where one of them has failed, so has this save in all."""
        self._met += 1
        distributed.meet(f"{self._name}/{self._met}", f"{self._name}/failed")

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """Within, processes wait for each other as in `_meet`.

        Orbax begins a save with collectives instead, which wait for ever for a process that has failed.
        """
        if jax.process_count() == 1:
            yield
            return
        from orbax.checkpoint._src.multihost import multihost

        before = multihost.sync_global_processes
        multihost.sync_global_processes = lambda name, **_: distributed.meet(
            f"{self._name}/{name}", f"{self._name}/failed"
        )
        try:
            yield
        finally:
            multihost.sync_global_processes = before

    @property
    def _name(self) -> str:
        return f"lm/save/{self._number}"

    def _fail(self, target: Path, error: Exception) -> OSError:
        """Tell the other processes; return the error of the save."""
        own = False
        with contextlib.suppress(OSError):
            self._check_own(target)
            own = True
        told = failed(target, error, freed=own)
        self._tell(told)
        return told

    def _tell(self, told: OSError) -> str:
        """Tell the other processes what this save failed with here; return the words."""
        words = f"process {jax.process_index()}: {told}"
        distributed.tell(f"{self._name}/failed", words)
        return words

    def _check_own(self, target: Path) -> None:
        """Raise OSError where `target` is not the folder that this save made, in the run's own folder."""
        same = self._made is not None and os.path.samestat(target.stat(), self._made)
        if problem := self._gone() or ("" if same else f"{target} is another folder now"):
            raise OSError(problem)

    def start(
        self, step: int, state: Any, more: Mapping[str, Any], good: Callable[[int], None]
    ) -> None:
        """Start to write `state`; return when its arrays are copied. No other save is in flight.

        `more` goes into the manifest: the metrics.

        `good` is called, in the first process, when the checkpoint is good: on the thread that made it so.

        Raises:
          OSError: it cannot be started, in a line.
        """
        target = self.folder / str(step)
        distributed.forget(f"lm/save/{self._number - 1}")
        self._number, self._met = next(_SAVES), 0
        with _taking_turns_often():
            self._start(target, step, state, more, good)

    def _start(
        self,
        target: Path,
        step: int,
        state: Any,
        more: Mapping[str, Any],
        good: Callable[[int], None],
    ) -> None:
        if problem := distributed.from_first(self._gone() or _make_room(target)):
            raise OSError(problem)
        self._made = target.stat() if jax.process_index() == 0 else None
        arrays, failure, told = flatten(state), None, ""
        manifest = {
            "format": manifests.FORMAT,
            "step": step,
            **more,
            "arrays": {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()},
        }
        begun: queue.SimpleQueue[bool] = queue.SimpleQueue()
        try:
            # Of the devices' own bits, which no step has taken yet. One process makes them after the copy,
            # which a step waits for; of several, nothing may run beside the writer.
            alone = jax.process_count() == 1
            found = {} if alone else fingerprint.of_all(arrays)
            what = ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=DATA_FILE)
            with self._meeting():
                self._orbax.save(target / "state", args=what)
            found = found or fingerprint.of_all(arrays)
            arguments = (begun, target, manifest, found, good)
            thread = threading.Thread(
                target=self._finish, args=arguments, name=str(step), daemon=True
            )
            thread.start()
        except Exception as error:
            failure, told = error, self._tell(failed(target, error, freed=False))
        # All have begun, or none has: else they would count their saves apart.
        told = next(filter(None, distributed.from_all(told)), "")
        begun.put(not told)
        if told:
            self._renew()
            raise self._fail(target, failure or OSError(told)) from failure
        self._thread = thread

    def _finish(
        self,
        begun: queue.SimpleQueue[bool],
        target: Path,
        manifest: dict[str, Any],
        found: Mapping[str, jax.Array],
        good: Callable[[int], None],
    ) -> None:
        if not begun.get():
            return
        try:
            if jax.process_index() > 0:
                return self._orbax.wait_until_finished()
            check = functools.partial(self._check_own, target)
            with manifests.hashing(target) as known:
                self._orbax.wait_until_finished()
            for name, described in manifest["arrays"].items():
                described.append(fingerprint.shown(found[name]))
            try:
                manifests.write(target, manifest, known, check)
            except OSError:  # the arrays are there: what is left is tried again at once
                manifests.write(target, manifest, {}, check)
        except Exception as error:  # handed on by `join`
            self._error = self._fail(target, error)
            return
        good(manifest["step"])

    @property
    def started(self) -> bool:
        """Whether a save was started that `join` has not told of."""
        return self._thread is not None

    def writing(self) -> int | None:
        """Return the step whose save is in flight, if one is."""
        thread = self._thread
        return int(thread.name) if thread is not None and thread.is_alive() else None

    def join(self) -> OSError | None:
        """Wait for the save in flight; return what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._renew()
        return error

    def _renew(self) -> None:
        """Take a new writer of Orbax's: the one that failed may still hold what went wrong."""
        old, self._orbax = self._orbax, self._new()
        with contextlib.suppress(Exception):  # the error that is told already
            old.close()

    def close(self) -> None:
        """Release Orbax's threads; nothing is in flight."""
        self._orbax.close()


def _make_room(target: Path) -> str:
    """Make the empty folder `target`, in the first process; return what went wrong, in words."""
    if jax.process_index() > 0:
        return ""
    try:
        manifests.move_aside(target)
        target.mkdir(parents=True)
    except OSError as error:
        return f"checkpoint {target.name}: {error}"
    return ""


def failed(target: Path, error: Exception, *, freed: bool) -> OSError:
    """Return the error of a save, in a line; its part is `freed`, the room that it took."""
    if freed:
        with contextlib.suppress(OSError):  # what cannot be written may not be deleted either
            (target / manifests.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
    why = exits.line(error)
    full = "No space left on device" in str(error) and "No space left" not in why
    return OSError(f"checkpoint {target.name}: {why}{' (No space left on device)' if full else ''}")
