"""Overrides are typed by the dataclass, mistakes are named, and a config survives its JSON."""

import dataclasses
import subprocess
import sys
from typing import ClassVar

import pytest
from ml_collections import ConfigDict

from lm import command
from lm import config as config_lib
from lm.config import ConfigError
from lm.value_types import Duration


@dataclasses.dataclass(frozen=True)
class Optim:
    # a comment above is not help
    ONLY_FOR: ClassVar = {"momentum": ("name", ("sgd", "rmsprop"))}

    name: str = "adamw"  # adamw, sgd or rmsprop
    peak_lr: float = 3e-4  # learning rate at its peak, per update
    momentum: float = 0.9  # share kept of the last update
    warmup: Duration = 0  # time to the peak
    nesterov: bool = False
    decay: tuple[tuple[str, float], ...] = (
        (".*bias", 0.0),
        (".*", 0.1),
    )  # weight decay by (regex, value)

    def __post_init__(self):
        if self.peak_lr <= 0:
            raise ConfigError(f"optim.peak_lr={self.peak_lr}: use a positive number")


@dataclasses.dataclass(frozen=True)
class Gpt:
    name: str = "gpt"
    num_heads: int = 4  # heads of attention


@dataclasses.dataclass(frozen=True)
class Rnn:
    name: str = "rnn"
    cell: str = "lstm"  # holds a # inside
    mark: str = "#"
    files: tuple[str, ...] = ()


SCHEMA = {
    "optim": lambda values: Optim,
    "model": lambda values: {"gpt": Gpt, "rnn": Rnn}[values.get("name", "gpt")],
}


def changed(*assignments, config=None):
    config = config_lib.override(ConfigDict(config or {}), assignments, SCHEMA)
    return config_lib.complete(config, SCHEMA)


def refusal(*assignments, config=None):
    with pytest.raises(ConfigError) as caught:
        changed(*assignments, config=config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("optim.peak_lr=1", 1.0),
        ("optim.peak_lr=3e-4", 3e-4),
        ("model.num_heads=1e6", 1_000_000),
        ("model.num_heads=1_000", 1000),
        ("model.num_heads=-1", -1),
        ("model.num_heads=9007199254740993", 2**53 + 1),
        ("optim.nesterov=True", True),
        ("optim.nesterov=1", True),
        ("optim.nesterov=false", False),
        ("optim.nesterov=0", False),
        ("optim.name=a=b, c", "a=b, c"),
        ("optim.warmup=1e3", 1000),
        ("optim.warmup=100 steps", 100),
        ("optim.warmup=2 epochs", "2 epochs"),
        ("optim.warmup=1e6 tokens", "1e6 tokens"),
        ("optim.warmup=2.5%", "2.5%"),
        ("optim.decay=(bias|scale)=0,.*=1e-1", (("(bias|scale)", 0.0), (".*", 0.1))),
        ("optim.decay=[('x{1,2}', 0)]", (("x{1,2}", 0.0),)),
        ("optim.decay=a=b=1", (("a=b", 1.0),)),
        ("optim.decay=", ()),
        ("seed=3", 3),
    ],
)
def test_override_reads_the_text_by_the_fields_type(assignment, value):
    key = assignment.partition("=")[0]
    result = changed(assignment)
    for part in key.split("."):
        result = result[part]
    assert result == value
    assert type(result) is type(value)


def test_override_of_strings():
    assert changed("model.name=rnn", "model.files=a.txt,b.txt").model.files == ("a.txt", "b.txt")
    assert changed("model.name=rnn", "model.files=(a).txt").model.files == ("(a).txt",)
    assert changed("model.files=('a,b.txt',)", "model.name=rnn").model.files == ("a,b.txt",)


def test_override_leaves_its_argument_alone_and_takes_the_last_of_two():
    config = ConfigDict({"seed": 1})
    assert config_lib.override(config, ["seed=2", "seed=5"], SCHEMA).seed == 5
    assert config.seed == 1


