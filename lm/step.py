"""The training state, its sharded start, and the two pure steps: no config, no I/O, no logging."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from lm import losses, optim, sharding, spikes

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is at a step, but for its config.

    Attributes:
      step: number of steps passed, also those that were left out, int32.
      healthy: False from the first step on that was bad (not finite, or a spike): updates stop there.
      params: float32 parameters.
      opt_state: the optimizer's.
      ema: moving average of the parameters; {} when there is none.
      carry: recurrent state of the batch's rows between steps; {} when there is none.
      counts: what a family that learns by counting has seen; {} for the others.
      local: of groups that train apart, each one's parameters and optimizer (see `lm.local_steps`); then
        `params` and `opt_state` are those of the steps in which they meet. {} where none does.
      spikes: the running statistics that a spike is told by (see `lm.spikes`); {} where none is looked for.
    """

    step: jax.Array
    healthy: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    carry: Any
    counts: Any
    local: Any = dataclasses.field(default_factory=dict)
    spikes: Any = dataclasses.field(default_factory=dict)

    def averaged(self) -> Any:
        """Return the parameters to evaluate with: the average, where one is kept."""
        return self.ema or self.params


def learned(model: nn.Module, state: TrainState) -> Any:
    """Return the parameters to evaluate and generate with; those of a counting family are estimated here."""
    return model.estimate(state.counts) if model.learns == "counting" else state.averaged()


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: cross-entropy in nats a token, and its penalties.

    Attributes:
      max_scored: bound on the scored positions of a row.
      vocab_size: real tokens, without the padding of the vocabulary.
      z_loss: weight of log(Z)^2 (PaLM, arXiv 2204.02311).
      label_smoothing: share of the target's probability spread over the vocabulary (1512.00567).
      chunk: positions whose logits exist at a time; 0 = by memory.
      text_bytes: the scored targets are a text, so that bits per byte mean something.
      whole_rows: report the share of rows whose scored positions are all right.
      corpora: names of the corpora that `corpus` in a batch counts; each one's loss is reported.
    """

    max_scored: int
    vocab_size: int
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk: int = 0
    text_bytes: bool = True
    whole_rows: bool = False
    corpora: tuple[str, ...] = ()


def example_batch(model: nn.Module) -> Batch:
    """Return one short row of all that the family may read: parameters do not depend on its length."""
    names = ["inputs", "targets", "segments", "positions"]
    if "source" in model.accepts:
        names += ["source", "source_segments", "source_positions"]
    if "masked" in model.accepts:
        names += ["types"]
    batch = {name: jnp.zeros((1, 8), jnp.int32) for name in names}
    if "masked" in model.accepts:
        batch["labels"] = jnp.zeros((1,), jnp.int32)
    return {**batch, "weights": jnp.zeros((1, 8), jnp.float32)}


def init_variables(model: nn.Module, rng: jax.Array) -> Any:
    """Return the model's boxed variables, both of its calls made; no parameters where it counts."""
    if model.learns == "counting":
        return {"params": {}}
    batch = example_batch(model)
    return model.init(rng, batch, method=lambda module, batch: module.logits(module(batch)))


def parameter_axes(model: nn.Module) -> tuple[Any, Any]:
    """Return (logical axes, ShapeDtypeStructs) of the parameters, as trees alike."""
    boxed = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))["params"]
    return sharding.logical_axes(boxed), nn.unbox(boxed)


def make_init(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    shape: tuple[int, int, int],
    average: bool,
    stateful: bool,
    watched: bool = False,
) -> Callable[[], TrainState]:
    """Return the pure function that makes the state of step 0.

    `shape` is (steps, B, L) of all the batches that are to come: what a counting family records. `watched`
    for spikes, the state has what they are told by.
    """
    counting = model.learns == "counting"

    def init() -> TrainState:
        params = nn.unbox(init_variables(model, jax.random.key(seed)))["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            healthy=jnp.ones((), bool),
            params=params,
            opt_state=tx.init(params),
            ema=jax.tree.map(jnp.copy, params) if average else {},
            carry={"carry": nn.unbox(model.init_carry(shape[1]))} if stateful else {},
            counts=nn.unbox(model.init_counts(*shape)) if counting else {},
            spikes=spikes.begin() if watched else {},
        )

    return init


def begin_with(state: TrainState, params: Any) -> TrainState:
    """Return the state of step 0 with other parameters."""
    ema = jax.tree.map(jnp.copy, params) if state.ema else {}
    local = state.local
    if local:
        placed = jax.tree.map(lambda x: x.sharding, local["params"])
        copies = jax.jit(_broadcast, out_shardings=placed)(params, local["params"])
        local = {**local, "params": copies}
    return dataclasses.replace(state, params=params, ema=ema, local=local)


def _broadcast(params: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, copies: jnp.broadcast_to(x, copies.shape), params, like)


