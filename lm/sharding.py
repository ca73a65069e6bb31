"""Meshes, and the one table from logical axes to mesh axes. Only it and `lm.flags` know a mesh axis by name.

A model names what an axis *is* (`embed`, `heads`, ...); `RULES` says over which mesh axes it is
split. A mesh axis of size 1 costs nothing, so one table serves every scheme:

    dcn     groups of devices with slow links between (slices of TPUs, nodes), each with a share of the
            batch. Parameters are whole in each group, so with fsdp inside it is hybrid sharding; with
            `local_steps` each group trains apart for a while (`lm.local_steps`)
    data    each device holds all parameters and a share of the batch
    fsdp    as data, and every parameter is split over it along `embed` (ZeRO-3, arXiv 1910.02054)
    tensor  heads, feed-forward, hidden and vocabulary are split (Megatron, arXiv 1909.08053); between
            them a Transformer's positions are (Korthikanti et al. 2022, arXiv 2205.05198)
    expert  as data, and the experts of `lm.nn.moe` are split over it (GShard, arXiv 2006.16668)
    context positions are split, each device holding an early and a late part of every row, so that
            under a causal mask all have the same work (`lm.placement`; `lm.nn.context` attends across it)
    stage   scanned layers are split, and parts of the batch flow through them (see `lm.nn.pipeline`)
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
    data: int = -1  # devices that split the batch alone; -1 = the rest
    fsdp: int = 1  # devices that split the batch and, along `embed`, the parameters; -1 = the rest
    tensor: int = 1  # devices that split heads, feed-forward, hidden and vocabulary; -1 = the rest
    expert: int = 1  # devices that split the batch and the experts; -1 = the rest
    context: int = 1  # devices that split the positions of a row; -1 = the rest
    stage: int = 1  # devices that split the layers, which needs model.scan; -1 = the rest
    dcn: int = 1  # groups of devices with slow links between, which split the batch; -1 = the rest
    local_steps: int = 0  # updates of each such group alone until they meet (DiLoCo); 0 = none
    xla_flags: str = "auto"  # of the compiler; auto = those of lm/flags.py for this mesh

    def __post_init__(self):
        for name in ORDER:
            size = getattr(self, name)
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{name}={size}: use a positive size, or -1 = the rest")
        if self.local_steps < 0:
            raise ConfigError(
                f"mesh.local_steps={self.local_steps}: use 0 = none, or a number of updates"
            )
        if self.xla_flags != "auto" and not all(
            f.startswith("--xla") for f in self.xla_flags.split()
        ):
            raise ConfigError(f"mesh.xla_flags={self.xla_flags!r}: use auto, '' or '--xla_...=...'")


REPLICAS = "replicas"
RULES: dict[str, tuple[str, ...]] = {
    # Activations.
    "act_batch": ("dcn", "data", "fsdp", "expert"),
    "act_groups": ("dcn", "data", "fsdp"),  # rows of what is split over the experts already
    "act_experts": ("expert",),
    "act_length": ("context",),
    "act_length_norm": ("context", "tensor"),  # between a Transformer's layers, which gather it
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_hidden": ("tensor",),
    "act_vocab": ("tensor",),
    "act_stage": ("stage",),
    REPLICAS: ("dcn",),  # what groups that train apart have each for themselves
    # Parameters.
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "hidden": ("tensor",),
    "hidden_in": ("fsdp",),
    "experts": ("expert",),
    "router": (),
    "embed_out": (),  # of a square kernel whose inputs are `embed`
    "position": (),
    "relpos": (),
    "types": (),
    "classes": (),
    "norm": (),
    "kv": (),
    "qkv": (),
    "gate": (),
    "gates": (),
    "layers": ("stage",),
}

# The axes of a mesh, those that exchange most last: neighbours in it are near each other.
ORDER = ("dcn", "stage", "data", "fsdp", "context", "tensor", "expert")

_outside: ContextVar[frozenset[str]] = ContextVar("outside", default=frozenset())

# Leaving an array of fewer elements whole is never an error: it is not worth a collective.
SMALL = 1024


def make_mesh(cfg: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of `cfg` over `devices` (default: all).

    Raises:
      ConfigError: the sizes' product is not the number of devices, or two sizes are -1.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(cfg, name) for name in ORDER}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        first, second = free[:2]
        raise ConfigError(f"mesh.{first}=-1 and mesh.{second}=-1: set mesh.{first}=1")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        shown = " x ".join(f"{name}={getattr(cfg, name)}" for name in ORDER)
        raise ConfigError(
            f"mesh: {shown} does not fill {len(devices)} device(s); let the product be "
            f"{len(devices)}{f', which {known} divides' if free else ', or set mesh.data=-1'}"
        )
    groups, shape = sizes["dcn"], [sizes[name] for name in ORDER]
    near = [
        mesh_utils.create_device_mesh(shape[1:], group, allow_split_physical_axes=True)
        for group in _groups(devices, groups)
    ]
    return Mesh(np.stack(near), ORDER, axis_types=(AxisType.Auto,) * len(ORDER))


def _groups(devices: list[Any], count: int) -> list[list[Any]]:
    """Return `count` equal groups of devices, none across more slices or processes than it must be.

    Raises:
      ConfigError: slices of TPUs, between which links are slow, would be in one group.
    """
    of_tpus = devices[0].platform == "tpu"  # a GPU has the number of its host there
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if of_tpus else 1
    if count % slices:
        raise ConfigError(
            f"mesh.dcn={count}: the devices are in {slices} slices, and a group must be inside one; use a "
            f"multiple of {slices}"
        )
    if count > 1:
        place = lambda device: (getattr(device, "slice_index", 0), device.process_index)  # noqa: E731
        devices = sorted(devices, key=place)
    size = len(devices) // count
    return [devices[at : at + size] for at in range(0, len(devices), size)]


def shown(mesh: Mesh) -> str:
    """Return the axes of a mesh that split something, and how many devices they split it over."""
    return " x ".join(f"{n} {size}" for n, size in mesh.shape.items() if size > 1) or "one device"


def mesh_size() -> int:
    """Return the number of devices of the mesh in use; 1 without one."""
    return jax.sharding.get_abstract_mesh().size or 1


def ways(mesh: Any, axis: str | None) -> int:
    """Return over how many devices logical `axis` is split (None = 1)."""
    return math.prod(mesh.shape[name] for name in mesh_axes(axis)) if axis else 1


def ways_here(*axes: str) -> int:
    """Return over how many devices of the mesh in use arrays of these logical axes are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(ways(mesh, axis) for axis in axes)


