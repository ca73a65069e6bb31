"""Mixture of experts: a feed-forward layer of which each token uses a few parts, its experts.

"Outrageously Large Neural Networks", Shazeer et al. 2017 (arXiv 1701.06538), with what has been kept since:
the loss against uneven load of Switch Transformers (Fedus et al. 2021, 2101.03961), the router's z-loss of
ST-MoE (Zoph et al. 2022, 2202.08906), shared experts (DeepSeekMoE, Dai et al. 2024, 2401.06066).

    p = softmax(W x) in float32;  y = sum over the k experts of largest p of g_e MLP_e(x) [+ MLP_shared(x)]

g_e is p_e over the sum of the k (k = 1: p_e itself, else the router would have no gradient).

Two forms. *Dropless* (capacity_factor=0): every token reaches its experts; a token's output depends on that
token alone, so packing, padding, company and cached decoding change nothing. *With capacity* (GShard,
Lepikhin et al. 2020, 2006.16668): in each row an expert has room for capacity_factor k L / E of its L tokens,
earlier positions first, and what finds no room adds nothing to its token. Every expert then does the same
work and tokens travel least; but a token's output depends on the tokens before it in its row, those of other
documents included, and on the length of the row. In decoding nothing is dropped, so that a model with
capacity writes as it read in training only as far as little was dropped there.

What differs: a group, in which room is shared and load is balanced, is a row of the batch, never a device's
share, so that the numbers are those of one device on any mesh. The balance loss is the mean over rows of
E sum_e share_e p_e, which is 1 where the load is even; Switch takes share_e and p_e over a batch, a product
of two means that no sum over parts of the batch gives. So accumulation is one batch, exactly where each part
has as many rows with text. (Over more tokens experts may specialise more: Qiu et al. 2025, 2501.11873.) The
z-loss too is a mean over rows of a mean over tokens. What all layers lose is added to the loss, and what one
does on average is logged. Padding (segment 0) is sent nowhere and counts nowhere.

Letters: E experts, K experts a token, C room of an expert in a row, M slots (places of what is sent), G gate
and value of a gated activation.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lm import collectives, sharding
from lm.nn.grouped import block_rows, grouped_product
from lm.nn.linear import KEPT, einsum, wide
from lm.nn.mlp import ACTIVATIONS, GATED, MLP


def feed_forward(
    cfg: Any,
    x_BLD: jax.Array,
    segments_BL: jax.Array,
    *,
    dtype: jnp.dtype,
    kernel_init: Callable,
    out_init: Callable,
    bias: bool = False,
    decode: bool = False,
) -> jax.Array:
    """Apply the feed-forward layer of a family's config, dense or of experts, as the caller's `mlp`."""
    if not cfg.num_experts:
        dense = MLP(
            cfg.sizes["mlp_dim"],
            cfg.activation,
            dtype,
            kernel_init,
            out_init,
            bias=bias,
            matmul_dtype=cfg.matmul_dtype,
            name="mlp",
        )
        return dense(x_BLD)
    experts = MoE(
        num_experts=cfg.num_experts,
        experts_per_token=cfg.experts_per_token,
        expert_dim=cfg.expert_dim or cfg.sizes["mlp_dim"],
        activation=cfg.activation,
        dtype=dtype,
        kernel_init=kernel_init,
        out_init=out_init,
        capacity_factor=0.0 if decode else cfg.capacity_factor,
        router_z_loss=cfg.router_z_loss,
        balance_loss=cfg.balance_loss,
        shared_experts=cfg.shared_experts,
        name="mlp",
    )
    return experts(x_BLD, segments_BL)


class MoE(nn.Module):
    """y = sum_e g_e MLP_e(x) [+ MLP_shared(x)], as the module's docstring says.

    Sows pairs (sum, weight): the losses `balance_loss` and `router_z_loss`, times their weights; the reports
    `expert_load` (the tokens of a row's fullest expert over the mean) and, with capacity, `tokens_dropped`
    (the share of choices without room); and as intermediate `experts`, the choices of each token [B, L, K].
    """

    num_experts: int
    experts_per_token: int
    expert_dim: int
    activation: str
    dtype: jnp.dtype
    kernel_init: Callable
    out_init: Callable
    capacity_factor: float = 0.0
    router_z_loss: float = 0.0
    balance_loss: float = 0.0
    shared_experts: int = 0

    @nn.compact
    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array) -> jax.Array:
        """Return [B, L, D] of tokens [B, L, D], of which those of segment 0 are padding."""
        D, E, F = x_BLD.shape[-1], self.num_experts, self.expert_dim
        x_BLD = sharding.collect(x_BLD)
        choice_BLK, gate_BLK = self._route(x_BLD, segments_BL > 0)
        gated = self.activation in GATED
        shape = (E, D, 2, F) if gated else (E, D, F)
        axes = ("experts", "embed", "gate", "mlp") if gated else ("experts", "embed", "mlp")
        up = Kernel(shape, axes, self.dtype, self.kernel_init, name="up")()
        down = Kernel(
            (E, F, D), ("experts", "mlp", "embed"), self.dtype, self.out_init, name="down"
        )()
        gate_BLK = gate_BLK.astype(x_BLD.dtype)
        if self.capacity_factor:
            room = capacity(x_BLD.shape[1], self.experts_per_token, E, self.capacity_factor)
            slot_BLK, num_dropped = rooms(choice_BLK, E, room)
            num_sent = jnp.maximum((choice_BLK < E).sum(dtype=jnp.float32), 1.0)
            self.sow("reports", "tokens_dropped", (num_dropped, num_sent))
            y_BLD = with_room(x_BLD, slot_BLK, gate_BLK, up, down, self.activation, room)
        else:
            y_BLD = dropless(x_BLD, choice_BLK, gate_BLK, up, down, self.activation)
        y_BLD = sharding.spread(sharding.constrain(y_BLD, "act_batch", "act_length", "act_embed"))
        if self.shared_experts:
            y_BLD += MLP(
                self.shared_experts * F,
                self.activation,
                self.dtype,
                self.kernel_init,
                self.out_init,
                name="shared",
            )(x_BLD)
        return y_BLD

    def _route(self, x_BLD: jax.Array, real_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return each token's experts [B, L, K], E where it is padding, and their weights in the sum."""
        E, K = self.num_experts, self.experts_per_token
        kernel = Kernel(
            (x_BLD.shape[-1], E),
            ("embed", "router"),
            wide(self.dtype),
            self.kernel_init,
            name="router",
        )()
        logits_BLE = jnp.einsum(
            "bld,de->ble", x_BLD.astype(kernel.dtype), kernel, precision=jax.lax.Precision.HIGHEST
        )
        p_BLE = jax.nn.softmax(checkpoint_name(logits_BLE, KEPT))
        choice_BLK = largest(jax.lax.stop_gradient(p_BLE), K)
        gate_BLK = (p_BLE[:, :, None] * one_hot(choice_BLK, E)).sum(-1)
        if K > 1:
            gate_BLK = gate_BLK / gate_BLK.sum(-1, keepdims=True)
        choice_BLK = jnp.where(real_BL[..., None], choice_BLK, E)
        self.sow("intermediates", "experts", choice_BLK)
        self._score(logits_BLE, p_BLE, choice_BLK, real_BL)
        return choice_BLK, gate_BLK

    def _score(self, logits_BLE, p_BLE, choice_BLK, real_BL) -> None:
        """Sow the losses, means over rows of means over their tokens, and how uneven the load is."""
        E, K = self.num_experts, self.experts_per_token
        real_BL = real_BL.astype(p_BLE.dtype)
        tokens_B1 = jnp.maximum(real_BL.sum(1, keepdims=True), 1.0)
        rows = jnp.maximum((real_BL > 0).any(1).sum(dtype=jnp.float32), 1.0)
        count_BE = ranks(choice_BLK, E)[1].astype(jnp.float32)
        p_BE = (p_BLE * real_BL[..., None]).sum(1) / tokens_B1
        balance_B = E * (count_BE / (K * tokens_B1) * p_BE).sum(1)
        z_BL = real_BL * jnp.square(jax.nn.logsumexp(logits_BLE, axis=-1))
        for name, loss_B in (
            ("balance_loss", balance_B),
            ("router_z_loss", z_BL.sum(1) / tokens_B1[:, 0]),
        ):
            if weight := getattr(self, name):
                self.sow("losses", name, (weight * loss_B.sum(), rows))
        # Of each row, so that no batch size changes it.
        self.sow("reports", "expert_load", (count_BE.max(1).sum(), count_BE.mean(1).sum()))


class Kernel(nn.Module):
    """A kernel by itself, `fsdp` gathered, for a product that `lm.nn.linear.Linear` does not have.

    Of values that `dtype` has, in the parameter's own type: so wide is the sum of its gradient.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: jnp.dtype
    kernel_init: Callable

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, self.shape)
        return sharding.gather(kernel, self.axes, self.dtype)


def capacity(length: int, experts_per_token: int, num_experts: int, factor: float) -> int:
    """Return how many tokens of a row of `length` an expert has room for: at least one, at most all."""
    return min(length, max(1, math.ceil(factor * length * experts_per_token / num_experts)))


def one_hot(choice_BLK: jax.Array, num_experts: int) -> jax.Array:
    """Return bool [B, L, K, E]; nothing is set where the choice is none of the experts."""
    return choice_BLK[..., None] == jnp.arange(num_experts)[None, None, None]


def largest(p_BLE: jax.Array, count: int) -> jax.Array:
    """Return the experts [B, L, K] of the largest p, largest first; of equals the first.

    By K reductions, which the partitioner leaves on each device's rows; K is small.
    """
    found = []
    for _ in range(count):
        found.append(jnp.argmax(p_BLE, axis=-1))
        p_BLE = jnp.where(one_hot(found[-1][..., None], p_BLE.shape[-1])[:, :, 0], -1.0, p_BLE)
    return jnp.stack(found, axis=-1)


def ranks(choice_BLK: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Return how many earlier tokens of a row chose the same expert [B, L, K], and all that did [B, E]."""
    chosen_BLKE = one_hot(choice_BLK, num_experts)
    chosen_BLE = chosen_BLKE.sum(2, dtype=jnp.int32)
    before_BLE = jnp.cumsum(chosen_BLE, axis=1) - chosen_BLE
    return (before_BLE[:, :, None] * chosen_BLKE).sum(-1), chosen_BLE.sum(1)


def invert(slot_BLK: jax.Array, num_slots: int) -> jax.Array:
    """Return which choice (a number below L K) lies in each slot [B, M]; L K where none does."""
    flat_BN = slot_BLK.reshape(len(slot_BLK), -1)
    numbers_N = jnp.arange(flat_BN.shape[1])
    empty_M = jnp.full(num_slots, len(numbers_N))
    return jax.vmap(lambda slot_N: empty_M.at[slot_N].set(numbers_N, mode="drop"))(flat_BN)


@jax.custom_vjp
def take(x_BND: jax.Array, index_BM: jax.Array, back_BNR: jax.Array) -> jax.Array:
    """Return x[index] [B, M, D], zeros where the index is N.

    `back` says for each n in which of the M it lies, M being nowhere, so that the gradient is taken too and
    never scattered: the order of its sums is fixed, on every device.
    """
    return _take(x_BND, index_BM)


def _take(x_BND, index_BM):
    return jnp.take_along_axis(x_BND, index_BM[..., None], axis=1, mode="fill", fill_value=0)


def _take_backward(back_BNR, dy_BMD):
    B, N, R = back_BNR.shape
    return _take(dy_BMD, back_BNR.reshape(B, N * R)).reshape(B, N, R, -1).sum(2), None, None


take.defvjp(lambda x, index, back: (_take(x, index), back), _take_backward)


def send(x_BLD: jax.Array, slot_BLK: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array]:
    """Return tokens in their slots [B, M, D], and which choice lies in each [B, M]."""
    choice_BM = invert(slot_BLK, num_slots)
    return take(x_BLD, choice_BM // slot_BLK.shape[2], slot_BLK), choice_BM


def collect(y_BMD: jax.Array, slot_BLK: jax.Array, choice_BM: jax.Array, gate_BLK) -> jax.Array:
    """Return each token's weighted sum [B, L, D] of what lies in its slots."""
    B, L, K = slot_BLK.shape
    y_BND = take(y_BMD, slot_BLK.reshape(B, L * K), choice_BM[..., None])
    # Term by term: XLA on a CPU takes 15 times as long for one sum, into which it draws the indexing.
    terms = [y_BND[:, k::K] * gate_BLK[..., k : k + 1] for k in range(K)]
    return sum(terms[1:], terms[0])


def activate(h: jax.Array, activation: str) -> jax.Array:
    """Return act(h[..., F]), or of h[..., 2, F] act(gate) * value."""
    act = ACTIVATIONS[activation]
    return act(h[..., 0, :]) * h[..., 1, :] if activation in GATED else act(h)


def rooms(choice_BLK: jax.Array, num_experts: int, room: int) -> tuple[jax.Array, jax.Array]:
    """Return the slot of each choice [B, L, K] among E `room`, and how many were dropped, padding apart.

    The slot is E `room` where there is none.
    """
    rank_BLK, _ = ranks(choice_BLK, num_experts)
    sent_BLK = choice_BLK < num_experts
    kept_BLK = sent_BLK & (rank_BLK < room)
    slot_BLK = jnp.where(kept_BLK, choice_BLK * room + rank_BLK, num_experts * room)
    return slot_BLK, (sent_BLK & ~kept_BLK).sum(dtype=jnp.float32)


def with_room(x_BLD, slot_BLK, gate_BLK, up, down, activation: str, room: int) -> jax.Array:
    """Return [B, L, D] of tokens in slots (`rooms`): in every row each expert has as many.

    The slots are first split as the batch is, then by experts: the partitioner makes that an all-to-all, and
    another one of the way back.
    """
    B, _, D = x_BLD.shape
    E = up.shape[0]
    x_BMD, choice_BM = send(x_BLD, slot_BLK, E * room)
    x_BECD = sharding.constrain(x_BMD.reshape(B, E, room, D), "act_batch", None, None, "act_embed")
    split = ("act_experts", "act_groups", None)
    x_EBCD = sharding.constrain(x_BECD.swapaxes(0, 1), *split, "act_embed")
    h = einsum("ebcd,edgf->ebcgf" if up.ndim == 4 else "ebcd,edf->ebcf", x_EBCD, up)
    h = sharding.constrain(h, *split, *(None,) * (h.ndim - 4), "act_mlp")
    y_EBCD = einsum("ebcf,efd->ebcd", activate(h, activation), down)
    y_EBCD = sharding.constrain(y_EBCD, *split, "act_embed")
    y_BECD = sharding.constrain(y_EBCD.swapaxes(0, 1), "act_batch", None, None, "act_embed")
    return collect(y_BECD.reshape(B, E * room, D), slot_BLK, choice_BM, gate_BLK)


def dropless(x_BLD, choice_BLK, gate_BLK, up, down, activation: str) -> jax.Array:
    """Return [B, L, D]; every device sorts the tokens it has by expert, and each expert takes its own.

    Where experts are split over n devices, each first gathers the tokens of all n, computes what its experts
    add to them, and the sums are scattered back: exact whatever the load, with (n - 1) tokens a token on the
    wire each way where capacity has up to k capacity_factor, and slots for n times the tokens.
    """
    tokens = ("act_batch", "act_length")
    gate_axis = ("gate",) if up.ndim == 4 else ()
    run = collectives.on_shards(
        functools.partial(_dropless, activation=activation),
        (
            (*tokens, None),
            (*tokens, None),
            (*tokens, None),
            ("experts", None, *gate_axis, "mlp"),
            ("experts", "mlp", None),
        ),
        (*tokens, None),
    )
    return run(x_BLD, choice_BLK, gate_BLK, up, down)


def _dropless(x_BLD, choice_BLK, gate_BLK, up, down, *, activation):
    x_BLD, choice_BLK, gate_BLK = (
        collectives.all_gather(array, "experts") for array in (x_BLD, choice_BLK, gate_BLK)
    )
    (B, L, K), D, E = choice_BLK.shape, x_BLD.shape[-1], up.shape[0]
    x_1ND = x_BLD.reshape(1, B * L, D)
    choice_1NK = choice_BLK.reshape(1, B * L, K) - collectives.part_number("experts") * E
    # A token is sent to an expert once: no more than this can come here.
    most = B * L * min(K, E)
    block = block_rows(most, E)
    num_slots = -(-(most + E * (block - 1)) // block) * block
    rank_1NK, count_1E = ranks(choice_1NK, E)
    size_E = -(-count_1E[0] // block) * block
    here_1NK = (choice_1NK >= 0) & (choice_1NK < E)
    start_1NK = jnp.take(jnp.cumsum(size_E) - size_E, choice_1NK, mode="clip")
    slot_1NK = jnp.where(here_1NK, start_1NK + rank_1NK, num_slots)
    x_1MD, choice_1M = send(x_1ND, slot_1NK, num_slots)
    h = grouped_product(x_1MD[0], up.reshape(E, D, -1), size_E, block)
    h_MF = activate(h.reshape(-1, *up.shape[2:]), activation)
    y_MD = grouped_product(h_MF, down, size_E, block)
    y_1ND = collect(y_MD[None], slot_1NK, choice_1M, gate_BLK.reshape(1, B * L, K))
    y_BLD = collectives.all_reduce(y_1ND.reshape(B, L, D), "mlp")
    return collectives.reduce_scatter(y_BLD, "experts")
