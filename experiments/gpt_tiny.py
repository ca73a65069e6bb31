"""A small GPT on real English that every Python carries: a result in five minutes on a laptop.

Paper: Radford et al. 2019 with the current recipe (see `lm/models/gpt.py`), trained with Muon.
Command: python -m lm.main --config experiments/gpt_tiny.py
  python -m tools.sweep --config experiments/gpt_tiny.py --workdir runs/gpt_tiny_sweep
Hardware: two CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment's config; what it leaves out has its section's default."""
    config = ConfigDict()
    config.data = ConfigDict({
        "source": "python_docs",
        "tokenizer": "sentencepiece",
        "vocab_size": 2048,
        "batch_size": 32,
    })  # fmt: skip
    config.task = ConfigDict({"name": "causal_lm", "length": 128})
    config.model = ConfigDict({
        "name": "gpt",
        "num_layers": 4,
        "model_dim": 128,
        "num_heads": 4,
    })  # fmt: skip
    config.optim = ConfigDict(
        {"name": "muon", "peak_lr": 0.02, "schedule": "linear", "warmup": "2%"}
    )
    config.train = ConfigDict({"num_steps": 300, "log_every_steps": 5})
    config.eval = ConfigDict({"every_steps": 100})
    config.checkpoint = ConfigDict({"every_steps": 100})
    return config


def sweep() -> list[dict]:
    """Return the learning rates that `tools.sweep` compares (`lm.sweep` has grids of several fields)."""
    return [{"optim.peak_lr": rate} for rate in (0.01, 0.02, 0.04)]
