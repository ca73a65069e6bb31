"""Families. The folder is the registry: `lm/models/<name>.py` exports

- `Config`: a frozen dataclass with `name`, `vocab_size` and `max_length` (0 = derived), and what is its own;
- `Model(cfg, decode_length=0)`: a Linen module. Called with (batch, train=, decode=) it returns features
  [B, L, D]; `logits` makes float32 [B, L, V] of them. It `accepts` some of "causal", "masked", "source",
  "packed", "carry" and "context" (rows split over devices: `lm/nn/context.py`); `learns` by "gradient" or
  by "counting" (then `init_counts`, `count`, `estimate`: see `lm/models/ngram.py`); `max_context` bounds the
  positions that decoding may use. With `decode`, a prompt (L > 1) fills the collection "cache" from its
  start, and a token (L = 1) goes on. With "carry", `init_carry(batch_size)`;
- `flops_per_token(cfg, length, scored)`: of training, forward and backward; the head's at the share of
  positions that is scored.

Every parameter names its axes as `lm.sharding.RULES` has them; `tests/models` tries all of this on every
file of the folder.
"""

import dataclasses
import difflib
import importlib
import math
import pkgutil
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from lm.config import SET, ConfigError
from lm.nn import fp8
from lm.nn.mlp import GATED
from lm.nn.transformer import REMAT_POLICIES

# What a family with experts (`lm.nn.moe`) says of its fields.
OF_EXPERTS = ("capacity_factor", "router_z_loss", "balance_loss", "shared_experts", "expert_dim")
EXPERTS = ("num_experts", *OF_EXPERTS)  # fields of 0 or more
EXPERTS_ONLY_FOR = dict.fromkeys(("experts_per_token", *OF_EXPERTS), ("num_experts", SET))


def names() -> list[str]:
    """Return the families' names, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family(name: str) -> Any:
    """Return the module of a family.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names())}"
        raise ConfigError(f"model.name={name!r} is no family of models; {hint}")
    return importlib.import_module(f"{__name__}.{name}")


def config_class(name: str) -> type:
    """Return the `Config` dataclass of a family."""
    return family(name).Config


def resolve(
    cfg: Any,
    *,
    vocab_size: int,
    max_length: int,
    packed: bool,
    max_source_length: int = 0,
    num_classes: int = 0,
    end_of_text: int = 0,
) -> Any:
    """Fill the sizes that `cfg` leaves to be derived from the tokenizer and the task.

    Args:
      vocab_size: tokens of the tokenizer and the task.
      max_length: tokens of a row.
      max_source_length: tokens of a row's source; only for a family that has the field.
      num_classes: classes of a text; only for a family that has the field.
      end_of_text: token that a target begins with where the family has a field for it that is open.
      packed: whether a row may hold several documents.

    Raises:
      ConfigError: a size that is given does not fit the tokenizer or the task.
    """
    if cfg.vocab_size and cfg.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={cfg.vocab_size} is less than the {vocab_size} of tokenizer and task; use 0 "
            "= derived"
        )
    if cfg.max_length and cfg.max_length < max_length:
        raise ConfigError(
            f"a row of the task (task.length and such) has {max_length} tokens, more than model.max_length="
            f"{cfg.max_length}; shorten the rows, or use model.max_length=0 = derived"
        )
    derived = {
        "vocab_size": cfg.vocab_size or vocab_size,
        "max_length": cfg.max_length or max_length,
    }
    for field, size in (("max_source_length", max_source_length), ("num_classes", num_classes)):
        if hasattr(cfg, field):
            if 0 < getattr(cfg, field) < size:
                raise ConfigError(
                    f"model.{field}={getattr(cfg, field)}: the task needs {size}; use 0 = derived"
                )
            derived[field] = getattr(cfg, field) or size
    if hasattr(cfg, "start_token"):
        derived["start_token"] = end_of_text if cfg.start_token < 0 else cfg.start_token
        if derived["start_token"] >= derived["vocab_size"]:
            raise ConfigError(
                f"model.start_token={cfg.start_token}: no token of the {derived['vocab_size']}; use -1 = "
                "end of text"
            )
    if hasattr(cfg, "mask"):
        derived["mask"] = cfg.mask or ("segments" if packed else "causal")
    return dataclasses.replace(cfg, **derived)


