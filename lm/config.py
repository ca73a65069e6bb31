"""Experiment files, overrides from the command line, and one frozen dataclass for each section.

A value's way: an experiment file's `get_config()` (`load`), the command line (`override`), the dataclasses'
defaults (`complete`), then one frozen dataclass a section (`freeze`), below which nobody sees a ConfigDict. A
dataclass is the only place where a field has its type, its default and, as a trailing comment, its help text.
`ONLY_FOR = {"momentum": ("name", ("sgd", "rmsprop"))}` there says that field `momentum` is used only when
field `name` has one of these values (a tuple, or SET); "data.order" would name another section's field.
`schema` maps a section's name to a function from its present values to its dataclass: `model.name` picks it.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import json
import math
import re
import textwrap
import tokenize
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lm import value_types
from lm.value_types import Duration


class _Set:
    def __contains__(self, value: Any) -> bool:
        return bool(value)


SET = _Set()  # in `ONLY_FOR`: any value but zero and empty
T = typing.TypeVar("T")
Schema = Mapping[str, Callable[[Mapping[str, Any]], type]]

_EXAMPLES = {
    bool: "true", int: "100", float: "3e-4", Duration: "300",
    "data.mixture": "python_docs=3,python_source=1",
    "data.mixture_stages": "'((1000,(1,0)),)'",  # from a step on, weights
}  # fmt: skip
# What other projects call a field, for the hint beside a key that there is not.
_ELSEWHERE = {
    "optim.peak_lr": ("learning_rate", "lr", "max_lr", "base_learning_rate"),
    "optim.warmup": (
        "warmup_steps",
        "warmup_iters",
        "num_warmup_steps",
        "warmup_ratio",
        "lr_warmup",
    ),
    "optim.clip_norm": ("grad_clip", "max_grad_norm", "gradient_clipping", "clip_grad_norm"),
    "task.length": (
        "seq_len",
        "seq_length",
        "block_size",
        "context_length",
        "max_length",
        "sequence_length",
    ),
    "data.batch_size": ("per_device_train_batch_size", "train_batch_size", "global_batch_size"),
    "model.model_dim": (
        "hidden_size",
        "d_model",
        "n_embd",
        "width",
        "embed_dim",
        "emb_dim",
        "hidden_dim",
    ),
    "model.num_layers": ("n_layer", "n_layers", "num_hidden_layers", "layers"),
    "model.num_heads": ("n_head", "n_heads", "num_attention_heads", "heads"),
    "train.num_steps": (
        "max_steps",
        "max_iters",
        "num_epochs",
        "epochs",
        "num_train_steps",
        "total_steps",
    ),
    "train.accumulate_steps": ("gradient_accumulation_steps", "grad_accum"),
    "checkpoint.every_steps": ("save_steps", "save_interval", "save_every"),
    "eval.every_steps": ("eval_steps", "eval_interval", "eval_every"),
}


class ConfigError(ValueError):
    """A mistake of the user's: one line that names field, value and fix."""


@dataclasses.dataclass(frozen=True)
class TopLevel:
    """The fields that stand outside every section."""

    seed: int = 0  # seed of all that is random: parameters, order of the data, dropout


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed out of range; jax's keys take only 32 bits of one."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: use a whole number from 0 to {2**32 - 1}")


class Field(NamedTuple):
    name: str
    type: Any
    default: Any
    comment: str


def call(path: str | Path, function: str) -> Any:
    """Run `function()` of the experiment file at `path` and return its result.

    Raises ConfigError, naming file and line, for a missing file or function or an exception inside.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config={path}: no such file; give an experiment's path")
    # Compiled here and not imported: an import could serve a stale cache of a file just rewritten.
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), names)
        found = names.get(function)
        if callable(found):
            return found()
    except (Exception, SystemExit) as error:
        where = f"{path}:{_line_in(path, error)}"
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
    raise ConfigError(f"config={path}: it has no function {function}(); define one")


def _line_in(path: Path, error: BaseException) -> int:
    """Return the deepest line of the file at `path` that `error` came through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or 0
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno or 0 for f in reversed(frames) if f.filename == str(path)), 0)


def load(path: str | Path) -> ConfigDict:
    """Return the ConfigDict of the experiment file's `get_config()`; it may leave fields out.

    Raises ConfigError for a missing file or function, or an exception inside.
    """
    config = call(path, "get_config")
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config={path}: get_config() returned {type(config)}, not a ConfigDict")
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"section.field": value} of {"section": {"field": value}}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, Mapping | ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _nest(flat: Mapping[str, Any]) -> ConfigDict:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, key = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    # `freeze` checks the types, with better words; a Duration may change from int to str.
    return ConfigDict(nested, type_safe=False)


