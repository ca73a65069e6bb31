"""A server that forks processes of training, each killed where its job says; nothing is imported twice.

    PYTHONPATH=. python -m tests.killed

Reads a job a line, {"arguments", "output", "variables", "kill"}, and prints the process it is done by, then
how that ended: its exit code, or minus the signal. jax is imported here and no device touched, so a process is
as one that was started anew, but 4 seconds sooner.

A kill is {"call", "when", "about", "number", "signal"}: at the `number`-th call of `call` of whose arguments
`about` is a part, the process sends itself the signal: "before" the call, "after" it, or when "half" of it is done.
"""

import importlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = (
    "lm.main", "lm.train", "lm.models.gpt", "lm.tasks.causal_lm", "tensorboardX.event_file_writer",
    "tensorboardX.summary", "fsspec.implementations.local",
)  # fmt: skip


def half_a_row(file: Any, row: dict) -> None:
    """Do half of `lm.metrics.Jsonl.append`."""
    line = json.dumps(row).encode()
    file._file.write(line[: len(line) // 2])
    file._file.flush()


def half_a_text(path: Path, text: Any) -> None:
    """Do half of `Path.write_text` or `Path.write_bytes`."""
    with path.open("wb") as file:
        file.write(text[: len(text) // 2].encode() if isinstance(text, str) else text[: len(text) // 2])


def half_a_record(writer: Any, data: bytes) -> None:
    """Do half of `RecordWriter.write` of tensorboardX, whose buffer may be full at any byte."""
    writer._writer.write(len(data).to_bytes(8, "little") + b"torn" + data[: len(data) // 2])
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


HALVES: dict[str, Callable] = {
    "append": half_a_row, "write_text": half_a_text, "write_bytes": half_a_text,
    "write": half_a_record, "rmtree": half_a_folder, "put": half_a_program,
    "put_file": half_a_copy, "get_file": half_a_copy,
}  # fmt: skip


def arm(call: str, when: str, about: str, number: int, sent: int) -> None:
    """Make the process send itself the signal `sent` at a call (see above)."""
    module, _, place = call.partition(":")
    *classes, name = place.split(".")
    owner: Any = importlib.import_module(module)
    for part in classes:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def armed(*args, **kwargs):
        met = (not about or about in f"{args} {kwargs}") and next(calls) == number
        if met and when == "half":
            HALVES[name](*args, **kwargs)
        if met and when != "after":
            os.kill(os.getpid(), sent)
        result = original(*args, **kwargs)
        if met and when == "after":
            os.kill(os.getpid(), sent)
        return result

    setattr(owner, name, armed)


def do(job: dict[str, Any]) -> int:
    """Train as a job says; return the exit code."""
    import jax

    from lm import hardware, main

    os.environ.update(job["variables"])
    os.setsid()
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # All programs are compiled once, and nothing is measured.
    jax.config.update("jax_compilation_cache_dir", os.environ["LM_CACHE_DIR"] + "/xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    hardware.PEAK_FLOPS["cpu"] = 1e12
    if kill := job["kill"]:
        arm(**kill)
    return main.main(job["arguments"])


def serve() -> None:
    """Do jobs until there are no more."""
    for name in PRELOADED:
        importlib.import_module(name)
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