def test_name_picks_the_class_whatever_the_order():
    assert changed("model.cell=gru", "model.name=rnn").model.to_dict() == {
        "name": "rnn",
        "cell": "gru",
        "mark": "#",
        "files": (),
    }
    told = refusal("model.name=rnn", config={"model": {"num_heads": 8}})
    assert told.startswith("model.name=rnn has no model.num_heads, which the experiment sets")


@pytest.mark.parametrize("key", ["optim.peaklr", "optm.peak_lr", "peak_lr", "model.num.peak_lr"])
def test_unknown_key_names_the_nearest(key):
    section, _, name = key.rpartition(".")
    file = {name: 1}
    for part in reversed(section.split(".") if section else []):
        file = {part: file}
    for message in [refusal(f"{key}=1"), refusal(config=file), refusal("seed=2", config=file)]:
        assert message.startswith(f"{key}: no such field")
        assert "optim.peak_lr" in message


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("model.num_heads=0.5", "int"),
        ("model.num_heads=true", "int"),
        ("model.num_heads=inf", "int"),
        ("optim.peak_lr=fast", "float"),
        ("optim.nesterov=yes", "bool"),
        ("optim.warmup=5 apples", "duration"),
        ("optim.warmup=-5", "duration"),
        ("optim.warmup=0.5", "duration"),
        ("optim.warmup=. epochs", "duration"),
        ("optim.warmup=1e99999999 tokens", "duration"),
        ("optim.decay=.*", "tuple[tuple[str, float], ...]"),
    ],
)
def test_wrong_type_on_the_command_line(assignment, expected):
    key, _, text = assignment.partition("=")
    message = refusal(assignment)
    assert message.startswith(f"{key}={text!r}: expected {expected}")
    assert f"; for example {key}=" in message
    changed(message.partition("for example ")[2].replace("'", ""))  # the example is a good one


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"num_heads": 0.5}),
        ("model", {"num_heads": True}),
        ("model", {"num_heads": "4"}),
        ("optim", {"peak_lr": "3e-4"}),
        ("optim", {"peak_lr": True}),
        ("optim", {"peak_lr": None}),
        ("optim", {"nesterov": 1}),
        ("optim", {"name": 3}),
        ("optim", {"warmup": "soon"}),
        ("optim", {"decay": [("x", "y")]}),
        ("optim", {"decay": [("x", 1, 2)]}),
        ("optim", {"decay": 3}),
    ],
)
def test_wrong_type_in_the_file(section, values):
    (key,) = values
    cls = {"model": Gpt, "optim": Optim}[section]
    with pytest.raises(ConfigError, match=rf"^{section}\.{key}=.*expected .*for example"):
        config_lib.freeze(cls, values, where=section)


def test_freeze_fills_defaults_and_brings_values_to_their_type():
    optim = config_lib.freeze(Optim, ConfigDict({"peak_lr": 1, "decay": [["a", 2]]}), where="optim")
    assert optim == Optim(peak_lr=1.0, decay=(("a", 2.0),))
    assert isinstance(optim.peak_lr, float)
    assert config_lib.freeze(Gpt, {"num_heads": 1e3}, where="model").num_heads == 1000
    assert config_lib.freeze(Rnn, {"files": "a,b"}, where="model").files == ("a,b",)
    with pytest.raises(ConfigError, match=r"optim.peak_lr=-1.0: use a positive number"):
        config_lib.freeze(Optim, {"peak_lr": -1}, where="optim")
    with pytest.raises(ConfigError, match=r"model.heads: .* model.num_heads"):
        config_lib.freeze(Gpt, {"heads": 1}, where="model")