def batch_shards(mesh: Mesh) -> int:
    """Return over how many devices the batch is split."""
    return ways(mesh, "act_batch")


def row_shards(num_rows: int) -> int:
    """Return over how many devices of the mesh in use `num_rows` rows split; 1 where they do not."""
    shards = ways_here("act_batch")
    return shards if num_rows % shards == 0 else 1


def mesh_axes(axis: str) -> tuple[str, ...]:
    """Return the mesh axes of a logical `axis`, but for those that the code being traced is mapped over."""
    mapped = axis in (REPLICAS, "act_stage")  # what is said of the code around it
    return tuple(n for n in RULES[axis] if mapped or n not in _outside.get())


@contextlib.contextmanager
def mapped_over(axis: str | frozenset[str]) -> Iterator[None]:
    """Trace code mapped over a logical `axis`, or `other_axes`: it knows nothing of the others there."""
    token = _outside.set(_outside.get() | ({*RULES[axis]} if isinstance(axis, str) else axis))
    try:
        yield
    finally:
        _outside.reset(token)


def other_axes() -> frozenset[str]:
    """Return the mesh axes that the code being traced is mapped over."""
    return _outside.get()


def replica() -> jax.Array | None:
    """Return the number of the group that the code being traced is of; None where none trains apart."""
    return jax.lax.axis_index(REPLICAS) if _apart() else None


def in_every_replica(holds: jax.Array) -> jax.Array:
    """Return whether `holds` is true in all groups that train apart; as it is where none does."""
    return jax.lax.pmin(holds.astype(jnp.int32), REPLICAS) == 1 if _apart() else holds


def _apart() -> bool:
    return not _outside.get().isdisjoint(RULES[REPLICAS])


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Return the mesh axes of logical `axes` (None = not split)."""
    return PartitionSpec(*[mesh_axes(axis) or None if axis else None for axis in axes])


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Make `mesh` the one that `constrain` speaks of."""
    with jax.set_mesh(mesh):
        yield mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin activation `x` to the sharding of its logical `axes`; no-op without a mesh in use.

    A dimension that its mesh axes do not divide is left to the partitioner.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(fitting(x.shape, axes)))


