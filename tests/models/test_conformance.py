"""What every family promises, tried on every file of the folder. `INSTEAD` has what cannot apply, and why."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from lm import checkpoint, experiment, generate, models, placement, sharding, step, train
from lm import config as config_lib
from lm.config import ConfigError
from lm.convert import exporter, importer
from lm.nn.embed import pad_vocab
from lm.nn.transformer import SCANNED, UNROLLED
from tools import evaluate

VOCAB, LENGTH = 99, 12
TINY = {
    "bert": {"num_layers": 2, "model_dim": 32, "num_heads": 2},
    "gpt": {"num_layers": 2, "model_dim": 32, "num_heads": 2},
    "linear_rnn": {"num_layers": 2, "model_dim": 32, "num_heads": 2, "chunk": 4},
    "rnn": {"num_layers": 2, "model_dim": 32},
    "seq2seq": {"num_layers": 2, "model_dim": 32},
    "t5": {"num_layers": 2, "model_dim": 32, "num_heads": 2, "head_dim": 12},
    "ngram": {"order": 3},
}
# Layers of a family that are another program.
VARIANTS = {
    "gpt-experts": {"num_experts": 4, "shared_experts": 1, "expert_dim": 32},
    "t5-experts": {"num_experts": 4, "activation": "geglu", "expert_dim": 32},
}
# What a family cannot be asked, why, and what is tried instead.
INSTEAD = {
    "gradient": {
        "ngram": "it has no gradient: tests/models/test_ngram.py changes tokens and sums probabilities"
    },
    "convert": {
        "gpt": "its own recipe is nobody else's: tests/convert takes those of GPT-2 and Llama",
        **dict.fromkeys(VARIANTS, "experts are not converted"),
        **dict.fromkeys(
            ("linear_rnn", "ngram", "rnn", "seq2seq"), "Hugging Face has no such model"
        ),
    },
    "decode": {"bert": "an encoder does not write: tests/test_generate.py fills masks"},
    "task": {
        "bert": {"name": "masked_lm", "length": 16},
        "gpt": {"name": "causal_lm", "length": 16},
        "linear_rnn": {"name": "causal_lm", "length": 16},
        "rnn": {"name": "causal_lm", "length": 16},
        "ngram": {"name": "causal_lm", "length": 16, "context": 2},
        "seq2seq": {"name": "seq2seq", "source_length": 16, "length": 16},
        "t5": {"name": "span_corruption", "source_length": 16},
    },
}


def family_of(name):
    return name.partition("-")[0]


def each(names):
    """Return the names to try; T5 with experts, whose layers plain tests try apart, among the slow tests."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if name == "t5-experts" else name
        for name in names
    ]


FAMILIES = models.names()
TRIED = [*FAMILIES, *VARIANTS]
LEARNED = [name for name in TRIED if name not in INSTEAD["gradient"]]
PACKED = [name for name in TRIED if "packed" in models.family(family_of(name)).Model.accepts]
WRITERS = [name for name in TRIED if name not in (*INSTEAD["decode"], *INSTEAD["gradient"])]
SCANNED_ONES = [n for n in LEARNED if hasattr(models.config_class(family_of(n)), "scan")]


def build(name, **fields):
    family = family_of(name)
    cfg = models.config_class(family)(**{**TINY[family], **VARIANTS.get(name, {}), **fields})
    sizes = {"vocab_size": VOCAB, "max_length": LENGTH, "max_source_length": LENGTH, "packed": True}
    return models.build(models.resolve(cfg, **sizes), decode_length=LENGTH)


@functools.cache
def made(name):
    """Return a tiny model and its parameters; a family that counts has counted some random text."""
    model = build(name)
    if model.learns == "gradient":
        init = jax.jit(functools.partial(step.init_variables, model))
        return model, nn.unbox(init(jax.random.key(0)))["params"]
    counts = nn.unbox(model.init_counts(1, 8, LENGTH))
    words = [texts([5, 7], seed=seed) for seed in range(8)]
    _, new = model.apply(
        {"counts": counts}, batch_of(model, words), 0, method="count", mutable=["counts"]
    )
    params = model.estimate(nn.unbox(new["counts"]))
    return model, jax.tree.map(jnp.asarray, params)


