"""Llama, all versions: `LlamaForCausalLM` of transformers."""

from typing import Any

from lm.convert import mapping
from lm.convert.mapping import Constant, Part
from lm.convert.settings import Settings
from lm.models import gpt

FAMILY = "gpt"
CLASSES = ("LlamaForCausalLM",)
PREFIX = "model."
ALIASES: tuple[tuple[str, str], ...] = ()
FREE: frozenset[str] = frozenset()
SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def read(settings: Settings) -> dict[str, Any]:
    """Return the fields of `gpt.Config`."""
    settings.only(hidden_act="silu", is_causal=True)
    attention, mlp = settings.flag("attention_bias", False), settings.flag("mlp_bias", False)
    return {
        "num_layers": settings.integer("num_hidden_layers", 32),
        "model_dim": settings.integer("hidden_size", 4096),
        "num_heads": settings.integer("num_attention_heads", 32),
        "num_kv_heads": settings.integer("num_key_value_heads", 0),
        "head_dim": settings.integer("head_dim", 0),
        "mlp_dim": settings.integer("intermediate_size", 11008),
        "vocab_size": settings.integer("vocab_size", 32000),
        "max_length": settings.integer("max_position_embeddings", 2048),
        "positions": "rotary",
        "norm": "rmsnorm",
        "norm_epsilon": settings.number("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "qk_norm": False,
        "bias": attention or mlp,
        "bias_in": "all" if attention == mlp else "attention" if attention else "mlp",
        "tied": settings.flag("tie_word_embeddings", False),
        **_read_rope(settings),
    }


def _read_rope(settings: Settings) -> dict[str, Any]:
    """Return the fields of rotary positions, from either of the places that versions have for them.

    Where both are there the older one counts, as for transformers.
    """
    rope = settings.section("rope_scaling")
    if not rope.values:
        rope = settings.section("rope_parameters")
    base = (rope if "rope_theta" in rope else settings).number("rope_theta", 10000.0)
    for place in (settings, rope):
        place.only(partial_rotary_factor=1.0)
    scaling = rope.one_of("rope_type" if "rope_type" in rope else "type", "default", SCALINGS)
    found: dict[str, Any] = {"rope_base": base, "rope_scaling": scaling}
    if scaling == "none":
        return found
    length = settings.integer("max_position_embeddings", 2048)
    place = settings if "original_max_position_embeddings" in settings else rope
    original = place.integer("original_max_position_embeddings", length)
    if scaling != "yarn" and "factor" not in rope:
        raise rope.wrong("factor", "a number of 1 or more")
    found["rope_factor"] = rope.number("factor", length / original)
    if found["rope_factor"] == 1:  # nothing is scaled
        if scaling == "yarn":
            rope.only(attention_factor=1.0)
        return found | {"rope_scaling": "none"}
    if scaling == "linear":
        return found
    found["rope_original_length"] = original
    if scaling == "llama3":
        for theirs, ours in (("low_freq_factor", "low"), ("high_freq_factor", "high")):
            if theirs not in rope:
                raise rope.wrong(theirs, "a number")
            found[f"rope_{ours}_frequency"] = rope.number(theirs, 0.0)
        return found
    return found | {
        "rope_beta_fast": rope.number("beta_fast", 32.0) or 32.0,
        "rope_beta_slow": rope.number("beta_slow", 1.0) or 1.0,
        "rope_truncate": rope.flag("truncate", True),
        "rope_attention_factor": rope.number("attention_factor", 0.0),
        **_read_mscale(rope),
    }


def _read_mscale(rope: Settings) -> dict[str, float]:
    """Return both, or none where one is missing: transformers then takes neither."""
    read = [rope.number(name, 0.0) for name in ("mscale", "mscale_all_dim")]
    return dict(
        zip(("rope_mscale", "rope_mscale_all_dim"), read if all(read) else (0.0, 0.0), strict=True)
    )


def task(cfg: gpt.Config) -> dict[str, Any]:
    """Return the task that it was trained for, in rows that an evaluation can hold."""
    return {"name": "causal_lm", "length": min(cfg.max_length, 1024)}


def write(cfg: gpt.Config) -> dict[str, Any]:
    """Return config.json's settings."""
    return {
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.model_dim,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.sizes["num_kv_heads"],
        "head_dim": cfg.sizes["head_dim"],
        "intermediate_size": cfg.sizes["mlp_dim"],
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": cfg.biased("attention"),
        "mlp_bias": cfg.biased("mlp"),
        "tie_word_embeddings": cfg.tied,
        **_write_rope_twice(cfg),
    }


def _write_rope_twice(cfg: gpt.Config) -> dict[str, Any]:
    """Return the rotary positions where transformers 5 looks for them, and where all before it do."""
    rope = _write_rope(cfg)
    older = {name: value for name, value in rope.items() if name != "rope_theta"}
    scaling = {} if cfg.rope_scaling == "none" else {"rope_scaling": older}
    return {"rope_parameters": rope, "rope_theta": cfg.rope_base, **scaling}


def _write_rope(cfg: gpt.Config) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in SCALINGS.items()}
    found: dict[str, Any] = {
        "rope_type": names[cfg.rope_scaling],
        "rope_theta": cfg.rope_base,
    }
    if cfg.rope_scaling == "none":
        return found
    found["factor"] = cfg.rope_factor
    if cfg.rope_scaling == "linear":
        return found
    found["original_max_position_embeddings"] = cfg.sizes["rope_original_length"]
    if cfg.rope_scaling == "llama3":
        return found | {
            "low_freq_factor": cfg.rope_low_frequency,
            "high_freq_factor": cfg.rope_high_frequency,
        }
    optional = {
        "attention_factor": cfg.rope_attention_factor,
        "mscale": cfg.rope_mscale,
        "mscale_all_dim": cfg.rope_mscale_all_dim,
    }
    return found | {
        "beta_fast": cfg.rope_beta_fast,
        "beta_slow": cfg.rope_beta_slow,
        "truncate": cfg.rope_truncate,
        **{name: value for name, value in optional.items() if value},
    }