def fitting(shape: Sequence[int], axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """Return `axes` with None for a dimension that the mesh in use does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(
        axis if dim % ways(mesh, axis) == 0 else None for dim, axis in zip(shape, axes, strict=True)
    )


@jax.custom_vjp
def spread(x_BLD: jax.Array) -> jax.Array:
    """Split the positions of a Transformer's residual stream over tensor too, where they divide."""
    mesh = jax.sharding.get_abstract_mesh()
    divides = mesh.empty or x_BLD.shape[1] % ways(mesh, "act_length_norm") == 0
    length = "act_length_norm" if divides else "act_length"
    return constrain(x_BLD, "act_batch", length, "act_embed")


@jax.custom_vjp
def collect(x_BLD: jax.Array) -> jax.Array:
    """Undo `spread`, before a product that tensor splits."""
    return constrain(x_BLD, "act_batch", "act_length", "act_embed")


# Said aloud, because the partitioner otherwise may leave positions split and collect kernels.
spread.defvjp(lambda x_BLD: (spread(x_BLD), None), lambda _, gradient: (collect(gradient),))
collect.defvjp(lambda x_BLD: (collect(x_BLD), None), lambda _, gradient: (spread(gradient),))


def constrain_first(x: jax.Array, axis: str) -> jax.Array:
    """Pin the first dimension of `x` to the sharding of its logical `axis`, the others to none."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh_axes(axis) or None, *free))


def split_rows(tree: Any, parts: int) -> Any:
    """Split the leading axis B into [parts, B / parts]; part i takes rows i, i + parts, ...

    Strided, so that each device's share of the batch is split and no row moves between devices.
    """

    def split(x):
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        axes = (None, "act_batch", "act_length") if x.ndim == 3 else (None, "act_batch")
        return constrain(x, *axes, *(None,) * (x.ndim - len(axes)))

    return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
    """Undo `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(kernel: jax.Array, axes: tuple[str | None, ...], dtype: Any = None) -> jax.Array:
    """Collect the fsdp shards of `kernel` for use; its gradient is summed, then split again.

    Where `dtype` is another type than its own, it is rounded to that one before it is sent. What is returned,
    and so the gradient that is summed, has the kernel's own type all the same.

    Said aloud, because the partitioner otherwise may split the product instead and move activations.
    """
    whole = [None if axis and "fsdp" in RULES[axis] else axis for axis in axes]
    if dtype is None or dtype == kernel.dtype:
        return constrain(kernel, *whole)
    # The shards pinned too: else they are sent as they are, and rounded where they arrive.
    shards = constrain(kernel.astype(dtype), *axes)
    return constrain(shards, *whole).astype(kernel.dtype)


def fsdp_axis(axes: Sequence[str | None]) -> int | None:
    """Return which of a parameter's `axes` the mesh in use splits over fsdp; None where it splits none."""
    mesh = jax.sharding.get_abstract_mesh()
    split = [i for i, axis in enumerate(axes) if axis and "fsdp" in RULES[axis]]
    return split[0] if split and not mesh.empty and mesh.shape["fsdp"] > 1 else None


gather.defvjp(
    lambda kernel, axes, dtype: (gather(kernel, axes, dtype), None),
    lambda axes, dtype, _, gradient: (constrain(gather(gradient, axes), *axes),),
)


def logical_axes(boxed: Any) -> Any:
    """Return the tree of logical axis names of a boxed Linen tree; `()` for a leaf that names none."""
    return jax.tree.map(
        lambda leaf: tuple(leaf.names) if isinstance(leaf, nn.meta.Partitioned) else (),
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.meta.Partitioned),
    )


def named_sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Return the sharding on `mesh` of an array with logical `axes`."""
    return NamedSharding(mesh, partition_spec(axes))


def shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Return a tree of shardings for arrays of `shapes` with logical `axes` (trees alike).

    Raises:
      ConfigError: an array that should be split cannot be, with its name, size and a fix.
    """

    def one(path, axes_of_leaf, leaf):
        names = axes_of_leaf or (None,) * len(leaf.shape)
        for dim, axis in zip(leaf.shape, names, strict=True):
            if dim % ways(mesh, axis) == 0:
                continue
            if math.prod(leaf.shape) <= SMALL:
                return replicated(mesh)
            raise ConfigError(
                f"mesh.{'*'.join(mesh_axes(axis))}={ways(mesh, axis)}: parameter {path_name(path)} has "
                f"{dim} `{axis}`, which does not divide; choose a mesh size that divides {dim}"
            )
        return named_sharding(mesh, names)

    return jax.tree.map_with_path(one, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def path_name(path: Sequence[Any]) -> str:
    """Return a pytree path as `a/b/c`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Return the sharding of every array of a batch: its rows, along `axis`, are split."""
    return named_sharding(mesh, (None,) * axis + ("act_batch",))


def stacked(one: NamedSharding) -> NamedSharding:
    """Return the sharding of arrays, each lying as `one`, one of each group that trains apart."""
    return NamedSharding(one.mesh, PartitionSpec(RULES[REPLICAS], *one.spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def splits_rows(length: int) -> bool:
    """Return whether rows of `length` lie on the mesh in use split, in the order of `placement.columns`."""
    parts = length_parts()
    return parts > 1 and length % (2 * parts) == 0


def length_parts() -> int:
    """Return over how many devices of the mesh in use the positions of a row are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else ways(mesh, "act_length")