def build(cfg: Any, *, decode_length: int = 0) -> nn.Module:
    """Return the model of a resolved config; `decode_length` is the number of cache slots."""
    return family(cfg.name).Model(cfg, decode_length=decode_length)


def flops_per_token(cfg: Any, length: int, scored: float = 1.0) -> float:
    """Return the training FLOPs a token (forward and backward, attention counted in full).

    Args:
      scored: share of the positions whose logits are made.
    """
    return family(cfg.name).flops_per_token(cfg, length, scored)


def check_option(cfg: Any, field: str, options: tuple[str, ...]) -> None:
    """Raise ConfigError unless a field of a family's config is one of `options`."""
    value = getattr(cfg, field)
    if value not in options:
        shown = ", ".join(option or '""' for option in options)
        raise ConfigError(f"model.{field}={value!r}: choose one of {shown}")


def check_fields(cfg: Any, *, positive: Sequence[str], derived: Sequence[str]) -> None:
    """Raise ConfigError for a number of a family's config, or a field that families share, out of range.

    Args:
      positive: fields of 1 or more.
      derived: fields of 0 or more.
    """
    if hasattr(cfg, "remat"):
        check_option(cfg, "remat", ("none", *REMAT_POLICIES))
        positive, derived = (*positive, "stage_repeats"), (*derived, "microbatches")
    check_option(cfg, "dtype", ("", "float32", "bfloat16"))
    if hasattr(cfg, "matmul_dtype"):
        check_option(cfg, "matmul_dtype", fp8.DTYPES)
    for field, least in (dict.fromkeys(derived, 0) | dict.fromkeys(positive, 1)).items():
        if getattr(cfg, field) < least:
            raise ConfigError(f"model.{field}={getattr(cfg, field)}: use {least} or more")
    if getattr(cfg, "norm_epsilon", 1.0) <= 0:
        raise ConfigError(f"model.norm_epsilon={cfg.norm_epsilon}: use a positive number")
    for field in (f.name for f in dataclasses.fields(cfg) if f.name.endswith("dropout")):
        if not 0 <= getattr(cfg, field) < 1:
            raise ConfigError(f"model.{field}={getattr(cfg, field)}: use a probability in [0, 1)")


def check_experts(cfg: Any) -> None:
    """Raise ConfigError for fields of the experts (`lm.nn.moe`) that do not fit together."""
    if not cfg.num_experts:
        return
    if cfg.matmul_dtype:
        raise ConfigError(
            f"model.matmul_dtype={cfg.matmul_dtype!r}: products of experts, model.num_experts="
            f"{cfg.num_experts}, have no such type; use ''"
        )
    if cfg.experts_per_token > cfg.num_experts:
        raise ConfigError(
            f"model.experts_per_token={cfg.experts_per_token}: use at most the {cfg.num_experts} of "
            "model.num_experts"
        )
    if cfg.mlp_dim and cfg.expert_dim:
        raise ConfigError(
            f"model.mlp_dim={cfg.mlp_dim}: every feed-forward layer has experts, of model.expert_dim="
            f"{cfg.expert_dim}; leave one of the two 0"
        )


def feed_forward_parameters(cfg: Any) -> int:
    """Return the matrix parameters that a token meets in a feed-forward layer."""
    matrices, D = (3 if cfg.activation in GATED else 2), cfg.model_dim
    if not cfg.num_experts:
        return matrices * D * cfg.sizes["mlp_dim"]
    active = cfg.experts_per_token + cfg.shared_experts
    return matrices * D * (cfg.expert_dim or cfg.sizes["mlp_dim"]) * active + D * cfg.num_experts


def active_parameters(cfg: Any, axes: Any, shapes: Any) -> int:
    """Return how many parameters a token meets, of `shapes` with logical `axes` (trees alike)."""
    active = 0
    for leaf, names in zip(
        jax.tree.leaves(shapes),
        jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)),
        strict=True,
    ):
        size = math.prod(leaf.shape)
        active += size * cfg.experts_per_token // cfg.num_experts if "experts" in names else size
    return active


def check_heads(cfg: Any, *otherwise: str) -> None:
    """Raise ConfigError unless the heads divide the width; `otherwise` is what else would mend it."""
    if cfg.model_dim % cfg.num_heads:
        fix = ", ".join(("choose another", *otherwise))
        raise ConfigError(
            f"model.num_heads={cfg.num_heads} does not divide model.model_dim={cfg.model_dim}; {fix}"
        )
