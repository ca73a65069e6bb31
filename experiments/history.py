"""Language models from counting to today, on one corpus, with one tokenizer and one budget of bytes read.

Paper: each family's, in `PAPERS`.
Command: python -m tools.history --config experiments/history.py --workdir runs/history
Hardware: two CPU cores, half an hour. Result: the table in README.md.

Every model is trained on 1.2M tokens of the embedded corpus, 1.9 times all of it (n-grams count it once),
and has 0.6 (Elman) to 1.8 million parameters. Encoders are asked for masked tokens, which is another
question: their nats are no bits per byte; BERT here has no next sentence. Encoder-decoders read up to 63
tokens and write the next 64, so that they know more of what came before than a row of 128 does on average.
"""

from ml_collections import ConfigDict

# point: (year, paper)
PAPERS = {
    "trigram_add_k": (1948, "Shannon, A Mathematical Theory of Communication"),
    "trigram_jelinek_mercer": (1980, "Jelinek and Mercer, Interpolated Estimation"),
    "trigram_kneser_ney": (1999, "Chen and Goodman, arXiv cmp-lg/9606011"),
    "elman": (1990, "Elman, Finding Structure in Time; Mikolov et al. 2010"),
    "lstm": (1997, "Hochreiter and Schmidhuber, Long Short-Term Memory; arXiv 1409.2329"),
    "gru": (2014, "Cho et al., arXiv 1406.1078"),
    "seq2seq": (2014, "Sutskever et al., arXiv 1409.3215"),
    "seq2seq_attention": (2015, "Bahdanau et al., arXiv 1409.0473"),
    "lstm_attention": (2016, "Cheng et al., arXiv 1601.06733"),
    "gpt2": (2019, "Radford et al., Language Models are Unsupervised Multitask Learners"),
    "bert": (2018, "Devlin et al., arXiv 1810.04805"),
    "roberta": (2019, "Liu et al., arXiv 1907.11692"),
    "t5": (2020, "Raffel et al., arXiv 1910.10683"),
    "llama": (2023, "Touvron et al., arXiv 2302.13971"),
    "linear_rnn": (2024, "Dao and Gu, arXiv 2405.21060"),
    "gpt": (2025, "rotary, QK-norm, squared ReLU, Muon: see lm/models/gpt.py"),
}


def papers() -> dict[str, tuple[int, str]]:
    """Return the year and the paper of each point."""
    return PAPERS


def get_config() -> ConfigDict:
    """Return what all points share; the model is each point's own."""
    config = ConfigDict()
    config.data = ConfigDict({
        "source": "python_docs",
        "tokenizer": "sentencepiece",
        "vocab_size": 2048,
        "batch_size": 32,
    })  # fmt: skip
    config.task = ConfigDict({"name": "causal_lm", "length": 128})
    config.model = ConfigDict({"name": "gpt"})
    config.optim = ConfigDict(
        {"name": "muon", "peak_lr": 0.02, "schedule": "linear", "warmup": "2%"}
    )
    config.train = ConfigDict({"num_steps": 300, "log_every_steps": 20, "sample_tokens": 0})
    config.eval = ConfigDict({"every_steps": 0})
    config.checkpoint = ConfigDict({"every_steps": 0, "keep": 1})
    return config


def _model(name: str, **fields) -> dict:
    return {"model.name": name, **{f"model.{key}": value for key, value in fields.items()}}


def sweep() -> list[dict]:
    """Return a point for each model."""
    counted = {"task.context": 2, "train.num_steps": "1 epochs"}
    # Of 0.002, 0.005 and 0.02 the best for RoBERTa's options.
    masked = {"task.name": "masked_lm", "optim.peak_lr": 0.005}
    pairs = {
        "task.name": "seq2seq",
        "task.source_length": 64,
        "task.length": 64,
        "data.batch_size": 64,
    }
    recurrent = {"num_layers": 2, "model_dim": 200}
    small = {"num_layers": 4, "model_dim": 128, "num_heads": 4}
    trigram = {"order": 3}
    points = {
        "trigram_add_k": {**counted, **_model("ngram", smoothing="add_k", **trigram)},
        "trigram_jelinek_mercer": {**counted, **_model("ngram", smoothing="jelinek_mercer", **trigram)},
        "trigram_kneser_ney": {**counted, **_model("ngram", **trigram)},
        "elman": _model("rnn", cell="rnn", **recurrent),
        "lstm": _model("rnn", cell="lstm", **recurrent),
        "gru": _model("rnn", cell="gru", **recurrent),
        "lstm_attention": _model("rnn", cell="lstm", num_heads=4, **recurrent),
        "seq2seq": {
            **pairs,
            **_model("seq2seq", attention="none", bidirectional=False, num_layers=1, model_dim=200),
        },
        "seq2seq_attention": {
            **pairs, **_model("seq2seq", attention="additive", num_layers=1, model_dim=200),
        },
        "bert": {**masked, "task.dynamic": False, **_model("bert", **small)},
        "roberta": {**masked, **_model("bert", num_types=1, **small)},
        # Its embeddings have deviation 1, and from its biases of positions all order comes: steps relative
        # to their size, as those of its own Adafactor are.
        "t5": {
            **pairs, "optim.lr_rules": (("embed|positions", 5.0), (".*", 1.0)),
            **_model("t5", num_layers=2, model_dim=128, num_heads=4, tied=False),
        },
        "gpt2": _model(
            "gpt", positions="learned", norm="layernorm", norm_bias=True, bias=True,
            activation="gelu", qk_norm=False, **small,
        ),
        "llama": _model("gpt", activation="swiglu", qk_norm=False, tied=False, **small),
        "linear_rnn": _model("linear_rnn", **small),
        "gpt": _model("gpt", **small),
    }  # fmt: skip
    return [{"name": name, **point} for name, point in points.items()]
