"""Save, verify and restore a run; `load(workdir)` gives a usable model in one line.

A checkpoint is the folder `<workdir>/checkpoints/<step>/`: `state/`, written by Orbax, asynchronous, as
one flat dictionary from parameter path to array, and `manifest.json`, written last: size and SHA-256 of
every file, shape and type of every array, the metrics. Without a manifest that matches, a checkpoint is
not good: it is moved aside with a word, never deleted, and the newest good one before it is used.
"""

import dataclasses
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import linen as nn
from ml_collections import ConfigDict

from lm import config as config_lib
from lm import distributed, hardware, manifests, models
from lm.config import ConfigError, Duration
from lm.step import parameter_axes
from lm.stored import flatten, handler, num_layers, restore, shapes_of, sources_of, unflatten


@dataclasses.dataclass(frozen=True)
class Config:
    every_steps: Duration = 1000  # between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints kept
    keep_best: bool = True  # keep the lowest metric's too, of those saved at an evaluated step
    best_metric: str = "eval/loss"  # what the best has the lowest of

    def __post_init__(self):
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep={self.keep}: keep at least 1")
        if not re.fullmatch(r"eval(_raw)?/(loss|perplexity|bits_per_byte)", self.best_metric):
            raise ConfigError(
                f"checkpoint.best_metric={self.best_metric}: use eval/loss, eval/perplexity, "
                "eval/bits_per_byte, or eval_raw/... of the same"
            )


class Loaded(NamedTuple):
    """A trained model: `config`, the Linen `model`, and its `params` (averaged, where that was kept)."""

    config: ConfigDict
    model: nn.Module
    params: Any


