"""Each kind of file of a checkpoint, damaged in each way: found, named, never loaded, the one before used."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import checkpoint, manifests, newest, stored, train
from lm.config import ConfigError
from tools import checkpoint as tool

# Files of a checkpoint, but for what differs from save to save in their names.
KINDS = [
    r"manifest\.json",
    r"state/_CHECKPOINT_METADATA",
    r"state/_METADATA",
    r"state/_sharding",
    r"state/commit_success\.txt",
    r"state/manifest\.ocdbt",
    r"state/d/\w+",
    r"state/ocdbt\.process_0/manifest\.ocdbt",
    r"state/ocdbt\.process_0/d/\w+",
]
FOLDERS = (".", "state", "state/d", "state/ocdbt.process_0", "state/ocdbt.process_0/d")


def state(seed):
    values = np.random.default_rng(seed).normal(size=(64, 200))
    return {"params": {"a": jnp.asarray(values, jnp.float32), "b": jnp.arange(3.0) + seed}}


def abstract():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of two runs, `ours` and `other`, each with checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    for first, name in ((1, "ours"), (3, "other")):
        with checkpoint.Checkpointer(folder / name, checkpoint.Config()) as saver:
            for step in (1, 2):
                saver.save(step, state(first + step), {}, wait=True)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved / "ours", tmp_path / "run")
    return tmp_path / "run"


def files_of(target, kind=".*"):
    names = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    return [name for name in names if re.fullmatch(kind, name)]


def same_kind(name, target):
    """The file of another checkpoint that has the place of this one: data by order."""
    kind = next(kind for kind in KINDS if re.fullmatch(kind, name))
    found = sorted(
        files_of(target, kind), key=lambda other: (target / other).stat().st_size, reverse=True
    )
    return target / found[0]


def flip(at):
    def damage(path, saved):
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return damage


def truncate(path, saved):
    path.write_bytes(path.read_bytes()[:-1])


def halve(path, saved):
    os.truncate(path, path.stat().st_size // 2)


def empty(path, saved):
    path.write_bytes(b"")


def delete(path, saved):
    path.unlink()


def grow(path, saved):
    path.write_bytes(path.read_bytes() + b"\0")


def zeros(path, saved):
    path.write_bytes(bytes(path.stat().st_size))


def swap(path, saved):
    """Two files of the checkpoint change places."""
    target = next(parent for parent in path.parents if parent.name == "2")
    other = next(
        target / name
        for name in files_of(target)
        if (target / name).read_bytes() != path.read_bytes()
    )
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)


def of_another_step(path, saved):
    replace(path, saved / "ours" / "checkpoints" / "1")


def of_another_run(path, saved):
    replace(path, saved / "other" / "checkpoints" / "2")


def replace(path, theirs):
    target = next(parent for parent in path.parents if parent.name == "2")
    path.write_bytes(same_kind(str(path.relative_to(target)), theirs).read_bytes())


def folder_instead(path, saved):
    path.unlink()
    path.mkdir()


def forbid(path, saved):
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads all; a process that does not is started below")


DAMAGES = {
    "flip first bit": flip(0.0), "flip middle bit": flip(0.5), "flip last bit": flip(1.0),
    "truncate": truncate, "halve": halve, "empty": empty, "delete": delete, "grow": grow,
    "zeros": zeros, "swap": swap, "of another step": of_another_step,
    "of another run": of_another_run, "folder instead": folder_instead, "forbid": forbid,
}  # fmt: skip


def test_there_are_no_other_kinds_of_files(saved):
    target = saved / "ours" / "checkpoints" / "2"
    for name in files_of(target):
        assert any(re.fullmatch(kind, name) for kind in KINDS), name
    for kind in KINDS:
        assert files_of(target, kind), kind


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_and_named_and_the_step_before_used(saved, run, kind, damage):
    for number, name in enumerate(files_of(run / "checkpoints" / "2", kind)):
        copy = run if number == 0 else shutil.copytree(saved / "ours", run.with_name(f"{number}"))
        target = copy / "checkpoints" / "2"
        before = (target / name).read_bytes()
        DAMAGES[damage](target / name, saved)
        readable = damage != "forbid" and (target / name).is_file()
        if readable and (target / name).read_bytes() == before:
            continue  # the other one has the same bytes, as of a file that every checkpoint has
        said: list = []
        with checkpoint.Checkpointer(copy, checkpoint.Config()) as saver:
            assert newest.good(saver.folder, said.append) == 1
            if number == 0:
                restored = saver.restore_latest(abstract())
                jax.tree.map(np.testing.assert_array_equal, restored, state(2))
        assert len(said) == 1 and said[0].startswith("checkpoint 2 is not used: ")
        # Of two that changed places either; with another run's manifest no file is what it says.
        either = damage == "swap" or (name, damage) == ("manifest.json", "of another run")
        aside = target.with_name("2.aside0")
        named = files_of(aside) if either else [name]
        assert any(f" {file} " in f"{said[0]};".replace(":", " ") for file in named), said
        # Not deleted; and what may not be read may be whole.
        assert manifests.all_steps(copy / "checkpoints") == ([1, 2] if damage == "forbid" else [1])
        assert aside.exists() == (damage != "forbid")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_may_not_be_read_is_found_and_loses_nothing(saved, run, folder):
    """The step before is used, later ones are saved, and with its mode back the checkpoint is whole."""
    target = run / "checkpoints" / "2"
    aside = target.with_name("2.aside0")
    mode = (target / folder).stat().st_mode
    forbid(target / folder, saved)
    said: list = []
    try:
        with checkpoint.Checkpointer(run, checkpoint.Config(keep=1)) as saver:
            # Without the one before nothing begins anew.
            (run / "checkpoints" / "1").rename(run / "away")
            with pytest.raises(
                ConfigError, match=r"cannot be read.*, and no other is good; let it be"
            ):
                saver.restore_latest(abstract(), said.append)
            assert target.exists() and len(said) == 1
            said.clear()
            (run / "away").rename(run / "checkpoints" / "1")
            restored = saver.restore_latest(abstract(), said.append)
            jax.tree.map(np.testing.assert_array_equal, restored, state(2))
            for step in (2, 3):
                saver.save(step, state(step), {}, wait=True, verify=True)
    finally:
        (next(path for path in (aside, target) if path.exists()) / folder).chmod(mode)
    why = "file manifest.json" if folder == "." else f"file {folder}/"
    assert len(said) == 1 and said[0].startswith(f"checkpoint 2 is not used: {why}"), said
    assert said[0].endswith("it stays where it is")
    assert manifests.good_steps(target.parent) == [3]
    assert manifests.problem(target.parent, 3) == ""
    aside.rename(target)
    assert manifests.problem(target.parent, 2) == "", "nothing of it is lost"


def test_root_is_refused_what_may_not_be_read(tmp_path):
    """The cases above that root skips, in a process without the rights that let root read all."""
    if os.geteuid():
        pytest.skip("not root, who skips nothing")
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv here, to give up rights with")
    lost = "-dac_override,-dac_read_search"
    options = ["-o", "addopts=", "-k", "forbid or may_not_be_read_is_found"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    told = subprocess.run(
        ["setpriv", f"--bounding-set={lost}", f"--inh-caps={lost}", sys.executable,
         "-m", "pytest", *options, "--basetemp", tmp_path / "cases", __file__],
        cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    last = told.stdout.splitlines()[-1]
    assert f" {len(KINDS) + len(FOLDERS)} passed" in last and "skipped" not in last, told.stdout


def test_all_damaged_is_none(saved, run):
    for step in (1, 2):
        target = run / "checkpoints" / str(step)
        flip(0.5)(same_kind("state/d/0", target), saved)
    with checkpoint.Checkpointer(run, checkpoint.Config()) as saver:
        assert saver.restore_latest(abstract(), [].append) is None
    assert {path.name for path in saver.folder.iterdir()} == {"1.aside0", "2.aside0"}


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_manifest_that_is_no_plain_file_is_damaged_and_not_waited_for(saved, run, kind):
    """A pipe that nobody writes into, and a device without an end."""
    path = run / "checkpoints/2/manifest.json"
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    assert manifests.read(run / "checkpoints", 2) is None
    identity = run / "identity.json"
    identity.unlink(missing_ok=True)
    os.mkfifo(identity)
    assert manifests.run_of(run / "checkpoints") == ""


def test_a_manifest_larger_than_any_is_damaged_and_not_read(saved, run, monkeypatch):
    os.truncate(run / "checkpoints" / "2" / "manifest.json", manifests.LARGEST + 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read"))
        assert manifests.read(run / "checkpoints", 2) is None
    with checkpoint.Checkpointer(run, checkpoint.Config()) as saver:
        assert saver.restore_latest(abstract(), [].append) is not None
    assert {path.name for path in saver.folder.iterdir()} == {"1", "2.aside0"}


def unmovable(folder):
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize("movable", [True, False])
def test_what_orbax_restores_silently_wrong_is_found_in_the_files_and_in_the_arrays(
    run, monkeypatch, movable
):
    """A flipped bit among an array's bytes; then a manifest that was made of the damaged files."""
    folder = run / "checkpoints"
    target, place = folder / "2", jax.sharding.SingleDeviceSharding(jax.devices()[0])
    path = same_kind("state/ocdbt.process_0/d/0", target)
    flip(0.5)(path, None)
    wanted = {"params.a": jax.ShapeDtypeStruct((64, 200), jnp.float32, sharding=place)}
    array = stored._read(target, wanted)["params.a"]
    assert (np.asarray(array) != state(3)["params"]["a"]).any(), "Orbax says nothing"
    name = str(path.relative_to(target))
    assert manifests.problem(folder, 2) == f"file {name} is not what was written"
    manifest = manifests.read(folder, 2)
    (target / "manifest.json").unlink()
    manifests.write(target, {key: manifest[key] for key in ("format", "step", "metrics", "arrays")})
    assert manifests.problem(folder, 2) == ""
    assert stored.problem(folder, 2) == "array params.a is not what was saved"
    assert stored.problem(folder, 1) == ""
    said: list = []
    if not movable:
        monkeypatch.setattr(manifests, "move_aside", unmovable)
    with checkpoint.Checkpointer(run, checkpoint.Config()) as saver:
        restored = saver.restore_latest(abstract(), said.append)
    np.testing.assert_array_equal(restored["params"]["a"], state(2)["params"]["a"])
    (line,) = said
    assert line.startswith("checkpoint 2 is not used: array params.a is not what was saved; ")
    assert target.exists() != movable


