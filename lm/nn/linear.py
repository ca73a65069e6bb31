"""Matrix products whose kernel keeps its full shape, so that every axis has a name."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding

ROW_PARTS = 16  # products that a vector's product is split into on a CPU


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


@jax.custom_vjp
def product(x: jax.Array, kernel_KN: jax.Array) -> jax.Array:
    """Return x[..., K] kernel[K, N].

    Both of its gradients are products of what they are given. JAX's own rule makes the kernel's the
    transpose of (dy^T x), for which XLA on a CPU first transposes dy: a fifth of a small model's step.
    """
    return _forward(x, kernel_KN)


def _forward(x, kernel_KN):
    if x.size > x.shape[-1] or jax.default_backend() != "cpu":
        return x @ kernel_KN
    # One row, as in decoding: XLA on a CPU reads the kernel in one thread, a batch of products in all.
    num_parts = math.gcd(x.shape[-1], ROW_PARTS)
    x_PK = x.reshape(num_parts, -1)
    kernel_PKN = kernel_KN.reshape(num_parts, -1, kernel_KN.shape[-1])
    y_PN = jnp.einsum("pk,pkn->pn", x_PK, kernel_PKN)
    return sum(y_PN[1:], y_PN[0]).reshape(*x.shape[:-1], -1)


def _product_backward(operands, dy):
    x, kernel_KN = operands
    x_MK, dy_MN = (array.reshape(-1, array.shape[-1]) for array in (x, dy))
    return dy @ kernel_KN.T, x_MK.T @ dy_MN


product.defvjp(lambda x, kernel: (_forward(x, kernel), (x, kernel)), _product_backward)
