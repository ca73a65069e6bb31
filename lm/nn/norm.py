"""Normalisation over the last axis, in float32 whatever the input's type."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.nn.linear import wide


class Norm(nn.Module):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467), which never has a bias.

    layernorm: y = (x - mean) / sqrt(var + epsilon) * scale [+ bias]
    rmsnorm:   y = x / sqrt(mean(x^2) + epsilon) * scale
    """

    kind: str = "rmsnorm"
    bias: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x[..., D]; the result has the type of `x`."""
        width = x.shape[-1:]
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), width
        )
        y = x.astype(wide(x.dtype))
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        shape = (1,) * (x.ndim - 1) + width
        y = y * scale.reshape(shape)
        if self.bias and self.kind == "layernorm":
            bias = self.param(
                "bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), width
            )
            y = y + bias.reshape(shape)
        return y.astype(x.dtype)
