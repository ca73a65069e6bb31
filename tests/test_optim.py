"""Optimizers and schedules: direction, end points, masks, placement, and Muon's matrices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import config, muon, optim, sharding

AXES = {
    "embed": {"embedding": ("vocab", "embed")},
    "blocks": {
        "attention": {
            "qkv": {"kernel": ("layers", "embed", "heads", "qkv", "kv")},
            "out": {"kernel": ("layers", "heads", "kv", "embed"), "bias": ("layers", "embed")},
        },
        "mlp": {
            "up": {"kernel": ("layers", "embed", "gate", "mlp"), "bias": ("layers", "gate", "mlp")},
            "down": {"kernel": ("layers", "mlp", "embed")},
        },
        "norm": {"scale": ("layers", "norm")},
    },
    "cell": {"recurrent": ("hidden_in", "gates", "hidden"), "bias": ("gates", "hidden")},
    "head": {"kernel": ("embed", "vocab")},
}
SIZES = {
    "vocab": 32, "embed": 16, "layers": 3, "heads": 4, "qkv": 3, "kv": 8, "gate": 2, "mlp": 24,
    "norm": 16, "hidden_in": 16, "gates": 4, "hidden": 16,
}  # fmt: skip
MATRICES = {
    "blocks/attention/qkv/kernel": ((1,), (2, 4)),
    "blocks/attention/out/kernel": ((1, 2), (3,)),
    "blocks/mlp/up/kernel": ((1,), (3,)),
    "blocks/mlp/down/kernel": ((1,), (2,)),
    "cell/recurrent": ((0,), (2,)),
}
is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
SHAPES = jax.tree.map(
    lambda names: jax.ShapeDtypeStruct(tuple(SIZES[n] for n in names), jnp.float32), AXES,
    is_leaf=is_axes,
)  # fmt: skip


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), SHAPES)


def build(num_steps=100, **fields):
    def to_steps(value, field):
        return config.to_steps(
            value, field=field, tokens_per_step=10, steps_per_epoch=7, num_steps=num_steps
        )

    cfg = optim.Config(**fields)
    return optim.build(cfg, num_steps=num_steps, to_steps=to_steps, params=SHAPES, axes=AXES)


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf for path, leaf in leaves}


def one_update(params, grads, **fields):
    tx, _ = build(schedule="constant", warmup=0, **fields)
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic(name):
    tx, _ = build(name=name, peak_lr=0.02, schedule="constant", warmup=0, clip_norm=0.0)
    params, target = random_tree(0), random_tree(1)

    def loss(p):
        errors = jax.tree.map(lambda a, b: jnp.mean((a - b) ** 2), p, target)
        return sum(jax.tree.leaves(errors))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before, state = loss(params), tx.init(params)
    for _ in range(100):
        params, state = step(params, state)
    assert loss(params) < 0.7 * before if name != "sgd" else loss(params) < 0.99 * before


ENDS = {
    "constant": 2e-3,
    "linear": 2e-4,
    "cosine": 2e-4,
    "wsd": 2e-4,
    "inverse_sqrt": 2e-3 * 0.1**0.5,
    "exponential": 2e-3 / 1.2**7,  # 42 steps of holding, then a fall every 7
}


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_every_schedule_hits_its_end_points(name):
    _, schedule = build(schedule=name, peak_lr=2e-3, warmup=10, decay="30%")
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(101)))
    np.testing.assert_allclose(rates[:11], 2e-3 * np.arange(1, 12) / 11, rtol=1e-6)
    np.testing.assert_allclose(rates[100], ENDS[name], rtol=1e-6)
    assert np.all(np.diff(rates[10:]) <= 0)
    if name == "wsd":
        np.testing.assert_allclose(rates[10:71], 2e-3, rtol=1e-6)
        assert rates[71] < 1.98e-3
    if name == "cosine":
        np.testing.assert_allclose(rates[55], 2e-3 * 0.55, rtol=1e-6)


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_run_of_a_step_has_a_rate(name, num_steps):
    _, schedule = build(num_steps, schedule=name)
    assert all(0 < schedule(step) <= 1e-3 for step in range(num_steps))


def test_an_exponential_schedule_holds_and_then_falls_by_a_factor_each_time():
    """The medium recipe of Zaremba et al. 2014: six epochs at 1, then each epoch 1.2 times smaller."""
    _, schedule = build(schedule="exponential", peak_lr=1.0, warmup=0)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(100)))
    epochs = np.arange(100) // 7
    np.testing.assert_allclose(rates, 1.2 ** -np.maximum(epochs - 5, 0.0), rtol=1e-6)
    fields = {"schedule": "exponential", "hold": 3, "fall_every": "20 tokens", "fall_factor": 0.5}
    _, schedule = build(**fields, peak_lr=1.0, warmup=0)
    rates = [float(schedule(step)) for step in range(8)]
    np.testing.assert_allclose(rates, [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125], rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    _, schedule = build(schedule="cosine", warmup=0)
    assert schedule(0) == np.float32(1e-3)


def test_gradients_are_clipped_together():
    params, grads = random_tree(0), random_tree(1)
    sgd = {"name": "sgd", "momentum": 0.0, "peak_lr": 1.0, "weight_decay": 0.0}
    norm = optax.tree.norm(grads)
    small = jax.tree.map(lambda g: g / norm, grads)
    clipped = one_update(params, grads, clip_norm=2.0, **sgd)
    np.testing.assert_allclose(optax.tree.norm(clipped), 2.0, rtol=1e-5)
    for ours, g in zip(jax.tree.leaves(clipped), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(ours, -2 * g, rtol=1e-5)
    untouched = one_update(params, small, clip_norm=2.0, **sgd)
    np.testing.assert_allclose(optax.tree.norm(untouched), 1.0, rtol=1e-5)


def test_decay_and_rate_follow_their_rules():
    params, zeros = random_tree(0), jax.tree.map(np.zeros_like, random_tree(0))
    fields = {"name": "adamw", "peak_lr": 0.5, "weight_decay": 0.1}
    decayed = by_name(one_update(params, zeros, **fields, lr_rules=(("mlp", 3.0), (".*", 1.0))))
    for name, p in by_name(params).items():
        matrix = name.endswith(("kernel", "recurrent"))
        expected = -0.5 * 0.1 * p * matrix * (3.0 if "mlp" in name else 1.0)
        np.testing.assert_allclose(decayed[name], expected, rtol=1e-5, err_msg=name)
    fields["weight_decay_rules"] = (("mlp/up", 0.5), (".*", 0.0))
    decayed = by_name(one_update(params, zeros, **fields))
    moved = {name for name, update in decayed.items() if np.any(np.asarray(update))}
    assert moved == {"blocks/mlp/up/kernel", "blocks/mlp/up/bias"}


def test_adam_has_no_decay():
    params, zeros = random_tree(0), jax.tree.map(np.zeros_like, random_tree(0))
    update = one_update(params, zeros, name="adam")
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(update))


@pytest.mark.parametrize("field", ["weight_decay_rules", "lr_rules"])
def test_a_parameter_that_no_rule_matches_is_named(field):
    with pytest.raises(config.ConfigError, match=f"optim.{field}.*cell/recurrent"):
        build(**{field: (("blocks|embed|head|bias", 1.0),)})


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "adam2"}, {"schedule": "cosin"}, {"peak_lr": 0.0}, {"beta1": 1.0},
        {"clip_norm": -1.0}, {"final_lr_fraction": 2.0}, {"ema_decay": 1.0},
        {"lr_rules": (("(", 1.0),)},
        {"weight_decay_rules": ((".*", -1.0),)}, {"muon_steps": 0}, {"fall_factor": 1.1},
        {"eps": 1e-39},
    ],
)  # fmt: skip
def test_bad_values_are_named(fields):
    with pytest.raises(config.ConfigError, match=rf"^optim\.{next(iter(fields))}="):
        optim.Config(**fields)


@pytest.mark.parametrize("fields", [{"warmup": 101}, {"schedule": "wsd", "decay": 101}])
def test_a_duration_longer_than_the_run_is_refused(fields):
    with pytest.raises(config.ConfigError, match="longer than the run of 100 steps"):
        build(**fields)


def test_muon_has_the_matrices_and_adam_the_rest():
    found = {name: tuple(m) for name, m in _matrices().items()}
    assert found == MATRICES
    tx, _ = build(name="muon")
    state = jax.eval_shape(tx.init, SHAPES)
    for name in by_name(SHAPES):
        kinds = {
            kind
            for kind in ("muon", "adam")
            for path in by_name(state)
            if f"/{kind}/" in f"/{path}" and path.endswith(name)
        }
        assert kinds == {"muon" if name in MATRICES else "adam"}, name


def _matrices():
    tree = muon.matrices(SHAPES, AXES)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=muon.is_matrix)
    return {sharding.path_name(path): matrix for path, matrix in leaves}


def test_muon_refuses_what_is_no_matrix():
    axes = {"odd": ("embed", "mlp", "hidden")}
    with pytest.raises(config.ConfigError, match=r"muon.*odd"):
        muon.matrices({"odd": jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)}, axes)


def test_muon_orthogonalises_each_matrix_apart_at_adamw_size():
    params, grads = random_tree(0), random_tree(1)
    # One layer's gradient much larger: were layers one matrix, the others' updates would vanish.
    grads["blocks"] = jax.tree.map(
        lambda g: g * np.array([100.0, 1, 1], g.dtype).reshape(-1, *(1,) * (g.ndim - 1)),
        grads["blocks"],
    )
    fields = {"name": "muon", "peak_lr": 1.0, "weight_decay": 0.0, "clip_norm": 0.0}
    updates = by_name(one_update(params, grads, **fields, muon_adam_lr_ratio=0.25))
    for name, (rows, columns) in MATRICES.items():
        update = np.asarray(updates[name])
        batch = [i for i in range(update.ndim) if i not in rows + columns]
        shape = [np.prod([update.shape[i] for i in side]) for side in (rows, columns)]
        stack = update.transpose(*batch, *rows, *columns).reshape(-1, *shape)
        singular = np.linalg.svd(stack, compute_uv=False) / (0.2 * max(shape) ** 0.5)
        assert singular.min() > 0.3 and singular.max() < 1.4, (name, singular)
        np.testing.assert_allclose(np.sqrt((update**2).mean()), 0.2, rtol=0.15, err_msg=name)
    for name, update in updates.items():
        if name not in MATRICES:
            np.testing.assert_allclose(np.abs(update), 0.25, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_equal_gradients_give_equal_updates_on_any_mesh(name):
    tx, _ = build(name=name)
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
    shardings = sharding.shardings(mesh, AXES, SHAPES)

    @jax.jit
    def run(params, all_grads):
        state = tx.init(params)
        for grads in all_grads:
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, updates

    inputs = random_tree(0), [random_tree(seed) for seed in (1, 2)]
    once, again = run(*inputs), run(*inputs)
    sharded = run(*jax.device_put(inputs, (shardings, [shardings] * 2)))
    for a, b, c in zip(*map(jax.tree.leaves, (once, again, sharded)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(c, a, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_elementwise_state_has_its_parameters_path_and_shape(name):
    tx, _ = build(name=name)
    shapes = {path: leaf.shape for path, leaf in by_name(SHAPES).items()}
    for path, leaf in by_name(jax.eval_shape(tx.init, SHAPES)).items():
        owner = [shape for param, shape in shapes.items() if path.endswith(f"/{param}")]
        if leaf.size > 3 and name != "adafactor":
            assert owner == [leaf.shape], path


def test_the_order_of_parameters_does_not_matter():
    params, grads = random_tree(0), random_tree(1)

    def turn(tree):
        return {k: turn(tree[k]) for k in reversed(tree)} if isinstance(tree, dict) else tree

    forward = one_update(params, grads, name="muon")
    backward = one_update(turn(params), turn(grads), name="muon")
    for name, update in by_name(forward).items():
        np.testing.assert_array_equal(by_name(backward)[name], update)


def test_eps_is_added_to_the_root():
    """So that a gradient of a thousand times eps is an update of its sign, not of a tenth of it."""
    for name in ("adamw", "rmsprop"):
        fields = {"momentum": 0.0} if name == "rmsprop" else {}
        tx, _ = build(name=name, schedule="constant", warmup=0, peak_lr=1.0, weight_decay=0.0, clip_norm=0.0,
                      **fields)  # fmt: skip
        params = random_tree(0)
        gradients = jax.tree.map(lambda p: np.full_like(p, 1e-5), params)
        updates, _ = tx.update(gradients, tx.init(params), params)
        for leaf in jax.tree.leaves(updates):
            np.testing.assert_allclose(leaf, -1 / (1 + 1e-3), rtol=1e-4)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(
        config.ConfigError, match=r"optim\.nesterov=True: there is no optim\.momentum"
    ):
        optim.Config(name="sgd", momentum=0.0, nesterov=True)


def test_adafactor_takes_each_scanned_layer_by_itself():
    rng = np.random.default_rng(0)
    scale = np.array([1e-3, 1.0, 50.0], np.float32)[:, None, None]
    params, grads = (scale * rng.normal(size=(3, 4, 6)).astype("f") for _ in range(2))

    def updates(params, grads, names):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        cfg = optim.Config(name="adafactor", warmup=0, clip_norm=0.0, weight_decay=0.0)
        axes = jax.tree.map(lambda _: names, params)
        tx, _ = optim.build(
            cfg, num_steps=10, to_steps=lambda value, _: 0, params=shapes, axes=axes
        )
        return tx.update(grads, tx.init(params), params)[0]

    together = updates({"kernel": params}, {"kernel": grads}, ("layers", "embed", "mlp"))["kernel"]
    alone = [
        updates({"kernel": p}, {"kernel": g}, ("embed", "mlp"))["kernel"]
        for p, g in zip(params, grads, strict=True)
    ]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_adafactors_factors_are_the_same_on_every_mesh(stacked):
    """Both axes are long enough to be factored, 128 and more."""
    rng = np.random.default_rng(1)
    shape, names = (2, 256, 384)[not stacked :], ("layers", "embed", "mlp")[not stacked :]
    params, *grads = (rng.normal(size=shape).astype("f") for _ in range(4))
    cfg = optim.Config(name="adafactor", warmup=0, clip_norm=0.0)
    described = {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}
    tx, _ = optim.build(
        cfg, num_steps=10, to_steps=lambda *_: 0, params=described, axes={"kernel": names}
    )

    def end(mesh):
        with sharding.use(mesh):
            place = sharding.named_sharding(mesh, names)
            values = {"kernel": jax.device_put(params, place)}
            state = jax.jit(tx.init)(values)
            kept = [leaf for leaf in jax.tree.leaves(state) if leaf.size == math.prod(shape)]
            assert not kept, "the second moments are factored"
            for grad in grads:
                updates, state = jax.jit(tx.update)(
                    {"kernel": jax.device_put(grad, place)}, state, values
                )
                values = jax.tree.map(jnp.add, values, updates)
            return np.asarray(values["kernel"])

    expected = end(sharding.make_mesh(sharding.Config(), jax.devices()[:1]))
    for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}):
        found = end(sharding.make_mesh(sharding.Config(**{"data": 1, **sizes})))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
