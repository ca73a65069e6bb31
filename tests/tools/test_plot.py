"""Figures show the rows that were written, and mistakes end with one line and exit code 2."""

import json
import math

import numpy as np
import pytest

from lm.config import ConfigError
from tools import plot


def write_run(folder, rows, *, config=True):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config:
        text = json.dumps({"data": {"batch_size": 10}, "task": {"length": 6}})
        (folder / "config.json").write_text(text)
    return folder


@pytest.fixture
def two_runs(tmp_path):
    rows = [
        {"step": 0, "eval/loss": 4.0, "eval/accuracy": 0.1},
        {"step": 10, "train/loss": 3.0, "train/tokens": 60.0, "steps_per_second": 1 / 6},
        {"step": 20, "train/loss": 2.0, "train/tokens": 20.0, "steps_per_second": 2 / 6},
        {"step": 20, "eval/loss": 2.5, "eval/accuracy": 0.4},
    ]
    return [write_run(tmp_path / name / "now", rows) for name in ("gpt", "rnn")]


def lines(figure):
    """Return {legend: (x, y)} of the lines that the legends name."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for panel in figure.axes
        for line in panel.get_lines()
        if not line.get_label().startswith("_")
    }


def test_curves_are_the_rows(two_runs):
    figure = plot.draw(two_runs, smooth=0.0)
    assert lines(figure) == {
        f"{name}/now  {words}": xy
        for name in ("gpt", "rnn")
        for words, xy in [
            ("train/loss  2", ([10, 20], [3.0, 2.0])),
            ("eval/loss  2.5", ([0, 20], [4.0, 2.5])),
        ]
    }
    (panel,) = figure.axes
    looks = {(line.get_color(), line.get_linestyle()) for line in panel.get_lines()}
    assert len(looks) == 4  # each curve can be told from each other


def test_abscissae_in_tokens_and_minutes(two_runs):
    for x, across in [("tokens", [0, 10 * 60 + 10 * 20]), ("time", [0, 1 + 0.5])]:
        drawn = lines(plot.draw(two_runs[:1], metrics=["eval/loss"], x=x))
        assert drawn["eval/loss  2.5"][0] == pytest.approx(across)


def test_metrics_of_other_kinds_get_a_panel_of_their_own(two_runs):
    figure = plot.draw(two_runs[:1], metrics=["train/loss", "eval/loss", "eval/accuracy"], log=True)
    assert [len(panel.get_legend().get_texts()) for panel in figure.axes] == [2, 1]
    assert [panel.get_yscale() for panel in figure.axes] == ["log", "log"]


def test_names_are_what_tells_runs_apart(tmp_path):
    row = [{"step": 1, "eval/loss": 1.0}]
    folders = [write_run(tmp_path / part, row) for part in ("a/x", "a/y", "b/x")]
    assert [run.name for run in plot.read_runs(folders)] == ["a/x", "a/y", "b/x"]
    assert [run.name for run in plot.read_runs(folders[:2])] == ["x", "y"]
    assert [run.name for run in plot.read_runs(folders[:1] * 2)] == ["a/x"]


def test_smoothing_keeps_constants_and_does_not_lag():
    assert plot.smoothed(np.full(9, 3.0), 0.9) == pytest.approx(np.full(9, 3.0))
    assert plot.smoothed(np.array([0.0, 1.0, 0.0]), 0.5)[1] == 1 / (0.5 + 1 + 0.5)
    line = np.arange(101.0)
    assert plot.smoothed(line, 0.8)[50] == pytest.approx(50.0)
    noise = np.random.default_rng(0).normal(size=1000)
    assert plot.smoothed(noise, 0.8).std() < 0.4 * noise.std()
    assert plot.smoothed(noise, 0.0) == pytest.approx(noise)


def test_smoothing_leaves_nan_where_it_is():
    result = plot.smoothed(np.array([1.0, math.nan, 1.0, math.inf, 1.0]), 0.5)
    assert result == pytest.approx([1.0, math.nan, 1.0, math.nan, 1.0], nan_ok=True)


def test_a_run_without_a_finite_value_still_draws(tmp_path):
    folder = write_run(tmp_path / "x" / "y", [{"step": s, "train/loss": None} for s in (1, 2)])
    assert list(lines(plot.draw([folder]))) == ["train/loss  no finite value"]


@pytest.mark.parametrize("count", [1, 2])
def test_writes_a_png(two_runs, tmp_path, capsys, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    assert plot.main(["--workdir", *map(str, two_runs[:count]), "--x", "tokens", "--log"]) == 0
    path = tmp_path / capsys.readouterr().out.strip()
    assert path == (two_runs[0] if count == 1 else tmp_path) / "loss.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = np.frombuffer(path.read_bytes()[16:24], ">u4")
    assert (width, height) == (1200, 750)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir", "none"], ["none", "no metrics.jsonl"]),
        (["--metric", "train/los"], ["metric=train/los", "did you mean train/loss?"]),
        (["--out", "x.xyz"], ["out=x.xyz", "png"]),
        (["--smooth", "1"], ["smooth=1.0"]),
    ],
)
def test_mistakes_end_with_one_line(two_runs, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert plot.main(["--workdir", str(two_runs[0]), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert not list(tmp_path.glob("*.png"))


def test_axes_that_the_record_cannot_give_are_refused(tmp_path):
    row = {"step": 1, "eval/loss": 1.0}
    untimed = write_run(tmp_path / "untimed", [row])
    for x, folder in [
        ("time", untimed),
        ("tokens", write_run(tmp_path / "bare", [row], config=False)),
    ]:
        with pytest.raises(ConfigError, match="use --x step"):
            plot.draw([folder], x=x)
    empty = write_run(tmp_path / "empty", [])
    with pytest.raises(ConfigError, match=r"no run has train/loss or eval/loss"):
        plot.draw([empty])


def test_a_value_that_is_no_number_is_named(tmp_path):
    folder = write_run(tmp_path / "run", [{"step": 1, "train/loss": "high"}])
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1: train/loss is 'high', no number"):
        plot.read_runs([folder])


def test_many_runs_have_as_many_colours():
    for count in (3, 12, 40):
        assert len({str(color) for color in plot._colors(count)}) == count
