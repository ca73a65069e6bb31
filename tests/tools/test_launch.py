"""`tools.launch`: environments, ports, signals, exit codes, and that nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm import exits
from lm.config import ConfigError
from tools import launch

ROOT = Path(__file__).parent.parent.parent


def start(script, *flags, processes=2):
    """Start the launcher on a shell script."""
    words = [sys.executable, "-m", "tools.launch", f"--processes={processes}", *flags]
    return subprocess.Popen(
        [*words, "--", "sh", "-c", script],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def alive(pid):
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def test_each_process_knows_who_it_is(tmp_path):
    script = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES"; echo "$XLA_FLAGS" >&2'
    done = start(script, "--devices_per_process=3", f"--logs={tmp_path}")
    said, errors = done.communicate(timeout=60)
    assert done.returncode == 0
    assert sorted(said.splitlines()) == ["[0] 0 of 2", "[1] 1 of 2"]
    assert errors.count("--xla_force_host_platform_device_count=3") == 2
    assert "1 of 2\n" in (tmp_path / "process_1.log").read_text()


@pytest.mark.parametrize(
    ("named", "found"), [("0, 1", ["0", "1"]), ("-1", []), ("2,-1,3", ["2"]), ("", [])]
)
def test_gpus_are_named_as_cuda_reads_them(named, found):
    assert launch.visible_gpus({"CUDA_VISIBLE_DEVICES": named}) == found


def test_environments_of_gpus():
    outside = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    every = launch.environments(2, 2, 1234, outside)
    assert [own["CUDA_VISIBLE_DEVICES"] for own in every] == ["4,5", "6,7"]
    assert {own["JAX_LOCAL_DEVICE_IDS"] for own in every} == {"0,1"}
    assert all("JAX_PLATFORMS" not in own for own in every)
    with pytest.raises(ConfigError, match="there are 4 GPUs"):
        launch.environments(3, 2, 1234, outside)
    on_cpu = launch.environments(3, 2, 1234, {**outside, "JAX_PLATFORMS": "cpu"})
    assert on_cpu[2]["JAX_PROCESS_ID"] == "2" and on_cpu[2]["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("platforms", ["cuda", "tpu", "rocm"])
def test_a_platform_that_is_asked_for_is_not_left_for_the_cpu(platforms):
    outside = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": platforms}
    with pytest.raises(ConfigError, match=f"JAX_PLATFORMS={platforms}: "):
        launch.environments(2, 1, 1234, outside)
    for either in ("", "cpu", f"{platforms},cpu"):
        every = launch.environments(2, 1, 1234, {**outside, "JAX_PLATFORMS": either})
        assert [own["JAX_PLATFORMS"] for own in every] == ["cpu", "cpu"]


def test_a_port_is_held_and_the_coordinator_may_still_take_it():
    with launch.free_port() as port, socket.socket() as server, socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        for _ in range(20):  # all connections are its own
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                server.accept()[0].close()


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0), 0), ((0, 75), 75), ((76, 75), 76), ((76, 2), 2), ((76, -9, 76), 137)]
)  # fmt: skip
def test_the_worst_code_is_the_cause(codes, code):
    assert exits.worst(codes) == code


def test_the_others_are_ended_after_a_failure():
    began = time.monotonic()
    done = start("[ $JAX_PROCESS_ID = 1 ] && exit 3; sleep 600", "--grace=0.3")
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 3 and "[0] ended by SIGTERM" in errors
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_go_to_all(number):
    script = "trap 'echo stopping; exit 75' INT TERM; echo ready; while :; do sleep 0.05; done"
    done = start(script, processes=3)
    said = [done.stdout.readline() for _ in range(3)]
    done.send_signal(number)
    rest, errors = done.communicate(timeout=60)
    assert done.returncode == 75, errors
    assert sorted(said) == [f"[{i}] ready\n" for i in range(3)]
    assert sorted(rest.splitlines()) == [f"[{i}] stopping" for i in range(3)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_orphans(number):
    script = "trap '' INT TERM; echo $$; while :; do sleep 0.05; done"
    done = start(script)
    pids = [int(done.stdout.readline().split()[1]) for _ in range(2)]
    for _ in range(1 if number == signal.SIGKILL else 3):
        os.kill(done.pid, number)
        time.sleep(0.2)
    done.wait(timeout=60)
    wait_for(lambda: not any(map(alive, pids)))


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit):
        launch.main(["--processes=2"])
    assert "after -- a command" in capsys.readouterr().err


STARTED = """
import os, signal
from tools import launch

begun, original = [], launch._start


def start(words, environment):
    if len(begun) == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    begun.append(original(words, environment))
    return begun[-1]


launch._start = start
launch.run(["sleep", "60"], processes=2, devices=1, grace=30.0)
print([child.returncode for child in begun])
"""


def test_a_signal_that_comes_while_processes_start_reaches_them_all():
    words = [sys.executable, "-c", STARTED]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert done.stdout == f"{[-signal.SIGTERM] * 2}\n", done.stderr
