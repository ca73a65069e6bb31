"""Checkpoints: whole or not there, verified, kept and retired, read in either layout, on any mesh."""

import errno
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm import checkpoint, fingerprint, initial, manifests, sharding, stored, train
from lm.config import ConfigError


def placed(tree):
    """Abstract arrays on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def state(value=0.0):
    return {
        "params": {"a": jnp.full((4, 2), float(value)), "b": jnp.arange(3.0)},
        "count": jnp.int32(7),
    }


@pytest.fixture
def saver(tmp_path):
    saver = checkpoint.Checkpointer(tmp_path, checkpoint.Config(keep=2))
    yield saver
    saver.close()


def save_all(saver, losses):
    for step, loss in losses.items():
        saver.save(step, state(step), {"eval/loss": loss} if loss is not None else {})
    saver.wait()


def test_what_is_saved_comes_back_bit_for_bit(saver):
    tree = {
        "x": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32),
        "n": jnp.int32(3),
    }
    saver.save(3, tree, {})
    saver.wait()
    jax.tree.map(np.testing.assert_array_equal, saver.restore_latest(placed(tree)), tree)


def test_nothing_saved_is_none(saver):
    assert saver.restore_latest(placed(state())) is None


def test_the_newest_and_the_best_are_kept(saver):
    save_all(saver, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 4.0})
    assert manifests.good_steps(saver.folder) == [2, 4, 5]
    assert manifests.best_step(saver.folder, "eval/loss") == 2


def test_the_best_is_not_kept_when_not_wanted(tmp_path):
    saver = checkpoint.Checkpointer(tmp_path, checkpoint.Config(keep=1, keep_best=False))
    save_all(saver, {1: 1.0, 2: 2.0})
    saver.close()
    assert manifests.good_steps(saver.folder) == [2]


def test_the_best_of_none_is_said(tiny, tmp_path):
    train.run(tiny(train__num_steps=3, checkpoint__every_steps=2, eval__every_steps=3), tmp_path)
    assert checkpoint.find_step(tmp_path, "best") == 3
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    with pytest.raises(ConfigError, match=r"step=best.*eval/loss"):
        checkpoint.find_step(tmp_path, "best")


def test_a_changed_manifest_is_not_trusted(saver):
    """Its scores decide what is kept, its arrays what is read."""
    save_all(saver, {1: 3.0, 2: 1.0})
    path = saver.folder / "2" / "manifest.json"
    path.write_text(path.read_text().replace('"eval/loss": 1.0', '"eval/loss": 9.0'))
    assert manifests.good_steps(saver.folder) == [1]
    restored = saver.restore_latest(placed(state()))
    np.testing.assert_array_equal(restored["params"]["a"], state(1)["params"]["a"])
    assert (saver.folder / "2.aside0").exists()


@pytest.mark.parametrize("late", [False, True])
def test_a_failed_save_is_one_line_and_leaves_no_part(saver, monkeypatch, late):
    save_all(saver, {1: 1.0})

    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: cannot write\nmore: No space left on device\n" * 9)

    which = "wait_until_finished" if late else "save"
    monkeypatch.setattr(ocp.AsyncCheckpointer, which, full)
    with pytest.raises(
        OSError, match=r"^checkpoint 2: RESOURCE_EXHAUSTED: cannot write \(No space"
    ):
        save_all(saver, {2: 1.0})
    monkeypatch.undo()
    assert manifests.all_steps(saver.folder) == [1]


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_a_failed_deletion_is_said_tried_again_and_loses_nothing(saver, monkeypatch, call):
    save_all(saver, {1: None, 2: None})
    said: list = []
    saver.say = said.append
    owner = {"rename": Path, "rmtree": shutil}[call]
    original = getattr(owner, call)

    def fails(path, *args):
        if call == "rename" and "deleting" not in str(args[0]):
            return original(path, *args)
        raise OSError("cannot delete")

    monkeypatch.setattr(owner, call, fails)
    save_all(saver, {3: None})
    assert len(said) == 1 and "cannot delete; it is tried again later" in said[0]
    assert manifests.good_steps(saver.folder) == ([1, 2, 3] if call == "rename" else [2, 3])
    monkeypatch.setattr(owner, call, original)
    save_all(saver, {4: None})
    assert manifests.good_steps(saver.folder) == [3, 4]
    assert sorted(path.name for path in saver.folder.iterdir()) == ["3", "4"]


def test_keeping_none_is_refused():
    with pytest.raises(ConfigError, match=r"checkpoint\.keep=0"):
        checkpoint.Config(keep=0)


def damage_flip(folder):
    file = max(
        (p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_truncate(folder):
    file = max(
        (p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    file.write_bytes(file.read_bytes()[:-1])


def damage_missing_file(folder):
    next(p for p in (folder / "state").rglob("*") if p.is_file()).unlink()


def damage_unfinished(folder):
    (folder / "manifest.json").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"step": 2, "fi')


def damage_other_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("1"), folder)


@pytest.mark.parametrize(
    "damage",
    [
        damage_flip,
        damage_truncate,
        damage_missing_file,
        damage_unfinished,
        damage_manifest,
        damage_other_step,
    ],
)
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_used(saver, damage):
    save_all(saver, {1: None, 2: None})
    damage(saver.folder / "2")
    said = []
    restored = saver.restore_latest(placed(state()), said.append)
    assert float(restored["params"]["a"][0, 0]) == 1.0
    assert len(said) == 1 and said[0].startswith("checkpoint 2 is not used")
    assert (saver.folder / "2.aside0").is_dir(), "nothing is deleted"
    assert manifests.good_steps(saver.folder) == [1]


@pytest.mark.parametrize("name", ["../x", "state/../../x", "/etc/x"])
def test_a_manifest_names_no_file_outside_its_folder(name):
    manifest = {"step": 1, "files": {name: [0, ""]}}
    for part in (manifest, {"step": 1, "files": {}, "run": {name: ""}}):
        text = json.dumps({**part, "digest": manifests.digest(part)})
        assert manifests.parsed(text.encode(), 1) is None
    inside = {"step": 1, "files": {"state/..x": [0, ""]}}
    text = json.dumps({**inside, "digest": manifests.digest(inside)})
    assert manifests.parsed(text.encode(), 1)


def test_a_name_that_cannot_be_read_is_not_taken_for_none(saver, monkeypatch):
    """Else what is saved then is of no run, and its own name is moved aside."""
    workdir = saver.folder.parent
    manifests.identify(workdir, "one")

    def fails(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "content", fails)
        for ask in (
            lambda: manifests.run_of(saver.folder),
            lambda: manifests.identify(workdir, "x"),
        ):
            with pytest.raises(PermissionError):
                ask()
    manifests.identify(workdir, "another")
    assert manifests.run_of(saver.folder) == "one"


def test_a_better_checkpoint_of_another_run_takes_no_room_of_the_own(tmp_path):
    for name, loss in (("one", 2.0), ("other", 1.0)):
        manifests.identify(tmp_path / name, name)
        cfg = checkpoint.Config(keep=1)
        with checkpoint.Checkpointer(tmp_path / name, cfg) as saver:
            steps = (5,) if name == "other" else (1, 7)
            for step in steps:
                saver.save(step, state(step), {"eval/loss": loss + (step == 7)}, wait=True)
    shutil.copytree(tmp_path / "other/checkpoints/5", tmp_path / "one/checkpoints/5")
    assert manifests.good_steps(folder := tmp_path / "one" / "checkpoints") == [1, 7]
    with checkpoint.Checkpointer(tmp_path / "one", checkpoint.Config(keep=1)) as saver:
        saver.save(8, state(8), {"eval/loss": 3.0}, wait=True)
    assert manifests.good_steps(folder) == [1, 8] and manifests.best_step(folder, "eval/loss") == 1
    assert manifests.all_steps(folder) == [1, 5, 8]


def test_a_failed_save_is_told_at_the_next_call(saver, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifests, "write", full)
    saver.save(1, state(), {})
    with pytest.raises(OSError, match="No space left"):
        saver.wait()
    assert manifests.good_steps(saver.folder) == []


def test_a_shape_that_differs_is_named(saver):
    save_all(saver, {1: None})
    wanted = placed({**state(), "count": jnp.zeros((2,), jnp.int32)})
    with pytest.raises(ConfigError, match="count"):
        saver.restore_latest(wanted)


def layered(num_layers, *, scanned):
    rng = np.random.default_rng(1)
    kernels = jnp.asarray(rng.normal(size=(num_layers, 4, 8)), jnp.float32)
    if scanned:
        return {
            "params": {"blocks": {"kernel": kernels}, "norm": jnp.ones(3)},
            "mu": {"blocks": {"kernel": -kernels}},
        }
    blocks = {f"block_{i}": {"kernel": kernels[i]} for i in range(num_layers)}
    return {"params": {**blocks, "norm": jnp.ones(3)}, "mu": jax.tree.map(jnp.negative, blocks)}


@pytest.mark.parametrize("scanned", [True, False])
def test_scanned_layers_are_read_unrolled_and_back(saver, scanned):
    saver.save(1, layered(3, scanned=scanned), {})
    saver.wait()
    wanted = layered(3, scanned=not scanned)
    jax.tree.map(np.testing.assert_array_equal, saver.restore_latest(placed(wanted)), wanted)


@pytest.mark.parametrize("scanned", [True, False])
def test_stacks_of_two_depths_are_read_unrolled_and_back(saver, scanned):
    """As an encoder of more layers than its decoder has."""

    def both(scanned):
        deep, flat = (layered(n, scanned=scanned)["params"] for n in (3, 2))
        return {"params": {"encoder": deep, "decoder": flat}}

    saver.save(1, both(scanned), {})
    saver.wait()
    wanted = both(not scanned)
    jax.tree.map(np.testing.assert_array_equal, saver.restore_latest(placed(wanted)), wanted)
    params = jax.tree.map(jnp.zeros_like, wanted["params"])
    taken = initial.init_from(saver.folder / "1", params)
    jax.tree.map(np.testing.assert_array_equal, taken, wanted["params"])


@pytest.mark.parametrize("scanned", [True, False])
def test_another_count_of_layers_is_refused_by_name(saver, scanned):
    saver.save(1, layered(3, scanned=scanned), {})
    saver.wait()
    with pytest.raises(ConfigError, match="block"):
        saver.restore_latest(placed(layered(2, scanned=not scanned)))


def test_restores_onto_another_mesh(saver):
    values = jnp.arange(64.0).reshape(8, 8)
    one = sharding.make_mesh(sharding.Config(1, 8, 1))
    other = sharding.make_mesh(sharding.Config(2, 2, 2))
    saver.save(1, {"x": jax.device_put(values, NamedSharding(one, PartitionSpec("fsdp")))}, {})
    saver.wait()
    target = NamedSharding(other, PartitionSpec("tensor", "data"))
    restored = saver.restore_latest(
        {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=target)}
    )
    np.testing.assert_array_equal(restored["x"], values)
    assert restored["x"].sharding == target


def test_init_from_takes_what_has_the_same_name_and_says_the_rest(saver, capsys):
    saver.save(1, {"params": {"a": jnp.ones(3), "gone": jnp.ones(2)}}, {})
    saver.wait()
    params = {"a": jnp.zeros(3), "new": jnp.full(2, 5.0)}
    taken = initial.init_from(saver.folder / "1", params)
    np.testing.assert_array_equal(taken["a"], np.ones(3))
    np.testing.assert_array_equal(taken["new"], np.full(2, 5.0))
    said = capsys.readouterr().out
    assert "params.new" in said and "params.gone" in said


def test_init_from_refuses_a_stranger(saver):
    saver.save(1, {"params": {"a": jnp.ones(3)}}, {})
    saver.wait()
    with pytest.raises(ConfigError, match="no parameter"):
        initial.init_from(saver.folder / "1", {"z": jnp.ones(3)})
    with pytest.raises(ConfigError, match=r"params\.a"):
        initial.init_from(saver.folder / "1", {"a": jnp.ones(4)})


def test_write_whole_leaves_the_old_file_when_it_cannot(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    manifests.write_whole(path, "old")
    monkeypatch.setattr(manifests, "sync", lambda path: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        manifests.write_whole(path, "new")
    assert path.read_text() == "old"


def test_manifest_holds_what_it_promises(saver):
    save_all(saver, {4: 2.5})
    manifest = json.loads((saver.folder / "4" / "manifest.json").read_text())
    assert manifest["metrics"] == {"eval/loss": 2.5}
    ones = jnp.full((4, 2), 4.0)
    expected = fingerprint.shown(fingerprint.of(ones))
    assert manifest["arrays"]["params.a"] == [[4, 2], "float32", expected]
    on_disk = {
        str(p.relative_to(saver.folder / "4"))
        for p in (saver.folder / "4").rglob("*")
        if p.is_file()
    }
    assert set(manifest["files"]) == on_disk - {"manifest.json"}


def test_the_one_before_is_kept_until_the_last_has_been_read_back(tmp_path, monkeypatch):
    """A save whose bits are not the devices' is none, however well its files are hashed."""
    with checkpoint.Checkpointer(tmp_path, checkpoint.Config(keep=1), lambda _: None) as saver:
        saver.save(1, state(1), {}, wait=True)
        monkeypatch.setattr(stored, "problem", lambda *_: "array params.a is not what was saved")
        with pytest.raises(OSError, match=r"array params\.a"):
            saver.save(2, state(2), {}, wait=True, verify=True)
        assert manifests.good_steps(saver.folder) == [1]
        monkeypatch.undo()
        saver.save(3, state(3), {}, wait=True, verify=True)
        assert manifests.good_steps(saver.folder) == [3]


def test_a_fault_that_passes_is_not_taken_for_damage(saver, monkeypatch):
    save_all(saver, {1: 1.0, 2: 2.0})

    def fails(path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "hash_file", fails)
        with pytest.raises(OSError, match="Too many open files"):
            saver.restore_latest(placed(state()))
    assert manifests.good_steps(saver.folder) == [1, 2]