def catalogue(schema: Schema, flat: Mapping[str, Any]) -> dict[str, Field]:
    """Return every field that these values' dataclasses have, by dotted name."""
    fields = {field.name: field for field in describe(TopLevel)}
    for section, cls in _classes(schema, flat).items():
        fields |= {f"{section}.{field.name}": field for field in describe(cls)}
    return fields


def _classes(schema: Schema, flat: Mapping[str, Any]) -> dict[str, type]:
    values: dict[str, dict[str, Any]] = {section: {} for section in schema}
    for name, value in flat.items():
        section, _, key = name.partition(".")
        if section in schema and not key:
            raise ConfigError(f"{name}={value!r}: a section; give it fields, in a ConfigDict")
        values.get(section, {})[key] = value
    return {section: choose(values[section]) for section, choose in schema.items()}


def override(config: ConfigDict, assignments: Iterable[str], schema: Schema) -> ConfigDict:
    """Return a copy of `config` with assignments such as "optim.peak_lr=3e-4" or "seed=3".

    Values are read by the type of the dataclass field; a `name` comes first, as it picks the class.
    Raises ConfigError for an unknown key (with the nearest), a wrong type, an unused field.
    """
    flat, given = flatten(config), {}
    for assignment in assignments:
        key, equals, given[key] = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment}: no value; write section.field=value")
    flat |= {key: text for key, text in given.items() if key.endswith(".name")}
    fields = catalogue(schema, flat)
    _refuse_unknown(given, fields)
    for key in flat:
        name = f"{key.partition('.')[0]}.name"
        if key not in fields and name in given:
            raise ConfigError(
                f"{name}={given[name]} has no {key}, which the experiment sets for another {name}; make an "
                "experiment file of its own"
            )
    for key, text in given.items():
        flat[key] = _typed(key, text, fields[key], read=value_types.from_text)
    for key in given:
        if unused := _unused(key, flat, schema):
            raise ConfigError(f"{unused}; leave it out or change that")
    return _nest(flat)


def _refuse_unknown(keys: Iterable[str], names: Mapping[str, Field]) -> None:
    """Raise ConfigError for a key that no dataclass holds; the same field elsewhere is nearest."""
    for key in keys:
        if key not in names:
            last = key.split(".")[-1]
            namesakes = [name for name in names if name.split(".")[-1] == last]
            namesakes = namesakes or [
                n for n, others in _ELSEWHERE.items() if last in others and n in names
            ]
            namesakes = namesakes or [n for n in names if last in n.split(".")[-1].split("_")]
            (nearest,) = difflib.get_close_matches(key, namesakes or list(names), n=1, cutoff=0.0)
            raise ConfigError(f"{key}: no such field; did you mean {nearest}?")


def _unused(key: str, flat: Mapping[str, Any], schema: Schema) -> str:
    """Say which option field `key` needs and does not have; "" when the field is used."""
    (section, _, name), classes = key.rpartition("."), _classes(schema, flat)
    option, values = getattr(classes.get(section), "ONLY_FOR", {}).get(name, ("", ()))
    option = option if "." in option else f"{section}.{option}"
    owner, _, last = option.rpartition(".")
    value = flat.get(option, getattr(classes.get(owner), last, None))
    if not last or value in values:
        return ""
    where = " or ".join(f"{option}={v}" for v in values) if values is not SET else f"a set {option}"
    return f"{key}={flat[key]}: used only under {where}, and {option} is {value or 'not set'}"


def _typed(name: str, value: Any, field: Field, *, read: Callable[[Any, Any], Any]) -> Any:
    try:
        return read(value, field.type)
    except (ValueError, TypeError, KeyError, OverflowError):
        several = "'.*bias=0,.*=1'" if "float" in str(field.type) else "a,b"
        example = f"{name}={_EXAMPLES.get(name, _EXAMPLES.get(field.type, several))}"
        huge = isinstance(value, int | str) and re.fullmatch(r"[+-]?\d{19,}", str(value))
        kinds = " (steps, or '2 epochs', '1e6 tokens', '10%')" if field.type == Duration else ""
        wanted = "too large" if huge else f"expected {value_types.type_name(field.type)}{kinds}"
        raise ConfigError(f"{name}={value!r}: {wanted}; for example {example}") from None


