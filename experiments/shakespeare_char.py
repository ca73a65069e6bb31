"""Characters of Shakespeare: nanoGPT's published CPU recipe, with the current model and optimizer.

4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps; the first 90% of the file to train.
nanoGPT publishes a validation loss of 1.88 nats.
Command: python -m lm.main --config experiments/shakespeare_char.py --config.data.path=input.txt
  where input.txt is the tiny Shakespeare file; without a path it trains on the embedded corpus.
Hardware: two CPU cores, about six minutes on a Zen 3 server.
Result: 1.604 nats a character at step 2,000 (one seed).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment's config; what it leaves out has its section's default."""
    config = ConfigDict()
    config.data = ConfigDict({"tokenizer": "char", "batch_size": 12, "validation_fraction": 0.1})
    config.task = ConfigDict({"name": "causal_lm", "length": 64})
    config.model = ConfigDict({
        "name": "gpt",
        "num_layers": 4,
        "model_dim": 128,
        "num_heads": 4,
    })  # fmt: skip
    config.optim = ConfigDict(
        {"name": "muon", "peak_lr": 0.02, "schedule": "linear", "warmup": "5%"}
    )
    config.train = ConfigDict({"num_steps": 2000, "log_every_steps": 20})
    config.eval = ConfigDict({"every_steps": 500, "batch_size": 128})
    config.checkpoint = ConfigDict({"every_steps": 500})
    return config
