"""What the devices can do, and compiled programs kept between runs."""

import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

# Dense bf16 FLOP/s of one JAX device (of a TPU v3 and 7x half a chip), from the makers' data sheets;
# matched as a prefix, longest first.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
}


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs between runs in `folder`, which only this user can read."""
    if jax.config.jax_compilation_cache_dir:
        return  # the user has chosen one
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def compute_dtype(name: str) -> jnp.dtype:
    """Return the type of computation: of that name, or for "" bfloat16 unless on a CPU."""
    return jnp.dtype(name or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def has_flash_attention() -> bool:
    """Return whether cuDNN's flash attention runs here: on NVIDIA GPUs from Ampere (8.0) on."""
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", "0.0")
    return float(capability) >= 8.0


def peak_flops(measure: bool = True) -> float:
    """Return FLOP/s of one device: its data sheet's, else measured, else NaN."""
    kind = jax.local_devices()[0].device_kind
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    if known:
        return PEAK_FLOPS[max(known, key=len)]
    if not measure:
        return float("nan")
    if jax.default_backend() == "cpu":  # simulated devices share the cores
        return measure_matmul_flops() / jax.local_device_count()
    return measure_matmul_flops(8192, dtype=jnp.bfloat16)


@functools.cache
def measure_matmul_flops(
    size: int = 2048, repeats: int = 5, dtype: jax.typing.DTypeLike = jnp.float32
) -> float:
    """Return the FLOP/s of a matrix product [size, size], the best of `repeats`."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    multiply = jax.jit(jnp.matmul)
    multiply(a, b).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a, b).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / float(np.min(times))
