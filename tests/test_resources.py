"""What a preparation needs and does not get: a worker's memory, or the worker itself."""

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
    """40 MB of documents: a dozen chunks for each of two workers."""
    words = np.array(["the", "cat", "sat", "on", "a", "mat", "and", "far"])
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 5000)) for _ in range(50)]
    path = tmp_path_factory.mktemp("source") / "words.jsonl"
    with path.open("w") as file:
        for number in range(2400):
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


def worker_of(process):
    """The first worker of a preparation that has encoded something."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        for child in map(int, found.stdout.split()):
            try:
                seconds = sum(
                    map(int, Path(f"/proc/{child}/stat").read_text().split(") ")[1].split()[11:13])
                )
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text() and seconds > 50:
                    return child
            except OSError:
                continue  # gone meanwhile
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def out_of_memory(worker):
    """As the kernel ends a process that takes too much."""
    os.kill(worker, signal.SIGKILL)


def no_more_memory(worker):
    """The worker may take no more than it has."""
    kilobytes = re.search(r"VmSize:\s*(\d+)", Path(f"/proc/{worker}/status").read_text())[1]
    resource.prlimit(worker, resource.RLIMIT_AS, (int(kilobytes) * 1024,) * 2)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("trouble", [out_of_memory, no_more_memory])
def test_a_worker_without_memory(source, tmp_path, trouble):
    """One line and exit code 2, no manifest; the same command goes on, to the same bytes."""
    process = prepare(source, tmp_path / "out")
    trouble(worker_of(process))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2, said
    assert "Traceback" not in said and said.count("error: ") == 1, said
    assert "memory" in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    again = prepare(source, tmp_path / "out")
    assert again.wait(600) == 0, again.communicate()
    whole = prepare(source, tmp_path / "whole", workers=0)
    assert whole.wait(600) == 0, whole.communicate()
    assert files(tmp_path / "out") == files(tmp_path / "whole")