class Checkpointer:
    """Writes a run's checkpoints and reads them back. One save is in flight at a time."""

    def __init__(self, workdir: str | Path, cfg: Config):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.cfg = cfg
        self._orbax = ocp.AsyncCheckpointer(handler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, state: Any, metrics: Mapping[str, float], skipped: Mapping[int, str] = {}
    ) -> None:
        """Start to save `state`; returns when its arrays are copied. Raises what the last save raised.

        `skipped` are the steps before `step` that were left out, and why (see `lm.guard`).
        """
        self.wait()
        target = self.folder / str(step)
        if jax.process_index() == 0:
            manifests.move_aside(target)
            target.mkdir(parents=True)
        distributed.from_first("the folder is there")
        arrays = flatten(state)
        try:
            self._orbax.save(target / "state", args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise _failed(target, error) from error
        described = {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}
        manifest = {
            "format": manifests.FORMAT,
            "step": step,
            "metrics": dict(metrics),
            "arrays": described,
        }
        if skipped:
            manifest["skipped"] = {str(number): why for number, why in skipped.items()}
        self._thread = threading.Thread(target=self._finish, args=(target, manifest), daemon=True)
        self._thread.start()

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` with the checkpoint of `step`, which was saved without."""
        self.wait()
        if jax.process_index() == 0:
            manifests.add_metrics(self.folder, step, metrics)

    def _finish(self, target: Path, manifest: dict[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                manifests.write(target, manifest)
                self._retire()
        except Exception as error:  # handed to the training loop by `wait`
            self._error = _failed(target, error)

    def wait(self) -> None:
        """Wait until the save in flight is good. Raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the save in flight and release Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _retire(self) -> None:
        """Delete all but the newest `keep` and the best checkpoint."""
        steps = manifests.good_steps(self.folder)
        kept = set(steps[-self.cfg.keep :])
        if (
            self.cfg.keep_best
            and (best := manifests.best_step(self.folder, self.cfg.best_metric)) is not None
        ):
            kept.add(best)
        for step in set(steps) - kept:
            # Without its manifest it is no checkpoint, so a kill on the way leaves nothing that looks good.
            (self.folder / str(step) / manifests.MANIFEST).unlink()
            shutil.rmtree(self.folder / str(step))

    def restore_latest(self, abstract: Any, say: Callable[[str], None] = print) -> Any | None:
        """Return the newest good state with the shapes and shardings of `abstract`; None when there is none.

        What is damaged or unfinished is moved aside and said.
        """
        found = self._newest_good(say) if jax.process_index() == 0 else None
        if not (step := distributed.from_first("" if found is None else str(found))):
            return None
        return unflatten(abstract, restore(self.folder, int(step), flatten(abstract)))

    def _newest_good(self, say: Callable[[str], None]) -> int | None:
        for step in reversed(manifests.all_steps(self.folder)):
            if not (problem := manifests.problem(self.folder, step)):
                return step
            aside = manifests.move_aside(self.folder / str(step))
            say(f"checkpoint {step} is not used: {problem}; moved to {aside}")
        return None


def _failed(target: Path, error: Exception) -> OSError:
    """Return the error of a save, in a line, and free the room that its part took, unless it is good."""
    if jax.process_index() == 0 and not (target / manifests.MANIFEST).exists():
        shutil.rmtree(target, ignore_errors=True)
    why = (str(error).splitlines() or [type(error).__name__])[0]
    full = "No space left on device" in str(error) and "No space left" not in why
    return OSError(f"checkpoint {target.name}: {why}{' (No space left on device)' if full else ''}")


def find_step(workdir: str | Path, step: int | str = "last") -> int:
    """Return a finished step: "last", "best" or a number.

    Raises:
      ConfigError: there is none.
    """
    folder = Path(workdir) / "checkpoints"
    steps = manifests.good_steps(folder)
    if not steps:
        raise ConfigError(
            f"workdir={workdir}: no finished checkpoint in {folder}; train there first"
        )
    if step == "best":
        metric = read_config(workdir).checkpoint.best_metric
        best = manifests.best_step(folder, metric)
        if best is None:
            raise ConfigError(
                f"step=best: no checkpoint in {folder} was saved at a step that has {metric}; use "
                "last, or let checkpoint.every_steps be a multiple of eval.every_steps"
            )
        step = best
    elif step == "last":
        step = steps[-1]
        if newer := [other for other in manifests.all_steps(folder) if other > step]:
            print(f"notice: {folder / str(newer[-1])} is not whole; using {step}", file=sys.stderr)
    if not str(step).isdecimal() or int(step) not in steps:
        raise ConfigError(f"step={step}: {folder} has {', '.join(map(str, steps))}, last and best")
    return int(step)


def read_config(workdir: str | Path) -> ConfigDict:
    """Return the resolved config of a run.

    Raises:
      ConfigError: the folder has no `config.json`, or a broken one.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"workdir={workdir}: no config.json there; give the folder of a run")
    config = config_lib.from_json(path.read_text(errors="replace"), where=str(path))
    if not isinstance(config.get("model"), ConfigDict) or "name" not in config.model:
        raise ConfigError(
            f"{path}: not the config of a run (no model.name in it); restore the file"
        )
    return config


def load(workdir: str | Path, step: int | str = "last") -> Loaded:
    """Return (config, model, params) of a run at `step`: a number, "last" or "best".

    The averaged parameters where the run kept an average, on this process's first device.

    Raises:
      ConfigError: no such run or checkpoint, or a damaged one, with the file named.
    """
    config = read_config(workdir)
    step = find_step(workdir, step)
    folder = Path(workdir).absolute() / "checkpoints"
    if bad := manifests.problem(folder, step):
        raise ConfigError(f"checkpoint {folder / str(step)}: {bad}; choose another with --step")
    cls = models.config_class(config.model.name)
    cfg: Any = config_lib.freeze(cls, config.model, where="model")
    if not (cfg.vocab_size and cfg.max_length):
        raise ConfigError(
            f"workdir={workdir}: config.json leaves model.vocab_size or model.max_length open; restore it"
        )
    if getattr(cfg, "matmul_dtype", "") and not hardware.has_fp8():
        print(
            f"notice: {workdir}: model.matmul_dtype={cfg.matmul_dtype!r} is not for this device; its "
            "products are of the computation's type",
            file=sys.stderr,
        )
        cfg = dataclasses.replace(cfg, matmul_dtype="")
    model = models.build(cfg)
    placed = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if model.learns == "counting":
        return Loaded(config, model, model.estimate(restore_counts(folder, step, placed)))
    _, shapes = parameter_axes(model)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), shapes
    )
    return Loaded(config, model, restore_params(folder, step, abstract))


def restore_counts(folder: Path, step: int, placed: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Return what a family that learns by counting has seen, as large as it was stored."""
    stored = (manifests.read(folder, step) or {})["arrays"]
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=placed)
        for name, (shape, dtype) in stored.items()
        if name.startswith("counts.")
    }
    arrays = restore(folder, step, wanted)
    return {name.removeprefix("counts."): array for name, array in arrays.items()}


def restore_params(folder: Path, step: int, abstract: Any) -> Any:
    """Return the parameters of a checkpoint (averaged, where that was kept) like `abstract`."""
    stored = (manifests.read(folder, step) or {})["arrays"]
    part = "ema" if any(name.startswith("ema.") for name in stored) else "params"
    wanted = flatten({part: abstract})
    return unflatten({part: abstract}, restore(folder, step, wanted))[part]


def init_from(source: str | Path, params: Any, say: Callable[[str], None] = print) -> Any:
    """Return `params` with every parameter of the same name in `source` taken from there.

    Args:
      source: a run's folder (its last checkpoint), or one checkpoint's folder.
      params: placed arrays, kept where `source` has none of the name; both kinds are said.

    Raises:
      ConfigError: no checkpoint there, no name in common, or a shape that differs.
    """
    path = Path(source).absolute()
    if path.name.isdecimal() and (path / manifests.MANIFEST).is_file():
        folder, step = path.parent, int(path.name)
    else:
        folder, step = path / "checkpoints", find_step(path)
    if bad := manifests.problem(folder, step):
        raise ConfigError(f"train.init_from={source}: {bad}; choose another checkpoint")
    stored = (manifests.read(folder, step) or {})["arrays"]
    part = "ema" if any(name.startswith("ema.") for name in stored) else "params"
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in flatten({part: params}).items()
    }
    depth, shapes = num_layers(wanted), shapes_of(stored)
    names = {
        name: [source for source, _, _ in sources_of(name, leaf, shapes, depth)]
        for name, leaf in wanted.items()
    }
    missing = sorted(name for name in wanted if not set(names[name]) <= set(stored))
    used = {source for name in wanted if name not in missing for source in names[name]}
    extra = sorted(name for name in stored if name.startswith(f"{part}.") and name not in used)
    if len(missing) == len(wanted):
        raise ConfigError(
            f"train.init_from={source}: no parameter of that model has a name of this one's"
        )
    found = restore(
        folder, step, {name: leaf for name, leaf in wanted.items() if name not in missing}
    )
    say(f"init_from {source} step {step}: {len(found)} parameters taken")
    for title, names_of in (
        ("not there, so fresh", missing),
        ("there, but not in this model", extra),
    ):
        if names_of:
            say(f"init_from: {title}: {', '.join(names_of)}")
    return unflatten({part: params}, {**flatten({part: params}), **found})[part]
