"""Encoder-decoder Transformer with relative positions.

"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", Raffel et al. 2019
(arXiv 1910.10683). The defaults are T5-small; T5 v1.1 is the option set activation=geglu (Shazeer
2020, 2002.05202), tied=False, with sizes of its own.

What differs: segments of a row do not see each other, and each reads its own source; dropout acts on
embeddings, residual branches and the features, not inside them; the head of v1.1 starts at
1 / sqrt(model_dim).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import hardware
from lm.config import ConfigError
from lm.models import (
    EXPERTS,
    EXPERTS_ONLY_FOR,
    check_experts,
    check_fields,
    check_option,
    feed_forward_parameters,
)
from lm.nn import moe
from lm.nn.attention import Attention, causal_mask, segment_mask
from lm.nn.context import WAYS, Pairs
from lm.nn.cross_attention import CrossAttention
from lm.nn.embed import Embed, Head, finish_logits, pad_vocab
from lm.nn.mlp import ACTIVATIONS
from lm.nn.norm import Norm
from lm.nn.relative import RelativeBias
from lm.nn.transformer import Stack, stacking


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "t5"  # family: a file of lm/models, such as gpt or t5
    num_layers: int = 6  # blocks of the encoder
    num_decoder_layers: int = 0  # blocks of the decoder; 0 = num_layers
    model_dim: int = 512  # width
    num_heads: int = 8  # attention heads
    head_dim: int = 64  # width of a head, whatever the model's
    mlp_dim: int = 0  # feed-forward width; 0 = 4 model_dim
    vocab_size: int = 0  # tokens; 0 = the tokenizer's
    max_length: int = 0  # tokens of a decoder row; 0 = the task's row
    max_source_length: int = 0  # tokens of a source; 0 = the task's
    start_token: int = -1  # that a target begins with; -1 = end of text (T5's own: padding, 0)
    num_buckets: int = 32  # of relative positions
    max_distance: int = 128  # positions from which on all are in one bucket
    activation: str = "relu"  # relu, geglu (v1.1), gelu, gelu_erf, relu2 or swiglu
    num_experts: int = 0  # of each feed-forward layer (lm/nn/moe.py); 0 = one dense layer
    experts_per_token: int = 2  # experts that a token is sent to
    capacity_factor: float = (
        0.0  # room of an expert over its even share of a row; 0 = none is dropped
    )
    router_z_loss: float = 1e-3  # weight of log(Z)^2 of the router
    balance_loss: float = 1e-2  # weight of the experts' uneven load
    shared_experts: int = 0  # experts that every token is sent to besides
    expert_dim: int = 0  # width of an expert; 0 = mlp_dim
    norm_epsilon: float = 1e-6  # added to mean squares
    tied: bool = True  # the head is the embedding, on features / sqrt(model_dim); v1.1: its own
    dropout: float = 0.0  # probability, on embeddings, residual branches and features; T5: 0.1
    scan: bool = False  # scan over the layers: compile time constant in depth
    remat: str = "none"  # none, dots (keep matrix products) or full (keep block inputs)
    context_parallel: str = (
        ""  # how keys cross mesh.context: ring or gather; "" = by size (lm/nn/context.py)
    )
    microbatches: int = 0  # parts of a batch that flow through mesh.stage stages; 0 = 4 a stage
    stage_repeats: int = 1  # how often each part comes around, through thinner stages
    dtype: str = ""  # of computation: float32 or bfloat16; "" = bfloat16 on accelerators
    matmul_dtype: str = ""  # of the blocks' projections: fp8 (NVIDIA from 8.9 on); "" = dtype

    ONLY_FOR: ClassVar = EXPERTS_ONLY_FOR

    def __post_init__(self):
        check_option(self, "activation", tuple(ACTIVATIONS))
        check_option(self, "context_parallel", ("", *WAYS))
        positive = ("num_layers", "model_dim", "num_heads", "head_dim", "experts_per_token")
        derived = ("num_decoder_layers", "mlp_dim", "vocab_size", "max_length", "max_source_length")
        check_fields(self, positive=positive, derived=(*derived, *EXPERTS))
        check_experts(self)
        if self.num_buckets < 4 or self.num_buckets % 2:
            raise ConfigError(f"model.num_buckets={self.num_buckets}: use an even number from 4 on")
        if self.max_distance <= self.num_buckets // 2:
            raise ConfigError(
                f"model.max_distance={self.max_distance}: use more than half of model.num_buckets="
                f"{self.num_buckets}"
            )
        if not -1 <= self.start_token < (self.vocab_size or math.inf):
            raise ConfigError(f"model.start_token={self.start_token}: use a token, or -1")

    @property
    def sizes(self) -> dict[str, int]:
        """The derived sizes: num_decoder_layers, mlp_dim."""
        return {
            "num_decoder_layers": self.num_decoder_layers or self.num_layers,
            "mlp_dim": self.mlp_dim or 4 * self.model_dim,
        }


def query_std(cfg: Config) -> float:
    """Return the deviation that queries' kernels start with: the scores are not scaled, so small."""
    return (cfg.model_dim * cfg.head_dim) ** -0.5


