"""Layers in stages are the layers in a loop, each device with its own, and a bubble as theory says."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lm import description, experiment, sharding
from lm.config import ConfigError
from lm.nn import pipeline

N, B, D = 8, 16, 8
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(0, 0.5, (N, D, D)).astype(np.float32)}
X = RNG.normal(size=(B, 3, D)).astype(np.float32)
SHIFT = RNG.normal(size=(B, 3, 1)).astype(np.float32)  # of each row
SCALE = np.full((1, 1, 1), 0.7, np.float32)  # of all rows


def layer(params, number, part, x, shift, scale):
    return x + jnp.tanh(x @ params["w"] + shift) * scale + number


def loop(params):
    x = X
    for number in range(N):
        x = layer({"w": params["w"][number]}, number, 0, x, SHIFT, SCALE)
    return x


def mesh_of(stage, data=1):
    config = sharding.Config(data=data, stage=stage)
    return sharding.make_mesh(config, jax.devices()[: stage * data])


def piped(params, **options):
    args = (jnp.asarray(SHIFT), jnp.asarray(SCALE))
    return pipeline.run(layer, params, jnp.asarray(X), args, **options)


@pytest.mark.parametrize(
    ("stages", "parts", "repeats", "data"),
    [(2, 4, 1, 1), (4, 4, 2, 1), (4, 1, 1, 1), (2, 8, 4, 2), (8, 2, 1, 1)],
)
def test_stages_are_the_loop(stages, parts, repeats, data):
    options = {"stages": stages, "parts": parts, "repeats": repeats}
    total = lambda function, params: jnp.square(function(params)).sum()  # noqa: E731
    expected = jax.jit(loop)(PARAMS)
    gradient = jax.jit(jax.grad(functools.partial(total, loop)))(PARAMS)
    function = functools.partial(piped, **options)
    with sharding.use(mesh_of(stages, data)):
        found = jax.jit(function)(PARAMS)
        others = jax.jit(jax.grad(functools.partial(total, function)))(PARAMS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    error = np.linalg.norm(others["w"] - gradient["w"]) / np.linalg.norm(gradient["w"])
    assert error < 1e-5


def test_each_device_has_its_stage_and_hands_on_what_it_made():
    """The parameters of a stage never move; rows pass between neighbours alone."""
    with sharding.use(mesh_of(4)) as mesh:
        placed = sharding.named_sharding(mesh, ("layers", None, None))
        function = jax.jit(
            functools.partial(piped, stages=4, parts=8), in_shardings=({"w": placed},)
        )
        compiled = function.lower(PARAMS).compile()
    names = re.findall(r" (all-[a-z]+|collective-permute|reduce-scatter)\(", compiled.as_text())
    assert "collective-permute" in names and "all-gather" not in names, names
    assert "all-to-all" not in names
    whole = PARAMS["w"].nbytes
    assert compiled.memory_analysis().argument_size_in_bytes == whole // 4


def test_the_bubble_is_of_turns_in_which_a_stage_has_nothing():
    """By hand: 4 stages and 8 parts take 11 turns, of which each stage works in 8."""
    assert pipeline.bubble(4, 8) == pytest.approx(3 / 11)
    assert pipeline.bubble(4, 8, 2) == pytest.approx(3 / 19)
    assert pipeline.bubble(1, 8) == 0
    lengths = []
    for parts, repeats in ((8, 1), (8, 2), (4, 1)):
        function = functools.partial(piped, stages=4, parts=parts, repeats=repeats)
        text = str(jax.make_jaxpr(function)(PARAMS))
        lengths.append(max(map(int, re.findall(r"length=(\d+)", text))))
    assert lengths == [11, 19, 7]  # of the scan over turns


def test_parts_divide_the_rows_of_a_device():
    assert pipeline.num_parts(16, 0, 2) == 8
    assert pipeline.num_parts(12, 0, 2) == 6
    assert pipeline.num_parts(12, 5, 2) == 4
    assert pipeline.num_parts(7, 5, 2) == 1
    with sharding.use(mesh_of(1, 4)):
        assert pipeline.num_parts(16, 0, 2) == 4
        assert pipeline.num_parts(6, 0, 2) == 6  # not split over devices


def test_the_parts_and_the_bubble_are_said(tiny):
    mesh = ConfigDict({"data": 2, "stage": 4})
    made = experiment.build(
        tiny(model__num_layers=4, model__scan=True, mesh=mesh, data__batch_size=16)
    )
    said = "4, through which a batch flows in 8 parts; idle 27% of the time"
    assert description.describe_stages(made) == said


@pytest.mark.parametrize(
    ("stages", "parts", "repeats", "message"),
    [(3, 4, 1, "8 layers do not divide"), (4, 2, 2, "flows in 2 parts through mesh.stage=4")],
)
def test_what_does_not_divide_is_refused(stages, parts, repeats, message):
    with pytest.raises(ConfigError, match=message):
        piped(PARAMS, stages=stages, parts=parts, repeats=repeats)