def to_steps(
    value: Duration,
    *,
    field: str,
    tokens_per_step: float,
    steps_per_epoch: float,
    num_steps: int | None = None,
) -> int:
    """Return a duration in steps, rounded up; `num_steps` is what a percentage is of.

    Raises ConfigError for what is not a duration, a negative one, a percentage without num_steps.
    """
    try:
        amount, unit = value_types.parse_duration(value)
    except ValueError:
        kinds = "100, '1e6 tokens', '2 epochs' or '10%'"
        raise ConfigError(f"{field}={value!r}: expected duration, such as {kinds}") from None
    if unit == "%" and num_steps is None:
        raise ConfigError(f"{field}={value!r}: nothing to take a percentage of; write steps")
    percent = (num_steps or 0) / 100
    size = {"step": 1, "token": 1 / tokens_per_step, "epoch": steps_per_epoch, "%": percent}
    # Rounded before the ceiling: 19 epochs of 21/19 steps are 21 steps, not 22.
    return math.ceil(round(float(amount) * size[unit], 6))


def complete(config: Mapping[str, Any], schema: Schema) -> ConfigDict:
    """Return `config` with every field of every section present, each of exactly its type.

    Raises ConfigError for an unknown key (with the nearest) or a wrong type.
    """
    flat = flatten(config)
    return _nest(_checked(flat, catalogue(schema, flat)))


def freeze(cls: type[T], section: Mapping[str, Any], *, where: str) -> T:
    """Return the dataclass `cls` holding the values of `section`, which `where` names.

    Raises ConfigError for an unknown key, a wrong type, or what the dataclass itself refuses.
    """
    fields = {f"{where}.{field.name}": field for field in describe(cls)}
    values = _checked(flatten(section, f"{where}."), fields)
    return cls(**{name.rpartition(".")[2]: value for name, value in values.items()})


def _checked(flat: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    _refuse_unknown(flat, fields)
    return {
        name: _typed(name, flat.get(name, field.default), field, read=value_types.from_value)
        for name, field in fields.items()
    }


def notices(config: Mapping[str, Any], schema: Schema) -> list[str]:
    """Return a sentence for each field present in `config`, not yet completed, that goes unused."""
    flat = flatten(config)
    return [sentence for key in flat if (sentence := _unused(key, flat, schema))]


def to_json(config: Mapping[str, Any]) -> str:
    """Return a resolved config as indented JSON; tuples become lists."""
    return json.dumps(_nest(flatten(config)).to_dict(), indent=2) + "\n"


def from_json(text: str, *, where: str = "config.json") -> ConfigDict:
    """Return the config that `to_json` wrote; `freeze` and `complete` make its lists tuples again.

    Raises ConfigError, naming the file `where`, for what is not a JSON object.
    """
    try:
        return _nest(flatten(json.loads(text)))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where}: not a JSON object ({error}); restore the file") from None


def with_defaults(config: Mapping[str, Any], schema: Schema) -> ConfigDict:
    """Return the config of an earlier version's run with the fields that have been added since.

    A field is added with a default under which nothing changes; one that is no longer known stays.
    """
    flat = flatten(config)
    return _nest({name: field.default for name, field in catalogue(schema, flat).items()} | flat)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old value, new value) where two configs differ; None is no value."""
    before, after = flatten(old), flatten(new)
    rows = [(key, plain(before.get(key)), plain(after.get(key))) for key in before | after]
    return [row for row in rows if row[1] != row[2]]


def plain(value: Any) -> Any:
    """Return a value with its lists as tuples, as JSON cannot tell them apart."""
    return tuple(plain(item) for item in value) if isinstance(value, list | tuple) else value


def describe(cls: type) -> list[Field]:
    """Return the fields of a dataclass in order, with their trailing comments."""
    comments = {k: v for base in reversed(cls.__mro__[:-1]) for k, v in _comments(base).items()}
    types = typing.get_type_hints(cls)
    return [
        Field(field.name, types[field.name], field.default, comments.get(field.name, ""))
        for field in dataclasses.fields(cls)
    ]


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """Return the trailing comment of each annotated name in the source of `cls`."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # a class typed at a prompt has no source
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    definition = typing.cast(ast.ClassDef, ast.parse(source).body[0])
    return {
        node.target.id: next(
            filter(None, map(by_line.get, range(node.end_lineno or 0, node.lineno - 1, -1))), ""
        )
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
