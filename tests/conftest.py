"""Eight simulated devices, strict rank promotion, and caches that do not touch the user's."""

import gc
import os
import re
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "")
if "host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += (
        " --xla_force_host_platform_device_count=8"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
    )
os.environ.setdefault("LM_CACHE_DIR", tempfile.mkdtemp(prefix="lm-test-cache-"))

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

import itertools
import json
import threading
import types
from pathlib import Path

import ml_dtypes  # noqa: F401  numpy then knows the fixtures' bfloat16
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors import safe_open

from tests import quickly

_torn_down = itertools.count(1)  # tests of this process
pytest.register_assert_rewrite("tests.killing")
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "the",
    "dog",
    "ran",
    "to",
    "the",
    "far",
    "red",
    "house",
    "by",
    "the",
    "sea",
    "while",
]


def pytest_configure(config):
    """Compile once for all tests, and quickly: `-m optimized`, `-m measure` and users take XLA's default."""
    from lm import hardware

    chosen = "optimization_level" in os.environ["XLA_FLAGS"]
    if not chosen and not re.search("(?<!not )(optimized|measure)", config.option.markexpr):
        os.environ["XLA_FLAGS"] += f" {quickly.FLAGS}"
    hardware.use_compilation_cache(Path(os.environ["LM_CACHE_DIR"]) / "programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_collection_modifyitems(items):
    """Begin with what takes minutes by itself, beside which the other worker does the rest."""
    long = (
        "test_every_model_has_its_row",
        "test_any_exper",
        "test_processes_have_the_bits",
        "test_families_give_the_same_bits",
        "test_kills_at_random_times",
    )
    items.sort(key=lambda item: not item.name.startswith(long))


def pytest_collection_finish(session):
    """Look for garbage less often: modules and tests are none, and tracing makes little."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 10)


def pytest_runtest_teardown():
    """Forget compiled programs before they are too many: Linux lets a process map memory 65,530 times."""
    maps = Path("/proc/self/maps")  # which takes as long to read as a small test does
    due = next(_torn_down) % 20 == 0 and maps.exists()
    if due and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def without_thread(monkeypatch):
    """Return a function that lets the first thread not start whose work has this in its name."""

    def fail(work):
        real, fails = threading.Thread.start, itertools.chain([True], itertools.repeat(False))

        def start(self):
            if work in repr(self._target) and next(fails):
                raise RuntimeError("can't start new thread")
            real(self)

        monkeypatch.setattr(threading.Thread, "start", start)

    return fail


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text of 30,000 characters, English enough to learn from."""
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, 8)) + "." for _ in range(800)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(lines)[:30_000])
    return path


@pytest.fixture(scope="session")
def parity():
    """Return a function from the name of a fixture (see `tools.make_fixtures`) to what its file holds.

    It has `architecture`, `config`, and by name the numpy arrays `weight` (float32), `input`, `output` and
    `gradient`.
    """

    def read(name: str) -> types.SimpleNamespace:
        groups: dict = {kind: {} for kind in ("weight", "input", "output", "gradient")}
        with safe_open(Path(__file__).parent / "fixtures" / f"{name}.safetensors", "np") as file:
            about = json.loads(file.metadata()["fixture"])
            for key in file.keys():  # noqa: SIM118  it is no dictionary
                kind, _, name = key.partition(":")
                array = file.get_tensor(key)
                groups[kind][name] = array.astype(np.float32) if kind == "weight" else array
        return types.SimpleNamespace(**about, **groups)

    return read


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty before and after."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture(scope="session")
def tiny(text_file):
    """Return a function from overrides to the config of a run that takes seconds."""

    def make(**overrides) -> ConfigDict:
        config = ConfigDict({
            "data": {"path": (str(text_file),), "tokenizer": "byte", "batch_size": 8},
            "task": {"length": 16},
            "model": {"name": "gpt", "num_layers": 1, "model_dim": 32, "num_heads": 2},
            "optim": {"name": "adamw", "peak_lr": 1e-2, "warmup": 2},
            "train": {
                "num_steps": 6, "log_every_steps": 1, "sample_tokens": 0,
                "fingerprint_every_steps": 0, "recordings": 0,  # more programs to compile
            },
            "eval": {"every_steps": 3, "max_tokens": 512},
            "checkpoint": {"every_steps": 2, "keep": 3},
            "seed": 0,
        }, type_safe=False)  # fmt: skip
        for name, value in overrides.items():
            section, _, field = name.partition("__")
            if field:
                config[section][field] = value
            else:
                config[section] = value
        return config

    return make


@pytest.fixture
def poison(monkeypatch):
    """Return a function that makes the batches of `steps` bad for as long as the test runs."""

    def make(*steps, row=3, change=lambda weights: weights * np.nan):
        from lm.data import pipeline

        original = pipeline.Batches.__getitem__

        def batch(self, number):
            found = original(self, number)
            if number in steps:
                found["weights"] = found["weights"].copy()
                found["weights"][row] = change(found["weights"][row])
            return found

        monkeypatch.setattr(pipeline.Batches, "__getitem__", batch)

    return make
