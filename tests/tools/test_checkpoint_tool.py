"""What a user asks of checkpoints, as typed: in the same process, and in one that knows the folder alone."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from lm import checkpoint, manifests, sharding
from tools import checkpoint as tool

ROOT = Path(__file__).parents[2]


def state(step):
    values = np.arange(12.0).reshape(3, 4)
    values[0, 0] = np.nan if step == 3 else 0
    return {
        "params": {"a": jnp.asarray(values, jnp.float32), "b": jnp.ones(3, jnp.bfloat16)},
        "ema": {"a": jnp.full((3, 4), float(step)), "b": jnp.ones(3, jnp.bfloat16)},
        "step": jnp.int32(step),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    with checkpoint.Checkpointer(run, checkpoint.Config(keep=9)) as saver:
        for step in (1, 2, 3):
            saver.save(step, state(step), {"eval/loss": abs(step - 2) + 0.5}, wait=True)
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def damage(run, step):
    path = max((run / "checkpoints" / str(step)).rglob("d/*"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return path.name


def typed(*words):
    return tool.main(list(map(str, words)))


def test_verify_says_what_is_damaged(run, capsys):
    assert typed("verify", run, "--arrays") == 0
    assert capsys.readouterr().out.count("files and arrays are what was saved") == 3
    name = damage(run, 2)
    assert typed("verify", run) == 1
    said = capsys.readouterr().out.splitlines()
    assert name in said[1] and said[1].startswith("checkpoint 2: file ")
    assert typed("verify", run, "--step", 3) == 0
    assert typed("verify", run / "checkpoints" / "2") == 1


def test_what_a_run_is_writing_is_no_damage(run, capsys, monkeypatch):
    (run / "checkpoints" / "4").mkdir()
    assert typed("verify", run) == 1
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        capsys.readouterr()
        assert typed("verify", run) == 0 and typed("list", run) == 0
        assert capsys.readouterr().out.count("being written") == 2
        damage(run, 3)
        assert typed("verify", run) == 1
        monkeypatch.setattr(
            manifests, "all_steps", lambda folder: [1, 2, 9]
        )  # as it was a moment ago
        capsys.readouterr()
        assert typed("verify", run) == 0 and typed("list", run) == 0
        assert capsys.readouterr().out.count("deleted meanwhile") == 2


def test_list_is_a_line_a_checkpoint(run, capsys):
    assert typed("pin", run, 1) == 0
    damage(run, 3)
    capsys.readouterr()
    assert typed("list", run) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert "good; pinned" in first and "eval/loss 1.5" in first
    assert "good; best" in second
    assert "damaged: file" in third


@pytest.mark.parametrize("config", ["[" * 100_000, '{"checkpoint": {"best_metric": ["a"]}}'])
def test_list_needs_no_config_that_makes_sense(run, capsys, config):
    (run / "config.json").write_text(config)
    assert typed("list", run) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_inspect_counts_what_is_no_number(run, capsys):
    assert typed("inspect", run) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["params.a"] == ["3x4", "float32", "22.49", "1", "11", "1"]
    assert lines["params.b"][:2] == ["3", "bfloat16"] and lines["step"][0] == "one"


def test_diff_names_what_differs(run, capsys):
    steps = run / "checkpoints"
    assert typed("diff", steps / "1", steps / "2") == 0
    said = capsys.readouterr().out
    assert "ema.a: largest difference 1, 12 of 12 differ" in said
    assert "3 of 5 arrays in both are the same" in said
    assert typed("diff", steps / "1", steps / "1") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("5 of 5")


def test_prune_keeps_what_is_said_and_what_is_good(run, capsys):
    folder = run / "checkpoints"
    assert typed("prune", run, "--keep", 1, "--keep_best", "eval/loss", "--dry_run") == 0
    assert "would be deleted: 1\nkept: 2, 3" in capsys.readouterr().out
    assert manifests.good_steps(folder) == [1, 2, 3]
    damage(run, 3)
    assert typed("prune", run, "--keep", 1) == 0
    assert manifests.good_steps(folder) == [2, 3], (
        "3 is kept as the newest, 2 as the one that is good"
    )
    damage(run, 2)
    assert typed("prune", run, "--keep", 1) == 2
    assert manifests.good_steps(folder) == [2, 3]


def test_pins_survive_and_are_taken_back(run, capsys):
    assert typed("pin", run, 1) == 0
    with checkpoint.Checkpointer(run, checkpoint.Config(keep=1, keep_best=False)) as saver:
        saver.save(4, state(4), {}, wait=True)
        assert manifests.good_steps(saver.folder) == [1, 4]
    assert typed("unpin", run, 1) == 0
    assert typed("unpin", run, 1) == 2
    assert typed("prune", run, "--keep", 1) == 0
    assert manifests.good_steps(run / "checkpoints") == [4]


@pytest.mark.parametrize(
    ("part", "names"),
    [([], {"a": 3.0, "b": 1.0}), (["--part", "params"], {"a": np.nan, "b": 1.0})],
)
def test_export_is_the_average_or_what_is_asked_for(run, tmp_path, part, names):
    out = tmp_path / "model.safetensors"
    assert typed("export", run, "--out", out, *part) == 0
    found = load_file(out)
    assert {name: float(array.ravel()[0]) for name, array in found.items()} == pytest.approx(
        names, nan_ok=True
    )
    assert typed("export", run, "--out", out) == 2, "it is there already"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", "nowhere"], "nowhere: no checkpoints there"),
        (["inspect", "RUN", "--step", "7"], "step 7: "),
        (["pin", "RUN", "x"], "step x: "),
        (["inspect", "RUN", "--step", "1" * 5000], "step 1"),
        (["prune", "RUN", "--keep", "0"], "--keep 1"),
        (["prune", "RUN", "--keep", "1", "--keep_best", "eval/los"], "eval/los"),
        (["export", "RUN", "--out", "model.bin"], "model.bin"),
        (["export", "RUN", "--out", "m.safetensors", "--part", "opt"], "no such part; it has "),
    ],
)
def test_mistakes_are_a_line(run, capsys, words, says):
    assert typed(*(str(run) if word == "RUN" else word for word in words)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and says in told


def test_export_of_what_is_damaged_is_refused(run, tmp_path, capsys):
    name = damage(run, 3)
    assert typed("export", run, "--out", tmp_path / "m.safetensors") == 2
    assert name in capsys.readouterr().err and not (tmp_path / "m.safetensors").exists()


def alone(*words):
    """Type a command in a fresh process with one device; return its exit code, and what it says."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    told = subprocess.run(
        [sys.executable, "-m", "tools.checkpoint", *map(str, words)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return told.returncode, told.stdout or told.stderr


def test_a_process_that_knows_the_folder_alone(run):
    """One device, no config: and where there is a config that runs code, it is not run."""
    (run / "config.json").write_text(json.dumps({"model": {"name": "of_another_tree"}}))
    code, said = alone("verify", run, "--arrays")
    assert code == 0, said
    assert said.count("files and arrays are what was saved") == 3


def split_state(step):
    """A state split over eight devices, all of it but the step."""
    mesh = sharding.make_mesh(sharding.Config(data=1, fsdp=8))
    values = np.arange(64, dtype=np.float32).reshape(16, 4)
    values[9, 1] = np.nan if step == 4 else -step
    split = {
        "params": {"a": values, "b": np.full(8, step / 2, jnp.bfloat16)},
        "ema": {"a": np.full((4, 16), np.float32(step)), "b": np.ones(8, jnp.bfloat16)},
    }
    axes = {"a": {"params": ("fsdp",), "ema": (None, "fsdp")}, "b": dict.fromkeys(split, ("fsdp",))}
    placed = {
        part: {
            name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes[name][part])))
            for name, x in arrays.items()
        }
        for part, arrays in split.items()
    }
    assert all(x.addressable_shards[0].data.size == x.size // 8 for x in jax.tree.leaves(placed))
    return {**placed, "step": jax.device_put(np.int32(step), NamedSharding(mesh, PartitionSpec()))}


@pytest.fixture(scope="module")
def split_saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "split"
    with checkpoint.Checkpointer(run, checkpoint.Config(keep=9)) as saver:
        for step in (1, 2, 3, 4):
            saver.save(step, split_state(step), {"eval/loss": abs(step - 2) + 0.5}, wait=True)
    config = {"model": {"name": "of_another_tree"}, "checkpoint": {"best_metric": "eval/loss"}}
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture
def split_run(split_saved, tmp_path):
    return shutil.copytree(split_saved, tmp_path / "run")


@pytest.mark.slow
def test_what_eight_devices_saved_one_looks_into(split_run):
    run, folder = split_run, split_run / "checkpoints"
    lines = "".join(f"checkpoint {n}: files and arrays are what was saved\n" for n in (1, 2, 3, 4))
    assert alone("verify", run, "--arrays") == (0, lines)
    assert alone("pin", run, 1) == (0, "checkpoint 1 is pinned: it is kept until `unpin`\n")
    code, said = alone("list", run)
    rows = [line.split("MB  ") for line in said.splitlines()]
    assert code == 0 and [size.split()[0] for size, _ in rows] == ["1", "2", "3", "4"]
    assert [told for _, told in rows] == [
        "good; pinned  eval/loss 1.5", "good; best  eval/loss 0.5", "good  eval/loss 1.5",
        "good  eval/loss 2.5",
    ]  # fmt: skip

    code, said = alone("inspect", run)  # the last one
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:]}
    norm = np.sqrt(sum(n * n for n in range(64) if n != 37))
    assert code == 0 and rows == {
        "params.a": ["16x4", "float32", f"{norm:.4g}", "0", "63", "1"],
        "params.b": ["8", "bfloat16", f"{2 * 8**0.5:.4g}", "2", "2", "0"],
        "ema.a": ["4x16", "float32", "32", "4", "4", "0"],
        "ema.b": ["8", "bfloat16", f"{8**0.5:.4g}", "1", "1", "0"],
        "step": ["one", "int32", "4", "4", "4", "0"],
    }
    code, said = alone("diff", folder / "1", folder / "3")
    compared, *lines = said.splitlines()
    assert compared == f"{folder / '1'} and {folder / '3'}"
    assert code == 0 and sorted(lines) == [
        "1 of 5 arrays in both are the same, bit for bit",
        "ema.a: largest difference 2, 64 of 64 differ",
        "params.a: largest difference 2, 1 of 64 differ",
        "params.b: largest difference 1, 8 of 8 differ",
        "step: largest difference 2, 1 of 1 differ",
    ]


