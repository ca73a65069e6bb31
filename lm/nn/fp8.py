"""Matrix products of 8 bits: e4m3 forward, e5m2 for what comes back, each tensor with a scale of its own.

"FP8 Formats for Deep Learning", Micikevicius et al. 2022 (arXiv 2209.05433). The rounding is Flax's
(`flax.linen.fp8_ops`). What differs from Flax's layers: a scale is made of the tensor that it scales, not of
the largest numbers of steps before ("current", not "delayed" scaling). So there is no state: nothing to keep,
to carry through scans and stages, or to agree on between parts of a batch; and a number that grows is never
cut off. It costs a reading of each tensor before it is rounded. And scales are powers of two, so scaling is
exact in any type, and parts of a batch, each with a scale of its own, round alike.

A scale belongs to a whole tensor, of all rows: a row of very large numbers takes small ones of others to 0.
"""

import jax
import jax.numpy as jnp
from flax.linen import fp8_ops

from lm import hardware
from lm.config import ConfigError

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
LEAST = -60  # exponent of a scale: the product of two is a number still
DTYPES = ("", "fp8")  # of products: as the computation, or this


def check(matmul_dtype: str) -> bool:
    """Return whether products are to be of 8 bits. Raises ConfigError where the device does not have them."""
    if matmul_dtype and not hardware.has_fp8():
        device = jax.local_devices()[0]
        capability = getattr(device, "compute_capability", "none")
        raise ConfigError(
            f"model.matmul_dtype={matmul_dtype!r}: needs an NVIDIA GPU of compute capability 8.9 or more, "
            f"and this is {device.device_kind} ({capability}); use ''"
        )
    return bool(matmul_dtype)


def rounded(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Return (x / scale as `dtype`, scale), where the largest number is half of what the type has, or more.

    Where a number is not finite the scale is not a number, and so is all that is made of it. A tensor with no
    number above 2^-70 may be taken to 0.
    """
    # As integers, of which what is no number is the largest: of numbers XLA on a CPU may leave it out.
    bits = jax.lax.bitcast_convert_type(jnp.abs(x).astype(jnp.float32), jnp.uint32)
    largest = jax.lax.bitcast_convert_type(bits.max(), jnp.float32)
    _, exponent = jnp.frexp(largest / float(jnp.finfo(dtype).max))  # of 0 it is 0
    scale = jnp.ldexp(jnp.float32(1.0), jnp.maximum(exponent, LEAST))
    scale = jnp.where(jnp.isfinite(largest), scale, jnp.nan)
    return fp8_ops.quantize(x, dtype, scale, x.dtype), scale


def _dot(a: jax.Array, b: jax.Array, axes: tuple, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the product of 8-bit numbers over `axes` of the two, times `scale`, in `dtype`."""
    y = jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype)
    return fp8_ops.dequantize(y, dtype, scale)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x[..., K] kernel[K, N] in the type of `x`; the kernel's gradient has the kernel's own type."""
    return _forward(x, kernel)[0]


def _forward(x, kernel):
    (x_8, x_scale), (kernel_8, kernel_scale) = (
        rounded(x, FORWARD),
        rounded(kernel.astype(x.dtype), FORWARD),
    )
    last = ((x.ndim - 1,), (0,))
    y = _dot(x_8, kernel_8, last, x_scale * kernel_scale, x.dtype)
    return y, (x_8, x_scale, kernel_8, kernel_scale, kernel[:0])


def _backward(operands, dy):
    x_8, x_scale, kernel_8, kernel_scale, typed = operands
    dy_8, dy_scale = rounded(dy, BACKWARD)
    rows = tuple(range(dy.ndim - 1))
    dx = _dot(dy_8, kernel_8, ((dy.ndim - 1,), (1,)), dy_scale * kernel_scale, dy.dtype)
    return dx, _dot(x_8, dy_8, (rows, rows), x_scale * dy_scale, typed.dtype)


product.defvjp(_forward, _backward)
