"""Attention across devices that hold parts of a row: no array of all pairs of positions exists.

Ring: "Ring Attention with Blockwise Transformers for Near-Infinite Context", Liu et al. 2023 (arXiv
2310.01889): keys and values go from device to device, and each adds to the statistics of its queries'
softmax (running maximum, sum, sum of values). Gather: all keys and values are collected first, as "The
Llama 3 Herd of Models" does, 2024 (arXiv 2407.21783, section 3.3.2).

What differs: both run the same blocks, in the same order. A device holds an early and a late chunk of each
row (`lm.placement.columns`), so that under a causal mask the blocks that are left out are as many on each.
The gradient is by hand: of the forward pass queries, keys, values, output and one number a query are
kept, all of them parts of a row; keys and values go round again, the sums of their gradients with
them (ring), or are collected again and the gradients summed and split (gather).

Letters: Q = R heads of a group times the positions of a chunk of queries, C the keys of a tile.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lm import collectives, sharding
from lm.nn.linear import wide

MASKED_SCORE = -1e30  # finite, so that a row with nothing to see gives numbers
WAYS = ("ring", "gather")
TILE = 1024  # keys that a chunk of queries attends to at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Which keys a query may see, where rows are split: what a mask [B, L, S] would be made of.

    Attributes:
      segments_BL: of the queries; None = segments do not matter.
      source_segments_BS: of the keys; a query sees those of its own segment.
      causal: no query sees a later key.
      window: how many positions a query sees, itself included; 0 = all.
    """

    segments_BL: jax.Array | None
    source_segments_BS: jax.Array | None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int = dataclasses.field(default=0, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when the program is made."""

    causal: bool
    window: int
    scale: float
    way: str


def choose_way(way: str, num_groups: int, num_heads: int) -> str:
    """Return `way`, or, of "", "gather" where all keys and values are no more than a device's queries."""
    small = 2 * num_groups * sharding.length_parts() <= num_heads
    return way or ("gather" if small else "ring")


def attend(query, key, value, pairs: Pairs, *, values_HW=None, scale: float = 0.0, way: str = ""):
    """Return softmax(scale query key^T + bias) value, [B, G, R, L, K], of rows placed by `place_batch`.

    Args:
      query: [B, G, R, L, K], R query heads for each of G key-value heads.
      key, value: [B, G, S, K].
      values_HW: float32 [H, 2 L], the bias of each distance (key minus query) from 1 - L to L, or None.
      scale: of the scores; 0 = 1 / sqrt(K).
      way: "ring" or "gather"; "" = see `choose_way`.
    """
    _, G, R, _, K = query.shape
    way = choose_way(way, G, G * R)
    plan = Plan(pairs.causal, pairs.window, scale or K**-0.5, way)
    heads = ("act_batch", "act_heads", None, "act_length", None)
    keys = ("act_batch", "act_heads", "act_length", None)
    arrays = {
        "query": (query, heads),
        "key": (key, keys),
        "value": (value, keys),
        "segments": (pairs.segments_BL, ("act_batch", "act_length")),
        "source_segments": (pairs.source_segments_BS, ("act_batch", None)),
        "bias": (
            None if values_HW is None else values_HW.reshape(G, R, -1),
            ("act_heads", None, None),
        ),
    }
    given = {name: pair for name, pair in arrays.items() if pair[0] is not None}

    def local(*parts):
        return _attend(plan, dict.fromkeys(arrays) | dict(zip(given, parts, strict=True)))

    mapped = collectives.on_shards(
        local,
        [sharding.fitting(array.shape, axes) for array, axes in given.values()],
        sharding.fitting(query.shape, heads),
    )
    return mapped(*[array for array, _ in given.values()])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, parts):
    return _forward(plan, parts)[0]