def self_attention(cfg: Config, *, causal: bool, decode_length: int = 0) -> Attention:
    """Return a block's self-attention; a submodule of the block that calls."""

    def kernel_init(key, shape, dtype=jnp.float32):
        std = jnp.array([query_std(cfg), *[cfg.model_dim**-0.5] * 2], dtype)
        return jax.random.normal(key, shape, dtype) * std[None, None, :, None]

    return Attention(
        num_heads=cfg.num_heads,
        num_kv_heads=cfg.num_heads,
        head_dim=cfg.head_dim,
        dtype=hardware.compute_dtype(cfg.dtype),
        kernel_init=kernel_init,
        out_init=nn.initializers.normal((cfg.num_heads * cfg.head_dim) ** -0.5),
        causal=causal,
        scale=1.0,
        context_parallel=cfg.context_parallel,
        matmul_dtype=cfg.matmul_dtype,
        decode_length=decode_length,
        name="attention",
    )


def feed_forward(cfg: Config, x_BLD: jax.Array, segments_BL: jax.Array, *, decode: bool):
    """Return [B, L, D] of a block's feed-forward layer; a submodule of the block that calls."""
    width = (cfg.num_experts and cfg.expert_dim) or cfg.sizes["mlp_dim"]
    return moe.feed_forward(
        cfg,
        x_BLD,
        segments_BL,
        dtype=hardware.compute_dtype(cfg.dtype),
        kernel_init=nn.initializers.normal(cfg.model_dim**-0.5),
        out_init=nn.initializers.normal(width**-0.5),
        decode=decode,
    )


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    cfg: Config
    train: bool
    decode: bool

    @nn.compact
    def __call__(self, x_BSD, mask, positions_BS, score_bias_NHSS, segments_BS) -> jax.Array:
        cfg = self.cfg
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        y = Norm(epsilon=cfg.norm_epsilon, name="attention_norm")(x_BSD)
        y = self_attention(cfg, causal=False)(
            y, mask=mask, positions_BL=positions_BS, score_bias_NHLS=score_bias_NHSS
        )
        x_BSD = x_BSD + dropout(y)
        y = Norm(epsilon=cfg.norm_epsilon, name="mlp_norm")(x_BSD)
        return x_BSD + dropout(feed_forward(cfg, y, segments_BS, decode=self.decode))


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + cross_attention(norm(x), source), then x + mlp(norm(x))."""

    cfg: Config
    decode_length: int
    train: bool
    decode: bool

    @nn.compact
    def __call__(
        self,
        x_BLD,
        mask,
        positions_BL,
        score_bias_NHLS,
        segments_BL,
        source_BSD,
        source_segments_BS,
    ) -> jax.Array:
        cfg, init = self.cfg, nn.initializers.normal
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        y = Norm(epsilon=cfg.norm_epsilon, name="attention_norm")(x_BLD)
        y = self_attention(cfg, causal=True, decode_length=self.decode_length)(
            y, mask=mask, positions_BL=positions_BL, score_bias_NHLS=score_bias_NHLS,
            decode=self.decode,
        )  # fmt: skip
        x_BLD = x_BLD + dropout(y)
        y = Norm(epsilon=cfg.norm_epsilon, name="cross_attention_norm")(x_BLD)
        y = CrossAttention(
            num_heads=cfg.num_heads,
            head_dim=cfg.head_dim,
            dtype=hardware.compute_dtype(cfg.dtype),
            query_init=init(query_std(cfg)),
            kernel_init=init(cfg.model_dim**-0.5),
            out_init=init((cfg.num_heads * cfg.head_dim) ** -0.5),
            scale=1.0,
            context_parallel=cfg.context_parallel,
            matmul_dtype=cfg.matmul_dtype,
            name="cross_attention",
        )(
            y, segments_BL=segments_BL, source_BSD=source_BSD,
            source_segments_BS=source_segments_BS, decode=self.decode,
        )  # fmt: skip
        x_BLD = x_BLD + dropout(y)
        y = Norm(epsilon=cfg.norm_epsilon, name="mlp_norm")(x_BLD)
        return x_BLD + dropout(feed_forward(cfg, y, segments_BL, decode=self.decode))


def score_bias_of(bias: RelativeBias, mask: jax.Array | Pairs, segments_BL: jax.Array) -> jax.Array:
    """Return what rows like `segments_BL` add to their scores, of all pairs or, for `Pairs`, by distance."""
    num_rows, length = segments_BL.shape
    if isinstance(mask, Pairs):
        return bias.by_distance(length)
    return bias(length, num_rows=num_rows)


class Model(nn.Module):
    """s = norm(encoder(embed(source))); x = norm(decoder(embed(tokens), s)); logits = x E^T / sqrt(D).

    With a head of its own, logits = x W.
    """

    cfg: Config
    decode_length: int = 0

    accepts: ClassVar = frozenset({"source", "packed", "context"})
    learns: ClassVar = "gradient"

    @property
    def max_context(self) -> int:
        """Positions that decoding may use; 0 = any number."""
        return 0

    def setup(self):
        cfg, dtype = self.cfg, hardware.compute_dtype(self.cfg.dtype)
        layers, D = stacking(cfg), cfg.model_dim
        self.embed = Embed(cfg.vocab_size, D, dtype, nn.initializers.normal(1.0))
        self.encoder_positions = self._relative_bias(bidirectional=True)
        self.encoder = Stack(EncoderBlock, {"cfg": cfg}, cfg.num_layers, **layers)
        self.encoder_norm = Norm(epsilon=cfg.norm_epsilon)
        self.decoder_positions = self._relative_bias(bidirectional=False)
        arguments = {"cfg": cfg, "decode_length": self.decode_length}
        self.decoder = Stack(DecoderBlock, arguments, cfg.sizes["num_decoder_layers"], **layers)
        self.decoder_norm = Norm(epsilon=cfg.norm_epsilon)
        self.dropout = nn.Dropout(cfg.dropout)
        if not cfg.tied:
            self.head = Head(cfg.vocab_size, D, dtype, nn.initializers.normal(D**-0.5))

    def _relative_bias(self, *, bidirectional: bool) -> RelativeBias:
        cfg = self.cfg
        init = nn.initializers.normal(cfg.model_dim**-0.5)
        return RelativeBias(
            cfg.num_heads, bidirectional, cfg.num_buckets, cfg.max_distance, kernel_init=init
        )

    def __call__(self, batch, *, train: bool = False, decode: bool = False) -> jax.Array:
        """Return features [B, L, D] of a batch (inputs, segments, positions, each [B, L]).

        And source, source_segments, source_positions, each [B, S]: each segment of a row reads the
        source's segment of the same number. In decoding they come with the prompt alone.
        """
        segments_BL, positions_BL = batch["segments"], batch["positions"]
        length = segments_BL.shape[1]
        source_BSD = source_segments_BS = None
        if "source" in batch:
            source_segments_BS = batch["source_segments"]
            source_BSD = self.encode(batch, train=train, decode=decode)
        mask = causal_mask(length, segments_BL=None if decode else segments_BL, decode=decode)
        if decode and length == 1:
            slots_11S = jnp.arange(self.decode_length)[None, None]
            score_bias = self.decoder_positions.at(slots_11S - positions_BL[:, :, None])
        else:
            score_bias = score_bias_of(self.decoder_positions, mask, segments_BL)
        x_BLD = self.dropout(self.embed(batch["inputs"]), deterministic=not train)
        x_BLD = self.decoder(
            x_BLD, mask, positions_BL, score_bias, segments_BL, source_BSD, source_segments_BS,
            train=train, decode=decode,
        )  # fmt: skip
        return self.dropout(self.decoder_norm(x_BLD), deterministic=not train)

    def encode(self, batch, *, train: bool = False, decode: bool = False) -> jax.Array:
        """Return features [B, S, D] of the source; in decoding no expert drops a token of it."""
        segments_BS = batch["source_segments"]
        x_BSD = self.dropout(self.embed(batch["source"]), deterministic=not train)
        mask = segment_mask(segments_BS, segments_BS)
        score_bias = score_bias_of(self.encoder_positions, mask, segments_BS)
        x_BSD = self.encoder(
            x_BSD,
            mask,
            batch["source_positions"],
            score_bias,
            segments_BS,
            train=train,
            decode=decode,
        )
        return self.dropout(self.encoder_norm(x_BSD), deterministic=not train)

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Return float32 logits [B, L, V] of features, the padded vocabulary masked."""
        if self.cfg.tied:
            logits_BLV = self.embed.attend(x_BLD * self.cfg.model_dim**-0.5)
        else:
            logits_BLV = self.head(x_BLD)
        return finish_logits(logits_BLV, self.cfg.vocab_size)


def flops_per_token(cfg: Config, length: int, scored: float = 1.0) -> float:
    """Return training FLOPs a token of the decoder: 6 times each matrix parameter that it meets.

    The encoder's, and those of the cross-attention's keys and values, meet source tokens, of which
    there are max_source_length a row, or `length` where that is 0. Attention is counted in full:
    12 d_attention for each pair of positions and layer.
    """
    sizes, D, width = cfg.sizes, cfg.model_dim, cfg.num_heads * cfg.head_dim
    decoders = sizes["num_decoder_layers"]
    mlp = feed_forward_parameters(cfg)
    of_source = cfg.num_layers * (4 * D * width + mlp) + decoders * 2 * D * width
    of_target = decoders * (6 * D * width + mlp) + scored * D * pad_vocab(cfg.vocab_size)
    source = cfg.max_source_length or length
    ratio = source / length if length else 1.0
    pairs = cfg.num_layers * ratio * source + decoders * (length + source)
    return 6.0 * (of_source * ratio + of_target) + 12.0 * width * pairs
