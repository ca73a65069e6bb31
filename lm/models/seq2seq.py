"""Recurrent encoder and decoder, with or without attention.

"Sequence to Sequence Learning with Neural Networks", Sutskever et al. 2014 (arXiv 1409.3215); "Neural Machine
Translation by Jointly Learning to Align and Translate", Bahdanau et al. 2014 (1409.0473): additive scores and
a bidirectional encoder; "Effective Approaches to Attention-based Neural Machine Translation", Luong et al.
2015 (1508.04025): multiplicative scores, and the attentional vector fed to the next step.

What differs: with either score the context joins the decoder's output, as Luong's does (Bahdanau's enters the
recurrence), so that without input feeding a whole target is one recurrence; a source is not reversed, as
Sutskever's is. One embedding serves source and target. The decoder starts from the encoder's last states
through a layer of tanh. Several pairs may lie in a row: a target knows the source of its own segment only.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import hardware, sharding
from lm.config import ConfigError
from lm.models import check_fields, check_option
from lm.nn.attention import segment_mask
from lm.nn.cells import CELLS
from lm.nn.cross_attention import NO_SOURCE
from lm.nn.embed import Embed, Head, finish_logits, pad_vocab
from lm.nn.linear import Linear, einsum, wide
from lm.nn.recurrent import Recurrent, States, hand_over

UNSEEN = -1e30  # a score; finite, so that a source of padding alone gives numbers


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "seq2seq"  # family: a file of lm/models, such as gpt or rnn
    cell: str = "lstm"  # lstm, gru (reset after the product, as cuDNN) or rnn (Elman, tanh)
    num_layers: int = 2  # recurrent layers of the encoder, and of the decoder
    model_dim: int = 256  # width of the hidden states and of the embedding
    bidirectional: bool = True  # the encoder reads both ways
    attention: str = "additive"  # additive, multiplicative or none
    input_feeding: bool = False  # the attentional vector joins the next step's input
    vocab_size: int = 0  # tokens; 0 = the tokenizer's
    max_length: int = 0  # positions of a row; 0 = the task's row
    max_source_length: int = 0  # positions of a source; 0 = the task's source
    tied: bool = True  # the head is the embedding
    dropout: float = 0.0  # probability, on the input and output of every layer and on the features
    dtype: str = ""  # of computation: float32 or bfloat16; "" = bfloat16 on accelerators

    ONLY_FOR: ClassVar = {"input_feeding": ("attention", ("additive", "multiplicative"))}

    def __post_init__(self):
        check_option(self, "cell", tuple(CELLS))
        check_option(self, "attention", ("additive", "multiplicative", "none"))
        derived = ("vocab_size", "max_length", "max_source_length")
        check_fields(self, positive=("num_layers", "model_dim"), derived=derived)
        if self.input_feeding and self.attention == "none":
            raise ConfigError(
                "model.input_feeding=True: there is nothing to feed; set model.attention"
            )


class Attend(nn.Module):
    """The attentional vector tanh(W [context; h]), where softmax of the scores weighs the source.

    additive: v tanh(W_q h + k), with k = W_k source; multiplicative: h k.
    """

    cfg: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BLD, segments_BL, keys_BSD, source_BSE, segments_BS) -> jax.Array:
        cfg, D = self.cfg, self.cfg.model_dim
        init = nn.initializers.lecun_normal()
        if cfg.attention == "additive":
            query = Linear((D, D), ("hidden_in", "hidden"), self.dtype, init, name="query")(h_BLD)
            scale_D1 = self.param(
                "score", nn.with_logical_partitioning(init, ("hidden_in", "kv")), (D, 1)
            )
            scale_D1 = sharding.gather(scale_D1, ("hidden_in", "kv"), self.dtype)
            hidden_BLSD = jnp.tanh(query[:, :, None] + keys_BSD[:, None]).astype(wide(self.dtype))
            scores_BLS = einsum("blsd,dk->blsk", hidden_BLSD, scale_D1)[..., 0]
        else:
            scores_BLS = jnp.einsum(
                "bld,bsd->bls", h_BLD, keys_BSD, preferred_element_type=wide(self.dtype)
            )
        seen_BLS = segment_mask(segments_BL, segments_BS)
        scores_BLS = jnp.where(seen_BLS, scores_BLS, UNSEEN)
        weights_BLS = jax.nn.softmax(scores_BLS).astype(self.dtype)
        context_BLE = jnp.einsum("bls,bse->ble", weights_BLS, source_BSE)
        both = jnp.concatenate([context_BLE, h_BLD], axis=-1)
        shape = (both.shape[-1], D)
        out = Linear(shape, ("hidden_in", "hidden"), self.dtype, init, name="out")(both)
        return sharding.constrain(jnp.tanh(out), "act_batch", "act_length", "act_embed")


class Start(NamedTuple):
    """What a target starts from, or goes on from, at each of its positions."""

    states: States  # of the decoder's layers, arrays [B, L, D]
    fed_BLD: jax.Array  # the attentional vector


class Decoder(nn.Module):
    """Recurrent layers from given states, then attention; one step at a time where that is fed back."""

    cfg: Config
    dtype: jnp.dtype
    train: bool

    def setup(self):
        cfg = self.cfg
        self.recurrent = Recurrent(cfg.cell, cfg.num_layers, cfg.model_dim, self.dtype, cfg.dropout)
        if cfg.attention != "none":
            self.attend = Attend(cfg, self.dtype)
            self.dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)

    def __call__(self, x_BLD, start: Start, memory, *, segments_BL, positions_BL):
        """Return features [B, L, D] and what the next position starts from, of arrays [B, 1, D].

        Position 0 starts from `start`; `memory` is (keys [B, S, D], source [B, S, E],
        segments [B, S]).
        """
        if not self.cfg.input_feeding:
            y_BLD, after = self._run(x_BLD, start, memory, segments_BL, positions_BL)
            return y_BLD, jax.tree.map(lambda array: array[:, -1:], after)

        def step(module, before, inputs):
            x_B1D, start, segments_B1, positions_B1 = jax.tree.map(lambda a: a[:, None], inputs)
            start = _where(positions_B1 == 0, start, before)
            x_B1D = jnp.concatenate([x_B1D, start.fed_BLD], axis=-1)
            zeros_B1 = jnp.zeros_like(positions_B1)
            y_B1D, after = module._run(x_B1D, start, memory, segments_B1, zeros_B1)
            return _where(segments_B1 > 0, after, before), y_B1D[:, 0]

        scan = nn.scan(
            step, variable_broadcast="params", split_rngs={"params": False, "dropout": True},
            in_axes=1, out_axes=1,
        )  # fmt: skip
        before = jax.tree.map(lambda array: array[:, :1], start)
        after, y_BLD = scan(self, before, (x_BLD, start, segments_BL, positions_BL))
        return y_BLD, after

    def _run(self, x_BLD, start: Start, memory, segments_BL, positions_BL):
        h_BLD, states = self.recurrent(
            x_BLD, segments_BL=segments_BL, positions_BL=positions_BL,
            train=self.train, begin=start.states,
        )  # fmt: skip
        if self.cfg.attention == "none":
            return h_BLD, Start(states, start.fed_BLD)
        h_BLD = self.attend(h_BLD, segments_BL, *memory)
        return self.dropout(h_BLD), Start(states, h_BLD)


def _where(condition_B1, this, that):
    return jax.tree.map(lambda a, b: jnp.where(condition_B1[..., None], a, b), this, that)


class Model(nn.Module):
    """source = encoder(embed(source)); features = decoder(embed(tokens), bridge(last states), source).

    In decoding the collection `cache` holds the source, its keys and segments, and what the next token
    starts from.
    """

    cfg: Config
    decode_length: int = 0

    accepts: ClassVar = frozenset({"source", "packed"})
    learns: ClassVar = "gradient"

    @property
    def max_context(self) -> int:
        """Positions that decoding may use; 0 = any number."""
        return 0

    def setup(self):
        cfg, dtype = self.cfg, hardware.compute_dtype(self.cfg.dtype)
        D, E = cfg.model_dim, cfg.model_dim * (2 if cfg.bidirectional else 1)
        init = nn.initializers.lecun_normal()
        axes = ("hidden_in", "hidden")
        self.embed = Embed(cfg.vocab_size, D, dtype, nn.initializers.normal(D**-0.5))
        self.encoder = Recurrent(
            cfg.cell, cfg.num_layers, D, dtype, cfg.dropout, bidirectional=cfg.bidirectional
        )
        self.bridges = [
            Linear((E, D), axes, dtype, init, bias=True)
            for _ in range(cfg.num_layers * CELLS[cfg.cell].num_states)
        ]
        if cfg.attention != "none":
            self.keys = Linear((E, D), axes, dtype, init)
        if not cfg.tied:
            self.head = Head(cfg.vocab_size, D, dtype, init)

    @nn.compact
    def __call__(self, batch, *, train: bool = False, decode: bool = False) -> jax.Array:
        """Return features [B, L, D] of a batch.

        Decoding, a batch with a source is a prompt and starts anew; one token without it goes on.
        """
        if "source" in batch:
            (start, memory), positions_BL = self._read(batch, train), batch["positions"]
        elif not self.has_variable("cache", "context"):
            raise ConfigError(NO_SOURCE)
        else:
            start, memory = self.get_variable("cache", "context")
            positions_BL = jnp.zeros_like(batch["positions"])
        decoder = Decoder(self.cfg, hardware.compute_dtype(self.cfg.dtype), train, name="decoder")
        x_BLD, start = decoder(
            self.embed(batch["inputs"]), start, memory,
            segments_BL=batch["segments"], positions_BL=positions_BL,
        )  # fmt: skip
        if decode:
            self.put_variable("cache", "context", (start, memory))
        return sharding.constrain(x_BLD, "act_batch", "act_length", "act_embed")

    def _read(self, batch, train: bool) -> tuple[Start, tuple[jax.Array, ...]]:
        """Return what the targets of a batch start from, and what they attend to."""
        segments_BS = batch["source_segments"]
        source_BSE, states = self.encoder(
            self.embed(batch["source"]), segments_BL=segments_BS,
            positions_BL=batch["source_positions"], train=train,
        )  # fmt: skip
        bridges = iter(self.bridges)

        def bridge(*ways):
            """Make a state of the decoder of the encoder's, in each of its directions."""
            joined = jnp.concatenate(ways, axis=-1).astype(source_BSE.dtype)
            return jnp.tanh(next(bridges)(joined)).astype(ways[0].dtype)

        ends = hand_over(states, source_segments_BS=segments_BS, segments_BL=batch["segments"])
        begin = tuple((tuple(map(bridge, *ways)),) for ways in ends)
        keys_BSD = source_BSE
        if self.cfg.attention != "none":
            keys_BSD = self.keys(source_BSE)
            keys_BSD = sharding.constrain(keys_BSD, "act_batch", "act_length", "act_embed")
        fed_BLD = jnp.zeros((*batch["segments"].shape, self.cfg.model_dim), source_BSE.dtype)
        return Start(begin, fed_BLD), (keys_BSD, source_BSE, segments_BS)

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Return float32 logits [B, L, V] of features, the padded vocabulary masked."""
        logits_BLV = self.embed.attend(x_BLD) if self.cfg.tied else self.head(x_BLD)
        return finish_logits(logits_BLV, self.cfg.vocab_size)


def flops_per_token(cfg: Config, length: int, scored: float = 1.0) -> float:
    """Return training FLOPs a target token, its source as long as the row (or `max_source_length`).

    6 N for the decoder's matrices and the head, 6 N of the encoder's for each source token, and the
    attention's scores and sums, 6 (D + E) (multiplicative) or 6 (2 D + E) (additive, with its tanh) a pair of
    tokens, E the width of the encoder's features.
    """
    D, ways = cfg.model_dim, 2 if cfg.bidirectional else 1
    gates, E = CELLS[cfg.cell].num_gates, D * ways
    encoder = ways * gates * D * (D + D) + (cfg.num_layers - 1) * ways * gates * D * (E + D)
    decoder = cfg.num_layers * gates * D * 2 * D + (gates * D * D if cfg.input_feeding else 0)
    head = scored * D * pad_vocab(cfg.vocab_size)
    source = (cfg.max_source_length or length) / max(length, 1)
    flops = 6.0 * (decoder + head + source * encoder)
    if cfg.attention != "none":
        additive = cfg.attention == "additive"
        flops += 6.0 * (D * (E + D) + source * E * D + (D * D if additive else 0))
        flops += 6.0 * ((2 * D if additive else D) + E) * source * length
    return flops
