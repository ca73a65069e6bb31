"""Saves that fail: said, tried again, never counted; and what is saved is what the devices had."""

import hashlib
import json
import os
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lm import checkpoint, fingerprint, manifests, retention, saving, stored, train
from lm.config import ConfigError
from lm.metrics import read_rows, untimed


def state(value=0.0):
    return {"params": {"a": jnp.full((4, 2), float(value))}, "count": jnp.int32(7)}


def abstract():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state())


@pytest.fixture
def said():
    return []


@pytest.fixture
def saver(tmp_path, said):
    with checkpoint.Checkpointer(tmp_path, checkpoint.Config(keep=2), said.append) as saver:
        yield saver
        saver._unsaved = None  # the tests' own


class Failing:
    """Stands in for a function: fails in the calls that are numbered, from 0, else does what it did.

    `late`: of those on the writer's thread, and when it is done.
    """

    def __init__(self, monkeypatch, owner, name, calls, *, late=False):
        self.count, error = 0, OSError(28, "No space left on device")
        original = getattr(owner, name)

        def function(*args, **kwargs):
            if late and threading.current_thread() is threading.main_thread():
                return original(*args, **kwargs)
            self.count += 1
            failing = self.count - 1 in calls
            found = original(*args, **kwargs) if late or not failing else None
            if failing:
                raise error
            return found

        monkeypatch.setattr(owner, name, function)


def run_steps(saver, first, last, every):
    """What the loop does: asks before each step, saves what is due; returns the steps it saved."""
    saved = []
    for step in range(first, last + 1):
        for thread in [saver._writer._thread] if saver._writer.started else []:
            thread.join()  # so that a failure is there when it is asked for
        if saver.owed() or step % every == 0:
            saver.save(step, state(step), {})
            saved.append(step)
    saver.settle()
    return saved


def test_a_save_that_cannot_start_is_tried_again_at_once(saver, said, monkeypatch):
    Failing(monkeypatch, ocp.AsyncCheckpointer, "save", {0})
    assert run_steps(saver, 4, 6, every=4) == [4]
    assert manifests.good_steps(saver.folder) == [4]
    assert len(said) == 1 and "checkpoint 4" in said[0] and "trying again" in said[0]


def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"run\[1\]/checkpoints: Orbax takes \[ in a path"):
        checkpoint.Checkpointer(tmp_path / "run[1]", checkpoint.Config())


def test_without_a_thread_a_save_is_tried_again(saver, said, without_thread):
    without_thread("Writer._finish")
    saver.save(4, state(4), {})
    saver.wait()
    assert manifests.good_steps(saver.folder) == [4]
    assert "checkpoint 4: can't start new thread; not saved, trying again" in said[0]


@pytest.mark.parametrize(
    ("fails", "saved"), [({0}, [4, 5]), ({0, 1}, [4, 5, 6]), ({0, 1, 2}, [4, 5, 6, 8])]
)
def test_a_save_that_fails_later_is_said_within_a_step_and_tried_at_the_next(
    saver, said, monkeypatch, fails, saved
):
    Failing(monkeypatch, ocp.AsyncCheckpointer, "wait_until_finished", fails, late=True)
    assert run_steps(saver, 4, 8, every=4)[: len(saved)] == saved
    good = manifests.good_steps(saver.folder)
    assert good and not set(good) & set(saved[: len(fails)])
    assert manifests.all_steps(saver.folder) == good, "of what failed nothing is left"
    assert len(said) == len(fails)
    assert f"checkpoint {saved[0]}: [Errno 28] No space left on device" in said[0]


@pytest.mark.parametrize("name", ["save", "wait_until_finished"])
def test_when_the_next_save_fails_with_all_its_tries_that_is_an_error(
    saver, said, monkeypatch, name
):
    saver.save(2, state(2), {})
    saver.wait()
    late = name != "save"
    Failing(monkeypatch, ocp.AsyncCheckpointer, name, range(99), late=late)
    with pytest.raises(
        OSError, match=r"^checkpoint \d+: .*No space.*, 6 times one after the other"
    ):
        run_steps(saver, 4, 20, every=4)
    assert len(said) == 5 and "the next that is due" in said[2]
    assert manifests.good_steps(saver.folder) == [2] and not manifests.problem(saver.folder, 2)


