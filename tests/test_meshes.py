"""What a step costs on each kind of mesh, by its compiled program."""

import functools
import itertools
import json
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from lm import models, placement, sharding, step
from lm.models import gpt

RECORD = Path(__file__).parent / "fixtures" / "collectives.json"
RENEW = "RENEW_COLLECTIVES=1 pytest -n 0 tests/test_meshes.py -k record"
RECIPES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "context": {"data": 2, "context": 4},
    "mixed": {"fsdp": 2, "tensor": 2, "context": 2},
}
LAYERS = {"num_layers": 2, "scan": True}
MOVES = {  # sizes, and fields of a model that has what they split
    **{name: (sizes, {}) for name, sizes in RECIPES.items()},
    "dcn": ({"dcn": 2, "fsdp": 4}, {}),
    "expert": ({"data": 2, "expert": 4}, {"num_experts": 4, "capacity_factor": 1.25}),
    "dropless": ({"data": 2, "expert": 4}, {"num_experts": 4, "capacity_factor": 0.0}),
    "stage": ({"stage": 2, "data": 4}, LAYERS),
    "stage and fsdp": ({"stage": 2, "fsdp": 2}, LAYERS),
    "stage and expert": ({"stage": 2, "expert": 2}, {"num_experts": 2, **LAYERS}),
}
ROWS, LENGTH, VOCAB = 16, 64, 99
VERSION = ".".join(jax.__version__.split(".")[:2])


@functools.cache
def of_recipe(recipe, **fields):
    """Return (mesh, abstract state, batch, places, model, optimizer, objective) of a small gpt."""
    sizes, needed = MOVES[recipe]
    sizes = {"data": 1, **sizes}
    mesh = sharding.make_mesh(sharding.Config(**sizes), jax.devices()[: math.prod(sizes.values())])
    fields = {"num_layers": 1, "model_dim": 64, "num_heads": 8, "mlp_dim": 512, **needed, **fields}
    cfg = gpt.Config(qk_norm=False, **fields)
    model = models.build(models.resolve(cfg, vocab_size=VOCAB, max_length=LENGTH, packed=True))
    tx = optax.adam(1e-3)
    init = step.make_init(model, tx, seed=0, shape=(1, ROWS, LENGTH), average=False, stateful=False)
    objective = step.Objective(max_scored=LENGTH, vocab_size=VOCAB)
    batch = {
        name: np.zeros((ROWS, LENGTH), np.int32)
        for name in ("inputs", "targets", "segments", "positions")
    }
    with sharding.use(mesh):
        axes, _ = step.parameter_axes(model)
        abstract = jax.eval_shape(init)
        placed = step.state_shardings(mesh, abstract, axes)
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            placed,
        )
        batch = placement.place_batch(
            mesh, batch | {"weights": np.ones((ROWS, LENGTH), np.float32)}
        )
        return mesh, abstract, batch, placed, model, tx, objective


@functools.cache
def gradients_of(recipe, **fields):
    """Return the lowered gradient of a recipe's loss."""
    mesh, abstract, batch, _, model, _, objective = of_recipe(recipe, **fields)

    def loss(params, batch):
        return step.forward(model, {"params": params}, batch, objective)[0]

    with sharding.use(mesh):
        return jax.jit(jax.grad(loss)).lower(abstract.params, batch)


@functools.cache
def compiled(recipe):
    """Return the compiled step of a recipe."""
    mesh, abstract, batch, placed, model, tx, objective = of_recipe(recipe)
    function = functools.partial(step.train_step, model=model, tx=tx, objective=objective, seed=0)
    with sharding.use(mesh):
        whole = jax.jit(function, donate_argnums=0, out_shardings=(placed, None))
        return whole.lower(abstract, batch).compile()


def collectives(recipe):
    """Return {"kind over axes": [count, bytes of the results on one device]} of the compiled step."""
    mesh, program = of_recipe(recipe)[0], compiled(recipe)
    places = dict(enumerate(itertools.product(*map(range, mesh.devices.shape))))
    found: dict[str, list[int]] = {}
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in program.as_text().splitlines():
        match = re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line)
        if not match:
            continue
        groups = groups_of(line, mesh.size)
        axes = {
            name
            for group in groups
            for numbers, name in zip(
                zip(*[places[device] for device in group], strict=True),
                mesh.axis_names,
                strict=True,
            )
            if len(set(numbers)) > 1
        }
        over = "*".join(name for name in mesh.axis_names if name in axes) or "nothing"
        entry = found.setdefault(f"{match[2]} over {over}", [0, 0])
        entry[0] += 1
        entry[1] += sum(
            int(bits) // 8 * math.prod(int(size) for size in dims.split(",") if size)
            for bits, dims in re.findall(
                r"[a-z]+(\d+)\[([\d,]*)\]", match[1].replace("pred[", "s8[")
            )
        )
    return dict(sorted(found.items()))


