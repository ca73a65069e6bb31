"""Decoder-only Transformer.

"Language Models are Unsupervised Multitask Learners", Radford et al. 2019 (GPT-2), and what has been
kept since: rotary positions and their scaling (`lm.nn.rotary`), RMSNorm (arXiv 1910.07467), SwiGLU
(2002.05202) or squared ReLU (2109.08668), grouped-query attention (2305.13245), query-key normalisation
(2010.04245), logit soft-cap (Gemma 2, 2408.00118), sliding windows (2004.05150).

What differs: the defaults are the current recipe. GPT-2 itself is the option set positions=learned,
norm=layernorm, norm_bias=True, bias=True, activation=gelu, qk_norm=False; Llama (arXiv 2302.13971) is
activation=swiglu, qk_norm=False, tied=False with its sizes and, from 3.1 on, rope_scaling=llama3.
Dropout on attention's weights, which GPT-2 trained with, is left out.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import hardware, sharding
from lm.config import ConfigError
from lm.models import (
    EXPERTS,
    EXPERTS_ONLY_FOR,
    check_experts,
    check_fields,
    check_heads,
    check_option,
    feed_forward_parameters,
)
from lm.nn.attention import Attention, causal_mask
from lm.nn.context import WAYS
from lm.nn.embed import Embed, Head, finish_logits, pad_vocab
from lm.nn.mlp import ACTIVATIONS, GATED
from lm.nn.moe import feed_forward
from lm.nn.norm import Norm
from lm.nn.rotary import SCALINGS, Rotary
from lm.nn.transformer import Stack, stacking


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "gpt"  # family: a file of lm/models, such as gpt or rnn
    num_layers: int = 12  # blocks
    model_dim: int = 768  # width
    num_heads: int = 12  # query heads
    num_kv_heads: int = 0  # key-value heads; 0 = num_heads
    head_dim: int = 0  # width of a head; 0 = model_dim / num_heads
    mlp_dim: int = 0  # feed-forward width; 0 = 4 model_dim (gated: 8/3, to a multiple of 64)
    vocab_size: int = 0  # tokens; 0 = the tokenizer's
    max_length: int = 0  # positions; 0 = the task's row
    positions: str = "rotary"  # rotary or learned
    rope_base: float = 10000.0  # longest rotary wavelength is 2 pi times this
    rope_scaling: str = "none"  # for more positions: none, linear, llama3 or yarn (lm/nn/rotary.py)
    rope_factor: float = 1.0  # how many times as many positions
    rope_original_length: int = 0  # positions before; 0 = max_length / rope_factor
    rope_low_frequency: float = 1.0  # turns in these below which a frequency is scaled in full
    rope_high_frequency: float = 4.0  # turns in these above which it is kept
    rope_beta_fast: float = 32.0  # turns in these above which a frequency is kept
    rope_beta_slow: float = 1.0  # turns in these below which it is scaled in full
    rope_truncate: bool = True  # whole dimensions between these two
    rope_attention_factor: float = 0.0  # of cosine and sine; 0 = by rope_factor and the next two
    rope_mscale: float = 0.0  # m of 0.1 m log(rope_factor) + 1, in the numerator; 0 = neither
    rope_mscale_all_dim: float = 0.0  # the same in the denominator; both are given, or neither
    norm: str = "rmsnorm"  # rmsnorm or layernorm
    norm_bias: bool = False  # layernorm with a bias
    norm_epsilon: float = 1e-5  # added to the variance, or the mean square
    activation: str = "relu2"  # gelu, gelu_erf, relu, relu2, swiglu or geglu
    qk_norm: bool = True  # RMS norm of queries and keys
    bias: bool = False  # biases in the projections
    bias_in: str = "all"  # which have them: all, attention or mlp
    num_experts: int = 0  # of each feed-forward layer (lm/nn/moe.py); 0 = one dense layer
    experts_per_token: int = 2  # experts that a token is sent to
    capacity_factor: float = (
        0.0  # room of an expert over its even share of a row; 0 = none is dropped
    )
    router_z_loss: float = 1e-3  # weight of log(Z)^2 of the router
    balance_loss: float = 1e-2  # weight of the experts' uneven load
    shared_experts: int = 0  # experts that every token is sent to besides
    expert_dim: int = 0  # width of an expert; 0 = mlp_dim
    tied: bool = True  # the head is the embedding
    dropout: float = 0.0  # probability, on embeddings and residual branches
    logit_softcap: float = 0.0  # logits = cap tanh(logits / cap); 0 = off
    window: int = 0  # positions a query sees, itself included; 0 = all
    residual_init: str = "scaled"  # of residual projections: scaled (by 1/sqrt(2 layers)) or zero
    scan: bool = False  # scan over the layers: compile time constant in depth
    remat: str = "none"  # none, dots (keep matrix products) or full (keep block inputs)
    microbatches: int = 0  # parts of a batch that flow through mesh.stage stages; 0 = 4 a stage
    stage_repeats: int = 1  # how often each part comes around, through thinner stages
    mask: str = ""  # causal or segments (documents of a row apart); "" = as the task packs
    kernel: str = (
        ""  # of attention: xla or cudnn; "" = cudnn where it can be used (not with segments)
    )
    context_parallel: str = (
        ""  # how keys cross mesh.context: ring or gather; "" = by size (lm/nn/context.py)
    )
    dtype: str = ""  # of computation: float32 or bfloat16; "" = bfloat16 on accelerators
    matmul_dtype: str = ""  # of the blocks' projections: fp8 (NVIDIA from 8.9 on); "" = dtype

    ONLY_FOR: ClassVar = {
        "rope_base": ("positions", ("rotary",)),
        "rope_scaling": ("positions", ("rotary",)),
        "rope_factor": ("rope_scaling", ("linear", "llama3", "yarn")),
        "rope_original_length": ("rope_scaling", ("llama3", "yarn")),
        "rope_low_frequency": ("rope_scaling", ("llama3",)),
        "rope_high_frequency": ("rope_scaling", ("llama3",)),
        "rope_beta_fast": ("rope_scaling", ("yarn",)),
        "rope_beta_slow": ("rope_scaling", ("yarn",)),
        "rope_truncate": ("rope_scaling", ("yarn",)),
        "rope_attention_factor": ("rope_scaling", ("yarn",)),
        "rope_mscale": ("rope_scaling", ("yarn",)),
        "rope_mscale_all_dim": ("rope_scaling", ("yarn",)),
        "norm_bias": ("norm", ("layernorm",)),
        "bias_in": ("bias", (True,)),
        **EXPERTS_ONLY_FOR,
    }

    def __post_init__(self):
        check_option(self, "positions", ("rotary", "learned"))
        check_option(self, "rope_scaling", SCALINGS)
        check_option(self, "norm", ("rmsnorm", "layernorm"))
        check_option(self, "bias_in", ("all", "attention", "mlp"))
        check_option(self, "activation", tuple(ACTIVATIONS))
        check_option(self, "residual_init", ("scaled", "zero"))
        check_option(self, "mask", ("", "causal", "segments"))
        check_option(self, "kernel", ("", "xla", "cudnn"))
        check_option(self, "context_parallel", ("", *WAYS))
        positive = ("num_layers", "model_dim", "num_heads", "experts_per_token")
        derived = ("num_kv_heads", "head_dim", "mlp_dim", "vocab_size", "max_length")
        more = (*EXPERTS, "window", "logit_softcap")
        check_fields(self, positive=positive, derived=(*derived, *more))
        check_experts(self)
        if self.num_experts and self.biased("mlp"):
            raise ConfigError("model.bias=True: experts have none; use model.bias_in=attention")
        self._check_rope()
        if not self.head_dim:
            check_heads(self, "or set model.head_dim")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}"
            )
        if self.positions == "rotary" and self.sizes["head_dim"] % 2:
            raise ConfigError(
                f"model.head_dim={self.sizes['head_dim']}: rotary positions need it even"
            )

    def _check_rope(self):
        least = dict.fromkeys(("rope_original_length", "rope_attention_factor"), 0)
        least |= dict.fromkeys(("rope_mscale", "rope_mscale_all_dim"), 0)
        for field, value in (least | {"rope_factor": 1}).items():
            if getattr(self, field) < value:
                raise ConfigError(f"model.{field}={getattr(self, field)}: use {value} or more")
        for field in ("rope_low_frequency", "rope_beta_slow"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"model.{field}={getattr(self, field)}: use a positive number")
        pairs = (("low_frequency", "high_frequency"), ("beta_slow", "beta_fast"))
        for low, high in ((f"rope_{low}", f"rope_{high}") for low, high in pairs):
            if getattr(self, high) <= getattr(self, low):
                raise ConfigError(
                    f"model.{high}={getattr(self, high)}: use more than model.{low}={getattr(self, low)}"
                )
        if bool(self.rope_mscale) != bool(self.rope_mscale_all_dim):
            raise ConfigError(
                f"model.rope_mscale={self.rope_mscale} and model.rope_mscale_all_dim="
                f"{self.rope_mscale_all_dim}: one alone changes nothing; set both, or neither"
            )
        if self.rope_scaling != "none" and self.rope_factor == 1:
            raise ConfigError(
                f"model.rope_scaling={self.rope_scaling!r}: with model.rope_factor=1.0 it changes nothing; "
                "use a factor above 1, or model.rope_scaling=none"
            )
        if self.max_length and not self.sizes["rope_original_length"]:
            raise ConfigError(
                f"model.rope_factor={self.rope_factor}: more than the model.max_length={self.max_length} "
                "positions that it makes; use a smaller one, or give model.rope_original_length"
            )
        if self.rope_base <= 1:
            raise ConfigError(f"model.rope_base={self.rope_base}: use a number above 1")

    @property
    def sizes(self) -> dict[str, int]:
        """The derived sizes: num_kv_heads, head_dim, mlp_dim, rope_original_length."""
        usual_mlp_dim = (
            -(-8 * self.model_dim // (3 * 64)) * 64
            if self.activation in GATED
            else 4 * self.model_dim
        )
        return {
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_dim": self.head_dim or self.model_dim // self.num_heads,
            "mlp_dim": self.mlp_dim or usual_mlp_dim,
            "rope_original_length": self.rope_original_length
            or int(self.max_length / self.rope_factor),
        }

    @property
    def rotary(self) -> Rotary | None:
        """The rotary positions; None where they are learned."""
        if self.positions != "rotary":
            return None
        return Rotary(
            base=self.rope_base,
            scaling=self.rope_scaling,
            factor=self.rope_factor,
            original_length=self.sizes["rope_original_length"],
            low_frequency=self.rope_low_frequency,
            high_frequency=self.rope_high_frequency,
            beta_fast=self.rope_beta_fast,
            beta_slow=self.rope_beta_slow,
            attention_factor=self.rope_attention_factor,
            mscale=self.rope_mscale,
            mscale_all_dim=self.rope_mscale_all_dim,
            truncate=self.rope_truncate,
        )

    def biased(self, part: str) -> bool:
        """Return whether the projections of "attention" or "mlp" have biases."""
        return self.bias and self.bias_in in ("all", part)


def attention_kernel(cfg: Config) -> str:
    """Return which attention kernel runs: cuDNN's where type, mask and device allow it."""
    width = cfg.sizes["head_dim"]
    fits = (
        hardware.has_flash_attention()
        and cfg.mask == "causal"
        and hardware.compute_dtype(cfg.dtype) != jnp.float32
        and width <= 128
        and width % 8 == 0
    )
    if cfg.kernel == "cudnn" and not fits:
        raise ConfigError(
            "model.kernel='cudnn' needs a GPU from Ampere on, model.dtype=bfloat16, model.mask=causal "
            "(task.isolate_documents=False) and heads of at most 128, a multiple of 8; use 'xla'"
        )
    return cfg.kernel or ("cudnn" if fits else "xla")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    cfg: Config
    decode_length: int
    train: bool
    decode: bool

    @nn.compact
    def __call__(self, x_BLD, mask, positions_BL, segments_BL) -> jax.Array:
        cfg, dtype = self.cfg, hardware.compute_dtype(self.cfg.dtype)
        init, out_init = nn.initializers.normal(0.02), residual_init(cfg)
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        y = Norm(cfg.norm, cfg.norm_bias, cfg.norm_epsilon, name="attention_norm")(x_BLD)
        y = Attention(
            num_heads=cfg.num_heads,
            num_kv_heads=cfg.sizes["num_kv_heads"],
            head_dim=cfg.sizes["head_dim"],
            dtype=dtype,
            kernel_init=init,
            out_init=out_init,
            rotary=cfg.rotary,
            qk_norm_epsilon=cfg.norm_epsilon if cfg.qk_norm else 0.0,
            bias=cfg.biased("attention"),
            window=cfg.window,
            kernel=attention_kernel(cfg),
            context_parallel=cfg.context_parallel,
            matmul_dtype=cfg.matmul_dtype,
            decode_length=self.decode_length,
            name="attention",
        )(y, mask=mask, positions_BL=positions_BL, decode=self.decode)
        x_BLD = x_BLD + dropout(y)
        y = Norm(cfg.norm, cfg.norm_bias, cfg.norm_epsilon, name="mlp_norm")(x_BLD)
        y = feed_forward(
            cfg,
            y,
            segments_BL,
            dtype=dtype,
            kernel_init=init,
            out_init=out_init,
            bias=cfg.biased("mlp"),
            decode=self.decode,
        )
        return x_BLD + dropout(y)


