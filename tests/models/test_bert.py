import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from safetensors import safe_open
from safetensors.flax import load_file

from lm import models, muon, placement, sharding, step
from lm.config import ConfigError
from lm.models import bert
from lm.nn.transformer import UNROLLED

FIXTURES = Path(__file__).parent.parent / "fixtures"
B, L, V, D = 2, 10, 50, 16
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)


def build(**fields):
    sizes = {"num_layers": 2, "model_dim": D, "num_heads": 4, "vocab_size": V, "max_length": L}
    return bert.Model(bert.Config(**{**sizes, **fields}))


def batch_of(segments=SEGMENTS):
    rng = np.random.default_rng(0)
    tokens = rng.permutation(V)[: B * L].reshape(B, L).astype(np.int32)
    positions = np.tile(np.arange(L, dtype=np.int32), (B, 1))
    starts = np.diff(segments, axis=1, prepend=0) != 0
    positions -= np.maximum.accumulate(np.where(starts, positions, 0), axis=1)
    types = rng.integers(0, 2, (B, L)).astype(np.int32)
    return {"inputs": tokens, "segments": segments, "positions": positions, "types": types}


def with_labels(batch, labels=(1, 0)):
    return {**batch, "labels": np.array(labels, np.int32)}


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


@pytest.mark.parametrize("fields", [{}, {"num_layers": 1, "num_types": 0}, {"scan": True}], ids=str)
def test_a_position_sees_all_of_its_document_and_nothing_else(fields):
    """By gradient: which embeddings reach which features."""
    model = build(**fields)
    batch = {name: x[:1] for name, x in batch_of().items()}
    params = params_of(model)
    mixture = np.random.default_rng(2).normal(size=(D,)).astype(np.float32)

    def mixed(vectors_LD):
        table = jnp.asarray(params["embed"]["embedding"]).at[batch["inputs"][0]].set(vectors_LD)
        x_BLD = model.apply({"params": {**params, "embed": {"embedding": table}}}, batch)
        return x_BLD[0] @ mixture

    vectors = params["embed"]["embedding"][batch["inputs"][0]]
    reach = np.abs(jax.jit(jax.jacrev(mixed))(vectors)).sum(-1)  # [L, L], zero where never seen
    real = SEGMENTS[0] > 0
    same = SEGMENTS[0][:, None] == SEGMENTS[0]
    np.testing.assert_array_equal((reach > 0)[real], same[real])


def test_the_first_position_of_a_long_row_sees_the_last():
    """Where a causal model would attend in blocks of queries."""
    model = build(num_layers=1, max_length=300)
    row = np.arange(300, dtype=np.int32)[None]
    batch = {"inputs": row % V, "segments": np.ones_like(row), "positions": row}
    other = {**batch, "inputs": np.where(row == 299, 7, batch["inputs"])}
    moved = np.abs(features(model, other) - features(model, batch))
    assert moved[0, 0].max() > 1e-4


def head_by_hand(params, x, activation=lambda h: jax.nn.gelu(h, approximate=False)):
    h = np.asarray(activation(x @ params["head"]["kernel"] + params["head"]["bias"]), np.float64)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-12)
    h = h * params["head_norm"]["scale"] + params["head_norm"]["bias"]
    return h @ params["embed"]["embedding"].T + params["head_bias"]


def test_the_head_is_a_layer_the_embedding_and_a_bias():
    model = build()
    params = params_of(model)
    x, logits = compiled(model)(params, batch_of())
    assert logits.shape == (B, L, 128) and logits.dtype == jnp.float32
    np.testing.assert_allclose(
        logits[..., :V], head_by_hand(params, np.asarray(x))[..., :V], atol=2e-5
    )
    assert (logits[..., V:] <= -1e9).all()


def scored_batch():
    batch = {**batch_of(), "targets": np.roll(batch_of()["inputs"], 1, axis=1)}
    batch["weights"] = np.zeros((B, L), np.float32)
    batch["weights"][0, 4] = batch["weights"][1, [2, 7]] = 1
    return batch


