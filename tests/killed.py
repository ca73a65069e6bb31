"""A server that forks processes of training, with a kill or another trouble where their job says.

    PYTHONPATH=. python -m tests.killed

Reads a job a line, {"arguments", "workdir", "output", "variables", "troubles"}, and prints the number of the
process that does it, then how that ended: its exit code, or minus the signal. jax is imported here and no
device touched, so a process is as one that was started anew, but 4 seconds sooner.

A trouble is {"call", "when", "about", "number", "kind"}: it comes at the `number`-th call of `call` of whose
arguments `about` is a part: "before" the call, "after" it, or when "half" of it is done. Its kind is a
signal, which the process sends itself, or one of TROUBLES.
"""

import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = (
    "lm.main", "lm.train", "lm.models.gpt", "lm.tasks.causal_lm", "tensorboardX.event_file_writer",
    "tensorboardX.summary", "fsspec.implementations.local", "grain",
)  # fmt: skip

FILLED = "filled"  # the file that takes a disk's room
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # of sched.h


def half_a_row(file: Any, row: dict) -> None:
    """Do half of `lm.metrics.Jsonl.append`."""
    line = json.dumps(row).encode()
    file._file.write(line[: len(line) // 2])
    file._file.flush()


def half_a_text(path: Path, text: Any, encoding: str = "utf-8") -> None:
    """Do half of `Path.write_text` or `Path.write_bytes`."""
    data = text.encode(encoding) if isinstance(text, str) else text
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])


def half_a_record(writer: Any, data: bytes) -> None:
    """Do half of `RecordWriter.write` of tensorboardX, whose buffer may be full at any byte."""
    from tensorboardX.record_writer import masked_crc32c

    size = len(data).to_bytes(8, "little")
    check = masked_crc32c(size).to_bytes(4, "little")
    writer._writer.write(size + check + data[: len(data) // 2])
    writer._writer.flush()


def half_a_folder(folder: Any) -> None:
    """Do half of `shutil.rmtree`."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    for path in files[::2]:
        path.unlink()


def half_a_program(cache: Any, key: str, program: bytes) -> None:
    """Do half of `put` of jax's cache of compiled programs."""
    (cache.path / f"{key}-cache").write_bytes(program[: len(program) // 2])


def half_a_copy(_: Any, here: str, there: str) -> None:
    """Do half of a file system's `put_file` or `get_file`."""
    data = Path(here).read_bytes()
    Path(there).write_bytes(data[: len(data) // 2])


def half_a_file_there(_: Any, there: str, data: bytes) -> None:
    """Do half of a file system's `pipe_file`."""
    Path(there).write_bytes(data[: len(data) // 2])


HALVES: dict[str, Callable] = {
    "append": half_a_row, "write_text": half_a_text, "write_bytes": half_a_text,
    "write": half_a_record, "rmtree": half_a_folder, "put": half_a_program,
    "put_file": half_a_copy, "get_file": half_a_copy, "pipe_file": half_a_file_there,
}  # fmt: skip


def own_mounts() -> None:
    """Give the process a file system of its own to mount in, before it has threads."""
    ids = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no name spaces here")
    Path("/proc/self/setgroups").write_text("deny")
    for name, number in zip(("uid_map", "gid_map"), ids, strict=True):
        Path("/proc/self", name).write_text(f"0 {number} 1")


def read_only(workdir: str) -> None:
    """Mount the run's folder over itself, read-only; files that are open stay as they are."""
    aside = tempfile.mkdtemp()  # where nobody writes meanwhile
    for words in (
        ["--bind", workdir, aside],
        ["-o", "remount,bind,ro", aside],
        ["--bind", aside, workdir],
    ):
        subprocess.run(["mount", *words], check=True)


def no_handles(_: str) -> None:
    """Let no more files be opened."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def no_room(workdir: str) -> None:
    """Fill the disk that holds the run's checkpoints to its last byte."""
    path = Path(workdir, "checkpoints", FILLED)
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def room(workdir: str) -> None:
    """Free what was filled."""
    Path(workdir, "checkpoints", FILLED).unlink()


def clock_set_back(_: str) -> None:
    """Set the clock on the wall back by a day, and by a minute more each time that it is read."""
    original, read = time.time, itertools.count(1)
    time.time = lambda: original() - 86400 - 60 * next(read)
    time.time_ns = lambda: int(time.time() * 1e9)


TROUBLES = {f.__name__: f for f in (read_only, no_handles, no_room, room, clock_set_back)}


def beginnings(*arguments: Any) -> str:
    """Return how each argument begins: a text that is written may quote what a test looks for."""
    return ", ".join(repr(argument)[:400] for argument in arguments)


def arm(workdir: str, call: str, when: str, about: str, number: int, kind: int | str) -> None:
    """Make trouble of a kind come at a call (see above)."""

    def come() -> None:
        if isinstance(kind, str):
            TROUBLES[kind](workdir)
        else:
            os.kill(os.getpid(), kind)

    module, _, place = call.partition(":")
    *classes, name = place.split(".")
    owner: Any = importlib.import_module(module)
    for part in classes:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def armed(*args, **kwargs):
        met = (not about or about in beginnings(*args, kwargs)) and next(calls) == number
        if met and when == "half":
            HALVES[name](*args, **kwargs)
        if met and when != "after":
            come()
        result = original(*args, **kwargs)
        if met and when == "after":
            come()
        return result

    setattr(owner, name, armed)


def do(job: dict[str, Any]) -> int:
    """Train as a job says; return the exit code."""
    import jax

    from lm import hardware, main

    os.environ.update(job["variables"])
    os.setsid()
    if any(trouble["kind"] == "read_only" for trouble in job["troubles"]):
        own_mounts()
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # All programs are compiled once, and nothing is measured.
    hardware.use_compilation_cache(Path(os.environ["LM_CACHE_DIR"]) / "programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    hardware.PEAK_FLOPS["cpu"] = 1e12
    for trouble in job["troubles"]:
        arm(job["workdir"], **trouble)
    return main.main(job["arguments"])


def serve() -> None:
    """Do jobs until there are no more."""
    for name in PRELOADED:
        importlib.import_module(name)
    from lm import receipt

    receipt.packages()  # which a process reads but once
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 10)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                code = do(json.loads(line))
                sys.stdout.flush()
            finally:
                os._exit(code)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve()