def test_unused_field_is_refused_on_the_command_line_and_noticed_in_the_file():
    message = refusal("optim.momentum=0.5")
    assert message.startswith("optim.momentum=0.5: used only under optim.name=sgd")
    assert "optim.name is adamw" in message
    assert changed("optim.momentum=0.5", "optim.name=sgd").optim.momentum == 0.5
    assert changed("optim.momentum=0.5", config={"optim": {"name": "sgd"}}).optim.momentum == 0.5

    file = ConfigDict({"optim": {"momentum": 0.5}})
    (notice,) = config_lib.notices(file, SCHEMA)
    assert "optim.momentum=0.5" in notice
    assert config_lib.notices(ConfigDict({"optim": {"name": "sgd", "momentum": 0.5}}), SCHEMA) == []
    assert config_lib.notices(ConfigDict(), SCHEMA) == []


def test_a_duration_in_the_completed_config_may_change_its_kind():
    config = changed()
    config.optim.warmup = "2 epochs"
    assert config_lib.freeze(Optim, config.optim, where="optim").warmup == "2 epochs"


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0, 0),
        (7, 7),
        ("7", 7),
        ("100 steps", 100),
        ("1 step", 1),
        ("1_000 tokens", 16),  # 15.6 updates of 64 tokens
        ("1e6 tokens", 15625),
        ("3 epochs", 10),
        ("0.5 epoch", 2),
        ("10%", 30),
        ("33.3%", 100),
    ],
)
def test_to_steps(value, steps):
    got = config_lib.to_steps(
        value, field="x", tokens_per_step=64, steps_per_epoch=10 / 3, num_steps=300
    )
    assert got == steps
    assert isinstance(got, int)


def test_rounding_errors_are_no_step():
    assert 19 * (21 / 19) > 21
    got = config_lib.to_steps("19 epochs", field="x", tokens_per_step=1, steps_per_epoch=21 / 19)
    assert got == 21


@pytest.mark.parametrize("value", ["soon", -1, 0.5, "-1 epochs", "1e steps", True, "10%", ""])
def test_to_steps_refuses(value):
    with pytest.raises(ConfigError, match=r"train\.num_steps"):
        config_lib.to_steps(value, field="train.num_steps", tokens_per_step=64, steps_per_epoch=3)


def test_json_round_trip():
    config = changed("optim.warmup=10%", "seed=9")
    read = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.difference(config, read) == []
    assert config_lib.complete(read, SCHEMA) == config
    assert config_lib.freeze(Optim, read.optim, where="optim") == Optim(warmup="10%")
    for text in ["{", "[1]", "3", ""]:
        with pytest.raises(ConfigError, match=r"^run/config.json: "):
            config_lib.from_json(text, where="run/config.json")


def test_difference_lists_what_changed_appeared_and_went():
    old = {"seed": 1, "optim": {"peak_lr": 1.0, "decay": (("a", 1.0),), "gone": 2}}
    new = {"seed": 1, "optim": {"peak_lr": 2.0, "decay": [["a", 1.0]]}, "new": {"x": 3}}
    assert config_lib.difference(old, ConfigDict(new)) == [
        ("optim.peak_lr", 1.0, 2.0),
        ("optim.gone", 2, None),
        ("new.x", None, 3),
    ]


def test_describe_reads_trailing_comments_of_the_class_and_its_parents():
    @dataclasses.dataclass(frozen=True)
    class Child(Gpt):
        depth: int = 2  # layers

    comments = {field.name: field.comment for field in config_lib.describe(Optim)}
    assert comments == {
        "name": "adamw, sgd or rmsprop",
        "peak_lr": "learning rate at its peak, per update",
        "momentum": "share kept of the last update",
        "warmup": "time to the peak",
        "nesterov": "",
        "decay": "weight decay by (regex, value)",
    }
    assert config_lib.describe(Child)[1:] == [
        ("num_heads", int, 4, "heads of attention"),
        ("depth", int, 2, "layers"),
    ]
    assert [field.comment for field in config_lib.describe(Rnn)] == ["", "holds a # inside", "", ""]


