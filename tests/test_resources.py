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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """4 MB of documents: two chunks for each of two workers."""
    words = np.array(["the", "cat", "sat", "on", "a", "mat", "and", "far"])
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 5000)) for _ in range(50)]
    path = tmp_path_factory.mktemp("source") / "words.jsonl"
    with path.open("w") as file:
        for number in range(240):
            file.write(json.dumps({"text": f"{number} {texts[number % 50]}"}) + "\n")
    return path


def prepare(source, out, workers=2):
    command = [
        sys.executable,
        "-m",
        "tools.prepare_data",
        "--source",
        str(source),
        "--tokenizer",
        "byte",
    ]
    return subprocess.Popen(
        [*command, "--out", str(out), "--workers", str(workers)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill(worker):
    """End it as the kernel does one that takes too much memory."""
    os.kill(worker, signal.SIGKILL)


def give_no_more(worker):
    """Refuse it what it asks for once it works, as a limit of the batch system does."""
    while len(os.listdir(f"/proc/{worker}/task")) == 1:  # the second thread waits for its parent
        time.sleep(0.01)
    pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE")
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


@pytest.mark.parametrize("make", [kill, give_no_more])
def test_a_worker_that_takes_too_much_memory(source, whole, tmp_path, make):
    """One line and exit code 2, no manifest; the same command goes on, to the same bytes."""
    process = prepare(source, tmp_path / "out")
    trouble(process, make)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert len(re.findall("^error: ", said, re.MULTILINE)) == 1, said
    assert "memory; use fewer workers, and go on with the same command" in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    again = prepare(source, tmp_path / "out")
    assert again.wait(600) == 0, again.communicate()
    assert files(tmp_path / "out") == whole
