"""Recurrent encoder and decoder, with or without attention.

"Sequence to Sequence Learning with Neural Networks", Sutskever et al. 2014 (arXiv 1409.3215); "Neural Machine
Translation by Jointly Learning to Align and Translate", Bahdanau et al. 2014 (1409.0473): additive scores and
a bidirectional encoder; "Effective Approaches to Attention-based Neural Machine Translation", Luong et al.
2015 (1508.04025): multiplicative scores, and the attentional vector fed to the next step.

What differs: with either score the context joins the decoder's output, as Luong's does (Bahdanau's enters the
recurrence), so that without input feeding a whole target is one recurrence. One embedding serves source
and target. The decoder starts from the encoder's last states through a layer of tanh.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm import hardware, sharding
from lm.config import ConfigError
from lm.models import check_option
from lm.nn.embed import Embed, Head, finish_logits, pad_vocab
from lm.nn.linear import Linear, wide
from lm.nn.recurrence import CELLS, State
from lm.nn.recurrent import Layer

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
    dropout: float = 0.0  # probability, on the input of every layer and on the features
    dtype: str = ""  # of computation: float32 or bfloat16; "" = bfloat16 on accelerators

    ONLY_FOR: ClassVar = {"input_feeding": ("attention", ("additive", "multiplicative"))}

    def __post_init__(self):
        check_option(self, "cell", tuple(CELLS))
        check_option(self, "attention", ("additive", "multiplicative", "none"))
        check_option(self, "dtype", ("", "float32", "bfloat16"))
        for field in ("num_layers", "model_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(f"model.{field}={getattr(self, field)}: use at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout}: use a probability in [0, 1)")
        if self.input_feeding and self.attention == "none":
            raise ConfigError(
                "model.input_feeding=True: there is nothing to feed; set model.attention"
            )


class Encoder(nn.Module):
    """h = recurrent(x), forwards and, where asked, backwards, layer upon layer.

    Returns the last layer's features [B, S, E] and each layer's last states [B, E]; E is D, or 2 D both ways.
    """

    cfg: Config
    dtype: jnp.dtype
    train: bool

    @nn.compact
    def __call__(self, x_BSD, segments_BS) -> tuple[jax.Array, list[State]]:
        cfg = self.cfg
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        # The place of each token when the real ones, which are on the left, are turned around.
        lengths_B1 = (segments_BS > 0).sum(axis=1, keepdims=True)
        places_1S = jnp.arange(x_BSD.shape[1])[None]
        turned_BS = jnp.where(places_1S < lengths_B1, lengths_B1 - 1 - places_1S, places_1S)
        valid_S1B = (segments_BS > 0).T[:, None]
        finals: list[State] = []
        for layer in range(cfg.num_layers):
            x_BSD = dropout(x_BSD)
            ways = [(x_BSD, False)] + ([(x_BSD, True)] if cfg.bidirectional else [])
            outputs, states = [], []
            for x, backwards in ways:
                if backwards:
                    x = jnp.take_along_axis(x, turned_BS[..., None], axis=1)
                name = f"layer_{layer}{'_backwards' if backwards else ''}"
                zeros = jnp.zeros((cfg.model_dim, x.shape[0]), wide(self.dtype))
                h_SHB, last, _ = Layer(cfg.cell, cfg.model_dim, self.dtype, name=name)(
                    x.transpose(1, 2, 0),
                    (zeros,) * CELLS[cfg.cell].num_states,
                    fresh_L1B=jnp.zeros_like(valid_S1B),
                    valid_L1B=valid_S1B,
                )
                h_BSH = h_SHB.transpose(2, 0, 1)
                if backwards:
                    h_BSH = jnp.take_along_axis(h_BSH, turned_BS[..., None], axis=1)
                outputs.append(h_BSH)
                states.append(last)
            x_BSD = jnp.concatenate(outputs, axis=-1)
            finals.append(tuple(jnp.concatenate(s).T for s in zip(*states, strict=True)))
        return sharding.constrain(x_BSD, "act_batch", "act_length", "act_embed"), finals


class Attend(nn.Module):
    """The attentional vector tanh(W [context; h]), where softmax of the scores weighs the source.

    additive: v tanh(W_q h + k), with k = W_k source; multiplicative: h k.
    """

    cfg: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BLD, keys_BSD, source_BSE, segments_BS) -> jax.Array:
        cfg, D = self.cfg, self.cfg.model_dim
        init = nn.initializers.lecun_normal()
        if cfg.attention == "additive":
            query = Linear((D, D), ("hidden_in", "hidden"), self.dtype, init, name="query")(h_BLD)
            scale_D1 = self.param(
                "score", nn.with_logical_partitioning(init, ("hidden_in", "kv")), (D, 1)
            )
            scale_D1 = sharding.gather(scale_D1.astype(self.dtype), ("hidden_in", "kv"))
            hidden_BLSD = jnp.tanh(query[:, :, None] + keys_BSD[:, None])
            scores_BLS = (hidden_BLSD @ scale_D1)[..., 0]
        else:
            scores_BLS = jnp.einsum("bld,bsd->bls", h_BLD, keys_BSD)
        seen_B1S = (segments_BS > 0)[:, None]
        scores_BLS = jnp.where(seen_B1S, scores_BLS.astype(wide(self.dtype)), UNSEEN)
        weights_BLS = jax.nn.softmax(scores_BLS).astype(self.dtype)
        context_BLE = jnp.einsum("bls,bse->ble", weights_BLS, source_BSE)
        both = jnp.concatenate([context_BLE, h_BLD], axis=-1)
        shape = (both.shape[-1], D)
        out = Linear(shape, ("hidden_in", "hidden"), self.dtype, init, name="out")(both)
        return sharding.constrain(jnp.tanh(out), "act_batch", "act_length", "act_embed")


class Decoder(nn.Module):
    """Recurrent layers from given states, then attention; one step at a time where that is fed back."""

    cfg: Config
    dtype: jnp.dtype
    train: bool

    def setup(self):
        cfg = self.cfg
        self.layers = [Layer(cfg.cell, cfg.model_dim, self.dtype) for _ in range(cfg.num_layers)]
        self.dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        if cfg.attention != "none":
            self.attend = Attend(cfg, self.dtype)

    def __call__(self, x_BLD, states: list[State], fed_BD, memory, valid_BL):
        """Return features [B, L, D], the last states, and the last attentional vector.

        `memory` is (keys [B, S, D], source [B, S, E], segments [B, S]).
        """
        if not self.cfg.input_feeding:
            return self._run(x_BLD, states, fed_BD, memory, valid_BL)

        def step(module, carry, inputs):
            states, fed_BD = carry
            x_BD, valid_B = inputs
            joined = jnp.concatenate([x_BD, fed_BD], axis=-1)[:, None]
            y_B1D, states, new_BD = module._run(joined, states, fed_BD, memory, valid_B[:, None])
            return (states, jnp.where(valid_B[:, None], new_BD, fed_BD)), y_B1D[:, 0]

        scan = nn.scan(
            step, variable_broadcast="params", split_rngs={"params": False, "dropout": True},
            in_axes=1, out_axes=1,
        )  # fmt: skip
        (states, fed_BD), y_BLD = scan(self, (states, fed_BD), (x_BLD, valid_BL))
        return y_BLD, states, fed_BD

    def _run(self, x_BLD, states, fed_BD, memory, valid_BL):
        valid_L1B, x_LDB = valid_BL.T[:, None], x_BLD.transpose(1, 2, 0)
        lasts = []
        for layer, state in zip(self.layers, states, strict=True):
            x_LDB, last, _ = layer(
                self.dropout(x_LDB),
                tuple(s.T for s in state),
                fresh_L1B=jnp.zeros_like(valid_L1B),
                valid_L1B=valid_L1B,
            )
            lasts.append(tuple(s.T for s in last))
        h_BLD = x_LDB.transpose(2, 0, 1)
        if self.cfg.attention != "none":
            h_BLD = self.attend(h_BLD, *memory)
            fed_BD = h_BLD[:, -1]
        return self.dropout(h_BLD), lasts, fed_BD


class Model(nn.Module):
    """source = encoder(embed(source)); features = decoder(embed(tokens), bridge(last states), source).

    In decoding the collection `cache` holds the source, its keys and segments, and the decoder's states.
    """

    cfg: Config
    decode_length: int = 0

    accepts: ClassVar = frozenset({"source"})
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
        dtype = hardware.compute_dtype(self.cfg.dtype)
        if "source" in batch:
            context = self._read(batch, dtype, train)
        else:
            names = ("source", "keys", "segments", "fed", *self._states())
            context = {name: self.get_variable("cache", name) for name in names}
        flat = [context[name] for name in self._states()]
        per_layer = CELLS[self.cfg.cell].num_states
        states = [tuple(flat[i : i + per_layer]) for i in range(0, len(flat), per_layer)]
        memory = (context["keys"], context["source"], context["segments"])
        decoder = Decoder(self.cfg, dtype, train, name="decoder")
        x_BLD, states, fed_BD = decoder(
            self.embed(batch["inputs"]), states, context["fed"], memory, batch["segments"] > 0
        )
        if decode:
            flat = [s for state in states for s in state]
            context |= {**dict(zip(self._states(), flat, strict=True)), "fed": fed_BD}
            for name, value in context.items():
                self.put_variable("cache", name, value)
        return sharding.constrain(x_BLD, "act_batch", "act_length", "act_embed")

    def _states(self) -> list[str]:
        return [f"state_{i}" for i in range(self.cfg.num_layers * CELLS[self.cfg.cell].num_states)]

    def _read(self, batch, dtype, train: bool) -> dict[str, jax.Array]:
        """Return what the decoder needs of a source, and the states that it starts from."""
        source, segments_BS = batch["source"], batch["source_segments"]
        encoder = Encoder(self.cfg, dtype, train, name="encoder")
        source_BSE, finals = encoder(self.embed(source), segments_BS)
        flat = [s for state in finals for s in state]
        states = [
            jnp.tanh(bridge(s.astype(dtype))).astype(s.dtype)
            for bridge, s in zip(self.bridges, flat, strict=True)
        ]
        states = [sharding.constrain(s, "act_batch", "act_embed") for s in states]
        keys = source_BSE
        if self.cfg.attention != "none":
            keys = sharding.constrain(self.keys(source_BSE), "act_batch", "act_length", "act_embed")
        fed_BD = jnp.zeros((source.shape[0], self.cfg.model_dim), dtype)
        context = {"source": source_BSE, "keys": keys, "segments": segments_BS, "fed": fed_BD}
        return context | dict(zip(self._states(), states, strict=True))

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Return float32 logits [B, L, V] of features, the padded vocabulary masked."""
        logits_BLV = self.embed.attend(x_BLD) if self.cfg.tied else self.head(x_BLD)
        return finish_logits(logits_BLV, self.cfg.vocab_size)


def flops_per_token(cfg: Config, length: int) -> float:
    """Return training FLOPs a target token, its source as long as the row (or `max_source_length`).

    6 N for the decoder's matrices and the head, 6 N of the encoder's for each source token, and the
    attention's scores and sums, 12 E (multiplicative) or 18 E (additive, with its tanh) a pair of tokens.
    """
    D, ways = cfg.model_dim, 2 if cfg.bidirectional else 1
    gates, E = CELLS[cfg.cell].num_gates, D * ways
    encoder = ways * gates * D * (D + D) + (cfg.num_layers - 1) * ways * gates * D * (E + D)
    decoder = cfg.num_layers * gates * D * 2 * D + (gates * D * D if cfg.input_feeding else 0)
    decoder += D * pad_vocab(cfg.vocab_size)
    source = (cfg.max_source_length or length) / max(length, 1)
    flops = 6.0 * (decoder + source * encoder)
    if cfg.attention != "none":
        additive = cfg.attention == "additive"
        flops += 6.0 * (D * (E + D) + source * E * D + (D * D if additive else 0))
        flops += (18.0 if additive else 12.0) * E * source * length
    return flops
