"""Every form of attention against a plain reading of its paper, in float64, one token at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import models, sharding, step
from lm.config import ConfigError
from lm.models import seq2seq

VOCAB, D = 23, 8
FORMS = [
    {"cell": "lstm", "attention": "additive"},
    {"cell": "lstm", "attention": "multiplicative", "num_layers": 1, "bidirectional": False},
    {"cell": "lstm", "attention": "none", "tied": False},
    {"cell": "lstm", "attention": "additive", "input_feeding": True},
    {"cell": "gru", "attention": "multiplicative", "input_feeding": True, "num_layers": 1},
    {"cell": "rnn", "attention": "additive", "bidirectional": False},
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))


def build(**fields):
    cfg = models.config_class("seq2seq")(**{"model_dim": D, **fields})
    cfg = models.resolve(cfg, vocab_size=VOCAB, max_length=9, max_source_length=9, packed=True)
    return models.build(cfg)


@functools.cache
def made(**fields):
    """Return a model and its parameters, moved off their start."""
    model, rng = build(**fields), np.random.default_rng(0)
    params = nn.unbox(jax.jit(lambda: step.init_variables(model, jax.random.key(0)))())["params"]
    return model, jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype("f"), params)


def rows(*pairs, source_length=9, length=9):
    """Return a batch of one row that holds pairs of (source, inputs)."""
    batch = {}
    for name, size, texts in (
        ("source", source_length, [source for source, _ in pairs]),
        ("inputs", length, [inputs for _, inputs in pairs]),
    ):
        start = "source_" if name == "source" else ""
        tokens = [token for text in texts for token in text]
        segments = [number for number, text in enumerate(texts, 1) for _ in text]
        positions = [place for text in texts for place in range(len(text))]
        for key, values in ((name, tokens), ("segments", segments), ("positions", positions)):
            key = key if key == name else start + key
            batch[key] = np.array([values + [0] * (size - len(values))], np.int32)
    return batch


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, batch):
    return model.apply({"params": params}, batch)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def cell_step(cell, layer, x, state):
    """Return the next state, written out from the cells' papers."""
    kernel, recurrent, bias = (layer[k] for k in ("kernel", "recurrent", "bias"))
    a, b = np.einsum("d,dgh->gh", x, kernel), np.einsum("d,dgh->gh", state[0], recurrent)
    if cell == "rnn":
        return (np.tanh(a[0] + b[0] + bias[0]),)
    if cell == "gru":
        r, z = sigmoid(a[1] + b[0] + bias[1]), sigmoid(a[2] + b[1] + bias[2])
        n = np.tanh(a[0] + bias[0] + r * (b[2] + bias[3]))
        return ((1 - z) * n + z * state[0],)
    i, f, u, o = a + b + bias
    c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(u)
    return sigmoid(o) * np.tanh(c), c


