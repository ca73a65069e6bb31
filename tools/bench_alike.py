"""Whose models an experiment can be compared with, and what of it: the peers of `tools.bench`."""

import argparse
import subprocess
from typing import Any, NamedTuple

from lm.config import ConfigError


class Peer(NamedTuple):
    """Somebody else's models.

    Attributes:
      module: what their process runs.
      needs: libraries of its interpreter.
      families: of our models that it has one like.
      together: whether several processes of it train one model.
    """

    module: str
    needs: tuple[str, ...]
    families: tuple[str, ...]
    together: bool


PEERS = {
    "transformers": Peer(
        "tools.bench_peer", ("torch", "transformers"), ("bert", "gpt", "t5"), together=True
    ),
    "torch": Peer("tools.bench_peer", ("torch",), ("rnn",), together=True),
    "flax": Peer("tools.bench_flax", ("flax", "optax"), ("rnn",), together=False),
}
# Fields of a family that a peer has nothing like, and the only values that can be compared.
ALIKE: dict[str, dict[str, tuple]] = {
    "bert": {
        "next_sentence": (False,), "activation": ("gelu_erf", "gelu", "relu"), "matmul_dtype": ("",),
    },
    "gpt": {
        "positions": ("learned",), "norm": ("layernorm",), "norm_bias": (True,), "bias": (True,),
        "bias_in": ("all",), "activation": ("gelu",), "qk_norm": (False,), "tied": (True,),
        "num_experts": (0,), "num_kv_heads": (0,), "head_dim": (0,), "window": (0,),
        "dropout": (0.0,), "logit_softcap": (0.0,), "matmul_dtype": ("",),
    },
    "rnn": {
        "embed_dim": (0,), "num_heads": (0,), "dropout_mask": ("position",),
        "hidden_dropout": (0.0,), "weight_dropout": (0.0,), "embed_dropout": (0.0,),
    },
    "t5": {"activation": ("relu", "geglu"), "num_experts": (0,), "matmul_dtype": ("",)},
}  # fmt: skip
_TRAINED = {"optim.name": ("adamw",), "optim.ema_decay": (0.0,)}


def check(config: Any, args: argparse.Namespace) -> None:
    """Refuse what the peer cannot be compared in.

    Raises:
      ConfigError: its message names the field.
    """
    name = config.model.name
    if name not in PEERS[args.peer].families:
        others = [peer for peer, kind in PEERS.items() if name in kind.families]
        fix = f"use {' or '.join(others)}" if others else "leave it out"
        raise ConfigError(f"--peer={args.peer}: has nothing like model.name={name!r}; {fix}")
    if args.decode and name != "gpt":
        raise ConfigError(f"--peer={args.peer}: decodes GPT-2 alone; leave --decode or --peer out")
    fields = {f"model.{field}": values for field, values in ALIKE[name].items()}
    fields["model.dtype"] = ("",)  # as the peer: float32 on a CPU, else bfloat16
    for field, values in {**fields, **({} if args.decode else _TRAINED)}.items():
        section, _, key = field.partition(".")
        if config[section][key] not in values:
            raise ConfigError(
                f"--peer={args.peer}: has nothing like {field}={config[section][key]!r}; "
                f"add --config.{field}={values[0]}"
            )


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that say nothing without a peer, or that it cannot follow."""
    for name in ("peer_modes", "peer_python"):
        if getattr(args, name) and not args.peer:
            raise ConfigError(f"--{name}: used only with --peer; give one, or leave it out")
    if args.processes > 1 and (args.mesh or args.decode or not args.peer):
        raise ConfigError(
            f"--processes={args.processes}: compares training with a peer's; give --peer, and neither --mesh "
            "nor --decode"
        )
    if args.processes > 1 and not PEERS[args.peer].together:
        raise ConfigError(
            f"--processes={args.processes}: each process of --peer={args.peer} would train a model of its "
            "own; leave it out"
        )


def check_python(peer: str, python: str) -> None:
    """Refuse an interpreter that lacks the libraries of `peer`."""
    needs = PEERS[peer].needs
    if subprocess.run([python, "-c", f"import {', '.join(needs)}"], capture_output=True).returncode:
        raise ConfigError(
            f"--peer: {python} has no {' or '.join(needs)}; pip install -e '.[bench]', or name "
            "another interpreter with --peer_python"
        )