def _forward(plan: Plan, parts):
    """Return the output of this device's queries, and what the gradient needs."""
    query_2BGQK = _halves(parts["query"] * plan.scale)
    shape = query_2BGQK.shape
    dtype = wide(query_2BGQK.dtype)
    most = jnp.full((*shape[:-1], 1), MASKED_SCORE, dtype)
    total, out = jnp.zeros((*shape[:-1], 1), dtype), jnp.zeros(shape, dtype)
    for owner, held, blocks in _rounds(plan, parts):
        for a, b in blocks:

            def add(tile, state, a=a, b=b, owner=owner, held=held):
                """Add a tile of keys to the statistics of a half of the queries."""
                before, total, out = state
                (key_BGCK, value_BGCK), at = _tile(held, b, tile)
                scores, _ = _scores(plan, parts, query_2BGQK[a], key_BGCK, a, owner, b, at)
                after = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
                exp_BGQC, shrink = jnp.exp(scores - after), jnp.exp(before - after)
                product = jnp.einsum(
                    "bgqc,bgck->bgqk",
                    exp_BGQC.astype(value_BGCK.dtype),
                    value_BGCK,
                    preferred_element_type=dtype,
                )
                total = total * shrink + exp_BGQC.sum(axis=-1, keepdims=True)
                return after, total, out * shrink + product

            state = _over_tiles(held, add, (most[a], total[a], out[a]))
            most, total, out = (
                array.at[a].set(new) for array, new in zip((most, total, out), state, strict=True)
            )
    out = _joined((out / total).astype(query_2BGQK.dtype), parts["query"])
    return out, (parts, out, most + jnp.log(total))


def _backward(plan: Plan, kept, dout):
    """Return the gradients of this device's queries, keys and values, and its share of the bias's."""
    parts, out, log_total = kept
    # Behind the barrier they go round again; else XLA keeps all that came in the forward pass. On a CPU it
    # still does before jax 0.12, where layers are not scanned: it takes barriers out too early.
    names = ("key", "value")
    *arrays, dout = jax.lax.optimization_barrier((*[parts[name] for name in names], dout))
    parts = parts | dict(zip(names, arrays, strict=True))
    query_2BGQK = _halves(parts["query"] * plan.scale)
    dtype = wide(query_2BGQK.dtype)
    dout_2BGQK = _halves(dout)
    inner = (dout_2BGQK.astype(dtype) * _halves(out)).sum(axis=-1, keepdims=True)
    dquery = jnp.zeros(query_2BGQK.shape, dtype)
    dbias = None if parts["bias"] is None else jnp.zeros_like(parts["bias"])
    gradients = _Returned(plan, jnp.zeros((2, *parts["key"].shape), dtype))
    for owner, held, blocks in _rounds(plan, parts):
        dheld = jnp.zeros(held.shape, dtype)
        for a, b in blocks:

            def add(tile, state, a=a, b=b, owner=owner, held=held):
                """Add what a tile of keys and a half of the queries give to the gradients."""
                dquery, dheld, dbias = state
                (key_BGCK, value_BGCK), at = _tile(held, b, tile)
                scores, seen = _scores(plan, parts, query_2BGQK[a], key_BGCK, a, owner, b, at)
                share = jnp.exp(scores - log_total[a])
                dshare = jnp.einsum(
                    "bgqk,bgck->bgqc", dout_2BGQK[a], value_BGCK, preferred_element_type=dtype
                )
                dscores = jnp.where(seen, share * (dshare - inner[a]), 0)
                if dbias is not None:
                    dbias = _add_to_bias(dbias, dscores, parts, a, owner, b, at)
                share, dscores = share.astype(value_BGCK.dtype), dscores.astype(key_BGCK.dtype)
                dkey = jnp.einsum(
                    "bgqc,bgqk->bgck", dscores, query_2BGQK[a], preferred_element_type=dtype
                )
                dvalue = jnp.einsum(
                    "bgqc,bgqk->bgck", share, dout_2BGQK[a], preferred_element_type=dtype
                )
                change = jnp.einsum(
                    "bgqc,bgck->bgqk", dscores, key_BGCK, preferred_element_type=dtype
                )
                dheld = _add_tile(dheld, jnp.stack([dkey, dvalue]), b, at)
                return dquery.at[a].add(change), dheld, dbias

            dquery, dheld, dbias = _over_tiles(held, add, (dquery, dheld, dbias))
        gradients.add(owner, dheld)
    dkey, dvalue = gradients.at_home().astype(parts["key"].dtype)
    dquery = (_joined(dquery, parts["query"]) * plan.scale).astype(parts["query"].dtype)
    gradient = {"query": dquery, "key": dkey, "value": dvalue, "bias": dbias}
    return ({"segments": None, "source_segments": None} | gradient,)