def reference(cfg, params, source, inputs):
    """Return the features [L, D] of one pair."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    table, num_states = params["embed"]["embedding"], 2 if cfg.cell == "lstm" else 1
    zeros = (np.zeros(D),) * num_states
    x, finals = [table[token] for token in source], []
    for n in range(cfg.num_layers):
        ways, ends = [], []
        for name in (f"layer_{n}", f"layer_{n}_backward")[: 2 if cfg.bidirectional else 1]:
            state, out = zeros, []
            for token in x[::-1] if name.endswith("backward") else x:
                state = cell_step(cfg.cell, params["encoder"][name], token, state)
                out.append(state[0])
            ways.append(out[::-1] if name.endswith("backward") else out)
            ends.append(state)
        x = [np.concatenate(both) for both in zip(*ways, strict=True)]
        finals += [np.concatenate(both) for both in zip(*ends, strict=True)]
    bridges = [params[f"bridges_{i}"] for i in range(len(finals))]
    flat = [np.tanh(s @ b["kernel"] + b["bias"]) for s, b in zip(finals, bridges, strict=True)]
    states = [tuple(flat[i : i + num_states]) for i in range(0, len(flat), num_states)]
    memory, fed, features = np.array(x), np.zeros(D), []
    decoder = params["decoder"]
    for token in inputs:
        h = np.concatenate([table[token], fed]) if cfg.input_feeding else table[token]
        for n in range(cfg.num_layers):
            states[n] = cell_step(cfg.cell, decoder["recurrent"][f"layer_{n}"], h, states[n])
            h = states[n][0]
        if cfg.attention != "none":
            attend, keys = decoder["attend"], memory @ params["keys"]["kernel"]
            if cfg.attention == "additive":
                hidden = np.tanh(h @ attend["query"]["kernel"] + keys)
                scores = (hidden @ attend["score"])[:, 0]
            else:
                scores = keys @ h
            weights = np.exp(scores) / np.exp(scores).sum()
            h = np.tanh(np.concatenate([weights @ memory, h]) @ attend["out"]["kernel"])
            fed = h
        features.append(h)
    return np.array(features)


@forms
def test_two_pairs_in_a_row_are_each_what_the_papers_say(form):
    model, params = made(**form)
    pairs = [([3, 9, 4, 1], [2, 5, 7]), ([8, 6, 11], [2, 12, 13, 14])]
    found = run(model, params, rows(*pairs))[0]
    at = 0
    for source, inputs in pairs:
        expected = reference(model.cfg, params, source, inputs)
        np.testing.assert_allclose(found[at : at + len(inputs)], expected, atol=2e-5)
        at += len(inputs)


@forms
def test_every_form_decodes_as_the_full_pass(form):
    model, params = made(**form)
    source, inputs = [3, 9, 4, 1], [2, 5, 7, 10, 6]
    full = run(model, params, rows((source, inputs)))[0]
    prompt = rows((source, inputs[:2]))
    decode = jax.jit(functools.partial(model.apply, decode=True, mutable=["cache"]))
    x, new = decode({"params": params}, prompt)
    np.testing.assert_allclose(x[0, :2], full[:2], atol=1e-5)
    for place in range(2, 5):
        one = {"inputs": [[inputs[place]]], "segments": [[1]], "positions": [[place]]}
        one = jax.tree.map(jnp.asarray, one, is_leaf=lambda leaf: isinstance(leaf, list))
        x, new = decode({"params": params, "cache": new["cache"]}, one)
        np.testing.assert_allclose(x[0, 0], full[place], atol=1e-5)


@pytest.mark.parametrize("feeding", [False, True], ids=["plain", "feeding"])
def test_in_bfloat16_decoding_keeps_the_state_that_the_loop_has(feeding):
    """A GRU that forgets little adds less at each token than bfloat16 tells apart."""
    model, params = made(
        cell="gru", attention="none", num_layers=1, bidirectional=False, dtype="bfloat16"
    )
    if feeding:
        model, params = made(cell="gru", num_layers=1, input_feeding=True, dtype="bfloat16")
    layer = params["decoder"]["recurrent"]["layer_0"]
    layer = {**layer, "bias": layer["bias"].at[2].set(6.0)}  # of the update gate
    params = {**params, "decoder": {**params["decoder"], "recurrent": {"layer_0": layer}}}
    inputs = [2, 5, 7, 10] * 16
    decode = jax.jit(functools.partial(model.apply, decode=True, mutable=["cache"]))
    _, whole = decode({"params": params}, rows(([3, 9, 4, 1], inputs), length=64))
    _, new = decode({"params": params}, rows(([3, 9, 4, 1], inputs[:1]), length=1))
    for token in inputs[1:]:
        one = {"inputs": [[token]], "segments": [[1]], "positions": [[1]]}
        one = jax.tree.map(jnp.asarray, one, is_leaf=lambda leaf: isinstance(leaf, list))
        _, new = decode({"params": params, "cache": new["cache"]}, one)
    (one_by_one,), (at_once,) = (
        jax.tree.leaves(cache["cache"]["context"][0].states) for cache in (new, whole)
    )
    assert one_by_one.dtype == np.float32
    np.testing.assert_allclose(one_by_one, at_once, atol=2e-4)
    assert (at_once != at_once.astype(jnp.bfloat16)).any()


@pytest.mark.parametrize("feeding", [False, True], ids=["plain", "feeding"])
def test_dropout_is_of_training_alone_and_draws_anew_at_each_position(feeding):
    model, params = made(cell="lstm", attention="additive", input_feeding=feeding, dropout=0.5)
    batch = rows(([3, 9, 4, 1], [2] * 9))

    @jax.jit
    def train(key):
        rngs = {"dropout": jax.random.key(key)}
        return model.apply({"params": params}, batch, train=True, rngs=rngs)[0]

    np.testing.assert_array_equal(train(0), train(0))
    assert not np.array_equal(train(0), train(1))
    dropped = np.asarray(train(0) == 0)
    assert 0.3 < dropped.mean() < 0.7
    assert (dropped != dropped[:1]).any()
    plain, _ = made(cell="lstm", attention="additive", input_feeding=feeding)
    np.testing.assert_array_equal(run(model, params, batch), run(plain, params, batch))


def test_what_does_not_go_together_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.input_feeding=True.*model\.attention"):
        build(attention="none", input_feeding=True)
    with pytest.raises(ConfigError, match=r"model\.attention='luong'.*additive"):
        build(attention="luong")
    with pytest.raises(ConfigError, match=r"model\.dropout=1"):
        build(dropout=1.0)


@forms
def test_flops_count_every_matrix_product(form):
    """Of matrices by their shapes, each for every token of its side; of attention's pairs by hand."""
    model, params = made(**form)
    cfg, length = dataclasses.replace(model.cfg, max_source_length=5), 10
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = {sharding.path_name(path): leaf.size for path, leaf in leaves}
    sizes = {name: size for name, size in sizes.items() if not name.endswith(("bias", "score"))}
    head = sizes["embed/embedding" if cfg.tied else "head/kernel"]
    target = head + sum(size for name, size in sizes.items() if name.startswith("decoder/"))
    source = sum(size for name, size in sizes.items() if name.startswith(("encoder/", "keys/")))
    E = D * (2 if cfg.bidirectional else 1)
    pair = {"none": 0, "multiplicative": D + E, "additive": 2 * D + E}[cfg.attention]
    assert seq2seq.flops_per_token(cfg, length) == 6 * (target + source * 5 / 10 + pair * 5)


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_in_bfloat16_scores_are_not_rounded(kind):
    """Of size 8 to 32, where bfloat16 has steps of 1/16 to 1/8: weights would be as far off."""
    D = 512
    module = seq2seq.Attend(
        dataclasses.replace(build(attention=kind).cfg, model_dim=D), jnp.bfloat16
    )
    rng = np.random.default_rng(0)
    h, keys = (jnp.asarray(rng.normal(size=(1, n, D)), jnp.bfloat16) for n in (1, 64))
    h = h * 0.25 + 0.02 * keys[:, :1]
    ones = jnp.ones((1, 1), jnp.int32), jnp.ones((1, 64), jnp.int32)
    source = jnp.asarray(np.eye(64)[None] / 4, jnp.bfloat16)
    given = h, ones[0], keys, source, ones[1]
    params = nn.unbox(module.init(jax.random.key(0), *given))["params"]
    out = np.zeros(params["out"]["kernel"].shape, np.float32)
    out[:64, :64] = np.eye(64)  # what comes out is tanh of a quarter of the weights
    params = {**params, "out": {"kernel": jnp.asarray(out)}}
    if kind == "additive":
        params["query"] = {"kernel": jnp.eye(D)}
        params["score"] = params["score"].at[:].set(0.25)
        scores = np.tanh((h[:, :, None] + keys[:, None]).astype("f")).astype(jnp.bfloat16)
        scores = (np.float64(scores) * 0.25).sum(-1)[0, 0]
    else:
        scores = (np.float64(h.astype("f"))[0] @ np.float64(keys.astype("f"))[0].T)[0]
    assert np.abs(scores).max() > 8
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    found = module.apply({"params": params}, *given)[0, 0, :64].astype("f")
    found = 4 * np.arctanh(np.float64(found))
    seen = weights > 1e-3
    assert seen.sum() > 2
    np.testing.assert_allclose(found[seen], weights[seen], rtol=0.015)
