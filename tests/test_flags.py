"""The table of XLA's flags: its names are known, what the environment has stays, a run says what it set."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lm import flags, sharding
from lm.config import ConfigError

ROOT = Path(__file__).parent.parent


def names(platform, **sizes):
    found = flags.chosen(platform, sizes)
    return {flag.setting.partition("=")[0].removeprefix("--xla_") for flag in found}


def test_a_mesh_gets_the_flags_of_the_axes_that_split():
    assert names("gpu", data=1, fsdp=1) == set()
    assert "gpu_enable_pipelined_all_gather" in names("gpu", data=1, fsdp=-1)
    assert "gpu_enable_pipelined_all_gather" not in names("gpu", data=8, fsdp=1)
    assert "gpu_enable_latency_hiding_scheduler" in names("gpu", stage=2)
    assert "tpu_enable_async_all_to_all" in names("tpu", expert=2)
    assert names("cpu", **dict.fromkeys(sharding.ORDER, 2)) == set()
    for flag in flags.TABLE:
        assert {*flag.axes} <= {*sharding.ORDER} and flag.why


def test_what_the_environment_has_stays(monkeypatch):
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false"
    monkeypatch.setenv("XLA_FLAGS", mine)
    said = flags.set_flags("gpu", {"data": 8})
    assert os.environ["XLA_FLAGS"].split()[0] == mine
    assert os.environ["XLA_FLAGS"].count("latency_hiding_scheduler") == 1
    assert len(said) == 1 and "--xla_gpu_enable_pipelined_all_reduce=true  (" in said[0]
    assert flags.set_flags("gpu", {"data": 8}) == []  # a second time nothing is new


def test_none_and_others_instead(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    assert flags.set_flags("tpu", {"data": 8}, "") == []
    (line,) = flags.set_flags("tpu", {"data": 8}, "--xla_tpu_x=1")
    assert os.environ["LIBTPU_INIT_ARGS"] == flags.in_use().split()[-1] == "--xla_tpu_x=1"
    assert line == "LIBTPU_INIT_ARGS: --xla_tpu_x=1  (mesh.xla_flags)"
    with pytest.raises(ConfigError, match=r"mesh.xla_flags='x': use auto"):
        sharding.Config(xla_flags="x")


def ends(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )


USE = "import jax; jax.jit(lambda x: x + 1)(1.0)"


def test_the_installed_xla_knows_every_gpu_flag():
    """XLA ends a process that gives it a flag that it does not know."""
    every = " ".join(f.setting for f in flags.TABLE if f.platform == "gpu")
    known = ends(USE, XLA_FLAGS=every)
    assert known.returncode == 0, known.stderr
    unknown = ends(USE, XLA_FLAGS=f"{every} --xla_gpu_no_such_flag=true")
    assert unknown.returncode != 0 and "no_such_flag" in unknown.stderr


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_libtpu_knows_every_tpu_flag():
    folder = Path(importlib.util.find_spec("libtpu").submodule_search_locations[0])
    content = (folder / "libtpu.so").read_bytes()
    for flag in flags.TABLE:
        name = flag.setting.partition("=")[0].removeprefix("--")
        whole = re.search(rb"(?<![a-z0-9_])" + name.encode() + rb"(?![a-z0-9_])", content)
        assert flag.platform != "tpu" or whole, name


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("--xla_nonsense=1", "Unknown flag in XLA_FLAGS: --xla_nonsense=1"),
        ("--xla_cpu_enable_fast_math=maybe", "Couldn't interpret value maybe for flag xla_cpu_ena"),
        ("--xla_force_host_platform_device_count=abc", "Couldn't interpret value abc"),
        ("--xla_force_host_platform_device_count=0", "Unable to initialize backend 'cpu'"),
    ],
)
def test_what_xla_does_not_take_is_told_in_a_line(monkeypatch, asked, why):
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(ConfigError) as told:
        flags.set_flags("cpu", {"data": 8}, asked)
    assert f"mesh.xla_flags={asked!r}: XLA does not take it: {why}" in str(told.value)
    assert "\n" not in str(told.value) and os.environ["XLA_FLAGS"] == ""


def test_a_run_says_and_takes_what_it_is_given(tmp_path, text_file):
    """Simulated devices are counted when jax starts, so here it is known that the flag came in time."""
    command = [
        sys.executable, "-m", "lm.main", "--config", "experiments/gpt_tiny.py", "--dry_run",
        f"--config.data.path={text_file}", "--config.data.tokenizer=byte",
        "--config.mesh.xla_flags=--xla_force_host_platform_device_count=4", "--config.mesh.fsdp=4",
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("XLA_FLAGS: --xla_force_host_platform_device_count=4  (mesh.xla")
    assert "mesh: fsdp 4;" in done.stdout
