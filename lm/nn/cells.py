"""Recurrent cells and the loop over a row, with a gradient made for long rows.

Elman 1990, "Finding structure in time"; GRU: Cho et al. 2014 (arXiv 1406.1078); LSTM: Hochreiter and
Schmidhuber 1997 with the forget gate of Gers et al. 2000.

What differs: the gradient is written by hand. The input's products are taken for many positions at
once, before the loop; the loop keeps its gates, so that nothing is computed twice; its reverse
propagates through one recurrent product a step, and the kernels' gradients are products after it.

Arrays are features-first with the batch last (D and H widths, G gates, K pre-activations, T positions
of a chunk): each step's product then reads its kernel row by row, 1.2x on a CPU. There a row is taken in
chunks of few positions, whose pre-activations stay in the cache between the products and the loop.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm import sharding

State = tuple[jax.Array, ...]  # h first; each [H, B] inside the loop

CPU_CHUNK = 512  # columns (positions x rows) whose products are taken at once


class Cell(NamedTuple):
    """A step from pre-activations and state to state.

    The input's G gates are added to the first G of K pre-activations, the recurrent ones to the
    last G: they overlap fully unless a cell keeps some of the two apart, as the GRU does.
    """

    num_gates: int  # G, of either kernel
    num_slots: int  # K >= G
    num_states: int
    reads: tuple[int, ...]  # states that `update` reads
    gates: Callable[[jax.Array], jax.Array]  # pre-activations [K, H, B] -> gates [K, H, B], kept
    update: Callable[[jax.Array, State], State]  # (gates, state) -> state
    # (gates, states before and after, gradients of these) -> gradients of pre-activations, states before
    pull: Callable[[jax.Array, State, State, State], tuple[jax.Array, State]]


def _slots(array_KHB: jax.Array) -> list[jax.Array]:
    # `split`, whose transpose is one concatenation; that of indexing would be a sum of paddings.
    return [slot.squeeze(0) for slot in jnp.split(array_KHB, array_KHB.shape[0])]


def _sigmoid(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def _elman_update(gates_KHB: jax.Array, state: State) -> State:
    """h = tanh(a)."""
    return (gates_KHB[0],)


def _elman_pull(gates_KHB, before: State, after: State, dafter: State):
    (dh,) = dafter
    return dh[None] * (1 - gates_KHB) * (1 + gates_KHB), (jnp.zeros_like(dh),)


def _lstm_gates(pre_KHB: jax.Array) -> jax.Array:
    # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2, so one tanh serves all four gates.
    scale_K11 = jnp.array([0.5, 0.5, 1.0, 0.5], pre_KHB.dtype)[:, None, None]
    return scale_K11 * jnp.tanh(scale_K11 * pre_KHB) + (1 - scale_K11)


def _lstm_update(gates_KHB: jax.Array, state: State) -> State:
    """c = sigmoid(f) c + sigmoid(i) tanh(u); h = sigmoid(o) tanh(c)."""
    i, f, u, o = _slots(gates_KHB)
    cell = f * state[1] + i * u
    return o * jnp.tanh(cell), cell


def _lstm_pull(gates_KHB, before: State, after: State, dafter: State):
    i, f, u, o = _slots(gates_KHB)
    dh, tanh = dafter[0], jnp.tanh(after[1])
    dcell = dafter[1] + dh * o * (1 - tanh) * (1 + tanh)
    dgates_KHB = jnp.stack([dcell * u, dcell * before[1], dcell * i, dh * tanh])
    # The slope of a sigmoid s is (1 - s) s, that of a tanh t is (1 - t) (1 + t).
    is_tanh_K11 = jnp.array([0.0, 0.0, 1.0, 0.0], gates_KHB.dtype)[:, None, None]
    dpre_KHB = dgates_KHB * (1 - gates_KHB) * (gates_KHB + is_tanh_K11)
    return dpre_KHB, (jnp.zeros_like(dh), dcell * f)


def _gru_gates(pre_KHB: jax.Array) -> jax.Array:
    """n = tanh(n_input + sigmoid(r) n_recurrent).

    The reset gate follows the recurrent product, which has a bias of its own, as in cuDNN, PyTorch and
    version 1 of arXiv 1406.1078 (version 3 resets before it).
    """
    n_input, r, z, n_recurrent = _slots(pre_KHB)
    r, z = _sigmoid(r), _sigmoid(z)
    return jnp.stack([jnp.tanh(n_input + r * n_recurrent), r, z, n_recurrent])


def _gru_update(gates_KHB: jax.Array, state: State) -> State:
    """h = (1 - z) n + z h."""
    new, _, z, _ = _slots(gates_KHB)
    return (new + z * (state[0] - new),)


def _gru_pull(gates_KHB, before: State, after: State, dafter: State):
    new, r, z, n_recurrent = _slots(gates_KHB)
    dh = dafter[0]
    dn = dh * (1 - z) * (1 - new) * (1 + new)
    dz = dh * (before[0] - new) * z * (1 - z)
    return jnp.stack([dn, dn * n_recurrent * r * (1 - r), dz, dn * r]), (dh * z,)


# Order of the gates. rnn: a. lstm: i f u o. gru: of the input n r z, recurrent r z n, biases n r z n.
CELLS = {
    "rnn": Cell(1, 1, 1, (), jnp.tanh, _elman_update, _elman_pull),
    "lstm": Cell(4, 4, 2, (1,), _lstm_gates, _lstm_update, _lstm_pull),
    "gru": Cell(3, 4, 1, (0,), _gru_gates, _gru_update, _gru_pull),
}
FORGET = 1  # the LSTM's forget gate


class Weights(NamedTuple):
    """Parameters of a layer, in the type of computation but for the bias."""

    kernel: jax.Array  # [D, G, H]
    recurrent: jax.Array  # [H, G, H]: maps the state h to the last G pre-activations
    bias: jax.Array  # [K, H]


class Loop(NamedTuple):
    """What a layer's loop is given, its length cut into C chunks."""

    x: jax.Array  # [C, D, T, B]
    weights: Weights
    state: State  # where to start, [H, B]
    begin: State | None  # states of fresh positions, [C, T, H, B]; None = zeros
    factors: jax.Array | None  # of h in the recurrent product, [H, B]; None = 1
    fresh: jax.Array  # bool [C, T, 1, B]
    valid: jax.Array  # bool [C, T, 1, B]