def test_the_last_save_is_tried_where_it_is_and_then_an_error(saver, said, monkeypatch):
    Failing(monkeypatch, manifests, "write", {0, 1, 2, 3})  # the writer's thread tries twice
    saver.save(1, state(1), {}, wait=True)
    assert manifests.good_steps(saver.folder) == [1] and len(said) == 2
    Failing(monkeypatch, manifests, "write", range(99))
    with pytest.raises(OSError, match=r"checkpoint 2: .*3 times"):
        saver.save(2, state(2), {}, wait=True)
    assert manifests.all_steps(saver.folder) == [1]


def test_the_last_save_is_read_back(saver, said, monkeypatch):
    original, broken = manifests.write, []

    def hashes_damage(target, manifest, known, check):
        """Damage before the hashes, as of memory: files are what the manifest says, arrays are not."""
        if not broken:
            broken.append(other_arrays(target, manifest["step"]))
        original(target, manifest, known, check)

    monkeypatch.setattr(manifests, "write", hashes_damage)
    saver.save(1, state(1), {}, wait=True, verify=True)
    assert len(said) == 1 and "checkpoint 1: array params.a is not what was saved" in said[0]
    assert (saver.folder / "1.aside0").is_dir()
    assert not stored.problem(saver.folder, 1)
    np.testing.assert_array_equal(
        saver.restore_latest(abstract())["params"]["a"], state(1)["params"]["a"]
    )


def other_arrays(target, step):
    """Put into `target` arrays of other values, as Orbax itself writes them."""
    shutil.rmtree(target / "state")
    with ocp.Checkpointer(stored.handler()) as orbax:
        orbax.save(target / "state", args=ocp.args.PyTreeSave(stored.flatten(state(step + 1))))


def test_fingerprints_are_of_what_the_devices_had(saver):
    saver.save(1, state(1), {}, wait=True)
    arrays = manifests.read(saver.folder, 1)["arrays"]
    for name, array in stored.flatten(state(1)).items():
        assert arrays[name] == [
            list(array.shape),
            str(array.dtype),
            fingerprint.each({"": array})[""],
        ]
    assert stored.problem(saver.folder, 1) == ""


def test_what_ends_a_run_is_not_hidden_by_a_save_that_failed(tmp_path, said, monkeypatch):
    Failing(monkeypatch, manifests, "write", range(99))
    with (
        pytest.raises(ValueError, match="the reason"),
        checkpoint.Checkpointer(tmp_path, checkpoint.Config(), said.append) as saver,
    ):
        saver.save(1, state(1), {})
        raise ValueError("the reason")
    assert "No space left" in said[0]
    with (
        pytest.raises(OSError, match="No space left"),
        checkpoint.Checkpointer(tmp_path, checkpoint.Config(), said.append) as saver,
    ):
        saver.save(1, state(1), {})


