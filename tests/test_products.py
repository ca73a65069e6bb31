"""model.matmul_dtype=fp8: what a step computes, on every mesh and way to stack layers; emulated on a CPU."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from lm import checkpoint, experiment, hardware, models, placement, sharding, step, train
from lm.config import ConfigError
from tests.models.test_conformance import LENGTH, TINY, VOCAB, build
from tests.nn.test_fp8 import E4M3, E5M2
from tests.test_precision import prepared
from tests.test_train import StopAfter, assert_same_run, rows_of

FAMILIES = [name for name in TINY if hasattr(models.config_class(name), "matmul_dtype")]
PROJECTIONS = {
    "gpt": 4,
    "bert": 4,
    "linear_rnn": 5,
    "t5": 4 + 7,
}  # of a layer, or of one of each kind
KERNELS = r"(qkv|out|up|down|query|key_value|query_key|value_gate)/kernel$"


@pytest.fixture(autouse=True)
def emulated(request, monkeypatch):
    """XLA computes these products on a CPU too, slowly; users are refused."""
    if "refused" not in request.node.name:
        monkeypatch.setattr(hardware, "has_fp8", lambda: True)


def one_device():
    return sharding.make_mesh(sharding.Config(), jax.devices()[:1])


def products(text):
    """Return (type of the left, type of the right, of the result) of every product of a lowered program."""
    form = r"dot_general .*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>"
    return re.findall(form, text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_projection_of_a_block_has_three_products_of_8_bits(name, dtype):
    """e4m3 times e4m3 forward; backward e5m2, the gradient of a kernel given in float32. Off: not one."""
    for matmul_dtype, count in (("fp8", 2 * PROJECTIONS[name]), ("", 0)):
        model = build(name, dtype=dtype, matmul_dtype=matmul_dtype)
        mesh = one_device()
        with sharding.use(mesh):
            abstract, batch, jitted = prepared(model, mesh)
            text = jitted.lower(abstract, batch).as_text()
        found = products(text)
        narrow = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        e4m3, e5m2 = "f8E4M3FN", "f8E5M2"
        assert found.count((e4m3, e4m3, narrow)) == count
        back = [found.count((e5m2, e4m3, narrow)), found.count((e4m3, e5m2, "f32"))]
        assert back == [count, count] and len(found) > 3 * count
        assert ("f8E" in text) == bool(count)


@functools.cache
def gradients(name, matmul_dtype, mesh_sizes=(), **fields):
    """Return (loss, gradients) of a batch of some models."""
    mesh = one_device()
    if mesh_sizes:
        count = int(np.prod([size for _, size in mesh_sizes]))
        mesh = sharding.make_mesh(
            sharding.Config(**{"data": 1, **dict(mesh_sizes)}), jax.devices()[:count]
        )
    model = build(name, matmul_dtype=matmul_dtype, dtype="float32", **fields)
    objective = step.Objective(max_scored=LENGTH, vocab_size=VOCAB)
    with sharding.use(mesh):
        _, batch, _ = prepared(model, mesh)
        axes, shapes = step.parameter_axes(model)
        placed = sharding.shardings(mesh, axes, shapes)
        init = lambda: nn.unbox(step.init_variables(model, jax.random.key(0)))["params"]  # noqa: E731
        params = jax.jit(init, out_shardings=placed)()

        def loss(params):
            total, (_, _, sums) = step.forward(model, {"params": params}, batch, objective)
            return total / sums["loss"][1]

        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        return float(value), jax.device_get(grads)


def apart(found, wanted):
    """Return the relative difference of two trees, as one vector each."""
    return float(optax.tree.norm(optax.tree.sub(found, wanted)) / optax.tree.norm(wanted))


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_near_those_of_float32(name):
    """A product is off by 4 to 6 of 100 (tests/nn/test_fp8.py), to either side; and they are not the same."""
    (loss, grads), (wanted, expected) = (
        gradients(name, matmul_dtype, num_layers=1) for matmul_dtype in ("fp8", "")
    )
    assert loss == pytest.approx(wanted, rel=0.01) and loss != wanted
    errors = [
        apart(found, leaf)
        for (path, found), leaf in zip(
            jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
        )
        if re.search(KERNELS, sharding.path_name(path))
    ]
    assert len(errors) == PROJECTIONS[name]
    # What a kernel's gradient is made of went through each product of a layer once, forward or back.
    through = np.hypot(E4M3, E4M3) ** 2 + np.hypot(E4M3, E5M2) ** 2
    assert np.median(errors) > 0.03 and max(errors) < np.sqrt(through * PROJECTIONS[name])


def tupled(**sizes):
    return tuple(sizes.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        (tupled(data=4), {}),
        (tupled(fsdp=4), {}),
        (tupled(data=2, tensor=2), {}),
        (tupled(data=2, context=2), {}),
        (tupled(stage=2, data=2), {"scan": True}),
        (tupled(fsdp=2), {"scan": True, "remat": "full"}),
    ],
)
def test_on_a_mesh_and_in_stages_it_is_what_one_device_computes(sizes, fields):
    """But that a number between two of 8 bits may go to the other: then it is off by a sixteenth of itself.

    So the bound is a tenth of what 8 bits cost, and what float32 gives is further away.
    """
    loss, grads = gradients("gpt", "fp8", sizes, **fields)
    wanted, expected = gradients("gpt", "fp8", (), **({"scan": True} if fields else {}))
    assert loss == pytest.approx(wanted, rel=2e-4)
    assert apart(grads, expected) < 0.01


@pytest.mark.slow
def test_two_ways_to_split_a_batch_agree_to_the_bit():
    """The largest number of a tensor is the same, whatever the order in which devices look for it."""
    (loss, grads), (other, others) = (
        gradients("gpt", "fp8", sizes) for sizes in (tupled(data=4), tupled(fsdp=4))
    )
    assert loss == other
    jax.tree.map(np.testing.assert_array_equal, grads, others)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_computed_again_is_the_same(remat):
    (loss, grads), (other, others) = gradients("gpt", "fp8", remat=remat), gradients("gpt", "fp8")
    assert loss == pytest.approx(other, rel=1e-6)
    assert apart(grads, others) < 0.01


def run_of(tiny, matmul_dtype, **overrides):
    config = tiny(**overrides)
    config.model.matmul_dtype, config.model.dtype = matmul_dtype, "bfloat16"
    return config


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(tiny, tmp_path, monkeypatch):
    config = run_of(tiny, "fp8", train__accumulate_steps=1)
    train.run(config, tmp_path / "whole")
    StopAfter(monkeypatch, 3)
    with pytest.raises(train.Interrupted):
        train.run(config, tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr(hardware, "has_fp8", lambda: True)
    train.run(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 6)


@pytest.mark.slow
def test_the_loss_goes_down_as_that_of_bfloat16(tiny, tmp_path):
    losses = {}
    for name in ("fp8", ""):
        config = run_of(tiny, name, train__num_steps=60, eval__every_steps=0)
        config.checkpoint.every_steps = 0
        train.run(config, tmp_path / f"run{name}")
        rows = rows_of(tmp_path / f"run{name}")
        losses[name] = np.array([row["train/loss"] for row in rows if "train/loss" in row])
    fp8, wide = losses["fp8"], losses[""]
    assert wide[-5:].mean() < 0.6 * wide[0]
    np.testing.assert_allclose(fp8[-5:].mean(), wide[-5:].mean(), rtol=0.03)
    assert not np.array_equal(fp8, wide)


def test_parts_of_a_batch_are_scaled_apart_and_add_up(tiny):
    """One step's loss and the norm of its gradient, with and without accumulation."""
    seen = []
    for parts in (1, 4):
        config = run_of(tiny, "fp8", train__accumulate_steps=parts, data__batch_size=32)
        made = dataclasses.replace(experiment.build(config), mesh=one_device())
        with sharding.use(made.mesh):
            init, train_step, _, _ = experiment.jitted(made)
            _, sums = train_step(init(), placement.place_batch(made.mesh, made.batches[0]))
        seen.append([float(sums["loss"][0]), float(sums["grad_norm"][0])])
    np.testing.assert_allclose(*seen, rtol=0.01)


def test_a_cpu_is_refused_in_a_line_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^model\.matmul_dtype='fp8': needs .*this is cpu"
    ) as error:
        train.run(run_of(tiny, "fp8"), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_experts_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"^model\.matmul_dtype='fp8': .*model\.num_experts=4"):
        build("gpt", num_experts=4, matmul_dtype="fp8")


def test_what_was_trained_so_is_read_by_a_device_without(tiny, tmp_path, monkeypatch, capsys):
    """With a notice: parameters are float32, and products then as wide as the computation."""
    train.run(run_of(tiny, "fp8", train__num_steps=2), tmp_path)
    capsys.readouterr()
    assert checkpoint.load(tmp_path).model.cfg.matmul_dtype == "fp8"
    assert not capsys.readouterr().err
    monkeypatch.setattr(hardware, "has_fp8", lambda: False)
    assert checkpoint.load(tmp_path).model.cfg.matmul_dtype == ""
    assert "model.matmul_dtype='fp8' is not for this device" in capsys.readouterr().err
