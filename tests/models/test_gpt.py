import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import hardware, models, sharding, step
from lm.config import ConfigError
from lm.models import gpt
from lm.nn.transformer import SCANNED, UNROLLED

B, L, V, D = 2, 10, 50, 16
GPT2 = {
    "positions": "learned",
    "norm": "layernorm",
    "norm_bias": True,
    "bias": True,
    "activation": "gelu",
    "qk_norm": False,
}


def build(**fields):
    sizes = {"num_layers": 2, "model_dim": D, "num_heads": 4, "vocab_size": V, "max_length": L}
    return gpt.Model(gpt.Config(**{**sizes, "mask": "causal", **fields}))


def batch_of(segments=None):
    tokens = np.random.default_rng(0).permutation(V)[: B * L].reshape(B, L).astype(np.int32)
    positions = np.tile(np.arange(L, dtype=np.int32), (B, 1))
    if segments is None:
        segments = np.ones((B, L), np.int32)
    else:  # positions begin again with each segment
        starts = np.diff(segments, axis=1, prepend=0) != 0
        positions = positions - np.maximum.accumulate(np.where(starts, positions, 0), axis=1)
    return {"inputs": tokens, "segments": segments, "positions": positions}


def both(module, batch):
    x_BLD = module(batch)
    return x_BLD, module.logits(x_BLD)


@functools.cache
def params_of(model):
    """Return parameters large enough to matter, none of them at 0 or 1."""
    shapes = nn.unbox(
        jax.eval_shape(lambda: model.init(jax.random.key(0), batch_of(), method=both))
    )
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


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {**GPT2, "num_layers": 1},
        {"mask": "segments", "num_kv_heads": 2},
        {"num_layers": 1, "window": 3},
        {"window": 2, "scan": True, "remat": "full", "activation": "swiglu"},
    ],
    ids=["default", "gpt2", "segments", "window", "window-scan"],
)
def test_a_position_sees_its_past_within_its_window_and_document_and_nothing_else(fields):
    """By gradient: which embeddings reach which features."""
    model = build(**fields)
    batch = {name: x[:1] for name, x in batch_of(SEGMENTS).items()}
    params = params_of(model)
    mixture = np.random.default_rng(2).normal(size=(D,)).astype(np.float32)

    def mixed(vectors_LD):
        table = jnp.asarray(params["embed"]["embedding"]).at[batch["inputs"][0]].set(vectors_LD)
        x_BLD = model.apply({"params": {**params, "embed": {"embedding": table}}}, batch)
        return x_BLD[0] @ mixture

    vectors = params["embed"]["embedding"][batch["inputs"][0]]
    reach = np.abs(jax.jit(jax.jacrev(mixed))(vectors)).sum(-1)  # [L, L], zero where never seen
    distance = np.arange(L)[:, None] - np.arange(L)
    seen = distance >= 0
    if "window" in fields:
        seen &= distance <= model.cfg.num_layers * (fields["window"] - 1)
    if "mask" in fields:
        seen &= SEGMENTS[0][:, None] == SEGMENTS[0]
    np.testing.assert_array_equal(reach > 0, seen)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_packed_documents_equal_rows_of_their_own(positions):
    model = build(mask="segments", positions=positions)
    packed = batch_of(SEGMENTS)
    together = features(model, packed)
    for segment in (1, 2, 3):
        at = np.flatnonzero(SEGMENTS[0] == segment)
        alone = {name: np.zeros_like(x) for name, x in packed.items()}
        for name, x in packed.items():
            alone[name][0, : len(at)] = x[0, at]
        np.testing.assert_allclose(together[0, at], features(model, alone)[0, : len(at)], atol=1e-5)


@pytest.mark.parametrize("mask", ["causal", "segments"])
def test_padding_on_the_right_changes_nothing(mask):
    model, batch = build(mask=mask), batch_of()
    whole = features(model, batch)
    padded = {name: x.copy() for name, x in batch.items()}
    for x in padded.values():
        x[:, 6:] = 0
    np.testing.assert_allclose(features(model, padded)[:, :6], whole[:, :6], atol=1e-6)


def test_scanned_layers_equal_unrolled_ones_of_the_same_parameters():
    plain, scanned = build(num_kv_heads=2), build(num_kv_heads=2, scan=True)
    params = dict(params_of(plain))
    layers = params.pop("layers")
    layers = [layers[UNROLLED.format(n)] for n in range(plain.cfg.num_layers)]
    stacked = {**params, "layers": {SCANNED: jax.tree.map(lambda *x: np.stack(x), *layers)}}
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, params_of(scanned))
    expected = features(plain, batch_of())
    np.testing.assert_allclose(features(scanned, batch_of(), stacked), expected, atol=2e-6)


