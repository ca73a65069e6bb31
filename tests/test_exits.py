"""The one table of exit codes: complete, told apart, and what the README says."""

import math
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm import exits, experiment, main, manifests, stored, train
from lm.config import ConfigError
from tests import quickly
from tests.test_distributed import EXPERIMENT
from tests.test_train import assert_same_run

ROOT = Path(__file__).parent.parent
CODES = {k: v for k, v in vars(exits).items() if k.isupper() and isinstance(v, int)}


def test_every_code_has_a_meaning_and_no_two_are_the_same():
    assert len(set(CODES.values())) == len(CODES)
    assert set(exits.MEANINGS) == set(CODES.values())


def test_the_readme_has_the_table():
    text = (ROOT / "README.md").read_text().split("### How a run ends")[1].split("\n### ")[0]
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert {int(code): words for code, words in rows} == exits.MEANINGS


def test_no_other_place_has_a_code_of_its_own():
    """A number that stands for an end is written in one file."""
    numbers = rf"(return|exit\(|== |= )\s*({'|'.join(str(c) for c in CODES.values() if c > 4)})\b"
    for path in [*(ROOT / "lm").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for line in path.read_text().splitlines() if path.name != "exits.py" else []:
            assert not re.search(numbers, line) or "SIGPIPE" in line, f"{path}: {line}"


@pytest.mark.parametrize("end", exits.Ended.__subclasses__())
def test_main_ends_with_the_code_of_the_exception(end, tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()")

    def ended(*args, **kwargs):
        raise end("words")

    monkeypatch.setattr(train, "run", ended)
    assert main.main(["--config", str(path), "--workdir", str(tmp_path)]) == end.code
    said = capsys.readouterr()
    assert ("error: words" in said.err) == end.error
    assert ("to resume" in said.out) == (not end.error)


def test_data_that_ends_is_told_and_saved_and_goes_on(tiny, tmp_path, capsys):
    whole = tiny(train__num_steps=12, data__batch_size=400)
    steps = experiment.build(whole).batches.steps_per_epoch
    assert 3 < steps < 5
    whole.eval.every_steps = math.ceil(steps)
    train.run(whole, tmp_path / "whole")
    config = tiny(train__num_steps=12, data__batch_size=400, data__epochs=1)
    config.eval.every_steps = math.ceil(steps)
    for _ in range(2):  # it says the same again, and reads nothing more
        with pytest.raises(
            exits.DataEnded, match=r"ended at step \d of 12, which is saved; raise data.epochs"
        ):
            train.run(config, tmp_path / "cut")
        assert manifests.good_steps(tmp_path / "cut" / "checkpoints")[-1] == math.ceil(steps)
        saved = manifests.read(tmp_path / "cut" / "checkpoints", math.ceil(steps))
        assert saved["metrics"]["eval/loss"] > 0
    assert "were written" not in capsys.readouterr().err
    config.data.epochs = 99
    train.run(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 12)


def test_the_save_where_the_data_ends_is_read_back_also_where_it_is_due(
    tiny, tmp_path, monkeypatch
):
    config = tiny(train__num_steps=12, data__batch_size=400, data__epochs=1)
    end = math.ceil(experiment.build(config).batches.steps_per_epoch)
    config.checkpoint.every_steps = end
    read = []

    def problem(folder, step, *rest, real=stored.problem):
        read.append(step)
        return real(folder, step, *rest)

    monkeypatch.setattr(stored, "problem", problem)
    with pytest.raises(exits.DataEnded, match=rf"ended at step {end} of 12"):
        train.run(config, tmp_path)
    assert read == [end]


def test_as_many_steps_as_the_text_has_are_no_early_end(tiny, tmp_path):
    config = tiny(
        data__epochs=1, data__batch_size=4096, train__num_steps="1 epoch", optim__warmup=0
    )
    assert "eval/loss" in train.run(config, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.epochs=1: the corpora of a mixture"):
        train.run(
            tiny(data__epochs=1, data__path=(), data__mixture=(("python_docs", 1),)), tmp_path
        )


MAIN = """
from lm import distributed, exits, main
exits.ENDS_WITH_RUN.set(True)
distributed.leave(main.main())
"""


def process(path, workdir, *flags, before="", closed="", output=subprocess.PIPE, **options):
    """Start a run as a user does: in the code `before`, with streams `closed`, where these are given."""
    program = ["-c", before + MAIN] if before else ["-m", "lm.main"]
    command = [
        "sh", "-c", f'exec "$@" {closed}', "sh",
        sys.executable, *program, "--config", str(path), "--workdir", str(workdir), *flags,
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": quickly.FLAGS, "PYTHONPATH": str(ROOT)}
    environment |= quickly.of_processes()
    return subprocess.Popen(
        command, env={**environment, "JAX_PLATFORMS": "cpu"}, text=True, **options,
        stdout=output, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(running, words):
    """Return what a process has said until a line with these words."""
    said = ""
    for line in running.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(said)


@pytest.fixture
def small(tmp_path, text_file):
    path = tmp_path / "small.py"
    path.write_text(EXPERIMENT.format(path=str(text_file)).replace('"fsdp": 2', '"fsdp": 1'))
    return path


ONE = ("--config.mesh.data=-1", "--config.eval.max_tokens=128")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "words", "flags"),
    [
        (exits.FINISHED, "next:", ["--config.train.num_steps=2"]),
        (exits.USER_ERROR, "did you mean optim.peak_lr?", ["--config.optim.lr=1"]),
        (exits.DIVERGED, "not finite", ["--config.optim.peak_lr=1e18", "--config.optim.warmup=0"]),
        (
            exits.DATA_ENDED,
            "the data ended at step",
            ["--config.data.epochs=1", "--config.data.batch_size=400"],
        ),
    ],
)
def test_a_process_ends_with_the_code_of_the_table(small, tmp_path, code, words, flags):
    running = process(small, tmp_path / "run", *ONE, *flags)
    said = running.communicate(timeout=120)[0]
    assert running.returncode == code and words in said, said


@pytest.mark.slow
def test_a_process_that_is_asked_to_stop_again_and_again_ends_as_if_asked_once(small, tmp_path):
    running = process(small, tmp_path / "run", *ONE, "--config.train.num_steps=100000")
    wait_for(running, "/100000  loss")
    began, signals = time.monotonic(), 0
    while running.poll() is None:
        running.send_signal((signal.SIGTERM, signal.SIGINT)[signals % 2])
        signals += 1
        time.sleep(0.005)
        assert time.monotonic() - began < 120
    said = running.communicate()[0]
    assert running.returncode == exits.RESUMABLE and signals > 1, said
    assert "is saved; to resume" in said and "Traceback" not in said
    (step,) = re.findall(r"stopped at step (\d+)", said)
    assert manifests.good_steps(tmp_path / "run" / "checkpoints")[-1] == int(step)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["ssh", "nohup"])
def test_a_run_whose_terminal_is_closed_is_saved_or_goes_on(small, tmp_path, ignored):
    """SIGHUP stops it, unless it is to outlive the terminal; then what it says goes nowhere."""
    ours, theirs = pty.openpty()
    before = HANGING_UP.format("SIG_IGN" if ignored else "SIG_DFL")
    steps = 3000 if ignored else 1_000_000
    running = process(
        small, tmp_path / "run", *ONE, f"--config.train.num_steps={steps}",
        "--config.checkpoint.every_steps=500", before=before,
        output=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"loss" not in said:
        said += os.read(ours, 4096)
    os.close(ours)
    if not ignored:
        running.send_signal(signal.SIGHUP)
    assert running.wait(120) == (exits.FINISHED if ignored else exits.RESUMABLE)
    (*_, step) = manifests.good_steps(tmp_path / "run" / "checkpoints")
    assert (step == steps) == ignored


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_run_whose_streams_are_closed_is_the_same_run(small, tmp_path, number):
    running = process(small, tmp_path / "run", *ONE, closed=f"{number}>&-")
    said = running.communicate(timeout=120)[0]
    assert running.returncode == exits.FINISHED, said
    folder = tmp_path / "run" / "checkpoints"
    assert not [step for step in manifests.good_steps(folder) if manifests.problem(folder, step)]


@pytest.mark.slow
def test_a_log_on_a_full_disk_ends_no_run(small, tmp_path):
    with open("/dev/full", "w") as full:
        running = process(small, tmp_path / "run", *ONE, output=full)
    assert running.wait(120) == exits.FINISHED
    assert manifests.good_steps(tmp_path / "run" / "checkpoints")[-1] == 60


# Whatever the tests themselves were started by: `nohup` hands on that it is ignored.
HANGING_UP = "import signal; signal.signal(signal.SIGHUP, signal.{})\n"
WAITS = """
import time
from lm.data import corpus
def build(*args, **options):
    print("at it", flush=True)
    while True:
        time.sleep(0.1)
corpus.build = build
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, exits.STOPPED),
        (signal.SIGTERM, exits.TERMINATED),
        (signal.SIGHUP, exits.HUNG_UP),
    ],
)
def test_a_process_that_is_stopped_before_training_says_so(small, tmp_path, number, code):
    before = HANGING_UP.format("SIG_DFL") + WAITS
    running = process(small, tmp_path / "run", *ONE, before=before)
    wait_for(running, "at it")
    running.send_signal(number)
    said = running.communicate(timeout=120)[0]
    assert running.returncode == code and "nothing is lost; to start again" in said, said


@pytest.mark.slow
def test_a_process_whose_peer_dies_ends_with_a_code_of_its_own(small, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", "--num_processes=2"]
    first, second = (
        process(
            small, tmp_path / "run", *ONE, "--config.train.num_steps=100000", *flags,
            f"--process_id={index}",
        )
        for index in range(2)
    )  # fmt: skip
    wait_for(first, "/100000  loss")
    second.kill()
    second.communicate()
    said = first.communicate(timeout=120)[0]
    assert first.returncode == exits.LOST and "process 1 (" in said, said
