"""Meshes, and the one table from logical axes to mesh axes. Only this file knows a mesh axis by name.

A model names what an axis *is* (`embed`, `heads`, ...); `RULES` says over which mesh axes it is
split. A mesh axis of size 1 costs nothing, so one table serves every scheme:

    data    each device holds all parameters and a share of the batch
    fsdp    as data, and every parameter is split over it along `embed` (ZeRO-3, arXiv 1910.02054)
    tensor  heads, feed-forward, hidden and vocabulary are split (Megatron, arXiv 1909.08053); between
            them a Transformer's positions are (Korthikanti et al. 2022, arXiv 2205.05198)
    expert  as data, and the experts of `lm.nn.moe` are split over it (GShard, arXiv 2006.16668)
    context positions are split, each device holding an early and a late part of every row, so that
            under a causal mask all have the same work (`columns`; `lm.nn.context` attends across it)
    stage   scanned layers are split, and parts of the batch flow through them (see `lm.nn.pipeline`)
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < 1 and size != -1:
                raise ConfigError(
                    f"mesh.{field.name}={size}: use a positive size, or -1 = the rest"
                )


RULES: dict[str, tuple[str, ...]] = {
    # Activations.
    "act_batch": ("data", "fsdp", "expert"),
    "act_groups": ("data", "fsdp"),  # rows of what is split over the experts already
    "act_experts": ("expert",),
    "act_length": ("context",),
    "act_length_norm": ("context", "tensor"),  # between a Transformer's layers, which gather it
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_hidden": ("tensor",),
    "act_vocab": ("tensor",),
    "act_stage": ("stage",),
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
ORDER = ("stage", "data", "fsdp", "context", "tensor", "expert")

# Leaving an array of fewer elements whole is never an error: it is not worth a collective.
SMALL = 1024


def make_mesh(cfg: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of `cfg` over `devices` (default: all).

    Raises:
      ConfigError: the sizes' product is not the number of devices, or two sizes are -1.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(cfg)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[0]}=-1 and mesh.{free[1]}=-1: only one size may be -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        shown = " x ".join(f"{name}={size}" for name, size in dataclasses.asdict(cfg).items())
        raise ConfigError(
            f"mesh: {shown} does not fill {len(devices)} device(s); let the product be "
            f"{len(devices)}, or set mesh.data=-1"
        )
    return Mesh(
        np.asarray(devices).reshape([sizes[name] for name in ORDER]),
        ORDER,
        axis_types=(AxisType.Auto,) * len(sizes),
    )


def mesh_size() -> int:
    """Return the number of devices of the mesh in use; 1 without one."""
    return jax.sharding.get_abstract_mesh().size or 1


def ways(mesh: Any, axis: str | None) -> int:
    """Return over how many devices logical `axis` is split (None = 1)."""
    return math.prod(mesh.shape[name] for name in RULES[axis]) if axis else 1


def batch_shards(mesh: Mesh) -> int:
    """Return over how many devices the batch is split."""
    return ways(mesh, "act_batch")


def row_shards(num_rows: int) -> int:
    """Return over how many devices of the mesh in use `num_rows` rows split; 1 where they do not."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else ways(mesh, "act_batch")
    return shards if num_rows % shards == 0 else 1


def stages() -> int:
    """Return over how many devices of the mesh in use the layers are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else ways(mesh, "layers")


def mesh_axes(axis: str) -> tuple[str, ...]:
    """Return the mesh axes of a logical `axis`: what JAX wants to be told of an axis that it maps over."""
    return RULES[axis]


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Return the mesh axes of logical `axes` (None = not split)."""
    return PartitionSpec(*[RULES[axis] or None if axis else None for axis in axes])


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
    return jax.lax.with_sharding_constraint(x, PartitionSpec(RULES[axis] or None, *free))


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
                f"mesh.{'*'.join(RULES[axis])}={ways(mesh, axis)}: parameter {path_name(path)} has "
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


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def splits_rows(length: int) -> bool:
    """Return whether rows of `length` lie on the mesh in use split, in the order of `columns`."""
    parts = length_parts()
    return parts > 1 and length % (2 * parts) == 0


def length_parts() -> int:
    """Return over how many devices of the mesh in use the positions of a row are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else ways(mesh, "act_length")


def columns(length: int, parts: int) -> np.ndarray:
    """Return which position of a row [length] lies at each place of it, when `parts` devices split it.

    Of 2 `parts` chunks device i holds chunks i and 2 parts - 1 - i: under a causal mask, an early one
    that sees little and a late one that sees much (Llama 3, arXiv 2407.21783, section 3.3.2).
    """
    if parts == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[: parts - 1 : -1]], axis=1).reshape(-1)


def check_length(mesh: Mesh, length: int, name: str) -> None:
    """Raise ConfigError where the positions of rows of `length` do not split over `mesh`."""
    parts = ways(mesh, "act_length")
    if parts > 1 and length % (2 * parts):
        raise ConfigError(
            f"mesh.context={parts}: a row of {name} has {length} positions, which do not split into "
            f"{2 * parts} equal chunks, two for a device; use a length that is a multiple of {2 * parts}"
        )


@functools.lru_cache
def host_share(mesh: Mesh) -> tuple[int, int]:
    """Return (which part of a batch this process reads, of how many equal parts).

    Processes between which no axis of the batch runs read the same part.

    Raises:
      ConfigError: the devices of the processes do not make equal parts.
    """
    shards = batch_shards(mesh)
    rows: dict[int, set[int]] = {}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
        rows.setdefault(device.process_index, set()).add(part.start or 0)
    parts = sorted({tuple(sorted(numbers)) for numbers in rows.values()})
    size = len(parts[0])
    if parts != [tuple(range(at, at + size)) for at in range(0, shards, size)]:
        raise ConfigError(
            f"mesh: its {shards} parts of a batch do not divide over {jax.process_count()} processes in "
            "equal parts; choose sizes that are multiples or divisors of the devices of a process"
        )
    # A process without a device of this mesh reads as the first does.
    return parts.index(tuple(sorted(rows.get(jax.process_index(), parts[0])))), len(parts)


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Put this host's rows of a batch on its devices, as global arrays; returns at once.

    Where positions are split they lie in the order of `columns`, in every array [B, L] alike, and a model
    under such a mesh takes them to. What is drawn for each place (dropout) so goes to other positions
    than on one device.

    Raises:
      ConfigError: rows whose positions do not split, or that do not divide over the hosts.
    """
    parts, (number, count) = ways(mesh, "act_length"), host_share(mesh)

    def one(name: str, array: np.ndarray) -> jax.Array:
        if parts > 1 and array.ndim > 1:
            check_length(mesh, array.shape[1], name)
            array = array[:, columns(array.shape[1], parts)]
        first = number * len(array)  # of the whole batch's rows

        def part(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(count * len(array))
            return array[(slice(begin - first, end - first), *index[1:])]

        placed = named_sharding(mesh, ("act_batch", "act_length")[: array.ndim])
        shape = (count * len(array), *array.shape[1:])
        return jax.make_array_from_callback(shape, placed, part)

    return {name: one(name, array) for name, array in batch.items()}