def groups_of(line, size):
    """Return the groups of devices that a line of a compiled program speaks of: XLA has three ways to."""
    integers = lambda text: [int(n) for n in re.findall(r"\d+", text or "")]  # noqa: E731
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return [integers(group) for group in match[1].split("},{")]
    if match := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\])(T\([\d,]+\))?", line):
        shape, dims, order = map(integers, match.groups())
        return np.arange(size).reshape(dims).transpose(order or None).reshape(shape).tolist()
    form = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\])T(\([\d,]+\))\))? \{([^}]*)\}"
    named, dims, order, over = re.search(form, line).groups()
    assert ":" not in over, line  # a part of an axis, which no recipe has
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", named), strict=True)
    last = [names.index(name) for name in re.findall(r"'(\w+)'", over)]
    first = [axis for axis in range(len(names)) if axis not in last]
    devices = np.arange(size).reshape(integers(dims) or -1).transpose(integers(order) or None)
    devices = devices.reshape([int(number) for number in sizes]).transpose(first + last)
    return devices.reshape(-1, math.prod(int(sizes[axis]) for axis in last)).tolist()


@pytest.mark.parametrize("recipe", MOVES)
def test_a_step_moves_what_is_on_record(recipe):
    """An all-gather too many fails here. Versions of XLA join and repeat collectives differently."""
    record, found = json.loads(RECORD.read_text()), collectives(recipe)
    if "RENEW_COLLECTIVES" in os.environ:
        record.setdefault(VERSION, {})[recipe] = found
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    if recipe not in record.get(VERSION, {}):
        missing = pytest.fail if "CI" in os.environ else pytest.skip
        missing(f"jax {VERSION} has no record of mesh {MOVES[recipe]}: {RENEW}")
    assert found == record[VERSION][recipe], (
        f"a step of mesh {MOVES[recipe]} moves other arrays than on record; if it should: {RENEW}"
    )


@pytest.mark.parametrize("recipe", ["stage and fsdp", "stage and expert"])
def test_stages_go_together_with_the_other_axes(recipe):
    """A rule of a gradient is traced outside of what its function is mapped over."""
    mesh, gradients = of_recipe(recipe)[0], gradients_of(recipe)
    assert mesh.size == 4 and "sdy.manual_computation" in gradients.as_text()


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_memory_is_what_the_scheme_says(recipe):
    """A device has 1 / (fsdp tensor) of parameters, gradients and moments, and its part of a batch."""
    mesh, abstract, *_ = of_recipe(recipe)
    gradients = gradients_of(recipe)
    sizes = mesh.shape
    ways = sizes["fsdp"] * sizes["tensor"]
    parts = sizes["data"] * sizes["fsdp"] * sizes["context"]
    batch = 5 * 4 * ROWS * LENGTH / parts
    params = bytes_of(abstract.params) / ways
    moments = bytes_of(abstract.opt_state) / ways
    memory = compiled(recipe).memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(params + moments + batch, rel=0.05)
    assert memory.alias_size_in_bytes == pytest.approx(params + moments, rel=0.05)  # in place
    memory = gradients.compile().memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(params + batch, rel=0.05)
    assert memory.output_size_in_bytes == pytest.approx(params, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_activations_are_what_the_scheme_says(recipe, remat):
    """A layer more keeps its input, with "dots" what its products give too, of a device's part of the batch.

    What is whole between products (queries, keys and values, the MLP's width F) tensor splits by heads and F,
    and what is of the model's width D by positions.
    """
    temporary = []
    for num_layers in (4, 8):
        gradients = gradients_of(recipe, num_layers=num_layers, scan=True, remat=remat)
        temporary.append(gradients.compile().memory_analysis().temp_size_in_bytes)
    D, F = 64, 512
    widths = D if remat == "full" else D + 3 * D + D + F
    expected = 4 * ROWS * LENGTH * widths / 8
    if (fsdp := RECIPES[recipe].get("fsdp", 1)) > 1:  # XLA lays its kernels out for gathering, once
        expected += 4 * (4 * D * D + 2 * D * F) / (fsdp * RECIPES[recipe].get("tensor", 1))
    assert (temporary[1] - temporary[0]) / 4 == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_positions_are_split_over_tensor_between_layers(monkeypatch):
    """Korthikanti et al. 2022: what a layer's ends keep is split too."""
    split = compiled("tensor").memory_analysis().temp_size_in_bytes
    monkeypatch.setitem(sharding.RULES, "act_length_norm", sharding.RULES["act_length"])
    whole = compiled.__wrapped__("tensor").memory_analysis().temp_size_in_bytes
    assert split < 0.8 * whole
