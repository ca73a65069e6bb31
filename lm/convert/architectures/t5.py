"""T5, version 1.0 and 1.1: `T5ForConditionalGeneration` of transformers."""

from typing import Any

import numpy as np

from lm.convert import mapping
from lm.convert.mapping import Constant, Part
from lm.convert.settings import Settings
from lm.models import t5

FAMILY = "t5"
CLASSES = ("T5ForConditionalGeneration",)
PREFIX = ""
ALIASES: tuple[tuple[str, str], ...] = ()
FREE = frozenset({"max_length", "max_source_length"})  # positions are relative
ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}
BIAS = "relative_attention_bias.weight"


def read(settings: Settings) -> dict[str, Any]:
    """Return the fields of `t5.Config`.

    A head of its own, as of version 1.1, and features that are not scaled before it go together:
    tie_word_embeddings means both, but for transformers 5, which writes true and scale_decoder_outputs.
    """
    activation = settings.one_of("feed_forward_proj", "relu", ACTIVATIONS)
    dense = {"relu": "relu", "geglu": "gelu_new", "swiglu": "silu"}[activation]
    settings.only(is_encoder_decoder=True, dense_act_fn=dense, is_gated_act=activation != "relu")
    said = "scale_decoder_outputs" if "scale_decoder_outputs" in settings else "tie_word_embeddings"
    length = settings.integer("n_positions", 512)
    layers = settings.integer("num_layers", 6)
    return {
        "num_layers": layers,
        "num_decoder_layers": settings.integer("num_decoder_layers", layers),
        "model_dim": settings.integer("d_model", 512),
        "num_heads": settings.integer("num_heads", 8),
        "head_dim": settings.integer("d_kv", 64),
        "mlp_dim": settings.integer("d_ff", 2048),
        "vocab_size": settings.integer("vocab_size", 32128),
        "max_length": length,
        "max_source_length": length,
        "start_token": settings.integer("decoder_start_token_id", 0),
        "num_buckets": settings.integer("relative_attention_num_buckets", 32),
        "max_distance": settings.integer("relative_attention_max_distance", 128),
        "activation": activation,
        "norm_epsilon": settings.number("layer_norm_epsilon", 1e-6),
        "tied": settings.flag(said, True),
        "dropout": settings.number("dropout_rate", 0.1),
    }


def task(cfg: t5.Config) -> dict[str, Any]:
    """Return the task that it was trained for."""
    return {"name": "span_corruption", "source_length": min(cfg.max_source_length, 512)}


def write(cfg: t5.Config) -> dict[str, Any]:
    """Return config.json's settings."""
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "num_layers": cfg.num_layers,
        "num_decoder_layers": cfg.sizes["num_decoder_layers"],
        "d_model": cfg.model_dim,
        "num_heads": cfg.num_heads,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.sizes["mlp_dim"],
        "vocab_size": cfg.vocab_size,
        "n_positions": max(cfg.max_length, cfg.max_source_length),
        "relative_attention_num_buckets": cfg.num_buckets,
        "relative_attention_max_distance": cfg.max_distance,
        "feed_forward_proj": names.get(cfg.activation, "relu"),
        "layer_norm_epsilon": cfg.norm_epsilon,
        "tie_word_embeddings": cfg.tied,
        "dropout_rate": cfg.dropout,
        "is_encoder_decoder": True,
        "decoder_start_token_id": cfg.start_token,
        "pad_token_id": 0,
    }


