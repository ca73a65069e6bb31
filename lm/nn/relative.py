"""Attention scores biased by relative position, as T5's: one learned number a head and bucket of distances.

"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", Raffel et al. 2019
(arXiv 1910.10683), section 2.1; relative positions: Shaw et al. 2018 (arXiv 1803.02155).

What differs: the table is read once for each distance, not for each pair, and each row of the bias is
the one before it moved by one; the gradient of the table then needs no scatter over all pairs. Each share
of the batch has a copy, so that its gradient is summed over distances before it is over devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm import sharding


def buckets(
    distances: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Return the bucket, int32, of each distance (key minus query, in positions).

    Half of the buckets (of a direction) hold one distance each; the others grow in size up to
    `max_distance`, and the last holds all beyond. Keys after the query have the upper half of the
    buckets where `bidirectional`, else they count as distance 0.
    """
    size = num_buckets // 2 if bidirectional else num_buckets
    exact = size // 2
    growth = np.arange(size - exact) / (size - exact)
    first = np.concatenate([np.arange(1, exact), exact * (max_distance / exact) ** growth])
    away = np.abs(distances) if bidirectional else np.maximum(-distances, 0)
    bucket = np.searchsorted(first, away, side="right")  # `first` of buckets 1, 2, ...
    return (bucket + size * (bidirectional & (distances > 0))).astype(np.int32)


class RelativeBias(nn.Module):
    """b[h, l, s] = bias[bucket(s - l), h]."""

    num_heads: int
    bidirectional: bool
    num_buckets: int
    max_distance: int
    kernel_init: Callable

    def setup(self):
        self.bias = self.param(
            "bias",
            nn.with_logical_partitioning(self.kernel_init, ("relpos", "heads")),
            (self.num_buckets, self.num_heads),
        )

    def __call__(self, length: int, *, num_rows: int) -> jax.Array:
        """Return float32 [N, H, L, L], of queries and keys at the same positions; N copies for B rows."""
        L, H, N, width = length, self.num_heads, sharding.row_shards(num_rows), 2 * length
        values_NHW = jnp.broadcast_to(self.by_distance(L)[None], (N, H, width))
        values_NHW = sharding.constrain(values_NHW, "act_batch", "act_heads", None)
        rows = jnp.broadcast_to(values_NHW[:, :, None], (N, H, L, width))
        flat = rows.reshape(N, H, L * width)[..., L - 1 :][..., : L * (width - 1)]
        bias_NHLL = flat.reshape(N, H, L, width - 1)[..., :L]
        return sharding.constrain(bias_NHLL, "act_batch", "act_heads", None, None)

    def by_distance(self, length: int) -> jax.Array:
        """Return float32 [H, 2 L], of distances from 1 - L on.

        One more than there are distances in a row: the rows of the flat array above then move by one.
        """
        return self._values(np.arange(1 - length, length + 1)).T

    def at(self, distances_BLS: jax.Array) -> jax.Array:
        """Return float32 [B, H, L, S] of distances that are known when it runs only."""
        reach = self.max_distance
        values_WH = self._values(np.arange(-reach, reach + 1))
        index_BLS = jnp.clip(distances_BLS, -reach, reach) + reach
        bias_BHLS = jnp.take(values_WH, index_BLS, axis=0).transpose(0, 3, 1, 2)
        return sharding.constrain(bias_BHLS, "act_batch", "act_heads", None, None)

    def _values(self, distances_W: np.ndarray) -> jax.Array:
        table = sharding.gather(self.bias, ("relpos", "heads"))
        index_W = buckets(
            distances_W, bidirectional=self.bidirectional,
            num_buckets=self.num_buckets, max_distance=self.max_distance,
        )  # fmt: skip
        return jnp.take(table, index_W, axis=0)
