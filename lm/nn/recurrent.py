"""Recurrent layers: Elman, GRU and LSTM, with a gradient made for long sequences.

Elman 1990, "Finding structure in time"; GRU: Cho et al. 2014 (arXiv 1406.1078); LSTM: Hochreiter and
Schmidhuber 1997 with the forget gate of Gers et al. 2000, its bias 1 (Jozefowicz et al. 2015);
dropout between layers only: Zaremba et al. 2014 (arXiv 1409.2329).

What differs: the input's product is taken for all positions before the loop. The gradient is
written by hand: the forward loop keeps pre-activations and states, the reverse loop propagates
through one recurrent product, and the recurrent kernel's gradient is one product after it.
Inside, arrays are features-first, [L, K, H, B] with the batch last (D and H widths, G gates, K
pre-activations): the recurrent product then reads its kernel row by row, 1.2x per CPU step.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding

State = tuple[jax.Array, ...]  # h first; each [H, B] inside the loop, [B, H] outside


class Cell(NamedTuple):
    """A step from pre-activations and state to state.

    The input's G gates are added to the first G of K pre-activations, the recurrent ones to the
    last G: they overlap fully unless a cell keeps some of the two apart, as the GRU does.
    """

    num_gates: int  # G, of either kernel
    num_slots: int  # K >= G
    num_states: int
    update: Callable[[jax.Array, State], State]  # (pre-activations [K, H, B], state) -> state


def _slots(pre_KHB: jax.Array) -> list[jax.Array]:
    # `split`, whose transpose is one concatenation; that of indexing would be a sum of paddings.
    return [slot.squeeze(0) for slot in jnp.split(pre_KHB, pre_KHB.shape[0])]


def _sigmoid(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def _elman(pre_KHB: jax.Array, state: State) -> State:
    """h = tanh(a)."""
    return (jnp.tanh(pre_KHB[0]),)


def _lstm(pre_KHB: jax.Array, state: State) -> State:
    """c = sigmoid(f) c + sigmoid(i) tanh(u); h = sigmoid(o) tanh(c)."""
    # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2, so one tanh serves all four gates.
    scale_K11 = jnp.array([0.5, 0.5, 1.0, 0.5], pre_KHB.dtype)[:, None, None]
    i, f, u, o = _slots(scale_K11 * jnp.tanh(scale_K11 * pre_KHB) + (1 - scale_K11))
    cell = f * state[1] + i * u
    return o * jnp.tanh(cell), cell


def _gru(pre_KHB: jax.Array, state: State) -> State:
    """n = tanh(n_input + sigmoid(r) n_recurrent); h = (1 - sigmoid(z)) n + sigmoid(z) h.

    The reset gate follows the recurrent product, which has a bias of its own, as in cuDNN and
    PyTorch (version 1 of arXiv 1406.1078 resets before it).
    """
    n_input, r, z, n_recurrent = _slots(pre_KHB)
    new = jnp.tanh(n_input + _sigmoid(r) * n_recurrent)
    return (new + _sigmoid(z) * (state[0] - new),)


# Order of the gates. rnn: a. lstm: i f u o. gru: of the input n r z, recurrent r z n, biases n r z n.
CELLS = {
    "rnn": Cell(1, 1, 1, _elman),
    "lstm": Cell(4, 4, 2, _lstm),
    "gru": Cell(3, 4, 1, _gru),
}
FORGET = 1  # the LSTM's forget gate


def _step(cell: Cell, pre_KHB, state: State, fresh_1B, valid_1B) -> State:
    """Update the state: from zeros where `fresh`, not at all where not `valid`."""
    state = tuple(jnp.where(fresh_1B, 0, s) for s in state)
    new = cell.update(pre_KHB.astype(state[0].dtype), state)
    return tuple(jnp.where(valid_1B, n, s) for n, s in zip(new, state, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(
    cell: Cell,
    x_LKHB: jax.Array,
    recurrent_DGH: jax.Array,
    state: State,
    fresh_L1B: jax.Array,
    valid_L1B: jax.Array,
) -> tuple[jax.Array, State]:
    """Run `cell` over the length.

    Args:
      x_LKHB: pre-activations without the recurrent part, biases included.
      recurrent_DGH: maps the state h (D = H wide) to the last G pre-activations.
      state: where to start, arrays [H, B] of float32 or wider.
      fresh_L1B: positions that start from zeros, bool.
      valid_L1B: positions that change the state, bool; elsewhere it is held.

    Returns:
      h of every position [L, H, B] in the type of `x`, and the last state.
    """
    return _recur_forward(cell, x_LKHB, recurrent_DGH, state, fresh_L1B, valid_L1B)[0]


def _recur_forward(cell, x_LKHB, recurrent_DGH, state, fresh_L1B, valid_L1B):
    kernel_GHD = recurrent_DGH.transpose(1, 2, 0)  # once, so that each step reads contiguous rows
    apart = ((cell.num_slots - cell.num_gates, 0), (0, 0), (0, 0))

    def step(state, inputs):
        x_KHB, fresh_1B, valid_1B = inputs
        recurrent_GHB = jnp.einsum(
            "ghd,db->ghb", kernel_GHD, state[0].astype(x_KHB.dtype),
            preferred_element_type=state[0].dtype,
        )  # fmt: skip
        recurrent_GHB = jnp.where(fresh_1B[None], 0, recurrent_GHB)
        pre_KHB = (x_KHB + jnp.pad(recurrent_GHB, apart)).astype(x_KHB.dtype)
        pre_KHB = jax.lax.optimization_barrier(pre_KHB)  # else XLA:CPU sums again at each use
        new = _step(cell, pre_KHB, state, fresh_1B, valid_1B)
        return new, (new[0].astype(x_KHB.dtype), pre_KHB, state)

    last, (h_LHB, pre_LKHB, states) = jax.lax.scan(step, state, (x_LKHB, fresh_L1B, valid_L1B))
    return (h_LHB, last), (recurrent_DGH, pre_LKHB, states, fresh_L1B, valid_L1B)


def _recur_backward(cell, residuals, gradients):
    recurrent_DGH, pre_LKHB, states, fresh_L1B, valid_L1B = residuals
    dh_LHB, dlast = gradients
    apart = cell.num_slots - cell.num_gates

    def step(dstate, inputs):
        dh_HB, pre_KHB, state, fresh_1B, valid_1B = inputs
        dstate = (dstate[0] + dh_HB.astype(dstate[0].dtype), *dstate[1:])
        _, vjp = jax.vjp(lambda pre, s: _step(cell, pre, s, fresh_1B, valid_1B), pre_KHB, state)
        dpre_KHB, dstate = vjp(dstate)
        dpre_KHB = jax.lax.optimization_barrier(dpre_KHB)  # else XLA:CPU computes it twice
        through_DB = jnp.einsum(
            "dgh,ghb->db", recurrent_DGH, dpre_KHB[apart:], preferred_element_type=dstate[0].dtype
        )
        return (dstate[0] + jnp.where(fresh_1B, 0, through_DB), *dstate[1:]), dpre_KHB

    inputs = (dh_LHB, pre_LKHB, states, fresh_L1B, valid_L1B)
    dstate, dpre_LKHB = jax.lax.scan(step, dlast, inputs, reverse=True)
    entering_LDB = jnp.where(fresh_L1B, 0, states[0]).astype(pre_LKHB.dtype)
    drecurrent_DGH = jnp.einsum(
        "ldb,lghb->dgh", entering_LDB, dpre_LKHB[:, apart:],
        preferred_element_type=dstate[0].dtype,
    )  # fmt: skip
    return dpre_LKHB, drecurrent_DGH.astype(recurrent_DGH.dtype), dstate, None, None


recur.defvjp(_recur_forward, _recur_backward)


def orthogonal_gates(key: jax.Array, shape: tuple[int, int, int], dtype=jnp.float32) -> jax.Array:
    """Return a kernel [D, G, H], each gate's matrix orthogonal (Saxe et al. 2013, arXiv 1312.6120)."""
    D, G, H = shape
    init = nn.initializers.orthogonal()
    # Gate by gate: LAPACK's batched factorisation waits for threads of the pool that it runs in, and with
    # jaxlib 0.10 on several simulated devices they wait for each other for ever.
    return jnp.stack([init(k, (D, H), dtype) for k in jax.random.split(key, G)], axis=1)


