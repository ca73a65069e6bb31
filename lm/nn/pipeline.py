"""Layers in stages, through which the parts of a batch flow.

GPipe (Huang et al. 2019, arXiv 1811.06965), written as one program for all devices as in GSPMD (Xu et al.
2021, 2105.04663, section 3.3): every stage does its layers on another part of the batch at the same time, and
then each hands what it has to the next one. With `repeats` above 1 a part comes around that many times, each
stage having several thin slices of the depth (Narayanan et al. 2021, 2104.04473, interleaved).

Of the time of `(repeats * parts + stages - 1)` turns, `stages - 1` are the bubble: then some stages work on
nothing, and here what they make is thrown away.

What differs: all forward turns come before all backward ones, so that the activations of all parts are held
(use `model.remat`); the slices of `repeats` are moved to their stages in each step, since parameters are
stored in the order of the layers, whatever the mesh.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding
from lm.config import ConfigError


def num_parts(num_rows: int, wanted: int, stages: int) -> int:
    """Return in how many parts `num_rows` rows flow: the most up to `wanted` (0 = 4 a stage) that divide."""
    return parts_of(num_rows // sharding.row_shards(num_rows), wanted, stages)


def parts_of(rows: int, wanted: int, stages: int) -> int:
    """Return `num_parts` of the rows of one device."""
    return max(n for n in range(1, (wanted or 4 * stages) + 1) if rows % n == 0)


def bubble(stages: int, parts: int, repeats: int = 1) -> float:
    """Return the share of the turns in which a stage has nothing to do."""
    return (stages - 1) / (repeats * parts + stages - 1)


def run(
    layer: Callable[..., jax.Array],
    params: Any,
    x: jax.Array,
    args: Sequence[Any],
    *,
    stages: int,
    parts: int,
    repeats: int = 1,
) -> jax.Array:
    """Return what all layers in turn make of x [B, ...].

    Args:
      layer: (parameters of a layer, its number, the part's number, x, *args) -> x, of a part's rows.
      params: parameters of all layers, [num_layers, ...] each.
      args: what every layer gets; arrays [B, ...] are divided as `x`, the others go to each part whole.
      parts: of the batch; at least `stages` where `repeats` is above 1.

    Raises:
      ConfigError: the layers do not divide, or there are too few parts.
    """
    num_layers = len(jax.tree.leaves(params)[0])
    if num_layers % (stages * repeats):
        raise ConfigError(
            f"mesh.stage={stages}, model.stage_repeats={repeats}: {num_layers} layers do not divide; let "
            "their product divide them"
        )
    if repeats > 1 and parts < stages:
        raise ConfigError(
            f"model.stage_repeats={repeats}: a batch flows in {parts} parts through mesh.stage={stages}; let "
            "data.batch_size, model.microbatches give as many parts as stages"
        )
    divided = [isinstance(arg, jax.Array) and len(arg) == len(x) for arg in args]
    given = [sharding.split_rows(a, parts) if d else a for a, d in zip(args, divided, strict=True)]

    def stage(slices, number, now, x):
        """Do the layers of stage `number` on the part that is there at turn `now`."""
        part, repeat = (now - number) % parts, (now - number) // parts % repeats
        args = [arg[part] if d else arg for arg, d in zip(given, divided, strict=True)]
        of_turn = jax.tree.map(lambda p: p[repeat], slices)
        thick = num_layers // (stages * repeats)
        numbers = (repeat * stages + number) * thick + jnp.arange(thick)

        def body(x, inputs):
            with sharding.mapped_over("act_stage"):
                return layer(*inputs, part, x, *args), None

        return jax.lax.scan(body, x, (of_turn, numbers))[0]

    slices = jax.tree.map(lambda p: _by_stage(p, stages, repeats), params)
    every_stage = jax.vmap(
        stage,
        in_axes=(0, 0, None, 0),
        spmd_axis_name=sharding.mesh_axes("act_stage"),
    )
    work = functools.partial(every_stage, slices, jnp.arange(stages))
    waiting = _turns(work, sharding.split_rows(x, parts), stages=stages, repeats=repeats)
    return sharding.join_rows(waiting)


def _turns(work: Callable, waiting: jax.Array, *, stages: int, repeats: int) -> jax.Array:
    """Return the parts, [parts, B / parts, ...], after all turns; `work` is one turn of every stage."""
    parts = len(waiting)

    def turn(carry, now):
        waiting, flow = carry  # `flow` is what each stage gets: [stages, B / parts, ...]
        made = work(now, flow.at[0].set(waiting[now % parts]))
        made = sharding.constrain(made, "act_stage", "act_batch", *(None for _ in made.shape[2:]))
        out = (now - stages + 1) % parts
        done = jnp.where(now >= stages - 1, made[-1], waiting[out])
        return (waiting.at[out].set(done), jnp.roll(made, 1, axis=0)), None

    flow = jnp.zeros((stages, *waiting.shape[1:]), waiting.dtype)
    return jax.lax.scan(turn, (waiting, flow), jnp.arange(repeats * parts + stages - 1))[0][0]


def _by_stage(param: jax.Array, stages: int, repeats: int) -> jax.Array:
    """Return [stages, repeats, layers of a slice, ...] of [num_layers, ...], each stage's on its devices."""
    slices = param.reshape(repeats, stages, -1, *param.shape[1:]).swapaxes(0, 1)
    return sharding.constrain_first(slices, "act_stage")
