"""BERT: `BertForPreTraining` and `BertForMaskedLM` of transformers."""

from typing import Any

import numpy as np

from lm.convert import mapping
from lm.convert.mapping import Constant, Part
from lm.convert.settings import Settings
from lm.models import bert

FAMILY = "bert"
CLASSES = ("BertForPreTraining", "BertForMaskedLM")
PREFIX = "bert."
ALIASES = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))
FREE: frozenset[str] = frozenset()
ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
}
NEXT_SENTENCE = "cls.seq_relationship"
HEAD = {
    "head": "cls.predictions.transform.dense",
    "head_norm": "cls.predictions.transform.LayerNorm",
    "head_bias": "cls.predictions.bias",
}


def read(settings: Settings) -> dict[str, Any]:
    """Return the fields of `bert.Config`.

    Whether there is a head for the next sentence, the tensors say: published files of BertForMaskedLM
    have one.
    """
    fields = read_encoder(settings)
    fields["max_length"] = settings.integer("max_position_embeddings", 512)
    named = settings.values.get("architectures") == [CLASSES[0]]
    weight = f"{NEXT_SENTENCE}.weight"
    fields["next_sentence"] = weight in settings.tensors if settings.tensors else named
    return fields


def read_encoder(settings: Settings) -> dict[str, Any]:
    """Return the fields that BERT and RoBERTa have alike."""
    settings.only(
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
    )
    return {
        "num_layers": settings.integer("num_hidden_layers", 12),
        "model_dim": settings.integer("hidden_size", 768),
        "num_heads": settings.integer("num_attention_heads", 12),
        "mlp_dim": settings.integer("intermediate_size", 3072),
        "vocab_size": settings.integer("vocab_size", 30522),
        "num_types": settings.integer("type_vocab_size", 2),
        "activation": settings.one_of("hidden_act", "gelu", ACTIVATIONS),
        "norm_epsilon": settings.number("layer_norm_eps", 1e-12),
        "dropout": settings.number("hidden_dropout_prob", 0.1),
    }


def task(cfg: bert.Config) -> dict[str, Any]:
    """Return the task that it was trained for."""
    length = min(cfg.max_length, 512)
    return {"name": "masked_lm", "length": length, "next_sentence": cfg.next_sentence}


def write(cfg: bert.Config) -> dict[str, Any]:
    """Return config.json's settings."""
    return {
        "architectures": [CLASSES[0] if cfg.next_sentence else CLASSES[1]],
        **write_encoder(cfg),
        "max_position_embeddings": cfg.max_length,
    }


def write_encoder(cfg: bert.Config) -> dict[str, Any]:
    """Return the settings that BERT and RoBERTa have alike."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.model_dim,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": cfg.sizes["mlp_dim"],
        "vocab_size": cfg.vocab_size,
        "hidden_act": names.get(cfg.activation, "gelu"),
        "layer_norm_eps": cfg.norm_epsilon,
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": True,
        "type_vocab_size": cfg.num_types,
    }


def parts(cfg: bert.Config) -> list[Part]:
    """Return every parameter."""
    D = cfg.model_dim
    found = encoder_parts(cfg, PREFIX, HEAD, unused_positions=0)
    if cfg.next_sentence:
        found += dense("pooler", f"{PREFIX}pooler.dense", (D,), (D,))
        found += dense("next_sentence_head", NEXT_SENTENCE, (D,), (2,))
    return found


def encoder_parts(
    cfg: bert.Config, prefix: str, head: dict[str, str], *, unused_positions: int
) -> list[Part]:
    """Return the parameters that BERT and RoBERTa have alike.

    `unused_positions` is how many rows of theirs stand before the one of position 0.
    """
    D, V, table = cfg.model_dim, cfg.vocab_size, f"{prefix}embeddings"
    found = [
        mapping.table("embed.embedding", f"{table}.word_embeddings.weight", V, D),
        mapping.rows(
            "position_embedding", f"{table}.position_embeddings.weight", (cfg.max_length, D),
            unused=unused_positions,
        ),
        mapping.reshaped(
            "type_embedding", f"{table}.token_type_embeddings.weight", (cfg.num_types, D)
        ),
        *norm("embed_norm", f"{table}.LayerNorm", D),
    ]  # fmt: skip
    for n in range(cfg.num_layers):
        found += _block(cfg, f"layers.block_{n}", f"{prefix}encoder.layer.{n}")
    return [
        *found,
        *dense("head", head["head"], (D,), (D,)),
        *norm("head_norm", head["head_norm"], D),
        mapping.padded("head_bias", head["head_bias"], V),
    ]


def _block(cfg: bert.Config, ours: str, theirs: str) -> list[Part]:
    D, F, H, K = cfg.model_dim, cfg.sizes["mlp_dim"], cfg.num_heads, cfg.sizes["head_dim"]
    heads = {"num_heads": H, "num_kv_heads": H, "head_dim": K}
    qkv = [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")]
    kernel, bias = f"{ours}.attention.qkv.kernel", f"{ours}.attention.qkv.bias"
    return [
        mapping.attention(kernel, [f"{q}.weight" for q in qkv], model_dim=D, **heads),
        mapping.attention(bias, [f"{q}.bias" for q in qkv], model_dim=0, **heads),
        *dense(f"{ours}.attention.out", f"{theirs}.attention.output.dense", (H, K), (D,)),
        *norm(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm", D),
        *dense(f"{ours}.mlp.up", f"{theirs}.intermediate.dense", (D,), (F,)),
        *dense(f"{ours}.mlp.down", f"{theirs}.output.dense", (F,), (D,)),
        *norm(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm", D),
    ]


def dense(ours: str, theirs: str, inputs: mapping.Shape, outputs: mapping.Shape) -> list[Part]:
    """Return kernel and bias of PyTorch's Linear."""
    return [
        mapping.linear(f"{ours}.kernel", f"{theirs}.weight", inputs, outputs),
        mapping.reshaped(f"{ours}.bias", f"{theirs}.bias", outputs),
    ]


def norm(ours: str, theirs: str, width: int) -> list[Part]:
    """Return scale and bias of PyTorch's LayerNorm."""
    return [
        mapping.reshaped(f"{ours}.scale", f"{theirs}.weight", (width,)),
        mapping.reshaped(f"{ours}.bias", f"{theirs}.bias", (width,)),
    ]


def copies(cfg: bert.Config) -> dict[str, str]:
    """Return the tied head, which some files hold again."""
    return {
        "cls.predictions.decoder.weight": f"{PREFIX}embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": HEAD["head_bias"],
    }


def constants(cfg: bert.Config) -> dict[str, Constant]:
    """Return the positions that old files hold."""
    positions = Constant((1, cfg.max_length), lambda: np.arange(cfg.max_length)[None])
    return {f"{PREFIX}embeddings.position_ids": positions}


def spare(cfg: bert.Config) -> dict[str, mapping.Shape]:
    """Return the pooler of files that have no head for it."""
    D, pooler = cfg.model_dim, f"{PREFIX}pooler.dense"
    return {} if cfg.next_sentence else {f"{pooler}.weight": (D, D), f"{pooler}.bias": (D,)}