def residual_init(cfg: Config):
    """Return the initialiser of the projections that write to the residual stream."""
    if cfg.residual_init == "zero":
        return nn.initializers.zeros
    return nn.initializers.normal(0.02 / (2 * cfg.num_layers) ** 0.5)


class Model(nn.Module):
    """h_0 = embed(tokens) [+ positions]; h_n = block_n(h_{n-1}); logits = norm(h_N) E^T."""

    cfg: Config
    decode_length: int = 0

    accepts: ClassVar = frozenset({"causal", "packed", "context"})
    learns: ClassVar = "gradient"

    @property
    def max_context(self) -> int:
        """Positions that decoding may use; 0 = any number."""
        return self.cfg.max_length

    def setup(self):
        cfg, dtype = self.cfg, hardware.compute_dtype(self.cfg.dtype)
        init = nn.initializers.normal(0.02)
        self.embed = Embed(cfg.vocab_size, cfg.model_dim, dtype, init)
        if cfg.positions == "learned":
            self.position_embedding = self.param(
                "position_embedding",
                nn.with_logical_partitioning(init, ("position", "embed")),
                (cfg.max_length, cfg.model_dim),
            )
        self.layers = Stack(
            Block,
            {"cfg": cfg, "decode_length": self.decode_length},
            cfg.num_layers,
            **stacking(cfg),
        )
        self.norm = Norm(cfg.norm, cfg.norm_bias, cfg.norm_epsilon)
        self.dropout = nn.Dropout(cfg.dropout)
        if not cfg.tied:
            self.head = Head(cfg.vocab_size, cfg.model_dim, dtype, init)

    def __call__(self, batch, *, train: bool = False, decode: bool = False) -> jax.Array:
        """Return features [B, L, D] of a batch (inputs, segments, positions, each [B, L])."""
        cfg = self.cfg
        x_BLD = self.embed(batch["inputs"])
        if cfg.positions == "learned":
            table = sharding.gather(self.position_embedding, ("position", "embed"))
            x_BLD = x_BLD + jnp.take(table, batch["positions"], axis=0).astype(x_BLD.dtype)
        x_BLD = self.dropout(x_BLD, deterministic=not train)
        mask = causal_mask(
            x_BLD.shape[1],
            window=cfg.window,
            segments_BL=batch["segments"] if cfg.mask == "segments" and not decode else None,
            decode=decode,
        )
        x_BLD = self.layers(
            x_BLD, mask, batch["positions"], batch["segments"], train=train, decode=decode
        )
        return self.norm(x_BLD)

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Return float32 logits [B, L, V] of features, the padded vocabulary masked."""
        logits_BLV = self.embed.attend(x_BLD) if self.cfg.tied else self.head(x_BLD)
        return finish_logits(logits_BLV, self.cfg.vocab_size, self.cfg.logit_softcap)


def flops_per_token(cfg: Config, length: int, scored: float = 1.0) -> float:
    """Return training FLOPs a token: 6 N (matrices that it meets, head once) + 12 layers d_attention T.

    T is the mean number of keys of a query as if none were masked: min(length, window).
    """
    sizes, D = cfg.sizes, cfg.model_dim
    qkv = D * (cfg.num_heads + 2 * sizes["num_kv_heads"]) * sizes["head_dim"]
    out = cfg.num_heads * sizes["head_dim"] * D
    matrices = cfg.num_layers * (qkv + out + feed_forward_parameters(cfg))
    head = scored * D * pad_vocab(cfg.vocab_size)
    keys = min(length, cfg.window or length)
    return (
        6.0 * (matrices + head) + 12.0 * cfg.num_layers * cfg.num_heads * sizes["head_dim"] * keys
    )
