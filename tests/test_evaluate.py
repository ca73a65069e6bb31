"""Evaluation: the same for every batch size, padding and stream order, in bytes and in tokens."""

import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from lm import evaluate, experiment, models, sharding, step, tasks, train
from lm.config import ConfigError
from lm.data import corpus, pipeline, settings
from lm.tasks import causal_lm
from tools import evaluate as tool

LENGTH = 16
WORDS = ["the", "naïve", "café", "—", "größer", "als", "日本語", "and", "a", "cat"]


def evaluated(*args, **options):
    """Return the scores on all batches."""
    return evaluate.scores_of(evaluate.measure(*args, **options))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a function from a tokenizer to a corpus whose characters are up to three bytes."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(rng.choice(WORDS, 6)) for _ in range(150)), encoding="utf-8")

    @functools.cache
    def build(tokenizer):
        return corpus.build(settings.Config(path=(str(path),), tokenizer=tokenizer))

    return build


@functools.cache
def made(name, vocab_size):
    """Return (model, parameters, jitted eval_step)."""
    fields = {"gpt": {"num_heads": 2}, "rnn": {"cell": "gru"}}[name]
    cfg = models.config_class(name)(num_layers=1, model_dim=16, **fields)
    cfg = models.resolve(cfg, vocab_size=vocab_size, max_length=LENGTH, packed=False)
    model = models.build(cfg)
    _, shapes = step.parameter_axes(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    objective = step.Objective(max_scored=LENGTH, vocab_size=vocab_size)
    return model, params, experiment.jit_eval_step(model, objective)


def score(name, text, *, batch_size=8, streams=0, **options):
    model, params, eval_step = made(name, text.tokenizer.vocab_size)
    cfg = causal_lm.Config(length=LENGTH, isolate_documents=False)
    task = causal_lm.Task(cfg, tasks.Setting("causal", SimpleNamespace(vocab_size=1000)))
    batches = pipeline.EvalBatches(
        text.validation, task, batch_size=batch_size, streams=streams, **options
    )
    mesh = sharding.make_mesh(sharding.Config(), jax.devices()[:1])
    carry = {"carry": nn.unbox(model.init_carry(streams))} if streams else {}
    with sharding.use(mesh):
        return evaluated(
            eval_step,
            params,
            batches,
            mesh=mesh,
            token_bytes=text.tokenizer.token_bytes,
            carry=carry,
        )


def stream_losses(name, text, length):
    """Return (losses in nats, hits) of every target of the stream, from rows of `length` tokens."""
    model, params, _ = made(name, text.tokenizer.vocab_size)
    tokens = np.asarray(text.validation.tokens, np.int64)
    count = len(tokens) - 1
    inputs = np.zeros(-(-count // length) * length, np.int32)
    inputs[:count] = tokens[:-1]
    inputs = inputs.reshape(-1, length)
    positions = np.tile(np.arange(length, dtype=np.int32), (len(inputs), 1))
    batch = {"inputs": inputs, "segments": np.ones_like(inputs), "positions": positions}

    @jax.jit
    def forward(params, batch):
        both = lambda module, batch: module.logits(module(batch))  # noqa: E731
        return model.apply({"params": params}, batch, method=both)

    logits = np.asarray(forward(params, batch), np.float64).reshape(-1, 1)
    logits = logits.reshape(inputs.size, -1)[:count, : text.tokenizer.vocab_size]
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return log_z - logits[np.arange(count), tokens[1:]], logits.argmax(-1) == tokens[1:]


@pytest.mark.parametrize("name", ["gpt", "rnn"])
def test_the_scores_are_those_of_a_plain_sum_over_the_stream(name, text):
    scores = score(name, text("byte"))
    losses, hits = stream_losses(name, text("byte"), LENGTH)
    assert scores["tokens"] == len(losses) == len(text("byte").validation.tokens) - 1
    assert scores["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(hits.mean(), abs=1e-9)


def test_the_batch_size_and_the_padding_do_not_matter(text):
    def in_nats(batch_size):
        scores = score("gpt", text("byte"), batch_size=batch_size)
        # The exponential would turn the loss's absolute error into a relative one, here six times it.
        return {**scores, "perplexity": np.log(scores["perplexity"])}

    expected = in_nats(8)
    for batch_size in (5, 64):  # 64 rows are more than there are
        assert in_nats(batch_size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_bits_per_byte_are_of_the_original_bytes(text, tokenizer):
    built = text(tokenizer)
    words = built.tokenizer.decode(built.validation.tokens)
    num_bytes = len(words.encode())
    assert num_bytes > len(words) > 0
    scores = score("gpt", built)
    bits = scores["loss"] * scores["tokens"] / math.log(2)
    assert scores["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-6)
    assert scores["tokens"] == len(built.tokenizer.encode(words)) + 1  # the closing end of text


def test_max_tokens_scores_a_prefix(text):
    losses, _ = stream_losses("gpt", text("byte"), LENGTH)
    for max_tokens, scored in ((2 * LENGTH, 2 * LENGTH), (2 * LENGTH + 1, 3 * LENGTH)):
        scores = score("gpt", text("byte"), max_tokens=max_tokens)
        assert scores["tokens"] == scored
        assert scores["loss"] == pytest.approx(losses[:scored].mean(), rel=1e-6)


def test_the_state_runs_through_a_stream(text):
    """One stream in windows of 16 is the whole stream as one row."""
    built = text("byte")
    whole, _ = stream_losses("rnn", built, len(built.validation.tokens) - 1)
    assert score("rnn", built, streams=1)["loss"] == pytest.approx(whole.mean(), rel=1e-6)
    cold, _ = stream_losses("rnn", built, LENGTH)
    assert abs(whole.mean() - cold.mean()) > 1e-4, "the state matters"


def test_streams_are_the_same_for_every_batch_size(text):
    first, second = (score("rnn", text("byte"), streams=4, batch_size=size) for size in (3, 8))
    assert first == second
    assert first["tokens"] == len(text("byte").validation.tokens) - 1


def test_nothing_to_score_is_an_error(text):
    _, params, eval_step = made("gpt", text("byte").tokenizer.vocab_size)
    mesh = sharding.make_mesh(sharding.Config(), jax.devices()[:1])
    token_bytes = text("byte").tokenizer.token_bytes
    with pytest.raises(ConfigError, match="eval: no token to score"):
        evaluated(eval_step, params, [], mesh=mesh, token_bytes=token_bytes, carry={})


def test_sums_are_added_in_float64():
    """A million batches of one in float32 would stop growing at 2**24."""
    sums = {
        "loss": (jnp.float32(2.0**24), jnp.float32(2.0**24)),
        "accuracy": (jnp.float32(1.0), jnp.float32(1.0)),
        "bytes": (jnp.float32(1.0), jnp.float32(1.0)),
    }
    one = {name: (np.float32(1.0), np.float32(1.0)) for name in sums}
    parts = iter([sums, one, one])

    def eval_step(params, carry, batch, token_bytes):
        return next(parts), carry

    mesh = sharding.make_mesh(sharding.Config(), jax.devices()[:1])
    batches = [{"inputs": np.zeros((1, 1), np.int32)}] * 3
    scores = evaluated(
        eval_step, {}, batches, mesh=mesh, token_bytes=np.zeros(1, np.int32), carry={}
    )
    assert scores["tokens"] == 2**24 + 2 and scores["loss"] == 1.0


@pytest.mark.parametrize("field", ["max_tokens", "batch_size", "streams"])
def test_a_wrong_value_is_an_error_that_names_the_field(field):
    with pytest.raises(ConfigError, match=rf"eval\.{field}=-1"):
        evaluate.Config(**{field: -1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """Return the workdir of a run of 3 rows a batch, in 3 parts: no rows for 8 devices."""
    workdir = tmp_path_factory.mktemp("trained")
    rows = {"data__batch_size": 3, "train__accumulate_steps": 3}
    mesh = ConfigDict({"data": 1, "context": 8})
    train.run(tiny(**rows, mesh=mesh, train__num_steps=1, optim__warmup=0), workdir)
    return workdir


def test_a_batch_that_trains_is_no_bound_of_one_that_scores(trained, tmp_path):
    """On all devices, and with fewer rows at a time than training had parts: the same scores."""
    found = []
    rows = ["--config.mesh.data=8", "--config.mesh.context=1"]
    for flags in ([], rows, ["--config.data.batch_size=2"]):
        out = tmp_path / "scores.json"
        assert tool.main(["--workdir", str(trained), "--json", str(out), *flags]) == 0
        found.append(json.loads(out.read_text()))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("data.unknown=refuse", "fixed"),
        ("data.tokenizer=byte", "fixed"),
        ("data.user_symbols=a", "fixed"),
        ("optim.peak_lr=1", "fixed"),
        ("data.epochs=2", "used only in training"),
        ("eval.every_steps=2", "used only in training"),
        ("mesh.local_steps=2", "used only in training"),
    ],
)
def test_what_evaluation_does_not_use_is_refused(trained, capsys, field, words):
    assert tool.main(["--workdir", str(trained), f"--config.{field}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {field.partition('=')[0]}: ") and words in said


@pytest.mark.parametrize("field", ["fold", "clean", "validation_path"])
def test_another_text_is_scored_whole_however_the_runs_own_was_split(
    tiny, text_file, tmp_path, field
):
    words = text_file.read_text().split()
    path, other, out = (tmp_path / name for name in ("own.jsonl", "other.txt", "scores.json"))
    records = [{"text": " ".join(words[at : at + 20])} for at in range(0, 2000, 20)]
    path.write_text("\n".join(map(json.dumps, records)))
    other.write_text("\x07 ".join(words[:500]))  # which its cleaning would take out
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(path.read_text())
    own = {"fold": "0/5", "clean": ("control",), "validation_path": (str(held_out),)}[field]
    train.run(tiny(data__path=(str(path),), **{f"data__{field}": own}), tmp_path / "run")
    flags = ["--workdir", str(tmp_path / "run"), f"--config.data.path={other}"]
    flags += ["--config.eval.max_tokens=0", "--json", str(out)]
    assert tool.main(flags) == 0
    assert json.loads(out.read_text())["tokens"] >= len(other.read_bytes())