def test_a_folder_that_cannot_be_moved_is_said_and_passed_over(saved, run, monkeypatch):
    truncate(same_kind("state/d/0", run / "checkpoints" / "2"), saved)

    monkeypatch.setattr(manifests, "move_aside", unmovable)
    said: list = []
    with checkpoint.Checkpointer(run, checkpoint.Config()) as saver:
        jax.tree.map(
            np.testing.assert_array_equal, saver.restore_latest(abstract(), said.append), state(2)
        )
    assert len(said) == 1 and "it stays where it is: [Errno 30] Read-only" in said[0]


def test_a_whole_checkpoint_of_another_run_is_found(tmp_path, capsys):
    """Its files are what its manifest says; a workdir says of which run it is, and so does a manifest."""
    for name in ("one", "two"):
        manifests.identify(tmp_path / name, f"begins as {name}")
        with checkpoint.Checkpointer(tmp_path / name, checkpoint.Config(keep=2)) as saver:
            for step in (1, 2):
                saver.save(step, state(step + 10 * (name == "two")), {}, wait=True)
    own = tmp_path / "one" / "checkpoints"
    shutil.rmtree(own / "2")
    shutil.copytree(tmp_path / "two" / "checkpoints" / "2", own / "2")
    assert manifests.problem(own, 2) == "it is another run's"
    assert tool.main(["verify", str(tmp_path / "one")]) == 1
    assert "it is another run's" in capsys.readouterr().out
    said: list = []
    with checkpoint.Checkpointer(tmp_path / "one", checkpoint.Config()) as saver:
        restored = saver.restore_latest(abstract(), said.append)
    jax.tree.map(np.testing.assert_array_equal, restored, state(1))
    assert said == [f"checkpoint 2 is not used: it is another run's; moved to {own / '2.aside0'}"]


