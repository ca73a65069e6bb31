"""An experiment's config made real: everything a run is made of, before there is any state."""

import dataclasses
import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lm import (
    checkpoint,
    evaluate,
    exact,
    fit,
    flags,
    hardware,
    local_steps,
    models,
    optim,
    placement,
    settings,
    sharding,
    spikes,
    startup,
    step,
    tasks,
)
from lm import config as config_lib
from lm.data import corpus, pipeline
from lm.data import settings as data_settings
from lm.value_types import Duration

EMBEDDING = r"(^|\W)embedding$"  # the path of a family's token embedding

SCHEMA: config_lib.Schema = {
    "data": lambda section: data_settings.Config,
    "task": lambda section: tasks.config_class(section.get("name", "causal_lm")),
    "model": lambda section: models.config_class(section.get("name", "gpt")),
    "optim": lambda section: optim.Config,
    "mesh": lambda section: sharding.Config,
    "train": lambda section: settings.Config,
    "eval": lambda section: evaluate.Config,
    "checkpoint": lambda section: checkpoint.Config,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is made of. `cfg` has the frozen dataclass of each section of `config`."""

    config: ConfigDict  # resolved: every field, derived sizes too
    cfg: Mapping[str, Any]
    mesh: Mesh
    corpus: corpus.Corpus
    task: Any
    model: nn.Module
    batches: pipeline.Batches
    num_steps: int
    tx: optax.GradientTransformation
    schedule: Callable[[Any], Any]
    objective: step.Objective
    axes: Any  # logical axes of the parameters
    shapes: Any  # shapes and types of the parameters

    @property
    def stateful(self) -> bool:
        """Whether recurrent state runs on from batch to batch."""
        return self.cfg["data"].order == "stream"

    @property
    def spike_limit(self) -> spikes.Limit | None:
        """From when on a step is a spike; None where none is looked for."""
        cfg = self.cfg["train"]
        if not cfg.spike_zscore or self.model.learns != "gradient":
            return None
        return spikes.Limit(cfg.spike_zscore, cfg.spike_metric, cfg.spike_steps)

    @property
    def tokens_per_step(self) -> int:
        """Scored tokens of a full batch."""
        return self.cfg["data"].batch_size * self.task.max_scored

    @property
    def positions_per_step(self) -> int:
        """Positions that an update computes, scored or not."""
        return self.cfg["data"].batch_size * self.task.row_length

    @property
    def flops_per_position(self) -> float:
        """Training FLOPs of a position of a row, scored or not."""
        scored = self.task.max_scored / self.task.row_length
        return models.flops_per_token(self.cfg["model"], self.task.row_length, scored)

    def steps_of(self, section: str, field: str) -> int:
        """Return a duration of the config in steps."""
        value = getattr(self.cfg[section], field)
        return _converter(self.batches, self.task, self.num_steps)(value, f"{section}.{field}")


def _converter(batches, task, num_steps: int | None) -> Callable[[Duration, str], int]:
    """Return (duration, field) -> steps: the one place that turns durations to steps."""
    return lambda value, field: config_lib.to_steps(
        value,
        field=field,
        tokens_per_step=batches.batch_size * task.max_scored,
        steps_per_epoch=batches.steps_per_epoch,
        num_steps=num_steps,
    )


def freeze(config: ConfigDict) -> dict[str, Any]:
    """Return the frozen dataclass of each section of a complete config."""
    config_lib.check_seed(config.seed)
    return {
        name: config_lib.freeze(choose(config[name]), config[name], where=name)
        for name, choose in SCHEMA.items()
    }


def section(config: ConfigDict, name: str) -> Any:
    """Return the frozen section `name` of a config that need not be complete."""
    values = config_lib.complete(config, SCHEMA)[name]
    return config_lib.freeze(SCHEMA[name](values), values, where=name)


def prepare(config: ConfigDict) -> list[str]:
    """Set the threads and flags that a config asks for; return what there is to say of each flag.

    Before jax looks for devices.
    """
    startup.set_threads(section(config, "train").exact_reduction)
    mesh = section(config, "mesh")
    sizes = {axis: getattr(mesh, axis) for axis in sharding.ORDER}
    return flags.set_flags(startup.platform(), sizes, mesh.xla_flags)


def build(config: ConfigDict) -> Experiment:
    """Make everything of a run but its state.

    Raises:
      ConfigError: a field that is unknown or wrong, or fields that do not fit together.
    """
    config = config_lib.complete(config, SCHEMA)
    cfg = freeze(config)
    mesh = placement.by_process(sharding.make_mesh(cfg["mesh"]))
    kind = fit.check_sections(cfg, mesh)
    text = corpus.build(cfg["data"])
    task = build_task(cfg, kind, text.tokenizer, text.labels, seed=config.seed)
    fit.check_corpus(cfg, text, task, mesh)
    cfg["model"] = models.resolve(
        cfg["model"],
        vocab_size=task.vocab_size,
        max_length=task.row_length,
        max_source_length=task.source_length,
        num_classes=task.num_classes,
        packed=cfg["task"].packed,
        end_of_text=text.tokenizer.end_of_text,
    )
    config.model = ConfigDict(dataclasses.asdict(cfg["model"]))
    model = models.build(cfg["model"])
    host_index, host_count = placement.host_share(mesh)
    batches = pipeline.Batches(
        [member.train for member in text.members],
        task,
        mixture=corpus.mixture_of(cfg["data"], text),
        batch_size=cfg["data"].batch_size,
        seed=config.seed,
        order=cfg["data"].order,
        once=model.learns == "counting",
        host_index=host_index,
        host_count=host_count,
    )
    num_steps = _converter(batches, task, None)(cfg["train"].num_steps, "train.num_steps")
    axes, shapes = step.parameter_axes(model)
    if cfg["train"].freeze_vectors:
        rules = ((EMBEDDING, 0.0), *cfg["optim"].lr_rules)
        cfg["optim"] = dataclasses.replace(cfg["optim"], lr_rules=rules)
    tx, schedule = optax.identity(), optax.constant_schedule(0.0)
    if model.learns == "gradient":
        tx, schedule = optim.build(
            cfg["optim"],
            num_steps=num_steps,
            to_steps=_converter(batches, task, num_steps),
            params=shapes,
            axes=axes,
        )
    objective = dataclasses.replace(
        build_objective(task),
        corpora=text.names,
        z_loss=cfg["train"].z_loss,
        label_smoothing=cfg["train"].label_smoothing,
        chunk=cfg["train"].loss_chunk,
    )
    return Experiment(
        config, cfg, mesh, text, task, model, batches, num_steps, tx, schedule, objective, axes, shapes
    )  # fmt: skip


def build_task(
    cfg: Mapping[str, Any], kind: str, tokenizer: Any, labels: Sequence[str], *, seed: int = 0
) -> Any:
    """Return the task of the frozen sections `cfg`, for a model that reads `kind` and knows `labels`."""
    start = getattr(cfg["model"], "start_token", -1)
    return tasks.build(cfg["task"], tasks.Setting(kind, tokenizer, tuple(labels), seed, start))


def build_objective(task: Any) -> step.Objective:
    """Return what is minimised and reported on a task's rows."""
    return step.Objective(
        max_scored=task.max_scored,
        vocab_size=task.num_classes or task.vocab_size,
        text_bytes=task.text_bytes,
        whole_rows=task.whole_rows,
    )


def jitted(made: Experiment) -> tuple[Callable, Callable, Callable, Any]:
    """Return jitted (init, train_step, eval_step), to be called under the mesh, and the abstract state."""
    init = _init_of(made)
    local_every = made.cfg["mesh"].local_steps
    if local_every:
        outer = local_steps.outer_optimizer(made.cfg["optim"])
        replicas = sharding.ways(made.mesh, "replicas")
        of_one, begin = init, functools.partial(local_steps.begin, outer=outer, replicas=replicas)
        init = lambda: begin(of_one())  # noqa: E731
    abstract = _placed(made, init)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    train_step = _step_of(made)
    if local_every:
        train_step = functools.partial(
            local_steps.train_step,
            inner=train_step,
            outer=outer,
            every=local_every,
            num_steps=made.num_steps,
        )
    eval_step = jit_eval_step(made.model, made.objective)
    if made.cfg["train"].exact_reduction:
        exactly = _exactly(made)
        return exactly.init, exactly.train_step, eval_step, abstract
    return (
        jax.jit(init, out_shardings=placed),
        jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None)),
        eval_step,
        abstract,
    )


