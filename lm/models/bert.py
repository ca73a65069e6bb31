"""Bidirectional encoder, trained to fill in masked tokens.

"BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", Devlin et al. 2018
(arXiv 1810.04805). RoBERTa, Liu et al. 2019 (arXiv 1907.11692), is the option set num_types=1,
next_sentence=False, norm_epsilon=1e-5 (what is masked anew in every epoch is the task's).

What differs: documents of a row do not see each other where the task keeps them apart; the head over the
vocabulary is computed where something is scored and nowhere else; dropout acts on embeddings and residual
branches, not on attention weights nor on the class's features.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import hardware, sharding
from lm.config import ConfigError
from lm.models import check_fields, check_heads, check_option
from lm.nn.attention import Attention, segment_mask
from lm.nn.context import WAYS
from lm.nn.embed import Embed, finish_logits, pad_vocab
from lm.nn.linear import Linear, wide
from lm.nn.mlp import ACTIVATIONS, GATED, MLP
from lm.nn.norm import Norm
from lm.nn.transformer import Stack, stacking

INIT = nn.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "bert"  # family: a file of lm/models, such as gpt or bert
    num_layers: int = 12  # blocks
    model_dim: int = 768  # width
    num_heads: int = 12  # attention heads
    mlp_dim: int = 0  # feed-forward width; 0 = 4 model_dim
    vocab_size: int = 0  # tokens; 0 = the tokenizer's
    max_length: int = 0  # positions; 0 = the task's row
    num_types: int = 2  # kinds of segments with an embedding; 1 = one for all (RoBERTa), 0 = none
    activation: str = "gelu_erf"  # gelu_erf, gelu (tanh form), relu or relu2
    norm_epsilon: float = 1e-12  # added to variances; RoBERTa: 1e-5
    dropout: float = 0.0  # probability, on embeddings and residual branches; BERT: 0.1
    next_sentence: bool = False  # also tell whether the second segment follows the first
    num_classes: int = 0  # classes to tell apart; 0 = a language model
    scan: bool = False  # scan over the layers: compile time constant in depth
    remat: str = "none"  # none, dots (keep matrix products) or full (keep block inputs)
    context_parallel: str = (
        ""  # how keys cross mesh.context: ring or gather; "" = by size (lm/nn/context.py)
    )
    microbatches: int = 0  # parts of a batch that flow through mesh.stage stages; 0 = 4 a stage
    stage_repeats: int = 1  # how often each part comes around, through thinner stages
    dtype: str = ""  # of computation: float32 or bfloat16; "" = bfloat16 on accelerators
    matmul_dtype: str = ""  # of the blocks' projections: fp8 (NVIDIA from 8.9 on); "" = dtype

    ONLY_FOR: ClassVar = {"next_sentence": ("num_classes", (0,))}

    def __post_init__(self):
        check_option(self, "activation", tuple(name for name in ACTIVATIONS if name not in GATED))
        check_option(self, "context_parallel", ("", *WAYS))
        positive = ("num_layers", "model_dim", "num_heads")
        derived = ("mlp_dim", "vocab_size", "max_length", "num_types", "num_classes")
        check_fields(self, positive=positive, derived=derived)
        check_heads(self)
        if self.next_sentence and self.num_classes:
            raise ConfigError(
                "model.next_sentence=True: a classifier has no next sentence; use False, or "
                "model.num_classes=0"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The derived sizes: head_dim, mlp_dim."""
        return {
            "head_dim": self.model_dim // self.num_heads,
            "mlp_dim": self.mlp_dim or 4 * self.model_dim,
        }


class Block(nn.Module):
    """x = norm(x + attention(x)), then norm(x + mlp(x))."""

    cfg: Config
    train: bool
    decode: bool

    @nn.compact
    def __call__(self, x_BLD, mask, positions_BL) -> jax.Array:
        cfg, dtype = self.cfg, hardware.compute_dtype(self.cfg.dtype)
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        y = Attention(
            num_heads=cfg.num_heads,
            num_kv_heads=cfg.num_heads,
            head_dim=cfg.sizes["head_dim"],
            dtype=dtype,
            kernel_init=INIT,
            out_init=INIT,
            bias=True,
            causal=False,
            context_parallel=cfg.context_parallel,
            matmul_dtype=cfg.matmul_dtype,
            name="attention",
        )(x_BLD, mask=mask, positions_BL=positions_BL)
        norm = Norm("layernorm", bias=True, epsilon=cfg.norm_epsilon, name="attention_norm")
        x_BLD = norm(x_BLD + dropout(y))
        y = MLP(
            cfg.sizes["mlp_dim"], cfg.activation, dtype, INIT, INIT,
            bias=True, matmul_dtype=cfg.matmul_dtype, name="mlp",
        )(x_BLD)  # fmt: skip
        norm = Norm("layernorm", bias=True, epsilon=cfg.norm_epsilon, name="mlp_norm")
        return norm(x_BLD + dropout(y))