def kind_of(model):
    return next(kind for kind in ("masked", "source", "causal") if kind in model.accepts)


def rows_of(documents, *, seed=0, length=LENGTH, prefix=""):
    """Return tokens, segments and positions of rows, each a list of documents, each given by its tokens."""
    names = (f"{prefix}_segments", f"{prefix}_positions") if prefix else ("segments", "positions")
    batch = {n: np.zeros((len(documents), length), np.int32) for n in (prefix or "inputs", *names)}
    for row, texts in enumerate(documents):
        at = 0
        for number, text in enumerate(texts, 1):
            span = slice(at, at + len(text))
            batch[prefix or "inputs"][row, span] = text
            batch[names[0]][row, span] = number
            batch[names[1]][row, span] = np.arange(len(text))
            at += len(text)
    return batch


def batch_of(model, documents, sources=None, **options):
    """Return a batch of what the family reads; of one that does not pack, each row's first document."""
    if "packed" not in model.accepts:
        documents, sources = [d[:1] for d in documents], sources and [s[:1] for s in sources]
    batch = rows_of(documents, **options)
    if kind_of(model) == "source":
        batch |= rows_of(sources, prefix="source", **options)
    batch["targets"] = np.roll(batch["inputs"], -1, axis=1)
    batch["weights"] = (batch["segments"] > 0).astype(np.float32)
    return batch


def test_a_source_is_asked_of_those_that_read_one():
    for name in LEARNED_FAMILIES:
        model, params = made(name)
        if "masked" in model.accepts:
            continue
        reads = "source" in model.accepts
        with pytest.raises(ConfigError, match="sources: one for each prompt"):
            generate.generate(model, params, [[1]], max_tokens=2, sources=None if reads else [[1]])
        if reads:
            batch = rows_of([[np.array([1, 2])]])
            with pytest.raises(ConfigError, match="batch: no source in it"):
                model.apply({"params": params}, batch)


@functools.partial(jax.jit, static_argnums=0)
def features(model, params, batch):
    return model.apply({"params": params}, batch)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return model.apply({"params": params}, features(model, params, batch), method="logits")


@functools.partial(jax.jit, static_argnums=0)
def decoded(model, variables, batch):
    """Return the logits of some more tokens, and the cache after them."""
    x, new = model.apply(variables, batch, decode=True, mutable=["cache"])
    return model.apply({"params": variables["params"]}, x, method="logits"), nn.unbox(new["cache"])


def texts(lengths, seed=1):
    """Return documents of distinct tokens."""
    tokens = np.random.default_rng(seed).permutation(np.arange(1, VOCAB))
    return [part.tolist() for part in np.split(tokens[: sum(lengths)], np.cumsum(lengths)[:-1])]


def test_every_family_is_tried():
    assert set(TINY) == set(INSTEAD["task"]) == set(FAMILIES)


@pytest.mark.parametrize("name", each(LEARNED))
def test_every_parameter_names_its_axes_and_logits_have_their_shape(name):
    model, params = made(name)
    boxed = jax.eval_shape(lambda: step.init_variables(model, jax.random.key(0)))["params"]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    assert leaves
    for leaf in leaves:
        assert isinstance(leaf, nn.Partitioned) and len(leaf.names) == len(leaf.value.shape), leaf
        assert set(leaf.names) <= {*sharding.RULES, "layers"}, leaf.names
    out = logits(model, params, batch_of(model, [texts([5, 3])] * 2, [texts([4, 6])] * 2))
    assert out.shape == (2, LENGTH, pad_vocab(VOCAB)) and out.dtype == jnp.float32
    assert np.isfinite(out).all() and out[..., VOCAB:].max() < -1e8


def mixed(x):
    """Return a random mixture of each position's features: a normalisation makes their sum constant."""
    return x @ np.random.default_rng(0).normal(size=x.shape[-1]).astype(np.float32)


