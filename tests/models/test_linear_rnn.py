import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lm import models, placement, sharding, step
from lm.config import ConfigError
from lm.generate import generate
from lm.models import linear_rnn
from lm.nn.transformer import UNROLLED

B, L, V, D = 4, 12, 50, 16
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 0, 0]], np.int32)


def build(*, decode_length=0, **fields):
    sizes = {"num_layers": 2, "model_dim": D, "num_heads": 2, "key_dim": 6, "chunk": 4}
    cfg = linear_rnn.Config(**{**sizes, "vocab_size": V, "max_length": L, **fields})
    return linear_rnn.Model(cfg, decode_length=decode_length)


def batch_of(batch_size=B, length=L, seed=0):
    tokens = np.random.default_rng(seed).integers(0, V, (batch_size, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
    return {"inputs": tokens, "segments": np.ones_like(tokens), "positions": positions}


def packed_batch():
    starts = np.diff(SEGMENTS, axis=1, prepend=0) != 0
    begins = np.maximum.accumulate(np.where(starts, np.arange(L), 0), axis=1)
    positions = np.where(SEGMENTS > 0, np.arange(L) - begins, 0).astype(np.int32)
    return {**batch_of(1), "segments": SEGMENTS, "positions": positions}


def both(module, batch):
    x_BLD = module(batch)
    return x_BLD, module.logits(x_BLD)


@functools.cache
def params_of(model):
    """Return parameters large enough to matter, none of them at 0 or 1."""
    make = functools.partial(model.init, method=both)
    shapes = nn.unbox(jax.eval_shape(make, jax.random.key(0), batch_of()))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype("f"), shapes)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "decode", "mutable"))
def apply(model, variables, batch, rngs=None, **options):
    return model.apply(variables, batch, rngs=rngs, **options)


def features(model, batch, params=None):
    return np.asarray(apply(model, {"params": params or params_of(model)}, batch))


def window(batch, start, stop):
    return {name: x[:, start:stop] for name, x in batch.items()}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "cut", [pytest.param(1, marks=pytest.mark.slow), 2, 6, pytest.param(9, marks=pytest.mark.slow)]
)
def test_two_windows_with_carry_equal_one_row(cut, scan):
    """At the cut: a document's begin (8), its middle, or a window shorter than the convolution."""
    model = build(scan=scan)
    rows = [packed_batch(), *(window(batch_of(1, seed=n), 0, L) for n in (1, 2))]
    batch = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    batch["positions"][2] = np.roll(batch["positions"][2], 8)
    params = params_of(model)
    whole, last = apply(model, {"params": params, "carry": fresh(model, 3)}, batch, mutable="carry")
    carry, parts = {"carry": fresh(model, 3)}, []
    for part in (window(batch, 0, cut), window(batch, cut, L)):
        x_BLD, carry = apply(model, {"params": params, **carry}, part, mutable="carry")
        parts.append(x_BLD)
    valid = batch["segments"] > 0
    np.testing.assert_allclose(jnp.concatenate(parts, 1)[valid], whole[valid], atol=1e-5)
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    cold = features(model, window(batch, cut, L))
    assert np.abs(cold[1] - whole[1, cut:]).max() > 1e-3


def fresh(model, batch_size):
    return nn.unbox(model.init_carry(batch_size))


def test_position_zero_forgets_the_carry():
    model, batch = build(), batch_of()
    used = jax.tree.map(lambda x: x + 1.0, fresh(model, B))
    warm = apply(model, {"params": params_of(model), "carry": used}, batch)
    np.testing.assert_array_equal(warm, features(model, batch))


@pytest.mark.parametrize("scan", [False, True])
def test_init_carry_is_zeros_with_the_batch_first_and_axes_on_every_leaf(scan):
    model = build(scan=scan)
    boxed = model.init_carry(3)
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    assert len(leaves) == (2 if scan else 4)
    for leaf in leaves:
        assert leaf.names[0] == "act_batch" and "act_heads" in leaf.names
        assert leaf.value.shape[0] == 3 and len(leaf.names) == leaf.value.ndim
        assert leaf.value.dtype == jnp.float32 and not leaf.value.any()
    state = (3, 2, 2, 6, 8) if scan else (3, 2, 6, 8)
    assert state in [leaf.value.shape for leaf in leaves]
    made = jax.jit(lambda: model.init(jax.random.key(0), batch_of(3)))()["carry"]
    assert jax.tree.structure(made) == jax.tree.structure(boxed)