def glorot_gates(key: jax.Array, shape: tuple[int, int, int], dtype=jnp.float32) -> jax.Array:
    """Return a kernel [D, G, H], uniform with each gate's variance 2 / (D + H) (Glorot and Bengio 2010)."""
    D, _, H = shape
    limit = (6 / (D + H)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


class Layer(nn.Module):
    """One layer: a = W x + b + U h, then the cell's step.

    Parameters: kernel [D, G, H], recurrent [H, G, H], bias [K, H]. Gates are an axis of their own
    and never split, so that a device of the tensor axis holds all gates of its share of H.
    """

    cell: str
    hidden_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_LDB, state: State, *, fresh_L1B, valid_L1B) -> tuple[jax.Array, State]:
        """Return h [L, H, B] and the last state, from `x` [L, D, B] and a state of arrays [H, B]."""
        cell, H, D = CELLS[self.cell], self.hidden_dim, x_LDB.shape[1]
        kernel_DGH = self._kernel("kernel", glorot_gates, (D, cell.num_gates, H), "embed")
        recurrent_DGH = self._kernel(
            "recurrent", orthogonal_gates, (H, cell.num_gates, H), "hidden_in"
        )
        bias_KH = self.param(
            "bias",
            nn.with_logical_partitioning(self._bias_init, ("gates", "hidden")),
            (cell.num_slots, H),
        )
        x_LGHB = jnp.einsum("ldb,dgh->lghb", x_LDB.astype(self.dtype), kernel_DGH)
        apart = cell.num_slots - cell.num_gates
        x_LKHB = jnp.pad(x_LGHB, ((0, 0), (0, apart), (0, 0), (0, 0)))
        x_LKHB = x_LKHB + bias_KH.astype(self.dtype)[None, :, :, None]
        x_LKHB = sharding.constrain(x_LKHB, "act_length", None, "act_hidden", "act_batch")
        state = tuple(sharding.constrain(s, "act_hidden", "act_batch") for s in state)
        h_LHB, state = recur(cell, x_LKHB, recurrent_DGH, state, fresh_L1B, valid_L1B)
        return sharding.constrain(h_LHB, "act_length", "act_embed", "act_batch"), state

    def _kernel(self, name: str, init: Callable, shape: tuple[int, ...], axis: str) -> jax.Array:
        axes = (axis, "gates", "hidden")
        kernel = self.param(name, nn.with_logical_partitioning(init, axes), shape)
        return sharding.gather(kernel.astype(self.dtype), axes)

    def _bias_init(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        bias_KH = jnp.zeros(shape)
        return bias_KH.at[FORGET].set(1.0) if self.cell == "lstm" else bias_KH


class Recurrent(nn.Module):
    """Layers on top of each other, with dropout on the input of each and on the output.

    State lives in the collection that `memory` names, as arrays [B, H] called `layer_0_0` (h) and
    `layer_0_1` (the LSTM's c), float32. It is read where the collection is given and written where
    it is mutable; `init` leaves zeros. Without the collection every row starts from zeros.
    """

    cell: str
    num_layers: int
    hidden_dim: int
    dtype: jnp.dtype
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BLD,
        *,
        segments_BL,
        positions_BL,
        train: bool = False,
        memory: str,
        fresh: bool = False,
    ) -> jax.Array:
        """Return features [B, L, H]; position 0 resets the state and padding (segment 0) holds it.

        Args:
          memory: collection of the state, "carry" (across windows) or "cache" (decoding).
          fresh: start from zeros whatever the memory holds, and only write it.
        """
        valid_L1B = (segments_BL > 0).T[:, None]
        fresh_L1B = (positions_BL == 0).T[:, None] & valid_L1B
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        x_LDB = x_BLD.transpose(1, 2, 0)
        for n in range(self.num_layers):
            layer = Layer(self.cell, self.hidden_dim, self.dtype, name=f"layer_{n}")
            states = [
                self._remembered(memory, f"layer_{n}_{i}", x_BLD.shape[0])
                for i in range(CELLS[self.cell].num_states)
            ]
            start = tuple(jnp.zeros_like(s.value.T) if fresh else s.value.T for s in states)
            x_LDB, last = layer(dropout(x_LDB), start, fresh_L1B=fresh_L1B, valid_L1B=valid_L1B)
            if self.is_mutable_collection(memory) and not self.is_initializing():
                for variable, value in zip(states, last, strict=True):
                    variable.value = sharding.constrain(value.T, "act_batch", "act_hidden")
        x_BLD = dropout(x_LDB).transpose(2, 0, 1)
        return sharding.constrain(x_BLD, "act_batch", "act_length", "act_embed")

    def _remembered(self, memory: str, name: str, batch_size: int):
        """Return the variable of a state, or a stand-in of zeros where there is no such memory."""
        shape, dtype = (batch_size, self.hidden_dim), jnp.promote_types(self.dtype, jnp.float32)
        if not (self.is_mutable_collection(memory) or self.has_variable(memory, name)):
            return _Zeros(jnp.zeros(shape, dtype))
        init = nn.with_logical_partitioning(jnp.zeros, ("act_batch", "act_hidden"))
        return self.variable(memory, name, lambda: init(shape, dtype))


class _Zeros(NamedTuple):
    value: jax.Array
