"""Recurrent language models: Elman, GRU and LSTM.

"Recurrent neural network based language model", Mikolov et al. 2010; "Recurrent Neural Network
Regularization", Zaremba et al. 2014 (arXiv 1409.2329); the head tied to the embedding: Press and Wolf
2017 (1608.05859), through a projection where the widths differ: Inan et al. 2016 (1611.01462); one dropout
mask a row, dropout of words: Gal and Ghahramani 2016 (1512.05287); DropConnect: Merity et al. 2017
(1708.02182);
self-attention over the recurrent features: Cheng et al. 2016 (1601.06733), Merity 2019 (1911.11423).

What differs: attention is one pre-normed residual block above the recurrent layers, without
positions (the features know the order), and sees the present window only; the state may be carried
over windows, attention's keys are not.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import hardware, sharding
from lm.config import SET
from lm.models import check_fields, check_heads, check_option
from lm.nn.attention import Attention, causal_mask
from lm.nn.cells import CELLS
from lm.nn.embed import Embed, Head, finish_logits, pad_vocab
from lm.nn.linear import Linear
from lm.nn.norm import Norm
from lm.nn.recurrent import Recurrent, uniform


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "rnn"  # family: a file of lm/models, such as gpt or rnn
    cell: str = "lstm"  # lstm, gru (reset after the product, as cuDNN) or rnn (Elman, tanh)
    num_layers: int = 2  # recurrent layers
    model_dim: int = 512  # width of the hidden state
    embed_dim: int = 0  # width of the embedding; 0 = model_dim
    num_heads: int = 0  # heads of self-attention over the recurrent features; 0 = no attention
    vocab_size: int = 0  # tokens; 0 = the tokenizer's
    max_length: int = 0  # positions of a row; 0 = the task's row
    tied: bool = True  # the head is the embedding
    dropout: float = 0.0  # probability, on the input of every layer and on the features
    dropout_mask: str = "position"  # of dropout: one a position, or one a row for all its positions
    hidden_dropout: float = 0.0  # probability, on the state in recurrent products, one mask a row
    weight_dropout: float = 0.0  # probability, on the elements of recurrent kernels (DropConnect)
    embed_dropout: float = 0.0  # probability, on whole words of the vocabulary, as inputs
    init_scale: float = (
        0.0  # all but attention's start uniform in +- this; 0 = each layer's own way
    )
    mask: str = ""  # of attention: causal or segments (documents apart); "" = as the task packs
    dtype: str = ""  # of computation: float32 or bfloat16; "" = bfloat16 on accelerators

    ONLY_FOR: ClassVar = {"mask": ("num_heads", SET)}

    def __post_init__(self):
        check_option(self, "cell", tuple(CELLS))
        check_option(self, "dropout_mask", ("position", "row"))
        check_option(self, "mask", ("", "causal", "segments"))
        derived = ("embed_dim", "num_heads", "vocab_size", "max_length", "init_scale")
        check_fields(self, positive=("num_layers", "model_dim"), derived=derived)
        if self.num_heads:
            check_heads(self, "or 0 = no attention")

    @property
    def sizes(self) -> dict[str, int]:
        """The derived sizes: embed_dim."""
        return {"embed_dim": self.embed_dim or self.model_dim}


class Model(nn.Module):
    """h = recurrent(embed(tokens)); [h += attention(norm(h));] features = [P] h; logits = features E^T.

    The state of the recurrent layers is the collection `carry`, read when it is given and written
    when it is mutable: `init_carry` makes the one to start from. Decoding keeps it in `cache`.
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
        D, E = cfg.model_dim, cfg.sizes["embed_dim"]
        init = uniform(cfg.init_scale) if cfg.init_scale else nn.initializers.lecun_normal()
        embed_init = init if cfg.init_scale else nn.initializers.normal(E**-0.5)
        self.embed = Embed(cfg.vocab_size, E, dtype, embed_init)
        self.embed_dropout = nn.Dropout(cfg.embed_dropout)
        self.recurrent = Recurrent(
            cfg.cell, cfg.num_layers, D, dtype, cfg.dropout, cfg.dropout_mask == "row",
            cfg.hidden_dropout, cfg.weight_dropout, cfg.init_scale,
        )  # fmt: skip
        if cfg.num_heads:
            self.attention_norm = Norm()
            self.attention = Attention(
                num_heads=cfg.num_heads,
                num_kv_heads=cfg.num_heads,
                head_dim=D // cfg.num_heads,
                dtype=dtype,
                kernel_init=nn.initializers.normal(D**-0.5),
                out_init=nn.initializers.zeros,  # starts as the recurrent model alone
                decode_length=self.decode_length,
            )
        if D != E and cfg.tied:
            self.projection = Linear((D, E), ("hidden", "embed"), dtype, init)
        if not cfg.tied:
            self.head = Head(cfg.vocab_size, D, dtype, init)

    def __call__(self, batch, *, train: bool = False, decode: bool = False) -> jax.Array:
        """Return features [B, L, D] (tied: of the embedding's width) of a batch.

        Decoding, a row of several tokens is a prompt and starts from zeros; one token continues.
        """
        cfg = self.cfg
        tokens_BL, segments_BL = batch["inputs"], batch["segments"]
        prompt = decode and tokens_BL.shape[1] > 1
        x_BLD = self.embed(tokens_BL)
        if train and cfg.embed_dropout:
            kept_V = self.embed_dropout(jnp.ones(cfg.vocab_size, x_BLD.dtype), deterministic=False)
            x_BLD = x_BLD * jnp.take(kept_V, tokens_BL, axis=0)[..., None]
        x_BLD, _ = self.recurrent(
            x_BLD, segments_BL=segments_BL, positions_BL=batch["positions"],
            train=train, memory="cache" if decode else "carry", fresh=prompt,
        )  # fmt: skip
        if cfg.num_heads:
            apart = cfg.mask == "segments" and not decode
            mask = causal_mask(tokens_BL.shape[1], segments_BL=segments_BL if apart else None)
            y_BLD = self.attention(
                self.attention_norm(x_BLD),
                mask=mask,
                positions_BL=batch["positions"],
                decode=decode,
            )
            x_BLD = x_BLD + y_BLD
        if cfg.tied and cfg.model_dim != cfg.sizes["embed_dim"]:
            x_BLD = self.projection(x_BLD)
        return sharding.constrain(x_BLD, "act_batch", "act_length", "act_embed")

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Return float32 logits [B, L, V] of features, the padded vocabulary masked."""
        logits_BLV = self.embed.attend(x_BLD) if self.cfg.tied else self.head(x_BLD)
        return finish_logits(logits_BLV, self.cfg.vocab_size)

    def init_carry(self, batch_size: int) -> Any:
        """Return the carry of `batch_size` fresh streams: zeros [B, H], boxed with logical axes."""
        row = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
        batch = {"inputs": row, "segments": row, "positions": row}
        shapes = jax.eval_shape(self.init, jax.random.key(0), batch)["carry"]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def flops_per_token(cfg: Config, length: int, scored: float = 1.0) -> float:
    """Return training FLOPs a token: 6 N (matrix parameters, head once) + 12 d_attention T."""
    D, E = cfg.model_dim, cfg.sizes["embed_dim"]
    inputs = E + (cfg.num_layers - 1) * D
    matrices = CELLS[cfg.cell].num_gates * D * (inputs + cfg.num_layers * D)
    head = (E if cfg.tied else D) * pad_vocab(cfg.vocab_size)
    if cfg.tied and D != E:
        head += D * E
    attention = 4 * D * D if cfg.num_heads else 0
    return 6.0 * (matrices + scored * head + attention) + (
        12.0 * D * length if cfg.num_heads else 0.0
    )