def parts(cfg: t5.Config) -> list[Part]:
    """Return every parameter."""
    D, H = cfg.model_dim, cfg.num_heads
    found = [mapping.table("embed.embedding", "shared.weight", cfg.vocab_size, D)]
    stacks = {"encoder": cfg.num_layers, "decoder": cfg.sizes["num_decoder_layers"]}
    for stack, count in stacks.items():
        bias = f"{stack}.block.0.layer.0.SelfAttention.{BIAS}"
        found += [
            mapping.reshaped(f"{stack}_positions.bias", bias, (cfg.num_buckets, H)),
            _norm(f"{stack}_norm", f"{stack}.final_layer_norm", D),
        ]
        for n in range(count):
            ours, theirs = f"{stack}.block_{n}", f"{stack}.block.{n}.layer"
            found += _attention(cfg, ours, f"{theirs}.0")
            if stack == "decoder":
                found += _cross_attention(cfg, ours, f"{theirs}.1")
            found += _mlp(cfg, ours, f"{theirs}.{2 if stack == 'decoder' else 1}")
    if not cfg.tied:
        found.append(mapping.head("head.kernel", "lm_head.weight", cfg.vocab_size, D))
    return found


def _norm(ours: str, theirs: str, width: int) -> Part:
    return mapping.reshaped(f"{ours}.scale", f"{theirs}.weight", (width,))


def _attention(cfg: t5.Config, ours: str, theirs: str) -> list[Part]:
    D, H, K = cfg.model_dim, cfg.num_heads, cfg.head_dim
    names = [f"{theirs}.SelfAttention.{name}.weight" for name in "qkv"]
    heads = {"num_heads": H, "num_kv_heads": H, "head_dim": K}
    out = f"{theirs}.SelfAttention.o.weight"
    return [
        _norm(f"{ours}.attention_norm", f"{theirs}.layer_norm", D),
        mapping.attention(f"{ours}.attention.qkv.kernel", names, model_dim=D, **heads),
        mapping.linear(f"{ours}.attention.out.kernel", out, (H, K), (D,)),
    ]


def _cross_attention(cfg: t5.Config, ours: str, theirs: str) -> list[Part]:
    D, H, K = cfg.model_dim, cfg.num_heads, cfg.head_dim
    query, key, value, out = (f"{theirs}.EncDecAttention.{name}.weight" for name in "qkvo")
    ours_of = f"{ours}.cross_attention"
    return [
        _norm(f"{ours}.cross_attention_norm", f"{theirs}.layer_norm", D),
        mapping.linear(f"{ours_of}.query.kernel", query, (D,), (H, K)),
        Part(  # [D, H, 2, K]
            f"{ours_of}.key_value.kernel",
            ((key, (H * K, D)), (value, (H * K, D))),
            lambda *both: np.stack([x.T.reshape(D, H, K) for x in both], axis=2),
            lambda x: [part.reshape(D, H * K).T for part in np.moveaxis(x, 2, 0)],
        ),
        mapping.linear(f"{ours_of}.out.kernel", out, (H, K), (D,)),
    ]


def _mlp(cfg: t5.Config, ours: str, theirs: str) -> list[Part]:
    D, F, dense = cfg.model_dim, cfg.sizes["mlp_dim"], f"{theirs}.DenseReluDense"
    up = f"{ours}.mlp.up.kernel"
    if cfg.activation in ("geglu", "swiglu"):
        gates = [f"{dense}.wi_{i}.weight" for i in (0, 1)]
        widen = mapping.stacked(up, gates, (F, D), axis=1, linear=True)
    else:
        widen = mapping.linear(up, f"{dense}.wi.weight", (D,), (F,))
    return [
        _norm(f"{ours}.mlp_norm", f"{theirs}.layer_norm", D),
        widen,
        mapping.linear(f"{ours}.mlp.down.kernel", f"{dense}.wo.weight", (F,), (D,)),
    ]


def copies(cfg: t5.Config) -> dict[str, str]:
    """Return the embedding of either side, and the tied head, which some files hold again."""
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    return dict.fromkeys([*names, *(["lm_head.weight"] if cfg.tied else [])], "shared.weight")


def constants(cfg: t5.Config) -> dict[str, Constant]:
    """Return nothing: no file holds any."""
    return {}


def spare(cfg: t5.Config) -> dict[str, mapping.Shape]:
    """Return the table that the first files have for the attention to the source, which has no use."""
    name = f"decoder.block.0.layer.1.EncDecAttention.{BIAS}"
    return {name: (cfg.num_buckets, cfg.num_heads)}