def depends(model, params, batch, key):
    """Return bool [L, S]: whether the features at a position depend on the token at a place of `key`."""
    flat = {
        sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    name = next(name for name in flat if re.search(experiment.EMBEDDING, name))

    def summed(table):
        with_table = jax.tree_util.tree_map_with_path(
            lambda path, leaf: table if sharding.path_name(path) == name else leaf, params
        )
        return mixed(features(model, with_table, batch)[0])

    jacobian = np.asarray(jax.jacrev(summed)(flat[name]))
    return (jacobian[:, batch[key][0]] != 0).any(axis=-1)


@pytest.mark.parametrize("name", each(LEARNED))
def test_a_position_sees_what_it_may_and_nothing_else(name):
    """By gradient, in a row of two documents and padding."""
    model, params = made(name)
    words = texts([5, 3, 4, 6])
    batch = batch_of(model, [words[:2]], [words[2:]])
    segments, places = batch["segments"][0], np.arange(LENGTH)
    real = segments > 0
    allowed = (segments[:, None] == segments[None]) & real
    if kind_of(model) != "masked":
        allowed &= places[None] <= places[:, None]
    found = depends(model, params, batch, "inputs")
    np.testing.assert_array_equal(found[real][:, real], allowed[real][:, real])
    if kind_of(model) == "source":
        source = batch["source_segments"][0]
        found = depends(model, params, batch, "source")[real][:, source > 0]
        np.testing.assert_array_equal(found, segments[real][:, None] == source[source > 0][None])


@pytest.mark.parametrize("name", each(TRIED))
def test_packed_padded_and_in_company_are_the_same(name):
    """A document alone, in a longer row, in a pack, and in a larger batch has the same logits."""
    model, params = made(name)
    words = texts([5, 3, 4, 6])
    packed = batch_of(model, [words[:2], [words[0]]], [words[2:], [words[2]]])
    together = logits(model, params, packed)[0]
    second = [(words[1], words[3], 5)] if name in PACKED else []
    for text, source, at in [(words[0], words[2], 0), *second]:
        alone = batch_of(model, [[text]], [[source]], length=6)
        apart = logits(model, params, alone)[0, : len(text)]
        np.testing.assert_allclose(together[at : at + len(text)], apart, atol=1e-5)


@pytest.mark.parametrize("name", each(PACKED))
def test_a_neighbour_in_a_pack_changes_nothing(name):
    model, params = made(name)
    words, others = texts([5, 3, 4, 6]), texts([5, 3, 4, 6], seed=2)
    before = batch_of(model, [words[:2]], [words[2:]])
    after = batch_of(model, [[others[0], words[1]]], [[others[2], words[3]]])
    both = [np.asarray(logits(model, params, batch))[0] for batch in (before, after)]
    np.testing.assert_array_equal(both[0][5:8], both[1][5:8])
    assert (both[0][:5] != both[1][:5]).any()


@pytest.mark.parametrize("name", each(WRITERS))
def test_decoding_with_a_cache_is_the_full_pass(name):
    """A prompt of some tokens at once and the others one by one; rows differ in length."""
    model, params = made(name)
    words = texts([9, 7, 4, 6])
    whole = batch_of(model, [[words[0]], [words[1]]], [[words[2]], [words[3]]])
    full = np.asarray(logits(model, params, whole))
    prompt = batch_of(model, [[words[0][:4]], [words[1][:2]]], [[words[2]], [words[3]]])
    found, cache = decoded(model, {"params": params}, prompt)
    np.testing.assert_allclose(found[0, :4], full[0, :4], atol=1e-5)
    np.testing.assert_allclose(found[1, :2], full[1, :2], atol=1e-5)
    for extra in range(5):
        at = np.array([4 + extra, 2 + extra])
        one = {
            "inputs": np.array([[words[0][at[0]]], [words[1][at[1]]]], np.int32),
            "segments": np.ones((2, 1), np.int32),
            "positions": at[:, None].astype(np.int32),
        }
        one_BLV, cache = decoded(model, {"params": params, "cache": cache}, one)
        np.testing.assert_allclose(one_BLV[:, 0], full[[0, 1], at], atol=1e-5)


def stacked(tree):
    """Return parameters of unrolled layers as those of a scan."""
    if not isinstance(tree, dict):
        return tree
    layers = [tree[UNROLLED.format(i)] for i in range(len(tree)) if UNROLLED.format(i) in tree]
    rest = {k: stacked(v) for k, v in tree.items() if not k.startswith(UNROLLED.format(""))}
    if layers:
        rest[SCANNED] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return rest


@pytest.mark.slow  # six programs a family to compile
@pytest.mark.parametrize("name", SCANNED_ONES)
def test_scanned_layers_and_rematerialisation_change_nothing(name):
    model, params = made(name)
    words = texts([5, 3, 4, 6])
    batch = batch_of(model, [words[:2]], [words[2:]])

    def run(model, params):
        def total(params):
            return jnp.square(mixed(features(model, params, batch))).sum()

        return features(model, params, batch), jax.grad(total)(params)

    plain, gradient = run(model, params)
    for scan, remat in ((True, "none"), (False, "full"), (True, "dots")):
        change = stacked if scan else lambda tree: tree
        other, others = run(build(name, scan=scan, remat=remat), change(params))
        np.testing.assert_allclose(other, plain, atol=1e-5)
        errors = jax.tree.map(
            lambda a, b: float(jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-6)),
            others,
            change(gradient),
        )
        assert all(error < 1e-4 for error in jax.tree.leaves(errors)), errors


