"""Optimizers and schedules, by name: entries of two tables that end in one optax transformation.

An entry of `OPTIMIZERS` turns gradients into a direction; what all share is here once: clipping
before it, then decoupled weight decay (arXiv 1711.05101), both rule tables, and the schedule. To
add an optimizer or a schedule, write a function, name it in its table, and say in `Config.ONLY_FOR` which
fields it uses: others are refused when they are given on the command line.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm import moments, muon, sharding
from lm.config import SET, ConfigError
from lm.value_types import Duration

_SMALLEST = float(jnp.finfo(jnp.float32).tiny)
Rules = tuple[tuple[str, float], ...]
Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "adamw"  # adamw, adam (no decay), rmsprop, sgd, adafactor, lion or muon
    peak_lr: float = 1e-3  # learning rate after warm-up; under muon too it is of AdamW's size
    schedule: str = "cosine"  # then: constant, linear, cosine, wsd, inverse_sqrt, exponential
    warmup: Duration = "2%"  # duration of the linear rise to peak_lr
    decay: Duration = "20%"  # duration of the linear fall that ends a wsd schedule
    hold: Duration = "6 epochs"  # duration at peak_lr before an exponential schedule falls
    fall_every: Duration = "1 epoch"  # duration between its falls, the first of which ends the hold
    fall_factor: float = 1 / 1.2  # of the learning rate, at each fall
    final_lr_fraction: float = 0.1  # learning rate over peak_lr that is reached after the last step
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment (lion: of its only one)
    eps: float = 1e-8  # added to the root of the second moment
    momentum: float = 0.9  # decay of the summed updates; 0 = none
    nesterov: bool = False  # look ahead along the momentum
    muon_momentum: float = 0.95  # decay of the gradient's mean, with Nesterov's look-ahead
    muon_steps: int = 5  # Newton-Schulz iterations
    muon_adam_lr_ratio: float = 1.0  # rate of what goes to AdamW over the matrices' rate
    weight_decay: float = 0.1  # decoupled: times learning rate and rule
    weight_decay_rules: tuple[tuple[str, float], ...] = (
        ("(scale|bias|embedding)$", 0.0),
        (".*", 1.0),
    )  # (regex, factor of weight_decay): the first that is found in a parameter's path counts
    lr_rules: tuple[tuple[str, float], ...] = ((".*", 1.0),)  # (regex, factor of the learning rate)
    clip_norm: float = 1.0  # largest norm of the whole gradient; 0 = off
    ema_decay: float = 0.0  # of the moving average of the weights, a step; 0 = off
    moments_dtype: str = ""  # that moments are stored in: bfloat16, which halves them; "" = float32
    outer_lr: float = 0.7  # where groups meet (mesh.local_steps): 1 without momentum is their mean
    outer_momentum: float = 0.9  # of Nesterov's kind, where groups meet; 0 = none

    ONLY_FOR: ClassVar = {
        "decay": ("schedule", ("wsd",)),
        "hold": ("schedule", ("exponential",)),
        "fall_every": ("schedule", ("exponential",)),
        "fall_factor": ("schedule", ("exponential",)),
        "final_lr_fraction": ("schedule", ("linear", "cosine", "wsd")),
        "beta1": ("name", ("adamw", "adam", "lion", "muon")),
        "beta2": ("name", ("adamw", "adam", "rmsprop", "lion", "muon")),
        "eps": ("name", ("adamw", "adam", "rmsprop", "muon")),
        "momentum": ("name", ("sgd", "rmsprop")),
        "nesterov": ("name", ("sgd", "rmsprop")),
        "muon_momentum": ("name", ("muon",)),
        "muon_steps": ("name", ("muon",)),
        "muon_adam_lr_ratio": ("name", ("muon",)),
        "weight_decay": ("name", ("adamw", "rmsprop", "sgd", "adafactor", "lion", "muon")),
        "weight_decay_rules": ("name", ("adamw", "rmsprop", "sgd", "adafactor", "lion", "muon")),
        "outer_lr": ("mesh.local_steps", SET),
        "outer_momentum": ("mesh.local_steps", SET),
    }

    def __post_init__(self):
        _check(self, "name", self.name in OPTIMIZERS, f"choose one of {', '.join(OPTIMIZERS)}")
        _check(
            self, "schedule", self.schedule in SCHEDULES, f"choose one of {', '.join(SCHEDULES)}"
        )
        # Else a row without a gradient is 0 / 0.
        _check(
            self,
            "eps",
            self.eps >= _SMALLEST,
            f"smaller is 0 in float32; use {_SMALLEST:.2g} or more",
        )
        for field in ("peak_lr", "muon_steps", "muon_adam_lr_ratio", "outer_lr"):
            _check(self, field, getattr(self, field) > 0, "use a positive number")
        for field in ("beta1", "beta2", "momentum", "muon_momentum", "ema_decay", "outer_momentum"):
            _check(self, field, 0 <= getattr(self, field) < 1, "use a number in [0, 1)")
        for field in ("weight_decay", "clip_norm"):
            _check(self, field, getattr(self, field) >= 0, "use a number >= 0")
        _check(
            self, "final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "use a number in [0, 1]"
        )
        _check(self, "fall_factor", 0 < self.fall_factor <= 1, "use a number in (0, 1]")
        for field in ("weight_decay_rules", "lr_rules"):
            for pattern, factor in getattr(self, field):
                _check(self, field, factor >= 0, f"the factor of {pattern!r} must be >= 0")
                _check(self, field, _compiles(pattern), f"{pattern!r} is not a regular expression")
        ahead = self.momentum > 0 or not self.nesterov
        _check(self, "nesterov", ahead, "there is no optim.momentum to look ahead along")
        moments.check(self)


def _check(cfg: Config, field: str, holds: bool, fix: str) -> None:
    if not holds:
        raise ConfigError(f"optim.{field}={getattr(cfg, field)!r}: {fix}")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def build(
    cfg: Config,
    *,
    num_steps: int,
    to_steps: Callable[[Duration, str], int],
    params: Any,
    axes: Any,
) -> tuple[optax.GradientTransformation, Schedule]:
    """Return the optimizer, and its learning rate as a function of the number of updates done.

    Args:
      num_steps: length of the run.
      to_steps: turns (duration, name of its field) to steps.
      params: tree of arrays or shapes.
      axes: tree alike, of tuples of logical axis names.

    Raises:
      ConfigError: a rule table leaves a parameter out, a duration is longer than the run, or muon
        cannot tell which axes of a parameter form its matrices.
    """
    schedule = build_schedule(cfg, num_steps=num_steps, to_steps=to_steps)
    rates = match(cfg.lr_rules, params, field="optim.lr_rules")
    decays = match(cfg.weight_decay_rules, params, field="optim.weight_decay_rules")
    decays = jax.tree.map(lambda factor: factor * cfg.weight_decay, decays)
    if cfg.name == "muon":
        matrices = muon.matrices(params, axes)
        ratio = cfg.muon_adam_lr_ratio
        rates = jax.tree.map(lambda r, m: r if muon.is_matrix(m) else r * ratio, rates, matrices)
    parts = [
        _clip(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        moments.stored_as(cfg.moments_dtype, OPTIMIZERS[cfg.name](cfg, params, axes), params),
        optax.identity() if cfg.name == "adam" else _add_decay(decays),
        _scale_leaves(rates),
        optax.scale_by_learning_rate(schedule),
    ]
    return optax.chain(*parts), schedule


def updates_done(opt_state: Any) -> jax.Array:
    """Return how many updates an optimizer of `build` has made: int32 []."""
    return opt_state[-1].count


def match(rules: Rules, params: Any, *, field: str) -> Any:
    """Return the tree of the value that the first matching rule gives to each parameter.

    Raises:
      ConfigError: no rule matches a parameter; the message names it.
    """

    def value(path, _):
        name = sharding.path_name(path)
        for pattern, factor in rules:
            if re.search(pattern, name):
                return factor
        raise ConfigError(f"{field}: no rule matches parameter {name}; end with ('.*', 1.0)")

    return jax.tree.map_with_path(value, params)


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Scale all gradients together so that their norm is at most `max_norm`.

    One factor, which XLA fuses into the moments; optax's own selects between two gradients and on a
    CPU writes the choice out: 2.5 times AdamW's time, and a gradient's memory.
    """

    def update(updates, _):
        # The smallest number keeps 0 / 0 away.
        norm = jnp.maximum(optax.tree.norm(updates), jnp.finfo(jnp.float32).tiny)
        factor = jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda u: factor * u, updates)

    return optax.stateless(update)


