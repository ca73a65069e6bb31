"""Self-attention with grouped queries, rotary or relative positions, windows and a cache.

Vaswani et al. 2017 (arXiv 1706.03762); grouped queries: Ainslie et al. 2023 (arXiv 2305.13245);
rotary positions: `lm.nn.rotary`; query-key normalisation: Henry et al. 2020 (arXiv 2010.04245), with
RMSNorm.

What differs: one kernel [D, G, H/G + 2, K] holds, for each of G key-value heads, its queries, its key
and its value, so that a device of the tensor axis holds whole groups.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding
from lm.nn import context
from lm.nn.context import MASKED_SCORE, Pairs
from lm.nn.linear import Linear, wide
from lm.nn.norm import Norm
from lm.nn.rotary import Rotary, rotate

BLOCK, MAX_BLOCKS = 128, 4  # queries at least, and blocks at most, that attend by themselves
Blocks = tuple[tuple[int, int, int], ...]  # first query, end of the queries, keys seen
Plan = tuple[Blocks, float]  # the blocks, and the scale of the scores


def causal_mask(
    length: int, *, window: int = 0, segments_BL: jax.Array | None = None, decode: bool = False
) -> jax.Array | Pairs:
    """Return bool [1 or B, L, L]: which key (last axis) a query may see; `Pairs` where rows are split.

    Args:
      window: how many positions a query sees, itself included; 0 = all before it.
      segments_BL: when given, only keys of the query's own segment are seen.
      decode: the row is a prompt, which is never split.
    """
    if sharding.splits_rows(length) and not decode:
        return Pairs(segments_BL, segments_BL, causal=True, window=window)
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None]
    mask = key <= query
    if window:
        mask &= query - key < window
    mask = mask[None]
    if segments_BL is not None:
        mask &= segments_BL[:, :, None] == segments_BL[:, None, :]
    return mask


def segment_mask(segments_BL: jax.Array, source_segments_BS: jax.Array) -> jax.Array | Pairs:
    """Return bool [B, L, S]: a query sees the keys of its own segment, and padding (0) none.

    Where rows are split it is `Pairs`, of which padding sees padding: nothing sees what it becomes.
    """
    if sharding.splits_rows(segments_BL.shape[1]):
        return Pairs(segments_BL, source_segments_BS)
    mask = segments_BL[:, :, None] == source_segments_BS[:, None, :]
    return mask & (source_segments_BS > 0)[:, None, :]


def attend(query, key, value, mask, *, score_bias=None, scale: float = 0.0) -> jax.Array:
    """Return softmax(scale query key^T + score_bias) value, the softmax in float32.

    Args:
      query: [B, G, R, L, K], R query heads for each of G key-value heads.
      key, value: [B, G, S, K].
      mask: bool [1 or B, L, S].
      score_bias: float32 [N, G, R, L, S], each for the next B / N rows, or None.
      scale: of the scores; 0 = 1 / sqrt(K).

    Returns:
      [B, G, R, L, K].
    """
    plan = ((0, query.shape[3], key.shape[2]),), scale or query.shape[-1] ** -0.5
    return _attend(plan, query, key, value, mask, score_bias)


def causal_attend(query, key, value, mask, *, score_bias=None, scale: float = 0.0) -> jax.Array:
    """Compute `attend` for a mask that lets no query see a later key: those keys are left out.

    Blocks of queries attend to the keys up to their end, so that of n blocks (n - 1) / 2n of the
    work is saved.
    """
    length = query.shape[3]
    num_blocks = min(MAX_BLOCKS, length // BLOCK) or 1
    ends = [length * (block + 1) // num_blocks for block in range(num_blocks)]
    blocks = zip([0, *ends[:-1]], ends, ends, strict=True)
    plan = tuple(blocks), scale or query.shape[-1] ** -0.5
    return _attend(plan, query, key, value, mask, score_bias)


# The gradient by hand, as FlashAttention's (arXiv 2205.14135): the softmax is divided after its product
# with the values, and the row sums of its gradient come from the output, so that of what is as large as
# the scores only their exponentials are kept, and each pass over them does all that it can.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, query, key, value, mask, score_bias) -> jax.Array:
    return _attend_forward(plan, query, key, value, mask, score_bias)[0]


def _attend_forward(plan: Plan, query, key, value, mask, score_bias):
    blocks, scale = plan
    outs, kept = [], []
    for start, end, seen in blocks:
        query_BGQK = _queries(query, start, end, scale)
        scores = jnp.einsum(
            "bgqk,bgsk->bgqs",
            query_BGQK,
            key[:, :, :seen],
            preferred_element_type=wide(value.dtype),
        )
        if score_bias is not None:
            bias = score_bias[:, :, :, start:end, :seen]
            bias = bias.reshape(len(bias), 1, *scores.shape[1:])
            apart = scores.reshape(len(bias), -1, *scores.shape[1:])
            scores = (apart + bias).reshape(scores.shape)
        scores = jnp.where(_seen(mask, query, start, end, seen), scores, MASKED_SCORE)
        exp_BGQS = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        sum_BGQ1 = exp_BGQS.sum(axis=-1, keepdims=True)
        exp_BGQS = exp_BGQS.astype(value.dtype)
        out_BGQK = jnp.einsum(
            "bgqs,bgsk->bgqk",
            exp_BGQS,
            value[:, :, :seen],
            preferred_element_type=wide(value.dtype),
        )
        outs.append((out_BGQK / sum_BGQ1).astype(value.dtype))
        kept.append((exp_BGQS, sum_BGQ1))
    return _join(outs, query), (query, key, value, mask, score_bias, outs, kept)


def _attend_backward(plan: Plan, residuals, dout):
    blocks, scale = plan
    query, key, value, mask, score_bias, outs, kept = residuals
    dqueries, dkeys, dvalues, dbiases = [], [], [], []
    for (start, end, seen), out_BGQK, (exp_BGQS, sum_BGQ1) in zip(blocks, outs, kept, strict=True):
        query_BGQK = _queries(query, start, end, scale)
        dout_BGQK = dout[:, :, :, start:end].reshape(out_BGQK.shape) / sum_BGQ1
        inner_BGQ1 = (dout_BGQK * out_BGQK).sum(axis=-1, keepdims=True)
        dout_BGQK = dout_BGQK.astype(value.dtype)
        dexp_BGQS = jnp.einsum(
            "bgqk,bgsk->bgqs",
            dout_BGQK,
            value[:, :, :seen],
            preferred_element_type=wide(value.dtype),
        )
        dscores = exp_BGQS * (dexp_BGQS - inner_BGQ1)
        dscores = jnp.where(_seen(mask, query, start, end, seen), dscores, 0)
        if score_bias is not None:
            apart = dscores.reshape(len(score_bias), -1, *dscores.shape[1:])
            dbias = apart.sum(axis=1).reshape(*score_bias.shape[:3], end - start, seen)
            dbiases.append(jnp.pad(dbias, (*((0, 0),) * 4, (0, key.shape[2] - seen))))
        dscores = dscores.astype(key.dtype)
        dquery_BGQK = jnp.einsum("bgqs,bgsk->bgqk", dscores, key[:, :, :seen])
        dqueries.append(dquery_BGQK * scale)
        rest = ((0, 0), (0, 0), (0, 0), (0, key.shape[2] - seen))
        # Widths before queries: on a CPU both products are then twice as fast.
        dkeys.append(jnp.pad(_transposed(query_BGQK) @ dscores, rest))
        dvalues.append(jnp.pad(_transposed(dout_BGQK) @ exp_BGQS, rest))
    dkey, dvalue = (functools.reduce(jnp.add, parts).swapaxes(2, 3) for parts in (dkeys, dvalues))
    dbias = jnp.concatenate(dbiases, axis=3) if dbiases else None
    return _join(dqueries, query), dkey, dvalue, None, dbias


_attend.defvjp(_attend_forward, _attend_backward)


def _queries(query, start: int, end: int, scale: float) -> jax.Array:
    """Return a block of scaled queries, the heads of a group in one axis with them: [B, G, Q, K].

    The products are then plain batched ones, which XLA does not transpose for.
    """
    B, G, R, _, K = query.shape
    return (query[:, :, :, start:end] * scale).reshape(B, G, R * (end - start), K)


def _seen(mask, query, start: int, end: int, seen: int) -> jax.Array:
    """Return the mask [1 or B, 1, Q, S] of a block."""
    return jnp.tile(mask[:, start:end, :seen], (1, query.shape[2], 1))[:, None]


def _join(blocks_BGQK: list[jax.Array], query) -> jax.Array:
    """Undo the cut into blocks: [B, G, R, L, K]."""
    B, G, R, _, K = query.shape
    return jnp.concatenate([block.reshape(B, G, R, -1, K) for block in blocks_BGQK], axis=3)


def _transposed(x_BGQK: jax.Array) -> jax.Array:
    """Return [B, G, K, Q], in memory: XLA would otherwise take it back into the product."""
    return jax.lax.optimization_barrier(x_BGQK.swapaxes(2, 3))


def flash_attend(query, key, value, *, window: int) -> jax.Array:
    """Compute `attend` under a causal mask by cuDNN's fused kernel (bf16 or fp16 on a GPU)."""
    B, G, R, L, K = query.shape
    out_BLHK = jax.nn.dot_product_attention(
        query.reshape(B, G * R, L, K).swapaxes(1, 2),
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    return out_BLHK.swapaxes(1, 2).reshape(B, G, R, L, K)


class Attention(nn.Module):
    """Self-attention of one layer.

    Attributes:
      rotary: rotary positions; None = none.
      window: positions a query sees; 0 = all before it.
      causal: no query sees a later key, whatever the mask; else the mask alone says.
      qk_norm_epsilon: of the RMS norms of queries and keys; 0 = they are not normalised.
      scale: of the scores; 0 = 1 / sqrt(head_dim).
      kernel: "xla" (any mask) or "cudnn" (causal only, on a GPU).
      context_parallel: how keys reach queries where rows are split: see `lm.nn.context.choose_way`.
      decode_length: slots of the cache.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    kernel_init: Callable
    out_init: Callable
    rotary: Rotary | None = None
    qk_norm_epsilon: float = 0.0
    bias: bool = False
    window: int = 0
    causal: bool = True
    scale: float = 0.0
    kernel: str = "xla"
    context_parallel: str = ""
    matmul_dtype: str = ""
    decode_length: int = 0

    @nn.compact
    def __call__(
        self, x_BLD, *, mask, positions_BL, score_bias_NHLS=None, decode: bool = False
    ) -> jax.Array:
        """Return [B, L, D].

        Args:
          mask: bool [1 or B, L, L], unused by a decoding step of one token; `Pairs` where rows are split.
          score_bias_NHLS: float32 [N, H, L, L], each added to the scores of the next B / N rows; in a
            decoding step of one token [N, H, 1, decode_length]; with `Pairs` [H, 2 L], one for each
            distance, as `lm.nn.context.attend` takes them.
        """
        x_BLD = sharding.collect(x_BLD)
        G, K, D = self.num_kv_heads, self.head_dim, x_BLD.shape[-1]
        R = self.num_heads // G
        qkv = Linear(
            (D, G, R + 2, K), ("embed", "heads", "qkv", "kv"), self.dtype, self.kernel_init,
            bias=self.bias, matmul_dtype=self.matmul_dtype, name="qkv",
        )(x_BLD)  # fmt: skip
        qkv = sharding.constrain(qkv, "act_batch", "act_length", "act_heads", None, None)
        # Heads before length: the batched products then need no transposed copies.
        query, key, value = jnp.split(qkv, [R, R + 1], axis=3)
        query = query.transpose(0, 2, 3, 1, 4)
        key, value = key[:, :, :, 0].swapaxes(1, 2), value[:, :, :, 0].swapaxes(1, 2)
        if epsilon := self.qk_norm_epsilon:
            query, key = (
                Norm(epsilon=epsilon, name=f"{name}_norm")(array)
                for name, array in (("query", query), ("key", key))
            )
        if self.rotary:
            waves = self.rotary.waves(positions_BL, K)
            B, L = positions_BL.shape
            query = rotate(query.reshape(B, G * R, L, K), waves).reshape(query.shape)
            key = rotate(key, waves)
        if decode:
            key, value, mask = self._cached(key, value, mask, positions_BL)
        if score_bias_NHLS is not None and not isinstance(mask, Pairs):
            N, _, *pairs = score_bias_NHLS.shape
            score_bias_NHLS = score_bias_NHLS.reshape(N, G, R, *pairs)
        if isinstance(mask, Pairs):
            out = context.attend(
                query, key, value, mask, values_HW=score_bias_NHLS, scale=self.scale,
                way=self.context_parallel,
            )  # fmt: skip
        elif self.kernel == "cudnn" and not decode:
            assert self.causal and score_bias_NHLS is None and not self.scale
            out = flash_attend(query, key, value, window=self.window)
        else:
            step = decode and x_BLD.shape[1] == 1
            function = causal_attend if self.causal and not step else attend
            out = function(query, key, value, mask, score_bias=score_bias_NHLS, scale=self.scale)
        out_BLGRK = out.transpose(0, 3, 1, 2, 4)
        out_BLHK = out_BLGRK.reshape(*x_BLD.shape[:2], G * R, K)
        y_BLD = Linear(
            (G * R, K, D), ("heads", "kv", "embed"), self.dtype, self.out_init,
            num_inputs=2, bias=self.bias, matmul_dtype=self.matmul_dtype, name="out",
        )(out_BLHK)  # fmt: skip
        return sharding.spread(y_BLD)

    def _cached(self, key, value, mask, positions_BL):
        """Write keys and values [B, G, L, K] to the cache; return what the queries attend to.

        A slot is a position. A prompt is written at slot 0 on; a later token at its row's position,
        over the padding that a shorter prompt left there.
        """
        B, G, L, K = key.shape
        shape = (B, G, self.decode_length, K)
        axes = ("act_batch", "act_heads", None, None)

        def zeros():
            return nn.with_logical_partitioning(jnp.zeros, axes)(shape, self.dtype)

        cached_key, cached_value = (
            self.variable("cache", "key", zeros),
            self.variable("cache", "value", zeros),
        )
        if L > 1:
            start = (0, 0, 0, 0)
            cached_key.value = jax.lax.dynamic_update_slice(
                jnp.zeros_like(cached_key.value), key, start
            )
            cached_value.value = jax.lax.dynamic_update_slice(
                jnp.zeros_like(cached_value.value), value, start
            )
            return key, value, mask
        slots = positions_BL[:, 0]

        def write(cache_GSK, new_G1K, slot):
            return jax.lax.dynamic_update_slice(cache_GSK, new_G1K, (0, slot, 0))

        # Behind the barrier each cache is written in place once, not for each of its readers.
        cached_key.value, cached_value.value = jax.lax.optimization_barrier(
            (
                jax.vmap(write)(cached_key.value, key, slots),
                jax.vmap(write)(cached_value.value, value, slots),
            )
        )
        keys = jnp.arange(self.decode_length)[None, None]
        mask = keys <= positions_BL[:, :, None]
        if self.window:
            mask &= positions_BL[:, :, None] - keys < self.window
        return cached_key.value, cached_value.value, mask