@functools.cache
def programs(name, mesh, tx, *, rows, length, **fields):
    """Return jitted (init, step) of a family on a mesh, under which they are called."""
    model = build(name, **fields)
    init = step.make_init(model, tx, seed=0, shape=(1, rows, length), average=False, stateful=False)
    axes, _ = step.parameter_axes(model)
    placed = step.state_shardings(mesh, jax.eval_shape(init), axes)
    objective = step.Objective(max_scored=length, vocab_size=VOCAB)
    function = functools.partial(step.train_step, model=model, tx=tx, objective=objective, seed=0)
    return jax.jit(init, out_shardings=placed), jax.jit(function, out_shardings=(placed, None))


def steps(name, mesh, *, count, tx, rows=8, length=LENGTH, **fields):
    """Return (losses, states after the first and the last) of `count` steps on one batch."""
    words = [texts([6, 5, 4, 6], seed=seed) for seed in range(rows)]
    documents, sources = [w[:2] for w in words], [w[2:] for w in words]
    batch = batch_of(build(name, **fields), documents, sources, length=length)
    with sharding.use(mesh):
        init, jitted = programs(name, mesh, tx, rows=rows, length=length, **fields)
        state, states, losses = init(), [], []
        placed_batch = placement.place_batch(mesh, batch)
        for number in range(count):
            state, sums = jitted(state, placed_batch)
            if number in (0, count - 1):
                states.append(jax.device_get(state))
            losses.append(float(sums["loss"][0] / sums["loss"][1]))
            assert bool(sums["healthy"])
        return losses, states


@pytest.mark.parametrize("name", each(LEARNED))
def test_gradients_are_finite_differences(name):
    """In float64, of every parameter, along a random direction."""
    model, params = made(name)
    model = build(name)
    object.__setattr__(model.cfg, "dtype", "float64")  # no user needs it, so no config allows it
    words, random = texts([5, 3, 4, 6]), np.random.default_rng(0)
    batch = batch_of(model, [words[:2]], [words[2:]])
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        # Off the start, where some parameters have no gradient yet.
        params = jax.tree.map(lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape), params)

        @jax.jit
        def loss(params):
            logits_BLV = model.apply({"params": params}, batch, method=lambda m, b: m.logits(m(b)))
            assert logits_BLV.dtype == jnp.float64
            log_p_BLV = jax.nn.log_softmax(logits_BLV[..., :VOCAB])
            return -(log_p_BLV[..., 7] * batch["weights"]).sum()

        leaves, tree = jax.tree.flatten(params)
        gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
        for place, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            step = 1e-6 * random.normal(size=leaf.shape)
            ends = [
                loss(tree.unflatten([*leaves[:place], leaf + s, *leaves[place + 1 :]]))
                for s in (step, -step)
            ]
            found, along = (ends[0] - ends[1]) / 2, (gradient * step).sum()
            assert abs(found - along) <= 1e-5 * abs(along) + 1e-13, (place, leaf.shape)


