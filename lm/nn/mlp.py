"""Feed-forward layers of a Transformer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding
from lm.nn.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,  # tanh form, as GPT-2
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),  # exact, as BERT
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # squared ReLU: So et al. 2021, arXiv 2109.08668
    "swiglu": jax.nn.silu,  # gated: Shazeer 2020, arXiv 2002.05202
    "geglu": jax.nn.gelu,  # gated, tanh form, as T5 v1.1
}
GATED = ("swiglu", "geglu")


class MLP(nn.Module):
    """y = act(x W_up) W_down, or gated y = (act(x W_gate) * (x W_up)) W_down."""

    mlp_dim: int
    activation: str
    dtype: jnp.dtype
    kernel_init: Callable
    out_init: Callable
    bias: bool = False
    matmul_dtype: str = ""

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Return [B, L, D]."""
        x_BLD = sharding.collect(x_BLD)
        D, F = x_BLD.shape[-1], self.mlp_dim
        act = ACTIVATIONS[self.activation]
        if self.activation in GATED:
            h = Linear(
                (D, 2, F),
                ("embed", "gate", "mlp"),
                self.dtype,
                self.kernel_init,
                bias=self.bias,
                matmul_dtype=self.matmul_dtype,
                name="up",
            )(x_BLD)
            h = sharding.constrain(h, "act_batch", "act_length", None, "act_mlp")
            h_BLF = act(h[:, :, 0]) * h[:, :, 1]
        else:
            h_BLF = Linear(
                (D, F),
                ("embed", "mlp"),
                self.dtype,
                self.kernel_init,
                bias=self.bias,
                matmul_dtype=self.matmul_dtype,
                name="up",
            )(x_BLD)
            h_BLF = act(sharding.constrain(h_BLF, "act_batch", "act_length", "act_mlp"))
        y_BLD = Linear(
            (F, D),
            ("mlp", "embed"),
            self.dtype,
            self.out_init,
            bias=self.bias,
            matmul_dtype=self.matmul_dtype,
            name="down",
        )(h_BLF)
        return sharding.spread(y_BLD)
