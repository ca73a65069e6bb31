"""Which sections of a config go together, and with a mesh and a corpus; the others are refused in a line."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lm import models, placement, sharding, tasks
from lm.config import ConfigError
from lm.data import corpus, sources
from lm.data.settings import Config as Text
from lm.nn import pipeline

OF_GRADIENTS = re.compile(  # fields that a family has no use for that learns by counting
    r"optim\.|train\.(vectors|freeze_vectors|accumulate_steps|z_loss|label_smoothing|loss_chunk|spike_\w+"
    r"|on_bad_step|max_skips|rollback_batches|recordings)="
)

OF_AXES = {  # fields that say how an axis of the mesh is used, and what says nothing of it
    "model.microbatches": ("stage", "0"),
    "model.stage_repeats": ("stage", "1"),
    "model.context_parallel": ("context", ""),
}
OF_FILES = ("data.on_invalid", "data.on_broken", "data.max_document_bytes")


def check_given(config: Mapping[str, Any], assignments: Sequence[str]) -> None:
    """Refuse `assignments`, as "optim.peak_lr=1", that the rest of a config would read and not use."""
    name = config.get("model", {}).get("name", "gpt")
    if models.family(name).Model.learns == "counting":
        for assignment in filter(OF_GRADIENTS.match, assignments):
            raise ConfigError(
                f"{assignment}: model.name={name!r} learns by counting and does not use it; leave it out"
            )
    mesh, data = (config.get(section, {}) for section in ("mesh", "data"))
    path, source = data.get("path"), data.get("source", Text.source)
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        axis, nothing = OF_AXES.get(key, ("", ""))
        if axis and value != nothing and mesh.get(axis, 1) == 1:
            raise ConfigError(
                f"{assignment}: used only with mesh.{axis} of 2 or more; leave it out, or set that"
            )
        if key == "data.source" and value in sources.EMBEDDED and path:
            raise ConfigError(
                f"{assignment}: data.path names the text that is read; leave one of the two out"
            )
        if key in OF_FILES and source in sources.EMBEDDED and not path and not data.get("mixture"):
            raise ConfigError(
                f"{assignment}: used only for texts of yours, and data.source is {source}; leave it out"
            )


def check_sections(cfg: Mapping[str, Any], mesh: Mesh, *, training: bool = True) -> str:
    """Refuse sections that do not fit each other; return the kind of rows that the task shall make.

    Args:
      training: whether batches to train on are made; evaluation fills up its own.

    Raises:
      ConfigError: the family does not accept the task or the order, or a batch does not divide.
    """
    name, stateful = cfg["model"].name, cfg["data"].order == "stream"
    accepts = models.family(name).Model.accepts
    kinds = tasks.kinds(cfg["task"])
    _check_context(cfg["model"], accepts, sharding.ways(mesh, "act_length"))
    needs = [
        (kinds, True, f"task.name={cfg['task'].name!r}"),
        (("packed",), cfg["task"].packed, "task.isolate_documents=True"),
        (("carry",), stateful, "data.order='stream'"),
    ]
    for need, wanted, field in needs:
        if wanted and not accepts.intersection(need):
            raise ConfigError(
                f"{field} needs a family that accepts {' or '.join(map(repr, need))}, and "
                f"model.name={name!r} accepts {', '.join(sorted(accepts))}; choose another"
            )
    if models.family(name).Model.learns == "counting" and jax.process_count() > 1:
        raise ConfigError(f"model.name={name!r} counts in one process; start one alone")
    if stateful and cfg["task"].name != "causal_lm":
        raise ConfigError(
            f"data.order='stream' goes with task.name='causal_lm', not {cfg['task'].name!r}; use shuffle"
        )
    asked = [getattr(cfg[part], "next_sentence", False) for part in ("task", "model")]
    if asked[0] != asked[1]:
        raise ConfigError(
            f"task.next_sentence={asked[0]} and model.next_sentence={asked[1]}: the task's rows and the "
            "model's head go together; set both or neither"
        )
    if cfg["checkpoint"].best_metric.startswith("eval_raw/") and not cfg["optim"].ema_decay:
        raise ConfigError(
            f"checkpoint.best_metric={cfg['checkpoint'].best_metric!r}: without an average of the weights "
            "there is no such score; use eval/..., or set optim.ema_decay"
        )
    _check_local_steps(cfg)
    _check_stages(cfg, mesh, training)
    shards = (training and _check_exact(cfg, mesh)) or sharding.batch_shards(mesh)
    rows, parts = cfg["data"].batch_size, cfg["train"].accumulate_steps
    if training and parts > rows:
        raise ConfigError(
            f"train.accumulate_steps={parts}: a batch has only data.batch_size={rows} rows; use at most "
            f"{rows}"
        )
    sizes = {"data.batch_size": (rows, parts * shards)} if training else {}
    if stateful:
        sizes["eval.streams"] = (cfg["eval"].streams, shards)
    for field, (size, divisor) in sizes.items():
        if size % divisor:
            raise ConfigError(
                f"{field}={size} does not divide by {divisor} (train.accumulate_steps x the devices "
                f"that split a batch, or train.exact_reduction); use a multiple of {divisor}"
            )
    return tasks.kind_for(kinds, accepts)


def _check_context(cfg: Any, accepts: frozenset[str], parts: int) -> None:
    """Refuse a model that does not read rows whose positions `parts` devices split."""
    if parts > 1 and "context" not in accepts:
        raise ConfigError(
            f"mesh.context={parts} splits the positions of a row, and model.name={cfg.name!r} reads them one "
            "after the other; use mesh.context=1, and mesh.data or mesh.fsdp for the devices"
        )
    if parts > 1 and hasattr(cfg, "num_experts") and cfg.num_experts:
        raise ConfigError(
            f"mesh.context={parts}: experts count the room of whole rows, whose positions it splits; use "
            "model.num_experts=0, or mesh.expert for the devices"
        )
    if parts > 1 and getattr(cfg, "kernel", "") == "cudnn":
        raise ConfigError(
            f"model.kernel='cudnn' attends to whole rows, and mesh.context={parts} splits them; use ''"
        )


def _check_local_steps(cfg: Mapping[str, Any]) -> None:
    """Refuse what does not go with groups that train apart."""
    every = cfg["mesh"].local_steps
    if every and models.family(cfg["model"].name).Model.learns == "counting":
        raise ConfigError(
            f"mesh.local_steps={every}: model.name={cfg['model'].name!r} learns by counting; use 0"
        )
    if every and cfg["optim"].ema_decay:
        raise ConfigError(
            f"mesh.local_steps={every}: the parameters where groups meet are an average already; use "
            "optim.ema_decay=0"
        )


def _check_exact(cfg: Mapping[str, Any], mesh: Mesh) -> int:
    """Refuse what does not go with train.exact_reduction; return it."""
    if not (shards := cfg["train"].exact_reduction):
        return 0
    name, field = cfg["model"].name, f"train.exact_reduction={shards}"
    if models.family(name).Model.learns == "counting":
        raise ConfigError(
            f"{field}: model.name={name!r} learns by counting, the same anywhere; use 0"
        )
    if every := cfg["mesh"].local_steps:
        raise ConfigError(
            f"{field} and mesh.local_steps={every}: groups train apart; use 0 for one"
        )
    devices = sharding.batch_shards(mesh)
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in sharding.RULES["act_groups"]:
            raise ConfigError(
                f"{field} and mesh.{axis}={size}: shards are of rows alone; use mesh.{axis}=1, and mesh.data "
                "or mesh.fsdp for the devices"
            )
    if shards % devices:
        raise ConfigError(
            f"{field}: {devices} devices split a batch, which must divide it; use a power of 2 of devices, "
            "and as many shards or more"
        )
    return shards


def _check_stages(cfg: Mapping[str, Any], mesh: Mesh, training: bool) -> None:
    """Refuse what does not go with layers in the stages of `mesh`."""
    stages, parts = sharding.ways(mesh, "layers"), sharding.ways(mesh, "act_length")
    if stages == 1:
        return
    if cfg["data"].order == "stream" or not getattr(cfg["model"], "scan", False):
        raise ConfigError(
            f"mesh.stage={stages}: stages are parts of a scan over layers without a carried state; set "
            "model.scan=True in a family that has it (bert, gpt, linear_rnn, t5), data.order=shuffle"
        )
    if parts > 1:
        raise ConfigError(
            f"mesh.stage={stages} and mesh.context={parts}: a part that flows through stages has whole rows; "
            "use one of the two, with mesh.data, fsdp and tensor for the other devices"
        )
    if getattr(cfg["model"], "num_experts", 0) > 0:
        raise ConfigError(
            f"mesh.stage={stages}: losses of experts do not pass through stages; use model.num_experts=0, or "
            "mesh.expert for the devices"
        )
    _check_flow(cfg, stages, sharding.batch_shards(mesh), training)


def _check_flow(cfg: Mapping[str, Any], stages: int, shards: int, training: bool) -> None:
    """Refuse batches that do not flow through `stages` in the parts that are asked for or needed."""
    model, batch = cfg["model"], cfg["data"].batch_size
    sizes = {"eval.batch_size": cfg["eval"].batch_size or batch}
    if training:
        sizes["data.batch_size"] = batch // cfg["train"].accumulate_steps
    for field, size in sizes.items():
        rows = -(-size // shards)
        if training and field.startswith("data") and rows % (model.microbatches or 1):
            raise ConfigError(
                f"model.microbatches={model.microbatches}: a device has {rows} rows of {field} at once, "
                f"which do not divide so; use a number that divides {rows}, or 0"
            )
        parts = pipeline.parts_of(rows, model.microbatches, stages)
        if model.stage_repeats > 1 and parts < stages:
            raise ConfigError(
                f"model.stage_repeats={model.stage_repeats}: the {rows} rows of {field} that a device has "
                f"flow in {parts} parts through mesh.stage={stages}; let {field} or model.microbatches give "
                "as many parts as stages"
            )


def check_corpus(cfg: Mapping[str, Any], text: corpus.Corpus, task: Any, mesh: Mesh) -> None:
    """Refuse what the corpus, or the task on it, cannot give, and rows that do not fit `mesh`."""
    placement.check_length(mesh, task.row_length, "the task")
    placement.check_length(mesh, task.source_length, "the task's source")
    if not text.validation.num_bytes:
        raise ConfigError(
            f"data.validation_fraction={cfg['data'].validation_fraction}: the validation split is empty, "
            "and training evaluates on it; use a larger one"
        )
    if not task.text_bytes and cfg["checkpoint"].best_metric.endswith("bits_per_byte"):
        raise ConfigError(
            f"checkpoint.best_metric={cfg['checkpoint'].best_metric!r}: task.name={cfg['task'].name!r} "
            "does not score a whole text, so it has no bits per byte; use eval/loss"
        )
    if not text.tokenizer.counts_bytes and cfg["checkpoint"].best_metric.endswith("bits_per_byte"):
        raise ConfigError(
            f"checkpoint.best_metric={cfg['checkpoint'].best_metric!r}: the ids of {text.tokenizer.name} do "
            "not tell how many bytes they stand for; use eval/loss"
        )