def one_device():
    return sharding.make_mesh(sharding.Config(), jax.devices()[:1])


@pytest.mark.parametrize("name", each(LEARNED))
def test_one_batch_is_learned_by_heart_and_the_same_again(name):
    run = functools.partial(steps, name, one_device(), tx=optax.adam(1e-2), rows=2, num_layers=1)
    (losses, _), (again, _) = run(count=150), run(count=3)
    assert losses[-1] < 0.05, losses[::30]
    assert again == losses[:3]


def on(**sizes):
    """Return the mesh of `sizes`, over as many devices."""
    sizes = {"data": 1, **sizes}
    return sharding.make_mesh(sharding.Config(**sizes), jax.devices()[: math.prod(sizes.values())])


def assert_alike(found, expected):
    """Compare losses, the gradients of the first step, and the last parameters: 1e-5 of each one's norm."""
    (losses, states), (wanted, others) = found, expected
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    pairs = [(states[0].opt_state, others[0].opt_state), (states[-1].params, others[-1].params)]
    for tree, reference in pairs:
        # Additive attention's query has, at first, no gradient but rounding's: it moves all scores alike.
        least = 1e-3 * max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(reference))
        errors = jax.tree.map(
            lambda a, b, least=least: np.linalg.norm(a - b) / max(np.linalg.norm(b), least),
            tree,
            reference,
        )
        assert all(error < 1e-5 for error in jax.tree.leaves(errors)), errors


@pytest.mark.parametrize(
    "name",
    [n if n in ("gpt", "rnn") else pytest.param(n, marks=pytest.mark.slow) for n in LEARNED],
)
def test_sharded_is_one_device(name):
    """Loss and each tensor's gradient, where data, parameters and heads are all split."""
    trace = optax.trace(0.9)  # a sum of updates, which begins as the gradient
    expected = steps(name, one_device(), count=1, tx=trace)
    assert_alike(steps(name, on(data=2, fsdp=2, tensor=2), count=1, tx=trace), expected)


# Sizes that are no powers of two, but for the heads; rows of 24 positions, a number that 3 divides.
ODD = {"rows": 24, "length": 24}
MESHES = {
    "singly": [{"data": 8}, {"fsdp": 8}, {"tensor": 2}, {"context": 3}],
    "mixed": [
        {"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}, {"data": 2, "context": 4},
        {"fsdp": 4, "tensor": 2}, {"fsdp": 4, "context": 2}, {"tensor": 2, "context": 2},
        {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2},
        {"data": 2, "tensor": 2, "context": 2}, {"fsdp": 2, "tensor": 2, "context": 2},
        {"data": 2, "context": 3}, {"fsdp": 2, "tensor": 2, "context": 2, "gather": True},
    ],
}  # fmt: skip


def applies(name, sizes):
    return "context" not in sizes or "context" in models.family(name).Model.accepts


@functools.cache
def five_steps(name):
    return steps(name, one_device(), **FIVE, **ODD_SIZES[name], **ODD)


FIVE = {"count": 5, "tx": optax.sgd(0.1, momentum=0.9)}
ODD_SIZES = {name: {"num_layers": 1} for name in LEARNED} | {
    "gpt": {"model_dim": 48, "mlp_dim": 72, "num_layers": 3, "scan": True}
}
LEARNED_FAMILIES = [name for name in LEARNED if name in FAMILIES]
CASES = [(n, sizes) for sizes in MESHES["singly"] for n in LEARNED_FAMILIES if applies(n, sizes)]
CASES += [("gpt", sizes) for sizes in MESHES["mixed"]]
CASES += [("bert", sizes) for sizes in MESHES["mixed"][0::3]]
CASES += [("t5", sizes) for sizes in MESHES["mixed"][2::3]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x)
)
def test_every_mesh_is_one_device(name, sizes):
    """Every family on every axis, and gpt on the mixed meshes, bert and t5 on four each: five steps."""
    sizes, fields = dict(sizes), dict(ODD_SIZES[name])
    if sizes.pop("gather", False):
        fields["context_parallel"] = "gather"
    assert_alike(steps(name, on(**sizes), **FIVE, **fields, **ODD), five_steps(name))


