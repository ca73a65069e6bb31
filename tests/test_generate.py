import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import models
from lm.config import ConfigError
from lm.generate import context_start, generate, sample
from lm.models.gpt import Config as Gpt
from lm.models.rnn import Config as Rnn
from lm.nn.embed import MASKED_LOGIT

V, LIMIT = 50, 12
TIE = 1e-5  # where the two best logits lie this near, either is right
GPT = {"num_layers": 2, "model_dim": 16, "num_heads": 4, "vocab_size": V, "max_length": LIMIT}
RNN = {"num_layers": 1, "model_dim": 16, "vocab_size": V, "max_length": LIMIT}
CONFIGS = {
    "rotary-groups": Gpt(**GPT, num_kv_heads=2, tied=False),
    "learned": Gpt(**GPT, positions="learned", norm="layernorm", bias=True, mask="segments"),
    "window-scan": Gpt(**GPT, window=4, tied=False, scan=True, remat="full"),
    "lstm-attention": Rnn(**RNN, cell="lstm", num_heads=2, mask="segments"),
    "gru": Rnn(**RNN, cell="gru", embed_dim=8),
    "rnn": Rnn(**RNN, cell="rnn"),
}
# One is short, one near the limit of positions, one beyond it.
PROMPTS = [np.random.default_rng(length).integers(0, V, length).tolist() for length in (2, 10, 15)]


@functools.cache
def trained(name):
    """Return (model, parameters by which the context, more than the last token, counts)."""
    model = models.build(CONFIGS[name])
    row = {key: jnp.zeros((1, LIMIT), int) for key in ("inputs", "segments", "positions")}

    def init():
        return model.init(jax.random.key(0), row, method=lambda m, batch: m.logits(m(batch)))

    rng = np.random.default_rng(1)
    sizes = {"bias": 0.1, "position": 0.2, "embed": 0.2, "mlp": 0.2, "scale": 2.0}
    sizes = sizes if isinstance(model.cfg, Gpt) else {}

    def draw(path, leaf):
        size = next((sizes[word] for word in sizes if word in jax.tree_util.keystr(path)), 0.8)
        return rng.normal(0, size, leaf.shape).astype(np.float32)

    return model, jax.tree.map_with_path(draw, nn.unbox(jax.eval_shape(init))["params"])


def logits_of(model, params, contexts):
    """Return logits [rows, V] after each context, by plain forward passes without a cache."""
    lengths = np.array([len(context) for context in contexts])
    shape = len(contexts), max(lengths)
    batch = {key: np.zeros(shape, np.int32) for key in ("inputs", "segments", "positions")}
    for row, context in enumerate(contexts):
        batch["inputs"][row, : len(context)] = context
        batch["segments"][row, : len(context)] = 1
        batch["positions"][row, : len(context)] = np.arange(len(context))

    @jax.jit
    def last(params, batch):
        x_BLD = model.apply({"params": params}, batch)
        x_B1D = jnp.take_along_axis(x_BLD, lengths[:, None, None] - 1, axis=1)
        return model.apply({"params": params}, x_B1D, method="logits")[:, 0]

    return np.asarray(last(params, batch))


