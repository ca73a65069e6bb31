"""The trail of a run: fingerprints of the batch, the state and the gradients of every so many steps.

A row of `<workdir>/fingerprints.jsonl` is of one step: the state before it, the batch it takes, the
gradient of that batch. They are computed by programs of their own, so that the step is the same program, and
gives the same bits, with and without them.
"""

from pathlib import Path
from typing import Any

import jax

from lm import experiment, fingerprint, metrics, sharding, step, stored

FILE = "fingerprints.jsonl"


class Fingerprints:
    """Fingerprints of a step of an experiment, in hexadecimal, by names such as "params.layers.scale"."""

    def __init__(self, made: experiment.Experiment):
        whole = sharding.replicated(made.mesh)
        self._arrays = jax.jit(_of_arrays, out_shardings=whole)
        self._gradients = None
        # Groups that train apart have gradients of their own, inside the step.
        if made.model.learns == "gradient" and not made.cfg["mesh"].local_steps:
            self._gradients = experiment.gradients_of(made)

    def of_state(self, state: step.TrainState) -> dict[str, str]:
        """Return those of every array of a state, as a checkpoint's manifest names them."""
        return _shown(self._arrays(stored.flatten(state)))

    def of_step(self, state: step.TrainState, batch: step.Batch) -> dict[str, str]:
        """Return those of a step: its batch, the state before it, its gradients."""
        found = _shown(self._arrays({f"batch.{name}": array for name, array in batch.items()}))
        found |= self.of_state(state)
        if self._gradients is not None:
            grads = stored.flatten(self._gradients(state, batch))
            found |= _shown(self._arrays({f"gradients.{name}": x for name, x in grads.items()}))
        return found


def _of_arrays(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: fingerprint.of(array) for name, array in arrays.items()}


def _shown(found: Any) -> dict[str, str]:
    return {name: fingerprint.shown(value) for name, value in jax.device_get(found).items()}


class Trail:
    """Writes the trail of a run that begins at step `first`, whose row and later ones are moved aside."""

    def __init__(self, workdir: Path, made: experiment.Experiment, first: int):
        self._every = made.cfg["train"].fingerprint_every_steps
        self.begun = False  # whether a step was recorded, and so the programs are there
        self._fingerprints = Fingerprints(made)
        self._file: metrics.Jsonl | None = None
        if jax.process_index() == 0:
            metrics.move_rows_aside(workdir / FILE, after=first - 1)
            if self._every:
                self._file = metrics.Jsonl(workdir / FILE)

    def due(self, now: int) -> bool:
        """Return whether step `now` is recorded, of which the state must then be known (`Guard.settle`)."""
        return bool(self._every) and now % self._every == 0

    def at(self, now: int, state: step.TrainState, batch: step.Batch) -> None:
        """Record step `now`, if it is one of those recorded; the row is on the disk when this returns."""
        if not self.due(now):
            return
        found = self._fingerprints.of_step(state, batch)
        self.begun = True
        if self._file is not None:
            self._file.append({"step": now, "fingerprints": found})
            self._file.sync()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
