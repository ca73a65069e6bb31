"""What is settled before jax starts, in real processes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lm import startup

FAULTS = """
import resource, sys
from lm import startup
prepared = "prepare" in sys.argv and startup.prepare()
assert "jax" not in sys.modules and "numpy" not in sys.modules
import jax, jax.numpy as jnp
x = jnp.ones((64, 2**18))
keep = jax.lax.optimization_barrier
f = jax.jit(lambda x: keep(jnp.exp(x)).sum() + keep(jnp.exp(x[::-1])).sum())
assert f.lower(x).compile().memory_analysis().temp_size_in_bytes >= 2**26
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(prepared, min(faults() for _ in range(8)))
"""


def run(*arguments, script=FAULTS):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_step_reuses_the_memory_of_the_one_before():
    """128 MiB of temporaries are 32,768 pages; glibc by itself keeps blocks of up to 32 MiB."""
    prepared, faults = run("prepare")
    assert prepared == "True" and int(faults) < 100
    assert int(run()[1]) > 10_000, "the system's default does it too: delete lm/startup.py"


def test_an_installed_accelerator_is_left_alone(monkeypatch):
    monkeypatch.setattr(startup, "PLUGINS", {"json": "gpu"})
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert startup.platform() == "gpu" and startup.prepare() is False
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert startup.platform() == "gpu"


HUGE = """
import re, sys
from lm import startup
if "prepare" in sys.argv:
    assert startup.prepare()
import jax, jax.numpy as jnp
jnp.ones(2**26).block_until_ready()
print(re.search(r"AnonHugePages: +(\\d+) kB", open("/proc/self/smaps_rollup").read())[1])
"""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not THP.exists() or "[madvise]" not in THP.read_text(), reason="of this kernel's setting"
)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_large_arrays_lie_in_huge_pages():
    """An array of 256 MiB, where the system gives such pages to those that ask."""
    assert int(run("prepare", script=HUGE)[0]) > 200 * 1024 > int(run(script=HUGE)[0])