@pytest.mark.slow
def test_what_eight_devices_saved_one_exports_and_prunes(split_run, tmp_path):
    run, folder = split_run, split_run / "checkpoints"
    before, out = (run / "config.json").read_bytes(), tmp_path / "model.safetensors"
    assert alone("pin", run, 1)[0] == 0
    assert alone("export", run, "--step", 3, "--out", out)[0] == 0
    np.testing.assert_array_equal(load_file(out)["a"], np.full((4, 16), np.float32(3)))
    code, said = alone("export", run, "--part", "params", "--out", tmp_path / "p.safetensors")
    assert code == 0 and "2 arrays of params, step 4" in said
    found = load_file(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(found["a"], np.asarray(split_state(4)["params"]["a"]))
    assert found["b"].tolist() == [2.0] * 8

    prune = ("prune", run, "--keep", 1, "--keep_best", "eval/loss")
    assert alone(*prune, "--dry_run") == (0, "would be deleted: 3\nkept: 1, 2, 4\n")
    assert manifests.good_steps(folder) == [1, 2, 3, 4]
    assert alone(*prune) == (0, "deleted: 3\nkept: 1, 2, 4\n")
    assert manifests.good_steps(folder) == [1, 2, 4]
    assert alone("unpin", run, 1) == (0, "checkpoint 1 is not pinned any more\n")
    assert alone(*prune) == (0, "deleted: 1\nkept: 2, 4\n")
    name = damage(run, 4)
    code, said = alone("verify", run)
    assert code == 1 and name in said.splitlines()[1]
    assert said.splitlines()[0] == "checkpoint 2: files are what was saved"
    code, said = alone("inspect", run)
    assert code == 2 and said.startswith("error: ") and name in said
    assert (run / "config.json").read_bytes() == before


def test_verifying_nothing_is_a_mistake(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert typed("verify", tmp_path) == 2
    assert "no checkpoint there" in capsys.readouterr().err


def test_a_checkpoint_that_goes_while_it_is_pinned_is_not_said_to_be_kept(run, capsys, monkeypatch):
    step = manifests.good_steps(run / "checkpoints")[0]
    pin = tool.retention.pin

    def late(folder, number):
        shutil.rmtree(folder / str(number))
        pin(folder, number)

    monkeypatch.setattr(tool.retention, "pin", late)
    assert typed("pin", run, step) == 2
    assert "it is deleted just now" in capsys.readouterr().err
    assert not tool.retention.pinned(run / "checkpoints")


def test_list_goes_on_where_a_file_may_not_be_looked_at(run, capsys, monkeypatch):
    steps = manifests.all_steps(run / "checkpoints")
    real = Path.is_file

    def forbidden(path):
        if str(path).endswith(f"{steps[0]}/state/_METADATA"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "is_file", forbidden)
    tool.main(["list", str(run)])
    assert f"{steps[-1]:>9}" in capsys.readouterr().out
