"""A small RoBERTa: masked tokens alone, other masks in every epoch.

Paper: Liu et al. 2019 (arXiv 1907.11692), in small: no next sentence, no types of segments, norms' epsilon
1e-5. Otherwise as `bert_small.py`, and three times as long.
Command: python -m lm.main --config experiments/roberta_small.py
Hardware: two CPU cores.
Result: 5.107 nats a masked token after 1,500 steps (Python 3.13); it still falls.
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
    config.task = ConfigDict({"name": "masked_lm", "length": 128})
    config.model = ConfigDict({
        "name": "bert",
        "num_layers": 4,
        "model_dim": 128,
        "num_heads": 4,
        "num_types": 1,
        "norm_epsilon": 1e-5,
        "dropout": 0.1,
    })  # fmt: skip
    config.optim = ConfigDict({
        "name": "muon",
        "peak_lr": 0.005,
        "schedule": "linear",
        "warmup": "10%",
        "weight_decay": 0.01,
    })  # fmt: skip
    config.train = ConfigDict({"num_steps": 1500, "log_every_steps": 20, "sample_tokens": 0})
    config.eval = ConfigDict({"every_steps": 250})
    config.checkpoint = ConfigDict({"every_steps": 250})
    return config
