"""What is saved on one mesh comes back on any other, bit for bit, split as that one says, and again."""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from lm import checkpoint, experiment, placement, sharding, stored
from lm.nn.transformer import SCANNED

pytestmark = pytest.mark.slow

DENSE = [
    {"data": 1}, {"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"context": 8}, {"stage": 4, "data": 2},
    {"expert": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2},
    {"stage": 2, "fsdp": 2, "tensor": 2},
]  # fmt: skip
EXPERTS = [
    {"data": 1}, {"expert": 8}, {"data": 2, "expert": 4}, {"fsdp": 4, "tensor": 2},
    {"expert": 2, "fsdp": 2, "tensor": 2},
]  # fmt: skip
KINDS = {"dense": (DENSE, {}), "experts": (EXPERTS, {"num_experts": 8, "expert_dim": 64})}


class Side(NamedTuple):
    """A run on one mesh: the abstract state, and what it was after two steps."""

    mesh: Any
    abstract: Any
    train_step: Any
    batch: Any  # of the third step
    state: Any
    arrays: dict  # of `state`, by name, on the host
    loss: float  # of the third step


@pytest.fixture(scope="module")
def sides(text_file):
    """Return a function from a kind and the number of a mesh to its `Side`, made once."""

    @functools.cache
    def side(kind, number):
        meshes, fields = KINDS[kind]
        made, mesh = built(text_file, meshes[number], fields)
        with sharding.use(mesh):
            init, train_step, _, abstract = experiment.jitted(made)
            batches = [placement.place_batch(mesh, made.batches[step]) for step in range(3)]
            # Not donated, so that one state may be saved as often as is wanted; it refuses other places.
            places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            train_step = jax.jit(train_step.__wrapped__, out_shardings=(places, None))
            train_step = train_step.lower(abstract, batches[0]).compile()
            # One program at a time: simulated devices that run two can wait for each other for ever.
            if number:  # the same state, in other places
                state = jax.block_until_ready(jax.device_put(side(kind, 0).state, places))
            else:
                state = jax.block_until_ready(init())
                for batch in batches[:2]:
                    state, _ = jax.block_until_ready(train_step(state, batch))
            found = Side(mesh, abstract, train_step, batches[2], state, on_host(state), 0.0)
        return found._replace(loss=loss_after(found, state))

    return side


def built(text_file, sizes, fields, **model):
    """Return (experiment, mesh) of a small gpt; one device is a mesh of the first alone."""
    config = {
        "data": {"path": (str(text_file),), "tokenizer": "byte", "batch_size": 16},
        "task": {"length": 16},
        "model": {
            "num_layers": 4, "model_dim": 64, "num_heads": 8, "scan": True, **fields, **model
        },
        "optim": {"name": "adamw", "peak_lr": 1e-2},
        "train": {"num_steps": 3},
        "mesh": {"data": 1, **(sizes if math.prod(sizes.values()) > 1 else {"data": 8})},
    }  # fmt: skip
    made = experiment.build(experiment.ConfigDict(config, type_safe=False))
    if math.prod(sizes.values()) > 1:
        return made, made.mesh
    mesh = sharding.make_mesh(sharding.Config(), jax.devices()[:1])
    return dataclasses.replace(made, mesh=mesh), mesh


def on_host(state):
    return {name: np.asarray(leaf) for name, leaf in stored.flatten(state).items()}


def loss_after(side, state):
    """Return the loss of one more step."""
    with sharding.use(side.mesh):
        _, sums = jax.block_until_ready(side.train_step(state, side.batch))
    return float(sums["loss"][0] / sums["loss"][1])


def save(folder, state):
    saver = checkpoint.Checkpointer(folder, checkpoint.Config())
    saver.save(2, state, {})
    saver.close()
    return folder


def restore(folder, abstract):
    saver = checkpoint.Checkpointer(folder, checkpoint.Config())
    restored = saver.restore_latest(abstract)
    saver.close()
    return restored


def assert_same(state, arrays, abstract):
    """Compare bits with what was saved, and places with what the mesh says."""
    found, wanted = stored.flatten(state), stored.flatten(abstract)
    assert found.keys() == arrays.keys() == wanted.keys()
    for name, leaf in found.items():
        assert leaf.sharding == wanted[name].sharding, name
        assert leaf.dtype == arrays[name].dtype, name
        assert np.asarray(leaf).tobytes() == arrays[name].tobytes(), name


def share(state):
    """Return in how many parts a feed-forward kernel lies, of the parameters and of both moments."""
    kernels = [leaf for name, leaf in stored.flatten(state).items() if "mlp.up.kernel" in name]
    assert len(kernels) == 3
    (parts,) = {leaf.size // leaf.addressable_shards[0].data.size for leaf in kernels}
    return parts


@pytest.mark.parametrize(
    ("kind", "number"),
    [(kind, n) for kind, (meshes, _) in KINDS.items() for n in range(len(meshes))],
)
def test_any_mesh_restores_what_any_other_saved(sides, tmp_path, kind, number):
    """Ten meshes x ten, from each of the hundred on to a third; the run goes on as on one device."""
    meshes, _ = KINDS[kind]
    source, expected = sides(kind, number), sides(kind, 0).loss
    assert source.loss == pytest.approx(expected, rel=1e-5)
    first = save(tmp_path / "first", source.state)
    for second in (
        *range(number, len(meshes)),
        *range(number),
    ):  # two workers do not compile one at once
        sizes = meshes[second]
        target = sides(kind, second)
        state = restore(first, target.abstract)
        assert_same(state, source.arrays, target.abstract)
        split = ("fsdp", "tensor", "stage", *(("expert",) if kind == "experts" else ()))
        assert share(state) == math.prod(sizes.get(axis, 1) for axis in split)
        assert loss_after(target, state) == pytest.approx(source.loss, rel=1e-5)
        third = sides(kind, (number + 3 * second + 1) % len(meshes))  # all of them in turn
        again = restore(save(tmp_path / f"second{second}", state), third.abstract)
        assert_same(again, source.arrays, third.abstract)


@pytest.mark.parametrize("number", range(10))
def test_scanned_layers_go_to_unrolled_ones_of_another_mesh_and_back(
    sides, text_file, tmp_path, number
):
    source, back = sides("dense", number), sides("dense", (number + 7) % 10)
    # Layers that are not scanned have no stages.
    sizes = [mesh for mesh in DENSE if "stage" not in mesh][(number + 3) % 8]
    made, mesh = built(text_file, sizes, {}, scan=False)
    with sharding.use(mesh):
        abstract = experiment.jitted(made)[-1]
    state = restore(save(tmp_path / "scanned", source.state), abstract)
    arrays = on_host(state)
    unrolled = [name.split(".") for name in arrays if ".block_" in name]
    assert len(unrolled) == 4 * sum(SCANNED in name.split(".") for name in source.arrays)
    for parts in unrolled:
        at = next(place for place, part in enumerate(parts) if part.startswith("block_"))
        whole = source.arrays[".".join([*parts[:at], SCANNED, *parts[at + 1 :]])]
        layer = whole[int(parts[at].removeprefix("block_"))]
        assert layer.tobytes() == arrays[".".join(parts)].tobytes()
    assert_same(state, arrays, abstract)
    scanned = restore(save(tmp_path / "unrolled", state), back.abstract)
    assert_same(scanned, source.arrays, back.abstract)


def test_there_are_ten_meshes():
    assert len(DENSE) == 10
    assert all(a != b for a, b in itertools.combinations(DENSE, 2))
