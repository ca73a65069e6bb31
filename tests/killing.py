"""Starts training processes that are killed or meet other troubles, and looks at what they leave.

See `tests/killed.py`, where they run.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from lm import manifests, metrics, tensorboard
from tests import quickly

ROOT = Path(__file__).parent.parent
STEPS = 12  # of a run


class Server:
    """Starts training processes and says how they ended (see `tests.killed`)."""

    def __init__(self, devices=1):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        count = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = f"{quickly.FLAGS} {count}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.killed"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, **job) -> int:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self, process) -> int:
        late = threading.Timer(600, os.kill, (process, signal.SIGABRT))
        late.start()
        code = int(self._process.stdout.readline())
        late.cancel()
        return code

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)


class Run:
    """A run in `place`, which has its workdir, its remote, and what its processes say."""

    def __init__(self, server, place, experiment, cache, **settings):
        self.server, self.place, self.cache, self.ends = server, place, cache, 0
        self.workdir, self.remote, self.said = (place / n for n in ("whole", "remote", "said"))
        place.mkdir()
        self.arguments = ["--config", str(experiment), "--workdir", str(self.workdir)]
        settings |= {"checkpoint.remote": self.remote}
        self.arguments += [f"--config.{name}={value}" for name, value in settings.items()]

    def start(self, *troubles) -> int:
        self.said.unlink(missing_ok=True)
        return self.server.start(
            arguments=self.arguments, workdir=str(self.workdir), output=str(self.said),
            troubles=troubles, variables={"LM_CACHE_DIR": str(self.cache)},
        )  # fmt: skip

    def end(self, *troubles) -> int:
        """Start it, and wait until it has ended; return how."""
        return self.server.wait(self.start(*troubles))

    def check(self):
        """What there is after a kill is whole, or says that it is not."""
        for pattern in ("*.json", "receipts/*.json", "tokenizer/*.json", "recorder/[0-9]/*.json"):
            for path in self.workdir.glob(pattern):
                json.loads(path.read_text())

    def newest(self) -> int:
        """The newest good checkpoint, here or in the second place; all that say so are whole."""
        steps = {0}
        for folder in (self.workdir / "checkpoints", self.remote):
            good = set(manifests.good_steps(folder))
            assert not [step for step in good if manifests.problem(folder, step)]
            steps |= good
        return max(steps)

    def resumed(self) -> int:
        found = re.search(r"^resumed: at step (\d+)", self.said.read_text(), re.MULTILINE)
        return int(found[1]) if found else 0


def rows_of(path):
    """The rows of a file that has whole lines alone, without what differs from run to run."""
    assert path.read_bytes().endswith(b"}\n")
    return [metrics.untimed(row) for row in metrics.read_rows(path)]


def events_of(folder):
    """(step, name, value) of all event files, in the order of steps."""
    found = []
    for path in folder.glob("*tfevents*"):
        for event, _ in tensorboard.records(path.read_bytes()):
            values = [v for v in event.summary.value if v.tag not in metrics.TIMED]
            found += [(event.step, v.tag, v.simple_value) for v in values]
    return sorted(found)


def assert_same(run, whole, *, events=True, orbax_failed=False):
    """A run that was killed has ended as the one that was not."""
    said = run.said.read_text()
    assert orbax_failed or "Traceback" not in said, said  # its threads show one
    run.check()
    for name in ("metrics.jsonl", "fingerprints.jsonl"):
        assert rows_of(run.workdir / name) == rows_of(whole.workdir / name), name
    for folder in (run.workdir / "checkpoints", run.remote):
        one, other = manifests.read(folder, STEPS), manifests.read(whole.remote, STEPS)
        assert not manifests.problem(folder, STEPS)
        for part in ("arrays", "metrics", "skipped"):  # arrays: by their fingerprints
            assert one[part] == other[part], f"{folder}: {part}"
    for name in ("skipped.json", "config.json", "data.json"):
        texts = [(r.workdir / name).read_text() for r in (run, whole)]
        assert texts[0].replace(str(run.place), str(whole.place)) == texts[1]
    if events:
        assert events_of(run.workdir / "tensorboard") == events_of(whole.workdir / "tensorboard")
    assert run.newest() == STEPS
    left = {p.suffix[:6] for p in (run.workdir / "checkpoints").iterdir()}
    assert left <= {"", ".aside"}, "what was being deleted or fetched is gone"