def _init_of(made: Experiment) -> Callable:
    """Return the pure function that makes the state of step 0, of one group where groups train apart."""
    return step.make_init(
        made.model,
        made.tx,
        seed=made.config.seed,
        shape=(made.num_steps, made.cfg["data"].batch_size, made.task.row_length),
        average=made.cfg["optim"].ema_decay > 0,
        stateful=made.stateful,
        watched=made.spike_limit is not None,
    )


def _placed(made: Experiment, init: Callable) -> Any:
    """Return the abstract state that `init` makes, each leaf with its sharding."""
    abstract = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        step.state_shardings(made.mesh, abstract, made.axes),
    )


def _step_of(made: Experiment) -> Callable:
    """Return the pure (state, batch) -> (state, metrics), of one group where groups train apart."""
    if made.model.learns == "counting":
        return functools.partial(step.count_step, model=made.model)
    return functools.partial(step.train_step, **_of_gradients(made), **_of_update(made))


def _of_gradients(made: Experiment) -> dict[str, Any]:
    return {
        "model": made.model,
        "objective": made.objective,
        "seed": made.config.seed,
        "accumulate": made.cfg["train"].accumulate_steps,
    }


def _of_update(made: Experiment) -> dict[str, Any]:
    return {
        "tx": made.tx,
        "ema_decay": made.cfg["optim"].ema_decay,
        "schedule": made.schedule,
        "limit": made.spike_limit,
    }


