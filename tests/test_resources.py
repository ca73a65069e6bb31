"""A preparation loses a worker, as to a kernel without memory left."""

import json
import os
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


def kill_a_worker(process):
    """End its first worker as the kernel does one that takes too much memory."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        found = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True
        )
        for worker in map(int, found.stdout.split()):
            os.kill(worker, signal.SIGKILL)
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_worker_that_takes_too_much_memory(source, tmp_path):
    """One line and exit code 2, no manifest; the same command goes on, to the same bytes."""
    process = prepare(source, tmp_path / "out")
    kill_a_worker(process)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "Traceback" not in said and said.count("error: ") == 1, said
    assert "killed, perhaps for memory; use fewer workers" in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    again = prepare(source, tmp_path / "out")
    assert again.wait(600) == 0, again.communicate()
    whole = prepare(source, tmp_path / "whole", workers=0)
    assert whole.wait(600) == 0, whole.communicate()
    assert files(tmp_path / "out") == files(tmp_path / "whole")
