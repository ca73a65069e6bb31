"""Training processes are killed at named points and at random times, and meet other troubles.

Each time the same command finishes the run: rows, fingerprints, final parameters and the copies elsewhere are
those of a run that was not killed, bit for bit, and it went on from the newest checkpoint that was whole. See
`tests/killed.py` and `tests/killing.py`.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from lm import manifests
from tests import killed, killing
from tests.killing import STEPS, assert_same

pytestmark = pytest.mark.slow

SAVES = 3
SETTINGS = {
    "task.length": 16, "model.num_layers": 1, "model.model_dim": 32, "model.num_heads": 2,
    "data.tokenizer": "byte", "data.batch_size": 8, "optim.peak_lr": 3e-2, "optim.warmup": 2,
    "train.num_steps": STEPS, "train.log_every_steps": 1, "train.sample_tokens": 0,
    "train.fingerprint_every_steps": 4, "train.on_bad_step": "skip", "train.spike_zscore": 0.1,
    "train.spike_steps": 3, "train.spike_metric": "grad_norm", "train.recordings": 1,
    "eval.every_steps": 4, "eval.max_tokens": 512, "eval.batch_size": 8,
    "checkpoint.every_steps": SAVES, "checkpoint.keep": 1,
}  # fmt: skip
LOST = "lost"  # instead of a kill: the run's folder is gone
ROW = "lm.metrics:Jsonl.append"
FILES = "fsspec.implementations.local:LocalFileSystem"
RECORD = "tensorboardX.record_writer:RecordWriter.write"
REPLACE, TEXT = "pathlib:Path.replace", "pathlib:Path.write_text"


def at(call, when="before", about="", number=1, kind=signal.SIGKILL):
    return {"call": call, "when": when, "about": about, "number": number, "kind": kind}


def row(step, when="before", of="train/", kind=signal.SIGKILL):
    """When the row of a step is written, of which the names begin with `of`."""
    return at(ROW, when, f"'step': {step}, '{of}", kind=kind)


def stopped_and(trouble):
    """The run is asked to stop, saves step 11, at which no save is due, and meets a trouble meanwhile."""
    return [row(10, kind=signal.SIGTERM), trouble]


# By name: the steps that the last start may go on from, and what ends the starts before it.
POINTS = {
    "the first receipt": (0, at(REPLACE, about="receipts/0001.json")),
    "half of the config": (0, at(TEXT, "half", "config.json")),
    "the config, half of the data's": (0, at(TEXT, "half", "data.json")),
    "half of the tokenizer, of a run that has checkpoints": (
        {6, 9}, row(11), at(TEXT, "half", "whole/tokenizer/tokenizer.json"),
    ),
    "the first evaluation": (0, at("lm.data.pipeline:EvalBatches.__getitem__", number=2)),
    "a batch of an evaluation": ({0, 3}, at("lm.data.pipeline:EvalBatches.__getitem__", number=7)),
    "evaluated, no row": ({3, 6}, at("lm.train:score", "after", number=3)),
    "half of an evaluation's row": ({3, 6}, row(8, "half", "eval/")),
    "half of a row": ({3, 6}, row(8, "half")),
    "a row": ({3, 6}, row(8, "after")),
    "rows are not on the disk yet": ({3, 6}, at("lm.metrics:Writers.sync", number=3)),
    "rows are on the disk": ({3, 6}, at("lm.metrics:Writers.sync", "after", number=3)),
    "half of a record of TensorBoard": ({0, 3}, at(RECORD, "half", number=42)),
    "TensorBoard's file": ({0, 3}, at("lm.tensorboard:TensorBoard.sync", number=2)),
    "half of the trail's row": ({3, 6}, at(ROW, "half", "{'step': 8, 'fingerprints")),
    "the trail's row": ({3, 6}, at(ROW, "after", "{'step': 8, 'fingerprints")),
    "before a save": (3, at("lm.saving:Writer.start", number=2)),
    "a checkpoint's folder": (3, at("lm.saving:_make_room", "after", number=2)),
    "Orbax's save": (3, at("orbax.checkpoint:PyTreeCheckpointHandler.async_save", number=2)),
    "Orbax writes": ({3, 6}, at("orbax.checkpoint:AsyncCheckpointer.save", "after", number=2)),
    "Orbax has written the arrays": (3, at("orbax.checkpoint:PyTreeCheckpointHandler.finalize", number=2)),
    "before the manifest": (3, at("lm.manifests:write", number=2)),
    "a file is hashed": (3, at("lm.manifests:hash_file", "after", "checkpoints/6/", 2)),
    "half of the manifest": (3, at(TEXT, "half", "checkpoints/6/manifest.json")),
    "the manifest has another name": (3, at(REPLACE, about="checkpoints/6/manifest.json")),
    "the manifest": (6, at(REPLACE, "after", "checkpoints/6/manifest.json")),
    "a manifest is checked": (6, at("lm.manifests:problem", about="checkpoints'), 6")),
    "before a checkpoint goes": ({6, 9, 12}, at("pathlib:Path.rename", about="3.deleting")),
    "a checkpoint has another name": ({6, 9, 12}, at("pathlib:Path.rename", "after", "3.deleting")),
    "half of a checkpoint is deleted": ({6, 9, 12}, at("shutil:rmtree", "half", "3.deleting")),
    "a bad step is recorded": ({3, 6}, at("lm.recorder:_write_arrays")),
    "a record has another name": ({3, 6}, at("pathlib:Path.rename", about="partial")),
    "half of the skipped steps": ({3, 6}, at(TEXT, "half", "skipped.json")),
    "the skipped steps": ({3, 6}, at(REPLACE, "after", "skipped.json")),
    "half of a copied file": (12, at(f"{FILES}.put_file", "half", "remote/12/state")),
    "half of a copied row": (12, at(f"{FILES}.pipe_file", "half", "remote/12/run/metrics")),
    "a copy but its manifest": (12, at(f"{FILES}.pipe_file", about="remote/12/manifest")),
    "half of what is fetched": (
        {3, 6, 9}, row(12, "after"), LOST,
        at(f"{FILES}.get_file", "half", "/state"),
    ),
    "what is fetched but the rows": (
        {3, 6, 9}, row(12, "after"), LOST,
        at(f"{FILES}.get_file", "half", "run/metrics"),
    ),
    "rows are moved aside": ({3, 6}, row(8, "after"), at("os:replace", about="whole/metrics.jsonl")),
    "rows of the trail are moved aside": (
        {3, 6}, row(9, "after"), at("os:replace", about="whole/fingerprints.jsonl"),
    ),
    "events are moved aside": ({3, 6}, row(8, "after"), at("os:replace", "after", "tfevents")),
    "a checkpoint is restored": ({3, 6}, row(8, "after"), at("lm.stored:_read")),
    "the scores of a stopped evaluation": (
        4, at("lm.data.pipeline:EvalBatches.__getitem__", number=7, kind=signal.SIGTERM),
        at("lm.manifests:add_metrics"),
    ),
    "half of the scores of a stopped evaluation": (
        4, at("lm.data.pipeline:EvalBatches.__getitem__", number=7, kind=signal.SIGTERM),
        at(TEXT, "half", "checkpoints/4/manifest.json"),
    ),
    "Ctrl-C, saved and resumed, and a kill": (
        {5, 6, 9}, row(5, kind=signal.SIGINT), row(9),
    ),
    "the folder of an emergency save": (
        9, stopped_and(at("lm.saving:_make_room", "after", "checkpoints/11")),
    ),
    "an emergency save": (
        9, stopped_and(at("orbax.checkpoint:PyTreeCheckpointHandler.finalize", about="checkpoints/11")),
    ),
    "half of the manifest of an emergency save": (
        9, stopped_and(at(TEXT, "half", "checkpoints/11/manifest.json")),
    ),
    "the manifest of an emergency save": (
        11, stopped_and(at(REPLACE, "after", "checkpoints/11/manifest.json")),
    ),
    "the last save": (9, at("lm.saving:_make_room", about="checkpoints/12")),
    "the end": (12, at("lm.train:say_sample")),
}  # fmt: skip
CACHE = {
    "the tokenizer": at("lm.data.prepare:_tokenizer", "after"),
    "half of the tokenizer": at(TEXT, "half", "tokenizer/tokenizer.json"),
    "the shards": at("lm.data.writer:Writer.add", "after"),
    "the end of a shard": at("lm.data.writer:Writer.end_shard"),
    "the journal": at("lm.data.writer:Writer.end_shard", "after"),
    "half of the manifest": at(TEXT, "half", "manifest.json"),
    "the manifest": at(REPLACE, "after", "manifest.json"),
    "half of a compiled program": at("jax._src.lru_cache:LRUCache.put", "half", "train_step"),
}


@pytest.fixture(scope="module")
def server():
    made = killing.Server()
    yield made
    made.close()


@pytest.fixture(scope="module")
def two_devices():
    made = killing.Server(devices=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def make(server, text_file, tmp_path_factory):
    """Return a function that makes a run."""
    place, cache = tmp_path_factory.mktemp("kills"), tmp_path_factory.mktemp("cache")
    settings = dict(SETTINGS, **{"data.path": (str(text_file),)})
    lines = [f"    config.{name} = {value!r}" for name, value in settings.items()]
    sections = ", ".join(f"{name!r}: {{}}" for name in sorted({n.split(".")[0] for n in SETTINGS}))
    experiment = place / "small.py"
    experiment.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    config = ConfigDict({{{sections}, 'mesh': {{}}}})\n    config.model.name = 'gpt'\n"
        + "\n".join(lines) + "\n    return config\n"
    )  # fmt: skip
    numbers = iter(range(1000))

    def made(cache=cache, server=server, **settings):
        return killing.Run(server, place / str(next(numbers)), experiment, cache, **settings)

    return made


def finished(make, **how):
    """The run that is not killed, of which a first one has compiled the programs."""
    assert make(**how).end() == 0
    run = make(**how)
    start = time.monotonic()
    assert run.end() == 0, run.said.read_text()
    run.seconds = time.monotonic() - start
    assert manifests.read(run.remote, STEPS)["skipped"], "a step is skipped"
    return run


@pytest.fixture(scope="module")
def whole(make):
    return finished(make)


def check_killed(run, whole, point):
    """Let the ends of a point come to `run`; the same command then makes of it what `whole` is."""
    steps, *ends = POINTS[point]
    for end in ends:
        if end == LOST:
            shutil.rmtree(run.workdir)
            continue
        troubles = end if isinstance(end, list) else [end]
        code = run.end(*troubles)
        said = run.said.read_text()
        assert code == (-signal.SIGKILL if troubles[-1]["kind"] == signal.SIGKILL else 75), said
        assert ("to resume: python -m lm.main --config" in said) == (code == 75)
        assert "Traceback" not in said, said
        run.check()
    newest = run.newest()
    assert newest in (steps if isinstance(steps, set) else {steps})
    assert run.end() == 0, run.said.read_text()
    assert run.resumed() == newest
    assert_same(run, whole, events=LOST not in ends)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_a_point(make, whole, point):
    check_killed(make(), whole, point)


SHARDED = {"mesh.fsdp": 2}


@pytest.fixture(scope="module")
def whole_sharded(make, two_devices):
    run = finished(make, server=two_devices, **SHARDED)
    assert "2 x cpu; mesh fsdp 2" in run.said.read_text()
    return run


@pytest.mark.parametrize(
    "point",
    ["Orbax writes", "half of the manifest", "a checkpoint is restored", "an emergency save"],
)
def test_a_kill_of_a_run_on_two_devices(make, two_devices, whole_sharded, point):
    check_killed(make(server=two_devices, **SHARDED), whole_sharded, point)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_while_a_damaged_checkpoint_is_moved_aside(make, whole, when):
    """Nothing of it is lost, and the one before it is used."""
    run = make()
    assert run.end(at("lm.retention:delete", number=2)) == -signal.SIGKILL  # both are there
    shutil.rmtree(run.remote, ignore_errors=True)
    folder = run.workdir / "checkpoints"
    assert manifests.good_steps(folder) == [3, 6]
    path = next((folder / "6" / "state" / "ocdbt.process_0" / "d").iterdir())
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    assert run.end(at("lm.manifests:move_aside", when, "checkpoints/6")) == -signal.SIGKILL
    assert manifests.all_steps(folder) == ([3, 6] if when == "before" else [3])
    assert run.end() == 0, run.said.read_text()
    assert run.resumed() == 3
    assert_same(run, whole)
    assert (folder / "6.aside0" / path.relative_to(folder / "6")).read_bytes() == damaged


BACK = {"train.on_bad_step": "rollback"}
ROLLBACKS = {
    "half of the skipped steps": at(TEXT, "half", "skipped.json"),
    "the skipped steps": at(REPLACE, "after", "skipped.json"),
    "the run goes back": at("lm.stored:_read"),
}


@pytest.fixture(scope="module")
def whole_rolled_back(make):
    run = finished(make, **BACK)
    assert "back to step 6, to go on without step 9" in run.said.read_text()
    return run


@pytest.mark.parametrize("point", ROLLBACKS)
def test_a_kill_in_a_rollback(make, whole_rolled_back, point):
    run = make(**BACK)
    assert run.end(ROLLBACKS[point]) == -signal.SIGKILL, run.said.read_text()
    run.check()
    assert run.newest() == 6
    assert run.end() == 0, run.said.read_text()
    assert run.resumed() == 6
    assert_same(run, whole_rolled_back)


@pytest.mark.parametrize("point", CACHE)
def test_a_kill_while_the_cache_is_written(make, whole, tmp_path, point):
    run = make(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    if "program" not in point:
        (tmp_path / "cache" / "programs").symlink_to(whole.cache / "programs")
    assert run.end(CACHE[point]) == -signal.SIGKILL, run.said.read_text()
    assert run.end() == 0, run.said.read_text()
    assert_same(run, whole)


TROUBLES = {  # by kind: how the run then ends, and what it says
    "read_only": (2, "Read-only file system"),
    "no_handles": (2, "Too many open files"),
    "clock_set_back": (0, ""),
}


@pytest.mark.parametrize("kind", TROUBLES)
def test_trouble_from_a_row_on(make, whole, kind):
    """The run ends with one line, its last checkpoint whole, or goes on; the same command finishes it."""
    run, (code, words) = make(), TROUBLES[kind]
    ended = run.end(row(5, kind=kind))
    said = run.said.read_text()
    if "no name spaces here" in said:
        pytest.skip("no name spaces here, to mount in")
    assert ended == code, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code > 0) and words in "".join(errors), said
    assert f'File "{killing.ROOT}/lm' not in said, (
        said
    )  # what fails in Orbax's threads they may show
    run.check()
    if code:
        newest = run.newest()
        assert newest < STEPS and run.end() == 0, run.said.read_text()
        assert run.resumed() == newest
    assert_same(run, whole)


@pytest.fixture
def mount():
    """Return a function that mounts a disk of 4 MB at a folder."""
    mounted = []

    def made(folder):
        folder.mkdir(parents=True)
        words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no leave to mount a small disk")
        mounted.append(folder)

    yield made
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


SMALL = "checkpoints"  # on a disk of their own: rows always find room
ROOM = at("lm.checkpoint:Checkpointer._failed", number=2, kind="room")
FILLS = at("lm.saving:Writer.start", number=2, kind="no_room")  # the save before is good
FULL = {  # what is on the disk, and what comes: how the run then ends, how often it says that, in which words
    "of the run": ("", [FILLS], 2, 1, "error: workdir="),
    "of its checkpoints": (SMALL, [FILLS], 2, 1, "error: workdir="),
    "of its checkpoints, for a while": (
        SMALL, [FILLS, ROOM], 0, 2, "warning: checkpoint ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("disk", FULL)
def test_the_disk_is_full(make, whole, mount, disk):
    """What was good stays; when there is room again the run goes on, or the same command does."""
    run, (folder, troubles, code, times, words) = make(), FULL[disk]
    mount(run.workdir / folder)
    assert run.end(*troubles) == code, run.said.read_text()
    said = run.said.read_text()
    found = [line for line in said.splitlines() if line.startswith(words)]
    assert len(found) == times and all("No space left on device" in line for line in found), said
    assert f'File "{killing.ROOT}/lm' not in said, said
    run.check()
    if code:
        assert run.newest() == 3
        (run.workdir / "checkpoints" / killed.FILLED).unlink()
        assert run.end() == 0, run.said.read_text()
        assert run.resumed() == 3
    assert_same(run, whole, orbax_failed=not code)


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_random_times(make, whole, seed):
    """Ten of them, one of each tenth of the run's time in any order; a run is killed until it is done."""
    draw = random.Random(seed)
    times = [(part + draw.random()) / 10 * whole.seconds for part in range(10)]
    draw.shuffle(times)
    run, killed = make(), 0
    for _ in range(40):
        process = run.start()
        if killed < len(times):
            time.sleep(times[killed])
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(process, signal.SIGKILL)
        code = run.server.wait(process)
        if code == 0:
            assert_same(run, whole)
            if killed == len(times):
                return
            run = make()
            times[killed] *= 0.7  # the machine is less busy than it was
        else:
            assert code == -signal.SIGKILL, run.said.read_text()
            killed += 1
            run.check()
    raise AssertionError(f"{killed} kills in 40 starts")