def sizes_in(jaxpr):
    """Yield the shape of every array that a jaxpr makes, inside loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


def test_the_head_is_computed_where_something_is_scored_and_nowhere_else():
    model, batch = build(), scored_batch()
    params = params_of(model)
    objective = step.Objective(max_scored=2, vocab_size=V)

    def loss(params):
        return step.forward(model, {"params": params}, batch, objective, train=False)[0]

    x = features(model, batch)
    logits = head_by_hand(params, x)[..., :V]
    surprise = jax.nn.logsumexp(logits, axis=-1) - np.take_along_axis(
        logits, batch["targets"][..., None], axis=-1
    ).squeeze(-1)
    expected = (surprise * batch["weights"]).sum()
    np.testing.assert_allclose(jax.jit(loss)(params), expected, rtol=1e-5)
    shapes = list(sizes_in(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    rows = {int(np.prod(shape[:-1])) for shape in shapes if shape[-1:] == (128,)}
    assert B * 2 in rows and not {n for n in rows if n >= B * L} - {D}, rows


@functools.partial(jax.jit, static_argnums=0)
def with_losses(model, params, batch):
    return model.apply({"params": params}, batch, mutable=["losses"])


@pytest.mark.parametrize("labels", [(1, 0), (-1, 1), (-1, -1)])
def test_the_next_sentence_is_scored_at_the_first_position(labels):
    model = build(next_sentence=True)
    params, batch = params_of(model), with_labels(batch_of(), labels)
    x, new = with_losses(model, params, batch)
    pooled = np.tanh(np.asarray(x)[:, 0] @ params["pooler"]["kernel"] + params["pooler"]["bias"])
    head = params["next_sentence_head"]
    log_p = np.asarray(jax.nn.log_softmax(pooled @ head["kernel"] + head["bias"]))
    expected = -sum(log_p[b, label] for b, label in enumerate(labels) if label >= 0)
    ((total, weight),) = new["losses"]["next_sentence"]
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weight, sum(label >= 0 for label in labels), atol=1e-6)
    assert np.isfinite(total / weight)
    without, new = with_losses(model, params, batch_of())
    np.testing.assert_array_equal(without, x)
    assert "losses" not in new


def test_a_step_learns_the_next_sentence():
    model = build(next_sentence=True, num_layers=1)
    batch = with_labels(scored_batch())
    batch["weights"][:] = 0  # the next sentence alone is left
    objective = step.Objective(max_scored=2, vocab_size=V)
    init = step.make_init(
        model, optax.sgd(1.0), seed=0, shape=(8, B, L), average=False, stateful=False
    )
    state, losses = jax.jit(init)(), []
    update = jax.jit(
        functools.partial(
            step.train_step, model=model, tx=optax.sgd(1.0), objective=objective, seed=0
        )
    )
    for _ in range(8):
        state, sums = update(state, batch)
        losses.append(sums["next_sentence"][0] / sums["next_sentence"][1])
    assert losses[0] == pytest.approx(np.log(2), abs=0.05) and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({}, {"head", "head_norm", "head_bias"}),
        (
            {"next_sentence": True},
            {"head", "head_norm", "head_bias", "pooler", "next_sentence_head"},
        ),
        ({"num_classes": 3}, {"pooler", "classifier"}),
    ],
    ids=["language model", "next sentence", "classes"],
)
def test_parameters_are_those_that_the_options_use(fields, has):
    always = {"embed", "position_embedding", "type_embedding", "embed_norm", "layers"}
    assert set(params_of(build(**fields))) == always | has


def test_a_classifier_tells_classes_apart_from_the_pooled_position():
    model = build(num_classes=3)
    params = params_of(model)
    x, logits = compiled(model)(params, batch_of())
    pooled = np.tanh(np.asarray(x) @ params["pooler"]["kernel"] + params["pooler"]["bias"])
    expected = pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    assert logits.shape == (B, L, 128) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[..., :3], expected[..., :3], atol=1e-5)
    _, half = compiled(build(num_classes=3, dtype="bfloat16"))(params, batch_of())
    rounded = half[..., :3].astype(jnp.bfloat16).astype(jnp.float32)
    assert (half[..., :3] != rounded).any(), "close classes are told apart"
    assert (logits[..., 3:] <= -1e9).all()


def test_types_are_zero_where_the_batch_has_none():
    model, batch = build(), batch_of()
    zeros = {**batch, "types": np.zeros_like(batch["types"])}
    without = {name: x for name, x in batch.items() if name != "types"}
    np.testing.assert_allclose(features(model, without), features(model, zeros), atol=1e-6)
    assert np.abs(features(model, batch) - features(model, zeros)).max() > 0.1
    one = build(num_types=1)  # as RoBERTa: one vector for all
    assert params_of(one)["type_embedding"].shape == (1, D)
    np.testing.assert_array_equal(features(one, batch), features(one, without))
    none = build(num_types=0)
    assert "type_embedding" not in params_of(none)
    np.testing.assert_array_equal(features(none, batch), features(none, without))


ALL = [{"next_sentence": True}, {"num_classes": 3, "scan": True}, {"num_types": 0}]


@pytest.mark.parametrize("fields", ALL, ids=str)
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
    axes, shapes = step.parameter_axes(build(next_sentence=True, num_layers=1))
    tree = muon.matrices(shapes, axes)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=muon.is_matrix)
    block = "layers/block_0"
    assert {sharding.path_name(path) for path, _ in leaves} == {
        "head/kernel",
        "pooler/kernel",
        *(f"{block}/attention/{name}/kernel" for name in ("qkv", "out")),
        *(f"{block}/mlp/{name}/kernel" for name in ("up", "down")),
    }


def test_initialisation_is_a_truncated_normal_of_0_02():
    model = build(model_dim=64, vocab_size=512, max_length=128, next_sentence=True)
    params = nn.unbox(jax.jit(lambda: step.init_variables(model, jax.random.key(0)))())["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = sharding.path_name(path)
        if name.endswith(("scale", "bias")):
            np.testing.assert_array_equal(leaf, float(name.endswith("scale")), err_msg=name)
            continue
        assert np.abs(leaf).max() <= 0.04, name
        std = 0.02 * 0.87963  # of a normal cut at two deviations
        assert np.std(leaf) == pytest.approx(std, rel=5 / (2 * leaf.size) ** 0.5), name


def test_bert_base_has_its_published_number_of_parameters():
    """109,482,240 with the pooler and without heads; here 30,522 tokens are padded to 30,592."""
    cfg = models.resolve(
        bert.Config(next_sentence=True), vocab_size=30_522, max_length=512, packed=True
    )
    _, shapes = step.parameter_axes(models.build(cfg))
    heads = ("head", "head_norm", "head_bias", "next_sentence_head")
    body = {name: leaf for name, leaf in shapes.items() if name not in heads}
    assert step.count_parameters(body) - (30_592 - 30_522) * 768 == 109_482_240
    decoder = step.count_parameters({name: shapes[name] for name in heads})
    assert decoder == 768 * 768 + 768 + 2 * 768 + 30_592 + 2 * 768 + 2


def test_flops_by_hand():
    """Width 16, 2 layers, feed-forward 64, 50 -> 128 tokens, rows of 10."""
    blocks = 2 * (4 * 16 * 16 + 2 * 16 * 64)
    attention = 12 * 2 * 16 * 10
    head = 16 * 16 + 16 * 128
    flops = bert.flops_per_token
    assert flops(build().cfg, 10, 0.15) == pytest.approx(6 * (blocks + 0.15 * head) + attention)
    pair = build(next_sentence=True, mlp_dim=40).cfg
    blocks = 2 * (4 * 16 * 16 + 2 * 16 * 40)
    pooled = (16 * 16 + 16 * 2) / 10
    assert flops(pair, 10, 0.15) == pytest.approx(6 * (blocks + 0.15 * head + pooled) + attention)
    classes = build(num_classes=3, mlp_dim=40).cfg
    assert flops(classes, 10, 0.1) == pytest.approx(6 * (blocks + head / 10) + attention)


def test_dropout_acts_in_training_only():
    model = build(dropout=0.5)
    params, batch = params_of(model), batch_of()

    @functools.partial(jax.jit, static_argnames="train")
    def run(key, train):
        return model.apply({"params": params}, batch, train=train, rngs={"dropout": key})

    first, second = jax.random.key(0), jax.random.key(1)
    np.testing.assert_array_equal(run(first, True), run(first, True))
    assert not np.allclose(run(first, True), run(second, True))
    np.testing.assert_array_equal(run(first, False), run(second, False))
    np.testing.assert_allclose(run(first, False), features(build(), batch, params), atol=1e-6)


def test_bfloat16_gives_bfloat16_features_and_float32_logits():
    half, full = build(dtype="bfloat16"), build(dtype="float32")
    x, logits = compiled(half)(params_of(full), batch_of())
    assert x.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    exact, _ = compiled(full)(params_of(full), batch_of())
    assert 0 < np.abs(x.astype(jnp.float32) - exact).max() < 0.2


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "swiglu"},
        {"remat": "all"},
        {"dtype": "float16"},
        {"num_layers": 0},
        {"model_dim": 0},
        {"num_heads": -1},
        {"num_heads": 5},
        {"mlp_dim": -1},
        {"vocab_size": -1},
        {"max_length": -1},
        {"num_types": -1},
        {"num_classes": -1},
        {"norm_epsilon": 0.0},
        {"dropout": 1.0},
    ],
    ids=str,
)
def test_a_wrong_value_is_an_error_of_one_line_that_names_the_field(fields):
    ((field, value),) = fields.items()
    with pytest.raises(ConfigError) as error:
        build(**fields)
    assert f"model.{field}={value!r}" in str(error.value) and "\n" not in str(error.value)


def test_what_it_cannot_do_is_an_error_that_says_so():
    with pytest.raises(ConfigError, match=r"model\.next_sentence=True: .*num_classes=0"):
        build(next_sentence=True, num_classes=2)
    with pytest.raises(ConfigError, match=r"model\.name=bert"):
        build().apply({"params": params_of(build())}, batch_of(), decode=True)


def train(sizes, num_devices, **fields):
    """Return (losses, next-sentence losses, gradients) of two steps on a mesh."""
    rng = np.random.default_rng(0)
    rows, length, vocab = 16, 16, 99
    model = build(
        model_dim=64, num_heads=8, vocab_size=vocab, max_length=length, next_sentence=True, **fields
    )
    mesh = sharding.make_mesh(sharding.Config(*sizes), jax.devices()[:num_devices])
    tokens = rng.integers(0, vocab, (2, rows, length)).astype(np.int32)
    batch = {
        "inputs": tokens[0],
        "targets": tokens[1],
        "segments": np.sort(rng.integers(0, 3, (rows, length)), axis=1)[:, ::-1].astype(np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "types": rng.integers(0, 2, (rows, length)).astype(np.int32),
        "labels": rng.integers(-1, 2, rows).astype(np.int32),
        "weights": (rng.random((rows, length)) < 0.15).astype(np.float32),
    }
    tx = optax.trace(0.9)
    with sharding.use(mesh):
        init = step.make_init(
            model, tx, seed=0, shape=(2, rows, length), average=False, stateful=False
        )
        axes, _ = step.parameter_axes(model)
        placed = step.state_shardings(mesh, jax.eval_shape(init), axes)
        update = functools.partial(
            step.train_step,
            model=model,
            tx=tx,
            objective=step.Objective(max_scored=8, vocab_size=vocab),
            seed=0,
        )
        state = jax.jit(init, out_shardings=placed)()
        state, sums = jax.jit(update, out_shardings=(placed, None))(
            state, placement.place_batch(mesh, batch)
        )
        losses = [sums[name][0] / sums[name][1] for name in ("loss", "next_sentence")]
        return np.array(losses), jax.device_get(state.opt_state.trace)


def check_mesh(sizes, **fields):
    losses, gradients = train(sizes, 8, **fields)
    expected, expected_gradients = train((1, 1, 1), 1, **fields)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(expected_gradients),
        strict=True,
    ):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        assert error < 1e-5 or np.abs(b).max() < 1e-7, (sharding.path_name(path), error)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 1, 8)])  # others: test_conformance.py
def test_every_mesh_equals_one_device(sizes):
    check_mesh(sizes, num_layers=3, scan=True)


def from_transformers(weights, cfg, *, prefix, head, first_position=0):
    """Return our parameters of the weights of transformers' model."""

    def dense(name):
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def padded(array):
        return np.pad(array, ((0, 128 - len(array)), *((0, 0),) * (array.ndim - 1)))

    def block(name):
        H, K = cfg.num_heads, cfg.sizes["head_dim"]
        parts = [dense(f"{name}.attention.self.{part}") for part in ("query", "key", "value")]
        out = dense(f"{name}.attention.output.dense")
        return {
            "attention": {
                "qkv": {
                    "kernel": np.stack([p["kernel"].reshape(-1, H, K) for p in parts], axis=2),
                    "bias": np.stack([p["bias"].reshape(H, K) for p in parts], axis=1),
                },
                "out": {"kernel": out["kernel"].reshape(H, K, -1), "bias": out["bias"]},
            },
            "attention_norm": norm(f"{name}.attention.output.LayerNorm"),
            "mlp": {
                "up": dense(f"{name}.intermediate.dense"),
                "down": dense(f"{name}.output.dense"),
            },
            "mlp_norm": norm(f"{name}.output.LayerNorm"),
        }

    table = f"{prefix}.embeddings"
    return {
        "embed": {"embedding": padded(weights[f"{table}.word_embeddings.weight"])},
        "position_embedding": weights[f"{table}.position_embeddings.weight"][first_position:],
        "type_embedding": weights[f"{table}.token_type_embeddings.weight"],
        "embed_norm": norm(f"{table}.LayerNorm"),
        "layers": {
            UNROLLED.format(n): block(f"{prefix}.encoder.layer.{n}") for n in range(cfg.num_layers)
        },
        "head": dense(head["dense"]),
        "head_norm": norm(head["norm"]),
        "head_bias": padded(weights[head["bias"]]),
    } | (
        {
            "pooler": dense(f"{prefix}.pooler.dense"),
            "next_sentence_head": dense("cls.seq_relationship"),
        }
        if cfg.next_sentence
        else {}
    )