@pytest.mark.parametrize("fails", [{0, 1}, {1, 2}])  # of a save that is due both, then it goes well
def test_a_run_whose_saves_fail_now_and_then_is_the_same_run(tiny, tmp_path, monkeypatch, fails):
    """Its rows, its last arrays, and those of a run that goes on from the step saved instead."""

    def rows(workdir):
        found = read_rows(workdir / "metrics.jsonl")
        return [untimed(row) for row in found]

    train.run(tiny(), tmp_path / "whole")
    Failing(monkeypatch, manifests, "write", fails)
    asked = checkpoint.Checkpointer.owed

    def asked_late(saver, agreed):
        """Whatever the step's speed, a failure is there when it is asked for."""
        saver.settle()
        return asked(saver, agreed)

    monkeypatch.setattr(checkpoint.Checkpointer, "owed", asked_late)
    train.run(tiny(checkpoint__keep=9), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert set(manifests.good_steps(folder)) - {2, 4, 6}, "a step that was not due"
    for step in (6, 4, 2):
        shutil.rmtree(folder / str(step), ignore_errors=True)
    train.run(tiny(), tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    last = [
        json.loads((tmp_path / name / "checkpoints" / "6" / "manifest.json").read_text())
        for name in ("run", "whole")
    ]
    assert last[0]["arrays"] == last[1]["arrays"] and last[0]["metrics"] == last[1]["metrics"]


def test_what_is_kept(saver, monkeypatch):
    """The newest, every fifth, the best, the pinned, and the one just written, whatever its number."""
    for step in range(1, 13):
        if step == 4:
            retention.pin(saver.folder, 3)
        saver.save(step, state(step), {"eval/loss": abs(step - 7.0)})
        saver.settle()
    object.__setattr__(saver.cfg, "keep_every", 5)
    assert manifests.good_steps(saver.folder) == [3, 7, 11, 12]
    retention.unpin(saver.folder, 3)
    saver.save(5, state(5), {})
    saver.save(6, state(6), {})
    saver.save(2, state(2), {})
    saver.settle()
    assert manifests.good_steps(saver.folder) == [2, 5, 7, 11, 12]


def test_names_that_are_no_steps_are_left_alone(saver, tmp_path):
    """A copy by another name, and a link to nothing where a checkpoint is to be."""
    saver.save(3, state(3), {}, wait=True)
    shutil.copytree(saver.folder / "3", saver.folder / "030")
    (saver.folder / "4").symlink_to(tmp_path / "nowhere")
    said: list = []
    restored = saver.restore_latest(abstract(), said.append)
    np.testing.assert_array_equal(restored["params"]["a"], state(3)["params"]["a"])
    assert len(said) == 1 and said[0].startswith("checkpoint 4 is not used")
    assert {path.name for path in saver.folder.iterdir()} == {"3", "030", "4.aside0"}
    (saver.folder / "5").symlink_to(tmp_path / "nowhere")
    saver.save(5, state(5), {}, wait=True)
    assert manifests.good_steps(saver.folder) == [3, 5]


def test_a_metric_that_is_no_number_is_not_the_best(saver):
    for step, loss in ((1, float("nan")), (2, 3.0), (3, float("-inf")), (4, 5.0), (5, 4.0)):
        saver.save(step, state(step), {"eval/loss": loss})
    saver.settle()
    assert manifests.best_step(saver.folder, "eval/loss") == 2
    assert manifests.good_steps(saver.folder) == [2, 4, 5]


def test_the_clock_decides_nothing(saver):
    import os

    for step in (1, 2, 3):
        saver.save(step, state(step), {}, wait=True)
        for path in [saver.folder / str(step), *(saver.folder / str(step)).rglob("*")]:
            os.utime(path, (1e9 - step * 1e6,) * 2)  # the newer, the older
    assert manifests.good_steps(saver.folder) == [2, 3]
    restored = saver.restore_latest(abstract())
    assert float(restored["params"]["a"][0, 0]) == 3.0


def test_a_failure_is_a_line_that_names_step_and_cause(tmp_path):
    target = tmp_path / "7"
    target.mkdir()
    told = saving.failed(target, ValueError("first\nsecond"), freed=False)
    assert str(told) == "checkpoint 7: first" and target.exists()
    saving.failed(target, ValueError(), freed=True)
    assert not target.exists()


@pytest.mark.parametrize("when", ["hash_file", "write"])
def test_a_save_touches_no_folder_but_its_own(tmp_path, said, monkeypatch, when):
    """The workdir is moved while a checkpoint is written, and another run has one of the same step there."""
    folder, gone, moved = tmp_path / "w" / "checkpoints", [""], []
    original = getattr(manifests, when)

    def moves(*args, **options):
        if not moved and threading.current_thread() is not threading.main_thread():
            moved.append((tmp_path / "w").rename(tmp_path / "elsewhere"))
            with checkpoint.Checkpointer(tmp_path / "w", checkpoint.Config(), said.append) as other:
                other.save(1, state(2), {}, wait=True)
            gone[0] = "it was moved"
            if when == "write":
                raise OSError("of the folder that was there")
        return original(*args, **options)

    with checkpoint.Checkpointer(
        tmp_path / "w", checkpoint.Config(), said.append, lambda: gone[0]
    ) as saver:
        monkeypatch.setattr(manifests, when, moves)
        saver.save(1, state(1), {})
        saver.settle()
        saver._unsaved = None
    assert moved and said
    assert not manifests.problem(folder, 1)
    with checkpoint.Checkpointer(tmp_path / "w", checkpoint.Config(), said.append) as other:
        assert other.restore_latest(abstract())["params"]["a"][0, 0] == 2


def test_how_long_a_save_may_take_is_not_for_orbax_to_say(saver):
    """Its own limit is 20 minutes, after which it gives up what is still being written."""
    assert saver._writer._orbax._async_manager._timeout_secs > 10**6
    saver._writer._renew()
    assert saver._writer._orbax._async_manager._timeout_secs > 10**6


def test_files_are_hashed_while_others_are_written(tmp_path, said, monkeypatch):
    """Each large file once while or after the save, and once more as it is read back."""
    state = {str(i): jax.random.normal(jax.random.key(i), (2**18,)) for i in range(24)}
    done, hashed = [False], {True: [], False: []}
    wait, original = ocp.AsyncCheckpointer.wait_until_finished, manifests.hash_file

    def waits(self):
        """Wait, on the writer's thread, as on a disk that takes long."""
        late = time.monotonic() + 20
        writer = threading.current_thread() is not threading.main_thread()
        while writer and not hashed[False] and time.monotonic() < late:
            time.sleep(0.01)
        wait(self)
        done[0] = writer

    def hashes(path):
        if path.stat().st_size >= manifests.EARLY:
            hashed[done[0]].append(path.stat().st_ino)
        return original(path)

    monkeypatch.setattr(saving, "DATA_FILE", 2**20)
    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", waits)
    monkeypatch.setattr(manifests, "hash_file", hashes)
    with checkpoint.Checkpointer(tmp_path, checkpoint.Config(), said.append) as saver:
        saver.save(1, state, {}, wait=True)
    early, late = hashed[False], hashed[True]
    large = [p.stat().st_ino for p in (saver.folder / "1").rglob("*") if p.stat().st_size >= 2**20]
    assert early and len(large) > 3
    assert sorted(early + late) == sorted(2 * large)
    assert not manifests.problem(saver.folder, 1) and not stored.problem(saver.folder, 1)


def test_a_hash_is_of_the_file_as_it_was_left(tmp_path, monkeypatch):
    """What changes after its early hash is hashed again; what cannot be read meanwhile, at the end."""
    monkeypatch.setattr(manifests, "EARLY", 4)
    target = tmp_path / "checkpoints" / "7"
    (target / "part").mkdir(parents=True)
    changed, moved, held = (target / "part" / name for name in ("changed", "moved", "held.__lock"))
    with manifests.hashing(target) as known:
        for path in (changed, moved, held):
            path.write_bytes(b"first")
        while len(known) < 2:
            threading.Event().wait(0.01)
        changed.write_bytes(b"later")
        before = changed.stat()
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        moved = moved.rename(target / "elsewhere")
    assert len(known) in (2, 3)
    manifests.write(target, {"step": 7, "format": manifests.FORMAT, "arrays": {}}, known)
    files = (manifests.read(target.parent, 7) or {})["files"]
    assert files == {
        str(path.relative_to(target)): [5, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in (changed, moved, held)
    }


def test_a_save_that_is_tried_again_is_not_tried_anew_while_it_is_written(saver, said, monkeypatch):
    """Saves that take longer than a step: each step asks, and none waits."""
    Failing(monkeypatch, ocp.AsyncCheckpointer, "wait_until_finished", {0}, late=True)
    written, wait = threading.Event(), ocp.AsyncCheckpointer.wait_until_finished

    def waiting(orbax):
        if threading.current_thread() is not threading.main_thread() and said:
            written.wait(60)
        wait(orbax)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", waiting)
    saver.save(4, state(4), {})
    saver._writer._thread.join()
    assert saver.owed()
    saver.save(5, state(5), {})
    assert [saver.owed(), saver.owed()] == [False, False] and saver.writing() == 5
    written.set()
    saver.settle()
    assert not saver.owed() and manifests.good_steps(saver.folder) == [5]
