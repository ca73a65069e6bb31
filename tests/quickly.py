"""How a program is compiled that takes longer to compile than to run: hardly optimized, in one part, and run
by one thread a device: eight simulated devices are more threads than there are cores, and where all of XLA's
wait for each other none may be left for what they wait for."""

import os

from jaxlib.version import __version_info__ as jaxlib_version

OPTIONS = {
    "xla_backend_optimization_level": 0,  # XLA's default is 3
    "xla_cpu_parallel_codegen_split_count": 1,  # each part has a price
    "xla_cpu_multi_thread_eigen": False,
}
if jaxlib_version < (
    0,
    11,
):  # later ones have them always, and abort on a flag that they do not know
    OPTIONS["xla_cpu_use_fusion_emitters"] = False  # half of what compiling takes
FLAGS = " ".join(f"--{name}={value}".lower() for name, value in OPTIONS.items())


def of_processes() -> dict[str, str]:
    """Return variables of processes that tests start: all share their programs, however small these are."""
    folder = f"{os.environ['LM_CACHE_DIR']}/of_processes"
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