def _exactly(made: Experiment) -> exact.Reduction:
    init = _init_of(made)
    return exact.Reduction(
        made.mesh,
        made.cfg["train"].exact_reduction,
        init=init,
        of_shard=functools.partial(step.gradients, **_of_gradients(made)),
        update=functools.partial(step.update, objective=made.objective, **_of_update(made)),
        placed=jax.tree.map(lambda leaf: leaf.sharding, _placed(made, init)),
    )


def gradients_of(made: Experiment) -> Callable:
    """Return (state, batch) -> gradients of a step, to be called under the mesh."""
    if made.cfg["train"].exact_reduction:
        return _exactly(made).gradients
    of_step: Callable = functools.partial(step.gradients, **_of_gradients(made))
    placed = sharding.shardings(made.mesh, made.axes, made.shapes)
    return jax.jit(lambda state, batch: of_step(state, batch)[0], out_shardings=placed)


def jit_eval_step(model: nn.Module, objective: step.Objective) -> Callable:
    """Return the jitted (params, carry, batch, token_bytes) -> (sums, carry)."""
    return jax.jit(functools.partial(step.eval_step, model=model, objective=objective))


def environment(made: Experiment) -> dict[str, Any]:
    """Return what the numbers of a run depend on besides its config: a resumed run lists what changed."""
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": sharding.shown(made.mesh),
        "replicas": sharding.ways(made.mesh, "replicas") if made.cfg["mesh"].local_steps else 0,
        "dtype": str(hardware.compute_dtype(made.config.model.get("dtype", "float32"))),
        "flags": flags.in_use(),
        "jax": jax.__version__,
        "python": platform.python_version(),  # whose own text the embedded sources are
    }
