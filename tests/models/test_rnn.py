import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import models, sharding
from lm.config import ConfigError
from lm.models import rnn

CELLS = ("rnn", "gru", "lstm")
B, L, V = 4, 8, 50


def build(cell="lstm", *, decode_length=0, **fields):
    cfg = rnn.Config(cell=cell, **{"model_dim": 16, "num_layers": 2, "vocab_size": V, **fields})
    return rnn.Model(cfg, decode_length=decode_length)


def batch_of(batch_size=B, length=L, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (batch_size, length), 0, V)
    positions = jnp.tile(jnp.arange(length)[None], (batch_size, 1))
    return {"inputs": tokens, "segments": jnp.ones_like(tokens), "positions": positions}


def both(module, batch):
    return module.logits(module(batch))


@functools.cache
def init(cfg):
    """Return parameters with the attention's output and the biases moved off zero."""
    make = jax.jit(functools.partial(rnn.Model(cfg).init, method=both))
    leaves, tree = jax.tree.flatten(nn.unbox(make(jax.random.key(1), batch_of()))["params"])
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [x + 0.1 * rng.normal(size=x.shape).astype("f") for x in leaves]
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "decode", "mutable"))
def apply(model, variables, batch, rngs=None, **options):
    return model.apply(variables, batch, rngs=rngs, **options)


def window(batch, start, stop):
    return {name: x[:, start:stop] for name, x in batch.items()}


