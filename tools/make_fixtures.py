"""Make the parity fixtures of tests/fixtures: `python -m tools.make_fixtures --out tests/fixtures`.

Needs the extra `bench` (PyTorch and transformers) and nothing of ours but this file. Each file is one tiny
model of somebody else's code. Its tensors are `weight:NAME` (that code's own names and shapes; of values
that bfloat16 holds, and stored so), `input:NAME`, `output:NAME` and, for recurrent cells, `gradient:NAME`;
its metadata hold one `fixture`, the JSON of `architecture` and `config`. Biases and norm weights are moved
off 0 and 1.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
    import transformers
    from safetensors.torch import save_file
except ImportError as error:
    print(f"error: {error}: pip install -e '.[bench]'", file=sys.stderr)
    sys.exit(2)

VOCAB, ROWS, LENGTH, SOURCE = 47, 2, 18, 14
Tensors = dict[str, torch.Tensor]


class Case(NamedTuple):
    """One fixture.

    Attributes:
      architecture: class of transformers, or of torch.nn.
      config: that class's settings.
      run: (model, rng) -> (inputs, outputs, gradients).
    """

    architecture: str
    config: dict[str, Any]
    run: Callable[[Any, torch.Generator], tuple[Tensors, Tensors, Tensors]]


def _ids(rng: torch.Generator, config: Any, length: int, low: int = 3) -> tuple[torch.Tensor, ...]:
    """Return token ids [ROWS, length] and their mask: the last row ends a third earlier, in padding."""
    mask = torch.ones(ROWS, length, dtype=torch.long)
    mask[-1, length - length // 3 :] = 0
    ids = torch.randint(low, config.vocab_size, (ROWS, length), generator=rng)
    return torch.where(mask > 0, ids, config.pad_token_id or 0), mask


def run_causal(model: Any, rng: torch.Generator) -> tuple[Tensors, Tensors, Tensors]:
    """Return logits [B, L, V] of every position."""
    ids, mask = _ids(rng, model.config, LENGTH)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs, {"logits": model(**inputs).logits}, {}


def run_bert(model: Any, rng: torch.Generator) -> tuple[Tensors, Tensors, Tensors]:
    """Return the last features, pooled features, logits of tokens, and of the next sentence."""
    ids, mask = _ids(rng, model.config, LENGTH)
    types = ((torch.arange(LENGTH)[None] >= LENGTH // 3) & (mask > 0)).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    features = model.bert(**inputs)
    heads = model(**inputs)
    outputs = {
        "features": features.last_hidden_state,
        "pooled": features.pooler_output,
        "logits": heads.prediction_logits,
        "next_sentence": heads.seq_relationship_logits,
    }
    return inputs, outputs, {}


def run_roberta(model: Any, rng: torch.Generator) -> tuple[Tensors, Tensors, Tensors]:
    """Return the last features and the logits of tokens."""
    ids, mask = _ids(rng, model.config, LENGTH)
    inputs = {"input_ids": ids, "attention_mask": mask}
    features = model.roberta(**inputs).last_hidden_state
    return inputs, {"features": features, "logits": model(**inputs).logits}, {}


def run_t5(model: Any, rng: torch.Generator) -> tuple[Tensors, Tensors, Tensors]:
    """Return the encoder's features [B, S, D] and the decoder's logits [B, L, V]."""
    ids, mask = _ids(rng, model.config, SOURCE)
    target, target_mask = _ids(rng, model.config, LENGTH)
    target[:, 0] = model.config.decoder_start_token_id
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": target,
        "decoder_attention_mask": target_mask,
    }
    made = model(**inputs)
    return inputs, {"features": made.encoder_last_hidden_state, "logits": made.logits}, {}


def run_cell(model: Any, rng: torch.Generator) -> tuple[Tensors, Tensors, Tensors]:
    """Return outputs [B, L, H], last states, and the gradients of loss = sum of outputs * mixtures."""
    names = ("h", "c") if isinstance(model, torch.nn.LSTM) else ("h",)
    shape = (model.num_layers, ROWS, model.hidden_size)
    sources = {"x": torch.randn(ROWS, LENGTH, model.input_size, generator=rng)}
    sources |= {name: torch.randn(shape, generator=rng) for name in names}
    with torch.enable_grad():
        for value in sources.values():
            value.requires_grad_()
        x, *states = sources.values()
        y, last = model(x, tuple(states) if len(states) > 1 else states[0])
        outputs = {"y": y, **dict(zip(names, last if len(states) > 1 else [last], strict=True))}
        mixtures = {
            name: torch.randn(value.shape, generator=rng) for name, value in outputs.items()
        }
        loss = sum((value * mixtures[name]).sum() for name, value in outputs.items())
        wanted = {**sources, **dict(model.named_parameters())}
        gradients = torch.autograd.grad(loss, list(wanted.values()))
    inputs = sources | {f"mixture_{name}": value for name, value in mixtures.items()}
    outputs["loss"] = loss.reshape(1)
    return inputs, outputs, dict(zip(wanted, gradients, strict=True))


SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = {**SPECIAL, "vocab_size": VOCAB, "n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 4}
LLAMA = {
    **SPECIAL,
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # four rotary frequencies, and not hidden_size / heads
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-5,
}
# Some frequencies are kept, some scaled, and some between.
ROPE = {"rope_theta": 10.0, "factor": 4.0, "original_max_position_embeddings": 12}
ONE_LAYER = {"num_hidden_layers": 1}
LLAMA3 = {"low_freq_factor": 0.5, "high_freq_factor": 1.5}
YARN = {"beta_fast": 1.5, "beta_slow": 0.4, "mscale": 0.9, "mscale_all_dim": 0.4, "truncate": False}
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 6,  # not d_model / heads
    "d_ff": 28,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
CELL = {"input_size": 5, "hidden_size": 6, "num_layers": 2, "batch_first": True}


def _llama(rope: dict[str, Any], **more: Any) -> Case:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    return Case("LlamaForCausalLM", {**LLAMA, "rope_parameters": parameters, **more}, run_causal)


CASES = {
    "gpt2": Case("GPT2LMHeadModel", GPT2, run_causal),
    "llama": _llama({}, attention_bias=True, mlp_bias=True),
    "llama_linear": _llama(
        {"rope_type": "linear", "factor": 2.5},
        **ONE_LAYER,
        attention_bias=True,
        tie_word_embeddings=True,
        rms_norm_eps=0.01,
    ),
    "llama_llama3": _llama({"rope_type": "llama3", **ROPE, **LLAMA3}, **ONE_LAYER),
    "llama_yarn": _llama({"rope_type": "yarn", **ROPE}, **ONE_LAYER),
    "llama_yarn_all": _llama(
        {"rope_type": "yarn", **ROPE, **YARN}, **ONE_LAYER, num_key_value_heads=4
    ),
    "bert": Case("BertForPreTraining", {**BERT, "type_vocab_size": 2}, run_bert),
    "roberta": Case("RobertaForMaskedLM", {**BERT, "type_vocab_size": 1}, run_roberta),
    "t5": Case("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "relu"}, run_t5),
    "t5_v1_1": Case(
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        run_t5,
    ),
    "lstm": Case("LSTM", CELL, run_cell),
    "gru": Case("GRU", CELL, run_cell),
    "rnn": Case("RNN", {**CELL, "nonlinearity": "tanh"}, run_cell),
}


class Made(NamedTuple):
    """A model of somebody else's and what it computes; all but `model` is what a fixture's file holds."""

    model: Any
    config: dict[str, Any]
    weights: Tensors
    inputs: Tensors
    outputs: Tensors
    gradients: Tensors


def make(case: Case, seed: int, **settings: Any) -> Made:
    """Return a model of `case`, its config changed by `settings`, with parameters drawn from `seed`."""
    rng = torch.Generator().manual_seed(seed)
    settings = {**case.config, **settings}
    if hasattr(torch.nn, case.architecture):
        model, config = getattr(torch.nn, case.architecture)(**settings), settings
    else:
        cls = getattr(transformers, case.architecture)
        model = cls(cls.config_class(**settings)).eval()
        config = {**model.config.to_diff_dict(), "architectures": [case.architecture]}
        config.pop("transformers_version")
        if settings.get("tie_word_embeddings") is False:
            # T5 1.1 has a head of its own, though its class ties it until one is loaded.
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
            config["tie_word_embeddings"] = False
    with torch.no_grad():
        for name, value in model.named_parameters():
            # By the width: a wider model's numbers, and so the rounding of its sums, are no larger.
            size = 0.3 if value.ndim < 2 else max(16, min(value.shape)) ** -0.5
            if name.endswith("Attention.q.weight"):  # T5's, which does not divide its scores
                size *= model.config.d_kv**-0.5
            drawn = torch.randn(value.shape, generator=rng) * size
            value.copy_((drawn + (1 if _is_scale(name) else 0)).bfloat16())
        inputs, outputs, gradients = case.run(model, rng)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return Made(model, config, weights, inputs, outputs, gradients)


def _is_scale(name: str) -> bool:
    """Return whether a parameter is the weight of a norm, by its module's name."""
    module = name.removesuffix(".weight").split(".")[-1].lower()
    return name.endswith(".weight") and any(part in module for part in ("norm", "ln_"))


