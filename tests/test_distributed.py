"""Runs of several real processes on this machine: the same numbers, and an end in time when one is lost."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lm import checkpoint, config, exits, manifests, train
from lm.metrics import read_rows
from tests import quickly
from tools import replay

ROOT = Path(__file__).parent.parent
DEVICES = 4
EXPERIMENT = """
from ml_collections import ConfigDict

from lm import hardware

hardware.PEAK_FLOPS["cpu"] = 1e12  # which is measured else


def get_config():
    return ConfigDict({{
        "data": {{"path": ({path!r},), "tokenizer": "byte", "batch_size": 8}},
        "task": {{"length": 16}},
        "model": {{"name": "gpt", "num_layers": 1, "model_dim": 32, "num_heads": 2}},
        "optim": {{"name": "sgd", "momentum": 0.9, "peak_lr": 0.1}},
        "mesh": {{"data": 2, "fsdp": 2}},
        "train": {{
            "num_steps": 60, "log_every_steps": 1, "peer_timeout_seconds": 12.0,
            "sample_tokens": 0, "fingerprint_every_steps": 0,
        }},
        "eval": {{"every_steps": 30, "max_tokens": 256}},
        "checkpoint": {{"every_steps": 15, "keep": 20}},
    }}, type_safe=False)
"""


@pytest.fixture(scope="module")
def experiment(text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(EXPERIMENT.format(path=str(text_file)))
    return path


class Job:
    """A run of several processes, and what each of them has said."""

    def __init__(self, experiment, workdir, processes, flags="", *, before=""):
        self.workdir, self.processes = workdir, processes
        words = ["-m", "lm.main", "--config", str(experiment), "--workdir", str(workdir)]
        script = f"{before} exec {shlex.join([sys.executable, *words])} {flags}"
        self.logs = workdir.parent / f"{workdir.name}.logs{time.monotonic_ns()}"
        self.launcher = subprocess.Popen(
            [sys.executable, "-m", "tools.launch", f"--processes={processes}", "--grace=30",
             f"--devices_per_process={DEVICES // processes}", f"--logs={self.logs}",
             "--", "sh", "-c", script],
            cwd=ROOT, env={**os.environ, **quickly.of_processes(), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.launcher.wait(2)
        self.launcher.kill()
        self.launcher.wait()

    def said(self, index):
        return (self.logs / f"process_{index}.log").read_text()

    def wait(self, seconds=120):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.launcher.wait(seconds)
        said = [self.said(index) for index in range(self.processes)]
        raise AssertionError(f"not ended in {seconds} s:\n" + "\n".join(said))

    def wait_for_checkpoint(self, step):
        manifest = self.workdir / "checkpoints" / str(step) / "manifest.json"
        self._wait_until(manifest.exists)

    def wait_for(self, words):
        """Wait until the first process has said something."""
        log = self.logs / "process_0.log"
        self._wait_until(lambda: log.exists() and words in log.read_text())

    def _wait_until(self, there, seconds=90):
        end = time.monotonic() + seconds
        while not there():
            assert self.launcher.poll() is None, self.said(0)
            assert time.monotonic() < end, self.said(0)
            time.sleep(0.02)

    def kill_service(self):
        """Kill the coordination service, a child of the first process."""

        def parent(pid):
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                serves = b"serve(" in path.read_bytes()
                if serves and parent(parent(path.parent.name)) == self.launcher.pid:
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    return
        raise AssertionError("no service")

    def send(self, index, number):
        """Send a signal to one process."""
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                mine = int(stat[1]) == self.launcher.pid
                if mine and f"JAX_PROCESS_ID={index}".encode() in environment:
                    os.kill(pid, number)
                    return
        raise AssertionError(f"no process {index}")


def run(*args, **options):
    """Run a job to its end and return it and its exit code."""
    with Job(*args, **options) as job:
        return job, job.wait()


def losses(workdir):
    """Return [(step, name, value)] of all losses."""
    return [
        (row["step"], name, row[name])
        for row in read_rows(workdir / "metrics.jsonl")
        for name in ("train/loss", "eval/loss")
        if name in row
    ]


def parameters(workdir, step=60):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = manifests.read(workdir / "checkpoints", step)["arrays"]
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=device)
        for name, (shape, dtype, *_) in stored.items()
    }
    return jax.device_get(checkpoint.restore(workdir / "checkpoints", step, wanted))


def assert_same(left, right, step=60):
    assert losses(left) == losses(right)
    a, b = parameters(left, step), parameters(right, step)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    """The workdir of an uninterrupted run of two processes."""
    job, code = run(experiment, tmp_path_factory.mktemp("whole") / "run", 2)
    assert code == 0, job.said(0)
    assert "step 60" in job.said(0) and "loss" not in job.said(1), "the first speaks for all"
    return job.workdir


@pytest.mark.slow
def test_two_processes_train_as_one(experiment, whole):
    """A plain process, which adds in another order, agrees to rounding."""
    plain = config.load(experiment)
    plain.mesh = {"data": 4, "fsdp": 2}
    train.run(plain, whole.parent / "plain")
    ours, theirs = losses(whole), losses(whole.parent / "plain")
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for (*_, a), (*_, b) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.slow
def test_each_process_saves_its_part_alone(experiment, tmp_path):
    """Of parameters that are split over two processes each writes one half, and nothing twice."""
    flags = "--config.mesh.data=1 --config.mesh.fsdp=4 --config.train.num_steps=6"
    job, code = run(experiment, tmp_path / "run", 2, flags)
    assert code == 0, job.said(0)
    written = {}
    for process in (0, 1):
        files = job.workdir.glob(f"checkpoints/6/state/ocdbt.process_{process}/d/*")
        written[process] = sum(path.stat().st_size for path in files)
    whole = sum(array.nbytes for array in parameters(job.workdir, 6).values())
    assert all(0.4 * whole < size < 0.6 * whole for size in written.values()), (written, whole)


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_any_number_of_processes_gives_the_same_bits(experiment, whole, tmp_path, processes):
    job, code = run(experiment, tmp_path / "run", processes)
    assert code == 0, job.said(0)
    assert_same(job.workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "mesh", "way"),
    [
        (2, {"data": 1, "context": 4}, "ring"),
        (2, {"data": 1, "tensor": 4}, ""),
        (4, {"data": 2, "context": 2}, "gather"),
        (4, {"data": 2, "tensor": 2}, ""),
    ],
    ids=str,
)
def test_processes_that_split_positions_or_heads_train_as_one(
    experiment, tmp_path, processes, mesh, way
):
    """Where they split no rows they read the same ones, else the losses were others."""
    fields = {f"mesh.{name}": size for name, size in {"fsdp": 1, **mesh}.items()}
    fields |= {"model.num_heads": 4, "model.context_parallel": way}
    fields |= {"train.num_steps": 12, "eval.every_steps": 6}
    flags = " ".join(f"--config.{name}={value}" for name, value in fields.items())
    for name, count in (("one", 1), ("many", processes)):
        job, code = run(experiment, tmp_path / name, count, flags)
        assert code == 0, job.said(0)
    assert_same(tmp_path / "one", tmp_path / "many", step=12)
    plain = config.load(experiment)
    plain.update_from_flattened_dict({**fields, "mesh.data": 2 * mesh["data"]})
    train.run(plain, tmp_path / "plain")
    for ours, theirs in zip(losses(tmp_path / "many"), losses(tmp_path / "plain"), strict=True):
        assert ours == (*theirs[:2], pytest.approx(theirs[2], rel=1e-6))


SLOW = """