@pytest.mark.parametrize("cell", CELLS)
def test_two_windows_with_carry_equal_one_row(cell):
    model, batch = build(cell), batch_of()
    params = init(model.cfg)
    whole = apply(model, {"params": params}, batch)
    carry = {"carry": nn.unbox(model.init_carry(B))}
    parts = []
    for start in (0, L // 2):
        half = window(batch, start, start + L // 2)
        part, carry = apply(model, {"params": params, **carry}, half, mutable="carry")
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-6)
    cold = apply(model, {"params": params}, window(batch, L // 2, L))
    assert not np.allclose(cold, whole[:, L // 2 :], atol=1e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_position_zero_forgets_the_carry(cell):
    model, batch = build(cell), batch_of()
    params = init(model.cfg)
    used = jax.tree.map(lambda x: x + 1.0, nn.unbox(model.init_carry(B)))
    warm = apply(model, {"params": params, "carry": used}, batch)
    np.testing.assert_array_equal(warm, apply(model, {"params": params}, batch))


def test_init_carry_is_what_init_leaves_with_axes_on_every_leaf():
    model = build()
    boxed = model.init_carry(3)
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    assert len(leaves) == 4
    assert all(leaf.names == ("act_batch", "act_hidden") for leaf in leaves)
    assert all(leaf.value.shape == (3, 16) and not leaf.value.any() for leaf in leaves)
    made = jax.jit(lambda: model.init(jax.random.key(0), batch_of(3)))()["carry"]
    assert jax.tree.structure(made) == jax.tree.structure(boxed)
    assert not any(leaf.any() for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize(
    ("cell", "fields"),
    [("rnn", {}), ("gru", {}), ("lstm", {}), ("lstm", {"num_heads": 2, "mask": "segments"})],
)
def test_packed_rows_equal_rows_apart(cell, fields):
    model, batch = build(cell, **fields), batch_of(1)
    batch["positions"] = jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]])
    batch["segments"] = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    params = init(model.cfg)
    packed = apply(model, {"params": params}, batch)
    tokens = batch["inputs"][0]
    apart = {
        "inputs": jnp.stack([jnp.pad(tokens[:3], (0, 1)), tokens[3:7]]),
        "segments": jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "positions": jnp.array([[0, 1, 2, 0], [0, 1, 2, 3]]),
    }
    alone = apply(model, {"params": params}, apart)
    np.testing.assert_allclose(packed[0, :3], alone[0, :3], atol=1e-6)
    np.testing.assert_allclose(packed[0, 3:7], alone[1], atol=1e-6)


@pytest.mark.parametrize(("cell", "num_heads"), [("rnn", 0), ("gru", 0), ("lstm", 0), ("lstm", 2)])
def test_features_depend_on_the_past_and_only_on_it(cell, num_heads):
    model, batch = build(cell, num_heads=num_heads), batch_of(1)
    params = init(model.cfg)
    table = params["embed"]["embedding"]
    batch["inputs"] = jnp.arange(L)[None]  # every position its own row of the table

    def features(table):
        return model.apply({"params": {**params, "embed": {"embedding": table}}}, batch)[0].sum(-1)

    reach = np.abs(jax.jit(jax.jacrev(features))(table)[:, :L]).sum(-1)
    assert (reach[np.triu_indices(L, 1)] == 0).all()
    assert (reach[np.tril_indices(L)] > 0).all()


def test_dropout_acts_in_training_only():
    model, batch = build(dropout=0.5), batch_of()
    params = init(model.cfg)

    def run(key, train):
        return apply(
            model, {"params": params}, batch, {"dropout": jax.random.key(key)}, train=train
        )

    np.testing.assert_array_equal(run(0, False), run(1, False))
    assert not np.allclose(run(0, True), run(1, True))
    np.testing.assert_array_equal(run(0, True), run(0, True))
    assert (run(0, True) == 0).mean() == pytest.approx(0.5, abs=0.1)  # the features are dropped too


@pytest.mark.parametrize(("cell", "num_heads"), [("rnn", 0), ("gru", 0), ("lstm", 0), ("lstm", 2)])
def test_decoding_step_by_step_equals_the_full_forward(cell, num_heads):
    model = build(cell, num_heads=num_heads, decode_length=L)
    batch = batch_of()
    params = init(model.cfg)
    whole = apply(model, {"params": params}, batch)
    lengths = jnp.array([2, 5, 3, 4])
    prompt = window(batch, 0, 5)
    prompt["segments"] = (prompt["positions"] < lengths[:, None]).astype(int)
    features, cache = apply(model, {"params": params}, prompt, decode=True, mutable="cache")
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(features[b, :length], whole[b, :length], atol=1e-5)
    for step in range(3):
        at = (lengths + step)[:, None]
        token = {
            "inputs": jnp.take_along_axis(batch["inputs"], at, 1),
            "segments": jnp.ones_like(at),
            "positions": at,
        }
        feature, cache = apply(
            model, {"params": params, **cache}, token, decode=True, mutable="cache"
        )
        expected = jnp.take_along_axis(whole, at[:, :, None], 1)
        np.testing.assert_allclose(feature, expected, atol=1e-5)


def test_a_prompt_starts_from_zeros_whatever_the_cache_holds():
    model, batch = build(decode_length=L), batch_of()
    batch["positions"] += 1  # so that only the prompt itself can reset
    params = init(model.cfg)
    first, cache = apply(model, {"params": params}, batch, decode=True, mutable="cache")
    again, _ = apply(model, {"params": params, **cache}, batch, decode=True, mutable="cache")
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("fields", "width"),
    [
        ({}, 16),
        ({"embed_dim": 8}, 8),
        ({"tied": False, "embed_dim": 8}, 16),
        ({"num_heads": 4}, 16),
    ],
)
def test_features_logits_and_axes_of_every_head(fields, width):
    model, batch = build(**fields), batch_of()

    def features_too(module, batch):
        return module(batch), module.logits(module(batch))

    make = jax.jit(functools.partial(model.init_with_output, method=features_too))
    (features, logits), boxed = make(jax.random.key(0), batch)
    assert features.shape == (B, L, width)
    assert logits.shape == (B, L, 128) and logits.dtype == jnp.float32
    assert (logits[..., V:] <= -1e9).all() and (jnp.abs(logits[..., :V]) < 100).all()
    assert ("head" in boxed["params"]) == (not model.cfg.tied)
    axes = jax.tree.leaves(
        sharding.logical_axes(boxed["params"]), is_leaf=lambda x: isinstance(x, tuple)
    )
    assert all(axes) and all(axis in sharding.RULES for names in axes for axis in names)


def test_flops_count_every_matrix_product():
    for fields in ({}, {"embed_dim": 24}, {"tied": False}, {"num_heads": 2}, {"cell": "gru"}):
        model = build(**fields)
        make = functools.partial(model.init, method=both)
        shapes = nn.unbox(jax.eval_shape(make, jax.random.key(0), batch_of()))
        sizes = {
            jax.tree_util.keystr(k): v.size
            for k, v in jax.tree_util.tree_leaves_with_path(shapes["params"])
        }
        skipped = ("bias", "scale") if model.cfg.tied else ("bias", "scale", "embedding")
        matrices = sum(
            size for name, size in sizes.items() if not any(word in name for word in skipped)
        )
        attention = 12 * 16 * L if model.cfg.num_heads else 0
        assert rnn.flops_per_token(model.cfg, L) == 6 * matrices + attention


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "fields"), [("rnn", {}), ("gru", {}), ("lstm", {"num_heads": 2, "embed_dim": 8})]
)
def test_a_mesh_of_data_fsdp_and_tensor_equals_one_device(cell, fields):
    model, batch = build(cell, **fields), batch_of()
    params, axes = init(model.cfg), axes_of(model, batch)
    carry = nn.unbox(model.init_carry(B))
    weights = jax.random.normal(jax.random.key(7), (B, L, 128)) * (jnp.arange(128) < V)[None, None]

    def loss(params, carry, batch):
        logits, new = model.apply(
            {"params": params, "carry": carry}, batch, method=both, mutable="carry"
        )
        return (jax.nn.log_softmax(logits) * weights).sum(), new["carry"]

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = step(params, carry, batch)
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
    with sharding.use(mesh):
        placed = jax.device_put(params, sharding.shardings(mesh, axes, params))
        rows = jax.device_put((carry, batch), sharding.batch_sharding(mesh))
        ours = step(placed, *rows)
    recurrent = placed["recurrent"]["layer_0"]["recurrent"]
    assert recurrent.addressable_shards[0].data.size * 4 == recurrent.size  # fsdp x tensor
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def axes_of(model, batch):
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(1), batch, method=both))
    return sharding.logical_axes(boxed["params"])


def test_the_folder_finds_the_family_and_the_task_fills_its_sizes():
    cfg = models.resolve(rnn.Config(num_heads=2), vocab_size=V, max_length=L, packed=True)
    assert (cfg.vocab_size, cfg.max_length, cfg.mask) == (V, L, "segments")
    assert isinstance(models.build(cfg), rnn.Model)
    assert {"causal", "packed", "carry"} <= rnn.Model.accepts


@pytest.mark.parametrize(
    "fields",
    [
        {"cell": "lstmm"},
        {"num_layers": 0},
        {"dropout": 1.0},
        {"model_dim": 16, "num_heads": 3},
        {"dtype": "f32"},
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_field(fields):
    with pytest.raises(ConfigError, match=rf"model\.{list(fields)[-1]}="):
        rnn.Config(**fields)