def test_a_damaged_identity_is_that_of_the_checkpoints_again(tmp_path):
    manifests.identify(tmp_path, "begins so")
    with checkpoint.Checkpointer(tmp_path, checkpoint.Config()) as saver:
        saver.save(1, state(1), {}, wait=True)
    path = tmp_path / manifests.IDENTITY
    for damaged in (path.read_text().replace("begins", "Begins"), "", "[]", '{"identity": 3}'):
        path.write_text(damaged)
        assert manifests.problem(tmp_path / "checkpoints", 1) == ""
        manifests.identify(tmp_path, "begins otherwise")
        assert manifests.run_of(tmp_path / "checkpoints") == "begins so"


def test_a_manifest_that_the_disk_does_not_give_is_not_taken_for_damaged(run, monkeypatch):
    real = Path.read_bytes

    def fails(path):
        if path.name == "manifest.json":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        with pytest.raises(ConfigError, match=r"manifest\.json cannot be read: Input/output error"):
            newest.good(run / "checkpoints", [].append)
        with (
            checkpoint.Checkpointer(run, checkpoint.Config()) as saver,
            pytest.raises(ConfigError, match="let it be read"),
        ):
            saver.fetch()
    assert newest.good(run / "checkpoints", [].append) == 2


def test_what_the_run_saved_before_its_identity_was_moved_aside_is_not_another_run_s(tmp_path):
    """Its disk was not there, it was begun with another config, and now its disk is there again."""
    manifests.identify(tmp_path, "begins so")
    with checkpoint.Checkpointer(tmp_path, checkpoint.Config()) as saver:
        saver.save(1, state(1), {}, wait=True)
    folder, path = saver.folder, tmp_path / manifests.IDENTITY
    folder.rename(tmp_path / "elsewhere")
    aside = manifests.move_aside(path)
    assert manifests.identify(tmp_path, "begins otherwise") == "begins otherwise"
    (tmp_path / "elsewhere").rename(folder)
    with pytest.raises(ConfigError, match=rf"{aside.name} says; rename that to identity\.json"):
        newest.good(folder, [].append)
    aside.replace(path)
    assert newest.good(folder, [].append) == 1


