"""The verbs on a trained model: generate and evaluate, and what a mistake costs."""

import json

import pytest
from ml_collections import ConfigDict

from lm import train
from tools import evaluate, generate, inspect_data, prepare_data


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, text_file):
    """A run with a character tokenizer."""
    folder = tmp_path_factory.mktemp("tools") / "run"
    config = ConfigDict({
        "data": {"path": (str(text_file),), "tokenizer": "char", "batch_size": 8},
        "task": {"length": 16},
        "model": {"name": "gpt", "num_layers": 1, "model_dim": 32, "num_heads": 2},
        "optim": {"peak_lr": 1e-2, "warmup": 0},
        "train": {"num_steps": 3, "sample_tokens": 0},
        "eval": {"max_tokens": 256},
    })  # fmt: skip
    train.run(config, folder)
    return folder


def said(capsys):
    return capsys.readouterr().out


def test_generates_from_a_prompt_the_same_for_a_seed(workdir, capsys):
    flags = ["--workdir", str(workdir), "--prompt", "the cat", "--max_tokens", "12"]
    assert generate.main(flags) == 0
    first = said(capsys)
    assert first.startswith("the cat") and len(first) > len("the cat\n")
    assert generate.main(flags) == 0
    assert said(capsys) == first
    assert generate.main([*flags, "--seed", "1"]) == 0
    assert said(capsys) != first


def test_many_samples_differ(workdir, capsys):
    flags = ["--workdir", str(workdir), "--prompt", "the", "--num_samples", "2"]
    assert generate.main([*flags, "--max_tokens", "12"]) == 0
    _, first, second = said(capsys).split("--- ")
    assert first.split("---\n")[1] != second.split("---\n")[1]


def test_evaluates_its_own_and_other_text(workdir, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    assert evaluate.main(["--workdir", str(workdir), "--json", str(scores)]) == 0
    own = json.loads(scores.read_text())
    recorded = json.loads((workdir / "checkpoints" / "3" / "manifest.json").read_text())["metrics"]
    assert own["loss"] == pytest.approx(recorded["eval/loss"], rel=1e-6)
    other = tmp_path / "other.txt"
    other.write_text("the sea. " * 40)
    flags = ["--workdir", str(workdir), f"--config.data.path={other}", "--config.eval.max_tokens=0"]
    assert evaluate.main([*flags, "--json", str(scores)]) == 0
    # Every character is scored, and the end of the text.
    assert json.loads(scores.read_text())["tokens"] == 9 * 40 + 1


@pytest.mark.parametrize(
    ("tool", "flags", "words"),
    [
        (generate, ["--workdir", "nowhere"], "nowhere"),
        (generate, ["--step", "77"], "step=77"),
        (generate, ["--prompt", "\N{SNOWMAN}"], "\N{SNOWMAN}"),
        (generate, ["--temperature", "-1"], "temperature=-1"),
        (generate, ["--top_p", "2"], "top_p=2"),
        (generate, ["--num_samples", "0"], "num_samples=0: use 1 or more"),
        (generate, ["--seed", str(10**30)], f"seed={10**30}: use a whole number"),
        (evaluate, ["--workdir", "nowhere"], "nowhere"),
        (evaluate, ["--config.model.num_layers=2"], "model.num_layers"),
        (evaluate, ["--config.data.path=missing.txt"], "missing.txt"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(workdir, capsys, tool, flags, words):
    flags = flags if "--workdir" in flags else ["--workdir", str(workdir), *flags]
    assert tool.main(flags) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_a_damaged_checkpoint_is_refused_by_name(workdir, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    files = [p for p in (copy / "checkpoints" / "3" / "state").rglob("*") if p.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert generate.main(["--workdir", str(copy), "--prompt", "a"]) == 2
    assert victim.name in capsys.readouterr().err


def test_a_prepared_corpus_is_scored_on_its_own_validation_split(
    workdir, text_file, tmp_path, capsys
):
    flags = [
        "--source",
        "text",
        "--tokenizer",
        str(workdir / "tokenizer"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert prepare_data.main([*flags, f"--config.data.path={text_file}"]) == 0
    assert evaluate.main(["--workdir", str(workdir), f"--config.data.path={tmp_path / 'out'}"]) == 0
    capsys.readouterr()


def test_folds_of_another_text_can_be_scored(workdir, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"the cat sat on mat {'the dog ' * (n % 7)}"}) for n in range(200)]
    path.write_text("\n".join(rows))
    flags = [f"--config.data.path={path}", "--config.data.fold=0/5"]
    assert evaluate.main(["--workdir", str(workdir), *flags]) == 0
    capsys.readouterr()


def test_a_task_that_makes_no_rows_for_the_model_is_a_line(capsys, text_file):
    flags = [
        f"--config.data.path={text_file}",
        "--config.data.tokenizer=byte",
        "--config.task.name=masked_lm",
    ]
    assert inspect_data.main(["--config", "experiments/gpt_tiny.py", *flags]) == 2
    assert "makes rows for" in capsys.readouterr().err
