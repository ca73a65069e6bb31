"""Matrix products whose kernel keeps its full shape, so that every axis has a name."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding
from lm.nn import fp8

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
      matmul_dtype: of the product; "" = `dtype`, "fp8" = see `lm.nn.fp8`.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: jnp.dtype
    kernel_init: Callable
    num_inputs: int = 1
    bias: bool = False
    matmul_dtype: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, self.axes), self.shape
        )
        kernel = sharding.gather(kernel, self.axes, self.dtype)
        inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
        lead = x.shape[: x.ndim - self.num_inputs]
        x = x.astype(self.dtype).reshape(*lead, math.prod(inputs))
        multiply = fp8.product if fp8.check(self.matmul_dtype) else product
        y = multiply(x, kernel.reshape(math.prod(inputs), -1))
        y = y.reshape(*lead, *outputs)
        if self.bias:
            axes = self.axes[self.num_inputs :]
            bias = self.param(
                "bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), outputs
            )
            y = y + bias.reshape((1,) * len(lead) + outputs)  # in float32, and so is its gradient
        return y.astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, transposed: bool = False) -> jax.Array:
    """Return x[..., K] kernel[K, N], or kernel[N, K]^T where `transposed`, in the type of `x`.

    The kernel is rounded to that type, and its gradient is summed in its own, over rows and devices.

    Both of its gradients are products of what they are given, all rows as one axis. JAX's own rule makes
    the kernel's the transpose of (dy^T x), or contracts two axes, for which XLA on a CPU first
    transposes dy: a fifth of a small model's step.
    """
    kernel = kernel.astype(x.dtype)
    if x.size > x.shape[-1] or jax.default_backend() != "cpu":
        return x @ (kernel.T if transposed else kernel)
    # One row, as in decoding. XLA on a CPU reads a kernel in one thread; what is below it does in all.
    if transposed:
        return (kernel @ x.reshape(-1)).reshape(*x.shape[:-1], -1)
    num_parts = math.gcd(x.shape[-1], ROW_PARTS)
    parts_PKN = kernel.reshape(num_parts, -1, kernel.shape[-1])
    y_PN = jnp.einsum("pk,pkn->pn", x.reshape(num_parts, -1), parts_PKN)
    return sum(y_PN[1:], y_PN[0]).reshape(*x.shape[:-1], -1)


def _product_forward(x, kernel, transposed):
    # The kernel is kept as it was multiplied; an array of no elements keeps its type.
    return product(x, kernel, transposed), (x, kernel.astype(x.dtype), kernel[:0])


def _product_backward(transposed, operands, dy):
    x, kernel, typed = operands
    dx = dy @ (kernel if transposed else kernel.T)
    if sharding.length_parts() > 1:  # rows in one axis would be collected first: several split them
        leading = tuple(range(x.ndim - 1))
        dkernel = jnp.tensordot(x, dy, axes=(leading, leading), preferred_element_type=typed.dtype)
        return dx, dkernel.T if transposed else dkernel
    x_MK, dy_MN = (array.reshape(-1, array.shape[-1]) for array in (x, dy))
    left, right = (dy_MN, x_MK) if transposed else (x_MK, dy_MN)
    return dx, jnp.matmul(left.T, right, preferred_element_type=typed.dtype)


product.defvjp(_product_forward, _product_backward)


def einsum(formula: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return a product of `x` and a kernel in the type of `x`, as `product`: "ebd,edf->ebf" of E kernels."""
    return jnp.einsum(formula, x, kernel) if kernel.dtype == x.dtype else _mixed(formula, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(formula, x, kernel):
    return jnp.einsum(formula, x, kernel.astype(x.dtype))


def _mixed_backward(formula, operands, dy):
    x, kernel, typed = operands
    x_axes, kernel_axes, y_axes = formula.replace("->", ",").split(",")
    dx = jnp.einsum(f"{y_axes},{kernel_axes}->{x_axes}", dy, kernel)
    backward = f"{x_axes},{y_axes}->{kernel_axes}"
    return dx, jnp.einsum(backward, x, dy, preferred_element_type=typed.dtype)


_mixed.defvjp(
    lambda formula, x, kernel: (
        _mixed(formula, x, kernel),
        (x, kernel.astype(x.dtype), kernel[:0]),
    ),
    _mixed_backward,
)
