"""What a step is on a slice of TPUs, compiled ahead of time: needs libtpu (the extra `tpu`), but no TPU.

`pip install libtpu && TPU_SKIP_MDS_QUERY=1 pytest -m slow -n 0 tests/test_tpu_program.py`
"""

import functools
import importlib.util
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


def count(kind, **sizes):
    return len(re.findall(rf" {kind}(?:-start)?\(", program(**sizes)[0].as_text()))


def test_fsdp_scatters_the_sums_of_gradients():
    """XLA on a CPU spells this as an all-reduce and a slice, so it can be seen here alone."""
    print(
        {
            k: count(k, fsdp=8)
            for k in (
                "reduce-scatter",
                "all-reduce",
                "all-gather",
                "all-to-all",
                "collective-permute",
            )
        }
    )
    print(
        {
            k: count(k, data=8)
            for k in (
                "reduce-scatter",
                "all-reduce",
                "all-gather",
                "all-to-all",
                "collective-permute",
            )
        }
    )
    compiled, shapes = program(fsdp=8)
    m = compiled.memory_analysis()
    print(m)
    text = compiled.as_text()
    for line in text.splitlines():
        if re.search(
            r" (reduce-scatter|all-reduce|all-gather|async-start|async-collective)[\w-]*\(", line
        ):
            print(line[:200])
