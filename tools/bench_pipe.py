"""Processes that take turns: calls and answers are lines of JSON over pipes.

Each side of a comparison lives in a process of its own, so that neither the thread pools nor the
memory of one library disturb the other's; a side that waits for its turn sleeps in a read. Only the
standard library is needed here: a peer may run in an environment without this project's libraries.
"""

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class SideError(Exception):
    """A call failed in the other process, which printed its traceback."""


class Side:
    """A process that answers calls, to be used in a `with`."""

    def __init__(
        self,
        module: str,
        *,
        python: str = sys.executable,
        cores: Sequence[int] = (),
        **environment: str,
    ):
        """Start `python -m module` on `cores` (none = all), with `environment` added to this process's."""
        self._process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        self._owed = 0  # answers to calls that were started
        if cores:  # at once, before it starts threads
            os.sched_setaffinity(self._process.pid, cores)

    def call(self, method: str, **arguments: Any) -> Any:
        """Return what `method` of the object that the process serves returns.

        Raises:
          SideError: it raised, or the process has ended.
        """
        self.ask(method, **arguments)
        return self.answer(method)

    def ask(self, method: str, **arguments: Any) -> None:
        """Start a call, whose result `answer` returns."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended: the read says so
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
        self._owed += 1

    def answer(self, method: str) -> Any:
        """Return the result of the call that was started last, or raise as `call` does."""
        assert self._process.stdout
        line = ""
        while self._owed:  # an earlier one is left where another process of its side has failed
            line = self._process.stdout.readline()
            self._owed -= 1
        if not line:
            raise SideError(f"{method}: the process ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer["result"]

    def __enter__(self) -> "Side":
        return self

    def end(self) -> None:
        """Close its input: the end of its work."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()

    def __exit__(self, *error: Any) -> None:
        self.end()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def serve(target: Any) -> None:
    """Answer calls of methods of `target` until the input ends.

    What libraries print goes to the error stream: the output is for answers alone.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = {"result": getattr(target, method)(**arguments)}
        except Exception as error:  # told to the caller, who decides
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
