"""Save, verify and restore a run; `load(workdir)` gives a usable model in one line.

A checkpoint is the folder `<workdir>/checkpoints/<step>/`: `state/`, written by Orbax, asynchronous, as
one flat dictionary from parameter path to array, and `manifest.json`, written last: size and SHA-256 of
every file, shape, type and fingerprint of every array, the metrics. Without a manifest that matches, a
checkpoint is not good: it is moved aside with a word, never deleted, and the newest good one before it is
used.
"""

import dataclasses
import math
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from lm import config as config_lib
from lm import distributed, hardware, manifests, models, newest, remote, retention, saving, stored
from lm.config import SET, ConfigError
from lm.step import parameter_axes
from lm.stored import averaged, flatten, restore, unflatten
from lm.value_types import Duration


@dataclasses.dataclass(frozen=True)
class Config:
    every_steps: Duration = 1000  # between checkpoints, 0 = none; the last step is always saved
    keep: int = 2  # newest checkpoints kept; pinned ones are kept too (tools.checkpoint pin)
    keep_every: int = 0  # steps; checkpoints at its multiples are kept for ever; 0 = none
    keep_best: bool = True  # keep the lowest metric's too, of those saved at an evaluated step
    best_metric: str = "eval/loss"  # what the best has the lowest of
    timeout_seconds: float = 3600.0  # for writing one, else the run ends; for a last copy; 0 = any
    grace_seconds: float = 120.0  # from a stop's signal to its saved step; 0 = any
    remote: str = ""  # folder or URL of this run's own, a second place where good ones are copied
    remote_every: int = 0  # only its multiples, the last and what a start finds are copied; 0 = all

    ONLY_FOR: ClassVar = {"remote_every": ("remote", SET)}

    def __post_init__(self):
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep={self.keep}: keep at least 1")
        for name, unit in (
            ("keep_every", "steps"),
            ("remote_every", "steps"),
            ("timeout_seconds", "seconds"),
            ("grace_seconds", "seconds"),
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"checkpoint.{name}={getattr(self, name)}: use 0 or more {unit}")
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


TRIES = 3  # of one save: when it is due, again at once, again at the next step
SAVES = 2  # that fail with all their tries, one after the other, before that is an error


