"""Start a command as several processes of one run on this machine.

    python -m tools.launch --processes 4 --devices_per_process 2 -- python -m lm.main --config ...

Each process has its own CPU devices or its own GPUs, and finds the others by the environment. SIGINT,
SIGTERM and SIGHUP go to all of them; a third one kills. When a process fails, the others have `--grace`
seconds to end by themselves. The exit code is the one that says most: of a failure, else of an
interruption, else 0. No process is left behind, even where this one is killed; what they started may be.
"""

import argparse
import contextlib
import ctypes
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from lm import command, exits
from lm.config import ConfigError

_DEVICES = "--xla_force_host_platform_device_count"
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """Yield a port of the loopback interface that nobody else is given meanwhile.

    It stays bound here; the coordinator binds it too, as gRPC allows among one user's processes.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def environments(
    processes: int, devices: int, port: int, outside: Mapping[str, str]
) -> list[dict[str, str]]:
    """Return the environment of each process: its number, the coordinator, its `devices` (0 = one).

    Raises:
      ConfigError: fewer GPUs than are asked for, or JAX_PLATFORMS asks for what cannot be shared out.
    """
    gpus, devices = visible_gpus(outside), devices or 1
    platforms = outside.get("JAX_PLATFORMS") or "cpu"
    if not gpus and "cpu" not in platforms.split(","):
        raise ConfigError(
            f"JAX_PLATFORMS={platforms}: NVIDIA GPUs and CPUs are shared out here, and no such GPU is seen; "
            "use JAX_PLATFORMS=cpu, or start the processes without this tool"
        )
    if gpus and len(gpus) < processes * devices:
        raise ConfigError(
            f"--processes={processes} x --devices_per_process={devices}: there are {len(gpus)} GPUs; use "
            "fewer, or JAX_PLATFORMS=cpu"
        )
    address = f"127.0.0.1:{port}"
    every = []
    for index in range(processes):
        own = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
            "PYTHONUNBUFFERED": "1",
        }
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * devices : (index + 1) * devices])
            own["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(devices)))
        else:
            others = re.sub(rf"{_DEVICES}=\d+", "", outside.get("XLA_FLAGS", ""))
            own["XLA_FLAGS"] = f"{others} {_DEVICES}={devices}".strip()
            own["JAX_PLATFORMS"] = "cpu"
        every.append({**outside, **own})
    return every


def visible_gpus(outside: Mapping[str, str]) -> list[str]:
    """Return the NVIDIA GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    if outside.get("JAX_PLATFORMS") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in outside:
        named = (name.strip() for name in outside["CUDA_VISIBLE_DEVICES"].split(","))
        # As CUDA reads it: up to the first that is none.
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), named))
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((number for number in numbers if number.isdecimal()), key=int)


def run(
    words: Sequence[str],
    *,
    processes: int,
    devices: int = 0,
    logs: Path | None = None,
    grace: float = 60.0,
) -> int:
    """Run `words` as `processes` processes to their end; return the exit code that says most."""
    if words[0] == "python":
        words = [sys.executable, *words[1:]]
    with free_port() as port, contextlib.ExitStack() as stack:
        made = environments(processes, devices, port, os.environ)
        children: list[subprocess.Popen] = []
        stack.callback(_end, children)
        told = stack.enter_context(_forwarded(children))
        for environment in made:
            children.append(_start(words, environment))
        for number in tuple(told):  # what came before the last of them was there
            _send(children, number)
        readers = _collect(children, logs)
        ended = _wait(children, grace)
        codes = [child.returncode for child in children]
        for reader in readers:
            reader.join(5)
    for index, code in enumerate(codes):
        if code < 0:
            name = signal.Signals(-code).name
            print(f"[{index}] ended by {name}", file=sys.stderr, flush=True)
    # What is ended here says nothing of why the job is over.
    return exits.worst([code for index, code in enumerate(codes) if index not in ended])


def _start(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    """Start a process in a group of its own, which dies with this one."""
    parent, prctl = os.getpid(), getattr(ctypes.CDLL(None), "prctl", None)

    def die_with_parent() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be asked for
            os._exit(1)

    return subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _collect(children: Sequence[subprocess.Popen], logs: Path | None) -> list[threading.Thread]:
    """Pass on every line of the processes, with their number, and keep it in a file of each."""
    readers = []
    for index, child in enumerate(children):
        log: IO[bytes] | None = None
        if logs:
            logs.mkdir(parents=True, exist_ok=True)
            log = (logs / f"process_{index}.log").open("ab", buffering=0)
        for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            work = threading.Thread(
                target=_pass_on, args=(source, target, f"[{index}] ", log), daemon=True
            )
            work.start()
            readers.append(work)
    return readers


def _pass_on(source: IO[bytes], target: IO[str], prefix: str, log: IO[bytes] | None) -> None:
    for line in source:
        # What cannot be written is lost: a process whose output nobody takes would wait for ever.
        if log:
            with contextlib.suppress(OSError):
                log.write(line)
        with contextlib.suppress(OSError, ValueError):
            target.write(prefix + line.decode(errors="replace").rstrip("\n") + "\n")
            target.flush()


@contextlib.contextmanager
def _forwarded(children: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """Send SIGINT, SIGTERM and SIGHUP on to all; from the third on, kill them. Yield what has come."""
    told: list[int] = []

    def forward(number, frame):
        if number == signal.SIGHUP in told:
            return  # a shell sends one, and the kernel another
        told.append(number)
        _send(children, number if len(told) < 3 else signal.SIGKILL)

    asked = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    old = {number: signal.signal(number, forward) for number in asked}
    try:
        yield told
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen], grace: float) -> set[int]:
    """Wait for the end of all; a while after one has failed, end the others. Return which those are."""
    end, ended = float("inf"), set()
    while any(child.poll() is None for child in children):
        failed = any(
            child.poll() not in (None, exits.FINISHED, exits.RESUMABLE) for child in children
        )
        if failed and end == float("inf"):
            end = time.monotonic() + grace
        if time.monotonic() > end:
            ended |= {index for index, child in enumerate(children) if child.poll() is None}
            _end(children)
        time.sleep(0.05)
    return ended


def _end(children: Sequence[subprocess.Popen], patience: float = 5.0) -> None:
    """End every process, and what it has started."""
    running = [child for child in children if child.poll() is None]
    _send(running, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while any(child.poll() is None for child in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its group, which outlives it
        child.wait()


def _send(children: Sequence[subprocess.Popen], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    parser = command.Parser(
        prog="python -m tools.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="After -- the command; `python` is this Python.",
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument(
        "--devices_per_process", type=int, default=0, help="CPU devices or GPUs; default one"
    )
    parser.add_argument("--logs", type=Path, help="folder of a file for each process")
    parser.add_argument(
        "--grace", type=float, default=60.0, help="seconds of the others after a failure"
    )
    args, more = parser.parse_known_args(given[:at])
    if more:
        parser.error(f"{' '.join(more)}: no flag of this tool's; the command stands behind --")
    words = given[at + 1 :]
    if not words or args.processes < 1 or args.devices_per_process < 0:
        parser.error("give a positive number of processes, and after -- a command")
    return command.exit_on_user_error(
        lambda: run(
            words,
            processes=args.processes,
            devices=args.devices_per_process,
            logs=args.logs,
            grace=args.grace,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
