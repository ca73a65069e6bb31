"""Token embeddings, and the head that turns features into logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding
from lm.nn.linear import product, wide

LANES = 128  # vocabularies are padded to a multiple of it: matrix units and meshes divide it
MASKED_LOGIT = -1e9  # finite, so that 0 * MASKED_LOGIT is 0


def pad_vocab(vocab_size: int) -> int:
    """Return `vocab_size` rounded up to a multiple of 128."""
    return -(-vocab_size // LANES) * LANES


class Embed(nn.Module):
    """A table [V, D] of token vectors; `attend` makes the tied head of Press and Wolf (arXiv 1608.05859)."""

    vocab_size: int
    model_dim: int
    dtype: jnp.dtype
    kernel_init: Callable

    def setup(self):
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(self.kernel_init, ("vocab", "embed")),
            (pad_vocab(self.vocab_size), self.model_dim),
        )

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        """Return the vectors [B, L, D] of `tokens_BL`."""
        table_VD = sharding.gather(self.embedding, ("vocab", "embed"), self.dtype)
        x_BLD = jnp.take(table_VD, tokens_BL, axis=0).astype(self.dtype)
        return sharding.constrain(x_BLD, "act_batch", "act_length", "act_embed")

    def attend(self, x_BLD: jax.Array) -> jax.Array:
        """Return float32 logits [B, L, V] of features against the table itself, padding included."""
        table_VD = sharding.gather(self.embedding, ("vocab", "embed"), self.dtype)
        return _float32_product(x_BLD.astype(self.dtype), table_VD, transposed=True)


class Head(nn.Module):
    """An untied head: float32 logits [B, L, V] = x[B, L, D] @ kernel[D, V], padding included."""

    vocab_size: int
    model_dim: int
    dtype: jnp.dtype
    kernel_init: Callable

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        kernel_DV = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, ("embed", "vocab")),
            (self.model_dim, pad_vocab(self.vocab_size)),
        )
        kernel_DV = sharding.gather(kernel_DV, ("embed", "vocab"), self.dtype)
        return _float32_product(x_BLD.astype(self.dtype), kernel_DV)


def _float32_product(x_BLD: jax.Array, kernel: jax.Array, transposed: bool = False) -> jax.Array:
    """Return x kernel, or x kernel^T, of x's type, summed and given in float32 whatever that is."""
    if x_BLD.dtype == wide(x_BLD.dtype):
        return product(x_BLD, kernel, transposed)
    axes, kernel = "vd" if transposed else "dv", kernel.astype(x_BLD.dtype)
    return jnp.einsum(f"bld,{axes}->blv", x_BLD, kernel, preferred_element_type=jnp.float32)


def finish_logits(logits_BLV: jax.Array, vocab_size: int, softcap: float = 0.0) -> jax.Array:
    """Return the logits soft-capped (0 = not), with those of the padded vocabulary out of reach."""
    logits_BLV = sharding.constrain(logits_BLV, "act_batch", "act_length", "act_vocab")
    if softcap:
        logits_BLV = softcap * jnp.tanh(logits_BLV / softcap)
    if logits_BLV.shape[-1] == vocab_size:
        return logits_BLV
    real_11V = (jnp.arange(logits_BLV.shape[-1]) < vocab_size)[None, None]
    return jnp.where(real_11V, logits_BLV, MASKED_LOGIT)
