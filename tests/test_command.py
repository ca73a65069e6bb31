"""What every command does at its end: an exit code, and a line where there is something to say."""

import os
import re
import subprocess
import sys

import pytest

from lm import command, exits, main
from lm.config import ConfigError
from tools import checkpoint, launch, plot

PRINTS = """
import sys
from lm import command, config
def work():
    for number in range(int(sys.argv[1])):
        print(number)
    sys.stdin.read()  # until the test has closed the pipe
    try:
        print("end", flush=sys.argv[2] == "flush")
    except OSError as error:
        raise config.ConfigError(f"as lm.main has it: {error}") from error
sys.exit(command.exit_on_user_error(work))
"""


@pytest.mark.parametrize(
    ("lines", "flush"), [("1", "flush"), ("1", "later"), ("99999", "later"), ("1", "unbuffered")]
)
def test_a_command_whose_reader_is_gone_ends_quietly(lines, flush):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if flush == "unbuffered" else {}
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, lines, flush], env=environment, **pipes
    )
    process.stdout.close()
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_another_broken_pipe_is_a_line_and_so_is_a_mistake(capsys):
    def fail(error):
        def work():
            raise error

        return work

    for error in (BrokenPipeError(32, "Broken pipe"), ConfigError("a.b=1:\n  use 2")):
        assert command.exit_on_user_error(fail(error)) == 2
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\nerror: a.b=1: use 2\n"
    assert command.exit_on_user_error(lambda: None) == 0
    with pytest.raises(ConfigError):
        command.exit_on_user_error(fail(ConfigError("")), debug=True)


@pytest.mark.parametrize("tool", [main, checkpoint, launch, plot])
def test_a_flag_that_there_is_not_is_one_line(tool, capsys):
    with pytest.raises(SystemExit) as ended:
        tool.main(["--no_such_flag", "x"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch(r"error: .*; see python -m .* --help\n", said.err)


def test_no_more_threads_is_a_line(capsys):
    def starts():
        raise RuntimeError("can't start new thread")

    assert command.exit_on_user_error(starts) == exits.USER_ERROR
    assert "can't start new thread: there are too many; raise ulimit -u" in capsys.readouterr().err

    def fits():
        raise RuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.0TiB.\nmore"
        )

    assert command.exit_on_user_error(fits) == exits.USER_ERROR
    assert (said := capsys.readouterr().err).count("\n") == 1 and "lower data.batch_size" in said
    with pytest.raises(RuntimeError, match="another"):
        command.exit_on_user_error(lambda: (_ for _ in ()).throw(RuntimeError("another")))
