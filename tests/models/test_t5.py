import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lm import models, muon, placement, sharding, step
from lm.config import ConfigError
from lm.models import t5
from lm.nn.transformer import SCANNED

B, L, S, V, D = 2, 9, 11, 50, 16
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
SOURCES = np.array([[1, 1, 2, 2, 2, 2, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]], np.int32)
V1_1 = {"activation": "geglu", "tied": False}


def build(decode_length=0, **fields):
    sizes = {"num_layers": 2, "model_dim": D, "num_heads": 2, "head_dim": 6, "vocab_size": V}
    buckets = {"num_buckets": 8, "max_distance": 10}
    return t5.Model(t5.Config(**{**sizes, **buckets, **fields}), decode_length=decode_length)


def restarting(segments):
    """Positions that begin again with each segment."""
    positions = np.tile(np.arange(segments.shape[1], dtype=np.int32), (len(segments), 1))
    starts = np.diff(segments, axis=1, prepend=0) != 0
    return positions - np.maximum.accumulate(np.where(starts, positions, 0), axis=1)


def batch_of(segments=SEGMENTS, sources=SOURCES):
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.permutation(V)[: L + S] for _ in range(B)]).astype(np.int32)
    return {
        "inputs": tokens[:, :L],
        "segments": segments,
        "positions": restarting(segments),
        "source": tokens[:, L:],
        "source_segments": sources,
        "source_positions": restarting(sources),
    }


def both(module, batch):
    x_BLD = module(batch)
    return x_BLD, module.logits(x_BLD)


@functools.cache
def params_of(model):
    """Return parameters large enough to matter, none of them at 0 or 1."""
    shapes = nn.unbox(jax.eval_shape(lambda: step.init_variables(model, jax.random.key(0))))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(np.float32), shapes["params"]
    )


@functools.cache
def compiled(model):
    """Return the jitted (params, batch) -> (features, logits)."""
    return jax.jit(lambda params, batch: model.apply({"params": params}, batch, method=both))


def features(model, batch, params=None):
    return np.asarray(compiled(model)(params_of(model) if params is None else params, batch)[0])


def reach(model, batch, names, method=None):
    """Return which embeddings of the row's tokens reach which features, by gradient: [L, tokens]."""
    params = params_of(model)
    tokens = np.concatenate([batch[name][0] for name in names])
    mixture = np.random.default_rng(2).normal(size=(D,)).astype(np.float32)

    def mixed(vectors):
        table = jnp.asarray(params["embed"]["embedding"]).at[tokens].set(vectors)
        given = {"params": {**params, "embed": {"embedding": table}}}
        return model.apply(given, batch, method=method)[0] @ mixture

    slopes = jax.jit(jax.jacrev(mixed))(params["embed"]["embedding"][tokens])
    return np.abs(slopes).sum(-1) > 0


@pytest.mark.parametrize("fields", [{}, {**V1_1, "scan": True}], ids=["v1.0", "v1.1-scan"])
def test_a_position_sees_its_past_and_all_of_its_own_source_and_nothing_else(fields):
    batch = {name: x[:1] for name, x in batch_of().items()}
    seen = reach(build(**fields), batch, ("inputs", "source"))
    real = SEGMENTS[0] > 0
    past = np.arange(L)[:, None] >= np.arange(L)
    own = past & (SEGMENTS[0][:, None] == SEGMENTS[0])
    source = SEGMENTS[0][:, None] == SOURCES[0]
    np.testing.assert_array_equal(seen[real], np.concatenate([own, source], axis=1)[real])


def test_a_position_of_the_source_sees_all_of_its_segment_and_nothing_else():
    batch = {name: x[:1] for name, x in batch_of().items()}
    seen = reach(build(num_layers=1), batch, ("source",), method="encode")
    real = SOURCES[0] > 0
    same = SOURCES[0][:, None] == SOURCES[0]
    np.testing.assert_array_equal(seen[real], same[real])


