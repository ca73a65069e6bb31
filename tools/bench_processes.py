"""Several processes that are one side of a comparison, as `tools.bench --processes` has them."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any, ClassVar

from tools import launch
from tools.bench_pipe import Side


class Sides:
    """Processes of one side that work together, each on its part of the cores; called as one is."""

    # Of what each answers: of seconds the slowest's count, and rates and bytes add up.
    ANSWERS: ClassVar[dict[str, Callable]] = {
        "run": max,
        "gemm": sum,
        "bandwidth": sum,
        "peak_bytes": sum,
    }

    def __init__(self, module: str, *, processes: int, python: str = sys.executable, **given: str):
        """Start them; each finds its number, theirs, and where they meet, in its environment."""
        cores = sorted(os.sched_getaffinity(0))
        each = len(cores) // processes
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            port = stack.enter_context(launch.free_port())
            made = launch.environments(processes, 1, port, {**os.environ, **given})
            self.sides = [
                stack.enter_context(
                    Side(
                        module,
                        python=python,
                        cores=cores[index * each : (index + 1) * each],
                        **{**environment, "BENCH_MEET": f"{folder}/meet"},
                    )
                )
                for index, environment in enumerate(made)
            ]
            self._stack = stack.pop_all()

    def call(self, method: str, **arguments: Any) -> Any:
        """Return what they answer together, by `ANSWERS`; of the other methods what the first answers."""
        for side in self.sides:
            side.ask(method, **arguments)
        answers = [side.answer(method) for side in self.sides]
        together = self.ANSWERS.get(method)
        return together(answers) if together else answers[0]

    def __enter__(self) -> "Sides":
        return self

    def __exit__(self, *error: Any) -> None:
        for side in self.sides:
            side.end()
        self._stack.close()
