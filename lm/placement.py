"""Which rows of a batch a host reads, and where their positions lie on its devices."""

import functools
import math

import jax
import numpy as np
from jax.sharding import Mesh

from lm import sharding
from lm.config import ConfigError


def by_process(mesh: Mesh) -> Mesh:
    """Return a mesh in which the parts of a batch that a process reads are next to each other.

    A slice of TPUs has its devices in the order of its torus: a host there has every so many-th part.
    Parts are put in another order within each group of `dcn`; what splits a part stays as it was.
    """
    split = [n for n in sharding.RULES["act_batch"] if n != "dcn"]
    axes = [mesh.axis_names.index(name) for name in ("dcn", *split)]
    front = np.moveaxis(mesh.devices, axes, range(len(axes)))
    parts = front.reshape(front.shape[0], math.prod(front.shape[1 : len(axes)]), -1)
    ordered = np.stack([group[_order(group)] for group in parts])
    devices = np.moveaxis(ordered.reshape(front.shape), range(len(axes)), axes)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def _order(parts: np.ndarray) -> list[int]:
    """Return the places of parts [P, devices of one], those of the same processes next to each other."""
    processes = [tuple(sorted({device.process_index for device in part})) for part in parts]
    first = {found: processes.index(found) for found in processes}
    return sorted(range(len(parts)), key=lambda number: (first[processes[number]], number))


@functools.lru_cache
def host_share(mesh: Mesh) -> tuple[int, int]:
    """Return (which part of a batch this process reads, of how many equal parts).

    Processes between which no axis of the batch runs read the same part.

    Raises:
      ConfigError: the devices of the processes do not make equal parts.
    """
    shards = sharding.batch_shards(mesh)
    rows: dict[int, set[int]] = {}
    for device, (part,) in sharding.batch_sharding(mesh).devices_indices_map((shards,)).items():
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

    Where positions are split they lie in the order of `columns`, in every array [B, L] alike, and
    a model under such a mesh takes them to. What is drawn for each place (dropout) so goes to other
    positions than on one device.

    Raises:
      ConfigError: rows whose positions do not split, or that do not divide over the hosts.
    """
    parts, (number, count) = sharding.ways(mesh, "act_length"), host_share(mesh)

    def one(name: str, array: np.ndarray) -> jax.Array:
        if parts > 1 and array.ndim > 1:
            check_length(mesh, array.shape[1], name)
            array = array[:, columns(array.shape[1], parts)]
        first = number * len(array)  # of the whole batch's rows

        def part(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(count * len(array))
            return array[(slice(begin - first, end - first), *index[1:])]

        placed = sharding.named_sharding(mesh, ("act_batch", "act_length")[: array.ndim])
        shape = (count * len(array), *array.shape[1:])
        return jax.make_array_from_callback(shape, placed, part)

    return {name: one(name, array) for name, array in batch.items()}


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
    parts = sharding.ways(mesh, "act_length")
    if parts > 1 and length % (2 * parts):
        raise ConfigError(
            f"mesh.context={parts}: a row of {name} has {length} positions, which do not split into "
            f"{2 * parts} equal chunks, two for a device; use a length that is a multiple of {2 * parts}"
        )