def test_the_first_position_of_a_long_source_sees_the_last():
    """Where a causal model would attend in blocks of queries."""
    model = build(num_layers=1)
    row = np.arange(300, dtype=np.int32)[None]
    batch = {"source": row % V, "source_segments": np.ones_like(row), "source_positions": row}
    other = {**batch, "source": np.where(row == 299, 7, batch["source"])}
    encode = jax.jit(lambda b: model.apply({"params": params_of(model)}, b, method="encode"))
    assert np.abs(encode(other) - encode(batch))[0, 0].max() > 1e-4


def test_positions_are_relative():
    model, batch = build(), batch_of()
    moved = {**batch, "positions": batch["positions"] + 5}
    moved["source_positions"] = batch["source_positions"] + 3
    np.testing.assert_array_equal(features(model, moved), features(model, batch))
    for name in ("encoder_positions", "decoder_positions"):
        params = params_of(model)
        other = {**params, name: {"bias": params[name]["bias"][::-1].copy()}}
        assert np.abs(features(model, batch, other) - features(model, batch)).max() > 0.01, name


@pytest.mark.parametrize(
    ("fields", "prompts"),
    [({}, (3, 5)), ({**V1_1, "scan": True}, (4, 1)), ({"num_decoder_layers": 1}, (1, 1))],
    ids=["v1.0", "v1.1-scan", "prompts-of-one"],
)
def test_decoding_with_a_cache_equals_the_whole_row(fields, prompts):
    """Rows with sources and prompts of different lengths; the source comes with the prompt alone."""
    model, decoder = build(**fields), build(**fields, decode_length=12)
    sources = np.array([[1] * S, [1] * 4 + [0] * (S - 4)], np.int32)
    batch = batch_of(np.ones((B, L), np.int32), sources)
    params, expected = params_of(model), features(model, batch)
    prompts = np.array(prompts)

    @jax.jit
    def read(batch):
        x, new = decoder.apply({"params": params}, batch, decode=True, mutable=["cache"])
        return x, nn.unbox(new["cache"])

    @functools.partial(jax.jit, donate_argnums=0)
    def write(cache, batch):
        variables = {"params": params, "cache": cache}
        x, new = decoder.apply(variables, batch, decode=True, mutable=["cache"])
        assert jax.tree.map(jnp.shape, nn.unbox(new["cache"])) == jax.tree.map(jnp.shape, cache)
        return x, nn.unbox(new["cache"])

    width = prompts.max()
    positions = np.tile(np.arange(width, dtype=np.int32), (B, 1))
    real = positions < prompts[:, None]
    x, cache = read({
        **{name: a for name, a in batch.items() if "source" in name},
        "inputs": np.where(real, batch["inputs"][:, :width], 0),
        "segments": real.astype(np.int32),
        "positions": positions,
    })  # fmt: skip
    for b, length in enumerate(prompts):
        np.testing.assert_allclose(x[b, :length], expected[b, :length], atol=1e-5)
    for written in range(L - width):
        at = prompts + written
        x, cache = write(cache, {
            "inputs": batch["inputs"][np.arange(B), at][:, None],
            "segments": np.ones((B, 1), np.int32),
            "positions": at[:, None].astype(np.int32),
        })  # fmt: skip
        np.testing.assert_allclose(x[:, 0], expected[np.arange(B), at], atol=1e-5)


def test_a_step_without_a_prompt_before_it_is_refused():
    one = np.ones((B, 1), np.int32)
    batch = {"inputs": one, "segments": one, "positions": one}
    model = build(decode_length=4)
    with pytest.raises(ConfigError, match="batch: no source in it"):
        decode = functools.partial(model.apply, decode=True, mutable=["cache"])
        jax.eval_shape(decode, {"params": params_of(model)}, batch)


def test_the_cache_names_its_axes():
    model = build(decode_length=12, scan=True)
    _, new = jax.eval_shape(
        lambda: model.apply(
            {"params": params_of(model)}, batch_of(), decode=True, mutable=["cache"]
        )
    )
    axes = sharding.logical_axes(new["cache"])["decoder"][SCANNED]
    assert axes["cross_attention"]["key"] == ("layers", "act_batch", "act_heads", None, None)
    assert axes["cross_attention"]["segments"] == ("layers", "act_batch", None)
    shapes = nn.unbox(new["cache"])["decoder"][SCANNED]
    assert shapes["cross_attention"]["key"].shape == (2, B, 2, S, 6)
    assert shapes["attention"]["key"].shape == (2, B, 2, 12, 6)


