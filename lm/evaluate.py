"""A data set -> sums -> loss, perplexity, bits per byte, accuracy."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from lm import sharding
from lm.config import ConfigError, Duration


@dataclasses.dataclass(frozen=True)
class Config:
    every_steps: Duration = 500  # between evaluations; the last step is always evaluated
    max_tokens: int = 0  # scored tokens: a fixed prefix of the split; 0 = all
    batch_size: int = 0  # sequences; 0 = data.batch_size
    streams: int = 16  # contiguous streams that a stateful model reads the split in

    def __post_init__(self):
        for field in ("max_tokens", "batch_size"):
            if getattr(self, field) < 0:
                raise ConfigError(f"eval.{field}={getattr(self, field)}: use 0 or more")
        if self.streams < 1:
            raise ConfigError(f"eval.streams={self.streams}: use a positive number")


def evaluate(
    eval_step: Callable[..., Any],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    mesh: jax.sharding.Mesh,
    token_bytes: np.ndarray,
    carry: Any,
) -> dict[str, float]:
    """Return the scores of `params` on all of `batches`.

    Args:
      eval_step: jitted `step.eval_step`, (params, carry, batch, token_bytes) -> (sums, carry).
      batches: this host's rows of each batch.
      token_bytes: [V] bytes of the original text that a token stands for.
      carry: the recurrent state to begin with; {} for a model without one.

    Returns:
      loss (nats a token), perplexity, accuracy, the tokens scored; bits_per_byte where the targets are a
      text; `exact`, the share of rows that are all right, where the task asks for it; what else the model
      reports. The sums are added in float64 on the host, so that the size of the batches does not matter.
    """
    totals: dict[str, float] = {}
    waiting = None
    for batch in batches:
        sums, carry = eval_step(params, carry, sharding.place_batch(mesh, batch), token_bytes)
        if waiting is not None:  # read one batch late: the device never waits for the host
            _add(totals, waiting)
        waiting = sums
    if waiting is not None:
        _add(totals, waiting)
    tokens = totals.get("loss/weight", 0.0)
    if not tokens:
        raise ConfigError("eval: no token to score in the split; give more text or shorter rows")
    loss = totals["loss"] / tokens
    scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if "bytes" in totals:
        bits = totals["loss"] / math.log(2)
        scores["bits_per_byte"] = bits / max(totals["bytes"], 1.0)
    rest = [name for name in totals if "/" not in name and name not in ("loss", "bytes")]
    scores |= {name: totals[name] / max(totals[f"{name}/weight"], 1e-9) for name in rest}
    return {**scores, "tokens": tokens}


def _add(totals: dict[str, float], sums: dict[str, Any]) -> None:
    for name, (total, weight) in jax.device_get(sums).items():
        totals[name] = totals.get(name, 0.0) + float(total)
        totals[f"{name}/weight"] = totals.get(f"{name}/weight", 0.0) + float(weight)
