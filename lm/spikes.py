"""Steps that stand out of the run before them: a z-score by a running mean and deviation, in the state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding

METRICS = ("loss", "grad_norm")


@dataclasses.dataclass(frozen=True)
class Limit:
    """From when on a step is a spike.

    Attributes:
      zscore: standard deviations above the running mean.
      metric: of what, one of METRICS.
      steps: how many steps the mean and deviation remember; before as many were seen there is no spike.
    """

    zscore: float
    metric: str
    steps: int


def begin() -> dict[str, jax.Array]:
    """Return what is known before the first step."""
    zero = jnp.zeros(())
    return {"mean": zero, "variance": zero, "seen": jnp.zeros((), jnp.int32)}


def look(running: Any, value: jax.Array, limit: Limit) -> tuple[jax.Array, jax.Array, Any]:
    """Return (whether `value` is a spike, its z-score, what is known with it).

    The newest `limit.steps` values weigh alike at first, then by an exponential of that time. Of groups that
    train apart the value is their mean. One that is not finite is no spike, and nothing is known by it.
    """
    if sharding.replica() is not None:
        value = jax.lax.pmean(value, sharding.REPLICAS)
    share = jnp.maximum(1.0 / (running["seen"] + 1), 1.0 / limit.steps)
    distance = value - running["mean"]
    counts = jnp.isfinite(value)  # without a scored token there is no loss
    known = counts & (running["seen"] >= limit.steps)
    deviation = jnp.sqrt(jnp.maximum(running["variance"], 1e-12))
    zscore = jnp.where(known, distance / deviation, 0.0)
    new = {
        "mean": running["mean"] + share * distance,
        "variance": (1 - share) * (running["variance"] + share * jnp.square(distance)),
        "seen": running["seen"] + 1,
    }
    new = {name: jnp.where(counts, value, running[name]) for name, value in new.items()}
    return zscore > limit.zscore, zscore, new
