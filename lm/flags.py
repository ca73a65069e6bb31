"""XLA's flags for accelerators: which each way of splitting a mesh sets, and why, in one table.

They are set before jax looks for devices, and said when a run starts. A flag that stands in the environment
(`XLA_FLAGS`, of TPUs `LIBTPU_INIT_ARGS`) is left as it is there; `mesh.xla_flags=""` sets none, and other
flags in it are set in place of the table's, on a CPU too, of which the table has none. They change no result
but for the order of sums.

Sources: the pages on flags of jax and JAX-Toolbox, the launch scripts of MaxText. That their names are known
is tested on the installed jaxlib, and on libtpu where it is there. Nothing of it is measured yet.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

from lm.config import ConfigError

AUTO = "auto"
TPU_VARIABLE, VARIABLE = "LIBTPU_INIT_ARGS", "XLA_FLAGS"


class Flag(NamedTuple):
    """A flag of a platform, for meshes in which any of `axes` splits something."""

    platform: str
    axes: tuple[str, ...]
    setting: str
    why: str


ANY = ("dcn", "stage", "data", "fsdp", "context", "tensor", "expert")
GATHERED = ("fsdp", "tensor", "context")
TABLE = (
    Flag("gpu", ANY, "--xla_gpu_enable_latency_hiding_scheduler=true",
         "products run while collectives do"),
    Flag("gpu", ("fsdp",), "--xla_gpu_enable_pipelined_all_gather=true",
         "a scanned layer's parameters are gathered while the one before computes"),
    Flag("gpu", ("fsdp",), "--xla_gpu_enable_pipelined_reduce_scatter=true",
         "and its gradients summed while the next one computes"),
    Flag("gpu", ("fsdp",), "--xla_gpu_enable_while_loop_double_buffering=true",
         "without a copy between two layers"),
    Flag("gpu", ("data", "dcn"), "--xla_gpu_enable_pipelined_all_reduce=true",
         "gradients of a part of the batch are summed while the next part computes"),
    Flag("gpu", ("stage",), "--xla_gpu_enable_pipelined_p2p=true",
         "a stage computes while it passes on what it has made"),
    Flag("tpu", ("data", "dcn"), "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
         "gradients are summed while earlier layers compute theirs"),
    Flag("tpu", ("data", "dcn"), "--xla_tpu_data_parallel_opt_different_sized_ops=true",
         "also those of different sizes"),
    Flag("tpu", GATHERED, "--xla_enable_async_all_gather=true",
         "parameters, keys and values are gathered beside products"),
    Flag("tpu", GATHERED, "--xla_tpu_enable_async_collective_fusion=true",
         "inside one kernel with a product"),
    Flag("tpu", GATHERED, "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
         "gathering among them"),
    Flag("tpu", GATHERED, "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
         "or over several products"),
    Flag("tpu", GATHERED, "--xla_tpu_overlap_compute_collective_tc=true",
         "on the same core"),
    Flag("tpu", ("stage", "context"), "--xla_enable_async_collective_permute=true",
         "parts of a batch, keys and values are passed on beside products"),
    Flag("tpu", ("expert",), "--xla_tpu_enable_async_all_to_all=true",
         "tokens travel to experts beside products"),
)  # fmt: skip


def chosen(platform: str, sizes: Mapping[str, int], asked: str = AUTO) -> list[Flag]:
    """Return the flags of a mesh of `sizes` (-1 = the rest, which may split), or those `asked` for."""
    if asked != AUTO:
        return [Flag(platform, (), setting, "mesh.xla_flags") for setting in asked.split()]
    splits = {axis for axis, size in sizes.items() if size != 1}
    return [flag for flag in TABLE if flag.platform == platform and splits & {*flag.axes}]


def set_flags(platform: str, sizes: Mapping[str, int], asked: str = AUTO) -> list[str]:
    """Set the flags of a mesh in the environment; return what there is to say of each. Before jax starts.

    Raises ConfigError where XLA does not know those that are asked for (of TPUs, libtpu says so later).
    """
    if asked not in (AUTO, "") and platform != "tpu":
        _check(asked)
    variable = TPU_VARIABLE if platform == "tpu" else VARIABLE
    present = os.environ.get(variable, "").split()
    names = {setting.partition("=")[0] for setting in present}
    new = [f for f in chosen(platform, sizes, asked) if f.setting.partition("=")[0] not in names]
    if new:
        os.environ[variable] = " ".join([*present, *(flag.setting for flag in new)])
    return [f"{variable}: {flag.setting}  ({flag.why})" for flag in new]


def _check(asked: str) -> None:
    """Try flags in a process of their own: XLA ends one that it is given a wrong flag in."""
    tried = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, VARIABLE: asked, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if tried.returncode:
        said = re.findall(
            r"^(?:[EF]\d.*?\] |RuntimeError: )(.+)", tried.stderr, re.MULTILINE
        )  # the first says what, others where
        why = said[0] if said else f"a process with it ends with {tried.returncode}"
        raise ConfigError(f"mesh.xla_flags={asked!r}: XLA does not take it: {why.rstrip('.')}")


def in_use() -> str:
    """Return all flags of the environment, in their order."""
    return " ".join(filter(None, (os.environ.get(name) for name in (VARIABLE, TPU_VARIABLE))))
