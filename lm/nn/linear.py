"""Matrix products whose kernel keeps its full shape, so that every axis has a name."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lm import collectives, sharding
from lm.nn import fp8

KEPT = "product"  # the name of what remat="dots" keeps
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
        x, eight_bits = x.astype(self.dtype), fp8.check(self.matmul_dtype)
        split = sharding.fsdp_axis(self.axes) is not None and x.ndim - self.num_inputs <= 2
        if split and not eight_bits:
            y = _shared_product(x, kernel, self.axes, self.num_inputs, sharding.other_axes())
        else:
            kernel = sharding.gather(kernel, self.axes, self.dtype)
            multiply = fp8.product if eight_bits else product
            y = _flat_product(x, kernel, self.num_inputs, multiply)
        y = checkpoint_name(y, KEPT)
        if self.bias:
            axes, outputs = self.axes[self.num_inputs :], self.shape[self.num_inputs :]
            bias = self.param(
                "bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), outputs
            )
            # In float32, and so is its gradient.
            y = y + bias.reshape((1,) * (y.ndim - len(outputs)) + outputs)
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
    y_PN = jnp.einsum(
        "pk,pkn->pn", x.reshape(num_parts, -1), parts_PKN, preferred_element_type=wide(x.dtype)
    )
    return sum(y_PN[1:], y_PN[0]).astype(x.dtype).reshape(*x.shape[:-1], -1)


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
    left, right = (dy, x) if transposed else (x, dy)
    return dx, _over_rows(left, right, typed.dtype)


def _over_rows(x: jax.Array, dy: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the sum over all rows of x[..., K] dy[..., N], [K, N]."""
    x_MK, dy_MN = (array.reshape(-1, array.shape[-1]) for array in (x, dy))
    return jnp.matmul(x_MK.T, dy_MN, preferred_element_type=dtype)


product.defvjp(_product_forward, _product_backward)


def _flat_product(
    x: jax.Array, kernel: jax.Array, num_inputs: int, multiply: Callable = product
) -> jax.Array:
    """Return the product over the last `num_inputs` axes of `x` and the first ones of `kernel`."""
    inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
    lead = x.shape[: x.ndim - num_inputs]
    y = multiply(x.reshape(*lead, math.prod(inputs)), kernel.reshape(math.prod(inputs), -1))
    return y.reshape(*lead, *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shared_product(
    x, kernel, axes: tuple[str, ...], num_inputs: int, outside: frozenset[str]
) -> jax.Array:
    """`_flat_product` of a kernel of `axes` that fsdp splits: gathered for use, and again for its gradients.

    Of the kernel's gradient each device sums its own part over fsdp (a reduce-scatter), then that part alone
    over the devices with slower links. The partitioner by itself sums the whole over all devices.
    """
    return _flat_product(x, sharding.gather(kernel, axes, x.dtype), num_inputs)


def _shared_backward(axes, num_inputs, outside, operands, dy):
    x, kernel = operands
    at, num_rows = sharding.fsdp_axis(axes), x.ndim - num_inputs
    assert at is not None

    def flat(array):
        return array.reshape(*array.shape[:num_rows], -1)

    def local(x, dy):
        whole = _over_rows(flat(x), flat(dy), kernel.dtype)
        whole = whole.reshape(*x.shape[num_rows:], *dy.shape[num_rows:])
        part = collectives.reduce_scatter(whole, axes[at], at)
        return collectives.all_reduce(part, "act_batch", "act_length", but=axes[at])

    rows = ("act_batch", "act_length")[:num_rows]
    names = [None if place == at else name for place, name in enumerate(axes)]
    operand_axes = [(*rows, *names[:num_inputs]), (*rows, *names[num_inputs:])]
    with sharding.mapped_over(
        outside
    ):  # this is traced later than the function, outside of its own
        dkernel = collectives.on_shards(local, operand_axes, axes)(x, dy)
    kernel = sharding.gather(kernel, axes, x.dtype).astype(x.dtype)
    dx = flat(dy) @ kernel.reshape(math.prod(kernel.shape[:num_inputs]), -1).T
    return dx.reshape(x.shape), dkernel


_shared_product.defvjp(
    lambda x, kernel, *how: (_shared_product(x, kernel, *how), (x, kernel)), _shared_backward
)


def einsum(formula: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return a product of `x` and a kernel in the type of `x`, as `product`: "ebd,edf->ebf" of E kernels."""
    multiply = jnp.einsum if kernel.dtype == x.dtype else _mixed
    return checkpoint_name(multiply(formula, x, kernel), KEPT)


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