def warn(text: str) -> None:
    """Say a line that is not of the run's results."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Checkpointer:
    """Writes a run's checkpoints and reads them back. One save is in flight at a time.

    A save that fails is said and tried again, at once and at the next step; when the save that is due after
    it fails with all its tries too, that is an error. Whatever fails, earlier checkpoints stay whole.

    `gone` says so where the workdir is not the same any more: then nothing is written or deleted there.
    """

    def __init__(
        self,
        workdir: str | Path,
        cfg: Config,
        say: Callable[[str], None] = warn,
        gone: Callable[[], str] = str,
        until: Callable[[], float] = lambda: math.inf,
    ):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.cfg, self.say, self._gone = cfg, say, gone
        self._remote = remote.Remote(cfg.remote, self.folder, say) if cfg.remote else None
        self._writer = saving.Writer(self.folder, gone)
        self._failures = 0  # tries that failed, one after the other
        self._unsaved: OSError | None = None  # what the last save failed with
        self._owed = False  # it is to be tried at the next step
        self._asks = False  # the other processes are to be told so
        self._last = False  # the save in flight is the last one
        self._until = until  # when no last copy is waited for any more, by time.monotonic
        self.identity = ""  # of the run, once it is known
        self.done: set[int] = set()  # steps that are good here, and this run's

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float],
        more: Mapping[str, Any] = types.MappingProxyType({}),
        *,
        wait: bool = False,
        verify: bool = False,
    ) -> None:
        """Start to save `state`; return when its arrays are copied.

        Args:
          more: what else is kept in the manifest, where it is not empty: steps that were left out, and why
            (`lm.guard`), the mark of the rows (`lm.metrics`).
          wait: return when the checkpoint is good; all tries are made here.
          verify: of a save that is waited for, read the arrays back and compare them.

        Raises:
          OSError: the last of all tries failed.
        """
        self.settle()
        self._last, self._owed = wait, False
        more = {"metrics": dict(metrics), **{name: value for name, value in more.items() if value}}
        alone = jax.process_count() == 1
        tries = TRIES if wait else 2 if alone and self._failures % TRIES == 0 else 1
        for left in reversed(range(tries)):
            try:
                self.identity = self.identity or manifests.run_of(self.folder)
                known = {"identity": self.identity, **more} if self.identity else more
                # What is read back is good after that.
                self._writer.start(step, state, known, (lambda _: None) if verify else self._good)
                if not wait:
                    return
                self._finish(step, state, verify)
                return
            except OSError as error:
                self._failed(error, at_once=left > 0, last=wait and not left)

    def _finish(self, step: int, state: Any, verify: bool) -> None:
        """Wait for the save in flight. Raises OSError where it, or what is read back, is not good."""
        if problem := distributed.from_first(str(self._writer.join() or "")):
            raise OSError(problem)
        if verify:
            places = {name: leaf.sharding for name, leaf in flatten(state).items()}
            found = distributed.from_all(self._gone() or stored.problem(self.folder, step, places))
            if problem := next(filter(None, found), ""):  # all raise, or none
                aside = None
                if jax.process_index() == 0 and not self._gone():
                    aside = manifests.move_aside(self.folder / str(step))
                raise OSError(f"checkpoint {step}: {problem}; moved to {aside}")
            if jax.process_index() == 0:
                self._good(step)
        self._succeeded()

    def _succeeded(self) -> None:
        self._failures, self._unsaved, self._owed = 0, None, False

    def _failed(self, error: OSError, *, at_once: bool = False, last: bool = False) -> None:
        """Count a try that failed and say what follows; raise `error` where nothing does."""
        self._failures += 1
        if last or (not at_once and self._failures >= SAVES * TRIES):
            raise OSError(f"{error}, {self._failures} times one after the other") from error
        self._unsaved, self._owed = error, not at_once and self._failures % TRIES > 0
        self._asks = self._owed
        then = "the next step" if self._owed else "the next that is due"
        self.say(f"{error}; not saved, {'trying again' if at_once else f'saving {then} instead'}")

    def writing(self) -> int | None:
        """Return the step whose save is in flight, if one is."""
        return self._writer.writing()

    def settle(self) -> None:
        """Wait for the save in flight and say what it failed with. Raises what `save` raises."""
        if self._writer.started:
            error = self._writer.join()
            self._succeeded() if error is None else self._failed(error)

    def owed(self, agreed: bool = False) -> bool:
        """Return whether this step is to be saved because a save failed; that is said here. Never waits.

        Several processes have `agreed` to, by what each of them `asks`. Raises what `save` raises.
        """
        if self.writing() is None:
            self.settle()
        return agreed or (self._owed and jax.process_count() == 1)

    def asks(self) -> bool:
        """Return whether a save failed here since this was asked, and is to be tried again."""
        asks, self._asks = self._asks, False
        return asks

    def wait(self) -> None:
        """Wait until the last save is good. Raises OSError where it is not."""
        self.settle()
        error, self._unsaved = self._unsaved, None
        if error is not None:
            raise error

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` with the checkpoint of `step`, which was saved without."""
        self.settle()
        if jax.process_index() == 0:
            try:
                manifests.add_metrics(self.folder, step, metrics)
            except OSError as error:
                self.say(f"checkpoint {step}: its metrics are not kept: {error}")

    def close(self) -> None:
        """Wait until the last save is good and release Orbax's threads. Raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._writer.close()
            if self._remote:
                self._remote.close(self.cfg.timeout_seconds, self._until)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close; what ends the block is never hidden by a save that failed.

        Of a stop before training began nothing is new, and no copy is waited for.
        """
        if kind is KeyboardInterrupt:
            self._until = lambda: 0.0
        try:
            self.close()
        except OSError as error:
            if kind is None:
                raise
            self.say(f"{error}; not saved")

    def _good(self, step: int) -> None:
        """Copy the checkpoint of `step`, which is good now; delete what is not kept."""
        cfg = self.cfg
        self.done.add(step)
        needed = {step}
        if self._remote:
            if self._last or not cfg.remote_every or step % cfg.remote_every == 0:
                self._remote.copy(step)
            needed |= self._remote.needed()
        best = cfg.best_metric if cfg.keep_best else ""
        try:
            if problem := self._gone():
                raise OSError(problem)
            kept = retention.kept(self.folder, cfg.keep, cfg.keep_every, best) | needed
            old = set(manifests.good_steps(self.folder)) - kept
            for problem in retention.delete(self.folder, old):
                self.say(problem)
        except OSError as error:
            self.say(f"checkpoints that are not kept stay for now: {error}")

    def restore_latest(self, abstract: Any, say: Callable[[str], None] = print) -> Any | None:
        """Return the newest good state with the shapes and shardings of `abstract`; None when there is none.

        What is damaged or unfinished is moved aside and said.
        """
        self.settle()
        found = newest.restored(self.folder, abstract, say)
        if found and jax.process_index() == 0:
            # Where a kill came before it was done.
            for problem in retention.delete(self.folder, ()):
                self.say(problem)
        self.done |= {found[0]} if found else set()
        return found[1] if found else None

    def copy(self, step: int) -> None:
        """Begin to copy the checkpoint of `step`, which a run goes on from, where that is asked for."""
        if self._remote and jax.process_index() == 0:
            self._remote.copy(step)

    def fetch(self) -> None:
        """Bring the newest good checkpoint here where only `checkpoint.remote` has it; say what is damaged.

        Raises ConfigError where something cannot be read, and there is no checkpoint here to go on from.
        """
        if jax.process_index() == 0 and (self._remote or not manifests.good_steps(self.folder)):
            newest.good(self.folder, print, self._remote)
        distributed.from_first("fetched")


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
            bad = manifests.problem(folder, newer[-1]) or "it was not whole yet"
            print(f"notice: {folder / str(newer[-1])}: {bad}; using {step}", file=sys.stderr)
    if str(step) not in map(str, steps):
        raise ConfigError(f"step={step}: {folder} has {', '.join(map(str, steps))}, last and best")
    return int(step)


def read_config(workdir: str | Path) -> ConfigDict:
    """Return the resolved config of a run.

    Raises:
      ConfigError: the folder has no `config.json`, or a broken one.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        if (path.parent / "checkpoints").is_dir():
            raise ConfigError(
                f"{path}: missing; restore it (the newest of receipts/ has its fields)"
            )
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
    arrays = (manifests.read(folder, step) or {})["arrays"]
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=placed)
        for name, (shape, dtype, *_) in arrays.items()
        if name.startswith("counts.")
    }
    found = restore(folder, step, wanted)
    return {name.removeprefix("counts."): array for name, array in found.items()}


def restore_params(folder: Path, step: int, abstract: Any) -> Any:
    """Return the parameters of a checkpoint (averaged, where that was kept) like `abstract`."""
    part = averaged((manifests.read(folder, step) or {})["arrays"])
    wanted = flatten({part: abstract})
    return unflatten({part: abstract}, restore(folder, step, wanted))[part]
