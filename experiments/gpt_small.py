"""GPT-2 small size (124M) with a current recipe, for one accelerator up to a pod.

Paper: Radford et al. 2019 with what has been kept since (see `lm/models/gpt.py`). Context 1024, a
global batch of 512 sequences (0.5M tokens) reached by accumulation, bf16 compute and f32 parameters
on accelerators (f32 on a CPU).
Command: python -m lm.main --config experiments/gpt_small.py --config.data.path=corpus.jsonl
  Without a path it trains on the source of Python's standard library (about 11 MB).
  On n devices set --config.train.accumulate_steps so that 512 / (n x accumulate_steps) rows fit one.
Hardware: one GPU of 40 GB or more, or any mesh.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment's config; what it leaves out has its section's default."""
    config = ConfigDict()
    config.data = ConfigDict({
        "source": "python_source",
        "tokenizer": "sentencepiece",
        "vocab_size": 50257,
        "sentencepiece_model": "bpe",
        "validation_fraction": 0.02,
        "batch_size": 512,
    })  # fmt: skip
    # One segment a row: documents are told apart by the end-of-text token, as GPT-2 was trained, and
    # attention runs in cuDNN's causal kernel.
    config.task = ConfigDict({"name": "causal_lm", "length": 1024, "isolate_documents": False})
    config.model = ConfigDict({
        "name": "gpt",
        "num_layers": 12,
        "model_dim": 768,
        "num_heads": 6,
    })  # fmt: skip
    config.optim = ConfigDict({
        "name": "muon",
        "peak_lr": 0.0036,  # an update of a matrix [768, 768] is then that of Jordan's Muon at 0.02
        "schedule": "wsd",
        "warmup": "2%",
        "decay": "40%",
        "weight_decay": 0.01,
    })  # fmt: skip
    config.train = ConfigDict({"num_steps": 5000, "accumulate_steps": 16, "log_every_steps": 10})
    config.eval = ConfigDict({"every_steps": 250, "max_tokens": 1_000_000, "batch_size": 32})
    config.checkpoint = ConfigDict({"every_steps": 500, "keep": 3})
    return config
