"""Subwords counted: interpolated modified Kneser-Ney of order 5, every n-gram kept.

Paper: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", over the
pieces of SentencePiece instead of words. Rows begin with the order - 1 tokens before them.
Command: python -m lm.main --config experiments/ngram_subword.py
  python -m tools.sweep --config experiments/ngram_subword.py --workdir runs/ngram_subword_sweep
Hardware: two CPU cores, seconds once the tokenizer is trained.
Result: 1.844 bits per byte after 0.55M tokens (Python 3.13), 1.24 million nodes; of order 2, 3 and 4:
  2.072, 1.891 and 1.855.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment's config; what it leaves out has its section's default."""
    config = ConfigDict()
    config.data = ConfigDict({
        "source": "python_docs",
        "tokenizer": "sentencepiece",
        "vocab_size": 4096,
        "batch_size": 64,
    })  # fmt: skip
    config.task = ConfigDict({"name": "causal_lm", "length": 256, "context": 4})
    config.model = ConfigDict({"name": "ngram", "order": 5})
    config.train = ConfigDict({"num_steps": "1 epochs"})
    config.eval = ConfigDict({"every_steps": "1 epochs"})
    config.checkpoint = ConfigDict({"every_steps": "1 epochs"})
    return config


def sweep() -> list[dict]:
    """Return the orders that `tools.sweep` compares."""
    return [{"model.order": order, "task.context": order - 1} for order in (2, 3, 4, 5)]
