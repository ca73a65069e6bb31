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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class SideError(Exception):
    """A call failed in the other process, which printed its traceback."""


class Side:
    """A process that answers calls, to be used in a `with`."""

    def __init__(self, module: str, *, python: str = sys.executable, **environment: str):
        """Start `python -m module`, with `environment` added to this process's."""
        self._process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )

    def call(self, method: str, **arguments: Any) -> Any:
        """Return what `method` of the object that the process serves returns.

        Raises:
          SideError: it raised, or the process has ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended: the read says so
            stdin.write(json.dumps([method, arguments]) + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line:
            raise SideError(f"{method}: the process ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer["result"]

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()  # the end of its input is the end of its work
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
