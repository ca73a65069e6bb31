"""Matrix products whose kernel keeps its full shape, so that every axis has a name."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding


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
        y = x.reshape(*lead, math.prod(inputs)) @ kernel.reshape(math.prod(inputs), -1)
        y = y.reshape(*lead, *outputs)
        if self.bias:
            axes = self.axes[self.num_inputs :]
            bias = self.param(
                "bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), outputs
            )
            y = y + bias.astype(self.dtype).reshape((1,) * len(lead) + outputs)
        return y