import os
import threading
import time

from lm.data import pipeline

original, alone = pipeline.Batches.__getitem__, threading.Lock()


def batch(self, number):
    if number >= int(os.environ.get("SLOW_FROM", 60)):
        with alone:
            time.sleep(1)
    return original(self, number)


pipeline.Batches.__getitem__ = batch
"""


@pytest.mark.alone
@pytest.mark.slow
def test_killed_and_stopped_the_run_goes_on_to_the_same_bits(text_file, whole, tmp_path):
    """Each time on another number of processes, and half a minute or more before it would end."""
    workdir, slow = tmp_path / "run", tmp_path / "slow.py"
    slow.write_text(EXPERIMENT.format(path=str(text_file)) + SLOW)
    with Job(slow, workdir, 2, before="export SLOW_FROM=17;") as job:
        job.wait_for_checkpoint(15)
        job.send(1, signal.SIGKILL)
        assert job.wait(90) == 128 + signal.SIGKILL
        assert "process 1 (" in job.said(0) and "not heard of" in job.said(0)
    with Job(slow, workdir, 4, before="export SLOW_FROM=32;") as job:
        job.wait_for_checkpoint(30)
        job.send(0, signal.SIGKILL)  # where all others meet
        assert job.wait(90) == 128 + signal.SIGKILL
        others = [job.said(index) for index in (1, 2, 3)]
        # One whose exchange with another survivor fails is ended by gloo before it knows who is lost;
        # where that survivor's next one comes first, gloo aborts it.
        for index, said in enumerate(others, 1):
            ends = f"process {index} (" in said and "ends:" in said
            assert ends or "throwing an instance of 'gloo::" in said, said
        assert any("process 0 (" in said for said in others)
    with Job(slow, workdir, 2, before="export SLOW_FROM=32;") as job:
        job.wait_for("/60  loss")
        job.send(1, signal.SIGTERM)
        assert job.wait(60) == 75
        assert "is saved; to resume" in job.said(0)
    job, code = run(slow, workdir, 1)
    assert code == 0, job.said(0)
    assert_same(workdir, whole)


@pytest.mark.alone
@pytest.mark.slow
def test_a_process_with_an_error_in_its_code_ends_at_once(experiment, tmp_path):
    """jax would wait for the others when Python ends, five minutes."""
    broken = tmp_path / "broken.py"
    text = experiment.read_text()
    broken.write_text(
        text
        + """

