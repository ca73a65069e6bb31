"""Training over slow links: groups of devices train apart for some steps, then they meet.

DiLoCo: Distributed Low-Communication Training of Language Models (Douillard et al. 2023, arXiv
2311.08105). Each of the groups along `mesh.dcn` takes `mesh.local_steps` updates on its own share of the
batches, with its own optimizer. Then the mean of how far they have come is the gradient of an outer step, by
SGD with Nesterov's momentum, and all go on from its result. With `optim.outer_lr=1` and
`optim.outer_momentum=0` they go on from their mean: federated averaging (McMahan et al. 2017, arXiv
1602.05629), its groups of equal weight.

    local_r <- inner optimizer (local_r)                        in each step, in each group r
    outer   <- SGD(outer, gradient = outer - mean_r local_r);  local_r <- outer      when they meet

Between two meetings the groups exchange a few sums that are logged, and whether all gradients are finite.
Evaluated, averaged and loaded is `outer`. What differs from the paper: a batch is that of all groups
together, and groups also meet after the last step, unless that one is left out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import optim, sharding
from lm.step import Batch, Metrics, TrainState


def outer_optimizer(cfg: optim.Config) -> optax.GradientTransformation:
    """Return the optimizer of the meetings."""
    return optax.sgd(cfg.outer_lr, cfg.outer_momentum or None, nesterov=cfg.outer_momentum > 0)


def begin(state: TrainState, *, outer: optax.GradientTransformation, replicas: int) -> TrainState:
    """Return the state of step 0 of `replicas` groups, which all begin with the parameters of `state`."""
    of_one = {"params": state.params, "opt_state": state.opt_state}
    local = jax.tree.map(lambda x: jnp.broadcast_to(x, (replicas, *jnp.shape(x))), of_one)
    return dataclasses.replace(state, opt_state=outer.init(state.params), local=local)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    inner: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    outer: optax.GradientTransformation,
    every: int,
    num_steps: int,
) -> tuple[TrainState, Metrics]:
    """Do one update of each group on its rows of a global batch; meet after `every` and after `num_steps`.

    `inner` is a group's own step, of `lm.step`, on a state of its own; `outer` the optimizer of the meetings.
    A step that is left out (see `lm.guard`) is no meeting either.
    """

    replicas = len(jax.tree.leaves(state.local)[0])

    def of_group(local, carry, batch):
        with sharding.mapped_over(sharding.REPLICAS):
            of_one = {**local, "ema": {}, "carry": carry, "counts": {}, "local": {}}
            before = dataclasses.replace(state, **of_one)
            after, sums = inner(before, batch)
            healthy = sums.pop("healthy")  # the same in all
            own = {"params": after.params, "opt_state": after.opt_state}
            return own, after.carry, sums, healthy, after.spikes

    each = jax.vmap(
        of_group,
        out_axes=(0, 0, 0, None, None),
        axis_name=sharding.REPLICAS,
        spmd_axis_name=sharding.mesh_axes(sharding.REPLICAS),
    )
    split = functools.partial(_split, replicas=replicas)
    local, carry, sums, healthy, running = each(state.local, split(state.carry), split(batch))
    step = state.step + healthy
    meeting = ((step % every == 0) | (step == num_steps)) & healthy
    params, opt_state, own = jax.lax.cond(
        meeting,
        functools.partial(_meet, outer),
        lambda *kept: kept,
        *(state.params, state.opt_state, local["params"]),
    )
    new = dataclasses.replace(
        state,
        step=step,
        healthy=healthy,
        params=params,
        opt_state=opt_state,
        carry=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry),
        local={**local, "params": own},
        spikes=running,
    )
    met = (meeting.astype(jnp.float32), jnp.ones(()))
    return new, {**_joined(sums), "met": met, "healthy": healthy}


def _split(tree: Any, *, replicas: int) -> Any:
    """Return [replicas, B / replicas, ...] of arrays [B, ...], each group's rows on its own devices."""

    def split(x):
        x = x.reshape(replicas, -1, *x.shape[1:])
        axes = (sharding.REPLICAS, "act_batch", "act_length")[: 3 if x.ndim == 3 else 2]
        return sharding.constrain(x, *axes, *(None,) * (x.ndim - len(axes)))

    with sharding.mapped_over(sharding.REPLICAS):
        return jax.tree.map(split, tree)


def _meet(outer, params, opt_state, own):
    """Return the outer parameters and optimizer after a meeting, and what each group goes on from."""
    gradient = jax.tree.map(lambda p, x: p - x.mean(axis=0), params, own)
    updates, opt_state = outer.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, jax.tree.map(lambda p, x: jnp.broadcast_to(p, x.shape), params, own)


def _joined(sums: Metrics) -> Metrics:
    """Return the metrics of all groups: sums and weights added, and numbers of tokens counted once."""
    return {
        name: (total.sum(), weight.mean() if name.endswith("tokens") else weight.sum())
        for name, (total, weight) in sums.items()
    }
