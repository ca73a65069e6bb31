"""Storage that fails: each call in turn, a full disk, a folder that is read-only, no file handles left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from lm import checkpoint, manifests, stored

ROOT = Path(__file__).parent.parent
CALLS = {
    "mkdir": Path, "write_text": Path, "replace": Path, "rename": Path, "unlink": Path,
    "fsync": os, "rmtree": shutil, "hash_file": manifests, "save": ocp.AsyncCheckpointer,
    "wait_until_finished": ocp.AsyncCheckpointer,
}  # fmt: skip


def state(value):
    return {"params": {"a": jnp.full((4, 2), float(value))}}


def good(folder):
    return [s for s in manifests.good_steps(folder) if not manifests.problem(folder, s)]


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_costs_no_good_checkpoint(tmp_path, monkeypatch, name, times):
    """The first calls of a kind fail, of a run that goes on: always one is whole, and the end is saved."""
    said: list = []
    checking: list = []
    left, original = [times], getattr(CALLS[name], name)

    def fails(*args, **kwargs):
        if left[0] and not checking:
            left[0] -= 1
            raise OSError(5, "Input/output error")
        return original(*args, **kwargs)

    cfg = checkpoint.Config(keep=1, keep_best=False)
    with checkpoint.Checkpointer(tmp_path, cfg, said.append) as saver:
        saver.save(2, state(2), {}, wait=True)
        monkeypatch.setattr(CALLS[name], name, fails)
        for step in range(3, 10):
            if saver.owed() or step % 2 == 0:
                saver.save(step, state(step), {})
            saver.settle()
            checking.append(step)
            assert good(saver.folder), f"none at step {step}"
            checking.clear()
        assert left[0] < times, "no save makes that call"
        left[0] = 0
        saver.save(10, state(10), {}, wait=True, verify=True)
    assert good(saver.folder) == manifests.good_steps(saver.folder) == [10]
    assert not stored.problem(saver.folder, 10)
    assert all("\n" not in text for text in said)


@pytest.mark.parametrize(
    ("name", "wait"),
    [
        pytest.param(name, wait, marks=() if name == "fsync" and wait else pytest.mark.slow)
        for name in (*CALLS, "open", "read_bytes")
        for wait in (True, False)
    ],
)
def test_each_call_of_a_save_may_be_the_one_that_fails(tmp_path, monkeypatch, name, wait):
    """One call of a kind after the other fails, once: the same save or the next step's is good."""
    said: list = []
    of = CALLS.get(name, Path)
    original, calls, bad = getattr(of, name), [0], [-1]

    def fails(*args, **kwargs):
        calls[0] += 1
        if calls[0] == bad[0]:
            raise OSError(5, "Input/output error")
        return original(*args, **kwargs)

    monkeypatch.setattr(of, name, fails)
    cfg = checkpoint.Config(keep=1, keep_best=False)
    with checkpoint.Checkpointer(tmp_path, cfg, said.append) as saver:

        def save(step):
            saver.save(step, state(step), {}, wait=wait, verify=wait)
            saver.settle()

        save(1)
        calls[0] = 0
        save(2)
        count, step = calls[0], 3
        for number in range(1, count + 1):
            calls[0], bad[0] = 0, number
            save(step)
            failed, bad[0] = calls[0] >= number, -1
            assert failed and (good(saver.folder) or not wait)
            if saver.owed():
                step += 1
                save(step)
            assert good(saver.folder)[-1] == step and not stored.problem(saver.folder, step), number
            step += 1
    assert count or name in ("rename", "unlink"), name
    if name in ("write_text", "replace", "fsync", "hash_file"):
        assert not said, "the manifest is tried again at once"


def test_all_of_a_checkpoint_is_on_the_disk_before_it_is_good(tmp_path, monkeypatch):
    """Every file, and every folder that has a name of it, is synced; the older one goes after that."""
    synced: list = []
    original = manifests.sync

    def sync(path):
        original(path)
        synced.append(path)

    monkeypatch.setattr(manifests, "sync", sync)
    cfg = checkpoint.Config(keep=1, keep_best=False)
    with checkpoint.Checkpointer(tmp_path, cfg, [].append) as saver:
        saver.save(1, state(1), {}, wait=True)
        saver._good = lambda step: synced.append(step)
        saver.save(2, state(2), {}, wait=True)
    target = saver.folder / "2"
    before = synced[: synced.index(2)]
    needed = {tmp_path, saver.folder, target, *target.rglob("*")} - {target / "manifest.json"}
    assert needed <= set(before)
    assert before.index(target / "manifest.json.partial") > before.index(target / "state")
    assert before[-1] == target