class Model(nn.Module):
    """h_0 = norm(embed(tokens) + positions + types); h_n = block_n(h_{n-1}).

    Of a language model, logits = norm(act(W h_N)) E^T + b. Of a classifier, logits = C tanh(P h_N),
    at whatever position is asked; rows have their class at the first. The same tanh(P h_N) of a row's
    first position says whether the next sentence is the next (label 0) or not (label 1); a label
    below 0 is not scored.
    """

    cfg: Config
    decode_length: int = 0

    accepts: ClassVar = frozenset({"masked", "packed", "context"})
    learns: ClassVar = "gradient"

    @property
    def max_context(self) -> int:
        """Positions of a row."""
        return self.cfg.max_length

    def setup(self):
        cfg, dtype = self.cfg, hardware.compute_dtype(self.cfg.dtype)
        D = cfg.model_dim
        self.embed = Embed(cfg.vocab_size, D, dtype, INIT)
        self.position_embedding = self._table("position", "position", cfg.max_length)
        if cfg.num_types:
            self.type_embedding = self._table("type", "types", cfg.num_types)
        self.embed_norm = Norm("layernorm", bias=True, epsilon=cfg.norm_epsilon)
        self.dropout = nn.Dropout(cfg.dropout)
        self.layers = Stack(Block, {"cfg": cfg}, cfg.num_layers, **stacking(cfg))
        square, axes, sums = (D, D), ("embed", "embed_out"), wide(dtype)  # logits are not rounded
        if cfg.next_sentence or cfg.num_classes:
            self.pooler = Linear(square, axes, dtype, INIT, bias=True)
        if cfg.next_sentence:
            self.next_sentence_head = Linear((D, 2), ("embed", "classes"), sums, INIT, bias=True)
        if cfg.num_classes:
            shape = (D, pad_vocab(cfg.num_classes))
            self.classifier = Linear(shape, ("embed", "vocab"), sums, INIT, bias=True)
        else:
            self.head = Linear(square, axes, dtype, INIT, bias=True)
            self.head_norm = Norm("layernorm", bias=True, epsilon=cfg.norm_epsilon)
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.head_bias = self.param("head_bias", zeros, (pad_vocab(cfg.vocab_size),))

    def _table(self, name: str, axis: str, size: int) -> jax.Array:
        init = nn.with_logical_partitioning(INIT, (axis, "embed"))
        return self.param(f"{name}_embedding", init, (size, self.cfg.model_dim))

    def __call__(self, batch, *, train: bool = False, decode: bool = False) -> jax.Array:
        """Return features [B, L, D] of a batch (inputs, segments, positions, each [B, L]).

        It may have `types` [B, L], else all are 0, and `labels` [B] of the next sentence.
        """
        if decode:
            raise ConfigError(
                "model.name=bert fills in masks and does not continue a text; use gpt"
            )
        cfg = self.cfg
        x_BLD = self.embed(batch["inputs"])
        table = sharding.gather(self.position_embedding, ("position", "embed"))
        x_BLD += jnp.take(table, batch["positions"], axis=0).astype(x_BLD.dtype)
        if cfg.num_types:
            table = sharding.gather(self.type_embedding, ("types", "embed"))
            told = cfg.num_types > 1 and "types" in batch
            types = jnp.take(table, batch["types"], axis=0) if told else table[None, :1]
            x_BLD = (x_BLD + types).astype(x_BLD.dtype)  # in float32, and so is its gradient
        x_BLD = self.dropout(self.embed_norm(x_BLD), deterministic=not train)
        mask = segment_mask(batch["segments"], batch["segments"])
        x_BLD = self.layers(x_BLD, mask, batch["positions"], train=train, decode=False)
        if cfg.next_sentence:
            self._score_next_sentence(x_BLD, batch)
        return x_BLD

    def _score_next_sentence(self, x_BLD: jax.Array, batch) -> None:
        logits_B2 = self.next_sentence_head(jnp.tanh(self.pooler(x_BLD[:, 0])))
        if "labels" not in batch:
            return
        labels_B = batch["labels"]
        scored_B = labels_B >= 0
        right_B2 = jnp.arange(2)[None] == labels_B[:, None]
        loss_B = -jnp.sum(jax.nn.log_softmax(logits_B2) * right_B2, axis=1)
        count = jnp.maximum(scored_B.sum(dtype=jnp.float32), 1e-9)  # no label: 0, not 0 / 0
        self.sow("losses", "next_sentence", (jnp.where(scored_B, loss_B, 0).sum(), count))

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Return float32 logits [B, L, V] of features, those of the padding masked.

        V is the vocabulary's size, or the number of classes, to a multiple of 128.
        """
        cfg = self.cfg
        if cfg.num_classes:
            logits_BLV = self.classifier(jnp.tanh(self.pooler(x_BLD)))
            return finish_logits(logits_BLV, cfg.num_classes)
        x_BLD = sharding.constrain(self.head(x_BLD), "act_batch", "act_length", "act_embed")
        x_BLD = self.head_norm(ACTIVATIONS[cfg.activation](x_BLD))
        logits_BLV = self.embed.attend(x_BLD) + self.head_bias[None, None]
        return finish_logits(logits_BLV, cfg.vocab_size)


def flops_per_token(cfg: Config, length: int, scored: float = 1.0) -> float:
    """Return training FLOPs a token: 6 N (matrix parameters of the blocks) + 12 layers D T, and the head.

    A language model's head (D^2 + D V parameters) is counted at the share of positions that are `scored`;
    a classifier's (D^2 + D C) at one of a row, and so is the pooler of the next sentence.
    """
    D = cfg.model_dim
    blocks = cfg.num_layers * (4 * D * D + 2 * D * cfg.sizes["mlp_dim"])
    once = 0.0  # a row
    head = 0.0
    if cfg.num_classes:
        once += D * D + D * pad_vocab(cfg.num_classes)
    else:
        head = scored * (D * D + D * pad_vocab(cfg.vocab_size))
    if cfg.next_sentence:
        once += D * D + 2 * D
    matrices = blocks + head + once / max(length, 1)
    return 6.0 * matrices + 12.0 * cfg.num_layers * D * length
