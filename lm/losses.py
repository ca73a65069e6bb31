"""The loss of every task: weighted cross-entropy, a chunk of positions at a time.

Logits of a whole batch, [B, L, V] in float32, are the largest array of a small language model. Here
they never exist: a loop over chunks along L makes the logits of a chunk, their loss and, where a
gradient is asked for, the gradient of features and head in the same pass. So nothing is computed
twice, and each device's rows stay with it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from lm import collectives, sharding

# Bytes of one chunk's float32 logits on one device. On a CPU as measured: at vocabulary 50,304 and
# width 768 less is slower, more costs memory alone. Elsewhere the [V, D] gradient that each chunk
# reads and writes outweighs its matrix products unless a chunk has thousands of tokens.
CPU_CHUNK_BYTES = 160 * 2**20
ACCELERATOR_CHUNK_BYTES = 2**30

Params = Any
LogitsFn = Callable[[Params, jax.Array], jax.Array]


def cross_entropy(
    logits_fn: LogitsFn,
    params: Params,
    x_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    max_scored: int,
    vocab_size: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int = 0,
    shards: int = 1,
    whole_rows: bool = False,
    by_row: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted sum of the objective over a batch, and the sums to report, in nats.

    With p = softmax(logits), V real words and s = `label_smoothing`, a position of weight 1 adds
    `-(1 - s) log p[target] - s / V sum_v log p[v] + z_loss (log sum_v exp logits[v])**2`.
    The z-loss is that of PaLM (arXiv 2204.02311), smoothing that of arXiv 1512.00567.

    Args:
      logits_fn: takes (params, x[B, c, D]) to float32 logits [B, c, V]; it may use any part of
        `params`, and must reach what is learned through `params` and `x` alone.
      params: a tree; parts that `logits_fn` does not use cost nothing.
      x_BLD: features, of any float type.
      targets_BL: int32.
      weights_BL: float32; 0 is not scored. No gradient flows to it.
      max_scored: static bound on scored positions of a row. Below L, the scored ones are gathered
        first; a row that breaks the bound makes the loss NaN.
      vocab_size: the real columns of the logits, for label smoothing; 0 = all.
      chunk: positions of a row that have logits at once; 0 = as many as a budget of bytes holds.
      shards: over how many devices a chunk's logits are split.
      whole_rows: also count the rows whose scored positions are all right.
      by_row: also return the loss of each row.

    Returns:
      The objective's sum, which alone has a gradient, and float32 sums by name: `loss` (pure
      cross-entropy), `weight`, `correct` (weight where the target is the most probable; of k equally
      probable a k-th of it), `z_loss`; with `whole_rows`, `exact` and `rows`; with `by_row`, `loss_B`.
    """
    x_BLD, targets_BL, weights_BL = _gather_scored(x_BLD, targets_BL, weights_BL, max_scored)
    spec = jax.eval_shape(logits_fn, params, x_BLD)
    head, used = _only_used(logits_fn, params, x_BLD)
    terms = functools.partial(
        _terms,
        vocab_size=vocab_size or spec.shape[-1],
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        whole_rows=whole_rows,
        by_row=by_row,
    )
    # Chunks of equal length, so that padding is fewer positions than there are chunks.
    num_chunks = -(-spec.shape[1] // (chunk or _chunk_of(spec.shape, shards)))
    parts = sharding.length_parts()  # of each of them a chunk has as many positions
    weights_BL = jax.lax.stop_gradient(weights_BL).astype(jnp.float32)
    plan = head, terms, (num_chunks, parts if spec.shape[1] % parts == 0 else 1)
    objective, sums = _sum_over_chunks(plan, used, x_BLD, targets_BL, weights_BL)
    return objective, _count_rows(sums, weights_BL) if whole_rows else sums


def _count_rows(sums: dict[str, jax.Array], weights_BL: jax.Array) -> dict[str, jax.Array]:
    """Turn `wrong` [B], the weight that each row got wrong, into `exact` and `rows`."""
    scored_B = weights_BL.sum(axis=1) > 0
    right_B = scored_B & (sums.pop("wrong") == 0)
    return {
        **sums,
        "exact": right_B.sum(dtype=jnp.float32),
        "rows": scored_B.sum(dtype=jnp.float32),
    }


def _chunk_of(shape: tuple[int, ...], shards: int) -> int:
    """Return how many positions of logits [B, L, V] a budget of bytes holds at once."""
    num_rows, _, width = shape
    on_cpu = jax.default_backend() == "cpu"
    budget = CPU_CHUNK_BYTES if on_cpu else ACCELERATOR_CHUNK_BYTES
    return max(1, budget * shards // (4 * num_rows * width))


def _gather_scored(
    x_BLD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, max_scored: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the scored positions of each row, in order, at the row's start.

    S is `max_scored` or, where positions are split, the next number that splits as they do; rows that
    are no longer stay as they are.
    """
    num = -(-max_scored // sharding.length_parts()) * sharding.length_parts()
    if num >= x_BLD.shape[1]:
        return x_BLD, targets_BL, weights_BL
    # Whole rows of numbers are little; only features are picked where they are.
    whole = lambda array: sharding.constrain(array, "act_batch", None)  # noqa: E731
    targets_BL, weights_BL = whole(targets_BL), whole(weights_BL)
    scored_BL = whole(weights_BL != 0)
    index_BS = whole(jnp.argsort(whole(~scored_BL), axis=1, stable=True)[:, :num])
    kept_BS = whole(jnp.take_along_axis(weights_BL, index_BS, axis=1))
    broken_B1 = scored_BL.sum(axis=1, keepdims=True) > max_scored
    return (
        _take(x_BLD, index_BS),
        jnp.take_along_axis(targets_BL, index_BS, axis=1),
        jnp.where(broken_B1, jnp.nan, kept_BS),
    )


def _take(x_BLD: jax.Array, index_BS: jax.Array) -> jax.Array:
    """Return x[b, index[b, s]], [B, S, D]; where positions are split, a part of S to each device."""
    if sharding.length_parts() == 1:
        return jnp.take_along_axis(x_BLD, index_BS[..., None], axis=1)

    def pick(x_BLD, index_BS):
        """Give what is here of every position, and keep what all have found of this part's."""
        length = x_BLD.shape[1]
        place_BS1 = (index_BS - collectives.part_number("act_length") * length)[..., None]
        here_BS1 = (place_BS1 >= 0) & (place_BS1 < length)
        found = jnp.take_along_axis(x_BLD, jnp.clip(place_BS1, 0, length - 1), axis=1)
        found_SBD = jnp.where(here_BS1, found, 0).swapaxes(0, 1)
        return collectives.reduce_scatter(found_SBD, "act_length").swapaxes(0, 1)

    features = ("act_batch", "act_length", None)
    return collectives.on_shards(pick, [features, ("act_batch", None)], features)(x_BLD, index_BS)


def _only_used(
    logits_fn: LogitsFn, params: Params, x_BLD: jax.Array
) -> tuple[LogitsFn, list[jax.Array]]:
    """Return `logits_fn` as a function of the leaves of `params` that it uses, and those leaves."""
    leaves = jax.tree.leaves(params)
    jaxpr = jax.make_jaxpr(logits_fn)(params, x_BLD).jaxpr
    _, is_used = partial_eval.dce_jaxpr(jaxpr, [True])
    used = [i for i in range(len(leaves)) if is_used[i]]
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

    def head(used_leaves: list[jax.Array], x_BcD: jax.Array) -> jax.Array:
        given = dict(zip(used, used_leaves, strict=True))
        # What the head does not use may be anything: XLA drops it.
        full = [given.get(i, jnp.zeros(s.shape, s.dtype)) for i, s in enumerate(shapes)]
        return logits_fn(jax.tree.unflatten(jax.tree.structure(params), full), x_BcD)

    return head, [leaves[i] for i in used]


def _terms(
    logits_BcV: jax.Array,
    targets_Bc: jax.Array,
    weights_Bc: jax.Array,
    *,
    vocab_size: int,
    z_loss: float,
    label_smoothing: float,
    whole_rows: bool,
    by_row: bool,
) -> tuple[jax.Array, dict[str, jax.Array], Callable[[], jax.Array]]:
    """Return a chunk's objective, its sums, and what makes the gradient of the logits."""
    max_Bc1 = logits_BcV.max(axis=-1, keepdims=True)
    exp_BcV = jnp.exp(logits_BcV - max_Bc1)
    sum_exp_Bc = exp_BcV.sum(axis=-1)
    lse_Bc = jnp.log(sum_exp_Bc) + max_Bc1[..., 0]
    target_Bc = jnp.take_along_axis(logits_BcV, targets_Bc[..., None], axis=-1)[..., 0]
    loss = jnp.sum(weights_Bc * (lse_Bc - target_Bc))
    best_Bc = (logits_BcV == max_Bc1).sum(axis=-1, dtype=jnp.float32)  # argmax is slow on a CPU
    correct = jnp.sum(jnp.where(target_Bc == max_Bc1[..., 0], weights_Bc / best_Bc, 0.0))
    penalty = jnp.sum(weights_Bc * (z_loss * lse_Bc**2))
    objective = loss + penalty
    if label_smoothing:
        mean_Bc = logits_BcV[..., :vocab_size].mean(axis=-1)
        objective += label_smoothing * jnp.sum(weights_Bc * (target_Bc - mean_Bc))

    def gradient() -> jax.Array:
        # From the exponentials at hand, and the target by scatter: on a CPU each further pass over
        # the vocabulary counts.
        slope_Bc = weights_Bc * (1 + 2 * z_loss * lse_Bc) / sum_exp_Bc
        d_BcV = exp_BcV * slope_Bc[..., None]
        if label_smoothing:
            real_11V = (jnp.arange(logits_BcV.shape[-1]) < vocab_size)[None, None]
            share_Bc1 = weights_Bc[..., None] * (label_smoothing / vocab_size)
            d_BcV -= jnp.where(real_11V, share_Bc1, 0.0)
        wanted_Bc = weights_Bc * (1 - label_smoothing)
        # vmap makes B and c batch axes of the scatter, which the partitioner leaves where they are.
        subtract = jax.vmap(jax.vmap(lambda d_V, target, wanted: d_V.at[target].add(-wanted)))
        return subtract(d_BcV, targets_Bc, wanted_Bc)

    sums = {"loss": loss, "correct": correct, "z_loss": penalty, "weight": weights_Bc.sum()}
    if whole_rows:
        sums["wrong"] = jnp.sum(weights_Bc * (target_Bc < max_Bc1[..., 0]), axis=1)
    if by_row:
        sums["loss_B"] = jnp.sum(weights_Bc * (lse_Bc - target_Bc), axis=1)
    return objective, sums, gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_chunks(plan, used, x_BLD, targets_BL, weights_BL):
    """Return (objective, sums) over all chunks, from the loss alone."""
    head, terms, cut = plan

    def one(inputs):
        x_BcD, targets_Bc, weights_Bc = inputs
        objective, sums, _ = terms(head(used, x_BcD), targets_Bc, weights_Bc)
        return (objective, sums), ()

    (objective, sums), _ = _over_chunks(one, cut, (x_BLD, targets_BL, weights_BL))
    return objective, sums


def _sum_and_gradient(plan, used, x_BLD, targets_BL, weights_BL):
    """Return what `_sum_over_chunks` does, and the gradient of the objective, in one pass."""
    head, terms, cut = plan

    def one(inputs):
        x_BcD, targets_Bc, weights_Bc = inputs
        logits_BcV, pull = jax.vjp(head, used, x_BcD)
        objective, sums, gradient = terms(logits_BcV, targets_Bc, weights_Bc)
        d_used, dx_BcD = pull(gradient())
        return (objective, sums, d_used), dx_BcD

    (objective, sums, d_used), dx_BLD = _over_chunks(one, cut, (x_BLD, targets_BL, weights_BL))
    return (objective, sums), (d_used, dx_BLD)


def _scale_gradient(plan, gradients, cotangents):
    del plan
    scale, _ = cotangents
    d_used, dx_BLD = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients)
    return d_used, dx_BLD, None, None


_sum_over_chunks.defvjp(_sum_and_gradient, _scale_gradient)


def _over_chunks(one, cut: tuple[int, int], arrays):
    """Sum `one`'s first result over chunks of `arrays` along L, and join its second.

    `cut` is (chunks, equal parts of L, of each of which a chunk has a share).
    """
    num_chunks, parts = cut
    length = arrays[0].shape[1] // parts
    if num_chunks == 1:
        return one(arrays)
    chunk = -(-length // num_chunks)
    padding = num_chunks * chunk - length

    def split(array):
        num_rows, rest = array.shape[0], array.shape[2:]
        array = array.reshape(num_rows, parts, length, *rest)
        array = jnp.pad(array, ((0, 0), (0, 0), (0, padding), *((0, 0),) * len(rest)))
        array = array.reshape(num_rows, parts, num_chunks, chunk, *rest)
        return jnp.moveaxis(array, 2, 0).reshape(num_chunks, num_rows, parts * chunk, *rest)

    def join(array):
        num_rows, rest = array.shape[1], array.shape[3:]
        array = array.reshape(num_chunks, num_rows, parts, chunk, *rest)
        array = jnp.moveaxis(array, 0, 2).reshape(num_rows, parts, -1, *rest)[:, :, :length]
        return array.reshape(num_rows, parts * length, *rest)

    def add(total, inputs):
        part, rest = one(inputs)
        return jax.tree.map(jnp.add, total, part), rest

    chunks = jax.tree.map(split, arrays)
    shapes, _ = jax.eval_shape(one, jax.tree.map(lambda a: a[0], chunks))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, rest = jax.lax.scan(add, zeros, chunks)
    return total, jax.tree.map(join, rest)
