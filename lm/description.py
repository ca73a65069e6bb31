"""What an experiment is, in words: its config, parameters, costs and a batch."""

import math

import jax
import numpy as np

from lm import config as config_lib
from lm import experiment, sharding, step
from lm.data import pipeline
from lm.nn import pipeline as flow


def describe(made: experiment.Experiment) -> str:
    """Return the resolved config, the table of parameters, the FLOPs and one batch in words."""
    placed = sharding.shardings(made.mesh, made.axes, made.shapes)
    rows = [("parameter", "shape", "axes", "bytes/device")]
    total = 0
    for (path, leaf), axes, place in zip(
        jax.tree_util.tree_leaves_with_path(made.shapes),
        jax.tree.leaves(made.axes, is_leaf=lambda leaf: isinstance(leaf, tuple)),
        jax.tree.leaves(placed),
        strict=True,
    ):
        size = math.prod(place.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        total += size
        rows.append((sharding.path_name(path), str(leaf.shape), " ".join(axes), f"{size:,}"))
    rows.append(("all", f"{step.count_parameters(made.shapes):,} parameters", "", f"{total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    abstract = experiment.jitted(made)[-1]
    state = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(abstract)
    )
    return "\n\n".join(
        [
            config_lib.to_json(made.config).rstrip(),
            table,
            f"mesh: {sharding.shown(made.mesh)}; {made.num_steps} steps of {made.tokens_per_step:,} tokens; "
            f"{made.flops_per_position:.3g} training FLOPs a position; the state takes "
            f"{state / 2**30:.3f} GiB a device (gradients and activations come on top)",
            describe_batch(made),
        ]
    )


def describe_stages(made: experiment.Experiment) -> str:
    """Return in how many parts a batch flows through the stages of the mesh; "" where there are none."""
    stages, model = sharding.ways(made.mesh, "layers"), made.cfg["model"]
    if stages == 1:
        return ""
    rows = made.cfg["data"].batch_size // made.cfg["train"].accumulate_steps
    parts = flow.parts_of(rows // sharding.batch_shards(made.mesh), model.microbatches, stages)
    idle = flow.bubble(stages, parts, model.stage_repeats)
    return f"{stages}, through which a batch flows in {parts} parts; idle {idle:.0%} of the time"


def describe_batch(made: experiment.Experiment, width: int = 0) -> str:
    """Return the first row of the first batch in words, lines cut to `width` (0 = whole)."""
    return pipeline.describe_batch(made.batches[0], made.corpus.tokenizer, width=width)
