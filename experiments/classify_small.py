"""A small encoder that says which label a text has, trained from nothing on labelled texts of yours.

Paper: Devlin et al. 2018 (arXiv 1810.04805), fine-tuning; train.init_from brings the pre-training.
Command: python -m lm.main --config experiments/classify_small.py --config.data.path=train.csv
  --config.data.source_field=text --config.data.label_field=category
  From a run of bert_small (RUN) add --config.train.init_from=RUN --config.data.tokenizer=file
  --config.data.tokenizer_path=RUN/tokenizer --config.task.length=128 --config.model.num_layers=4
Hardware: two CPU cores, four minutes.
Result: Banking77 (8,990 of the 10,003 training texts, 77 labels): 78.0% of its 3,080 test texts are right.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment's config; what it leaves out has its section's default."""
    config = ConfigDict()
    config.data = ConfigDict({"tokenizer": "sentencepiece", "vocab_size": 2048, "batch_size": 32})
    config.task = ConfigDict({"name": "classify", "length": 64})
    config.model = ConfigDict({
        "name": "bert",
        "num_layers": 2,
        "model_dim": 128,
        "num_heads": 4,
        "dropout": 0.1,
    })  # fmt: skip
    config.optim = ConfigDict({
        "name": "adamw",
        "peak_lr": 1e-3,
        "schedule": "linear",
        "warmup": "10%",
        "weight_decay": 0.01,
    })  # fmt: skip
    config.train = ConfigDict({"num_steps": 1500, "log_every_steps": 50})
    config.eval = ConfigDict({"every_steps": 500})
    config.checkpoint = ConfigDict({"every_steps": 500})
    return config