def _add_decay(decays: Any) -> optax.GradientTransformation:
    def update(updates, params):
        return jax.tree.map(
            lambda u, p, decay: u + decay * p if decay else u, updates, params, decays
        )

    return optax.stateless(update)


def _scale_leaves(factors: Any) -> optax.GradientTransformation:
    def update(updates, _):
        return jax.tree.map(lambda u, factor: u if factor == 1 else factor * u, updates, factors)

    return optax.stateless(update)


class Steps(NamedTuple):
    """Durations of a schedule, in steps."""

    warmup: int
    length: int  # after warm-up
    decay: int
    hold: int
    fall_every: int


# Schedules: (config, durations) -> schedule that counts from the end of warm-up.


def _constant(cfg, steps):
    return optax.constant_schedule(cfg.peak_lr)


def _linear(cfg, steps):
    last = cfg.peak_lr * cfg.final_lr_fraction
    return optax.linear_schedule(cfg.peak_lr, last, max(1, steps.length))


def _cosine(cfg, steps):
    length = max(1, steps.length)
    return optax.cosine_decay_schedule(cfg.peak_lr, length, alpha=cfg.final_lr_fraction)


def _wsd(cfg, steps):
    """Warm-up, stable, decay: Hu et al. 2024 (MiniCPM), arXiv 2404.06395, with a linear decay."""
    decay = min(steps.decay, steps.length)
    fall = _linear(cfg, steps._replace(length=decay))
    constant = optax.constant_schedule(cfg.peak_lr)
    return optax.join_schedules([constant, fall], [steps.length - decay])


