"""What every command shares: its `--config.section.field=value` flags, their help, its exit code."""

import argparse
import contextlib
import errno
import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from lm import config as config_lib
from lm import exits, value_types


class Parser(argparse.ArgumentParser):
    """Reads a command line; a mistake in it is one line."""

    def __init__(self, *args: Any, **options: Any):
        _open_streams()
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(exits.USER_ERROR)


def _open_streams() -> None:
    """Open to nowhere what of standard input, output and error was closed: else a file gets its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into assignments (`--config.a.b=v` or `--config.a.b v`) and the rest."""
    assignments, rest, todo = [], [], list(argv)
    while todo:
        flag = todo.pop(0)
        if not flag.startswith("--config."):
            rest.append(flag)
            continue
        if "=" not in flag and todo and not todo[0].startswith("--"):
            flag = f"{flag}={todo.pop(0)}"
        assignments.append(flag.removeprefix("--config."))
    return assignments, rest


def help_text(schema: config_lib.Schema, config: Mapping[str, Any]) -> str:
    """Return a line for each field: its flag, its type, its value here, its default and comment."""
    flat = config_lib.flatten(config)
    lines = ["Set by --config.NAME=VALUE; a duration is 100, '1e6 tokens', '2 epochs' or '10%':"]
    for name, field in config_lib.catalogue(schema, flat).items():
        value = config_lib.plain(flat.get(name, field.default))
        default = (
            "" if value == config_lib.plain(field.default) else f" [default {field.default!r}]"
        )
        head = f"  {name} ({value_types.type_name(field.type)}) = {value!r}{default}"
        lines.append(f"{head:<48}  {field.comment}".rstrip())
    return "\n".join(lines)


# What jax and Python raise where there is no more of something, and what helps.
_NO_MORE = {
    "can't start new thread": "there are too many; raise ulimit -u",
    "RESOURCE_EXHAUSTED": "it does not fit the device; lower data.batch_size or eval.batch_size, raise "
    "train.accumulate_steps, or make fewer at once",
}


def exit_on_user_error(function: Callable[[], int | None], *, debug: bool = False) -> int:
    """Return a tool's exit code: after a line 2 for a mistake (raised on with `debug`), 130 for Ctrl-C.

    141 and no line where nobody reads its output any more, as in `| head`: what a shell has for SIGPIPE.
    """
    try:
        code = function() or 0
        sys.stdout.flush()  # else it is tried when the interpreter ends, where nothing can be caught
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return exits.STOPPED
    except RuntimeError as error:
        known = [then for words, then in _NO_MORE.items() if words in str(error)]
        if debug or not known:
            raise
        print(f"error: {exits.line(error)[:200]}: {known[0]}", file=sys.stderr)
        return exits.USER_ERROR
    except (config_lib.ConfigError, OSError, MemoryError, OverflowError) as error:
        broken = isinstance(error, BrokenPipeError) or isinstance(error.__cause__, BrokenPipeError)
        if broken and _reader_is_gone():
            return exits.UNREAD
        if debug:
            raise
        why = (
            ""
            if isinstance(error, config_lib.ConfigError | OSError)
            else "too large for this machine: "
        )
        print(f"error: {why}{' '.join(str(error).split())}", file=sys.stderr)
        return exits.USER_ERROR


def check_folder(flag: str, value: str) -> None:
    """Refuse what is no folder's path: an empty one, a URL, which would be made a folder here."""
    if value == "" or "://" in value:
        raise config_lib.ConfigError(
            f"{flag}={value}: give a folder; a second place, as gs://..., is checkpoint.remote"
        )


class _Output:
    """A text stream that goes on where it cannot be written to.

    What nobody reads (a pipe's end or a terminal is gone) goes nowhere from then on; where there is no
    room for it, it is lost.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._unbroken():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unbroken():
            self._stream.flush()

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                _to_nowhere(self._stream)
            elif error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise


@contextlib.contextmanager
def unread_goes_on() -> Iterator[None]:
    """Within, no output that cannot be written is an error: Ctrl-C ends a run and the `tee` behind it, a
    terminal is closed, the disk of a log is full, and the run has to be saved."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Output(streams[0]), _Output(streams[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            try:
                stream.flush()
            except OSError:  # what there was no room for would be tried again when the process ends
                _to_nowhere(stream)


def _to_nowhere(stream: TextIO) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _reader_is_gone() -> bool:
    """Return whether nobody reads our output; what is left of it then goes nowhere."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # no file
        return False
    watch = select.poll()
    watch.register(output, 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True
