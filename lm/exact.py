"""The same bits on any number of devices: gradients of fixed parts of a batch, summed in one fixed order.

With `train.exact_reduction` = S a batch is S logical shards of consecutive rows, however many devices D split
it (powers of 2, D <= S). Each device takes the gradients of its S / D shards one after the other, and all are
summed along one binary tree: neighbours first, inside a device, then between devices by recursive doubling
(Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH"), where both partners add
the same two numbers, and so hold the same bits:

    D = 2   g0 + g1 on one, g2 + g3 on the other; they exchange and add
    D = 4   g0, g1, g2, g3 on one each; exchanged at distance 1 and added, then at distance 2

Norm, clipping and the optimizer are computed on whole arrays, alike on all devices, and so is the state of
step 0. What rounds is compiled by itself, as programs in which nothing depends on D: a shard's gradients,
the update. For a compiler fuses and lays out what it sees at once, and where that differs sums are rounded
otherwise. Between them stand programs that only move numbers and add two of them.

The price: in the update every device holds the whole state and gradient, and before it the gradients of up to
log2(S / D) + 1 shards; S products stand for one large; the whole gradient is sent log2(D) times. Losses that
layers add (of experts) are means over shards, as over the parts of an accumulated batch.

D = 1 is the same arithmetic, but compilers partition no program for one device, and may order it otherwise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lm import sharding
from lm.step import Batch, Metrics, TrainState

NO_MESH = AbstractMesh((), ())  # what models see: nothing depends on the devices


class Reduction:
    """The first state, steps and gradients on `mesh`.

    Attributes:
      init: makes the state of step 0, as `step.make_init`.
      shards: of a batch.
      of_shard: makes the gradients, as `step.gradients`.
      update: makes the new state of them, as `step.update`.
      placed: how the state lies.
    """

    def __init__(
        self,
        mesh: Mesh,
        shards: int,
        init: Callable,
        of_shard: Callable,
        update: Callable,
        placed: TrainState,
    ):
        # One axis, whatever those of `mesh`: the programs of data=8 are those of fsdp=8.
        self._mesh = flat = Mesh(mesh.devices.reshape(-1), ("devices",))
        self._placed, self._home = placed, sharding.replicated(mesh)
        self._here = shards // flat.size
        whole, rows = PartitionSpec(), PartitionSpec("devices")
        self._whole, self._rows = NamedSharding(flat, whole), NamedSharding(flat, rows)
        numbers = np.arange(shards, dtype=np.int32)
        self._numbers = jax.make_array_from_callback(
            (shards,), self._rows, lambda index: numbers[index]
        )

        def program(function, ins, out, **how):
            def alone(*args):
                with jax.sharding.use_abstract_mesh(NO_MESH):
                    return function(*args)

            mapped = jax.shard_map(alone, mesh=flat, in_specs=ins, out_specs=out, check_vma=False)
            return jax.jit(mapped, **how)

        def gradients(params, now, weight, before, part, carry, number):
            del before  # those of one shard wait for those of another: devices have room for one
            state = TrainState(now, jnp.ones((), bool), params, {}, {}, carry, {})
            shard = (number[0], shards, weight)
            grads, carry, sums = of_shard(state, part, shard=shard)
            return jax.tree.map(lambda x: x[None], ((grads, sums), sums["loss"][1])), carry

        self._init = program(init, (), whole)
        self._pick = program(self._pick_here, (rows, whole), rows)
        self._weigh = program(lambda weights: weights.sum()[None], rows, rows)
        ins = (whole, whole, whole, rows, rows, rows, rows)
        self._gradients = program(gradients, ins, (rows, rows), keep_unused=True)
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
        self._exchange = program(self._sum_of_devices, rows, whole)
        self._join = program(lambda *parts: jax.tree.map(_joined, *parts), rows, rows)
        self._update = program(update, whole, whole, donate_argnums=0)
        self._choose = jax.jit(
            lambda holds, a, b: jax.tree.map(lambda x, y: jnp.where(holds, x, y), a, b)
        )

    def init(self) -> TrainState:
        """Return the state of step 0."""
        with jax.set_mesh(self._mesh):
            return jax.device_put(self._init(), self._placed)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Do one update, as `step.train_step`."""
        with jax.set_mesh(self._mesh):
            before = jax.device_put(state.carry, self._rows)
            grads, carry, sums = self._gradients_of(state, before, batch)
            given = jax.device_put(dataclasses.replace(state, carry={}), self._whole)
            new, sums = self._update(given, grads, {}, sums)
            new = dataclasses.replace(new, carry=self._choose(new.healthy, carry, before))
            return jax.device_put(new, self._placed), jax.device_put(sums, self._home)

    def gradients(self, state: TrainState, batch: Batch) -> Any:
        """Return the gradients of the mean objective of a batch, whole on every device."""
        with jax.set_mesh(self._mesh):
            carry = jax.device_put(state.carry, self._rows)
            return jax.device_put(self._gradients_of(state, carry, batch)[0], self._home)

    def _gradients_of(self, state, carry, batch) -> tuple[Any, Any, Metrics]:
        """Return (gradients, new carry, metric sums), as `step.gradients`."""
        params, now = jax.device_put((state.params, state.step), self._whole)
        mine = (jax.device_put(batch, self._rows), carry, self._numbers)
        parts = [self._pick(mine, index) for index in range(self._here)]
        weigh = lambda index: self._weigh(parts[index][0]["weights"])  # noqa: E731
        weight, before, carries = self._sum(weigh), weigh(0), []

        def of(index):
            nonlocal before
            (found, before), carry = self._gradients(params, now, weight, before, *parts[index])
            carries.append(carry)
            return found

        grads, sums = self._sum(of)
        return grads, self._join(*carries), sums

    def _pick_here(self, tree: Any, index: jax.Array) -> Any:
        """Return one of this device's shards."""
        return jax.tree.map(lambda x: x.reshape(self._here, -1, *x.shape[1:])[index], tree)

    def _sum(self, leaf: Callable[[int], Any]) -> Any:
        """Return the sum of `leaf` over all shards, by halves: at most log2(S / D) + 1 are held."""
        held: list[Any] = []
        for number in range(1, self._here + 1):
            held.append(leaf(number - 1))
            while number % 2 == 0:
                last = held.pop()
                held.append(self._add(held.pop(), last))
                number //= 2
        (total,) = held
        return self._exchange(total)

    def _sum_of_devices(self, total: Any) -> Any:
        total = jax.tree.map(lambda x: x[0], total)
        devices, distance = jax.lax.axis_size("devices"), 1
        while distance < devices:
            pairs = [(device, device ^ distance) for device in range(devices)]
            others = jax.lax.ppermute(total, "devices", pairs)
            total, distance = jax.tree.map(jnp.add, total, others), 2 * distance
        return total


def _joined(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts)