@pytest.mark.parametrize("fields", [{}, {**V1_1, "scan": True}], ids=["v1.0", "v1.1-scan"])
def test_every_parameter_is_float32_and_names_its_axes(fields):
    axes, shapes = step.parameter_axes(build(**fields))
    for names, leaf in zip(
        jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
        jax.tree.leaves(shapes),
        strict=True,
    ):
        assert leaf.dtype == jnp.float32 and len(names) == len(leaf.shape)
        assert set(names) <= set(sharding.RULES), names


def test_muon_has_the_kernels_and_adamw_the_tables():
    axes, shapes = step.parameter_axes(build(**V1_1, num_layers=1))
    tree = muon.matrices(shapes, axes)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=muon.is_matrix)
    kernels = ["attention/qkv", "attention/out", "mlp/up", "mlp/down"]
    cross = [f"cross_attention/{name}" for name in ("query", "key_value", "out")]
    assert {sharding.path_name(path) for path, _ in leaves} == {
        *(f"encoder/block_0/{name}/kernel" for name in kernels),
        *(f"decoder/block_0/{name}/kernel" for name in kernels + cross),
    }


def test_the_head_is_the_embedding_of_scaled_features_or_its_own():
    for fields in ({}, V1_1):
        model = build(**fields)
        params = params_of(model)
        x, logits = compiled(model)(params, batch_of())
        tied = model.cfg.tied
        assert ("head" in params) == (not tied)
        matrix = params["embed"]["embedding"].T / D**0.5 if tied else params["head"]["kernel"]
        assert logits.shape == (B, L, 128) and logits.dtype == jnp.float32
        np.testing.assert_allclose(logits[..., :V], np.asarray(x) @ matrix[:, :V], atol=1e-4)
        assert (logits[..., V:] <= -1e9).all()


@pytest.mark.parametrize("fields", [{}, V1_1], ids=["v1.0", "v1.1"])
def test_initialisation_is_by_the_number_of_inputs(fields):
    """Of queries also by the head's width, for nothing scales the scores; of the embedding 1."""
    D, H, K, F = 64, 4, 24, 96
    sizes = {"model_dim": D, "num_heads": H, "head_dim": K, "mlp_dim": F, "vocab_size": 512}
    model = build(num_layers=1, num_buckets=32, max_distance=128, **sizes, **fields)
    params = nn.unbox(jax.jit(lambda: step.init_variables(model, jax.random.key(0)))())["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = sharding.path_name(path)
        parts = {"": leaf}
        if name.endswith("qkv/kernel"):
            parts = {part: leaf[:, :, i] for i, part in enumerate(("query", "key", "value"))}
        for part, array in parts.items():
            if name.endswith("scale"):
                np.testing.assert_array_equal(array, 1.0, err_msg=name)
                continue
            if "query" in (part, name.split("/")[-2]):
                std = (D * K) ** -0.5
            elif name.endswith("out/kernel"):
                std = (H * K) ** -0.5
            elif name.endswith("down/kernel"):
                std = F**-0.5
            else:
                std = 1.0 if name == "embed/embedding" else D**-0.5
            found, rel = float(np.std(array)), 5 / (2 * array.size) ** 0.5
            assert found == pytest.approx(std, rel=rel), (name, part)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 60_506_624),
        ({**V1_1, "num_layers": 8, "num_heads": 6, "mlp_dim": 1024}, 76_961_152),
    ],
    ids=["T5-small", "T5-v1.1-small"],
)
def test_published_numbers_of_parameters(fields, count):
    cfg = models.resolve(t5.Config(**fields), vocab_size=32_128, max_length=512, packed=True)
    _, shapes = step.parameter_axes(models.build(cfg))
    assert step.count_parameters(shapes) == count