def recur(
    cell: Cell,
    x_LDB: jax.Array,
    weights: Weights,
    state: State,
    *,
    fresh_L1B: jax.Array,
    valid_L1B: jax.Array,
    begin: State | None = None,
    factors_HB: jax.Array | None = None,
) -> tuple[jax.Array, State, State]:
    """Run `cell` over the length.

    Args:
      x_LDB: inputs, in the type of computation.
      weights: the layer's parameters.
      state: where to start, arrays [H, B] of float32 or wider.
      fresh_L1B: positions that start anew, bool.
      valid_L1B: positions that change the state, bool; elsewhere it is held.
      begin: the states that fresh positions start from, arrays [L, H, B]; None = zeros.
      factors_HB: of the state h in the recurrent product; None = 1. No gradient flows to them.

    Returns:
      h of every position [L, H, B] in the type of `x`, the last state, and of every position the
      states but h [L, H, B].
    """
    L, _, B = x_LDB.shape
    num_chunks = _num_chunks(L, B)
    T = -(-L // num_chunks)

    def cut(array):
        array = jnp.pad(array, ((0, num_chunks * T - L), *((0, 0),) * (array.ndim - 1)))
        return array.reshape(num_chunks, T, *array.shape[1:])

    def join(array_CTHB):
        return array_CTHB.reshape(num_chunks * T, *array_CTHB.shape[2:])[:L]

    begin = None if begin is None else tuple(cut(s.astype(state[0].dtype)) for s in begin)
    x_CDTB = cut(x_LDB).swapaxes(1, 2)
    loop = Loop(x_CDTB, weights, state, begin, factors_HB, cut(fresh_L1B), cut(valid_L1B))
    h_CHTB, last, others_CTHB = _run(cell, loop)
    return join(h_CHTB.swapaxes(1, 2)), last, tuple(map(join, others_CTHB))


def _num_chunks(length: int, batch_size: int) -> int:
    if jax.default_backend() != "cpu" or sharding.mesh_size() > 1:
        return 1  # large products, and one sum over devices of the kernels' gradients
    return min(length, math.ceil(length * batch_size / CPU_CHUNK))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(cell: Cell, loop: Loop) -> tuple[jax.Array, State, State]:
    """Return h [C, H, T, B], the last state, and of every position the states but h [C, T, H, B]."""
    return _run_forward(cell, loop)[0]


def _run_forward(cell: Cell, loop: Loop):
    (C, _, T, B), (K, H) = loop.x.shape, loop.weights.bias.shape
    apart = cell.num_slots - cell.num_gates
    dtype, state_dtype = loop.x.dtype, loop.state[0].dtype
    kernel_GHD, recurrent_GHD = (_by_rows(kernel, C * T) for kernel in loop.weights[:2])
    bias_KH1 = loop.weights.bias.astype(state_dtype)[:, :, None]

    def chunk(carry, inputs):
        state, gates_LKHB, stacks = carry
        number, x_DTB, begin, fresh_T1B, valid_T1B = inputs
        x_GHTB = jnp.einsum("ghd,dtb->ghtb", kernel_GHD, x_DTB)
        x_GHTB = sharding.constrain(x_GHTB, None, "act_hidden", "act_length", "act_batch")
        x_KHTB = jnp.pad(x_GHTB, ((0, apart), (0, 0), (0, 0), (0, 0)))

        def step(carry, inputs):
            state, h_HTB, gates_LKHB, stacks = carry
            t, begin, fresh_1B, valid_1B = inputs
            state = _reset(state, begin, fresh_1B)
            recurrent_GHB = jnp.einsum(
                "ghd,db->ghb", recurrent_GHD, _factored(state[0], loop.factors).astype(dtype),
                preferred_element_type=state_dtype,
            )  # fmt: skip
            pre_KHB = _at(x_KHTB, t, 2) + bias_KH1
            pre_KHB += jnp.pad(recurrent_GHB, ((apart, 0), (0, 0), (0, 0)))
            # Behind the barrier gates are computed once, and not at each use.
            gates_KHB = jax.lax.optimization_barrier(cell.gates(pre_KHB).astype(dtype))
            state = _hold(cell, gates_KHB, state, valid_1B)
            place = number * T + t
            gates_LKHB = _put(gates_LKHB, gates_KHB, place, 0)
            kept = zip(stacks, cell.reads, strict=True)
            stacks = tuple(_put(stack, state[i], place + 1, 0) for stack, i in kept)
            return (state, _put(h_HTB, state[0], t, 1), gates_LKHB, stacks), None

        carry = (state, jnp.zeros((H, T, B), dtype), gates_LKHB, stacks)
        steps = (jnp.arange(T), begin, fresh_T1B, valid_T1B)
        (last, h_HTB, *rest), _ = jax.lax.scan(step, carry, steps)
        return (last, *rest), (h_HTB, state[0])

    # Each is written before it is read. Zeros, as a constant, XLA on a CPU would write once and copy for
    # each layer; it does not see through this number.
    unset = loop.weights.bias[0, 0]
    gates_LKHB = jnp.broadcast_to(unset.astype(dtype), (C * T, K, H, B))
    stacks = tuple(
        jnp.broadcast_to(unset.astype(state_dtype), (C * T + 1, H, B)) for _ in cell.reads
    )
    stacks = tuple(_put(s, loop.state[i], 0, 0) for s, i in zip(stacks, cell.reads, strict=True))
    inputs = (jnp.arange(C), loop.x, loop.begin, loop.fresh, loop.valid)
    carry = (loop.state, gates_LKHB, stacks)
    (last, gates_LKHB, stacks), (h_CHTB, h_CHB) = jax.lax.scan(chunk, carry, inputs)
    others = (s[1:].reshape(C, T, H, B) for s, i in zip(stacks, cell.reads, strict=True) if i)
    return (h_CHTB, last, tuple(others)), (loop, h_CHTB, h_CHB, gates_LKHB, stacks)


def _run_backward(cell: Cell, residuals, gradients):
    loop, h_CHTB, h_CHB, gates_LKHB, stacks = residuals
    dh_CHTB, dlast, dothers = gradients
    (C, _, T, B), (K, H) = loop.x.shape, loop.weights.bias.shape
    dtype, state_dtype = loop.x.dtype, loop.state[0].dtype

    def chunk(carry, inputs):
        dpre_KHTB, dstate, dweights = carry
        number, kept, (dh_HTB, dothers), masks = inputs

        def step(carry, inputs):
            dpre_KHTB, dstate = carry
            t, dothers, (begin, fresh_1B, valid_1B) = inputs
            before = [jnp.zeros((H, B), state_dtype)] * cell.num_states  # any value, if not read
            after = list(before)
            for stack, i in zip(stacks, cell.reads, strict=True):
                before[i] = _at(stack, number * T + t, 0)
                after[i] = _at(stack, number * T + t + 1, 0)
            state = _reset(tuple(before), begin, fresh_1B)
            gates_KHB = _at(gates_LKHB, number * T + t, 0).astype(state_dtype)
            dnew = (_at(dh_HTB, t, 1).astype(state_dtype), *dothers)
            dnew = tuple(a + b for a, b in zip(dstate, dnew, strict=True))
            dpre_KHB, dbefore = cell.pull(gates_KHB, state, tuple(after), _only(valid_1B, dnew))
            held = _only(~valid_1B, dnew)
            dstate = tuple(a + b for a, b in zip(dbefore, held, strict=True))
            # Behind the barrier it is computed once, not for the product and for what is kept.
            dpre_KHB = jax.lax.optimization_barrier(dpre_KHB.astype(dtype))
            through_DB = jnp.einsum(
                "dgh,ghb->db", loop.weights.recurrent, dpre_KHB[K - cell.num_gates :],
                preferred_element_type=state_dtype,
            )  # fmt: skip
            dstate = (dstate[0] + _factored(through_DB, loop.factors), *dstate[1:])
            dbegin = None if begin is None else _only(fresh_1B, dstate)
            return (_put(dpre_KHTB, dpre_KHB, t, 2), _only(~fresh_1B, dstate)), dbegin

        steps = (jnp.arange(T), dothers, masks)
        (dpre_KHTB, dstate), dbegin = jax.lax.scan(step, (dpre_KHTB, dstate), steps, reverse=True)
        dx_DTB, new = _products_backward(cell, loop, dpre_KHTB, kept, masks)
        dweights = jax.tree.map(jnp.add, dweights, new)
        return (dpre_KHTB, dstate, dweights), (dx_DTB, dbegin)

    # The kernels' gradients are summed as [G, H, D], as the products make them.
    kernel, recurrent = (jnp.zeros((*w.shape[1:], len(w)), state_dtype) for w in loop.weights[:2])
    zeros = Weights(kernel, recurrent, jnp.zeros((K, H), state_dtype))
    carry = (jnp.zeros((K, H, T, B), dtype), dlast, zeros)
    masks = (loop.begin, loop.fresh, loop.valid)
    inputs = (jnp.arange(C), (loop.x, h_CHTB, h_CHB), (dh_CHTB, dothers), masks)
    carry, (dx_CDTB, dbegin) = jax.lax.scan(chunk, carry, inputs, reverse=True)
    dkernel_GHD, drecurrent_GHD, dbias_KH = carry[2]
    dweights = Weights(dkernel_GHD.transpose(2, 0, 1), drecurrent_GHD.transpose(2, 0, 1), dbias_KH)
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, loop.weights)
    return (Loop(dx_CDTB, dweights, carry[1], dbegin, None, None, None),)


