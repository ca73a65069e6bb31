"""Code that each device runs on its own part of arrays, and what it exchanges there, by logical axes."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lm import sharding


def on_shards(
    function: Callable[..., jax.Array],
    axes: Sequence[tuple[str | None, ...]],
    out: tuple[str | None, ...],
) -> Callable[..., jax.Array]:
    """Return `function` as each device runs it on its own parts of the arguments, which have logical `axes`.

    Its result is a part of an array with axes `out`. On one device, or where a dimension does not divide, it
    is `function` itself, and `all_gather` and the others below change nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def run(*arguments: jax.Array) -> jax.Array:
        divides = all(
            dim % sharding.ways(mesh, axis) == 0
            for argument, names in zip(arguments, axes, strict=True)
            for dim, axis in zip(argument.shape, names, strict=True)
        )
        specs = tuple(sharding.partition_spec(names) for names in axes)
        # Of mesh axes that split nothing here the partitioner still decides: no sum over them is asked for.
        split = [_mesh_axes(names) for names in (*axes, out)]
        manual = set().union(*split) | sharding.other_axes()  # which is mapped over around this
        types = [argument.dtype for argument in arguments]

        def on_one(*parts: jax.Array) -> jax.Array:
            return function(*(part.astype(dtype) for part, dtype in zip(parts, types, strict=True)))

        # The check of what differs between devices does not know rules of gradients that are one's own.
        mapped = jax.shard_map(
            on_one, mesh=mesh, in_specs=specs, out_specs=sharding.partition_spec(out), check_vma=False,
            axis_names=manual,
        )  # fmt: skip
        # The gradient of what several devices have alike is the sum of theirs: in float32.
        widened = (
            argument if names == manual else argument.astype(_wide(argument.dtype))
            for argument, names in zip(arguments, split, strict=False)
        )
        return mapped(*widened) if divides else function(*arguments)

    return function if mesh.empty or mesh.size == 1 else run


def _mesh_axes(names: Sequence[str | None]) -> set[str]:
    return {name for axis in names if axis for name in sharding.mesh_axes(axis)}


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """Return the type in which devices sum what is of `dtype`: of bfloat16, float32."""
    floats = jnp.issubdtype(dtype, jnp.floating)
    return jnp.promote_types(dtype, jnp.float32) if floats else dtype


def _split_here(axis: str) -> tuple[str, ...]:
    """Return the mesh axes of logical `axis` over which the code that runs is one part of several."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(
        name
        for name in sharding.mesh_axes(axis)
        if name in mesh.manual_axes and mesh.shape[name] > 1
    )


def all_gather(x: jax.Array, axis: str) -> jax.Array:
    """Join along dimension 0, within `on_shards`, the parts of `x` of all devices that split `axis`."""
    if not (names := _split_here(axis)):
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return _gathered(x, names, 0)
    return _join(x, names, 0)


def reduce_scatter(x: jax.Array, axis: str, dimension: int = 0) -> jax.Array:
    """Sum `x`, within `on_shards`, over the devices that split `axis`; each keeps its part of `dimension`."""
    names = _split_here(axis)
    return _sum_part(x, names, dimension) if names else x


def _gathered(x: jax.Array, names: tuple[str, ...], dimension: int) -> jax.Array:
    return jax.lax.all_gather(x, names, axis=dimension, tiled=True)


def _scattered(x: jax.Array, names: tuple[str, ...], dimension: int) -> jax.Array:
    wide = x.astype(_wide(x.dtype))
    part = jax.lax.psum_scatter(wide, names, scatter_dimension=dimension, tiled=True)
    return part.astype(x.dtype)


# Each is the other's gradient; by themselves JAX's sum in the type that they are given.
_join = jax.custom_vjp(_gathered, nondiff_argnums=(1, 2))
_join.defvjp(
    lambda x, names, dimension: (_gathered(x, names, dimension), None),
    lambda names, dimension, _, dy: (_scattered(dy, names, dimension),),
)
_sum_part = jax.custom_vjp(_scattered, nondiff_argnums=(1, 2))
_sum_part.defvjp(
    lambda x, names, dimension: (_scattered(x, names, dimension), None),
    lambda names, dimension, _, dy: (_gathered(dy, names, dimension),),
)


def all_reduce(x: jax.Array, *axes: str, but: str = "") -> jax.Array:
    """Sum `x`, within `on_shards`, over the devices that split any of `axes`, but not over those of `but`."""
    names = {name for axis in axes for name in _split_here(axis)}
    names -= {*(_split_here(but) if but else ())}
    return jax.lax.psum(x.astype(_wide(x.dtype)), tuple(sorted(names))).astype(x.dtype)


def pass_on(x: jax.Array, axis: str) -> jax.Array:
    """Give `x`, within `on_shards`, to the next of the devices in a ring that split `axis`."""
    names = _split_here(axis)
    size = num_parts(axis)
    ring = [(part, (part + 1) % size) for part in range(size)]
    return jax.lax.ppermute(x, names, ring) if names else x


def part_number(axis: str) -> jax.Array | int:
    """Return which part of logical `axis` this device has, within `on_shards`; 0 where it is whole."""
    names = _split_here(axis)
    return jax.lax.axis_index(names) if names else 0


def num_parts(axis: str) -> int:
    """Return of how many parts of logical `axis` this device has one, within `on_shards`."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in _split_here(axis))