@pytest.mark.parametrize(
    "name", [name for name in CALLS if name not in ("rmtree", "rename", "unlink")]
)
def test_a_call_that_always_fails_ends_the_run_and_leaves_what_was_good(
    tmp_path, monkeypatch, name
):
    def fails(*args, **kwargs):
        raise OSError(5, "Input/output error")

    said: list = []
    with checkpoint.Checkpointer(tmp_path, checkpoint.Config(), said.append) as saver:
        saver.save(2, state(2), {}, wait=True)
        with (
            monkeypatch.context() as patch,
            pytest.raises(OSError, match=r"^checkpoint \d+: .*6 times"),
        ):
            patch.setattr(CALLS[name], name, fails)
            for step in range(3, 20):
                if saver.owed() or step % 4 == 0:
                    saver.save(step, state(step), {})
                saver.settle()
        saver._unsaved = None
    assert good(saver.folder) == [2] and len(said) == 5


OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")
SCRIPT = """
import json, os, resource, subprocess, sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
from lm import checkpoint, manifests

kind, run = sys.argv[1], Path(sys.argv[2])
drawn = np.random.default_rng(0).normal(size=(400, 400))
said = []
saver = checkpoint.Checkpointer(run, checkpoint.Config(keep=99), said.append)
saver.save(1, {"a": jnp.asarray(drawn, jnp.float32)}, {}, wait=True)


def limited(on):
    if kind in ("FSIZE", "NOFILE"):
        number = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(number)[1]
        low = hard
        if on:
            low = 100_000 if kind == "FSIZE" else len(os.listdir("/proc/self/fd"))
        resource.setrlimit(number, (low, hard))
    elif kind == "readonly":
        os.chmod(saver.folder, 0o555 if on else 0o755)
    elif kind == "mounted" and on:
        for options in (["--bind", str(saver.folder)], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *options, str(saver.folder)], check=True)
    elif kind == "mounted":
        subprocess.run(["umount", str(saver.folder)], check=True)


step = 2
limited(True)
try:
    while step < 40:
        if saver.owed() or step % 2 == 0:
            saver.save(step, {"a": jnp.asarray(drawn + step, jnp.float32)}, {})
        saver.settle()
        step += 1
    error = ""
except OSError as raised:
    error = str(raised)
finally:
    limited(False)
steps = manifests.good_steps(saver.folder)
whole = [s for s in steps if not manifests.problem(saver.folder, s)]
if kind == "full":
    (saver.folder / str(steps[0]) / "manifest.json").unlink()
    import shutil
    shutil.rmtree(saver.folder / str(steps[0]))
saver.save(50, {"a": jnp.asarray(drawn, jnp.float32)}, {}, wait=True, verify=True)
again = manifests.problem(saver.folder, 50)
print(json.dumps([error, steps, whole, again, said]))
"""


def limited_run(kind, folder):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "PYTHONPATH": str(ROOT)
    }
    told = subprocess.run(
        [*(OWN_MOUNTS if kind == "mounted" else ()), sys.executable, "-c", SCRIPT, kind, str(folder)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    if kind != "NOFILE":  # where Python itself cannot end what it could not begin
        assert not told.stderr, "what a save failed with is said once"
    return json.loads(told.stdout.splitlines()[-1])


def check(kind, folder, says):
    error, steps, whole, again, said = limited_run(kind, folder)
    assert says in error and "times one after the other" in error
    assert steps == whole and steps[0] == 1, "what was good stays"
    assert again == "", "and when there is room again, it is saved"
    assert all("\n" not in text for text in said)
    return steps


@pytest.mark.slow
def test_a_file_cannot_grow(tmp_path):
    assert check("FSIZE", tmp_path, "File too large") == [1]


@pytest.mark.slow
def test_no_file_handles_are_left(tmp_path):
    assert check("NOFILE", tmp_path, "Too many open files") == [1]


@pytest.mark.slow
def test_a_folder_is_read_only(tmp_path):
    if os.geteuid():
        assert check("readonly", tmp_path, "Permission denied") == [1]
        return
    # Modes are nothing to root: a mount, in a name space of its own.
    if subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode:
        pytest.skip("root, and no name spaces here to mount in")
    assert check("mounted", tmp_path, "Read-only file system") == [1]


@pytest.mark.slow
def test_the_disk_is_full(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no leave to mount a small disk")
    try:
        assert len(check("full", folder, "No space left on device")) > 3
    finally:
        subprocess.run(["umount", str(folder)], check=True)