def _products_backward(cell: Cell, loop: Loop, dpre_KHTB, kept, masks):
    """Return the gradients of a chunk's inputs and of the weights, these of the kernels as [G, H, D]."""
    x_DTB, h_HTB, h_HB = kept
    begin, fresh_T1B, _ = masks
    state_dtype = loop.state[0].dtype
    before_HTB = jnp.concatenate([h_HB[:, None].astype(h_HTB.dtype), h_HTB[:, :-1]], axis=1)
    begin_HTB = 0 if begin is None else begin[0].swapaxes(0, 1).astype(h_HTB.dtype)
    before_HTB = jnp.where(fresh_T1B.swapaxes(0, 1), begin_HTB, before_HTB)
    if loop.factors is not None:
        before_HTB = (before_HTB * loop.factors[:, None]).astype(h_HTB.dtype)
    d_GHTB = dpre_KHTB[: cell.num_gates]
    dx_DTB = jnp.einsum("dgh,ghtb->dtb", loop.weights.kernel, d_GHTB)
    product = functools.partial(jnp.einsum, "ghtb,dtb->ghd", preferred_element_type=state_dtype)
    dkernel_GHD = product(d_GHTB, x_DTB)
    drecurrent_GHD = product(dpre_KHTB[cell.num_slots - cell.num_gates :], before_HTB)
    dbias_KH = dpre_KHTB.sum(axis=(2, 3), dtype=state_dtype)
    return dx_DTB, Weights(dkernel_GHD, drecurrent_GHD, dbias_KH)


