"""An optimizer's moments stored in a narrower type than they are computed in."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import sharding
from lm.config import ConfigError

DTYPES = ("", "bfloat16")

# The decays of what each optimizer stores. Lion's beta1 mixes a direction that it does not store.
DECAYS: dict[str, tuple[str, ...]] = {
    "adamw": ("beta1", "beta2"),
    "adam": ("beta1", "beta2"),
    "rmsprop": ("beta2", "momentum"),
    "sgd": ("momentum",),
    "lion": ("beta2",),
    "muon": ("muon_momentum", "beta1", "beta2"),
}

# bfloat16 has 8 significant bits, so its numbers lie up to 1/128 of themselves apart: what is taken off a
# moment by a decay nearer 1 than that is rounded away, wholly or to a multiple of what it should be.
STEP = float(jnp.finfo(jnp.bfloat16).eps)


def check(cfg: Any) -> None:
    """Raise ConfigError where the moments of a section `optim` cannot be stored as it asks."""
    said = f"optim.moments_dtype={cfg.moments_dtype!r}"
    if cfg.moments_dtype not in DTYPES:
        raise ConfigError(f"{said}: choose one of '' (float32), bfloat16")
    if not cfg.moments_dtype:
        return
    if cfg.name not in DECAYS:
        raise ConfigError(
            f"{said}: the decay of optim.name={cfg.name!r} comes ever nearer 1, where bfloat16's 8 bits no "
            "longer move; use ''"
        )
    if cfg.name == "sgd" and not cfg.momentum:
        raise ConfigError(f"{said}: optim.name='sgd' with optim.momentum=0 has no moments; use ''")
    for field in DECAYS[cfg.name]:
        if 1 - getattr(cfg, field) < STEP:
            raise ConfigError(
                f"{said}: its 8 bits round away what optim.{field}={getattr(cfg, field)!r} takes off a "
                f"moment in a step; use optim.{field} of at most {1 - STEP:.3f}, or optim.moments_dtype=''"
            )


def stored_as(
    dtype: str, tx: optax.GradientTransformation, params: Any
) -> optax.GradientTransformation:
    """Return `tx` with its moments stored as `dtype` ("" = as they are): cast up, updated, cast down.

    A moment is an array of the state that has a parameter's shape and, at the end of its path, that
    parameter's path; counts and constants stay what they are.
    """
    if not dtype:
        return tx
    shapes = {
        sharding.path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def is_moment(path, leaf):
        ends = (sharding.path_name(path[start:]) for start in range(len(path)))
        return leaf.dtype == jnp.float32 and any(shapes.get(end) == leaf.shape for end in ends)

    moments = jax.tree.map_with_path(is_moment, jax.eval_shape(tx.init, params))

    def cast(state, to):
        return jax.tree.map(lambda x, moment: x.astype(to) if moment else x, state, moments)

    def init(params):
        return cast(tx.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = tx.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