def test_flops_by_hand():
    """Width 16, 2 heads of 6, feed-forward 64, 50 -> 128 tokens; rows of 10, sources of 10, then of 30."""
    encoder = 2 * (4 * 16 * 12 + 2 * 16 * 64) + 3 * 2 * 16 * 12
    decoder = 3 * (6 * 16 * 12 + 2 * 16 * 64) + 16 * 128
    pairs = 2 * 10 * 10 + 3 * (10 * 10 + 10 * 10)
    cfg = build(num_decoder_layers=3).cfg
    expected = 6 * (encoder + decoder) + 12 * 12 * pairs / 10
    assert t5.flops_per_token(cfg, 10) == pytest.approx(expected)
    long = build(num_decoder_layers=3, max_source_length=30).cfg
    pairs = 2 * 30 * 30 + 3 * (10 * 10 + 10 * 30)
    expected = 6 * (3 * encoder + decoder) + 12 * 12 * pairs / 10
    assert t5.flops_per_token(long, 10) == pytest.approx(expected)
    gated = build(**V1_1, num_layers=1, mlp_dim=40).cfg
    matrices = 4 * 16 * 12 + 2 * 16 * 12 + 6 * 16 * 12 + 2 * 3 * 16 * 40 + 16 * 128
    assert t5.flops_per_token(gated, 10) == pytest.approx(6 * matrices + 12 * 12 * 30)


def test_derived_sizes():
    assert build().cfg.sizes == {"num_decoder_layers": 2, "mlp_dim": 64}
    given = build(num_decoder_layers=3, mlp_dim=20).cfg
    assert given.sizes == {"num_decoder_layers": 3, "mlp_dim": 20}


def test_dropout_acts_in_training_only():
    model = build(dropout=0.5, num_layers=1)
    params, batch = params_of(model), batch_of()

    @functools.partial(jax.jit, static_argnames="train")
    def run(key, train):
        return model.apply({"params": params}, batch, train=train, rngs={"dropout": key})

    first, second = jax.random.key(0), jax.random.key(1)
    np.testing.assert_array_equal(run(first, True), run(first, True))
    assert not np.allclose(run(first, True), run(second, True))
    np.testing.assert_array_equal(run(first, False), run(second, False))
    plain = features(build(num_layers=1), batch, params)
    np.testing.assert_allclose(run(first, False), plain, atol=1e-6)


def test_bfloat16_gives_bfloat16_features_and_float32_logits():
    half, full = build(dtype="bfloat16"), build(dtype="float32")
    x, logits = compiled(half)(params_of(full), batch_of())
    assert x.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    exact, _ = compiled(full)(params_of(full), batch_of())
    assert 0 < np.abs(x.astype(jnp.float32) - exact).max() < 0.2


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "tanh"},
        {"remat": "all"},
        {"dtype": "float16"},
        {"num_layers": 0},
        {"num_decoder_layers": -1},
        {"model_dim": 0},
        {"num_heads": 0},
        {"head_dim": 0},
        {"mlp_dim": -1},
        {"vocab_size": -1},
        {"max_length": -1},
        {"max_source_length": -1},
        {"num_buckets": 2},
        {"num_buckets": 7},
        {"max_distance": 4},
        {"norm_epsilon": 0.0},
        {"dropout": -0.1},
    ],
    ids=str,
)
def test_a_wrong_value_is_an_error_of_one_line_that_names_the_field(fields):
    ((field, value),) = fields.items()
    with pytest.raises(ConfigError) as error:
        build(**fields)
    assert f"model.{field}={value!r}" in str(error.value) and "\n" not in str(error.value)


def random_batch(rows, length, source_length, vocab):
    rng = np.random.default_rng(0)

    def segments(width):
        return np.sort(rng.integers(0, 3, (rows, width)), axis=1)[:, ::-1].astype(np.int32)

    def tokens(width):
        return rng.integers(0, vocab, (rows, width)).astype(np.int32)

    batch = {"inputs": tokens(length), "targets": tokens(length), "segments": segments(length)}
    batch |= {"source": tokens(source_length), "source_segments": segments(source_length)}
    batch["positions"] = restarting(batch["segments"])
    batch["source_positions"] = restarting(batch["source_segments"])
    batch["weights"] = (rng.random((rows, length)) < 0.5) * (batch["segments"] > 0)
    batch["weights"] = batch["weights"].astype(np.float32)
    return batch