@pytest.mark.parametrize(
    "fields",
    [{}, {**GPT2, "tied": False}, {"num_kv_heads": 2, "scan": True, "activation": "swiglu"}],
    ids=["default", "gpt2-untied", "groups-scan"],
)
def test_every_parameter_is_float32_and_names_its_axes(fields):
    axes, shapes = step.parameter_axes(build(**fields))
    for names, leaf in zip(
        jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
        jax.tree.leaves(shapes),
        strict=True,
    ):
        assert leaf.dtype == jnp.float32 and len(names) == len(leaf.shape)
        assert set(names) <= set(sharding.RULES), names


def test_the_head_is_the_embedding_or_its_own():
    for tied in (True, False):
        model = build(tied=tied)
        params = params_of(model)
        x, logits = compiled(model)(params, batch_of())
        assert ("head" in params) == (not tied)
        matrix = params["embed"]["embedding"].T if tied else params["head"]["kernel"]
        assert logits.shape == (B, L, 128) and logits.dtype == jnp.float32
        np.testing.assert_allclose(logits[..., :V], np.asarray(x) @ matrix[:, :V], atol=1e-4)
        assert (logits[..., V:] <= -1e9).all()


def test_the_soft_cap_bounds_the_logits_and_not_the_mask():
    plain, capped = build(), build(logit_softcap=1.0)
    _, before = compiled(plain)(params_of(plain), batch_of())
    _, after = compiled(capped)(params_of(plain), batch_of())
    assert np.abs(before[..., :V]).max() > 2
    np.testing.assert_allclose(after[..., :V], np.tanh(before[..., :V]), atol=1e-5)
    assert (after[..., V:] <= -1e9).all()


def test_learned_positions_are_added_and_rotary_ones_are_not_stored():
    """Another origin changes learned positions, and of rotary ones, which are relative, nothing."""
    batch = batch_of()
    batch["positions"] = np.minimum(batch["positions"], L - 4)  # all within the table when moved
    moved = {**batch, "positions": batch["positions"] + 3}
    learned, rotary = build(positions="learned"), build()
    assert params_of(learned)["position_embedding"].shape == (L, D)
    assert "position_embedding" not in params_of(rotary)
    assert np.abs(features(learned, moved) - features(learned, batch)).max() > 0.1
    np.testing.assert_allclose(features(rotary, moved), features(rotary, batch), atol=2e-5)
    shuffled = {**batch, "positions": batch["positions"][:, ::-1].copy()}
    assert np.abs(features(rotary, shuffled) - features(rotary, batch)).max() > 0.1


@pytest.mark.parametrize(
    "fields", [{}, {"residual_init": "zero", "scan": True}], ids=["scaled", "zero"]
)
def test_initialisation_follows_gpt2(fields):
    """Normal 0.02, by 1 / sqrt(2 layers) where a layer writes to the residual stream, else 0."""
    size = {"model_dim": 64, "num_layers": 3, "vocab_size": 512, "tied": False}
    model = build(**{**GPT2, **size, **fields})
    init = jax.jit(lambda: model.init(jax.random.key(0), batch_of(), method=both)["params"])
    residual = 0.0 if fields else 0.02 / 6**0.5
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(init())):
        name = sharding.path_name(path)
        if name.endswith(("scale", "bias")):
            np.testing.assert_array_equal(leaf, float(name.endswith("scale")), err_msg=name)
            continue
        std = residual if name.endswith(("out/kernel", "down/kernel")) else 0.02
        # Five standard errors of a standard deviation and of a mean.
        assert np.std(leaf) == pytest.approx(std, rel=5 / (2 * leaf.size) ** 0.5), name
        assert abs(np.mean(leaf)) <= 5 * std / leaf.size**0.5, name


def test_gpt2_small_has_its_published_number_of_parameters():
    """124,439,808 with 50,257 tokens; here the vocabulary is padded to 50,304."""
    cfg = models.resolve(gpt.Config(**GPT2), vocab_size=50_257, max_length=1024, packed=False)
    _, shapes = step.parameter_axes(models.build(cfg))
    assert step.count_parameters(shapes) - (50_304 - 50_257) * 768 == 124_439_808


def test_flops_by_hand():
    """Width 16, 4 heads of 4 (2 of keys), 2 layers, feed-forward 64, 50 -> 128 tokens, 10 keys."""
    qkv, out, mlp = 16 * (16 + 8 + 8), 16 * 16, 2 * 16 * 64
    matrices = 2 * (qkv + out + mlp) + 16 * 128
    cfg = build(num_kv_heads=2).cfg
    assert gpt.flops_per_token(cfg, 10) == 6 * matrices + 12 * 2 * 16 * 10
    windowed = build(num_kv_heads=2, window=4).cfg
    assert gpt.flops_per_token(windowed, 10) == 6 * matrices + 12 * 2 * 16 * 4
    gated = build(activation="swiglu", mlp_dim=40, head_dim=8, tied=False).cfg
    matrices = 2 * (3 * 16 * 32 + 32 * 16 + 3 * 16 * 40) + 16 * 128
    assert gpt.flops_per_token(gated, 10) == 6 * matrices + 12 * 2 * 32 * 10
    few = (
        6 * (matrices - 0.75 * 16 * 128) + 12 * 2 * 32 * 10
    )  # logits of a quarter of the positions
    assert gpt.flops_per_token(gated, 10, scored=0.25) == few


