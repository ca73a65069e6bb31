"""A small GPT on two corpora: three rows of Python's documentation to one of its source, at the end none.

Paper: a last stage with other weights: MiniCPM, Hu et al. 2024 (arXiv 2404.06395), section 4; rows by best
fit: Ding et al. 2024 (arXiv 2404.10830).
Command: python -m lm.main --config experiments/gpt_mixture.py
Hardware: two CPU cores.
Result: 1.805 bits per byte on the documentation and 1.524 on the source (Python 3.11; 66k tokens of each).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment's config; what it leaves out has its section's default."""
    config = ConfigDict()
    config.data = ConfigDict({
        "mixture": (("python_docs", 3.0), ("python_source", 1.0)),
        "mixture_stages": ((240, (1.0, 0.0)),),
        "tokenizer": "sentencepiece",
        "vocab_size": 2048,
        "batch_size": 32,
    })  # fmt: skip
    config.task = ConfigDict({"name": "causal_lm", "length": 128, "packing": "best_fit"})
    config.model = ConfigDict({"name": "gpt", "num_layers": 4, "model_dim": 128, "num_heads": 4})
    config.optim = ConfigDict(
        {"name": "muon", "peak_lr": 0.02, "schedule": "linear", "warmup": "2%"}
    )
    config.train = ConfigDict({"num_steps": 300, "log_every_steps": 5})
    config.eval = ConfigDict({"every_steps": 100, "max_tokens": 65_536})
    config.checkpoint = ConfigDict({"every_steps": 100})
    return config
