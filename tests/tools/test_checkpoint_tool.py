"""What a user asks of checkpoints, as typed: in the same process, and in one that knows the folder alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lm import checkpoint, manifests
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


def test_list_is_a_line_a_checkpoint(run, capsys):
    assert typed("pin", run, 1) == 0
    damage(run, 3)
    capsys.readouterr()
    assert typed("list", run) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert "good; pinned" in first and "eval/loss 1.5" in first
    assert "good; best" in second
    assert "damaged: file" in third


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
    assert capsys.readouterr().out.startswith("5 of 5")


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


def test_a_process_that_knows_the_folder_alone(run, tmp_path):
    """One device, no config: and where there is a config that runs code, it is not run."""
    (run / "config.json").write_text(json.dumps({"model": {"name": "of_another_tree"}}))
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    told = subprocess.run(
        [sys.executable, "-m", "tools.checkpoint", "verify", str(run), "--arrays"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("files and arrays are what was saved") == 3


def test_verifying_nothing_is_a_mistake(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert typed("verify", tmp_path) == 2
    assert "no checkpoint there" in capsys.readouterr().err
