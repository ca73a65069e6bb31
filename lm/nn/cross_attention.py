"""Attention of a decoder to a source, of which decoding keeps the keys and values.

Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.3. What differs: of several documents in a row each
sees the source of its own segment only; one kernel [D, H, 2, K] makes keys and values.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding
from lm.config import ConfigError
from lm.nn import context
from lm.nn.attention import attend, segment_mask
from lm.nn.context import Pairs
from lm.nn.linear import Linear

NO_SOURCE = (
    "batch: no source in it, which an encoder-decoder reads first; give source, source_segments and "
    "source_positions, as task.name='seq2seq' does, or, to generate, sources"
)


class CrossAttention(nn.Module):
    """Attention to a source, of one layer.

    Attributes:
      scale: of the scores; 0 = 1 / sqrt(head_dim).
      context_parallel: how keys reach queries where rows are split: see `lm.nn.context.choose_way`.
    """

    num_heads: int
    head_dim: int
    dtype: jnp.dtype
    query_init: Callable
    kernel_init: Callable
    out_init: Callable
    bias: bool = False
    scale: float = 0.0
    context_parallel: str = ""
    matmul_dtype: str = ""

    @nn.compact
    def __call__(
        self, x_BLD, *, segments_BL, source_BSD, source_segments_BS, decode: bool = False
    ) -> jax.Array:
        """Return [B, L, D].

        Args:
          source_BSD: features of the source; None in decoding: what the cache has from the prompt.
          source_segments_BS: int32, with them; 0 is never seen.
        """
        x_BLD = sharding.collect(x_BLD)
        H, K, D = self.num_heads, self.head_dim, x_BLD.shape[-1]
        query = Linear(
            (D, H, K), ("embed", "heads", "kv"), self.dtype, self.query_init,
            bias=self.bias, matmul_dtype=self.matmul_dtype, name="query",
        )(x_BLD)  # fmt: skip
        query = sharding.constrain(query, "act_batch", "act_length", "act_heads", None)
        if source_BSD is None:
            key, value, source_segments_BS = self._remembered()
        else:
            key, value = self._keys_and_values(source_BSD)
            if decode:
                self._remember(key, value, source_segments_BS)
        query, mask = (
            query.swapaxes(1, 2)[:, :, None],
            segment_mask(segments_BL, source_segments_BS),
        )
        if isinstance(mask, Pairs):
            out = context.attend(
                query, key, value, mask, scale=self.scale, way=self.context_parallel
            )
        else:
            out = attend(query, key, value, mask, scale=self.scale)
        y_BLD = Linear(
            (H, K, D), ("heads", "kv", "embed"), self.dtype, self.out_init,
            num_inputs=2, bias=self.bias, matmul_dtype=self.matmul_dtype, name="out",
        )(out[:, :, 0].swapaxes(1, 2))  # fmt: skip
        return sharding.spread(y_BLD)

    def _keys_and_values(self, source_BSD) -> tuple[jax.Array, jax.Array]:
        """Return the source's keys and values, [B, H, S, K]."""
        shape = (source_BSD.shape[-1], self.num_heads, 2, self.head_dim)
        axes = ("embed", "heads", "qkv", "kv")
        linear = Linear(
            shape, axes, self.dtype, self.kernel_init,
            bias=self.bias, matmul_dtype=self.matmul_dtype, name="key_value",
        )  # fmt: skip
        both = linear(source_BSD)
        both = sharding.constrain(both, "act_batch", "act_length", "act_heads", None, None)
        return both[:, :, :, 0].swapaxes(1, 2), both[:, :, :, 1].swapaxes(1, 2)

    def _remember(self, key, value, source_segments_BS) -> None:
        heads = ("act_batch", "act_heads", None, None)
        for name, array, axes in (
            ("key", key, heads),
            ("value", value, heads),
            ("segments", source_segments_BS, ("act_batch", None)),
        ):
            boxed = nn.with_logical_partitioning(lambda array=array: array, axes)
            self.variable("cache", name, boxed).value = array

    def _remembered(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        if not self.has_variable("cache", "key"):
            raise ConfigError(NO_SOURCE)
        key, value, segments = (
            self.variable("cache", name, jnp.zeros, ()).value
            for name in ("key", "value", "segments")
        )
        return key, value, segments