def test_a_list_of_no_run_is_not_another_run_s():
    assert not manifests.is_foreign({"identity": ""}, "own")
    assert manifests.is_foreign({"identity": "other"}, "own")


def test_what_cannot_be_listed_is_not_left_out_of_a_manifest(tmp_path, monkeypatch):
    (tmp_path / "1" / "state").mkdir(parents=True)
    (tmp_path / "1" / "state" / "data").write_text("x")
    real = os.scandir

    def fails(path="."):
        if str(path).endswith("state"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(OSError, match="Input/output"):
        manifests.write(tmp_path / "1", {"step": 1})


def test_a_name_that_no_checkpoint_here_has_begins_nothing_anew(tiny, tmp_path):
    """Another run's identity.json: it is that which is false, not all checkpoints."""
    train.run(tiny(), tmp_path / "run")
    train.run(tiny(seed=1), tmp_path / "other")
    path = tmp_path / "run" / manifests.IDENTITY
    own = path.read_text()
    shutil.copy(tmp_path / "other" / manifests.IDENTITY, path)
    for config in (tiny(), tiny(model__model_dim=16)):
        with pytest.raises(
            ConfigError, match=r"identity\.json: not that of the run whose checkpoints"
        ):
            train.run(config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.aside*"))
    path.unlink()
    train.run(tiny(), tmp_path / "run")
    assert path.read_text() == own