from lm import train

def fails(*_):
    raise TypeError("of one process")

import os

if os.environ["JAX_PROCESS_ID"] == "1":
    train.announce = fails
"""
    )
    with Job(broken, tmp_path / "run", 2) as job:
        log = job.logs / "process_1.log"
        job._wait_until(lambda: log.exists() and "TypeError: of one process" in log.read_text())
        began = time.monotonic()
        code = job.launcher.wait(120)
    assert time.monotonic() - began < 15
    assert code == exits.FAILED


@pytest.mark.alone
@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_in_time(experiment, tmp_path):
    with Job(experiment, tmp_path / "run", 2, "--config.train.num_steps=100000") as job:
        job.wait_for_checkpoint(15)
        job.send(1, signal.SIGSTOP)
        began = time.monotonic()
        while "ends:" not in job.said(0):
            assert time.monotonic() - began < 12 + 5
            time.sleep(0.1)
        assert job.wait(60) == exits.LOST, "and not how the one that hangs was ended"
    said = job.said(0)
    assert "process 1 (" in said and "not heard of for 12 s" in said
    assert "lm/train.py" in said, "where it was"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.optim.peak_lr=0.$((1 + JAX_PROCESS_ID))", "optim.peak_lr is 0.2, not 0.1"),
        ("--config.data.path=words.txt", "the data's fingerprint is"),
    ],
)
def test_a_process_that_differs_is_named(experiment, text_file, tmp_path, flag, words):
    for index, text in enumerate(("", "other")):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "words.txt").write_text(text_file.read_text() + text)
    there = f"cd {tmp_path}/$JAX_PROCESS_ID;"
    job, code = run(experiment, tmp_path / "run", 2, before=there, flags=flag)
    assert code == 2
    for index in (0, 1):
        assert "error: process 1 (" in job.said(index) and words in job.said(index)


POISON = """

import numpy as np

from lm.data import pipeline

original = pipeline.Batches.__getitem__


def batch(self, number):
    found = original(self, number)
    if number == 20 and self._slice.start <= 5 < self._slice.stop:
        found["weights"] = found["weights"].copy()
        found["weights"][5 - self._slice.start] = np.nan
    return found


pipeline.Batches.__getitem__ = batch
"""


@pytest.mark.slow
def test_all_processes_leave_out_a_bad_step_and_record_it_once(text_file, tmp_path, capsys):
    """The bad row is of one process alone; skipped, or rolled back, and by any number of them."""
    path = tmp_path / "poisoned.py"
    path.write_text(EXPERIMENT.format(path=str(text_file)) + POISON)
    for name, processes, mode in (("skip", 2, "skip"), ("back", 2, "rollback"), ("one", 1, "skip")):
        with Job(path, tmp_path / name, processes, f"--config.train.on_bad_step={mode}") as job:
            assert job.wait(300) == 0, job.said(0)
        assert ("back to step 15" if name == "back" else "step 21 is skipped") in job.said(0)
    assert_same(tmp_path / "skip", tmp_path / "one")
    assert_same(tmp_path / "skip", tmp_path / "back")
    folder = tmp_path / "skip" / "recorder" / "20"
    assert not manifests.problem(folder / "checkpoints", 20)
    assert replay.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "row 5, shard 2 of 4" in said and "batch weights: 16 numbers are not finite" in said


@pytest.mark.alone
@pytest.mark.slow
def test_where_the_coordination_service_is_killed_all_end_and_say_so(text_file, whole, tmp_path):
    """As by a host that is lost with process 0: the service is a process of its own.

    jax's own end of it is an abort, before a thread of ours can name it; it cannot be asked for another
    (its callback of Python ends in std::bad_cast).
    """
    workdir, slow = tmp_path / "run", tmp_path / "slow.py"
    slow.write_text(EXPERIMENT.format(path=str(text_file)) + SLOW)
    with Job(slow, workdir, 2, before="export SLOW_FROM=17;") as job:
        job.wait_for_checkpoint(15)
        began = time.monotonic()
        job.kill_service()
        code, took = job.wait(90), time.monotonic() - began
        said = [job.said(index) for index in range(2)]
        assert code not in (0, exits.RESUMABLE) and took < 60, said
        why = re.compile("ends: no answer from|JAX distributed service detected fatal errors")
        assert all(why.search(words) for words in said), said
    job, code = run(slow, workdir, 1)
    assert code == 0, job.said(0)
    assert_same(workdir, whole)


LATE = """

