"""A gated linear recurrence: matrix products inside a chunk, a scan between chunks, a state of fixed size.

"Transformers are SSMs", Dao and Gu 2024 (Mamba-2, arXiv 2405.21060); the chunked form and the norm before
the output gate: "Gated Linear Attention Transformers", Yang et al. 2023 (2312.06635).

For each head, with a decay a and a step size d that are functions of the token:

    S_t = a_t S_{t-1} + d_t k_t v_t^T        y_t = q_t S_t
    d_t = softplus(x_t W_d + b)              a_t = exp(-exp(c) d_t)

What differs from Mamba-2: each head has queries and keys of its own; a decay is never below exp(-20); the
convolution has no bias; y has no direct part D v; the output gate follows the norm, which is one head's;
a document begins from an empty state, exactly, wherever in a chunk that is.

Sizes here: M chunks of C positions, K key width, P value width, W width of the convolution.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding
from lm.nn.linear import Linear, wide
from lm.nn.norm import Norm

# Of one token. What is below it leaves nothing (2e-9), and would cost the sums over a chunk their last bits.
MIN_LOG_DECAY = -20.0
# Mamba-2's ranges at the start, of d (its logarithm evenly spread over the heads) and of exp(c).
STEP_SIZES, DECAY_RATES = (1e-3, 1e-1), (1.0, 16.0)


def recur(
    query_BHLK: jax.Array,
    key_BHLK: jax.Array,
    value_BHLP: jax.Array,
    log_decay_BHL: jax.Array,
    state_BHKP: jax.Array,
    *,
    fresh_BL: jax.Array,
    valid_BL: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Run S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t over the length.

    Args:
      log_decay_BHL: at most 0, of float32 or wider.
      state_BHKP: S to start from, of float32 or wider.
      fresh_BL: positions that start from S = 0, bool.
      valid_BL: positions that change the state, bool; elsewhere it is held.
      chunk: positions whose y are made by products of all with all; any gives the same but for
        rounding, which grows with it (a decay within a chunk is a difference of sums).

    Returns:
      y [B, H, L, P] and the last S, in the type of `state`.
    """
    L, state_dtype = query_BHLK.shape[2], state_BHKP.dtype
    C = min(chunk, L)
    query, key, value = (_cut(x, C, axis=2) for x in (query_BHLK, key_BHLK, value_BHLP))
    valid_B1MC = _cut(valid_BL, C, axis=1)[:, None]
    key = jnp.where(valid_B1MC[..., None], key, 0)
    log_decay_BHMC = jnp.where(valid_B1MC, _cut(log_decay_BHL, C, axis=2), 0)
    # Documents of a chunk, counted from the one that came in.
    document_B1MC = jnp.cumsum(_cut(fresh_BL, C, axis=1)[:, None] & valid_B1MC, axis=-1)
    same_B1MCC = document_B1MC[..., :, None] == document_B1MC[..., None, :]
    same_B1MCC &= jnp.tril(jnp.ones((C, C), bool))[None, None, None]
    came_in, goes_out = document_B1MC == 0, document_B1MC == document_B1MC[..., -1:]

    # Sums since the document's or the chunk's begin, by a product with the mask: of what is masked, not even
    # the rounding of a sum depends on it.
    total_BHMC = jnp.einsum(
        "bmts,bhms->bhmt", same_B1MCC[:, 0].astype(state_dtype), log_decay_BHMC, precision="highest"
    )
    from_start = jnp.where(came_in, jnp.exp(total_BHMC), 0)
    to_end = _exp_where(goes_out, total_BHMC[..., -1:] - total_BHMC)
    decay_BHMCC = _exp_where(same_B1MCC, total_BHMC[..., :, None] - total_BHMC[..., None, :])

    scores = _product("bhmtk,bhmsk->bhmts", query, key, state_dtype) * decay_BHMCC
    within = _product("bhmts,bhmsp->bhmtp", scores.astype(value.dtype), value, state_dtype)
    kept_key = (key * to_end[..., None]).astype(key.dtype)
    added_MBHKP = _product("bhmsk,bhmsp->mbhkp", kept_key, value, state_dtype)

    def step(state, inputs):
        decay_BH, added_BHKP = inputs
        return decay_BH[..., None, None] * state + added_BHKP, state

    decays_MBH = jnp.moveaxis(from_start[..., -1], 2, 0)
    last, entering_MBHKP = jax.lax.scan(step, state_BHKP, (decays_MBH, added_MBHKP))
    seeing = (query * from_start[..., None]).astype(query.dtype)
    before = _product("bhmtk,mbhkp->bhmtp", seeing, entering_MBHKP.astype(query.dtype), state_dtype)
    y_BHMCP = within + before
    return y_BHMCP.reshape(*y_BHMCP.shape[:2], -1, y_BHMCP.shape[-1])[:, :, :L], last


