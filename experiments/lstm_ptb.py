"""The medium LSTM of Zaremba et al. 2014 on words of the Penn Treebank: two layers of 650, dropout 0.5.

Paper: Recurrent Neural Network Regularization (arXiv 1409.2329): perplexity 86.2 on the validation text, 82.7
on the test text. Its gradient is a sum over the 35 steps of a window, ours a mean: so its learning rate 1 is
35 here, and its clipping at 5 is at 5/35.
Data: ptb.train.txt and ptb.valid.txt of Mikolov's preparation, given by path. The fraction is the second's
share of their characters, so that the cut falls between them; for another text set your own.
Command: python -m lm.main --config experiments/lstm_ptb.py --config.data.path=ptb.train.txt,ptb.valid.txt
Test: python -m tools.evaluate --workdir WORKDIR --config.data.path=ptb.test.txt
Hardware: a GPU; an epoch is 1,327 steps.
Result: not run.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment's config; what it leaves out has its section's default."""
    config = ConfigDict()
    config.data = ConfigDict({
        "tokenizer": "word",
        "vocab_size": 10001,  # 9,998 words, <unk>, <eos> and end of text
        "validation_fraction": 399781.5 / (5101618 + 399782),
        "batch_size": 20,
        "order": "stream",
    })  # fmt: skip
    config.task = ConfigDict({"name": "causal_lm", "length": 35})
    config.model = ConfigDict({
        "name": "rnn",
        "cell": "lstm",
        "num_layers": 2,
        "model_dim": 650,
        "tied": False,
        "dropout": 0.5,
        "init_scale": 0.05,
    })  # fmt: skip
    config.optim = ConfigDict({
        "name": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "clip_norm": 5 / 35,
        "peak_lr": 35.0,
        "schedule": "exponential",
        "hold": "6 epochs",
        "fall_every": "1 epoch",
        "fall_factor": 1 / 1.2,
        "warmup": 0,
    })  # fmt: skip
    config.train = ConfigDict({"num_steps": "39 epochs", "log_every_steps": 100})
    config.eval = ConfigDict({"every_steps": "1 epoch", "streams": 20})
    config.checkpoint = ConfigDict({"every_steps": "1 epoch"})
    return config
