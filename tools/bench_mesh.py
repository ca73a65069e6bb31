"""Meshes in turns with one device: what `tools.bench --mesh` measures.

Each mesh is a process with as many devices as it has; on a CPU these are simulated and share its cores, so
that what is seen is the overhead of a scheme and not its speed-up.
"""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lm import config as config_lib
from lm import sharding
from lm.config import ConfigError
from lm.nn import pipeline
from tools import bench, launch
from tools.bench_pipe import Side, SideError

EXACT = "exact"
_DEVICES = "--xla_force_host_platform_device_count"


def parse(text: str, known: Sequence[str]) -> dict[str, int]:
    """Return the sizes of a mesh such as "fsdp=4,stage=2", and of "exact" the shards."""
    sizes = {}
    for item in text.split(","):
        name, _, size = item.partition("=")
        if name not in (*known, EXACT) or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"--mesh {text}: {item} is no axis and its size; write such as data=8 or fsdp=4,tensor=2, of "
                f"{', '.join(known)}, and exact=8 for train.exact_reduction"
            )
        sizes[name] = int(size)
    return sizes


def measure(config: Any, meshes: Sequence[str], *, steps: int, rounds: int) -> str:
    """Return in words how fast each mesh trains, over one device with the same batch."""
    from lm.experiment import SCHEMA

    known = sharding.ORDER
    asked = {"one device": dict[str, int](), **{text: parse(text, known) for text in meshes}}
    facts, turns = {}, {}
    with contextlib.ExitStack() as stack:
        for name, sizes in asked.items():
            count = math.prod(size for axis, size in sizes.items() if axis != EXACT)
            flags = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}={count}"
            own = {
                "XLA_FLAGS": flags,
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            }  # all are on one GPU
            if gpus := launch.visible_gpus(os.environ):
                own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:count])
            side = stack.enter_context(Side("tools.bench_ours", cores=(), **own))
            fields = {f"mesh.{axis}": size for axis, size in {"data": 1, **sizes}.items()}
            fields["train.exact_reduction"] = fields.pop(f"mesh.{EXACT}", 0)
            assignments = [f"{field}={value}" for field, value in fields.items()]
            text = config_lib.to_json(config_lib.override(config, assignments, SCHEMA))
            try:
                facts[name] = side.call("prepare", config=text, decode=False, started=0.0)
            except SideError as error:
                raise ConfigError(f"--mesh {name}: {error}") from error
            turns[name] = partial(side.call, "run", steps=steps)
        seconds = bench.take_turns(turns, rounds)
    return _describe(facts, asked, seconds, steps)


def _describe(
    facts: Mapping[str, Any],
    asked: Mapping[str, Mapping[str, int]],
    seconds: Mapping[str, list[float]],
    steps: int,
) -> str:
    one = seconds["one device"]
    lines = [f"device      {facts['one device']['device']}, jax {facts['one device']['jax']}"]
    for name, values in seconds.items():
        times = "{:.4g} [{:.4g}, {:.4g}] ms".format(
            *bench.spread([1e3 * v / steps for v in values])
        )
        ratios = [a / b for a, b in zip(one, values, strict=True)]
        shown = "{:.2f} [{:.2f}, {:.2f}] of one device's speed".format(*bench.spread(ratios))
        usual = ",".join(part for part in name.split(",") if not part.startswith(EXACT))
        if usual != name and usual in seconds:
            beside = [a / b for a, b in zip(values, seconds[usual], strict=True)]
            shown += "; {:.2f} [{:.2f}, {:.2f}] times as long as ".format(*bench.spread(beside))
            shown += usual
        lines.append(f"{name:24} {times}; {shown}{_bubble(facts[name]['shape'], asked[name])}")
        lines += [f"{'':24} {said}" for said in facts[name]["flags"]]
    return "\n".join(lines)


def _bubble(shape: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """Return what a pipeline of these sizes would lose to its bubble, where there is one."""
    stages = sizes.get("stage", 1)
    if stages == 1:
        return ""
    shards = math.prod(sizes.get(axis, 1) for axis in sharding.RULES["act_batch"])
    rows = shape["rows"] // shape["accumulate_steps"] // shards
    parts = pipeline.num_parts(rows, shape["microbatches"], stages)
    bubble = pipeline.bubble(stages, parts, shape["stage_repeats"])
    return f"; {parts} parts, of which the bubble leaves {1 - bubble:.2f}"
