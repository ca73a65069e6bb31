"""What the devices can do, and compiled programs kept between runs."""

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

_seen: dict[str, float] = {}  # most FLOP/s of a device in this process, by its kind
_timed_at = -math.inf  # when products were last timed, by time.monotonic
_multiply = jax.jit(jnp.matmul)


class _Checked:
    """Stands in for jax's file cache: an entry begins with the SHA-256 of the rest, which jax has none of.

    A bit that flips in a compressed program may make another program of it, which computes something else.
    """

    def __init__(self, cache: Any, folder: str):
        self._cache, self._path = cache, folder

    def get(self, key: str) -> bytes | None:
        entry = self._cache.get(key)
        if entry is None or hashlib.sha256(entry[32:]).digest() == entry[:32]:
            return entry and entry[32:]
        path = Path(self._path, f"{key}-cache")
        print(f"notice: {path}: damaged; compiling that program anew", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # where it stays, no other takes its place
            path.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        self._cache.put(key, hashlib.sha256(value).digest() + value)


def _check_programs() -> bool:
    """Let jax's cache of programs be `_Checked`; return whether it can be in this version."""
    try:
        from jax._src import compilation_cache, lru_cache
    except ImportError:
        return False
    files = getattr(lru_cache, "LRUCache", None)
    if files is None or not hasattr(compilation_cache, "LRUCache"):
        return False

    def checked(path: str, **options: Any) -> _Checked:
        return _Checked(files(path, **options), path)

    compilation_cache.LRUCache = checked  # type: ignore[assignment,misc]
    return True


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs between runs in `folder`, which only this user can read."""
    if jax.config.jax_compilation_cache_dir:
        return  # the user has chosen one
    if not _check_programs():
        why = f"jax {jax.__version__} has no place for their checksums"
        print(f"notice: compiled programs are not kept: {why}", file=sys.stderr)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        why = f"{error}; set LM_CACHE_DIR to a folder to write in"
        print(f"notice: compiled programs are not kept: {why}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def compute_dtype(name: str) -> jnp.dtype:
    """Return the type of computation: of that name, or for "" bfloat16 unless on a CPU."""
    return jnp.dtype(name or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def has_flash_attention() -> bool:
    """Return whether cuDNN's flash attention runs here: on NVIDIA GPUs from Ampere (8.0) on."""
    return _compute_capability() >= 8.0


def has_fp8() -> bool:
    """Return whether products of 8-bit numbers run here: on NVIDIA GPUs from Ada (8.9) on."""
    return _compute_capability() >= 8.9


def _compute_capability() -> float:
    """Return the compute capability of this process's first device; 0 where it is no GPU of NVIDIA's."""
    if jax.default_backend() != "gpu":
        return 0.0
    try:  # AMD's is a name
        return float(getattr(jax.local_devices()[0], "compute_capability", "0.0"))
    except ValueError:
        return 0.0


def data_sheet_flops() -> float | None:
    """Return the FLOP/s of one device by its data sheet; None where it has none here."""
    kind = jax.local_devices()[0].device_kind
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def peak_flops(achieved: float = 0.0) -> float:
    """Return the peak FLOP/s of one device: its data sheet's, else the most that was seen of it so far.

    That is of products, which are timed for a moment when first asked, and of programs: `achieved` is what
    one has reached just now. In a busy moment both are too low, so what is seen later may be more.
    """
    sheet = data_sheet_flops()
    if sheet is not None:
        return sheet
    kind = jax.local_devices()[0].device_kind
    if kind not in _seen:
        _seen[kind] = _measured()
    _seen[kind] = max(_seen[kind], achieved)
    return _seen[kind]


def utilisation(flops: float, *, surely: float) -> float:
    """Return the share of a device's peak that is reached at `flops` a second.

    Without a data sheet the peak is no less than `surely`, the least that it may have been, and the share at
    most 1: what is above it is an error of a short time.
    """
    share = flops / peak_flops(surely)
    return share if data_sheet_flops() is not None else min(share, 1.0)


def measure_again(seconds: float = 0.01, every: float = 10.0) -> None:
    """Time a few products more on a CPU, which others may have used before; while it is idle.

    Not within `every` seconds of the last time: a run that often pauses would wait for it each time.
    """
    global _timed_at
    late = time.monotonic() >= _timed_at + every
    if late and jax.default_backend() == "cpu" and data_sheet_flops() is None:
        peak_flops(_measured((512,), seconds=seconds))
        _timed_at = time.monotonic()


def _measured(sizes: Sequence[int] = (512, 1024, 2048), *, seconds: float = 0.2) -> float:
    """Return the FLOP/s of one device in the products that fit it; those of a CPU share its cores."""
    if jax.default_backend() == "cpu":
        return measure_matmul_flops(sizes, seconds=seconds) / jax.local_device_count()
    return measure_matmul_flops((8192,), seconds=seconds, dtype=jnp.bfloat16)


def measure_matmul_flops(
    sizes: Sequence[int],
    *,
    seconds: float,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> float:
    """Return the most FLOP/s of a matrix product [size, size], of many in turn over about `seconds`.

    The best: one that another program disturbs says nothing of the device. Sizes are multiples of 512.
    """
    block = np.random.default_rng(0).standard_normal((512, 512))
    matrices = [jnp.asarray(np.tile(block, (size // 512,) * 2), dtype) for size in sizes]
    for matrix in matrices:
        _multiply(matrix, matrix).block_until_ready()
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        for matrix in matrices:
            start = time.perf_counter()
            _multiply(matrix, matrix).block_until_ready()
            best = max(best, 2.0 * len(matrix) ** 3 / (time.perf_counter() - start))
    return best
