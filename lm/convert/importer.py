"""A Hugging Face folder becomes a run.

The run keeps, in its folder `huggingface/`, the files beside the weights and how the weights lay in theirs,
so that the way back gives the same files.
"""

import collections
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lm import checkpoint, experiment, manifests, models, tasks
from lm import config as config_lib
from lm.config import ConfigError
from lm.convert import architectures, safetensors_file
from lm.convert.folder import Folder
from lm.convert.mapping import Part
from lm.convert.places import KEPT, LAYOUT, UNUSED, Converted, placed
from lm.convert.safetensors_file import shown
from lm.convert.settings import Settings
from lm.data import external
from lm.data.tokenizers import Tokenizer

FLOATS = ("F32", "BF16", "F16")  # what float32 holds exactly


def to_run(source: str | Path, workdir: str | Path, tokenizer_path: str | Path = "") -> Converted:
    """Make the run `workdir`, its only checkpoint that of step 0, of the Hugging Face folder `source`.

    Args:
      tokenizer_path: a tokenizer's file or folder, where `source` has none.

    Raises:
      ConfigError: `workdir` is there already, or the folder is not what its config.json says.
    """
    source, workdir = Path(source), Path(workdir)
    folder = Folder(source)
    name, architecture = _architecture(folder)
    tensors = {architectures.current_name(architecture, n, bare=False) for n in folder.entries}
    settings = Settings(folder.config, str(source / "config.json"), tensors)
    cfg = _config(architecture, settings, folder)
    parts = architecture.parts(cfg)
    renamed = _check_names(folder, architecture, cfg, parts)
    tokenizer = external.open_tokenizer(tokenizer_path or source)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer_path or source}: it has {tokenizer.vocab_size} ids, and the model of "
            f"{settings.where} has {cfg.vocab_size}; give the tokenizer that belongs to it (--tokenizer)"
        )
    _check_task(settings, architecture, cfg, tokenizer)
    with placed(workdir, "--to") as unfinished:
        params = _read_parameters(folder, parts, renamed)
        _check_rest(folder, architecture, cfg, renamed)
        with checkpoint.Checkpointer(unfinished, checkpoint.Config()) as saver:
            state = {"params": traverse_util.unflatten_dict(params, sep=".")}
            saver.save(0, state, {}, wait=True)
        _write_run_files(unfinished, workdir, architecture, cfg, tokenizer)
        left_out = _keep(unfinished / KEPT, folder, architecture, cfg, renamed)
    if not tokenizer_path:  # it is the tokenizer, which the run has
        left_out = [file for file in left_out if file != external.OURS]
    dtypes = sorted({entry.dtype for entry in folder.entries.values()})
    count = sum(int(array.size) for array in params.values())
    words = f"{tokenizer.name} of {tokenizer.vocab_size:,}"
    return Converted(name, count, "/".join(dtypes), words, _listed(left_out))


def _architecture(folder: Folder) -> tuple[str, Any]:
    """Return the name and the module of a folder's architecture."""
    where, name = folder.path / "config.json", folder.config.get("model_type")
    if name not in architectures.names():
        raise ConfigError(
            f"{where}: model_type={shown(name)} is no architecture that is known here; known are "
            f"{', '.join(architectures.names())}"
        )
    architecture = architectures.architecture(str(name))
    classes = folder.config.get("architectures")
    if classes is not None and classes not in [[name] for name in architecture.CLASSES]:
        raise ConfigError(
            f"{where}: architectures={shown(classes)}; of {name} only "
            f"{' and '.join(architecture.CLASSES)} can be read"
        )
    return str(name), architecture


def _config(architecture: Any, settings: Settings, folder: Folder) -> Any:
    """Return the family's frozen config."""
    fields = architecture.read(settings)
    # Before anything is made for each layer.
    for field in (field for field in fields if field.endswith("_layers")):
        if fields[field] > len(folder.entries):
            raise ConfigError(
                f"{settings.where}: {fields[field]} layers, and {folder.where} has "
                f"{len(folder.entries)} tensors; get the folder again"
            )
    cls: Any = models.config_class(architecture.FAMILY)
    if "mask" in {field.name for field in dataclasses.fields(cls)}:
        fields["mask"] = "segments"
    try:
        return config_lib.freeze(cls, fields, where="model")
    except ConfigError as error:
        raise ConfigError(f"{settings.where}: {error}") from None


def _check_names(folder: Folder, architecture: Any, cfg: Any, parts: list[Part]) -> dict[str, str]:
    """Return {name of a tensor in the folder: its name in the architecture}.

    Raises:
      ConfigError: tensors are missing, too many or of another shape.
    """
    wanted = {name: shape for part in parts for name, shape in part.theirs}
    constants, copies = architecture.constants(cfg), architecture.copies(cfg)
    spare = architecture.spare(cfg)
    known = {*wanted, *constants, *copies, *spare}
    bare = not any(name.startswith(architecture.PREFIX) for name in folder.entries)
    renamed = {}
    for name in folder.entries:
        names = [architectures.current_name(architecture, name, bare=b) for b in (bare, False)]
        renamed[name] = names[0] if names[0] in known else names[1]
    found = {theirs: folder.entries[name].shape for name, theirs in renamed.items()}
    shapes = {name: constant.shape for name, constant in constants.items()} | wanted | spare
    shapes |= {name: wanted[original] for name, original in copies.items()}
    times = collections.Counter(renamed.values())
    problems = {
        "there twice, by an older name too": [name for name in times if times[name] > 1],
        "missing": [name for name in wanted if name not in found],
        "not known": [name for name in found if name not in known],
        "of another shape": [
            f"{name} {list(found[name])} and not {list(shape)}"
            for name, shape in shapes.items()
            if name in found and found[name] != shape
        ],
        f"of a type that is not {', '.join(FLOATS)}": [
            f"{name} {folder.entries[name].dtype}"
            for name, theirs in renamed.items()
            if theirs in wanted and folder.entries[name].dtype not in FLOATS
        ],
    }
    words = [f"{what}: {_listed(names)}" for what, names in problems.items() if names]
    if words:
        raise ConfigError(
            f"{folder.where}: its tensors are not those of config.json; {'; '.join(words)}; get the "
            "folder again"
        )
    return renamed


