"""A run's folder: held by one process, its own files, and what a run that resumes there may change."""

import contextlib
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
from ml_collections import ConfigDict

from lm import (
    checkpoint,
    complete,
    distributed,
    experiment,
    manifests,
    peers,
    receipt,
    remote,
    tasks,
)
from lm import config as config_lib
from lm.config import ConfigError
from lm.data import corpus, tokenizers
from lm.receipt import read_json

# What a resumed run may not change; inside it, what only says how the same numbers are computed; and
# what is listed when it changes.
FIXED = (
    "seed",
    "task.",
    "model.",
    "data.batch_size",
    "data.order",
    "optim.name",
    "mesh.local_steps",
)
FREE = (
    "model.scan",
    "model.remat",
    "model.kernel",
    "model.microbatches",
    "model.stage_repeats",
    "model.context_parallel",
)
LOCK_TRIES = (
    10  # a tenth of a second apart: `tools.checkpoint` looks for a moment whether a run has it
)
SEEN_SECONDS = 90  # after which what another host has written is seen here, or never
LISTED = ("optim.", "train.", "eval.", "checkpoint.")


def facts(workdir: Path, made: experiment.Experiment) -> dict[str, str]:
    """Return what all processes of a run must have in common."""
    flat = config_lib.flatten(made.config)
    return {
        **{name: repr(config_lib.plain(value)) for name, value in flat.items()},
        "the tokenizer": made.corpus.tokenizer.fingerprint,
        "the data's fingerprint": made.corpus.fingerprint,
        "the code's version": peers.code_version(),
        "jax": jax.__version__,
        "workdir": str(workdir),
    }


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[Callable[[], str]]:
    """Hold `workdir` for this run alone, where its file system has locks; its first process does.

    Yield a function that says what is wrong where the folder of this name is not the same any more.

    Raises ConfigError where another run has it, a process of this one does not see it, or its checkpoints
    are in no folder.
    """
    if jax.process_index() > 0:
        mark = distributed.from_first("")
        if not _seen(workdir, mark):
            raise ConfigError(
                f"workdir={workdir}: process {jax.process_index()} does not see there what process 0 writes; "
                "give a folder that all hosts share"
            )
        yield lambda: ""
        return
    if os.path.lexists(folder := workdir / "checkpoints") and not folder.is_dir():
        raise ConfigError(
            f"{folder}: not a folder, or a link to one that is not there; mount its disk, or move it away"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    # Not "w": another run's mark stays until this one has the lock.
    with (workdir / "lock").open("a+") as file:
        if not _locked(file):
            raise ConfigError(
                f"workdir={workdir}: another process trains there; wait for it, or choose another"
            )
        mark = uuid.uuid4().hex
        file.truncate(0)
        file.write(mark)
        file.flush()
        os.fsync(file.fileno())
        distributed.from_first(mark)
        held = os.open(workdir, os.O_RDONLY)
        try:
            yield lambda: _gone(workdir, held)
        finally:
            os.close(held)


def _locked(file: IO[str]) -> bool:
    """Lock a file, or a file system without locks; False where a process has it, and not to look only."""
    for left in reversed(range(LOCK_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:
                time.sleep(0.1)
        except OSError:
            return True
        else:
            return True
    return False


def check_place(workdir: Path) -> None:
    """Refuse a file; in the first process: what others look for too early, NFS takes to be missing."""
    if jax.process_index() == 0 and workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"workdir={workdir}: a file; name a folder")


def _seen(workdir: Path, mark: str) -> bool:
    """Return whether `mark`, which process 0 has written, is seen in `workdir`, within a while."""
    last = time.monotonic() + SEEN_SECONDS
    while True:
        for folder in (workdir.parent, workdir):
            with contextlib.suppress(OSError):
                os.listdir(folder)  # else NFS remembers for up to a minute what was not there
        with contextlib.suppress(OSError):
            if (workdir / "lock").read_text() == mark:
                return True
        if time.monotonic() > last:
            return False
        time.sleep(1)


def _gone(workdir: Path, held: int) -> str:
    """Say so where the folder of this name is not the one that is held."""
    try:
        same = os.path.samestat(os.stat(workdir), os.fstat(held))
    except (FileNotFoundError, NotADirectoryError):
        same = False
    except OSError:  # which says nothing of the folder
        same = True
    return "" if same else f"{workdir} was moved or taken away; give --workdir where it is now"


def completer(workdir: str | Path, loaded: checkpoint.Loaded) -> complete.Completer:
    """Return what turns text into text with the trained model of a workdir."""
    tokenizer = tokenizers.load(Path(workdir) / "tokenizer")
    described = read_json(Path(workdir) / "data.json")
    if "paired" not in described:
        raise ConfigError(
            f"workdir={workdir}: its data.json is of an older version; train there again"
        )
    section = config_lib.complete(loaded.config, experiment.SCHEMA).task
    cfg: Any = config_lib.freeze(tasks.config_class(section.name), section, where="task")
    kind = tasks.kind_for(tasks.kinds(cfg), loaded.model.accepts)
    sections = {"task": cfg, "model": loaded.model.cfg}
    task = experiment.build_task(sections, kind, tokenizer, described["labels"])
    return complete.Completer(loaded.model, loaded.params, task, tokenizer, described["paired"])


def identity(made: experiment.Experiment) -> str:
    """Return what a run that begins with this config is known by; begun twice, it is the same run."""
    flat = config_lib.flatten(made.config)
    parts = (*FIXED, "optim.", "train.")
    begins = {k: v for k, v in flat.items() if k.startswith(parts) and k not in FREE}
    return manifests.digest({"config": begins, "data": made.corpus.fingerprint})


def check_resume(workdir: Path, made: experiment.Experiment) -> None:
    """Refuse to resume where the new config would silently make another run.

    Of what came from checkpoint.remote also another optim or train: it may be another run.

    Raises:
      ConfigError: data, task, model or seed differ from those of the checkpoint in `workdir`.
    """
    if not manifests.good_steps(workdir / "checkpoints"):
        return
    old = config_lib.with_defaults(checkpoint.read_config(workdir), experiment.SCHEMA)
    changes = config_lib.difference(old, made.config)
    refused = [
        f"{key} {before!r} -> {after!r}"
        for key, before, after in changes
        if key.startswith(FIXED) and key not in FREE
    ]
    before = receipt.environment(workdir)
    environment = [
        f"{key} {before[key]} -> {now}"
        for key, now in experiment.environment(made).items()
        if before.get(key, now) != now
    ]
    groups = experiment.environment(made)["replicas"]
    if before.get("replicas", groups) != groups:
        refused.append(f"mesh.dcn, the groups that train apart, {before['replicas']} -> {groups}")
    if _data_of(workdir) == made.corpus.fingerprint:
        refused += _mixed_anew(workdir, made, old, changes)
    else:
        keys = [f"{key} {b!r} -> {a!r}" for key, b, a in changes if key.startswith("data.")]
        causes = ", ".join([*keys, *(e for e in environment if e.startswith("python"))])
        refused.append(f"the data's content, tokenizer or split ({causes or 'same settings'})")
    fetched = workdir / remote.FETCHED
    if came := fetched.read_text(errors="replace") if fetched.exists() else "":
        refused += [
            f"{key} {before!r} -> {after!r}"
            for key, before, after in changes
            if key.startswith(("optim.", "train.")) and key != "train.num_steps"
        ]
    if refused and came:
        raise ConfigError(
            f"checkpoint.remote: what is in workdir={workdir} came from {came}, which holds a run of another "
            f"config: {'; '.join(refused)}; set these back, or choose another --workdir and another "
            "checkpoint.remote"
        )
    if refused:
        raise ConfigError(
            f"workdir={workdir} holds a run of another config: {'; '.join(refused)}; "
            "choose another --workdir, or set these back"
        )
    for key, before, after in changes:
        if key.startswith(LISTED) or key in FREE or key in corpus.MIXING:
            print(f"resuming with {key}: {before!r} -> {after!r}")
    for change in environment:
        print(f"resuming with another {change}")


def _data_of(workdir: Path) -> str:
    """Return the fingerprint of the data of a run; without its data.json, as the newest receipt says."""
    told = receipt.last(workdir).get("data", {}).get("corpus", "")
    if told and not os.path.lexists(workdir / "data.json"):
        return told
    return read_json(workdir / "data.json").get("fingerprint", "")


def _mixed_anew(
    workdir: Path, made: experiment.Experiment, old: ConfigDict, changes: Sequence[tuple]
) -> list[str]:
    """Return what is wrong where the rows read so far were mixed otherwise than is now asked for."""
    changed = [f"{key} {b!r} -> {a!r}" for key, b, a in changes if key in corpus.MIXING]
    if not changed or made.batches.mixture is None:
        return []
    before = corpus.mixture_of(experiment.section(old, "data"), made.corpus)
    step = manifests.good_steps(workdir / "checkpoints")[-1]
    row = step * made.batches.batch_size
    if before is not None and before.until(row) == made.batches.mixture.until(row):
        return []
    return [f"{', '.join(changed)} (from step {step} on: a stage in data.mixture_stages)"]


def write_files(
    workdir: Path, made: experiment.Experiment, first: int, origins: Mapping[str, str]
) -> None:
    """Write the config, data, tokenizer, and a receipt of this start.

    A config that was another until now is kept as `config.<first>.json`.
    """
    if jax.process_index() > 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    receipt.write(workdir, made, first, origins)
    (workdir / remote.FETCHED).unlink(missing_ok=True)
    path, now = workdir / "config.json", config_lib.to_json(made.config)
    kept = workdir / f"config.{first}.json"  # where there is one, of the run that came to this step
    if path.is_file() and (before := path.read_bytes()) != now.encode() and not kept.exists():
        manifests.write_whole(kept, before)
    manifests.write_whole(path, now)
    described = {"fingerprint": made.corpus.fingerprint, **made.corpus.report}
    manifests.write_whole(workdir / "data.json", json.dumps(described, indent=2) + "\n")
    made.corpus.tokenizer.save(workdir / "tokenizer")