def _inverse_sqrt(cfg, steps):
    """peak sqrt(warmup / step), as in Vaswani et al. 2017, arXiv 1706.03762."""
    start = max(1, steps.warmup)
    # optax asks for counts before the schedule's start too, and drops the answer.
    return lambda count: cfg.peak_lr * (start / (start + jnp.maximum(count, 0))) ** 0.5


def _exponential(cfg, steps):
    """Constant, then smaller by one factor at each fall, as in Zaremba et al. 2014, arXiv 1409.2329."""

    def schedule(count):
        falls = (count - steps.hold) // max(1, steps.fall_every) + 1
        return cfg.peak_lr * cfg.fall_factor ** jnp.maximum(falls, 0)

    return schedule


SCHEDULES: dict[str, Callable[[Config, Steps], Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "exponential": _exponential,
}


def build_schedule(
    cfg: Config, *, num_steps: int, to_steps: Callable[[Duration, str], int]
) -> Schedule:
    """Return the learning rate by number of updates done: it is peak_lr at exactly `warmup`.

    It starts one step above 0, so that the first update is not lost, and reaches its last value
    at `num_steps`. A wsd decay takes at most what warm-up leaves.

    Raises:
      ConfigError: warm-up or decay is longer than the run.
    """
    warmup, decay = to_steps(cfg.warmup, "optim.warmup"), to_steps(cfg.decay, "optim.decay")
    used = {"warmup": warmup} | ({"decay": decay} if cfg.schedule == "wsd" else {})
    for field, span in used.items():
        fix = f"longer than the run of {num_steps} steps; shorten it, for example to '10%'"
        _check(cfg, field, 0 <= span <= num_steps, fix)
    rise = optax.linear_schedule(cfg.peak_lr / (warmup + 1), cfg.peak_lr, max(1, warmup))
    hold, fall_every = (
        to_steps(getattr(cfg, field), f"optim.{field}") if cfg.schedule == "exponential" else 0
        for field in ("hold", "fall_every")
    )
    steps = Steps(warmup, num_steps - warmup, decay, hold, fall_every)
    rest = SCHEDULES[cfg.schedule](cfg, steps)
    return optax.join_schedules([rise, rest], [warmup])


# Optimizers: (config, parameters, axes) -> transformation of gradients into a direction.


def _adam(cfg, params, axes):
    """Kingma and Ba 2014, arXiv 1412.6980."""
    return optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)


def _rmsprop(cfg, params, axes):
    """Tieleman and Hinton 2012; with Adam's bias correction, so that the first step is no jump."""
    return optax.chain(
        optax.scale_by_rms(cfg.beta2, cfg.eps, eps_in_sqrt=False, bias_correction=True),
        _sgd(cfg, params, axes),
    )


def _sgd(cfg, params, axes):
    return optax.trace(cfg.momentum, cfg.nesterov) if cfg.momentum else optax.identity()


def _adafactor(cfg, params, axes):
    """Shazeer and Stern 2018, arXiv 1804.04235: steps are relative to a parameter's own size."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        _of_layers(optax.clip_by_block_rms(1.0), axes),
        _of_layers(optax.scale_by_param_block_rms(), axes),
    )


def _of_layers(tx: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """Return `tx`, which keeps no state, with each of scanned layers as a parameter of its own."""

    def update(updates, state, params):
        def one(names, update, param):
            alone = lambda update, param: tx.update(update, state, param)[0]  # noqa: E731
            return (jax.vmap(alone) if names[:1] == ("layers",) else alone)(update, param)

        is_names = lambda x: isinstance(x, tuple)  # noqa: E731
        return jax.tree.map(one, axes, updates, params, is_leaf=is_names), state

    return optax.GradientTransformation(tx.init, update)


def _lion(cfg, params, axes):
    """Chen et al. 2023, arXiv 2302.06675; wants a third to a tenth of AdamW's rate."""
    return optax.scale_by_lion(cfg.beta1, cfg.beta2)


def _muon(cfg, params, axes):
    """Jordan et al. 2024 (github.com/KellerJordan/Muon): momentum, orthogonalised by Newton-Schulz.

    Differs: an update is scaled so that its elements have AdamW's usual size (arXiv 2502.16982),
    so one peak_lr and one weight_decay serve both kinds of parameters.
    """
    matrices = muon.matrices(params, axes)
    orthogonal = optax.contrib.scale_by_muon(
        ns_steps=cfg.muon_steps, beta=cfg.muon_momentum, weight_dimension_numbers=matrices
    )
    labels = jax.tree.map(lambda _, m: "muon" if muon.is_matrix(m) else "adam", params, matrices)
    return optax.chain(
        optax.partition({"muon": orthogonal, "adam": _adam(cfg, params, axes)}, labels),
        _scale_leaves(jax.tree.map(muon.factor, params, matrices)),
    )


OPTIMIZERS: dict[str, Callable[[Config, Any, Any], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adam": _adam,
    "rmsprop": _rmsprop,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}
