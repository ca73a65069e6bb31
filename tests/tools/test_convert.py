"""A trained model of others comes in, speaks, and goes out, all as a user types it."""

import json
import shutil
from pathlib import Path

import pytest

from tools import convert, evaluate, generate

STORIES = Path(__file__).parents[2].parent / "shared" / "data" / "stories260k_llama"
PUBLISHED = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball"
)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The run of the published model."""
    if not STORIES.exists():
        pytest.skip(f"{STORIES} is absent")
    run = tmp_path_factory.mktemp("stories") / "run"
    assert convert.main(["--from", str(STORIES), "--to", str(run)]) == 0
    return run


@pytest.mark.parametrize(
    "prompt", ["", "Once upon a time", "Once upon a time, there was a little girl"]
)
def test_it_goes_on_as_published(stories, capsys, prompt):
    flags = ["--workdir", str(stories), "--prompt", prompt, "--temperature", "0"]
    assert generate.main([*flags, "--max_tokens", "60"]) == 0
    assert capsys.readouterr().out.startswith(PUBLISHED)


def test_its_loss_on_a_story_is_low(stories, tmp_path):
    """Published: 1.297 nats a token on its validation set; its own greedy text is easier, noise is not."""
    losses = {}
    for name, text in (("own", f"{PUBLISHED}. "), ("noise", PUBLISHED[::-1])):
        (tmp_path / f"{name}.txt").write_text(text)
        flags = ["--workdir", str(stories), f"--config.data.path={tmp_path / name}.txt"]
        scores = tmp_path / f"{name}.json"
        assert evaluate.main([*flags, "--json", str(scores)]) == 0
        losses[name] = json.loads(scores.read_text())["loss"]
    assert losses["own"] < 1.3 < 4 < losses["noise"]


def test_it_goes_out_as_it_came_in(stories, tmp_path, capsys):
    assert convert.main(["--from", str(stories), "--to", str(tmp_path / "out")]) == 0
    assert "260,032 parameters in F32, tokenizer llama2c of 512" in capsys.readouterr().out
    for file in STORIES.iterdir():
        if file.name != "SOURCE.txt":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_may_be_moved(stories, tmp_path, capsys):
    moved = shutil.copytree(stories, tmp_path / "elsewhere")
    flags = ["--workdir", str(moved), "--prompt", "Once upon", "--temperature", "0"]
    assert generate.main([*flags, "--max_tokens", "9"]) == 0
    assert PUBLISHED.startswith(capsys.readouterr().out.strip())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--from", "nowhere", "--to", "x"], "--from nowhere: no such folder"),
        (["--from", "tests", "--to", "x", "--step", "best"], "--step best: --from tests is no run"),
        (["--from", "tests", "--to", "x"], "neither a Hugging Face folder"),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys):
    assert convert.main(flags) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_a_run_of_no_known_architecture_is_one_line(tiny, tmp_path, capsys):
    from lm import train

    train.run(tiny(train__num_steps=2, model__num_layers=1), tmp_path / "run")
    assert convert.main(["--from", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert (
        "llama has no model.activation='relu2', model.qk_norm=True" in error and "\n" not in error
    )
    assert not (tmp_path / "out").exists()
    flags = f"--from {tmp_path}/run --to {tmp_path}/out --tokenizer x.json"
    assert convert.main(flags.split()) == 2
    error = capsys.readouterr().err.strip()
    assert "--tokenizer x.json: the run" in error and "\n" not in error