HEADS = {
    "bert": {
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
    },
    "roberta": {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "bias": "lm_head.bias"},
}


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_equals_transformers(name):
    """RoBERTa's positions begin at row padding_idx + 1 of its table."""
    path = FIXTURES / f"{name}.safetensors"
    tensors = {key: np.asarray(x.astype(jnp.float32)) for key, x in load_file(path).items()}
    with safe_open(path, "numpy") as file:
        theirs = json.loads(file.metadata()["fixture"])["config"]
    weights = {k.removeprefix("weight:"): x for k, x in tensors.items() if k.startswith("weight:")}
    first = theirs["pad_token_id"] + 1 if name == "roberta" else 0
    cfg = bert.Config(
        num_layers=theirs["num_hidden_layers"],
        model_dim=theirs["hidden_size"],
        num_heads=theirs["num_attention_heads"],
        mlp_dim=theirs["intermediate_size"],
        vocab_size=theirs["vocab_size"],
        max_length=theirs["max_position_embeddings"] - first,
        num_types=theirs["type_vocab_size"],
        norm_epsilon=theirs["layer_norm_eps"],
        next_sentence=name == "bert",
    )
    model = bert.Model(cfg)
    params = from_transformers(weights, cfg, prefix=name, head=HEADS[name], first_position=first)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, params_of(model))
    real = tensors["input:attention_mask"].astype(np.int32)
    batch = {
        "inputs": tensors["input:input_ids"].astype(np.int32),
        "segments": real,
        "positions": np.tile(np.arange(real.shape[1], dtype=np.int32), (len(real), 1)),
    }
    if name == "bert":
        batch["types"] = tensors["input:token_type_ids"].astype(np.int32)
    x, logits = compiled(model)(params, batch)
    seen = real > 0
    V = cfg.vocab_size
    np.testing.assert_allclose(x[seen], tensors["output:features"][seen], atol=2e-5)
    np.testing.assert_allclose(logits[..., :V][seen], tensors["output:logits"][seen], atol=2e-5)
    if name == "bert":
        log_p = jax.nn.log_softmax(tensors["output:next_sentence"])
        for label in (0, 1):
            labelled = with_labels(batch, (label,) * len(real))
            _, new = with_losses(model, params, labelled)
            total = new["losses"]["next_sentence"][0][0]
            np.testing.assert_allclose(total, -log_p[:, label].sum(), atol=2e-5)