def greedy(name, prompts=PROMPTS, max_tokens=30, **options):
    model, params = trained(name)
    return generate(model, params, prompts, max_tokens=max_tokens, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cached_continuation_equals_the_uncached_one(name):
    """Token for token, for prompts of different lengths in a batch, over several contexts."""
    model, params = trained(name)
    limit = model.max_context
    assert limit == (LIMIT if isinstance(model.cfg, Gpt) else 0)
    made = greedy(name)
    contexts, chosen = [], []
    for prompt, tokens in zip(PROMPTS, made, strict=True):
        assert len(tokens) == 30
        for count, token in enumerate(tokens):
            so_far = [*prompt, *tokens[:count]]
            contexts.append(so_far[context_start(len(so_far), len(prompt), limit) :])
            chosen.append(token)
    assert len(set(chosen)) > 8, "not the same token all along"
    logits = logits_of(model, params, contexts)
    short = logits.max(-1) - logits[np.arange(len(chosen)), chosen]
    assert short.max() <= TIE, f"{np.flatnonzero(short > TIE)} of {len(chosen)} differ"


@pytest.mark.parametrize("name", ["rotary-groups", "lstm-attention"])
def test_a_prompt_alone_is_continued_as_in_a_batch(name):
    together = greedy(name)
    assert [greedy(name, [prompt])[0] for prompt in PROMPTS] == together


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("count", [5, 16])
def test_as_many_tokens_a_call_as_an_accelerator_makes_are_the_same(name, count, monkeypatch):
    one = greedy(name)
    module = sys.modules[generate.__module__]
    assert module.tokens_per_call() == 1
    monkeypatch.setattr(module, "tokens_per_call", lambda: count)
    assert greedy(name) == one


@pytest.mark.parametrize("limit", range(10))
def test_the_context_is_never_empty_nor_longer_than_the_positions(limit):
    for prompt_length in range(1, 25):
        before = 0
        for length in range(prompt_length, prompt_length + 30):
            start = context_start(length, prompt_length, limit)
            assert before <= start < length
            if limit:
                assert length - start <= limit
                moved = length > prompt_length and start != before
                assert moved == (length > prompt_length and length - before > limit)
            assert start == 0 or length > limit > 0
            before = start


def test_max_tokens_cuts_and_none_makes_none():
    whole = greedy("learned")
    for count in (0, 1, 16, 17):
        assert greedy("learned", max_tokens=count) == [tokens[:count] for tokens in whole]


def test_a_row_ends_before_the_first_stop_token_and_the_others_go_on():
    whole, heard = greedy("learned"), {}
    stops = (whole[1][9], whole[1][7])
    ends = [[i for i, token in enumerate(row) if token in stops] for row in whole]
    expected = [row[: end[0]] if end else row for row, end in zip(whole, ends, strict=True)]
    assert max(map(len, expected)) > len(expected[1])

    def hear(row, new):
        assert new
        heard.setdefault(row, []).extend(new)

    assert greedy("learned", stop_tokens=stops, on_tokens=hear) == expected
    assert heard == {row: tokens for row, tokens in enumerate(expected) if tokens}


SAMPLING = {"temperature": 1.5, "top_k": 20, "top_p": 0.95}


def test_samples_repeat_by_seed_and_differ_by_seed_and_row():
    prompts = [PROMPTS[0]] * 3
    first = greedy("learned", prompts, seed=3, **SAMPLING)
    assert greedy("learned", prompts, seed=3, **SAMPLING) == first
    other = greedy("learned", prompts, seed=4, **SAMPLING)
    assert len({tuple(row) for row in first + other}) == 6


def test_a_sample_is_independent_of_the_other_rows():
    first = greedy("learned", seed=3, **SAMPLING)
    changed = [PROMPTS[2][:4], PROMPTS[1], PROMPTS[0]]
    assert greedy("learned", changed, seed=3, **SAMPLING)[1] == first[1]


PROBABILITIES = np.array([0.02, 0.4, 0.1, 0.2, 0.01, 0.15, 0.08, 0.04])


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def draw(logits_BV, counts_B, seed=0, **options):
    return sample(logits_BV, counts_B, key=jax.random.key(seed), **options)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 8),
        ({"temperature": 2.0}, 8),
        ({"top_k": 3}, 3),
        ({"top_k": 100}, 8),
        ({"top_p": 0.7}, 3),  # 0.4 + 0.2 are not enough
        ({"top_p": 1e-6}, 1),
        ({"top_k": 4, "top_p": 0.8}, 3),  # of what the four have: 0.75 / 0.85
    ],
    ids=str,
)
def test_frequencies_are_those_of_exactly_the_right_set(options, kept):
    count = 20_000
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    logits = np.tile(np.log(PROBABILITIES).astype(np.float32), (count, 1))
    tokens = draw(logits, np.zeros(count, np.int32), **options)
    assert tokens.dtype == jnp.int32
    found = np.bincount(tokens, minlength=len(PROBABILITIES))
    best = np.argsort(-PROBABILITIES)[:kept]
    assert set(np.flatnonzero(found)) == set(best)
    expected = PROBABILITIES[best] ** (1 / options["temperature"])
    expected *= count / expected.sum()
    chi_square = ((found[best] - expected) ** 2 / expected).sum()
    freedom = kept - 1
    assert chi_square <= freedom + 5 * (2 * freedom) ** 0.5


def test_the_best_alone_and_temperature_zero_are_greedy():
    logits = np.random.default_rng(0).normal(size=(40, V)).astype(np.float32)
    counts = np.arange(40)
    best = logits.argmax(-1)
    np.testing.assert_array_equal(draw(logits, counts, temperature=9.0, top_k=1, top_p=1.0), best)
    np.testing.assert_array_equal(draw(logits, counts, temperature=0.0, top_k=7, top_p=0.5), best)


@pytest.mark.parametrize("options", [{"top_k": 0, "top_p": 1.0}, {"top_k": 4, "top_p": 0.999}])
def test_no_temperature_reaches_what_is_masked_nor_overflows(options):
    logits = jnp.array([[1.0, 3.0, 2.0, MASKED_LOGIT, MASKED_LOGIT]] * 200)
    draw = functools.partial(sample, logits, jnp.arange(200), key=jax.random.key(0), **options)
    assert set(np.asarray(draw(temperature=1e9)).tolist()) == {0, 1, 2}
    assert set(np.asarray(draw(temperature=1e-40)).tolist()) == {1}


def test_the_randomness_is_of_seed_row_and_count():
    logits, options = np.zeros((6, 100), np.float32), {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    first = np.asarray(draw(logits, np.array([0, 0, 0, 1, 2, 3]), 7, **options))
    assert len(set(first)) > 3
    again = np.asarray(draw(logits, np.array([0, 5, 0, 5, 2, 5]), 7, **options))
    np.testing.assert_array_equal(again[[0, 2, 4]], first[[0, 2, 4]])
    assert (again[[1, 3, 5]] != first[[1, 3, 5]]).any()


def test_nothing_is_compiled_again_for_another_prompt_or_seed(caplog):
    """A prompt is padded to a power of two, and a seed is an argument."""
    model, params = trained("gru")

    def compiled(length, seed):
        caplog.clear()
        with jax.log_compiles():
            generate(model, params, [[1] * length], max_tokens=16, temperature=0.7, seed=seed)
        return len(re.findall(r"Compiling \S*(?:_prefill|_write)\b", caplog.text))

    assert compiled(3, 0) == 2
    assert [compiled(length, seed) for length, seed in ((3, 1), (4, 0), (9, 2), (16, 0))] == [0] * 4
    assert compiled(17, 0) > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompts": []}, "prompt"),
        ({"prompts": [[1], []]}, "prompt"),
        ({"prompts": [[1, V]]}, f"prompt: {V}"),
        ({"prompts": [[-1]]}, "prompt: -1"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ],
    ids=str,
)
def test_a_bad_argument_is_an_error_that_names_it(options, named):
    with pytest.raises(ConfigError, match=named):
        greedy("rnn", **{"prompts": PROMPTS, **options})
