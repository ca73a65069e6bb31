"""What a step is on a slice of TPUs, compiled ahead of time: needs libtpu (the extra `tpu`), but no TPU.

`pip install libtpu && TPU_SKIP_MDS_QUERY=1 pytest -m slow -n 0 tests/test_tpu_program.py`
"""

import functools
import importlib.util
import math
import os
import re

import jax
import numpy as np
import optax
import pytest

from lm import models, sharding, step
from lm.models import gpt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed"),
]
ROWS, LENGTH, VOCAB = 16, 256, 512


@functools.cache
def program(**sizes):
    """Return the compiled step of a scanned gpt on a v5e slice of 4 x 2, and the bytes of its parameters."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    from jax.experimental import topologies

    slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x2")
    mesh = sharding.make_mesh(sharding.Config(**{"data": 1, **sizes}), slice_.devices)
    cfg = gpt.Config(num_layers=4, model_dim=512, num_heads=8, scan=True, dtype="bfloat16")
    model = models.build(models.resolve(cfg, vocab_size=VOCAB, max_length=LENGTH, packed=False))
    tx = optax.adam(1e-3)
    init = step.make_init(model, tx, seed=0, shape=(1, ROWS, LENGTH), average=False, stateful=False)
    objective = step.Objective(max_scored=LENGTH, vocab_size=VOCAB)
    with sharding.use(mesh):
        axes, shapes = step.parameter_axes(model)
        abstract = jax.eval_shape(init)
        placed = step.state_shardings(mesh, abstract, axes)
        described = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        rows = sharding.batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct((ROWS, LENGTH), np.int32, sharding=rows)
            for name in ("inputs", "targets", "segments", "positions")
        } | {"weights": jax.ShapeDtypeStruct((ROWS, LENGTH), np.float32, sharding=rows)}
        function = functools.partial(
            step.train_step, model=model, tx=tx, objective=objective, seed=0
        )
        jitted = jax.jit(function, donate_argnums=0, out_shardings=(placed, None))
        traced = jitted.trace(jax.tree.map(described, abstract, placed), batch)
        return traced.lower(lowering_platforms=("tpu",)).compile(), shapes


def sums(**sizes):
    """Return {kind: float32 bytes of the largest array} of what the program sums over devices.

    A TPU's reduce-scatter is a fusion of an all-reduce, whose result it does not keep; both spellings count.
    """
    found = {"all-reduce": 0, "reduce-scatter": 0}
    for computation in re.split(r"\n(?=(?:ENTRY )?%)", program(**sizes)[0].as_text()):
        scatters = computation.startswith("%all-reduce-scatter")
        for line in computation.splitlines():
            if "bf16[512,512]" in line or "f32[512,512]" in line:
                continue  # embedding and head, which are summed whole
            if match := re.search(r" = (.*?) (all-reduce|reduce-scatter)(?:-start)?\(", line):
                kind = "reduce-scatter" if scatters else match[2]
                of_each = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", match[1])
                most = max(
                    (4 * math.prod(map(int, dims.split(","))) for dims in of_each), default=0
                )
                found[kind] = max(found[kind], most)
    return found


KERNEL = 4 * 512 * 2048  # bytes of the gradient of the largest kernel of a layer


def test_fsdp_scatters_the_sums_of_gradients():
    """XLA on a CPU spells the partitioner's as an all-reduce and a slice; a TPU's is seen here alone."""
    found = sums(fsdp=8)
    assert found["reduce-scatter"] >= KERNEL / 8 and found["all-reduce"] < KERNEL / 8, found
    assert sums(data=8)["all-reduce"] >= KERNEL and sums(data=8)["reduce-scatter"] == 0


def test_hybrid_sharding_sums_parts_alone_between_groups():
    found = sums(dcn=2, fsdp=4)
    assert found["reduce-scatter"] >= KERNEL and found["all-reduce"] < KERNEL / 2, found
