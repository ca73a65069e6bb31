"""A data set -> sums -> loss, perplexity, bits per byte, accuracy."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from flax import linen as nn

from lm import placement, sharding
from lm.config import ConfigError
from lm.data import corpus, pipeline
from lm.value_types import Duration


@dataclasses.dataclass(frozen=True)
class Config:
    every_steps: Duration = 500  # between evaluations, 0 = none; the last step is always evaluated
    max_tokens: int = 0  # scored tokens: a fixed prefix of the split; 0 = all
    batch_size: int = 0  # sequences; 0 = data.batch_size
    timeout_seconds: float = 7200.0  # for one evaluation, after which the run ends; 0 = any
    streams: int = 16  # contiguous streams that a stateful model reads the split in

    ONLY_FOR: ClassVar = {
        "batch_size": ("data.order", ("shuffle",)),
        "streams": ("data.order", ("stream",)),
    }

    def __post_init__(self):
        for field in ("max_tokens", "batch_size", "timeout_seconds"):
            if getattr(self, field) < 0:
                raise ConfigError(f"eval.{field}={getattr(self, field)}: use 0 or more")
        if self.streams < 1:
            raise ConfigError(f"eval.streams={self.streams}: use a positive number")


def score(
    model: nn.Module,
    eval_step: Callable,
    params: Any,
    text: corpus.Corpus,
    task: Any,
    cfg: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    watch: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, float]:
    """Return the scores of `params` on the validation split of `text` (see `scores_of`).

    Of a mixture, on all of its corpora together, and as `name/...` on each. `cfg` has the frozen sections
    `data` and `eval`; `eval_step` is jitted, as by `lm.experiment.jit_eval_step`. `watch` passes the batches
    on: a bar that shows them, or one that raises to stop.
    """
    shards, stateful = sharding.batch_shards(mesh), cfg["data"].order == "stream"
    host_index, host_count = placement.host_share(mesh)
    size = cfg["eval"].batch_size or cfg["data"].batch_size
    token_bytes = np.zeros(task.vocab_size, np.int32)
    token_bytes[: text.tokenizer.vocab_size] = text.tokenizer.token_bytes
    together: dict[str, float] = {}
    parts: dict[str, float] = {}
    for number, member in enumerate(text.members):
        batches = pipeline.EvalBatches(
            member.validation,
            task,
            batch_size=-(-size // shards) * shards,
            max_tokens=cfg["eval"].max_tokens,
            streams=cfg["eval"].streams if stateful else 0,
            host_index=host_index,
            host_count=host_count,
        )
        carry = {}
        if stateful:
            carry = {"carry": nn.unbox(model.init_carry(cfg["eval"].streams))}
            carry = jax.device_put(carry, sharding.batch_sharding(mesh))
        totals = measure(
            eval_step, params, watch(batches), mesh=mesh, token_bytes=token_bytes, carry=carry
        )
        if not text.tokenizer.counts_bytes:
            totals = {name: total for name, total in totals.items() if name[:5] != "bytes"}
        together = {name: together.get(name, 0.0) + value for name, value in totals.items()}
        if text.mixed:
            name = text.names[number]
            parts |= {f"{name}/{key}": value for key, value in scores_of(totals).items()}
    return {**scores_of(together), **parts}


def measure(
    eval_step: Callable[..., Any],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    mesh: jax.sharding.Mesh,
    token_bytes: np.ndarray,
    carry: Any,
) -> dict[str, float]:
    """Return the sums and weights of every score over all of `batches`.

    Args:
      eval_step: jitted `step.eval_step`, (params, carry, batch, token_bytes) -> (sums, carry).
      batches: this host's rows of each batch.
      token_bytes: [V] bytes of the original text that a token stands for.
      carry: the recurrent state to begin with; {} for a model without one.

    The sums are added in float64 on the host, so that the size of the batches does not matter.
    """
    totals: dict[str, float] = {}
    waiting = None
    for batch in batches:
        sums, carry = eval_step(params, carry, placement.place_batch(mesh, batch), token_bytes)
        if waiting is not None:  # read one batch late: the device never waits for the host
            _add(totals, waiting)
        waiting = sums
    if waiting is not None:
        _add(totals, waiting)
    return totals


def scores_of(totals: Mapping[str, float]) -> dict[str, float]:
    """Return the scores that sums and weights mean.

    They are loss (nats a token), perplexity, accuracy, the tokens scored; bits_per_byte where the targets are
    a text whose bytes the tokenizer counts; `exact`, the share of rows that are all right, where the task
    asks for it; what else the model reports. Raises ConfigError where nothing was scored.
    """
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
