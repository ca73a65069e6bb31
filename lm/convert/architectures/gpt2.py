"""GPT-2: `GPT2LMHeadModel` of transformers."""

from typing import Any

import numpy as np

from lm.convert import mapping
from lm.convert.mapping import Constant, Part
from lm.convert.settings import Settings
from lm.models import gpt

FAMILY = "gpt"
CLASSES = ("GPT2LMHeadModel", "GPT2Model")
PREFIX = "transformer."
ALIASES: tuple[tuple[str, str], ...] = ()
FREE: frozenset[str] = frozenset()
# What transformers takes for the same, and before it.
NAMES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf", "relu": "relu"}


def read(settings: Settings) -> dict[str, Any]:
    """Return the fields of `gpt.Config`."""
    also = {n: settings.values[name] for name, n in NAMES.items() if name in settings}
    settings = Settings({**settings.values, **also}, settings.where, settings.tensors)
    settings.only(
        is_causal=True,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return {
        "num_layers": settings.integer("n_layer", 12),
        "model_dim": settings.integer("n_embd", 768),
        "num_heads": settings.integer("n_head", 12),
        "mlp_dim": settings.integer("n_inner", 0),
        "vocab_size": settings.integer("vocab_size", 50257),
        "max_length": settings.integer("n_positions", 1024),
        "positions": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "norm_epsilon": settings.number("layer_norm_epsilon", 1e-5),
        "activation": settings.one_of("activation_function", "gelu_new", ACTIVATIONS),
        "qk_norm": False,
        "bias": True,
        "tied": settings.flag("tie_word_embeddings", True),
        "dropout": settings.number("resid_pdrop", 0.1),
    }


def task(cfg: gpt.Config) -> dict[str, Any]:
    """Return the task that it was trained for, in rows that an evaluation can hold."""
    return {"name": "causal_lm", "length": min(cfg.max_length, 1024)}


def write(cfg: gpt.Config) -> dict[str, Any]:
    """Return config.json's settings."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "n_layer": cfg.num_layers,
        "n_embd": cfg.model_dim,
        "n_head": cfg.num_heads,
        "n_inner": cfg.sizes["mlp_dim"],
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.max_length,
        "layer_norm_epsilon": cfg.norm_epsilon,
        "activation_function": names.get(cfg.activation, "gelu_new"),
        "tie_word_embeddings": cfg.tied,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": 0.0,
    }


def parts(cfg: gpt.Config) -> list[Part]:
    """Return every parameter; theirs multiply x W, with W [inputs, outputs], as ours do."""
    D, F, H = cfg.model_dim, cfg.sizes["mlp_dim"], cfg.num_heads
    K = D // H
    found = [
        mapping.table("embed.embedding", f"{PREFIX}wte.weight", cfg.vocab_size, D),
        mapping.reshaped("position_embedding", f"{PREFIX}wpe.weight", (cfg.max_length, D)),
    ]
    for n in range(cfg.num_layers):
        ours, theirs = f"layers.block_{n}", f"{PREFIX}h.{n}"
        found += [
            _fused(f"{ours}.attention.qkv.kernel", f"{theirs}.attn.c_attn.weight", (D,), H, K),
            _fused(f"{ours}.attention.qkv.bias", f"{theirs}.attn.c_attn.bias", (), H, K),
            mapping.reshaped(
                f"{ours}.attention.out.kernel", f"{theirs}.attn.c_proj.weight", (D, D), (H, K, D)
            ),
            mapping.reshaped(f"{ours}.attention.out.bias", f"{theirs}.attn.c_proj.bias", (D,)),
            mapping.reshaped(f"{ours}.mlp.up.kernel", f"{theirs}.mlp.c_fc.weight", (D, F)),
            mapping.reshaped(f"{ours}.mlp.up.bias", f"{theirs}.mlp.c_fc.bias", (F,)),
            mapping.reshaped(f"{ours}.mlp.down.kernel", f"{theirs}.mlp.c_proj.weight", (F, D)),
            mapping.reshaped(f"{ours}.mlp.down.bias", f"{theirs}.mlp.c_proj.bias", (D,)),
            *_norm(f"{ours}.attention_norm", f"{theirs}.ln_1", D),
            *_norm(f"{ours}.mlp_norm", f"{theirs}.ln_2", D),
        ]
    found += _norm("norm", f"{PREFIX}ln_f", D)
    if not cfg.tied:
        found.append(mapping.head("head.kernel", "lm_head.weight", cfg.vocab_size, D))
    return found


def _norm(ours: str, theirs: str, width: int) -> list[Part]:
    return [
        mapping.reshaped(f"{ours}.scale", f"{theirs}.weight", (width,)),
        mapping.reshaped(f"{ours}.bias", f"{theirs}.bias", (width,)),
    ]


def _fused(ours: str, name: str, width: tuple[int, ...], H: int, K: int) -> Part:
    """Return [..., H, 3, K] of theirs, which has all queries, then all keys, then all values."""
    return Part(
        ours,
        ((name, (*width, 3 * H * K)),),
        lambda x: x.reshape(*width, 3, H, K).swapaxes(-3, -2),
        lambda x: [x.swapaxes(-3, -2).reshape(*width, 3 * H * K)],
    )


def copies(cfg: gpt.Config) -> dict[str, str]:
    """Return the tied head, which some files hold again."""
    return {"lm_head.weight": f"{PREFIX}wte.weight"} if cfg.tied else {}


def constants(cfg: gpt.Config) -> dict[str, Constant]:
    """Return the causal masks that old files hold, one a layer, and what hidden scores were set to."""
    length, theirs = cfg.max_length, [f"{PREFIX}h.{n}.attn" for n in range(cfg.num_layers)]
    mask = Constant((1, 1, length, length), lambda: np.tri(length, dtype=np.float32)[None, None])
    hidden = Constant((), lambda: np.array(-1e4, np.float32))
    return {f"{name}.bias": mask for name in theirs} | {
        f"{name}.masked_bias": hidden for name in theirs
    }


def spare(cfg: gpt.Config) -> dict[str, mapping.Shape]:
    """Return nothing: no file holds any."""
    return {}