def _cut(x: jax.Array, size: int, *, axis: int) -> jax.Array:
    """Split an axis into [M, size], padded on the right with zeros."""
    pad = [(0, -x.shape[axis] % size if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pad).reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _exp_where(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Return exp(x) where `mask`, else 0; x may be anything there, without harm to the gradient."""
    return jnp.where(mask, jnp.exp(jnp.where(mask, x, 0)), 0)


def _product(axes: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=dtype)


def _memory(module: nn.Module, collection: str, name: str, zeros: jax.Array, axes: tuple):
    """Return what a module remembers under `name`, and the function that replaces it.

    It is `zeros` without the collection, and replaced only where the collection is mutable.
    """
    mutable = module.is_mutable_collection(collection)
    if not (mutable or module.has_variable(collection, name)):
        return zeros, lambda value: None
    init = nn.with_logical_partitioning(lambda: zeros, axes)
    variable = module.variable(collection, name, init)

    def replace(value):
        if mutable and not module.is_initializing():
            variable.value = sharding.constrain(value, *axes)

    return variable.value, replace


class Convolution(nn.Module):
    """y_t = sum_i w_i x_{t-i}, channel by channel, over the W newest tokens of the document.

    The W - 1 last inputs are remembered as `tail`, in the type of `x`.
    """

    width: int

    @nn.compact
    def __call__(self, x_BLHK, *, valid_BL, positions_BL, memory: str, fresh: bool) -> jax.Array:
        """Return [B, L, H, K]; padding is on the right."""
        W, (B, L, H, K) = self.width, x_BLHK.shape
        kernel_WHK = self.param(
            "kernel",
            nn.with_logical_partitioning(self._init, ("position", "heads", "kv")),
            (W, H, K),
        )
        zeros, axes = (
            jnp.zeros((B, W - 1, H, K), x_BLHK.dtype),
            ("act_batch", None, "act_heads", None),
        )
        tail, replace = _memory(self, memory, "tail", zeros, axes)
        x_BLHK = jnp.concatenate([zeros if fresh else tail, x_BLHK], axis=1)
        newest = valid_BL.sum(axis=1)[:, None] + jnp.arange(W - 1)[None]
        replace(jnp.take_along_axis(x_BLHK, newest[:, :, None, None], axis=1))
        parts = []
        for i in range(W):
            seen = (positions_BL >= i)[:, :, None, None]
            x_i = jax.lax.slice_in_dim(x_BLHK, W - 1 - i, W - 1 - i + L, axis=1)
            parts.append(jnp.where(seen, x_i, 0) * kernel_WHK[i][None, None])
        return sum(parts[1:], parts[0]).astype(x_BLHK.dtype)  # summed in float32, and its gradient

    def _init(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        limit = self.width**-0.5
        return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


class LinearRecurrence(nn.Module):
    """q, k, v = silu(convolution(x W)); y as above; out = (norm(y) * silu(x W_gate)) W_out.

    The state S [B, H, K, P], float32, and the convolution's tail live in the collection that `memory` names.
    They are read where the collection is given and written where it is mutable; `init` leaves zeros.
    Without the collection every row starts from zeros.
    """

    num_heads: int
    key_dim: int
    head_dim: int
    conv_width: int
    chunk: int
    dtype: jnp.dtype
    kernel_init: Callable
    out_init: Callable
    matmul_dtype: str = ""

    @nn.compact
    def __call__(
        self, x_BLD, *, segments_BL, positions_BL, memory: str, fresh: bool = False
    ) -> jax.Array:
        """Return [B, L, D]; position 0 empties the state and padding (segment 0) holds it.

        Args:
          memory: collection of the state, "carry" (across windows) or "cache" (decoding).
          fresh: start from zeros whatever the memory holds, and only write it.
        """
        x_BLD = sharding.collect(x_BLD)
        H, K, P, D = self.num_heads, self.key_dim, self.head_dim, x_BLD.shape[-1]
        valid_BL = segments_BL > 0
        query_key = self._project(x_BLD, "query_key", K)
        value_gate = self._project(x_BLD, "value_gate", P)
        gate_BLHP = value_gate[:, :, :, 1]
        inputs = [query_key[:, :, :, 0], query_key[:, :, :, 1], value_gate[:, :, :, 0]]
        inputs_BLHK = jnp.concatenate(inputs, axis=-1)
        if self.conv_width > 1:
            inputs_BLHK = Convolution(self.conv_width, name="convolution")(
                inputs_BLHK,
                valid_BL=valid_BL,
                positions_BL=positions_BL,
                memory=memory,
                fresh=fresh,
            )
        # Heads before length: the batched products then need no transposed copies.
        inputs_BHLK = jax.nn.silu(inputs_BLHK).swapaxes(1, 2)
        query, key, value = jnp.split(inputs_BHLK, [K, 2 * K], axis=-1)
        step_size_BHL, log_decay_BHL = self._decay(x_BLD)
        value = (value * step_size_BHL[..., None]).astype(self.dtype)

        state_dtype = log_decay_BHL.dtype
        zeros = jnp.zeros((len(x_BLD), H, K, P), state_dtype)
        axes = ("act_batch", "act_heads", None, None)
        state, replace = _memory(self, memory, "state", zeros, axes)
        y_BHLP, last = recur(
            query, key, value, log_decay_BHL, sharding.constrain(zeros if fresh else state, *axes),
            fresh_BL=valid_BL & (positions_BL == 0), valid_BL=valid_BL, chunk=self.chunk,
        )  # fmt: skip
        replace(last)
        y_BHLP = Norm(name="norm")(y_BHLP).astype(self.dtype)
        y_BLHP = y_BHLP.swapaxes(1, 2) * jax.nn.silu(gate_BLHP)
        y_BLD = Linear(
            (H, P, D), ("heads", "kv", "embed"), self.dtype, self.out_init,
            num_inputs=2, matmul_dtype=self.matmul_dtype, name="out",
        )(y_BLHP)  # fmt: skip
        return sharding.spread(y_BLD)

    def _project(self, x_BLD: jax.Array, name: str, width: int) -> jax.Array:
        """Return two projections at once: [B, L, H, 2, width]."""
        shape, axes = (x_BLD.shape[-1], self.num_heads, 2, width), ("embed", "heads", "qkv", "kv")
        y = Linear(
            shape, axes, self.dtype, self.kernel_init, matmul_dtype=self.matmul_dtype, name=name
        )(x_BLD)
        return sharding.constrain(y, "act_batch", "act_length", "act_heads", None, None)

    def _decay(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return d and log a [B, H, L], float32 or wider."""
        H, state_dtype = self.num_heads, wide(self.dtype)
        shape, axes = (x_BLD.shape[-1], H), ("embed", "heads")
        step_BLH = Linear(shape, axes, self.dtype, self.kernel_init, name="step")(x_BLD)
        step_BHL = sharding.constrain(step_BLH, "act_batch", "act_length", "act_heads").swapaxes(
            1, 2
        )
        bias_H, scale_H = (
            self.param(name, nn.with_logical_partitioning(init, ("heads",)), (H,)).astype(
                state_dtype
            )
            for name, init in (("step_bias", _step_bias), ("decay_scale", _decay_scale))
        )
        size_BHL = jax.nn.softplus(step_BHL.astype(state_dtype) + bias_H[None, :, None])
        return size_BHL, jnp.maximum(-jnp.exp(scale_H)[None, :, None] * size_BHL, MIN_LOG_DECAY)


def _step_bias(key: jax.Array, shape: tuple[int]) -> jax.Array:
    """Return b, such that softplus(b) is spread over STEP_SIZES."""
    return jnp.log(jnp.expm1(jnp.geomspace(*STEP_SIZES, *shape)))


def _decay_scale(key: jax.Array, shape: tuple[int]) -> jax.Array:
    """Return c, such that exp(c) is spread over DECAY_RATES."""
    return jnp.log(jnp.linspace(*DECAY_RATES, *shape))
