"""Recurrent layers: Elman, GRU and LSTM, one or two directions, with their dropouts.

Bias 1 of an LSTM's forget gate: Jozefowicz et al. 2015; dropout between layers: Zaremba et al. 2014 (arXiv
1409.2329); one mask a row, also of the state in the recurrent product: Gal and Ghahramani 2016 (1512.05287);
DropConnect on the recurrent kernel: Merity et al. 2017 (1708.02182); two directions: Schuster and Paliwal
1997.

What differs: documents of a row do not meet. Position 0 starts anew; the second direction starts anew at
each document's last token. What a document starts from may be given, and the states at every position come
with the features, so that a decoder can go on where an encoder ended: see `hand_over`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import sharding
from lm.nn.cells import CELLS, FORGET, State, Weights, recur
from lm.nn.linear import wide

# Of each layer, of each direction: h and, of an LSTM, c. Arrays [B, L, H], float32 or wider.
States = tuple[tuple[State, ...], ...]


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
    return uniform((6 / (D + H)) ** 0.5)(key, shape, dtype)


def uniform(scale: float) -> Callable:
    """Return an initialiser, uniform in [-scale, scale)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -scale, scale)

    return init


class Layer(nn.Module):
    """One layer in one direction: a = W x + b + U h, then the cell's step.

    Parameters: kernel [D, G, H], recurrent [H, G, H], bias [K, H]. Gates are an axis of their own
    and never split, so that a device of the tensor axis holds all gates of its share of H.

    Attributes:
      hidden_dropout: probability, of h in the recurrent product, one mask a row.
      weight_dropout: probability, of the recurrent kernel's elements, one mask a call.
      init_scale: parameters start uniform in [-init_scale, init_scale); 0 = kernels by Glorot and
        orthogonal, biases 0, that of an LSTM's forget gate 1.
    """

    cell: str
    hidden_dim: int
    dtype: jnp.dtype
    hidden_dropout: float = 0.0
    weight_dropout: float = 0.0
    init_scale: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_LDB: jax.Array,
        state: State,
        *,
        fresh_L1B: jax.Array,
        valid_L1B: jax.Array,
        begin: State | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, State, State]:
        """Return h [L, H, B], the last state, and the states but h [L, H, B]; see `recur`."""
        cell, H, D = CELLS[self.cell], self.hidden_dim, x_LDB.shape[1]
        kernel_DGH = self._kernel("kernel", glorot_gates, (D, cell.num_gates, H), "embed", 0.0)
        recurrent_HGH = self._kernel(
            "recurrent", orthogonal_gates, (H, cell.num_gates, H), "hidden_in",
            self.weight_dropout if train else 0.0,
        )  # fmt: skip
        bias_KH = self.param(
            "bias",
            nn.with_logical_partitioning(self._bias_init, ("gates", "hidden")),
            (cell.num_slots, H),
        )
        state = tuple(sharding.constrain(s, "act_hidden", "act_batch") for s in state)
        factors_HB = None
        if train and self.hidden_dropout:
            ones_HB = jnp.ones_like(state[0])
            factors_HB = nn.Dropout(self.hidden_dropout, deterministic=False)(ones_HB)
        h_LHB, last, others = recur(
            cell, x_LDB.astype(self.dtype), Weights(kernel_DGH, recurrent_HGH, bias_KH), state,
            fresh_L1B=fresh_L1B, valid_L1B=valid_L1B, begin=begin, factors_HB=factors_HB,
        )  # fmt: skip
        return sharding.constrain(h_LHB, "act_length", "act_embed", "act_batch"), last, others

    def _kernel(
        self, name: str, init: Callable, shape: tuple[int, ...], axis: str, dropout: float
    ) -> jax.Array:
        axes = (axis, "gates", "hidden")
        init = uniform(self.init_scale) if self.init_scale else init
        kernel = self.param(name, nn.with_logical_partitioning(init, axes), shape)
        kernel = nn.Dropout(dropout, deterministic=False)(kernel) if dropout else kernel
        return sharding.gather(kernel.astype(self.dtype), axes)

    def _bias_init(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        if self.init_scale:
            return uniform(self.init_scale)(key, shape)
        bias_KH = jnp.zeros(shape)
        return bias_KH.at[FORGET].set(1.0) if self.cell == "lstm" else bias_KH


class Recurrent(nn.Module):
    """Layers on top of each other, with dropout on the input of each and on the output.

    State lives in the collection that `memory` names, as arrays [B, H] called `layer_0_0` (h) and
    `layer_0_1` (the LSTM's c), float32. It is read where the collection is given and written where
    it is mutable; `init` leaves zeros. Without the collection every row starts from zeros.

    Attributes:
      dropout: probability, on the input of every layer and on the features.
      locked: one dropout mask a row for all its positions, and not one a position.
      hidden_dropout, weight_dropout, init_scale: see `Layer`.
      bidirectional: each layer has a second direction, whose features follow the first's.
    """

    cell: str
    num_layers: int
    hidden_dim: int
    dtype: jnp.dtype
    dropout: float = 0.0
    locked: bool = False
    hidden_dropout: float = 0.0
    weight_dropout: float = 0.0
    init_scale: float = 0.0
    bidirectional: bool = False

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        *,
        segments_BL: jax.Array,
        positions_BL: jax.Array,
        train: bool = False,
        memory: str = "",
        fresh: bool = False,
        begin: States | None = None,
    ) -> tuple[jax.Array, States]:
        """Return features [B, L, H] ([B, L, 2 H] of two directions) and the states at every position.

        Position 0 starts anew, and padding (segment 0) holds the state. In the second direction a
        document starts anew at its last token, so its last state is at its first.

        Args:
          memory: collection of the state, "carry" (across windows), "cache" (decoding) or "" (none;
            of two directions always).
          fresh: start from zeros whatever the memory holds, and only write it.
          begin: what documents start from, as the states returned: at each position what its document
            would start from there. None = zeros.
        """
        assert not (self.bidirectional and memory), "two directions have no memory"
        valid_L1B = (segments_BL > 0).T[:, None]
        fresh_L1B = (positions_BL == 0).T[:, None] & valid_L1B
        dropout = nn.Dropout(
            self.dropout, broadcast_dims=(0,) if self.locked else (), deterministic=not train
        )
        x_LDB = x_BLD.transpose(1, 2, 0)
        states = []
        for n in range(self.num_layers):
            masks = {"fresh_L1B": fresh_L1B, "valid_L1B": valid_L1B, "train": train}
            begins = [None, None] if begin is None else [_to_loop(state) for state in begin[n]]
            x_LDB = dropout(x_LDB)
            h_LHB, last, others = self._forward(x_LDB, n, memory, fresh, begin=begins[0], **masks)
            ways = [_from_loop(h_LHB, others, None if begin is None else last[0])]
            if self.bidirectional:
                masks["fresh_L1B"] = _ends(segments_BL).T[:, None] & valid_L1B
                back_LHB, others = self._backward(x_LDB, n, begin=begins[1], **masks)
                ways.append(_from_loop(back_LHB, others))
                h_LHB = jnp.concatenate([h_LHB, back_LHB], axis=1)
            states.append(tuple(ways))
            x_LDB = h_LHB
        x_BLD = dropout(x_LDB).transpose(2, 0, 1)
        return sharding.constrain(x_BLD, "act_batch", "act_length", "act_embed"), tuple(states)

    def _layer(self, name: str) -> Layer:
        return Layer(
            self.cell, self.hidden_dim, self.dtype, self.hidden_dropout, self.weight_dropout,
            self.init_scale, name=name,
        )  # fmt: skip

    def _forward(self, x_LDB, n: int, memory: str, fresh: bool, **masks):
        batch_size, num_states = x_LDB.shape[2], CELLS[self.cell].num_states
        kept = [self._remembered(memory, f"layer_{n}_{i}", batch_size) for i in range(num_states)]
        start = tuple(jnp.zeros_like(s.value.T) if fresh else s.value.T for s in kept)
        h_LHB, last, others = self._layer(f"layer_{n}")(x_LDB, start, **masks)
        if memory and self.is_mutable_collection(memory) and not self.is_initializing():
            for variable, value in zip(kept, last, strict=True):
                variable.value = sharding.constrain(value.T, "act_batch", "act_hidden")
        return h_LHB, last, others

    def _backward(self, x_LDB, n: int, *, begin, train: bool, **masks):
        """Run the row from right to left: padding comes first, and leaves the state at zero."""
        start = (jnp.zeros((self.hidden_dim, x_LDB.shape[2]), wide(self.dtype)),)
        x_LDB, masks, begin = jax.tree.map(lambda a: jnp.flip(a, 0), (x_LDB, masks, begin))
        h_LHB, _, others = self._layer(f"layer_{n}_backward")(
            x_LDB, start * CELLS[self.cell].num_states, begin=begin, train=train, **masks
        )
        return jax.tree.map(lambda a: jnp.flip(a, 0), (h_LHB, others))

    def _remembered(self, memory: str, name: str, batch_size: int) -> Any:
        """Return the variable of a state, or a stand-in of zeros where there is no such memory."""
        shape, dtype = (batch_size, self.hidden_dim), wide(self.dtype)
        if not memory or not (
            self.is_mutable_collection(memory) or self.has_variable(memory, name)
        ):
            return _Zeros(jnp.zeros(shape, dtype))
        init = nn.with_logical_partitioning(jnp.zeros, ("act_batch", "act_hidden"))
        return self.variable(memory, name, lambda: init(shape, dtype))


