"""Matrix products whose kernel keeps its full shape, so that every axis has a name."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding

ROW_PARTS = 16  # products that the product of one row is split into on a CPU


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the type of sums, norms and states: float32, or `dtype` where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nn.Module):
    """y[..., out] = x[..., in] @ kernel[in, out] (+ bias[out]), where `in` and `out` may be several axes.

    Attributes:
      shape: of the kernel, input axes first.
      axes: logical names of the kernel's axes.
      num_inputs: how many leading axes of the kernel are contracted with the last ones of `x`.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: jnp.dtype
    kernel_init: Callable
    num_inputs: int = 1
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, self.axes), self.shape
        )
        kernel = sharding.gather(kernel.astype(self.dtype), self.axes)
        inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
        lead = x.shape[: x.ndim - self.num_inputs]
        y = product(x.reshape(*lead, math.prod(inputs)), kernel.reshape(math.prod(inputs), -1))
        y = y.reshape(*lead, *outputs)
        if self.bias:
            axes = self.axes[self.num_inputs :]
            bias = self.param(
                "bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), outputs
            )
            y = y + bias.astype(self.dtype).reshape((1,) * len(lead) + outputs)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, transposed: bool = False) -> jax.Array:
    """Return x[..., K] kernel[K, N], or kernel[N, K]^T where `transposed`.

    Both of its gradients are products of what they are given, all rows as one axis. JAX's own rule makes
    the kernel's the transpose of (dy^T x), or contracts two axes, for which XLA on a CPU first
    transposes dy: a fifth of a small model's step.
    """
    if x.size > x.shape[-1] or jax.default_backend() != "cpu":
        return x @ (kernel.T if transposed else kernel)
    # One row, as in decoding. XLA on a CPU reads a kernel in one thread; what is below it does in all.
    if transposed:
        return (kernel @ x.reshape(-1)).reshape(*x.shape[:-1], -1)
    num_parts = math.gcd(x.shape[-1], ROW_PARTS)
    parts_PKN = kernel.reshape(num_parts, -1, kernel.shape[-1])
    y_PN = jnp.einsum("pk,pkn->pn", x.reshape(num_parts, -1), parts_PKN)
    return sum(y_PN[1:], y_PN[0]).reshape(*x.shape[:-1], -1)


def _product_backward(transposed, operands, dy):
    x, kernel = operands
    if sharding.length_parts() > 1:  # rows in one axis would be collected first: several split them
        leading = tuple(range(x.ndim - 1))
        dkernel = jnp.tensordot(x, dy, axes=(leading, leading))
        return (dy @ kernel, dkernel.T) if transposed else (dy @ kernel.T, dkernel)
    x_MK, dy_MN = (array.reshape(-1, array.shape[-1]) for array in (x, dy))
    if transposed:
        return dy @ kernel, dy_MN.T @ x_MK
    return dy @ kernel.T, x_MK.T @ dy_MN


product.defvjp(
    lambda x, kernel, transposed: (product(x, kernel, transposed), (x, kernel)), _product_backward
)