@pytest.mark.parametrize(
    "fields", [{}, {"scan": True, "remat": "full"}, {"conv_width": 1}], ids=str
)
def test_a_position_sees_its_past_within_its_document_and_nothing_else(fields):
    """By gradient: which embeddings reach which features."""
    model, batch = build(**fields), packed_batch()
    batch["inputs"] = np.arange(L, dtype=np.int32)[None]  # every position its own row of the table
    params = params_of(model)
    mixture = np.random.default_rng(2).normal(size=D).astype("f")

    def mixed(table):
        variables = {"params": {**params, "embed": {"embedding": table}}}
        return model.apply(variables, batch)[0] @ mixture

    reach = jax.jit(jax.jacrev(mixed))(params["embed"]["embedding"])
    reach = np.abs(reach[:, :L]).sum(-1)
    seen = np.tri(L, dtype=bool) & (SEGMENTS[0][:, None] == SEGMENTS[0])
    np.testing.assert_array_equal(reach[:10] > 0, seen[:10])


@pytest.mark.parametrize("chunk", [1, 3, 12, 64])
def test_the_chunk_is_a_matter_of_speed_alone(chunk):
    expected = features(build(), packed_batch())
    ours = features(build(chunk=chunk), packed_batch(), params_of(build()))
    np.testing.assert_allclose(ours[:, :10], expected[:, :10], atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"scan": True}, {"conv_width": 1}], ids=str)
def test_decoding_step_by_step_equals_the_full_forward(fields):
    """After prompts of unequal lengths, one shorter than the convolution."""
    model, batch = build(**fields), batch_of()
    params = params_of(model)
    whole = features(model, batch)
    lengths = np.array([1, 7, 3, 5])
    prompt = window(batch, 0, 8)
    prompt["segments"] = (prompt["positions"] < lengths[:, None]).astype(np.int32)
    x_BLD, cache = apply(model, {"params": params}, prompt, decode=True, mutable="cache")
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(x_BLD[b, :length], whole[b, :length], atol=1e-5)
    for number in range(5):
        at = (lengths + number)[:, None]
        token = {
            "inputs": np.take_along_axis(batch["inputs"], at, 1),
            "segments": np.ones_like(at),
            "positions": at,
        }
        x_BLD, cache = apply(
            model, {"params": params, **cache}, token, decode=True, mutable="cache"
        )
        expected = np.take_along_axis(whole, at[:, :, None], 1)
        np.testing.assert_allclose(x_BLD, expected, atol=1e-5)


def test_the_cache_does_not_grow_with_what_was_read():
    model = build(decode_length=4096)
    shapes = {}
    for length in (2, 64):
        prompt = jax.eval_shape(lambda length=length: batch_of(1, length))
        read = functools.partial(model.apply, decode=True, mutable="cache")
        shapes[length] = jax.eval_shape(read, {"params": params_of(model)}, prompt)[1]
    assert jax.tree.map(jnp.shape, shapes[2]) == jax.tree.map(jnp.shape, shapes[64])
    assert model.max_context == 0


def test_a_prompt_starts_from_zeros_whatever_the_cache_holds():
    model, batch = build(), batch_of()
    batch["positions"] += 9  # so that only the prompt itself can reset
    params = params_of(model)
    first, cache = apply(model, {"params": params}, batch, decode=True, mutable="cache")
    again, _ = apply(model, {"params": params, **cache}, batch, decode=True, mutable="cache")
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("scan", [False, True])
def test_greedy_generation_equals_the_uncached_model(scan):
    model = build(scan=scan)
    params = params_of(model)
    prompts = [[3], [7, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7]]
    made = generate(model, params, prompts, max_tokens=8)
    for prompt, new in zip(prompts, made, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            row = np.zeros((1, 17), np.int32)
            row[0, : len(tokens)] = tokens
            positions = np.arange(17, dtype=np.int32)[None]
            segments = (positions < len(tokens)).astype(np.int32)
            x_BLD = features(model, {"inputs": row, "segments": segments, "positions": positions})
            logits = model.apply({"params": params}, jnp.asarray(x_BLD), method="logits")
            tokens.append(int(logits[0, len(tokens) - 1].argmax()))
        assert new == tokens[len(prompt) :]
    assert len({tuple(new) for new in made}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)])
def test_every_mesh_equals_one_device(sizes):
    """Loss, every gradient and the carry, of scanned layers; the vocabulary and the layer count are odd."""
    model = build(num_layers=3, model_dim=64, num_heads=8, key_dim=0, scan=True)
    batch = batch_of(16)
    batch["targets"] = np.roll(batch["inputs"], -1, axis=1)
    batch["weights"] = np.random.default_rng(4).integers(0, 2, (16, L)).astype("f")
    expected = train_step_on(sharding.make_mesh(sharding.Config(), jax.devices()[:1]), model, batch)
    ours = train_step_on(sharding.make_mesh(sharding.Config(*sizes)), model, batch)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def train_step_on(mesh, model, batch):
    """Return (loss, gradient norm, gradients, carry) of the first step on a mesh."""
    tx = optax.trace(0.9)  # its state is the gradients
    with sharding.use(mesh):
        init = step.make_init(model, tx, seed=0, shape=(9, 16, L), average=False, stateful=True)
        axes, _ = step.parameter_axes(model)
        placed = step.state_shardings(mesh, jax.eval_shape(init), axes)
        function = functools.partial(
            step.train_step, model=model, tx=tx, seed=0,
            objective=step.Objective(max_scored=L, vocab_size=V),
        )  # fmt: skip
        state = jax.jit(init, out_shardings=placed)()
        state, sums = jax.jit(function, out_shardings=(placed, None))(
            state, placement.place_batch(mesh, batch)
        )
        return jax.device_get(
            (sums["loss"][0], sums["grad_norm"][0], state.opt_state.trace, state.carry)
        )