def state_shardings(mesh: Mesh, state: TrainState, axes: Any) -> TrainState:
    """Return the sharding of every leaf of the abstract `state`, from the parameters' logical `axes`.

    A leaf of the optimizer that ends with a parameter's path and has its shape lies as the parameter
    does; the rest (counts, factored statistics) is whole on every device. The carry lies as the batch,
    and so does each step's part of what a counting family has seen. What groups have each is split over
    them, and then lies so.

    Raises:
      ConfigError: a parameter cannot be split as its axes say.
    """
    params = sharding.shardings(mesh, axes, state.params)
    by_path = {
        sharding.path_name(path): (leaf.shape, placed)
        for (path, leaf), placed in zip(
            jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params), strict=True
        )
    }

    def like_parameter(path, leaf):
        for start in range(len(path)):
            shape, placed = by_path.get(sharding.path_name(path[start:]), (None, None))
            if shape == leaf.shape:
                return placed
        return sharding.replicated(mesh)

    def of_replicas(path, leaf):
        one = like_parameter(path, jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype))
        return sharding.stacked(one)

    return TrainState(
        step=sharding.replicated(mesh),
        healthy=sharding.replicated(mesh),
        params=params,
        opt_state=jax.tree.map_with_path(like_parameter, state.opt_state),
        ema=params if state.ema else {},
        carry=jax.tree.map(lambda _: sharding.batch_sharding(mesh), state.carry),
        counts=jax.tree.map(lambda _: sharding.batch_sharding(mesh, axis=1), state.counts),
        local=jax.tree.map_with_path(of_replicas, state.local),
        spikes=jax.tree.map(lambda _: sharding.replicated(mesh), state.spikes),
    )


def train_step(
    state, batch, *, model, objective, seed, accumulate=1, **how
) -> tuple[TrainState, Metrics]:
    """Do one update on a global batch (arrays [B, L]) and return the new state and its metrics.

    The batch is taken in `accumulate` parts whose gradients are summed and divided by the weight of
    the whole, so that the update is that of one big batch, ragged weights included. `how` is for `update`.
    """
    found = gradients(
        state, batch, model=model, objective=objective, seed=seed, accumulate=accumulate
    )
    return update(state, *found, objective=objective, **how)


def update(
    state, grads, carry, sums, *, tx, objective, ema_decay=0.0, schedule=None, limit=None
) -> tuple[TrainState, Metrics]:
    """Return the state after an update with the gradients, carry and sums of a batch, and its metrics.

    After a loss or gradient that is not finite, or a spike beyond `limit`, nothing changes any more, and
    `healthy` says so. `schedule` gives the learning rate to report.
    """
    grad_norm = optax.tree.norm(grads)
    sums, (loss_sum, weight) = dict(sums), sums["loss"]
    healthy = state.healthy & jnp.isfinite(loss_sum) & jnp.isfinite(grad_norm)
    running = state.spikes
    if limit is not None:
        value = grad_norm if limit.metric == "grad_norm" else loss_sum / weight
        value = jnp.where(weight > 0, value, jnp.nan)
        spike, zscore, running = spikes.look(running, value, limit)
        healthy &= ~spike
        sums["zscore"] = (zscore, jnp.ones(()))
    healthy = sharding.in_every_replica(healthy)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = (
        jax.tree.map(lambda e, p: e * ema_decay + p * (1 - ema_decay), state.ema, params)
        if state.ema
        else {}
    )
    new = TrainState(
        state.step + 1, healthy, params, opt_state, ema, carry, state.counts, spikes=running
    )
    kept = dataclasses.replace(state, healthy=healthy)
    new = jax.tree.map(lambda a, b: jnp.where(healthy, a, b), new, kept)
    one = jnp.ones(())
    sums |= {"grad_norm": (grad_norm, one), "tokens": (weight, one)}
    for name in objective.corpora:
        sums[f"{name}/tokens"] = (sums[f"{name}/loss"][1], one)
    if schedule is not None:  # made here: on the host it would wait behind the step that runs
        done = optim.updates_done(state.opt_state)  # fewer than steps where some were left out
        sums["learning_rate"] = (jnp.asarray(schedule(done), jnp.float32), one)
    return new, {**sums, "healthy": healthy}


def count_step(state: TrainState, batch: Batch, *, model: nn.Module) -> tuple[TrainState, Metrics]:
    """Record a global batch in the counts of a family that learns by counting."""
    _, new = model.apply(
        {"counts": state.counts}, batch, state.step, method="count", mutable=["counts"]
    )
    tokens = (batch["weights"].sum(), jnp.ones(()))
    state = dataclasses.replace(state, step=state.step + 1, counts=nn.unbox(new["counts"]))
    return state, {"tokens": tokens, "healthy": state.healthy}


