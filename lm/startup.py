"""What a process must settle before jax starts its threads; the standard library only."""

import ctypes
import importlib.util
import os
import sys

ACCELERATOR_PLUGINS = ("jax_plugins", "libtpu")


def prepare() -> bool:
    """Tell glibc to keep what a step frees for the next one; return whether it listened.

    On a CPU, XLA allocates the temporaries of every step anew, in threads of its own. By default each
    large block is then a mapping that the system gives out and zeroes page by page: a seventh of the
    time of a step. glibc fixes the number of arenas when the first thread asks for one, hence before
    jax: a program that has imported jax or numpy first can set MALLOC_ARENA_MAX=1,
    MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=17179869184 and MALLOC_TOP_PAD_=67108864 in its environment.
    """
    if sys.platform != "linux" or not _on_cpu():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    # From malloc.h: one arena, no mmap for large blocks, never trim the heap, grow it by 64 MiB.
    options = {-8: 1, -4: 0, -1: -1, -2: 64 * 2**20}
    accepted = [mallopt(option, value) for option, value in options.items()]
    return all(accepted)


def _on_cpu() -> bool:
    """Guess without jax: asked for, or no plug-in of an accelerator is installed."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    return asked == "cpu" or not any(map(importlib.util.find_spec, ACCELERATOR_PLUGINS))