def test_a_tensor_mesh_splits_every_kernel_of_a_block():
    model = build(num_heads=8, model_dim=64, key_dim=0)
    axes, shapes = step.parameter_axes(model)
    placed = sharding.shardings(sharding.make_mesh(sharding.Config(tensor=8)), axes, shapes)
    for (path, place), leaf in zip(
        jax.tree_util.tree_leaves_with_path(placed), jax.tree.leaves(shapes), strict=True
    ):
        if sharding.path_name(path).endswith("kernel"):
            assert np.prod(place.shard_shape(leaf.shape)) * 8 == leaf.size, path


@pytest.mark.parametrize("fields", [{}, {"tied": False, "scan": True, "activation": "swiglu"}])
def test_every_parameter_is_float32_and_names_its_axes(fields):
    model = build(**fields)
    axes, shapes = step.parameter_axes(model)
    assert ("head" in axes) == (not model.cfg.tied)
    names_of = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for names, leaf in zip(names_of, jax.tree.leaves(shapes), strict=True):
        assert leaf.dtype == jnp.float32 and len(names) == len(leaf.shape)
        assert set(names) <= set(sharding.RULES), names


def test_bfloat16_gives_bfloat16_features_and_a_float32_state():
    model, batch = build(dtype="bfloat16"), batch_of()
    params = params_of(build())
    x_BLD, new = apply(model, {"params": params, "carry": fresh(model, B)}, batch, mutable="carry")
    logits = model.apply({"params": params}, x_BLD, method="logits")
    assert x_BLD.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert (logits[..., V:] <= -1e9).all()
    states = new["carry"]["layers"][UNROLLED.format(0)]["recurrence"]["state"]
    assert states.dtype == jnp.float32
    exact = features(build(), batch)
    assert 0 < np.abs(x_BLD.astype(jnp.float32) - exact).max() < 0.1 * np.abs(exact).max()


def test_dropout_acts_in_training_only():
    model, batch = build(dropout=0.5), batch_of()
    params = params_of(model)

    def run(key, train):
        rngs = {"dropout": jax.random.key(key)}
        return apply(model, {"params": params}, batch, rngs, train=train)

    np.testing.assert_array_equal(run(0, False), run(1, False))
    np.testing.assert_array_equal(run(0, True), run(0, True))
    assert not np.allclose(run(0, True), run(1, True))


def test_flops_count_every_matrix_product():
    """The matrices by their shapes, the recurrence by hand: chunk 4, K 6, P 8, 2 heads, 2 layers."""
    for fields in ({}, {"tied": False}, {"activation": "swiglu", "head_dim": 8}):
        model = build(**fields)
        _, shapes = step.parameter_axes(model)
        skipped = ("bias", "scale", "convolution") + (() if model.cfg.tied else ("embedding",))
        matrices = sum(
            leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
            if not any(word in sharding.path_name(path) for word in skipped)
        )
        recurrence = 2 * 2 * (4 * (6 + 8) + 2 * 6 * 8)
        assert linear_rnn.flops_per_token(model.cfg, L) == 6 * (matrices + recurrence)


def test_the_folder_finds_the_family_and_sizes_are_derived():
    cfg = models.resolve(linear_rnn.Config(), vocab_size=V, max_length=L, packed=True)
    assert (cfg.vocab_size, cfg.max_length) == (V, L)
    assert cfg.sizes == {"head_dim": 64, "key_dim": 64, "mlp_dim": 3072}
    given = build(head_dim=5, key_dim=7, mlp_dim=9).cfg
    assert given.sizes == {"head_dim": 5, "key_dim": 7, "mlp_dim": 9}
    assert isinstance(models.build(cfg), linear_rnn.Model)
    assert linear_rnn.Model.accepts == {"causal", "packed", "carry"}


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 0},
        {"model_dim": 0},
        {"num_heads": 0},
        {"num_heads": 5},
        {"head_dim": -1},
        {"key_dim": -1},
        {"conv_width": 0},
        {"chunk": 0},
        {"mlp_dim": -1},
        {"activation": "relu"},
        {"dropout": 1.0},
        {"remat": "all"},
        {"dtype": "f32"},
    ],
    ids=str,
)
def test_a_wrong_value_is_an_error_of_one_line_that_names_the_field(fields):
    ((field, value),) = fields.items()
    with pytest.raises(ConfigError) as error:
        build(**fields)
    assert f"model.{field}={value!r}" in str(error.value) and "\n" not in str(error.value)