def gradients(state, batch, *, model, objective, seed, accumulate=1, shard=None):
    """Return (gradients of the mean objective, new carry, metric sums) over the parts of a batch.

    Where it is a shard of one, `shard` is (its number, of how many, the weight of all).
    """
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    apart, num_shards, whole = shard or (sharding.replica(), 1, batch["weights"].sum())
    rng = rng if apart is None else jax.random.fold_in(rng, apart)
    whole, num_parts = jnp.maximum(whole, 1e-9), accumulate * num_shards

    def loss(params, part, carry, rng):
        objective_sum, (carry, sown, sums) = forward(
            model, {"params": params, **carry}, part, objective, rngs={"dropout": rng}
        )
        extra = sum((total / weight).sum() for total, weight in sown.values())
        value = objective_sum / whole + extra / num_parts
        return value, (carry, {**sums, **_summed(sown)})

    grad = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        grads, (carry, sums) = grad(state.params, batch, state.carry, rng)
        return grads, carry, sums

    def body(grads, inputs):
        part, carry, index = inputs
        new, (carry, sums) = grad(state.params, part, carry, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, grads, new), (carry, sums)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    parts = (
        sharding.split_rows(batch, accumulate),
        sharding.split_rows(state.carry, accumulate),
        jnp.arange(accumulate),
    )
    grads, (carry, sums) = jax.lax.scan(body, zeros, parts)
    return grads, sharding.join_rows(carry), jax.tree.map(lambda x: x.sum(0), sums)


def forward(model, variables, batch, objective: Objective, *, train: bool = True, rngs=None):
    """Return (sum of the objective, (new carry, sown losses, metric sums)) over a batch.

    The losses are {name: (sums, weights)}, in one axis those of all layers. What layers sow into "reports" is
    among the metrics alone.
    """
    stateful = "carry" in variables
    x_BLD, new = model.apply(
        variables,
        batch,
        train=train,
        rngs=rngs,
        mutable=["losses", "reports", *(["carry"] if stateful else [])],
    )
    objective_sum, sums = losses.cross_entropy(
        lambda params, x: model.apply({"params": params}, x, method="logits"),
        variables["params"],
        sharding.collect(x_BLD),
        batch["targets"],
        batch["weights"],
        max_scored=objective.max_scored,
        vocab_size=objective.vocab_size,
        z_loss=objective.z_loss,
        label_smoothing=objective.label_smoothing,
        chunk=objective.chunk,
        shards=sharding.ways_here("act_batch", "act_length", "act_vocab"),
        whole_rows=objective.whole_rows,
        by_row="corpus" in batch,
    )
    weight = sums["weight"]
    pairs = {"loss": (sums["loss"], weight), "accuracy": (sums["correct"], weight)}
    if objective.z_loss:
        pairs["z_loss"] = (sums["z_loss"], weight)
    if objective.whole_rows:
        pairs["exact"] = (sums["exact"], sums["rows"])
    if "corpus" in batch:
        pairs |= _of_each_corpus(objective.corpora, batch, sums["loss_B"])
    carry = {"carry": new["carry"]} if stateful else {}
    pairs |= _summed(_by_name(new.get("reports", {})))
    return objective_sum, (carry, _by_name(new.get("losses", {})), pairs)


def _by_name(sown: Any) -> Metrics:
    """Return {name: (sums, weights)} of the pairs that modules have sown, of all layers in one axis."""
    found: dict[str, tuple[list, list]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown):
        *_, name, _, place = path  # sow keeps a tuple of calls
        found.setdefault(name.key, ([], []))[place.idx].append(leaf.reshape(-1))
    return {name: tuple(map(jnp.concatenate, pair)) for name, pair in found.items()}


def _summed(pairs: Metrics) -> Metrics:
    return {name: (total.sum(), weight.sum()) for name, (total, weight) in pairs.items()}


def _of_each_corpus(names: tuple[str, ...], batch: Batch, loss_B: jax.Array) -> Metrics:
    """Return the loss of the rows of each corpus."""
    weight_B = batch["weights"].sum(axis=1)
    pairs = {}
    for number, name in enumerate(names):
        here_B = batch["corpus"] == number
        weight = jnp.where(here_B, weight_B, 0.0).sum()
        pairs[f"{name}/loss"] = (jnp.where(here_B, loss_B, 0.0).sum(), weight)
    return pairs


def eval_step(
    params: Any,
    carry: Any,
    batch: Batch,
    token_bytes: jax.Array,
    *,
    model: nn.Module,
    objective: Objective,
) -> tuple[Metrics, Any]:
    """Return the sums of one batch (loss, accuracy, bytes, ...) and the new carry ({} when there is none)."""
    _, (carry, sown, sums) = forward(
        model, {"params": params, **carry}, batch, objective, train=False
    )
    sums |= _summed(sown)
    if not objective.text_bytes:
        return sums, carry
    counted = jnp.take(token_bytes, batch["targets"], axis=0) * batch["weights"]
    return {**sums, "bytes": (counted.sum(), jnp.ones(()))}, carry


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Return whether every number of a tree is finite."""
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def count_parameters(params: Any) -> int:
    """Return the number of parameters of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
