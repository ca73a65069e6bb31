"""A small LSTM with a block of self-attention above it, over the recurrent features of a row.

Paper: Single Headed Attention RNN, Merity 2019 (arXiv 1911.11423), after Cheng et al. 2016 (1601.06733); one
dropout mask a row: Gal and Ghahramani 2016 (1512.05287); DropConnect: Merity et al. 2017 (1708.02182).
Command: python -m lm.main --config experiments/lstm_attention.py
Hardware: two CPU cores.
Result: 1.938 bits per byte after 1.2M tokens (one seed, Python 3.13).
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
    })  # fmt: skip
    config.task = ConfigDict({"name": "causal_lm", "length": 128})
    config.model = ConfigDict({
        "name": "rnn",
        "cell": "lstm",
        "num_layers": 2,
        "model_dim": 256,
        "num_heads": 4,
        "dropout": 0.1,
        "dropout_mask": "row",
        "weight_dropout": 0.1,
    })  # fmt: skip
    config.optim = ConfigDict(
        {"name": "muon", "peak_lr": 0.02, "schedule": "linear", "warmup": "2%"}
    )
    config.train = ConfigDict({"num_steps": 600, "log_every_steps": 20})
    config.eval = ConfigDict({"every_steps": 200})
    config.checkpoint = ConfigDict({"every_steps": 200})
    return config