_attend.defvjp(_forward, _backward)


def _rounds(plan: Plan, parts) -> Iterator[tuple]:
    """Yield (owner, its keys and values [2, B, G, S, K], blocks), this device's own first.

    A block is a pair of halves, of the queries and of the keys; a half may be known when it runs only.
    """
    num, here = collectives.num_parts("act_length"), collectives.part_number("act_length")
    held = jnp.stack([parts["key"], parts["value"]])
    everyone = collectives.all_gather(held[None], "act_length") if plan.way == "gather" else None
    for turn in range(num):
        owner = (here - turn) % num
        blocks = [(0, 0), (1, 1), (1, 0)] if plan.causal else [(0, 0), (0, 1), (1, 0), (1, 1)]
        if turn and plan.causal:
            # The late half sees any early one; of the other pairs either early sees early or late late.
            same = jnp.where(owner < here, 0, 1)
            blocks = [(1, 0), (same, same)]
        if everyone is not None:
            yield owner, everyone[owner] if turn else held, blocks
            continue
        coming = (
            collectives.pass_on(held, "act_length") if turn < num - 1 else None
        )  # while these are used
        yield owner, held, blocks
        held = coming


class _Returned:
    """Gradients of keys and values on their way to the device that owns them."""

    def __init__(self, plan: Plan, zeros):
        self._gather, self._num = plan.way == "gather", collectives.num_parts("act_length")
        self._sum = jnp.zeros((self._num, *zeros.shape), zeros.dtype) if self._gather else zeros
        self._turn = 0

    def add(self, owner, dheld) -> None:
        """Add what this device has found for `owner`, whose turn it is."""
        if self._gather:
            self._sum = self._sum.at[owner].add(dheld)
            return
        if self._turn:
            self._sum = collectives.pass_on(self._sum, "act_length")
        self._sum, self._turn = self._sum + dheld, self._turn + 1

    def at_home(self):
        """Return the sum of what all devices have found for this one."""
        if self._gather:
            return collectives.reduce_scatter(self._sum, "act_length")[0]
        return collectives.pass_on(self._sum, "act_length") if self._num > 1 else self._sum


def _over_tiles(held, add, state):
    """Return `state` after `add(tile, state)` for each tile of a half of the keys that are `held`."""
    num = _num_tiles(held)
    return jax.lax.fori_loop(0, num, add, state) if num > 1 else add(0, state)


