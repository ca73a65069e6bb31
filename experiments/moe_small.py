"""A small mixture of experts on the English that every Python carries: gpt_tiny with experts.

Papers: see `lm/nn/moe.py`. A token meets two of eight experts, each half as wide as gpt_tiny's MLP, so as
many products as there; dropless. On eight devices `--config.mesh.expert=8` splits both over them.
Command: python -m lm.main --config experiments/moe_small.py
Hardware: two CPU cores.
Result: 1.754 bits per byte after 1.2M tokens, the fullest expert at 1.39 times the mean (one seed, Python
3.11; gpt_tiny in the same environment 1.803). 7.6 minutes on two cores that others used too, gpt_tiny 6.6.
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
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_dim": 256,
    })  # fmt: skip
    config.optim = ConfigDict(
        {"name": "muon", "peak_lr": 0.02, "schedule": "linear", "warmup": "2%"}
    )
    config.train = ConfigDict({"num_steps": 300, "log_every_steps": 5})
    config.eval = ConfigDict({"every_steps": 100})
    config.checkpoint = ConfigDict({"every_steps": 100})
    return config
