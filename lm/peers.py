"""The processes of a run: what they agree on before it, and how the others end when one is lost.

Each process says that it is alive, and at what, in the key-value store of jax's coordination service, and
looks there at the others. Nothing waits in silence: a process that dies, hangs or leaves ends the others,
with its name, within the run's time limit. A process that is alone has none of this.
"""

import contextlib
import faulthandler
import hashlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed

from lm.config import ConfigError
from lm.distributed import FOREVER
from lm.exits import FAILED, LOST, USER_ERROR

TRAINING = "training"  # the one thing that takes no longer than the time limit

_SHOWN = 8  # processes of which a message says what they do
_runs = itertools.count()  # of this process: each has keys of its own


class Disagreement(ConfigError):
    """The processes are not of one mind."""


class Alone:
    """The peers of a process that has none."""

    def agree(self, facts: Mapping[str, str]) -> None:
        """Check that `facts` are the same in every process. Raises Disagreement, which names one."""

    def ready(self, name: str) -> None:
        """Return when every process is here before training, each `name` once."""

    def at(self, doing: str, step: int) -> None:
        """Note what this process does, for the others."""

    def say_left(self, words: str, code: int) -> None:
        """Tell the others that this process ends, and why."""

    @contextlib.contextmanager
    def first_first(self, name: str) -> Iterator[None]:
        """Let process 0 do what is inside, then all others."""
        yield


@contextlib.contextmanager
def watch(
    timeout: float, patience: float = 0.0, *, together: tuple[type[BaseException], ...] = ()
) -> Iterator[Alone]:
    """Yield the peers of this process, watched; all leave together.

    Args:
      timeout: seconds of silence, or of no progress in training, after which this process ends.
      patience: seconds after which it ends where one is not there that it waits for before training, but
        for the one that prepares data; 0 = for ever.
      together: exceptions that all processes raise at the same point.
    """
    if jax_distributed.global_state.client is None:
        yield Alone()
        return
    peers = Peers(timeout, patience)
    try:
        peers.begin()
        yield peers
        peers.barrier("end")
    except BaseException as error:
        if isinstance(error, (Disagreement, *together)):
            peers.barrier("end")
        else:
            peers.leave(error)
        raise
    finally:
        peers.close()