def write(made: Made, architecture: str, path: Path) -> None:
    """Write one fixture's file."""
    tensors = {f"weight:{name}": value.bfloat16() for name, value in made.weights.items()}
    groups = (("input", made.inputs), ("output", made.outputs), ("gradient", made.gradients))
    for kind, values in groups:
        for name, value in values.items():
            value = value.detach()
            tensors[f"{kind}:{name}"] = value if value.is_floating_point() else value.int()
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    fixture = {"architecture": architecture, "config": made.config}
    save_file(tensors, path, metadata={"fixture": json.dumps(fixture, separators=(",", ":"))})


def main(argv: list[str] | None = None) -> int:
    """Write every fixture, or those named, and say their sizes."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_fixtures", description=__doc__)
    parser.add_argument("--out", default="tests/fixtures", help="folder to write to")
    parser.add_argument("--only", action="append", choices=sorted(CASES), help="one fixture's name")
    args = parser.parse_args(argv)
    total = 0
    for name in args.only or CASES:
        path = Path(args.out) / f"{name}.safetensors"
        # A seed of its own, so that a new case changes no other.
        write(make(CASES[name], zlib.crc32(name.encode())), CASES[name].architecture, path)
        total += path.stat().st_size
        print(f"{path} {path.stat().st_size:,} bytes")
    print(f"{total:,} bytes; torch {torch.__version__}, transformers {transformers.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
