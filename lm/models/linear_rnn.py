"""A language model of gated linear recurrences: trained in parallel, decoded with a state of fixed size.

"Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality", Dao and Gu 2024 (Mamba-2, arXiv 2405.21060); see `lm/nn/linear_recurrence.py` for the recurrence.

What differs: a block has a feed-forward layer too, as in "Gated Linear Attention Transformers" (Yang et
al. 2023, 2312.06635), so that it is a Transformer's with attention replaced; its defaults are those of
`lm/models/gpt.py`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import hardware
from lm.models import check_fields, check_heads, check_option
from lm.nn.embed import Embed, Head, finish_logits, pad_vocab
from lm.nn.linear_recurrence import LinearRecurrence
from lm.nn.mlp import MLP
from lm.nn.norm import Norm
from lm.nn.transformer import Stack, stacking


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "linear_rnn"  # family: a file of lm/models, such as gpt or rnn
    num_layers: int = 12  # blocks
    model_dim: int = 768  # width
    num_heads: int = 12  # heads, each with a state of key_dim x head_dim
    head_dim: int = 0  # width of a head's values; 0 = model_dim / num_heads
    key_dim: int = 0  # width of a head's queries and keys; 0 = head_dim
    conv_width: int = 4  # tokens that the short convolution sees, its own included; 1 = none
    chunk: int = 64  # tokens computed together by matrix products; more round a little more
    mlp_dim: int = 0  # feed-forward width; 0 = 4 model_dim (swiglu: 8/3, to a multiple of 64)
    activation: str = "relu2"  # gelu, relu2 or swiglu
    vocab_size: int = 0  # tokens; 0 = the tokenizer's
    max_length: int = 0  # positions of a row; 0 = the task's row
    tied: bool = True  # the head is the embedding
    dropout: float = 0.0  # probability, on embeddings and residual branches
    scan: bool = False  # scan over the layers: compile time constant in depth
    remat: str = "none"  # none, dots (keep matrix products) or full (keep block inputs)
    microbatches: int = 0  # parts of a batch that flow through mesh.stage stages; 0 = 4 a stage
    stage_repeats: int = 1  # how often each part comes around, through thinner stages
    dtype: str = ""  # of computation: float32 or bfloat16; "" = bfloat16 on accelerators
    matmul_dtype: str = ""  # of the blocks' projections: fp8 (NVIDIA from 8.9 on); "" = dtype

    def __post_init__(self):
        check_option(self, "activation", ("gelu", "relu2", "swiglu"))
        positive = ("num_layers", "model_dim", "num_heads", "conv_width", "chunk")
        derived = ("head_dim", "key_dim", "mlp_dim", "vocab_size", "max_length")
        check_fields(self, positive=positive, derived=derived)
        if not self.head_dim:
            check_heads(self, "or set model.head_dim")

    @property
    def sizes(self) -> dict[str, int]:
        """The derived sizes: head_dim, key_dim, mlp_dim."""
        head_dim = self.head_dim or self.model_dim // self.num_heads
        usual_mlp_dim = (
            -(-8 * self.model_dim // (3 * 64)) * 64
            if self.activation == "swiglu"
            else 4 * self.model_dim
        )
        return {
            "head_dim": head_dim,
            "key_dim": self.key_dim or head_dim,
            "mlp_dim": self.mlp_dim or usual_mlp_dim,
        }


class Block(nn.Module):
    """x + recurrence(norm(x)), then x + mlp(norm(x))."""

    cfg: Config
    train: bool
    decode: bool

    @nn.compact
    def __call__(self, x_BLD, segments_BL, positions_BL) -> jax.Array:
        cfg, dtype = self.cfg, hardware.compute_dtype(self.cfg.dtype)
        init = nn.initializers.normal(0.02)
        out_init = nn.initializers.normal(0.02 / (2 * cfg.num_layers) ** 0.5)
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        y = Norm(name="recurrence_norm")(x_BLD)
        y = LinearRecurrence(
            num_heads=cfg.num_heads,
            key_dim=cfg.sizes["key_dim"],
            head_dim=cfg.sizes["head_dim"],
            conv_width=cfg.conv_width,
            chunk=cfg.chunk,
            dtype=dtype,
            kernel_init=init,
            out_init=out_init,
            matmul_dtype=cfg.matmul_dtype,
            name="recurrence",
        )(
            y,
            segments_BL=segments_BL,
            positions_BL=positions_BL,
            memory="cache" if self.decode else "carry",
            fresh=self.decode and x_BLD.shape[1] > 1,
        )
        x_BLD = x_BLD + dropout(y)
        y = Norm(name="mlp_norm")(x_BLD)
        y = MLP(
            cfg.sizes["mlp_dim"], cfg.activation, dtype, init, out_init,
            matmul_dtype=cfg.matmul_dtype, name="mlp",
        )(y)  # fmt: skip
        return x_BLD + dropout(y)


class Model(nn.Module):
    """h_0 = embed(tokens); h_n = block_n(h_{n-1}); logits = norm(h_N) E^T.

    The state of the blocks is the collection `carry`, read when it is given and written when it is
    mutable: `init_carry` makes the one to start from. Decoding keeps it in `cache`.
    """

    cfg: Config
    decode_length: int = 0

    accepts: ClassVar = frozenset({"causal", "packed", "carry"})
    learns: ClassVar = "gradient"

    @property
    def max_context(self) -> int:
        """Positions that decoding may use; 0 = any number."""
        return 0

    def setup(self):
        cfg, dtype = self.cfg, hardware.compute_dtype(self.cfg.dtype)
        init = nn.initializers.normal(0.02)
        self.embed = Embed(cfg.vocab_size, cfg.model_dim, dtype, init)
        self.layers = Stack(Block, {"cfg": cfg}, cfg.num_layers, **stacking(cfg))
        self.norm = Norm()
        self.dropout = nn.Dropout(cfg.dropout)
        if not cfg.tied:
            self.head = Head(cfg.vocab_size, cfg.model_dim, dtype, init)

    def __call__(self, batch, *, train: bool = False, decode: bool = False) -> jax.Array:
        """Return features [B, L, D] of a batch (inputs, segments, positions, each [B, L]).

        Decoding, a row of several tokens is a prompt and starts from zeros; one token continues.
        """
        x_BLD = self.dropout(self.embed(batch["inputs"]), deterministic=not train)
        segments_BL, positions_BL = batch["segments"], batch["positions"]
        return self.norm(self.layers(x_BLD, segments_BL, positions_BL, train=train, decode=decode))

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Return float32 logits [B, L, V] of features, the padded vocabulary masked."""
        logits_BLV = self.embed.attend(x_BLD) if self.cfg.tied else self.head(x_BLD)
        return finish_logits(logits_BLV, self.cfg.vocab_size)

    def init_carry(self, batch_size: int) -> Any:
        """Return the carry of `batch_size` fresh streams: zeros [B, ...], boxed with logical axes."""
        row = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
        batch = {"inputs": row, "segments": row, "positions": row}
        shapes = jax.eval_shape(self.init, jax.random.key(0), batch)["carry"]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def flops_per_token(cfg: Config, length: int, scored: float = 1.0) -> float:
    """Return training FLOPs a token: 6 N (matrix parameters, head once) + those of the recurrence.

    Of the recurrence, for each head, 6 (C (K + P) + 2 K P): the products within a chunk of C tokens, as
    if none were masked, and those that add to the state and read it. The convolution is left out.
    """
    D, H, sizes = cfg.model_dim, cfg.num_heads, cfg.sizes
    K, P, C = sizes["key_dim"], sizes["head_dim"], min(cfg.chunk, length)
    projections = D * H * (2 * K + 3 * P + 1)
    mlp = (3 if cfg.activation == "swiglu" else 2) * D * sizes["mlp_dim"]
    recurrence = H * (C * (K + P) + 2 * K * P)
    head = scored * D * pad_vocab(cfg.vocab_size)
    return 6.0 * (cfg.num_layers * (projections + mlp + recurrence) + head)