def test_help_lists_every_field_of_the_chosen_classes():
    text = command.help_text(SCHEMA, changed("model.name=rnn", "optim.peak_lr=1"))
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert set(lines) == {"seed"} | {f"model.{field.name}" for field in dataclasses.fields(Rnn)} | {
        f"optim.{field.name}" for field in dataclasses.fields(Optim)
    }
    assert " ".join(lines["optim.peak_lr"].split()) == (
        "optim.peak_lr (float) = 1.0 [default 0.0003] learning rate at its peak, per update"
    )


def experiment(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_load_returns_what_the_file_says_and_sees_a_rewritten_file(tmp_path):
    text = "from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({'seed': %d})"
    for seed in (1, 2):
        path = experiment(tmp_path, text % seed)
        assert config_lib.load(path).seed == seed
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", ["get_config"]),
        ("get_config = 3", ["get_config"]),
        ("def get_config():\n  return 3", ["get_config()", "int"]),
        ("def get_config():\n\n  return 1 / 0", ["mine.py:3", "ZeroDivisionError"]),
        ("import json\ndef get_config():\n  return json.loads('{')", ["mine.py:3", "JSONDecode"]),
        ("x = 1\ndef get_config(:", ["mine.py:2", "SyntaxError"]),
        ("import no_such_module", ["mine.py:1", "no_such_module"]),
    ],
)
def test_load_names_file_and_line(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        config_lib.load(experiment(tmp_path, text))
    assert all(word in str(caught.value) for word in ["mine.py", *words])
    assert "\n" not in str(caught.value)


def test_load_of_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none.py: no such file"):
        config_lib.load(tmp_path / "none.py")


def test_split_flags():
    argv = ["--config", "x.py", "--config.a.b=1", "--config.seed", "3", "--debug", "--config.c"]
    assignments, rest = command.split_flags(argv)
    assert assignments == ["a.b=1", "seed=3", "c"]
    assert rest == ["--config", "x.py", "--debug"]
    assert "no value" in refusal("c")


def test_exit_on_user_error(capsys):
    def wrong():
        raise ConfigError("seed=x:\n  expected int")

    def broken():
        raise ZeroDivisionError

    assert command.exit_on_user_error(lambda: None) == 0
    assert command.exit_on_user_error(lambda: 3) == 3
    assert command.exit_on_user_error(wrong) == 2
    assert capsys.readouterr().err == "error: seed=x: expected int\n"
    with pytest.raises(ConfigError):
        command.exit_on_user_error(wrong, debug=True)
    with pytest.raises(ZeroDivisionError):
        command.exit_on_user_error(broken)


@pytest.mark.parametrize("value", ["gpt", None, 3])
def test_a_section_that_is_a_value_is_named(value):
    from lm import train

    for assignments in ((), ("model.num_layers=2",)):
        with pytest.raises(ConfigError, match=rf"^model={value!r}: a section"):
            config_lib.override(ConfigDict({"model": value}), assignments, train.SCHEMA)


def test_import_is_light():
    code = "import sys, lm.config; print({'jax', 'numpy', 'tensorflow'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_a_field_may_be_used_only_where_one_of_another_section_says_so():
    from lm import train

    for field, words in (
        (
            "eval.streams=4",
            r"eval\.streams=4: used only under data\.order=stream, and data\.order is shuffle",
        ),
        (
            "optim.outer_lr=1",
            r"used only under a set mesh\.local_steps, and mesh\.local_steps is not set",
        ),
        ("train.spike_steps=9", r"used only under a set train\.spike_zscore"),
        (
            "data.mixture_temperature=2",
            r"used only under a set data\.mixture, and data\.mixture is not set",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            config_lib.override(ConfigDict(), [field], train.SCHEMA)
    both = ["data.order=stream", "eval.streams=4"]
    assert config_lib.override(ConfigDict(), both, train.SCHEMA).eval.streams == 4