WIDE = {
    "gpt": {"num_layers": 3, "model_dim": 64, "num_heads": 8, "mlp_dim": 128},
    "rnn": {"num_layers": 3, "model_dim": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_up_to_all_devices_share_a_tensor(name):
    run = functools.partial(steps, name, **FIVE, **WIDE[name])
    expected = run(one_device())
    for sizes in (
        {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"tensor": 8},
        {"dcn": 2, "data": 2, "fsdp": 2}, {"dcn": 2, "fsdp": 2, "tensor": 2},
    ):  # fmt: skip
        assert_alike(run(on(**sizes)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "bert", "t5", "rnn", "linear_rnn"])
def test_what_is_dropped_is_the_same_on_every_mesh(name):
    run = functools.partial(steps, name, **FIVE, num_layers=2, dropout=0.5)
    expected, plain = run(one_device()), steps(name, one_device(), **FIVE, num_layers=2)
    assert np.abs(np.subtract(expected[0], plain[0])).max() > 1e-4, "something is dropped"
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"dcn": 2, "fsdp": 4}):
        assert_alike(run(on(**sizes)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCANNED_ONES if name in FAMILIES])
def test_stages_are_one_device(name):
    """As above, where layers are split and parts of the batch flow through them."""
    run = functools.partial(steps, name, **FIVE, rows=16, num_layers=4, scan=True)
    expected = run(one_device())
    for sizes, options in (
        ({"stage": 4, "data": 2}, {}),
        ({"stage": 2}, {"stage_repeats": 2, "microbatches": 4}),
        ({"stage": 2, "fsdp": 2, "tensor": 2}, {"remat": "full"}),
    ):
        assert_alike(run(on(**sizes), **options), expected)


@pytest.mark.parametrize("name", each(TRIED))
def test_a_run_is_saved_loaded_and_scored_the_same(name, tiny, tmp_path):
    """From text to a checkpoint and back, through the task that suits the family."""
    config = tiny(
        task__length=16,
        train__num_steps=2,
        train__fingerprint_every_steps=2,
    )
    family = family_of(name)
    config.task = ConfigDict(INSTEAD["task"][family])
    config.model = ConfigDict({"name": family, **TINY[family], **VARIANTS.get(name, {})})
    if "num_layers" in config.model:  # in which order several are stored: tests/convert
        config.model.num_layers = 1
    workdir = tmp_path / "run"
    final = train.run(config, workdir)
    scores = tmp_path / "scores.json"
    assert evaluate.main(["--workdir", str(workdir), "--json", str(scores)]) == 0
    for key, value in json.loads(scores.read_text()).items():
        assert final[f"eval/{key}"] == pytest.approx(value, rel=1e-6), key
    loaded = checkpoint.load(workdir)
    made = experiment.build(config_lib.complete(config, experiment.SCHEMA))
    assert loaded.model.cfg == made.model.cfg
    if loaded.model.learns == "gradient":
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), loaded.params)
        assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made.shapes)
    if name in INSTEAD["convert"]:
        with pytest.raises(ConfigError, match="no Hugging Face architecture"):
            exporter.from_run(workdir, tmp_path / "theirs")
        return
    exporter.from_run(workdir, tmp_path / "theirs")
    importer.to_run(tmp_path / "theirs", tmp_path / "back")
    back = checkpoint.load(tmp_path / "back")
    assert jax.tree.structure(back.params) == jax.tree.structure(loaded.params)
    assert back.model.cfg.vocab_size == loaded.model.cfg.vocab_size
    for one, other in zip(*map(jax.tree.leaves, (back.params, loaded.params)), strict=True):
        # All but the rows that pad the vocabulary, which no token reads and no logit shows.
        padded = pad_vocab(loaded.model.cfg.vocab_size)
        cut = tuple(slice(loaded.model.cfg.vocab_size if n == padded else n) for n in one.shape)
        np.testing.assert_array_equal(one[cut], other[cut])
