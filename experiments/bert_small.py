"""A small BERT: masked tokens and the next sentence, the same masks in every epoch.

Paper: Devlin et al. 2018 (arXiv 1810.04805), pre-training, in small, with Muon instead of Adam.
Command: python -m lm.main --config experiments/bert_small.py
Hardware: two CPU cores.
Result: 5.463 nats a masked token after 500 steps (Python 3.13). The masks are the same in every epoch, as in
the paper's code but for its ten copies, and so are learned by heart later on: 5.655 after 1,500 steps.
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
    config.task = ConfigDict({
        "name": "masked_lm",
        "length": 128,
        "dynamic": False,
        "next_sentence": True,
    })  # fmt: skip
    config.model = ConfigDict({
        "name": "bert",
        "num_layers": 4,
        "model_dim": 128,
        "num_heads": 4,
        "dropout": 0.1,
        "next_sentence": True,
    })  # fmt: skip
    config.optim = ConfigDict({
        "name": "muon",
        "peak_lr": 0.005,
        "schedule": "linear",
        "warmup": "10%",
        "weight_decay": 0.01,
    })  # fmt: skip
    config.train = ConfigDict({"num_steps": 500, "log_every_steps": 20, "sample_tokens": 0})
    config.eval = ConfigDict({"every_steps": 250})
    config.checkpoint = ConfigDict({"every_steps": 250})
    return config
