"""How the loop uses its devices: state donated, metrics read one step late, batches placed meanwhile."""

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lm import experiment, hardware, log, placement, train

ROOT = Path(__file__).parent.parent


@pytest.fixture
def happened(monkeypatch):
    """Return a list that gets (what, step) of a run's batches, steps, and reads of their metrics."""
    found: list = []
    of_sums: dict[int, int] = {}
    jitted, place, get = experiment.jitted, placement.place_batch, jax.device_get

    def all_jitted(made):
        init, train_step, *rest = jitted(made)

        def stepped(state, batch):
            after, sums = train_step(state, batch)
            number = sum(what == "step" for what, _ in found)
            of_sums[id(sums["loss"][0])] = number
            held.append(sums)  # or another array could have its number
            large = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 8]
            assert large and all(leaf.is_deleted() for leaf in large), "the state is not donated"
            found.append(("step", number))
            return after, sums

        return init, stepped, *rest

    def placed(*args):
        found.append(("batch", sum(what == "batch" for what, _ in found)))
        return place(*args)

    def read(tree):
        for leaf in jax.tree.leaves(tree):
            if id(leaf) in of_sums:
                found.append(("read", of_sums[id(leaf)]))
        return get(tree)

    held: list = []
    monkeypatch.setattr(experiment, "jitted", all_jitted)
    monkeypatch.setattr(train.placement, "place_batch", placed)
    monkeypatch.setattr(log.jax, "device_get", read)
    return found


def test_a_steps_metrics_are_read_when_the_next_is_on_its_way(tiny, tmp_path, happened):
    config = tiny(eval__every_steps=0, checkpoint__every_steps=0, train__fingerprint_every_steps=0)
    train.run(config, tmp_path)
    expected = [("batch", 0), ("step", 0)]
    for number in range(1, 6):
        expected += [("batch", number), ("step", number), ("read", number - 1)]
    evaluated = [event for event in happened if event[0] == "batch" and event[1] > 5]
    assert evaluated and [event for event in happened if event not in evaluated] == [
        *expected,
        ("read", 5),
    ]


@pytest.mark.slow
def test_programs_are_kept_where_only_the_user_reads(tiny, tmp_path):
    """In a process of its own, as a user's: nothing but the cache's place is set."""
    config = tmp_path / "experiment.py"
    fields = tiny(train__num_steps=2).to_dict()
    config.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({fields!r})\n"
    )
    environment = {**os.environ, "LM_CACHE_DIR": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        environment.pop(name, None)
    words = [sys.executable, "-m", "lm.main", "--config", str(config), "--workdir"]
    without = "--config.train.compilation_cache=False"
    for name, more, kept in (
        ("without", [without], False),
        ("run", ["--config.model.num_layers=5"], True),
    ):
        run = subprocess.run(
            [*words, str(tmp_path / name), *more],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        assert (tmp_path / "cache" / "programs").exists() == kept
    folder = tmp_path / "cache" / "programs"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert any(folder.iterdir())


@pytest.fixture
def no_cache():
    """No cache of compiled programs has been chosen; the tests' own is again afterwards."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()


def flipped(entry):
    """Flip one bit in the middle."""
    at = len(entry) * 2 // 3
    return entry[:at] + bytes([entry[at] ^ 8]) + entry[at + 1 :]


@pytest.mark.parametrize(
    "damaged", [flipped, lambda entry: entry[:-100], lambda entry: entry[:9], lambda entry: b""]
)
def test_a_damaged_program_is_compiled_anew_and_replaced(no_cache, tmp_path, capsys, damaged):
    """jax's entries have no checksum: one flipped bit may be another program."""
    hardware.use_compilation_cache(tmp_path / "programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    x = jnp.arange(64.0).reshape(8, 8) / 99

    def computed():
        return np.asarray(jax.jit(lambda x: jnp.tanh(x @ x) + jnp.cumsum(x, 0))(x))

    expected = computed()
    (path,) = tmp_path.glob("programs/jit__lambda*-cache")
    whole = path.read_bytes()
    path.write_bytes(damaged(whole))
    for words in (f"notice: {path}: damaged", ""):
        np.testing.assert_array_equal(computed(), expected)
        said = capsys.readouterr().err
        assert said.startswith(words) if words else not said
        assert hashlib.sha256(path.read_bytes()[32:]).digest() == path.read_bytes()[:32]


def test_a_jax_that_has_no_place_for_checksums_keeps_nothing(
    no_cache, tmp_path, capsys, monkeypatch
):
    monkeypatch.delattr("jax._src.compilation_cache.LRUCache")
    hardware.use_compilation_cache(tmp_path / "programs")
    assert jax.config.jax_compilation_cache_dir is None
    said = capsys.readouterr().err
    assert said.startswith("notice: compiled programs are not kept: jax ")
    assert said.count("\n") == 1


def test_a_cache_that_cannot_be_written_is_said(no_cache, tmp_path, capsys):
    """A run trains without it, and the line says which variable names another."""
    (tmp_path / "file").touch()
    hardware.use_compilation_cache(tmp_path / "file" / "programs")
    assert jax.config.jax_compilation_cache_dir is None
    said = capsys.readouterr().err
    assert "programs are not kept" in said and "set LM_CACHE_DIR" in said and said.count("\n") == 1
