"""Arrays by name: a tree as one flat dictionary, as Orbax stores it, and back.

Layers that were stored scanned are read into unrolled ones, and back.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lm import exits, fingerprint, manifests
from lm.config import ConfigError
from lm.nn.transformer import SCANNED, UNROLLED

GROUP = 256 << 20  # bytes of arrays that are read at a time where all are


def handler() -> ocp.PyTreeCheckpointHandler:
    """Return Orbax's handler of arrays, one replica of each written whole where there is one process.

    Its default splits replicated arrays over the devices to write, which compiles a slice for each
    shape and gains nothing inside a process.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def flatten(tree: Any) -> dict[str, Any]:
    """Return {"path.of.leaf": leaf}: the names under which arrays are stored."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unflatten(tree: Any, flat: Mapping[str, Any]) -> Any:
    """Return `tree` with the leaves of `flat`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [flat[name] for name in flatten(tree)])


def restore(
    folder: Path, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Return the arrays named in `wanted`, on its shardings.

    Layers that were stored scanned are read into unrolled ones, and back. Statistics of spikes that are not
    there begin anew.

    Raises:
      ConfigError: an array is missing or has another shape.
    """
    manifest = manifests.read(folder, step) or {}
    stored = shapes_of(manifest["arrays"])
    anew = {n: leaf for n, leaf in wanted.items() if n.startswith("spikes.") and n not in stored}
    wanted = {name: leaf for name, leaf in wanted.items() if name not in anew}
    depths = layers_by_stack(wanted), layers_by_stack(stored)
    sources = {name: sources_of(name, leaf, stored, *depths) for name, leaf in wanted.items()}
    reading = {}
    for name, leaf in wanted.items():
        layers, lead = len(sources[name]), _layer_axis(name)
        if SCANNED in name.split(".") and layers not in (1, leaf.shape[lead]):
            raise ConfigError(
                f"checkpoint {folder / str(step)}: it has {layers} layers, but {name} of "
                f"this config needs {leaf.shape[lead]}; use the config it was trained with"
            )
        for source, shape, sharding in sources[name]:
            if stored.get(source) != shape:
                raise ConfigError(
                    f"checkpoint {folder / str(step)}: {source} is {stored.get(source, 'missing')}, "
                    f"but {name} of this config needs {shape}; use the config it was trained with"
                )
            reading[source] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
    try:
        arrays = _read(folder / str(step), reading)
    except OSError as error:
        raise ConfigError(f"checkpoint {folder / str(step)}: {error}") from error
    found = {name: _assemble(name, leaf, sources[name], arrays) for name, leaf in wanted.items()}
    for name, leaf in anew.items():
        found[name] = jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    return found


def _read(target: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Return the arrays that are wanted, on their shardings. Raises OSError of what cannot be read."""
    arguments = ocp.args.PyTreeRestore(
        item=dict(wanted),
        restore_args=ocp.checkpoint_utils.construct_restore_args(dict(wanted)),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(handler()) as orbax:
            return orbax.restore(target.absolute() / "state", args=arguments)
    except ValueError as error:  # what tensorstore cannot open; it says all that it knows
        raise OSError(f"its arrays cannot be read: {exits.line(error)[:300]}") from error


def read_all(
    folder: Path,
    step: int,
    places: Mapping[str, Sharding] | None = None,
    names: Iterable[str] | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Yield (name, array) of what a checkpoint stores, as it was stored; some are read at a time.

    Nothing but the folder is needed: no config, no model.

    Args:
      places: where each array is put; None = on this process's first CPU.
      names: which, in this order; None = all.
    """
    arrays = (manifests.read(folder, step) or {"arrays": {}})["arrays"]
    cpu = None if places else SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    groups: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
    size = 0
    for name in arrays if names is None else names:
        shape, dtype, *_ = arrays[name]
        leaf = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=places[name] if places else cpu)
        size += math.prod(shape) * leaf.dtype.itemsize
        if size > GROUP and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = leaf
    for group in groups:
        found = _read(folder / str(step), group) if group else {}
        yield from ((name, found[name]) for name in group)


def problem(folder: Path, step: int, places: Mapping[str, Sharding] | None = None) -> str:
    """Read every array back and return what is wrong with one, by name; "" for nothing.

    A checkpoint of format 2 has no fingerprints: of it every array must be readable.
    """
    stored = (manifests.read(folder, step) or {"arrays": {}})["arrays"]
    try:
        for name, array in read_all(folder, step, places):
            expected = stored[name][2] if len(stored[name]) > 2 else ""
            if expected and fingerprint.each({name: array})[name] != expected:
                return f"array {name} is not what was saved"
    except OSError as error:
        return exits.line(error)
    except Exception as error:  # whatever a reader of damaged files raises
        return f"its arrays cannot be read: {exits.line(error)[:300]}"
    return ""


def difference(folder: Path, step: int, arrays: Mapping[str, jax.Array]) -> str:
    """Return which of the arrays restored from a checkpoint is not what was saved; "" for none.

    Looked at are those that have the name and shape they were stored with, and a fingerprint.
    """
    stored = (manifests.read(folder, step) or {"arrays": {}})["arrays"]
    known = {
        name: stored[name][2]
        for name, x in arrays.items()
        if len(stored.get(name, ())) > 2 and stored[name][:2] == [list(x.shape), str(x.dtype)]
    }
    found = fingerprint.of_all({name: arrays[name] for name in known})
    bad = (name for name in known if fingerprint.shown(found[name]) != known[name])
    return next((f"array {name} is not what was saved" for name in bad), "")


def layers_by_stack(names: Iterable[str]) -> dict[str, int]:
    """Return how many unrolled layers each stack has, by what its names begin with."""
    found: dict[str, int] = {}
    for name in names:
        at, number = _layer_of(name)
        if at >= 0:
            stack = ".".join(name.split(".")[:at])
            found[stack] = max(found.get(stack, 0), number + 1)
    return found


def _layer_of(name: str) -> tuple[int, int]:
    """Return (which part of a dotted name is an unrolled layer, its number), or (-1, -1)."""
    for place, part in enumerate(name.split(".")):
        number = part.removeprefix(UNROLLED.format(""))
        if number != part and number.isdecimal():
            return place, int(number)
    return -1, -1


def sources_of(
    name: str,
    leaf: Any,
    stored: Mapping[str, Any],
    depths: Mapping[str, int],
    stored_depths: Mapping[str, int],
) -> list[tuple[str, tuple[int, ...], Any]]:
    """Return (stored name, shape, sharding) of the arrays that `name` is made of: one, or one a layer.

    `depths` has the numbers of unrolled layers of what is wanted, `stored_depths` of what is stored.
    """
    shape, sharding = tuple(leaf.shape), leaf.sharding
    parts = name.split(".")
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else None
    lead = _layer_axis(name)
    if name not in stored and SCANNED in parts:
        at = parts.index(SCANNED)
        if spec is not None:
            spec = spec[:lead] + spec[lead + 1 :]
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        # As many as are stored: one that is not there, or one too many, is then refused by name.
        count = max(shape[lead], stored_depths.get(".".join(parts[:at]), 0))
        layers = [[*parts[:at], UNROLLED.format(i), *parts[at + 1 :]] for i in range(count)]
        return [(".".join(layer), shape[:lead] + shape[lead + 1 :], sharding) for layer in layers]
    at, number = _layer_of(name)
    if name not in stored and number >= 0:
        source = ".".join([*parts[:at], SCANNED, *parts[at + 1 :]])
        if spec is not None:
            spec = (*spec[:lead], None, *spec[lead:])
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        depth = depths[".".join(parts[:at])]
        return [(source, (*shape[:lead], depth, *shape[lead:]), sharding)]
    return [(name, shape, sharding)]


def _layer_axis(name: str) -> int:
    """Return which axis of a scanned array counts layers; the first counts groups that train apart."""
    return 1 if name.startswith("local.") else 0


def _assemble(name, leaf, sources, arrays) -> jax.Array:
    """Return the array `name` of the arrays it was stored as."""
    if sources[0][0] == name:
        return arrays[name]
    if SCANNED in name.split("."):
        stacked = jnp.stack([arrays[source] for source, _, _ in sources], axis=_layer_axis(name))
        return jax.device_put(stacked, leaf.sharding)
    layer = arrays[sources[0][0]].take(_layer_of(name)[1], axis=_layer_axis(name))
    return jax.device_put(layer, leaf.sharding)


def shapes_of(stored: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array that a manifest describes."""
    return {name: tuple(shape) for name, (shape, *_) in stored.items()}


def averaged(arrays: Iterable[str]) -> str:
    """Return which part of these names is the model: "ema", where an average was kept, or "params"."""
    return "ema" if any(name.startswith("ema.") for name in arrays) else "params"
