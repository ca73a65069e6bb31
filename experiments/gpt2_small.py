"""GPT-2 small (124M) as it was published: what speed is compared on, and other recipes are judged by.

Paper: "Language Models are Unsupervised Multitask Learners", Radford et al. 2019; the optimizer's
settings are GPT-3's (arXiv 2005.14165). Biases, LayerNorm, learned positions, GELU, tied embeddings; no
dropout.
Command: python -m lm.main --config experiments/gpt2_small.py --config.data.path=corpus.jsonl
Hardware: one GPU of 40 GB or more, or any mesh.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment's config; what it leaves out has its section's default."""
    config = ConfigDict()
    config.data = ConfigDict({
        "source": "python_source",
        "tokenizer": "sentencepiece",
        "vocab_size": 50257,
        "sentencepiece_model": "bpe",
        "validation_fraction": 0.02,
        "batch_size": 512,
    })  # fmt: skip
    config.task = ConfigDict({"name": "causal_lm", "length": 1024, "isolate_documents": False})
    config.model = ConfigDict({
        "name": "gpt",
        "num_layers": 12,
        "model_dim": 768,
        "num_heads": 12,
        "positions": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "activation": "gelu",
        "qk_norm": False,
        "bias": True,
    })  # fmt: skip
    config.optim = ConfigDict({
        "name": "adamw",
        "peak_lr": 6e-4,
        "schedule": "cosine",
        "warmup": "2%",
        "weight_decay": 0.1,
    })  # fmt: skip
    config.train = ConfigDict({"num_steps": 5000, "accumulate_steps": 16, "log_every_steps": 10})
    config.eval = ConfigDict({"every_steps": 250, "max_tokens": 1_000_000, "batch_size": 32})
    config.checkpoint = ConfigDict({"every_steps": 500, "keep": 3})
    return config