ROWS, LENGTH, SOURCE_LENGTH, VOCAB = 16, 16, 24, 99


def on_mesh(mesh, **fields):
    """Return (state, jitted step, batch) on a mesh, which must be in use."""
    model = build(model_dim=64, num_heads=8, head_dim=12, vocab_size=VOCAB, **fields)
    tx = optax.trace(0.9)
    init = step.make_init(model, tx, seed=0, shape=(2, ROWS, LENGTH), average=False, stateful=False)
    axes, _ = step.parameter_axes(model)
    placed = step.state_shardings(mesh, jax.eval_shape(init), axes)
    objective = step.Objective(max_scored=LENGTH, vocab_size=VOCAB)
    update = functools.partial(step.train_step, model=model, tx=tx, objective=objective, seed=0)
    state = jax.jit(init, out_shardings=placed)()
    batch = placement.place_batch(mesh, random_batch(ROWS, LENGTH, SOURCE_LENGTH, VOCAB))
    return state, jax.jit(update, out_shardings=(placed, None)), batch


def train(sizes, num_devices, **fields):
    """Return (loss, gradients) of a step on a mesh."""
    mesh = sharding.make_mesh(sharding.Config(*sizes), jax.devices()[:num_devices])
    with sharding.use(mesh):
        state, update, batch = on_mesh(mesh, **fields)
        state, sums = update(state, batch)
        return np.array(sums["loss"]), jax.device_get(state.opt_state.trace)


def test_biases_of_all_pairs_are_not_summed_over_devices():
    """Their gradient is, once a stack, as one number a head and distance."""
    mesh = sharding.make_mesh(sharding.Config(8, 1, 1))
    with sharding.use(mesh):
        state, update, batch = on_mesh(mesh)
        text = update.lower(state, batch).compile().as_text()
    found = re.findall(
        r" = (.*?) (all-[a-z]+|reduce-scatter|collective-permute)(?:-start)?\(", text
    )
    assert {kind for _, kind in found} == {"all-reduce"}
    shapes = [dims for shape, _ in found for dims in re.findall(r"\[([\d,]+)\]", shape)]
    for length in (LENGTH, SOURCE_LENGTH):
        assert not [dims for dims in shapes if dims.endswith(f"{length},{length}")]
        assert shapes.count(f"8,{2 * length}") == 1, shapes


def check_mesh(sizes, **fields):
    loss, gradients = train(sizes, 8, **fields)
    expected, expected_gradients = train((1, 1, 1), 1, **fields)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(expected_gradients),
        strict=True,
    ):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 1e-5, (sharding.path_name(path), error)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 1, 8)])  # others: test_conformance.py
def test_every_mesh_equals_one_device(sizes):
    check_mesh(sizes, num_layers=3, scan=True, **V1_1)


def test_in_decoding_the_encoder_drops_no_token_whatever_its_capacity():
    experts = {"num_experts": 4, "experts_per_token": 1, "num_layers": 1}
    tight = build(decode_length=L, capacity_factor=0.5, **experts)
    free = build(decode_length=L, **experts)
    batch = {**batch_of(), "source_segments": np.ones((B, S), np.int32)}
    batch["source_positions"] = restarting(batch["source_segments"])
    apply = functools.partial(jax.jit, static_argnums=(0, 1))(
        lambda model, decode, params: model.apply(
            {"params": params}, batch, decode=decode, mutable=["cache", "reports", "losses"]
        )[0]
    )
    made, kept = (apply(model, True, params_of(free)) for model in (tight, free))
    np.testing.assert_allclose(made, kept, atol=1e-5)
    assert np.abs(apply(tight, False, params_of(free)) - kept).max() > 1e-2, "training does drop"
