"""Characters counted: interpolated modified Kneser-Ney of order 6, every n-gram kept.

Paper: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling". Rows begin
with the order - 1 characters before them, so that every character is counted and scored with all of its
context.
Command: python -m lm.main --config experiments/ngram_char.py
  python -m tools.sweep --config experiments/ngram_char.py --workdir runs/ngram_char_sweep
Hardware: two CPU cores, seconds.
Result: 1.954 bits per byte after 2.0M characters (Python 3.13), 767 thousand nodes; on tiny Shakespeare
  (--config.data.path=input.txt) 1.5227 nats a character, and with kneser_ney 1.5582.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment's config; what it leaves out has its section's default."""
    config = ConfigDict()
    config.data = ConfigDict({"source": "python_docs", "tokenizer": "char", "batch_size": 64})
    config.task = ConfigDict({"name": "causal_lm", "length": 256, "context": 5})
    config.model = ConfigDict({"name": "ngram", "order": 6})
    config.train = ConfigDict({"num_steps": "1 epochs"})
    config.eval = ConfigDict({"every_steps": "1 epochs"})
    config.checkpoint = ConfigDict({"every_steps": "1 epochs"})
    return config


def sweep() -> list[dict]:
    """Return the smoothings that `tools.sweep` compares."""
    names = ("modified_kneser_ney", "kneser_ney", "jelinek_mercer", "add_k")
    return [{"model.smoothing": name} for name in names]
