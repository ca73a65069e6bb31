"""A small GRU language model, its state carried from window to window of 16 streams.

Paper: Cho et al. 2014 (arXiv 1406.1078), the cell as in cuDNN (see `lm/nn/cells.py`), with AdamW.
Command: python -m lm.main --config experiments/gru_small.py
Hardware: two CPU cores.
Result: 1.882 bits per byte after 2.0M tokens (one seed, Python 3.13).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment's config; what it leaves out has its section's default."""
    config = ConfigDict()
    config.data = ConfigDict({
        "source": "python_docs",
        "tokenizer": "sentencepiece",
        "vocab_size": 2048,
        "batch_size": 16,
        "order": "stream",
    })  # fmt: skip
    config.task = ConfigDict({"name": "causal_lm", "length": 64})
    config.model = ConfigDict({
        "name": "rnn",
        "cell": "gru",
        "num_layers": 2,
        "model_dim": 256,
        "dropout": 0.1,
    })  # fmt: skip
    config.optim = ConfigDict(
        {"name": "adamw", "peak_lr": 3e-3, "schedule": "cosine", "warmup": "2%"}
    )
    config.train = ConfigDict({"num_steps": 2000, "log_every_steps": 20})
    config.eval = ConfigDict({"every_steps": 500, "streams": 16})
    config.checkpoint = ConfigDict({"every_steps": 500})
    return config