_run.defvjp(_run_forward, _run_backward)


def _by_rows(kernel_DGH: jax.Array, length: int) -> jax.Array:
    """Return [G, H, D], in memory where it pays: a loop then reads contiguous rows at each step."""
    kernel_GHD = kernel_DGH.transpose(1, 2, 0)
    return jax.lax.optimization_barrier(kernel_GHD) if length > 1 else kernel_GHD


def _reset(state: State, begin: State | None, fresh_1B) -> State:
    """Return `begin` (None = zeros) where `fresh`, else the state."""
    if begin is None:
        return tuple(jnp.where(fresh_1B, 0, s) for s in state)
    return tuple(jnp.where(fresh_1B, b, s) for b, s in zip(begin, state, strict=True))


def _only(where_1B, state: State) -> State:
    return tuple(jnp.where(where_1B, s, 0) for s in state)


def _hold(cell: Cell, gates_KHB, state: State, valid_1B) -> State:
    """Update the state where `valid`."""
    new = cell.update(gates_KHB.astype(state[0].dtype), state)
    return tuple(jnp.where(valid_1B, n, s) for n, s in zip(new, state, strict=True))


def _factored(h_HB, factors_HB):
    return h_HB if factors_HB is None else h_HB * factors_HB


def _at(array, index, axis: int):
    return jax.lax.dynamic_index_in_dim(array, index, axis, keepdims=False)


def _put(array, value, index, axis: int):
    return jax.lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), index, axis)