class _Zeros(NamedTuple):
    value: jax.Array


def hand_over(states: States, *, source_segments_BS: jax.Array, segments_BL: jax.Array) -> States:
    """Return what the documents of other rows start from: where these ended in the same segment.

    Args:
      states: of the rows [B, S] that are gone on from, as `Recurrent` returns them.
      source_segments_BS: the segments of these rows.
      segments_BL: the segments of the rows that go on; where a segment is in no source, zeros.

    Returns:
      states of arrays [B, L, H]: of the first direction at the segment's last token in the source, of
      the second at its first.
    """
    same_BLS = segments_BL[:, :, None] == source_segments_BS[:, None]
    borders = (_ends(source_segments_BS), _starts(source_segments_BS))

    def take(border_BS, state):
        chosen_BLS = (same_BLS & border_BS[:, None]).astype(state[0].dtype)
        # One place or none is chosen, by a product with ones and zeros.
        return tuple(jnp.einsum("bls,bsh->blh", chosen_BLS, s, precision="highest") for s in state)

    return tuple(tuple(map(take, borders, layer)) for layer in states)


def _starts(segments_BL: jax.Array) -> jax.Array:
    """Return where a document's first token in the row is, bool [B, L]."""
    before_BL = jnp.pad(segments_BL[:, :-1], ((0, 0), (1, 0)))
    return segments_BL != before_BL


def _ends(segments_BL: jax.Array) -> jax.Array:
    """Return where a document's last token in the row is, bool [B, L]."""
    after_BL = jnp.pad(segments_BL[:, 1:], ((0, 0), (0, 1)))
    return segments_BL != after_BL


def _to_loop(state: State) -> State:
    return tuple(s_BLH.transpose(1, 2, 0) for s_BLH in state)


def _from_loop(h_LHB: jax.Array, others: State, last_HB: jax.Array | None = None) -> State:
    """Return [B, L, H] of each state; with `last_HB` the last position's h is the loop's, not rounded."""
    if last_HB is not None and last_HB.dtype != h_LHB.dtype:
        h_LHB = h_LHB.astype(last_HB.dtype).at[-1].set(last_HB)
    return tuple(s_LHB.transpose(2, 0, 1).astype(wide(h_LHB.dtype)) for s_LHB in (h_LHB, *others))
