"""Moments in bfloat16: computed in float32, half the bytes, resumed, refused where they would not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import config, description, experiment, moments, optim, sharding, train, workdir
from lm.stored import flatten
from tests.test_optim import AXES, SHAPES, build, by_name, random_tree
from tests.test_train import StopAfter, arrays_of, assert_same_run

NARROW = {"moments_dtype": "bfloat16"}
NAMES = sorted(moments.DECAYS)


def rounded(state):
    """Return `state` as bfloat16 would hold it, in float32: what has a parameter's path and shape."""
    shapes = {name: leaf.shape for name, leaf in by_name(SHAPES).items()}

    def one(path, leaf):
        name = sharding.path_name(path)
        if any(name.endswith(f"/{param}") and leaf.shape == shapes[param] for param in shapes):
            return leaf.astype(jnp.bfloat16).astype(jnp.float32)
        return leaf

    return jax.tree.map_with_path(one, state)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_computed_in_float32_from_what_is_stored(name):
    """Three updates are those of float32 whose state is rounded after each: to the bit."""
    fields = {"name": name, "schedule": "constant", "warmup": 0}
    narrow, wide = build(**fields, **NARROW)[0], build(**fields)[0]
    params = random_tree(0)
    state, reference = narrow.init(params), wide.init(params)
    for seed in (1, 2, 3):
        grads = random_tree(seed)
        # Not jitted: XLA would fuse the two otherwise, and round in other places.
        ours, state = narrow.update(grads, state, params)
        theirs, reference = wide.update(grads, rounded(reference), params)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for path, leaf in by_name(state).items():
        moment = any(path.endswith(f"/{param}") for param in by_name(SHAPES))
        assert (leaf.dtype == jnp.bfloat16) == moment, path


@pytest.mark.parametrize("name", NAMES)
def test_a_moment_that_may_be_stored_can_fall(name):
    """At the largest decay that is taken every moment of a parameter without gradient falls in each step."""
    largest = dict.fromkeys(moments.DECAYS[name], 1 - moments.STEP)
    cfg = optim.Config(name=name, **largest, **NARROW)
    tx = moments.stored_as("bfloat16", optim.OPTIMIZERS[name](cfg, SHAPES, AXES), SHAPES)
    spread = jnp.linspace(1.0, 2.0, 200)
    state = jax.tree.map(
        lambda x: jnp.resize(spread, x.shape).astype(x.dtype) if x.dtype == jnp.bfloat16 else x,
        tx.init(random_tree(0)),
    )
    zeros = jax.tree.map(np.zeros_like, random_tree(0))
    _, after = jax.jit(tx.update)(zeros, state, random_tree(0))
    for (path, old), new in zip(by_name(state).items(), jax.tree.leaves(after), strict=True):
        if old.dtype == jnp.bfloat16:
            assert (new < old).all(), path


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "adamw", "beta2": 0.999}, r"optim\.beta2=0\.999.*at most 0\.992, or"),
        ({"name": "adam", "beta1": 0.995}, r"optim\.beta1=0\.995"),
        ({"name": "rmsprop", "momentum": 0.999}, r"optim\.momentum=0\.999"),
        ({"name": "lion", "beta2": 0.999}, r"optim\.beta2=0\.999"),
        ({"name": "muon", "muon_momentum": 0.995}, r"optim\.muon_momentum"),
        ({"name": "sgd", "momentum": 0.0}, r"has no moments; use ''"),
        ({"name": "adafactor"}, r"optim\.name='adafactor'.*use ''"),
    ],
)
def test_what_bfloat16_cannot_hold_is_refused(fields, named):
    with pytest.raises(config.ConfigError, match=rf"^optim\.moments_dtype='bfloat16': .*{named}"):
        optim.Config(**fields, **NARROW)
    optim.Config(**fields)


def test_another_type_is_refused():
    with pytest.raises(config.ConfigError, match=r"optim\.moments_dtype='float16': choose one of"):
        optim.Config(moments_dtype="float16")


def test_decays_name_what_the_optimizers_use():
    """A new optimizer is in the table, or is refused."""
    assert set(moments.DECAYS) == set(optim.OPTIMIZERS) - {"adafactor"}
    fields = {field for decays in moments.DECAYS.values() for field in decays}
    for field in fields:
        names = optim.Config.ONLY_FOR[field][1]
        used = {name for name in moments.DECAYS if field in moments.DECAYS[name]}
        assert used <= set(names)


@pytest.mark.parametrize("fsdp", [1, 8])
def test_a_device_holds_half_the_bytes_and_says_so(tiny, fsdp):
    """AdamW's two moments: 12 bytes a parameter, of parameter and moments, are 8."""
    said = {}
    for dtype in ("", "bfloat16"):
        config_of = tiny(mesh={"data": 1 if fsdp == 8 else -1, "fsdp": fsdp}, model__model_dim=512)
        config_of.optim.moments_dtype = dtype
        made = experiment.build(config_of)
        abstract = experiment.jitted(made)[-1]
        per_device = {
            name: sum(
                np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(tree)
            )
            for name, tree in (("params", abstract.params), ("moments", abstract.opt_state))
        }
        assert per_device["moments"] == pytest.approx(
            per_device["params"] * (1 if dtype else 2), abs=64
        )
        text = description.describe(made)
        said[dtype] = float(text.split("the state takes ")[1].split()[0])
    assert said["bfloat16"] == pytest.approx(said[""] * 2 / 3, abs=1e-3)


def test_a_run_resumes_bit_for_bit(tiny, tmp_path, monkeypatch):
    config_of = tiny()
    config_of.optim.moments_dtype = "bfloat16"
    train.run(config_of, tmp_path / "whole")
    StopAfter(monkeypatch, 3)
    with pytest.raises(train.Interrupted):
        train.run(config_of, tmp_path / "cut")
    monkeypatch.undo()
    train.run(config_of, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 6)
    dtypes = {name: array.dtype for name, array in arrays_of(tmp_path / "cut", 6).items()}
    stored = {name for name, dtype in dtypes.items() if dtype == jnp.bfloat16}
    assert stored and all("opt_state" in name for name in stored)
    assert all(("mu." in name or "nu." in name) == (name in stored) for name in dtypes)


@pytest.mark.parametrize(("before", "after"), [("", "bfloat16"), ("bfloat16", "")])
def test_a_run_goes_on_with_the_other_type_and_says_so(tiny, tmp_path, capsys, before, after):
    """What was stored is converted: to bfloat16 rounded, to float32 as it is."""
    first, second = tiny(train__num_steps=2), tiny(train__num_steps=2)
    first.optim.moments_dtype, second.optim.moments_dtype = before, after
    train.run(first, tmp_path)
    old = arrays_of(tmp_path, 2)
    made = experiment.build(second)
    workdir.check_resume(tmp_path, made)
    assert f"resuming with optim.moments_dtype: {before!r} -> {after!r}" in capsys.readouterr().out
    with sharding.use(made.mesh):
        abstract = experiment.jitted(made)[-1]
        saver = train.checkpoint.Checkpointer(tmp_path, made.cfg["checkpoint"])
        state = saver.restore_latest(abstract)
        saver.close()
    for name, leaf in flatten(state).items():
        expected = old[name].astype(leaf.dtype)
        np.testing.assert_array_equal(np.asarray(leaf), expected, err_msg=name)
    assert train.run(tiny(train__num_steps=2, optim=second.optim), tmp_path)