class Peers(Alone):
    """The processes of a run, as one of them sees them."""

    def __init__(self, timeout: float, patience: float = 0.0):
        known = jax_distributed.global_state
        self._client, self._index, self._count = known.client, known.process_id, known.num_processes
        self._coordinator = known.coordinator_address
        self._patience = patience
        self._timeout, self._pause = timeout, max(0.5, min(10.0, timeout / 30))
        self._prefix = f"lm/run{next(_runs)}"
        self._me: list[Any] = ["starting", 0]
        self._hosts: dict[int, str] = {}
        self._since = time.monotonic()  # of what this process does
        # When each process was last heard of and what it said, and when the service answered.
        self._heard = {i: (self._since, ["starting", 0]) for i in range(self._count)}
        self._answered = self._since
        self._left: dict[int, tuple[str, int]] = {}
        self._closed = threading.Event()
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def begin(self) -> None:
        """Wait until all processes are there."""
        self._client.key_value_set(f"{self._prefix}/host/{self._index}", socket.gethostname())
        jax.devices()  # where the processes' devices become one list
        self.barrier("start", self._patience)
        self._hosts = self._read("host")

    def agree(self, facts: Mapping[str, str]) -> None:
        text = json.dumps(dict(facts), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._client.key_value_set(f"{self._prefix}/facts/{self._index}", text)
        self._client.key_value_set(f"{self._prefix}/digest/{self._index}", digest)
        self.barrier("built")  # data may be prepared here too
        self.barrier("facts", self._patience)
        digests = self._read("digest")
        counts = Counter(digests[i] for i in sorted(digests))  # of equally many, that of the first
        usual = counts.most_common(1)[0][0]
        model = min(i for i, digest in digests.items() if digest == usual)
        others = [i for i in sorted(digests) if digests[i] != usual]
        if not others:
            return
        right, wrong = (json.loads(self._get(f"facts/{i}")) for i in (model, others[0]))
        fields = [
            f"{name} is {wrong.get(name, 'missing')}, not {right.get(name, 'missing')}"
            for name in sorted({*right, *wrong})
            if right.get(name) != wrong.get(name)
        ]
        more = f" (and {len(others) - 1} more processes)" if others[1:] else ""
        raise Disagreement(
            f"{self._name(others[0])}{more} differs from {self._name(model)}: {'; '.join(fields[:5])}; "
            "start all with the same command, code and data"
        )

    def ready(self, name: str) -> None:
        self.barrier(name, self._patience)

    def barrier(self, name: str, patience: float = 0.0) -> None:
        """Return when every process is here; end this one when one is not in `patience` seconds."""
        failed: list[Exception] = []
        self._client.key_value_set(f"{self._prefix}/at/{name}/{self._index}", "", True)

        def wait() -> None:
            try:
                self._client.wait_at_barrier(f"{self._prefix}/{name}", FOREVER)
            except jax.errors.JaxRuntimeError as error:
                failed.append(error)

        waiting = threading.Thread(target=wait, daemon=True)  # in which no signal is waited for
        waiting.start()
        waiting.join(min(patience, threading.TIMEOUT_MAX) or None)
        if waiting.is_alive():
            here = self._read(f"at/{name}")
            late = [
                f"{self._name(i)}: {self._doing(i)}" for i in range(self._count) if i not in here
            ]
            field = "train.compile_timeout_seconds"
            if late:
                self._end(f"not there in {patience:g} s ({field}): {'; '.join(late[:_SHOWN])}")
            else:
                waiting.join()
        if failed:
            raise failed[0]

    def at(self, doing: str, step: int) -> None:
        if self._me != [doing, step]:
            self._me, self._since = [doing, step], time.monotonic()

    @contextlib.contextmanager
    def first_first(self, name: str) -> Iterator[None]:
        if self._index > 0:
            self.barrier(name)
        yield
        if self._index == 0:
            self.barrier(name)

    def leave(self, error: BaseException) -> None:
        """Tell the others that this process ends by `error`; where that is of their end, say so and end."""
        words = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if isinstance(error, jax.errors.JaxRuntimeError | OSError):
            # At once: exchanges that are still under way may end this process before it knows who is lost.
            print(f"error: {self._name(self._index)} ends: {words}", file=sys.stderr, flush=True)
            end = time.monotonic() + 4 * self._pause
            while time.monotonic() < end:  # what failed may be a word with a process that is gone
                if lost := self._lost(3 * self._pause):
                    self._end(f"{lost} ({words})", error)
                time.sleep(0.1)
        self.say_left(words, code_of(error))

    def say_left(self, words: str, code: int) -> None:
        def say() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(
                    f"{self._prefix}/left/{self._index}", json.dumps([words, code]), True
                )

        saying = threading.Thread(target=say, daemon=True)  # the service may be gone
        saying.start()
        saying.join(3)

    def close(self) -> None:
        """Look no longer."""
        self._closed.set()

    def _exchange(self) -> None:
        """Say that this process lives and hear of the others, every `_pause` seconds."""
        for number in itertools.count():
            try:
                said = json.dumps([number, *self._me])
                self._client.key_value_set(f"{self._prefix}/alive/{self._index}", said, True)
                alive, left = self._read("alive"), self._read("left")
            except jax.errors.JaxRuntimeError:
                alive, left = {}, {}
            else:
                self._answered = time.monotonic()
            for i, said in alive.items():
                if json.loads(said) != self._heard[i][1]:
                    self._heard[i] = (time.monotonic(), json.loads(said))
            self._left |= {
                i: tuple(json.loads(text)) for i, text in left.items() if i != self._index
            }
            if self._closed.wait(self._pause):
                return

    def _judge(self) -> None:
        """End this process when another one is lost."""
        while not self._waited(self._pause / 2):
            if lost := self._lost(self._timeout) or self._stuck():
                self._end(lost)

    def _waited(self, seconds: float) -> bool:
        """Wait so long; return whether the end has come. Time in which this process was stopped is none."""
        began = time.monotonic()
        closed = self._closed.wait(seconds)
        stopped = time.monotonic() - began - seconds
        if stopped > self._pause:  # by SIGSTOP, as a cluster suspends a job: the others were it too
            self._since, self._answered = self._since + stopped, self._answered + stopped
            self._heard = {i: (then + stopped, said) for i, (then, said) in self._heard.items()}
        return closed

    def _lost(self, seconds: float) -> str:
        """Return which processes have left, or were not heard of for `seconds`; "" for none."""
        now = time.monotonic()
        if left := [f"{self._name(i)} has ended: {words}" for i, (words, _) in self._left.items()]:
            return "; ".join(left)
        if now - self._answered > seconds:
            return f"no answer from {self._coordinator}, at process 0, for {now - self._answered:.0f} s"
        silent = [
            f"{self._name(i)} is not heard of for {now - then:.0f} s ({self._doing(i)})"
            for i, (then, _) in self._heard.items()
            if now - then > seconds and i != self._index
        ]
        return "; ".join(silent)

    def _stuck(self) -> str:
        """Return what all do where training makes no progress; "" where it does."""
        age = time.monotonic() - self._since
        if (
            self._me[0] != TRAINING or age < self._timeout + 3 * self._pause
        ):  # _lost knows it earlier
            return ""
        if any(self._said(i)[0] == "compiling" for i in range(self._count)):
            return ""  # which may take longer there: this process may have found its program in a cache
        behind = sorted(range(self._count), key=lambda i: self._said(i)[1])[:_SHOWN]
        all_do = "; ".join(f"{self._name(i)}: {self._doing(i)}" for i in behind)
        return f"no step for {age:.0f} s (train.peer_timeout_seconds): {all_do}"

    def _end(self, why: str, error: BaseException | None = None) -> NoReturn:
        """Say why and where this process was, and end it."""
        codes = [code for _, code in self._left.values()]
        code = next((code for code in codes if code != LOST), LOST)
        print(f"error: {self._name(self._index)} ends: {why}", file=sys.stderr, flush=True)
        if error is not None:
            traceback.print_exception(error)
        elif code == LOST:
            faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        self.say_left(why, code)
        os._exit(code)

    def _name(self, index: int) -> str:
        return f"process {index} ({self._hosts.get(index, 'not started')})"

    def _doing(self, index: int) -> str:
        return "{}, step {}".format(*self._said(index))

    def _said(self, index: int) -> list[Any]:
        return self._me if index == self._index else self._heard[index][1][-2:]

    def _get(self, key: str) -> str:
        return self._client.blocking_key_value_get(f"{self._prefix}/{key}", FOREVER)

    def _read(self, folder: str) -> dict[int, str]:
        """Return what each process has put into a folder of the store."""
        found = self._client.key_value_dir_get(f"{self._prefix}/{folder}")
        return {int(key.rpartition("/")[2]): value for key, value in found}


def code_of(error: BaseException) -> int:
    """Return the exit code of the other processes where one ends by `error`."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args or (signal.SIGINT,))[0]
    if isinstance(error, ConfigError):
        return USER_ERROR
    return LOST if isinstance(error, jax.errors.JaxRuntimeError | OSError) else FAILED


def code_version() -> str:
    """Return a digest of this package's source."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