import os
import time
from lm import checkpoint

original = checkpoint.Checkpointer.restore_latest


def restore_latest(self, *args, **options):
    while os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(1)
    return original(self, *args, **options)


checkpoint.Checkpointer.restore_latest = restore_latest
"""


@pytest.mark.alone
@pytest.mark.slow
def test_a_process_that_never_comes_to_training_ends_all(text_file, tmp_path):
    """It lives and says so; the others wait for it no longer than they are told to."""
    path = tmp_path / "late.py"
    path.write_text(EXPERIMENT.format(path=str(text_file)) + LATE)
    flags = "--config.train.compile_timeout_seconds=20"
    with Job(path, tmp_path / "run", 2, flags) as job:
        assert job.wait(90) == exits.LOST, job.said(0)
        assert "process 1 (" in (said := job.said(0)) and "not there in 20 s" in said
        assert "Thread 0x" in said, "and where each thread is"


UNWRITTEN = """

import os
from orbax.checkpoint._src.futures import future

original, calls = future.ChainedFuture.result, []


def result(self, timeout=None):
    calls.append(None)
    if os.environ.get("JAX_PROCESS_ID") == "WHICH" and len(calls) == 1:
        raise OSError("no room there")
    return original(self, timeout)


future.ChainedFuture.result = result
"""


def run_faulty(faulty, which, text_file, tmp_path):
    """Return the job, ended with 0, of two processes of which one is `faulty`."""
    path = tmp_path / "faulty.py"
    path.write_text(EXPERIMENT.format(path=str(text_file)) + faulty.replace("WHICH", str(which)))
    job, code = run(path, tmp_path / "run", 2)
    assert code == 0, job.said(0)
    return job


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_save_that_one_process_cannot_write_holds_nobody_up(text_file, tmp_path, whole, which):
    """It fails in all of them, soon; the run goes on, saves again, and comes to the same numbers."""
    job = run_faulty(UNWRITTEN, which, text_file, tmp_path)
    assert "no room there; not saved, saving the next step instead" in job.said(0)
    good = manifests.good_steps(tmp_path / "run/checkpoints")
    assert good[0] in range(15, 25) and set(good) & set(range(16, 25)), f"soon: {good}"
    assert_same(tmp_path / "run", whole)
    assert manifests.good_steps(tmp_path / "run/checkpoints")[-1] == 60


UNBEGUN = """

import os
import orbax.checkpoint as ocp

original, failed = ocp.AsyncCheckpointer.save, set()


def save(self, directory, *args, **options):
    step = int(directory.parent.name)
    if os.environ.get("JAX_PROCESS_ID") == "WHICH" and step in (15, 60) and step not in failed:
        failed.add(step)
        raise OSError(28, "no room to begin")
    return original(self, directory, *args, **options)


ocp.AsyncCheckpointer.save = save
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_save_that_one_process_cannot_begin_fails_in_all(text_file, tmp_path, whole, which):
    """One that is not waited for, and the last one, of which all tries are made at once."""
    job = run_faulty(UNBEGUN, which, text_file, tmp_path)
    assert job.said(0).count("no room to begin; not saved") == 2
    good = manifests.good_steps(tmp_path / "run/checkpoints")
    assert good[0] in range(16, 25) and good[-1] == 60, good
    assert_same(tmp_path / "run", whole)


AWAY = """

import os, time
import orbax.checkpoint as ocp

original, calls = ocp.AsyncCheckpointer.save, []


def save(self, *args, **options):
    calls.append(None)
    while os.environ.get("JAX_PROCESS_ID") == "1" and len(calls) == 2:
        time.sleep(1)
    return original(self, *args, **options)


ocp.AsyncCheckpointer.save = save
"""


@pytest.mark.alone
@pytest.mark.slow
def test_a_process_that_stays_away_from_a_save_ends_all_in_time(experiment, tmp_path, whole):
    """The one before is whole, and the job that is started again comes to the same numbers."""
    path = tmp_path / "away.py"
    path.write_text(Path(experiment).read_text() + AWAY)
    flags = "--config.checkpoint.timeout_seconds=8"
    with Job(path, tmp_path / "run", 2, flags) as job:
        assert job.wait(90) == exits.HUNG, job.said(0)
        assert "checkpoint.timeout_seconds" in job.said(0) + job.said(1)
        assert "Thread 0x" in job.said(0) + job.said(1)
    assert manifests.good_steps(tmp_path / "run/checkpoints") == [15]
    job, code = run(experiment, tmp_path / "run", 2)
    assert code == 0, job.said(0)
    assert_same(tmp_path / "run", whole)
