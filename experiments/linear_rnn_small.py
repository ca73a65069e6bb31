"""A small language model of gated linear recurrences: trained in parallel, decoded with a fixed state.

Paper: Dao and Gu 2024 (Mamba-2, arXiv 2405.21060), Yang et al. 2023 (2312.06635), trained with Muon.
Command: python -m lm.main --config experiments/linear_rnn_small.py
Hardware: two CPU cores.
Result: 1.821 bits per byte after 300 steps (Python 3.13).
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
        "name": "linear_rnn",
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
