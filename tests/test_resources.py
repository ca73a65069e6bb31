"""A preparation loses a worker, as to a kernel without memory left."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lm.data import prepare as preparation
from lm.data.writer import JOURNAL

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys, time

from lm.data import prepare
from tests import test_resources
from tools import prepare_data

prepare.CHUNK, prepare.SHARD = 1 << 18, 1 << 20
delay, refused, *arguments = sys.argv[1:]
add = prepare.Writer.add


def slow(self, encoded):
    time.sleep(float(delay))
    add(self, encoded)


prepare.Writer.add = slow
if refused == "True":
    prepare._encode = test_resources.encode_or_be_refused
sys.exit(prepare_data.main(arguments))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """4 MB of documents: 16 chunks, four shards."""
    words = np.array(["the", "cat", "sat", "on", "a", "mat", "and", "far"])
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 5000)) for _ in range(50)]
    path = tmp_path_factory.mktemp("source") / "words.jsonl"
    with path.open("w") as file:
        for number in range(240):
            file.write(json.dumps({"text": f"{number} {texts[number % 50]}"}) + "\n")
    return path


def prepare(source, out, workers=2, delay=0.0, refused=False):
    """Start `tools.prepare_data` with small shards; each chunk takes a `delay`, in seconds."""
    words = ["--source", source, "--tokenizer", "byte", "--out", out, "--workers", workers]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, (delay, refused, *words))],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def encode_or_be_refused(chunk, tokens):
    """Encode in a worker, to which the system gives no more memory from the middle on."""
    if chunk.following[1] > 120:
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size_of(os.getpid()), before[1]))
        try:
            bytearray(1 << 28)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    return preparation._encode(chunk, tokens)


def size_of(process):
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def kill(worker):
    """End it as the kernel does one that takes too much memory."""
    os.kill(worker, signal.SIGKILL)


def give_no_more(worker):
    """Refuse it what it asks for once it works, as a limit of the batch system does."""
    while len(os.listdir(f"/proc/{worker}/task")) == 1:  # the second thread waits for its parent
        time.sleep(0.01)
    size = size_of(worker)
    resource.prlimit(worker, resource.RLIMIT_AS, (size, size))


def trouble(process, make):
    """Do `make` to its first worker."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        found = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True
        )
        for worker in map(int, found.stdout.split()):
            make(worker)
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What a preparation writes that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    process = prepare(source, out, workers=0)
    assert process.wait(600) == 0, process.communicate()
    return files(out)


def shards_of(out):
    """Return how many shards are whole: the journal has a line of each, after a first one."""
    journal = out / JOURNAL
    return max(0, journal.read_text().count("\n") - 1) if journal.exists() else 0


def wait_for_a_shard(process, out):
    deadline = time.monotonic() + 300
    while not shards_of(out):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def check(process, source, whole, out, words):
    """One line and exit code 2, no manifest; the same command goes on, to the same bytes."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert re.search(f"{words}; use fewer workers, and go on with the same command", errors[0])
    assert not (out / "manifest.json").exists()
    shards = shards_of(out)
    kept = {path: path.stat() for n in range(shards) for path in out.glob(f"*-{n:05d}.tokens")}
    again = prepare(source, out)
    assert again.wait(600) == 0, again.communicate()
    assert files(out) == whole
    for path, stat in kept.items():
        assert path.stat().st_mtime_ns == stat.st_mtime_ns, f"{path} was whole"
    return shards


def test_a_worker_is_killed(source, whole, tmp_path):
    process = prepare(source, tmp_path / "out", delay=0.2)
    wait_for_a_shard(process, tmp_path / "out")
    trouble(process, kill)
    assert check(process, source, whole, tmp_path / "out", "was killed, perhaps for memory") in (
        1,
        2,
    )


def test_a_worker_is_refused_memory_and_says_so(source, whole, tmp_path):
    process = prepare(source, tmp_path / "out", refused=True)
    assert check(process, source, whole, tmp_path / "out", "has no memory left") == 2


def test_a_worker_is_given_no_more_memory(source, whole, tmp_path):
    """It ends of that, where it is in the middle of something, or says so."""
    process = prepare(source, tmp_path / "out", delay=0.2)
    trouble(process, give_no_more)
    check(process, source, whole, tmp_path / "out", "(perhaps for memory|has no memory left)")
