"""How a command can end, and the exit code of each end: the one table (the README shows it).

An exception of a run that ends early carries its code. A process that cannot raise
(it hangs, or another one of the run is gone) ends with its code at once.
"""

import math
import signal
from contextvars import ContextVar

FINISHED = 0
FAILED = 1
USER_ERROR = 2
DIVERGED = 3
DATA_ENDED = 4
RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try again
LOST = 76
HUNG = 77
HUNG_UP = 128 + signal.SIGHUP
STOPPED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
UNREAD = 128 + signal.SIGPIPE

MEANINGS = {
    FINISHED: "finished",
    FAILED: "an error in the code, with its traceback; of a tool that verifies, a difference or damage",
    USER_ERROR: "a mistake, told in one line",
    DIVERGED: "the loss, a gradient or the parameters were not finite, or a spike; nothing of it is saved",
    DATA_ENDED: "the data ended (data.epochs) before the last step; what was trained is saved",
    RESUMABLE: "stopped by SIGINT, SIGTERM, SIGHUP or a preemption notice, and saved; the same command "
    "resumes",
    LOST: "another process of the run died or hung; the same command resumes",
    HUNG: "a step, batch, compilation, evaluation, save or stop took too long; the same command resumes",
    HUNG_UP: "stopped by SIGHUP, as its terminal was closed, before training began: nothing to save",
    STOPPED: "stopped by SIGINT before training began: nothing to save",
    TERMINATED: "stopped by SIGTERM before training began: nothing to save",
    UNREAD: "nobody reads the output of a tool; a run goes on",
}


# Whether this process ends with its run: what signals ask of it after that is done already.
ENDS_WITH_RUN: ContextVar[bool] = ContextVar("ends_with_run", default=False)


class Ended(Exception):
    """A run ends before its last step, in all of its processes after the same one."""

    code: int
    error = True  # else it was asked for
    again = False  # the run begins again at once
    stop_asked = math.inf  # when a signal came meanwhile, by time.monotonic


class Interrupted(Ended):
    """Training was asked to stop, and can go on from a checkpoint."""

    code, error = RESUMABLE, False


class Diverged(Ended):
    """A step was bad (see `lm.guard`), and no parameter was changed by it."""

    code = DIVERGED


class DataEnded(Ended):
    """There is no batch for the next step."""

    code = DATA_ENDED


def line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def words(code: int) -> str:
    """Return in a word or two how a process with this exit code ended."""
    if code in (RESUMABLE, HUNG_UP, STOPPED, TERMINATED):
        return "interrupted"
    named = {FINISHED: "finished", DIVERGED: "diverged", DATA_ENDED: "data ended", HUNG: "hung"}
    return named.get(code, f"exit code {code}")


def worst(codes: list[int]) -> int:
    """Return the exit code that says most: one of its own failure, one of another's, one of a stop, 0."""
    shown = [code if code >= 0 else 128 - code for code in codes]
    order = {FINISHED: 0, RESUMABLE: 1, LOST: 2}
    return max(shown, key=lambda code: (order.get(code, 3), code))
