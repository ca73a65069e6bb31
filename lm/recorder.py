"""What is kept of a bad step: all that `tools.replay` takes it again with, in `<workdir>/recorder/<step>/`.

    record.json           what was bad; where each row came from; norms by layer; seed, objective, versions
    config.json           of the run
    tokenizer/            its own
    checkpoints/<step>/   the state before the step and, as `batch`, its rows: a checkpoint like others

The folder gets its name when all of it is written, by all processes: it is whole or not there.
"""

import contextlib
import dataclasses
import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import jax

from lm import (
    anatomy,
    checkpoint,
    distributed,
    experiment,
    manifests,
    peers,
    saving,
    sharding,
    step,
)
from lm import config as config_lib
from lm.config import ConfigError
from lm.data import origins

FOLDER, FILE = "recorder", "record.json"
# Fields with which the steps of a run are others, and so the bad ones among them.
OF_NUMBERS = (
    "seed", "data.", "task.", "model.", "optim.", "mesh.local_steps", "train.accumulate_steps",
    "train.exact_reduction", "train.freeze_vectors", "train.init_from", "train.label_smoothing",
    "train.spike_", "train.vectors", "train.z_loss",
)  # fmt: skip
_LOOK = "look into it: python -m tools.replay"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write(
    workdir: Path,
    made: experiment.Experiment,
    number: int,
    state: step.TrainState,
    batch: step.Batch,
    *,
    why: str,
    metrics: dict[str, float],
) -> str:
    """Record step `number`, which `state` is before; return what is to be said of it.

    Nothing is written where it is there already, or `train.recordings` others are; what is there of another
    config is moved aside. All processes call it. Raises OSError where it cannot be written.
    """
    folder = workdir / FOLDER / str(number)
    draft = folder.with_name(f"{number}.partial")
    kept = ""
    if jax.process_index() == 0:
        try:
            kept = _make_room(folder, draft, made)
        except (OSError, ConfigError) as error:
            kept = f"not recorded: {error}"
    if kept := distributed.from_first(kept):
        return f"step {number + 1} is {kept}"
    try:
        described = {
            "step": number,
            "why": why,
            "metrics": {name: anatomy.finite_or_none(value) for name, value in metrics.items()},
            **_write_arrays(draft, made, number, state, batch),
            **_settings(made),
            "rows": origins.of_step(made.batches, made.corpus.members, made.corpus.names, number),
        }
        if jax.process_index() == 0:
            made.corpus.tokenizer.save(draft / "tokenizer")
            manifests.write_whole(draft / "config.json", config_lib.to_json(made.config))
            manifests.write_sealed(draft / FILE, described)
            manifests.move_aside(folder)
            draft.rename(folder)
            manifests.sync(folder.parent)
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    return f"recorded: {folder}; {_LOOK} {folder}"


def _make_room(folder: Path, draft: Path, made: experiment.Experiment) -> str:
    """Make the empty folder `draft` where `folder` is wanted; else return why not."""
    if folder.exists() and not is_of_another(folder, made):
        return f"recorded already: {folder}; {_LOOK} {folder}"
    others = [path for path in folder.parent.glob("*") if path.name.isdecimal() and path != folder]
    if len(others) >= (most := made.cfg["train"].recordings):
        return (
            f"not recorded: {len(others)} are in {folder.parent} already (train.recordings={most})"
        )
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return ""


def is_of_another(folder: Path, made: experiment.Experiment) -> bool:
    """Return whether the config in a folder is of a run whose steps are others than those of `made`."""
    old = config_lib.with_defaults(checkpoint.read_config(folder), experiment.SCHEMA)
    changed = config_lib.difference(old, made.config)
    return any(key.startswith(OF_NUMBERS) for key, *_ in changed)


def _write_arrays(
    draft: Path, made: experiment.Experiment, number: int, state: step.TrainState, batch: step.Batch
) -> dict[str, Any]:
    """Write state and batch; return the norms of parameters and gradients, made meanwhile."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    with contextlib.closing(saving.Writer(draft / "checkpoints")) as writer:
        state_and_batch = {**parts, "batch": batch}
        writer.start(number, state_and_batch, {"metrics": {}}, good=lambda _: None)
        try:
            found = {
                "parameters": _parameter_norms(state),
                "gradients": _gradient_norms(made, state, batch),
            }
        finally:
            error = writer.join()
        if error:
            raise error
    return found


def _settings(made: experiment.Experiment) -> dict[str, Any]:
    """Return what a step depends on besides state, batch and config, and what it ran on."""
    return {
        "seed": made.config.seed,
        "objective": dataclasses.asdict(made.objective),
        "accumulate": made.cfg["train"].accumulate_steps,
        "exact": made.cfg["train"].exact_reduction,
        "apart": bool(made.cfg["mesh"].local_steps),
        "groups": sharding.ways(made.mesh, "replicas") if made.cfg["mesh"].local_steps else 1,
        "shards": sharding.batch_shards(made.mesh),
        "length_parts": sharding.ways(made.mesh, "act_length"),
        "environment": experiment.environment(made),
        "code": peers.code_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _parameter_norms(state: step.TrainState) -> dict[str, Any]:
    """Return the norms of the parameters: of groups that train apart a list, one of each."""
    if not state.local:
        return anatomy.norms(state.params)
    found = anatomy.norms({"local": state.local["params"]})
    return {name.removeprefix("local."): about for name, about in found.items()}


def _gradient_norms(
    made: experiment.Experiment, state: step.TrainState, batch: step.Batch
) -> dict[str, Any]:
    """Return the norms of the step's gradients; {} where groups train apart, each with its own."""
    if state.local or made.model.learns != "gradient":
        return {}
    return anatomy.norms(experiment.gradients_of(made)(state, batch))