def _listed(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown_names = ", ".join(shown(name).strip("'") for name in names[:4])
    return shown_names + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_task(settings: Settings, architecture: Any, cfg: Any, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer without the special tokens that the model's task has for it."""
    section = architecture.task(cfg)
    frozen: Any = config_lib.freeze(tasks.config_class(section["name"]), section, where="task")
    kind = tasks.kind_for(tasks.kinds(frozen), models.family(architecture.FAMILY).Model.accepts)
    task = experiment.build_task({"task": frozen, "model": cfg}, kind, tokenizer, ())
    if task.vocab_size > cfg.vocab_size:
        raise ConfigError(
            f"{settings.where}: task.name={frozen.name!r} needs {task.vocab_size} ids with its special "
            f"tokens, of which the tokenizer lacks some, and the model has {cfg.vocab_size}; give a "
            "tokenizer that has them (--tokenizer)"
        )


def _read_parameters(
    folder: Folder, parts: list[Part], renamed: Mapping[str, str]
) -> dict[str, Any]:
    """Return our parameters by path, in float32."""
    waiting: dict[str, np.ndarray] = {}
    part_of = {name: part for part in parts for name, _ in part.theirs}
    made: dict[str, Any] = {}
    wanted = [name for name, theirs in renamed.items() if theirs in part_of]
    for name, array in folder.read(wanted):
        part = part_of[renamed[name]]
        waiting[renamed[name]] = array.astype(np.float32)
        if all(theirs in waiting for theirs, _ in part.theirs):
            arrays = [waiting.pop(theirs) for theirs, _ in part.theirs]
            made[part.ours] = jnp.asarray(part.join(*arrays))
    return made


def _check_rest(folder: Folder, architecture: Any, cfg: Any, renamed: Mapping[str, str]) -> None:
    """Refuse copies and constants that are not what they are by the config."""
    copies, constants = architecture.copies(cfg), architecture.constants(cfg)
    theirs = {name: original for original, name in renamed.items()}
    for name in [name for name in copies if name in theirs]:
        (_, copy), (_, original) = (
            *folder.read([theirs[name]]),
            *folder.read([theirs[copies[name]]]),
        )
        if copy.dtype != original.dtype or copy.tobytes() != original.tobytes():
            raise ConfigError(
                f"{folder.where}: {name} is not {copies[name]}, which config.json ties it to; set "
                "tie_word_embeddings to false there if they are two"
            )
    for name in [name for name in constants if name in theirs]:
        ((_, array),) = folder.read([theirs[name]])
        smallest = 2**-24 if array.dtype == np.float16 else 1e-8  # what float16 tells from 0
        expected = constants[name].make()
        if not np.allclose(array.astype(np.float32), expected, rtol=1e-2, atol=smallest):
            raise ConfigError(f"{folder.where}: {name} is not what config.json makes it; remove it")


def _write_run_files(
    unfinished: Path, workdir: Path, architecture: Any, cfg: Any, tokenizer: Tokenizer
) -> None:
    """Write what a run's folder holds besides its checkpoint."""
    config = config_lib.ConfigDict({
        "data": {
            "tokenizer": "file",
            "tokenizer_path": str(workdir.absolute() / "tokenizer"),
            "batch_size": 8,
        },
        "task": architecture.task(cfg),
        "model": dataclasses.asdict(cfg),
    })  # fmt: skip
    config = config_lib.complete(config, experiment.SCHEMA)
    experiment.freeze(config)
    tokenizer.save(unfinished / "tokenizer")
    manifests.write_whole(unfinished / "config.json", config_lib.to_json(config))
    # No text was read to make it: an evaluation without a path of its own says that it is another.
    data = {"fingerprint": "", "tokenizer": tokenizer.fingerprint, "labels": [], "paired": False}
    manifests.write_whole(unfinished / "data.json", json.dumps(data, indent=2) + "\n")


def _keep(
    target: Path, folder: Folder, architecture: Any, cfg: Any, renamed: Mapping[str, str]
) -> list[str]:
    """Keep what the way back needs to give the same files; return the names of what is not kept."""
    target.mkdir()
    beside, left_out = folder.beside()
    for file in beside:
        shutil.copyfile(file, target / file.name)
    layout = {"architecture": folder.config["model_type"], "files": folder.layout(renamed)}
    manifests.write_whole(target / LAYOUT, json.dumps(layout) + "\n")
    unused = {name: part.unused for part in architecture.parts(cfg) for name, _ in part.theirs}
    unused = {name: rows for name, rows in unused.items() if rows}
    spare, constants = architecture.spare(cfg), architecture.constants(cfg)
    wanted = {*spare, *unused, *constants}
    kept = {}
    for name, array in folder.read([name for name, theirs in renamed.items() if theirs in wanted]):
        theirs = renamed[name]
        made = constants[theirs].make().astype(array.dtype) if theirs in constants else None
        if made is None or made.tobytes() != array.tobytes():  # another library rounds otherwise
            kept[theirs] = array[: unused[theirs]] if theirs in unused else array
    if kept:
        safetensors_file.write(target / UNUSED, kept, order=list(kept), metadata=None)
    return left_out
