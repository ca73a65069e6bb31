"""Every experiment builds, shrinks and takes a step; its docstring is a lab note."""

import ast
from pathlib import Path

import pytest

from lm import config as config_lib
from lm import experiment, train

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
SMALL = {
    "data.tokenizer": "byte",
    "data.batch_size": "8",
    "task.length": "16",
    "model.num_layers": "1",
    "model.model_dim": "32",
    "train.num_steps": "1",
    "train.accumulate_steps": "1",
    "train.sample_tokens": "0",
    "train.fingerprint_every_steps": "0",
    "eval.max_tokens": "256",
    "eval.batch_size": "8",
    "optim.warmup": "0",
}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_takes_a_step(path, text_file, tmp_path):
    config = config_lib.load(path)
    resolved = config_lib.complete(config, train.SCHEMA)
    shrunk = {**SMALL, "data.path": str(text_file)}
    if resolved.model.name == "gpt":
        shrunk |= {"model.num_heads": "2", "model.num_kv_heads": "0"}
    if resolved.task.name == "span_corruption":
        shrunk["task.source_length"] = shrunk.pop("task.length")
    if resolved.task.name == "classify":
        labelled = tmp_path / "labelled.tsv"
        lines = text_file.read_text().splitlines()[:120]
        labelled.write_text("".join(f"{i % 3}\t{line} {i}\n" for i, line in enumerate(lines)))
        shrunk |= {"data.path": str(labelled)}
        shrunk |= {"data.source_field": "1", "data.label_field": "0"}
    if resolved.data.mixture:
        other = tmp_path / "other.txt"
        other.write_text(text_file.read_text()[::-1])
        del shrunk["data.path"]
        shrunk["data.mixture"] = f"{text_file}=3,{other}=1"
    if resolved.data.order == "stream":
        shrunk["eval.streams"] = "8"
        del shrunk["eval.batch_size"]
    held = config_lib.flatten(resolved)  # a family may have no layers to take away
    shrunk = {key: value for key, value in shrunk.items() if key in held}
    drop = [key for key in ("vocab_size", "sentencepiece_model") if key in config.get("data", {})]
    for key in drop:
        del config.data[key]
    small = config_lib.override(config, [f"{k}={v}" for k, v in shrunk.items()], train.SCHEMA)
    final = train.run(small, tmp_path)
    assert 0 < final["eval/loss"] < 10


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_a_lab_note(path):
    note = ast.get_docstring(ast.parse(path.read_text()))
    assert note, path
    for word in ("Command: python -m", "Hardware:"):
        assert word in note, f"{path}: its docstring lacks {word!r}"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_complete_and_frozen(path):
    config = config_lib.load(path)
    assert config_lib.notices(config, train.SCHEMA) == []
    experiment.freeze(config_lib.complete(config, train.SCHEMA))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_field_says_what_it_means(path):
    """`--help` has nothing else to show of it."""
    fields = config_lib.catalogue(train.SCHEMA, config_lib.flatten(config_lib.load(path)))
    assert len(fields) > 80
    assert [name for name, field in fields.items() if not field.comment] == []