@pytest.mark.parametrize("bias_in", ["all", "attention", "mlp"])
def test_biases_are_where_they_are_asked_for(bias_in):
    params = params_of(build(bias=True, bias_in=bias_in, num_layers=1))["layers"]["block_0"]
    for part, names in (("attention", ("qkv", "out")), ("mlp", ("up", "down"))):
        for name in names:
            assert ("bias" in params[part][name]) == (bias_in in ("all", part)), (part, name)


def test_the_scaling_of_positions_reaches_attention():
    params = params_of(build())
    batch = batch_of()
    plain = features(build(), batch, params)
    for scaling in ("linear", "llama3", "yarn"):
        options = {"rope_scaling": scaling, "rope_factor": 2.0}
        assert build(**options).cfg.rotary.original_length == L / 2
        assert np.abs(features(build(**options), batch, params) - plain).max() > 1e-2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": "yarn"}, r"model\.rope_scaling='yarn': with model\.rope_factor=1\.0 it changes"),
        ({"rope_mscale": 2.0}, r"model\.rope_mscale=2\.0 and model\.rope_mscale_all_dim=0\.0: one alone"),
        ({"rope_scaling": "yarn", "rope_factor": 99.0, "max_length": 9}, r"model\.rope_factor=99\.0: more"),
    ],
)  # fmt: skip
def test_a_scaling_that_would_do_nothing_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        build(**fields)


def test_epsilon_reaches_every_norm():
    params, batch = params_of(build(num_layers=1)), batch_of()
    taken = {}

    def see(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if type(context.module).__name__ == "Norm":
            taken.setdefault(context.module.name, []).append(context.module.epsilon)
        return y

    with nn.intercept_methods(see):
        build(num_layers=1, norm_epsilon=0.125, qk_norm=False).apply({"params": params}, batch)
    assert taken == {"attention_norm": [0.125], "mlp_norm": [0.125], "norm": [0.125]}


def test_derived_sizes():
    derived = {"num_kv_heads": 4, "head_dim": 4, "mlp_dim": 64, "rope_original_length": L}
    assert build().cfg.sizes == derived
    given = {"num_kv_heads": 2, "head_dim": 6, "mlp_dim": 20, "rope_original_length": 3}
    assert build(**given).cfg.sizes == given
    gated = gpt.Config(activation="swiglu")
    assert gated.sizes["mlp_dim"] == 2048  # 8/3 of 768
    longer = build(rope_scaling="yarn", rope_factor=2.0)
    assert longer.cfg.sizes["rope_original_length"] == L // 2


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
    assert exact.dtype == jnp.float32
    assert 0 < np.abs(x.astype(jnp.float32) - exact).max() < 0.2
    assert hardware.compute_dtype("") == jnp.float32  # on a CPU


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": "sinus"},
        {"norm": "batchnorm"},
        {"activation": "tanh"},
        {"residual_init": "one"},
        {"remat": "all"},
        {"mask": "prefix"},
        {"kernel": "triton"},
        {"dtype": "float16"},
        {"num_layers": 0},
        {"model_dim": 0},
        {"num_heads": -1},
        {"num_heads": 5},
        {"num_kv_heads": 3},
        {"num_kv_heads": -2},
        {"head_dim": 3},
        {"head_dim": -4},
        {"mlp_dim": -1},
        {"vocab_size": -1},
        {"max_length": -1},
        {"window": -1},
        {"logit_softcap": -1.0},
        {"rope_base": 0.0},
        {"rope_base": 1.0},
        {"rope_scaling": "ntk"},
        {"rope_factor": 0.5},
        {"rope_original_length": -1},
        {"rope_low_frequency": 0.0},
        {"rope_high_frequency": 1.0},
        {"rope_beta_fast": 0.5},
        {"rope_beta_slow": 0.0},
        {"rope_attention_factor": -1.0},
        {"rope_mscale": -1.0},
        {"rope_mscale_all_dim": -1.0},
        {"norm_epsilon": 0.0},
        {"bias_in": "head"},
        {"dropout": 1.0},
        {"dropout": -0.1},
    ],
    ids=str,
)
def test_a_wrong_value_is_an_error_of_one_line_that_names_the_field(fields):
    ((field, value),) = fields.items()
    with pytest.raises(ConfigError) as error:
        build(**fields)
    assert f"model.{field}={value!r}" in str(error.value) and "\n" not in str(error.value)


def test_the_fused_kernel_is_refused_where_it_cannot_run():
    with pytest.raises(ConfigError, match=r"model\.kernel='cudnn'"):
        jax.eval_shape(lambda: build(kernel="cudnn").init(jax.random.key(0), batch_of()))
