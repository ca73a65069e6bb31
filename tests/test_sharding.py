"""The mesh and the table."""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import models, placement, sharding, step
from lm.config import ConfigError
from lm.models import gpt

LENGTH = 16


class Device(NamedTuple):
    process_index: int
    row: int


def tiny_gpt(**options):
    defaults = {"num_layers": 1, "model_dim": 64, "num_heads": 8}
    cfg = gpt.Config(**{**defaults, **options})
    return models.build(models.resolve(cfg, vocab_size=99, max_length=LENGTH, packed=True))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3, 1, 1), "does not fill 8 device"),
        ((-1, -1, 1), "mesh.data=-1 and mesh.fsdp=-1: set mesh.data=1"),
        ((16, 1, 1), "does not fill"),
        ((-1, 3, 1), "does not fill"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ConfigError, match=words):
        sharding.make_mesh(sharding.Config(*sizes))


def test_groups_are_inside_slices_of_tpus_and_may_be_of_several_hosts_of_gpus():
    class Placed(NamedTuple):
        platform: str
        slice_index: int
        process_index: int

    hosts = {kind: [Placed(kind, i % 4, i % 4) for i in range(8)] for kind in ("gpu", "tpu")}
    groups = sharding._groups(hosts["gpu"], 2)
    assert [{device.process_index for device in group} for group in groups] == [{0, 1}, {2, 3}]
    with pytest.raises(ConfigError, match=r"mesh\.dcn=2: the devices are in 4 slices"):
        sharding._groups(hosts["tpu"], 2)
    with pytest.raises(ConfigError, match=r"mesh\.dcn=1: the devices are in 4 slices"):
        sharding._groups(hosts["tpu"], 1)
    assert sharding._groups(hosts["gpu"], 1) == [hosts["gpu"]]


def test_size_zero_is_refused():
    with pytest.raises(ConfigError, match=r"mesh\.tensor=0"):
        sharding.Config(tensor=0)


def test_minus_one_is_the_rest():
    mesh = sharding.make_mesh(sharding.Config(-1, 2, 2))
    assert {"data": 2, "fsdp": 2, "tensor": 2}.items() <= dict(mesh.shape).items()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)])
def test_bytes_per_device_fall_as_they_should(sizes):
    model, mesh = tiny_gpt(), sharding.make_mesh(sharding.Config(*sizes))
    _, fsdp, tensor = sizes
    axes, shapes = step.parameter_axes(model)
    with sharding.use(mesh):
        placed = sharding.shardings(mesh, axes, shapes)
        params = jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            out_shardings=placed,
        )()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = sharding.path_name(path)
        # Every kernel and table of this model has one `embed` axis and one that tensor splits.
        ways = fsdp * tensor if leaf.ndim > 1 else 1
        (share,) = {shard.data.nbytes for shard in leaf.addressable_shards}
        assert share * ways == leaf.nbytes, name


def test_a_parameter_that_cannot_be_split_is_named():
    model, mesh = tiny_gpt(num_heads=2), sharding.make_mesh(sharding.Config(1, 1, 8))
    axes, shapes = step.parameter_axes(model)
    with pytest.raises(ConfigError, match=r"mesh\.tensor=8.*attention/out/kernel has 2 `heads`"):
        sharding.shardings(mesh, axes, shapes)


def test_every_axis_that_a_model_names_is_in_the_table():
    for options in ({}, {"positions": "learned", "tied": False, "bias": True, "scan": True}):
        axes, shapes = step.parameter_axes(tiny_gpt(**options))
        named = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
        for names, leaf in zip(named, jax.tree.leaves(shapes), strict=True):
            assert len(names) == leaf.ndim
            assert set(names) <= set(sharding.RULES)


def test_constrain_splits_what_divides_and_leaves_the_rest():
    mesh = sharding.make_mesh(sharding.Config(2, 2, 2))
    axes = ("act_batch", "act_length", "act_heads")
    with sharding.use(mesh):
        split = jax.jit(lambda x: sharding.constrain(x, *axes))(jnp.zeros((8, 3, 6)))
        odd = jax.jit(lambda x: sharding.constrain(x, *axes))(jnp.zeros((8, 3, 5)))
    assert split.sharding.shard_shape(split.shape) == (2, 3, 3)
    assert odd.sharding.shard_shape(odd.shape)[2] == 5
    assert sharding.constrain(np.ones(3), "act_batch") is not None  # no mesh in use: no-op


def test_place_batch_splits_rows_over_data_and_fsdp():
    mesh = sharding.make_mesh(sharding.Config(2, 2, 2))
    rows = np.arange(32, dtype=np.int32).reshape(8, 4)
    placed = placement.place_batch(mesh, {"inputs": rows})["inputs"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding.shard_shape(placed.shape) == (2, 4)


def test_parts_of_a_batch_are_in_the_order_of_the_processes_that_read_them():
    """As on a slice of 2 x 2 x 4 chips, of which each host has a plane: its parts are z, z + 4, and so on."""
    parts = np.empty((16, 1), object)
    parts[:, 0] = [types.SimpleNamespace(process_index=place % 4) for place in range(16)]
    ordered = placement._order(parts)
    assert [place % 4 for place in ordered] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert ordered[:4] == [0, 4, 8, 12]
    for sizes in ({"data": 8}, {"fsdp": 4, "tensor": 2}, {"dcn": 2, "data": 2, "context": 2}):
        mesh = sharding.make_mesh(sharding.Config(**{"data": 1, **sizes}))
        assert placement.by_process(mesh) == mesh


@pytest.mark.parametrize(
    ("rows_of", "share"),
    [
        ({0: [0, 1], 1: [2, 3]}, (1, 2)),  # each process has half of the rows
        ({0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, (0, 1)),  # they differ in another axis
        ({0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}, (0, 2)),
        ({0: [0], 1: [1, 2, 3]}, None),
        ({0: [0, 2], 1: [1, 3]}, None),
    ],
)
def test_which_rows_a_process_reads(monkeypatch, rows_of, share):
    places = {
        Device(process, row): (slice(row, row + 1),)
        for process, rows in rows_of.items()
        for row in rows
    }

    class Placed:
        def devices_indices_map(self, shape):
            return places

    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: Placed())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    mesh = sharding.make_mesh(sharding.Config(data=4), jax.devices()[:4])
    ask = placement.host_share.__wrapped__  # it remembers meshes
    if share is not None:
        assert ask(mesh) == share
        return
    with pytest.raises(ConfigError, match="do not divide over"):
        ask(mesh)


def test_one_process_reads_all_rows():
    assert placement.host_share(sharding.make_mesh(sharding.Config(data=4, tensor=2))) == (0, 1)


@pytest.mark.parametrize(("platform", "whole"), [("gpu", True), ("tpu", False)])
def test_a_group_may_be_of_several_hosts_but_not_of_several_slices(platform, whole):
    """Of GPUs a slice is what XLA calls a host."""
    devices = [
        types.SimpleNamespace(platform=platform, slice_index=host, process_index=host)
        for host in (3, 1, 0, 2)
    ]
    if whole:
        groups = sharding._groups(devices, 2)
        assert [[device.slice_index for device in group] for group in groups] == [[0, 1], [2, 3]]
    else:
        with pytest.raises(ConfigError, match=r"mesh\.dcn=2: the devices are in 4 slices"):
            sharding._groups(devices, 2)
