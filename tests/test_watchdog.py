"""What hangs ends the run in time, with every stack and what could be saved; the run goes on exactly."""

import http.client
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lm import (
    exits,
    experiment,
    guard,
    manifests,
    peers,
    preemption,
    remote,
    signals,
    trail,
    train,
    watchdog,
)
from tests import quickly
from tests.test_train import assert_same_run

ROOT = Path(__file__).parent.parent
HANGS = """
import importlib, sys, time
module, owner, name, calls = sys.argv[1:5]
place = importlib.import_module(module)
for part in owner.split(".") if owner else ():
    place = getattr(place, part)
original, left = getattr(place, name), [int(calls)]
def hanging(*args, **options):
    left[0] -= 1
    hangs = left[0] == 0
    while hangs:
        time.sleep(0.1)
    return original(*args, **options)
setattr(place, name, hanging)
from lm import distributed, hardware, main
hardware.PEAK_FLOPS["cpu"] = 1e12  # which is measured else
distributed.leave(main.main(sys.argv[5:]))
"""


def start(text_file, workdir, *flags, hangs=("time", "", "time", "1000000000")):
    """Start a run in which the n-th call of a function never returns."""
    command = [
        sys.executable, "-c", HANGS, *hangs, "--config", str(ROOT / "experiments/shakespeare_char.py"),
        "--workdir", str(workdir), f"--config.data.path={text_file}", "--config.train.num_steps=12",
        "--config.model.num_layers=1", "--config.model.model_dim=32", "--config.model.num_heads=2",
        "--config.eval.every_steps=4", "--config.eval.max_tokens=512", "--config.train.sample_tokens=0",
        "--config.checkpoint.every_steps=5", "--config.train.log_every_steps=1", *flags,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        env={
            **os.environ,
            **quickly.of_processes(),
            "XLA_FLAGS": quickly.FLAGS,
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(workdir, step, process):
    """Return when a run has saved `step`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if manifests.good_steps(workdir / "checkpoints")[-1:] >= [step]:
            return
        time.sleep(0.02)
    raise AssertionError(f"never saved step {step}: {process.communicate()[0]}")


CASES = {  # what hangs, the field, what is said to hang, the step that is saved then
    "a batch": (("lm.data.pipeline", "Batches", "__getitem__", "11"),
                "train.step_timeout_seconds", "training, step 9,", 9),
    "a step": (("lm.log", "Log", "one_late", "8"), "train.step_timeout_seconds", "training, step 7,", 5),
    "compiling": (("lm.log", "Log", "one_late", "1"),
                  "train.compile_timeout_seconds", "compiling, step 0,", None),
    "an evaluation": (("lm.evaluate", "", "score", "3"),
                      "eval.timeout_seconds", "evaluating, step 8,", 8),
    "the start of a save": (("lm.saving", "Writer", "start", "2"),
                            "checkpoint.timeout_seconds", "saving, step 10,", 5),
    "a save on its thread": (("lm.manifests", "", "write", "1"),
                             "checkpoint.timeout_seconds", "saving, step 5,", None),
    "the end": (("lm.metrics", "Writers", "close", "1"),
                "train.compile_timeout_seconds", "ending, step 12,", 12),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """A run in which nothing hangs, and its text."""
    folder = tmp_path_factory.mktemp("whole")
    text = folder / "text.txt"
    text.write_text("the cat sat on a mat and the dog ran to the far red house by the sea\n" * 400)
    process = start(text, folder / "run")
    assert process.wait(300) == 0, process.communicate()[0]
    return text, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_hangs_ends_the_run_which_goes_on_exactly(whole, tmp_path, case):
    hangs, field, what, saved = CASES[case]
    text, workdir = whole[0], tmp_path / "run"
    seconds = 12 if "compile" in field else 3  # more than what does not hang takes
    limits = (f"--config.{field}={seconds}", "--config.checkpoint.grace_seconds=5")
    process = start(text, workdir, *limits, hangs=hangs)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == exits.HUNG, said
    told = re.search(rf"^error: .* took longer than {seconds} s .*$", said, re.MULTILINE)
    assert told and what in told[0] and f"({field})" in told[0], said
    assert f"the same command resumes; raise {field} where it was too short" in said
    assert "Thread 0x" in said and '"<string>", line 12 in hanging' in said, said
    good = manifests.good_steps(workdir / "checkpoints")
    assert (good[-1] if good else None) == saved, said
    assert (f"step {saved} is saved" in said) == (saved in (8, 9))
    assert start(text, workdir).wait(300) == 0
    assert_same_run(whole[1], workdir, 12)


@pytest.mark.slow
def test_a_stop_while_a_batch_hangs_saves_within_its_grace_period(whole, tmp_path):
    grace = "--config.checkpoint.grace_seconds=16"
    process = start(whole[0], tmp_path / "run", grace, hangs=CASES["a batch"][0])
    wait_for_step(tmp_path / "run", 5, process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    said = process.communicate(timeout=60)[0]
    assert 6 < time.monotonic() - asked < 16, said
    assert process.returncode == exits.HUNG, said
    assert "took longer than 8 s (half of checkpoint.grace_seconds)" in said
    assert manifests.good_steps(tmp_path / "run" / "checkpoints")[-1] == 9


@pytest.mark.slow
def test_a_stop_that_cannot_save_in_its_grace_period_says_so(whole, tmp_path):
    process = start(
        whole[0], tmp_path / "run", "--config.checkpoint.grace_seconds=3",
        hangs=("lm.log", "Log", "one_late", "8"),
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 5, process)
    time.sleep(1)
    for _ in range(2):  # the second one is harmless
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    asked = time.monotonic()
    said = process.communicate(timeout=60)[0]
    assert time.monotonic() - asked < 12, said
    assert process.returncode == exits.HUNG, said
    assert said.count("stopping after this step") == 1
    assert (
        "error: stopping, at training, step 7, took longer than 3 s (checkpoint.grace_seconds)"
        in said
    )
    assert start(whole[0], tmp_path / "run").wait(300) == 0
    assert_same_run(whole[1], tmp_path / "run", 12)


@pytest.mark.slow
def test_a_process_that_was_suspended_does_not_hang(whole, tmp_path):
    process = start(
        whole[0], tmp_path / "run", "--config.train.step_timeout_seconds=2",
        "--config.train.num_steps=2000", "--config.checkpoint.every_steps=100",
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 100, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == exits.RESUMABLE, said


class Metadata(http.server.BaseHTTPRequestHandler):
    """A cloud's metadata server, as its documentation describes it."""

    def answer(self, code, text=""):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self):
        life = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self.answer(200, "token") if self.path == "/latest/api/token" and life else self.answer(400)

    def do_GET(self):
        self.server.looks += 1
        told = self.server.looks > 2
        if self.path == "/computeMetadata/v1/instance/preempted":
            known = self.headers.get("Metadata-Flavor") == "Google"
            self.answer(200, "TRUE" if told else "FALSE") if known else self.answer(403)
        elif self.headers.get("X-aws-ec2-metadata-token") != "token":
            self.answer(401)
        elif self.path == "/latest/meta-data/spot/instance-action" and told:
            self.answer(200, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}')
        else:
            self.answer(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def metadata():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.looks = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_stop_is_asked_for_though_nobody_reads_it(monkeypatch):
    """As by Ctrl-C, which also ends the `tee` that reads."""

    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    stop = signals.Stop()
    stop.ask()
    assert stop.asked


@pytest.mark.parametrize("platform", preemption.PLATFORMS, ids=lambda platform: platform.vendor)
def test_a_notice_asks_to_stop(metadata, monkeypatch, capfd, platform):
    host = f"127.0.0.1:{metadata.server_address[1]}"
    monkeypatch.setenv(platform.variable, host if platform.vendor == "Google" else f"http://{host}")
    monkeypatch.setattr(preemption, "SECONDS", 0.05)
    with signals.stop_signals() as stop:
        end = time.monotonic() + 20
        while not stop.asked and time.monotonic() < end:
            time.sleep(0.02)
        assert stop.asked and metadata.looks == 3
    assert "notice of " in capfd.readouterr().err


@pytest.mark.slow
def test_a_notice_saves_the_run(whole, tmp_path, metadata, monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{metadata.server_address[1]}")
    process = start(whole[0], tmp_path / "run", "--config.train.num_steps=100000")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == exits.RESUMABLE, said
    assert "notice of preempted: stopping after this step" in said
    assert manifests.good_steps(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    "field",
    ["train.step_timeout_seconds", "train.compile_timeout_seconds", "eval.timeout_seconds",
     "checkpoint.timeout_seconds", "checkpoint.grace_seconds"],
)  # fmt: skip
def test_a_limit_is_no_less_than_none(tiny, tmp_path, field):
    from lm import train
    from lm.config import ConfigError

    section, _, name = field.partition(".")
    with pytest.raises(ConfigError, match=rf"{field}=-1.0: use 0 or more"):
        train.run(tiny(**{f"{section}__{name}": -1.0}), tmp_path / "run")


@pytest.fixture
def noted(monkeypatch):
    """Return what a run did, in order: [(what, step)]."""
    found, original = [], watchdog.Watchdog.at

    def at(self, doing, step, state=None):
        found.append((doing, step))
        original(self, doing, step, state)

    monkeypatch.setattr(watchdog.Watchdog, "at", at)
    return found


def test_a_program_that_is_compiled_later_has_a_compilations_time(
    tiny, tmp_path, noted, monkeypatch
):
    """The step's where its first steps are left out, and the fingerprints'."""
    manifests.write_sealed(tmp_path / guard.FILE, {"0": "why", "1": "why"})
    doing = {"step": [], "trail": []}
    take, mark = guard.Guard.__init__, trail.Fingerprints.of_step

    def init(self, made, workdir, saver, log, train_step, *rest):
        def step(*args):
            doing["step"].append(noted[-1][0])
            return train_step(*args)

        take(self, made, workdir, saver, log, step, *rest)

    def of_step(self, *args):
        doing["trail"].append(noted[-1][0])
        return mark(self, *args)

    monkeypatch.setattr(guard.Guard, "__init__", init)
    monkeypatch.setattr(trail.Fingerprints, "of_step", of_step)
    train.run(tiny(train__on_bad_step="skip", train__fingerprint_every_steps=3), tmp_path)
    assert doing["step"] == ["compiling"] + 3 * ["training"]
    assert doing["trail"] == ["compiling", "training"]


def test_the_last_copy_has_its_own_limit_alone(tiny, tmp_path, noted, monkeypatch):
    seen, close = [], remote.Remote.close

    def closing(self, seconds, until):
        seen.append((noted[-1][0], seconds))
        close(self, seconds, until)

    monkeypatch.setattr(remote.Remote, "close", closing)
    train.run(tiny(checkpoint__remote=str(tmp_path / "there")), tmp_path / "run")
    assert seen == [("copying", 3600.0)]
    assert "copying" not in watchdog.limits(experiment.freeze(experiment.build(tiny()).config))


def test_an_answer_that_breaks_off_does_not_end_the_watch(metadata, monkeypatch, capfd):
    answers = [http.client.BadStatusLine("x"), http.client.IncompleteRead(b""), OSError()]

    def notice(address):
        if answers:
            raise answers.pop()
        return "preempted"

    platform = preemption.PLATFORMS[0]._replace(notice=notice)
    monkeypatch.setattr(preemption, "here", lambda: (platform, "http://there"))
    monkeypatch.setattr(preemption, "SECONDS", 0.02)
    told, closed = threading.Event(), threading.Event()
    preemption.watch(lambda words: told.set(), closed)
    assert told.wait(10)


def test_a_signal_after_a_notice_still_ends_what_is_before_training(monkeypatch):
    monkeypatch.setattr(preemption, "here", lambda: None)
    with signals.stop_signals() as stop:
        stop.ask("notice of preempted: ")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)  # a second one is harmless
        time.sleep(0.05)


def test_more_seconds_than_a_thread_can_wait_are_for_ever(tiny):
    config = tiny(
        checkpoint__grace_seconds=1e18, checkpoint__timeout_seconds=1e18, eval__timeout_seconds=0.5
    )
    made = experiment.build(config)
    found = watchdog.limits(made.cfg)
    for limit in found.values():
        assert threading.Lock().acquire(timeout=limit.seconds + 60)  # else an OverflowError
    assert found[watchdog.EVALUATING].seconds == 0.5


def test_where_no_thread_can_start_a_limit_still_ends_the_process(monkeypatch, capsys):
    def leave(code):
        raise SystemExit(code)

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(threading.Thread, "start", start)
    dog = watchdog.Watchdog({}, peers.Alone())
    with pytest.raises(SystemExit) as ended:
        dog._end(peers.TRAINING, 3, watchdog.Limit(1.0, "train.step_timeout_seconds"))
    assert ended.value.code == exits.HUNG
    assert "nothing more could be saved: can't start new thread" in capsys.readouterr().err