def _num_tiles(held) -> int:
    """Return in how many equal tiles, of at most TILE keys where that divides, a half is taken."""
    size = held.shape[3] // 2
    return next((n for n in range(-(-size // TILE), size) if size % n == 0), 1)


def _tile(held, half, tile):
    """Return (keys, values) [2, B, G, C, K] of a tile of a half, and where in the half it begins."""
    size = held.shape[3] // 2
    width = size // _num_tiles(held)
    return jax.lax.dynamic_slice_in_dim(held, half * size + tile * width, width, 3), tile * width


def _add_tile(held, change, half, at):
    """Add to the tile of a half that begins `at`."""
    start = half * (held.shape[3] // 2) + at
    old = jax.lax.dynamic_slice_in_dim(held, start, change.shape[3], axis=3)
    return jax.lax.dynamic_update_slice_in_dim(held, old + change, start, axis=3)


def _scores(plan: Plan, parts, query_BGQK, key_BGCK, a, owner, b, at):
    """Return (scores [B, G, Q, C] of half `a` of the queries and a tile of half `b` of the owner's keys,
    which of them are seen)."""
    _, G, Q, _ = query_BGQK.shape
    R, C = parts["query"].shape[2], key_BGCK.shape[2]
    size, size_of_keys = Q // R, parts["key"].shape[2] // 2
    scores = jnp.einsum(
        "bgqk,bgck->bgqc", query_BGQK, key_BGCK, preferred_element_type=wide(key_BGCK.dtype)
    )
    here = collectives.part_number("act_length")
    query_at, key_at = _chunk(here, a) * size, _chunk(owner, b) * size_of_keys + at
    if parts["bias"] is not None:
        bias = _diagonals(parts["bias"], key_at - query_at, (size, C))
        scores = scores + bias.reshape(1, G, Q, C)
    distance = query_at + jnp.arange(size)[:, None] - key_at - jnp.arange(C)[None]
    seen = jnp.ones((1, size, C), bool)
    if plan.causal:
        seen &= (distance >= 0)[None]
    if plan.window:
        seen &= (distance < plan.window)[None]
    if parts["segments"] is not None:
        mine = jax.lax.dynamic_slice_in_dim(parts["segments"], a * size, size, axis=1)
        start = (2 * owner + b) * size_of_keys + at
        theirs = jax.lax.dynamic_slice_in_dim(parts["source_segments"], start, C, axis=1)
        seen = seen & (mine[:, :, None] == theirs[:, None, :])
    seen = jnp.tile(seen, (1, R, 1))[:, None]
    return jnp.where(seen, scores, MASKED_SCORE), seen


def _chunk(part, half):
    """Return which chunk of the row is the early (0) or late (1) half of a device's part."""
    last = 2 * collectives.num_parts("act_length") - 1
    return jnp.where(jnp.asarray(half) == 0, part, last - part)


def _diagonals(bias_GRW, distance, shape: tuple[int, int]):
    """Return [G, R, *shape], element (q, c) the value of `distance` + c - q of those from 1 - W / 2 on."""
    (G, R, W), (rows, width) = bias_GRW.shape, shape
    start = distance - (rows - 1) + (W // 2 - 1)
    part = jax.lax.dynamic_slice_in_dim(bias_GRW, start, rows + width, axis=2)
    flat = jnp.broadcast_to(part[:, :, None], (G, R, rows, rows + width)).reshape(G, R, -1)
    flat = flat[..., rows - 1 :][..., : rows * (rows + width - 1)]
    return flat.reshape(G, R, rows, rows + width - 1)[..., :width]


def _add_to_bias(dbias_GRW, dscores_BGQC, parts, a, owner, b, at):
    """Add to the gradient of each distance's value that of a tile's scores."""
    size, C = parts["key"].shape[2] // 2, dscores_BGQC.shape[-1]
    distance = (
        _chunk(owner, b) * size + at - _chunk(collectives.part_number("act_length"), a) * size
    )
    pull = jax.linear_transpose(lambda bias: _diagonals(bias, distance, (size, C)), dbias_GRW)
    (change,) = pull(dscores_BGQC.sum(axis=0).reshape(*dbias_GRW.shape[:2], size, C))
    return dbias_GRW + change


def _halves(x_BGRLK):
    """Return [2, B, G, Q, K]: the early and the late half of a device's positions."""
    B, G, R, L, K = x_BGRLK.shape
    halves = x_BGRLK.reshape(B, G, R, 2, L // 2, K)
    return jnp.moveaxis(halves, 3, 0).reshape(2, B, G, R * (L // 2), K)


def _joined(x_2BGQK, like):
    """Undo `_halves` for an array shaped `like`."""
    B, G, R, L, K = like.shape
    halves = x_2BGQK.reshape(2, B, G, R, L // 2, K)
    return jnp.moveaxis(halves, 0, 3).reshape(B, G, R, L, K)