def parts(cfg: gpt.Config) -> list[Part]:
    """Return every parameter."""
    D, F, V = cfg.model_dim, cfg.sizes["mlp_dim"], cfg.vocab_size
    heads = {
        "num_heads": cfg.num_heads,
        "num_kv_heads": cfg.sizes["num_kv_heads"],
        "head_dim": cfg.sizes["head_dim"],
    }
    H, K = cfg.num_heads, cfg.sizes["head_dim"]
    found = [mapping.table("embed.embedding", f"{PREFIX}embed_tokens.weight", V, D)]
    for n in range(cfg.num_layers):
        ours, theirs = f"layers.block_{n}", f"{PREFIX}layers.{n}"
        qkv = [f"{theirs}.self_attn.{name}_proj" for name in "qkv"]
        up = [f"{theirs}.mlp.{name}_proj" for name in ("gate", "up")]
        out, down = f"{theirs}.self_attn.o_proj", f"{theirs}.mlp.down_proj"
        kernel, bias = f"{ours}.attention.qkv.kernel", f"{ours}.attention.qkv.bias"
        found += [
            mapping.attention(kernel, [f"{q}.weight" for q in qkv], model_dim=D, **heads),
            mapping.linear(f"{ours}.attention.out.kernel", f"{out}.weight", (H, K), (D,)),
            mapping.stacked(
                f"{ours}.mlp.up.kernel", [f"{u}.weight" for u in up], (F, D), axis=1, linear=True
            ),
            mapping.linear(f"{ours}.mlp.down.kernel", f"{down}.weight", (F,), (D,)),
            mapping.reshaped(
                f"{ours}.attention_norm.scale", f"{theirs}.input_layernorm.weight", (D,)
            ),
            mapping.reshaped(
                f"{ours}.mlp_norm.scale", f"{theirs}.post_attention_layernorm.weight", (D,)
            ),
        ]
        if cfg.biased("attention"):
            found += [
                mapping.attention(bias, [f"{q}.bias" for q in qkv], model_dim=0, **heads),
                mapping.reshaped(f"{ours}.attention.out.bias", f"{out}.bias", (D,)),
            ]
        if cfg.biased("mlp"):
            found += [
                mapping.stacked(
                    f"{ours}.mlp.up.bias", [f"{u}.bias" for u in up], (F,), axis=0, linear=False
                ),
                mapping.reshaped(f"{ours}.mlp.down.bias", f"{down}.bias", (D,)),
            ]
    found.append(mapping.reshaped("norm.scale", f"{PREFIX}norm.weight", (D,)))
    if not cfg.tied:
        found.append(mapping.head("head.kernel", "lm_head.weight", V, D))
    return found


def copies(cfg: gpt.Config) -> dict[str, str]:
    """Return the tied head, which some files hold again."""
    return {"lm_head.weight": f"{PREFIX}embed_tokens.weight"} if cfg.tied else {}


def constants(cfg: gpt.Config) -> dict[str, Constant]:
    """Return the rotary frequencies that old files hold, one a layer."""
    rotary = cfg.rotary
    assert rotary is not None
    width = cfg.sizes["head_dim"]
    frequencies = Constant((width // 2,), lambda: rotary.frequencies(width))
    names = [f"{PREFIX}layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(cfg.num_layers)]
    return dict.fromkeys(names, frequencies)


def spare(cfg: gpt.Config) -> dict[str, mapping.Shape]:
    """Return nothing: no file holds any."""
    return {}
