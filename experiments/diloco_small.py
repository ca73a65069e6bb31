"""Training over slow links: gpt_tiny by groups of devices that meet every 30 steps (DiLoCo).

Paper: Douillard et al. 2023, arXiv 2311.08105 (see `lm/local_steps.py`). Each device is a group with its own
AdamW; between meetings they exchange a few numbers that are logged. On one device there is one group, whose
outer steps are then a kind of momentum.
Command: python -m tools.launch --processes 2 --devices_per_process 1 -- \
  python -m lm.main --config experiments/diloco_small.py
Hardware: two CPU cores.
Result: 2.36 bits per byte after 300 steps, where averaging at the meetings
  (--config.optim.outer_lr=1 --config.optim.outer_momentum=0) has 2.16 and meeting at every step
  (--config.mesh.local_steps=0 --config.mesh.dcn=1 --config.mesh.data=-1) 2.08. Ten meetings from scratch
  are too few for the paper's outer momentum; it is made for hundreds.
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
    })  # fmt: skip
    config.mesh = ConfigDict({"dcn": -1, "data": 1, "local_steps": 30})
    config.optim = ConfigDict({
        "name": "adamw",
        "peak_lr": 0.003,
        "schedule": "linear",
        "warmup": "2%",
        "outer_lr": 0.7,
        "outer_momentum": 0.9,
    })  # fmt: skip
    config.train = ConfigDict({"num_steps": 300, "log_every_steps": 5})
    config.eval = ConfigDict(
        {"every_steps": 90}
    )  # at meetings: what is evaluated changes only there
    config.checkpoint = ConfigDict({"every_steps": 90})
    return config
