"""RoBERTa: `RobertaForMaskedLM` of transformers.

Position 0 has the row pad_token_id + 1 of its table; the rows before it are used by nothing.
"""

from typing import Any

import numpy as np

from lm.convert import mapping
from lm.convert.architectures import bert as bert_architecture
from lm.convert.mapping import Constant, Part
from lm.convert.settings import Settings
from lm.models import bert

FAMILY = "bert"
CLASSES = ("RobertaForMaskedLM",)
PREFIX = "roberta."
ALIASES = bert_architecture.ALIASES
FREE: frozenset[str] = frozenset()
PADDING = 1  # the only pad_token_id that is known here, as in all that are published
UNUSED = PADDING + 1
HEAD = {"head": "lm_head.dense", "head_norm": "lm_head.layer_norm", "head_bias": "lm_head.bias"}


def read(settings: Settings) -> dict[str, Any]:
    """Return the fields of `bert.Config`."""
    settings.only(pad_token_id=PADDING, hidden_act="gelu")  # its head has gelu whatever this says
    fields = bert_architecture.read_encoder(settings)
    fields["vocab_size"] = settings.integer("vocab_size", 50265)
    rows = settings.integer("max_position_embeddings", 512)
    if rows <= UNUSED:
        raise settings.wrong("max_position_embeddings", f"more than {UNUSED}")
    fields["max_length"] = rows - UNUSED
    fields["next_sentence"] = False
    return fields


def task(cfg: bert.Config) -> dict[str, Any]:
    """Return the task that it was trained for."""
    return {"name": "masked_lm", "length": min(cfg.max_length, 512)}


def write(cfg: bert.Config) -> dict[str, Any]:
    """Return config.json's settings."""
    return {
        **bert_architecture.write_encoder(cfg),
        "max_position_embeddings": cfg.max_length + UNUSED,
        "pad_token_id": PADDING,
    }


def parts(cfg: bert.Config) -> list[Part]:
    """Return every parameter."""
    return bert_architecture.encoder_parts(cfg, PREFIX, HEAD, unused_positions=UNUSED)


def copies(cfg: bert.Config) -> dict[str, str]:
    """Return the tied head, which some files hold again."""
    return {
        "lm_head.decoder.weight": f"{PREFIX}embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": HEAD["head_bias"],
    }


def constants(cfg: bert.Config) -> dict[str, Constant]:
    """Return the positions that old files hold."""
    rows = cfg.max_length + UNUSED
    positions = Constant((1, rows), lambda: np.arange(rows)[None])
    return {f"{PREFIX}embeddings.position_ids": positions}


def spare(cfg: bert.Config) -> dict[str, mapping.Shape]:
    """Return the pooler, which published files have and which was not trained."""
    D, pooler = cfg.model_dim, f"{PREFIX}pooler.dense"
    return {f"{pooler}.weight": (D, D), f"{pooler}.bias": (D,)}
