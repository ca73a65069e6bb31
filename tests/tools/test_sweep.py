"""A sweep goes on where it stopped, a failed point stops no other, and the table is the record."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from lm.config import ConfigError
from tools import convert, history, sweep

EXPERIMENT = """
from ml_collections import ConfigDict
from lm import sweep as sweep_lib

def get_config():
    return ConfigDict({"seed": 1})

def sweep():
    return sweep_lib.grid({"optim.peak_lr": [0.1, 0.2, 0.3]})
"""

# Stands for lm.main: notes its flags, writes a metrics file whose loss is 1 - peak_lr.
MAIN = """
import json, os, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1:5:2], sys.argv[2:5:2]))
folder = pathlib.Path(flags["--workdir"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "ran", "a") as file:
    file.write(json.dumps([f for f in sys.argv[5:] if not f.startswith("--swept")]) + "\\n")
lr = float(next(flag for flag in sys.argv if "peak_lr" in flag).split("=")[1])
rows = [{"step": 0, "eval/loss": 9.0}, {"step": 5, "train/loss": 2.0, "mfu": None},
        {"step": 5, "eval/loss": 1 - lr}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
assert "--swept=optim.peak_lr" in sys.argv or "--swept=" in sys.argv
what = pathlib.Path(folder.parent / f"make_{lr}")
if what.exists():
    exec(what.read_text())
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "out").mkdir()
    return tmp_path


def run(place, **arguments):
    command = (sys.executable, str(place / "main.py"))
    return sweep.run(place / "mine.py", place / "out", command=command, **arguments)


def ran(place):
    """Return the flags of each run since the last question."""
    path = place / "out" / "ran"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


def flags(*rates):
    return [[f"--config.optim.peak_lr={rate}"] for rate in rates]


def test_runs_every_point_and_tabulates_the_best_first(place, capsys):
    assert run(place) == 0
    assert ran(place) == flags(0.1, 0.2, 0.3)
    rows = json.loads((place / "out" / "sweep.json").read_text())
    assert [(row["optim.peak_lr"], row["step"], row["exit_code"]) for row in rows] == [
        (0.3, 5, 0),
        (0.2, 5, 0),
        (0.1, 5, 0),
    ]
    assert [row["eval/loss"] for row in rows] == pytest.approx([0.7, 0.8, 0.9])
    with open(place / "out" / "sweep.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in rows]
    table = capsys.readouterr().out.splitlines()[-5:-1]
    assert table[0].split() == ["point", "ended", "step", "eval/loss", "train/loss"]
    assert table[1].split() == ["peak_lr=0.3", "finished", "5", "0.7000", "2.0000"]


def test_a_failed_point_stops_no_other_and_is_tried_again(place):
    (place / "out" / "make_0.1").write_text("sys.exit(2)")
    (place / "out" / "make_0.2").write_text("os.kill(os.getpid(), signal.SIGKILL)")
    assert run(place) == 128 + 9
    assert ran(place) == flags(0.1, 0.2, 0.3)
    rows = json.loads((place / "out" / "sweep.json").read_text())
    assert {row["name"]: row["exit_code"] for row in rows} == {
        "peak_lr=0.1": 2,
        "peak_lr=0.2": 137,
        "peak_lr=0.3": 0,
    }
    for name in ("make_0.1", "make_0.2"):
        (place / "out" / name).unlink()
    assert run(place) == 0
    assert ran(place) == flags(0.1, 0.2)


def test_the_table_keeps_finished_points_that_are_not_run_again(place):
    def rows(**arguments):
        assert run(place, **arguments) == 0
        return [row["name"] for row in json.loads((place / "out" / "sweep.json").read_text())]

    assert rows(only=["peak_lr=0.2"]) == ["peak_lr=0.2"]
    assert rows(only=["peak_lr=0.1"]) == ["peak_lr=0.2", "peak_lr=0.1"]
    shutil.rmtree(place / "out" / "peak_lr=0.2")
    assert rows(only=["peak_lr=0.3"], fixed=["seed=2"]) == ["peak_lr=0.3"]  # of another config


def test_a_loss_that_is_not_finite_is_last_and_no_number(place, capsys):
    (place / "out" / "make_0.3").write_text(
        "file = open(folder / 'metrics.jsonl', 'a')\n"
        'print(\'{"step": 6, "eval/loss": null}\', file=file)'
    )
    assert run(place) == 0
    text = (place / "out" / "sweep.json").read_text()
    rows = json.loads(text, parse_constant=pytest.fail)
    assert [row["optim.peak_lr"] for row in rows] == [0.2, 0.1, 0.3]
    assert rows[-1]["eval/loss"] is None
    assert "peak_lr=0.3  finished  6     -          2.0000" in capsys.readouterr().out


def test_finished_points_are_skipped_and_of_another_config_refused(place):
    run(place)
    ran(place)
    assert run(place) == 0
    assert ran(place) == []
    assert len(json.loads((place / "out" / "sweep.json").read_text())) == 3
    (place / "mine.py").write_text(EXPERIMENT.replace("0.3]", "0.3, 0.4]"))
    run(place)
    assert ran(place) == flags(0.4)
    for fixed, text in (
        (["seed=2"], EXPERIMENT),
        ([], EXPERIMENT.replace('"seed": 1', '"seed": 3')),
    ):
        (place / "mine.py").write_text(text)
        with pytest.raises(ConfigError, match=r"peak_lr=0\.1 holds this point of another config"):
            run(place, fixed=fixed)
    assert ran(place) == []
    folder = next((place / "out").glob("*peak_lr=0.1"))
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "sweep_point.json").write_text('{"identity": "other", "finished": false}')
    (place / "mine.py").write_text(EXPERIMENT)
    run(place)  # one that never began is begun
    assert ran(place) == flags(0.1)
    for half in ("", '{"identity": "', "{}"):  # a kill came as it was written
        (folder / "sweep_point.json").write_text(half)
        run(place)
        assert ran(place) == flags(0.1)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ('[{"name": "../x", "seed": 1}]', "name='../x' is no name of a folder"),
        ('[{"name": "a/b", "seed": 1}]', "name='a/b' is no name of a folder"),
        (
            '[{"data.batch_size": 8}, {"eval.batch_size": 8}]',
            'both called batch_size=8; give one a "name"',
        ),
        ('[{"seed": 1}, {"seed": 1}]', "twice; keep one"),
    ],
)
def test_points_have_folders_of_their_own(place, points, words):
    whole = 'sweep_lib.grid({"optim.peak_lr": [0.1, 0.2, 0.3]})'
    (place / "mine.py").write_text(EXPERIMENT.replace(whole, points))
    with pytest.raises(ConfigError) as told:
        sweep.read_points(place / "mine.py")
    assert words in str(told.value)


def test_a_metric_that_is_no_number_is_a_dash():
    rows = [{"name": "a", "exit_code": 0, "optim.name": "lion", "train/loss": 1.0}]
    assert sweep.table(rows, "optim.name").splitlines()[1].split()[-2:] == ["-", "1.0000"]


def test_a_flag_wins_over_the_points_and_may_not_make_two_of_them_the_same(place):
    (place / "mine.py").write_text(
        EXPERIMENT.replace(
            "[0.1, 0.2, 0.3]})", '[0.1, 0.2], "seed": [1]}, {"model.num_layers": [2]})'
        )
    )
    run(place, fixed=["seed=7"])
    assert [flags[-2:] for flags in ran(place)] == [
        ["--config.model.num_layers=2", "--config.seed=7"]
    ] * 2
    with pytest.raises(ConfigError, match=r"^optim\.peak_lr: .*peak_lr=0\.1,.* are the same"):
        run(place, fixed=["optim.peak_lr=0.5"])
    assert ran(place) == []
    twins = '[{"name": "a", "optim.peak_lr": 0.1}, {"name": "b", "optim.peak_lr": 0.1}]'
    twins_file = EXPERIMENT.replace('sweep_lib.grid({"optim.peak_lr": [0.1, 0.2, 0.3]})', twins)
    (place / "mine.py").write_text(twins_file)
    run(place, fixed=["seed=7"])  # the same by the file's own wish
    assert len(ran(place)) == 2


def test_interrupt_lets_the_point_save_and_stops_there(place):
    """Ctrl-C reaches the whole group: the point takes a while to save, and must be given it."""
    (place / "out" / "make_0.1").write_text(
        "try:\n    (folder / 'began').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.6); (folder / 'saved').touch(); sys.exit(130)"
    )
    # A shell starts what runs in its background with SIGINT ignored, and children inherit it.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys; from tools import sweep; sys.exit(sweep.run("
        f"{str(place / 'mine.py')!r}, {str(place / 'out')!r}, "
        f"command=({sys.executable!r}, {str(place / 'main.py')!r})))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = place / "out" / "peak_lr=0.1"
    deadline = time.monotonic() + 30
    while not (folder / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(parent.pid, signal.SIGINT)
    printed, _ = parent.communicate(timeout=30)
    assert parent.returncode == 130
    assert (folder / "saved").exists()
    assert "the same command goes on with peak_lr=0.1" in printed
    assert ran(place) == flags(0.1)


def test_a_stop_reaches_the_point_and_ends_the_sweep(place):
    """As a scheduler's, which knows the sweep alone."""
    (place / "out" / "make_0.1").write_text(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n(folder / 'began').touch(); time.sleep(60)"
    )
    code = (
        "import sys; from tools import sweep; sys.exit(sweep.run("
        f"{str(place / 'mine.py')!r}, {str(place / 'out')!r}, "
        f"command=({sys.executable!r}, {str(place / 'main.py')!r})))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (place / "out" / "peak_lr=0.1" / "began").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.terminate()
    printed, _ = parent.communicate(timeout=30)
    assert parent.returncode == 75
    assert "the same command goes on with peak_lr=0.1" in printed
    assert ran(place) == flags(0.1)


def test_every_point_has_a_remote_of_its_own(place):
    """Else the second would go on with the first one's last checkpoint."""
    assert run(place, fixed=["checkpoint.remote=gs://bucket/mine/"]) == 0
    assert [line[-1] for line in ran(place)] == [
        f"--config.checkpoint.remote=gs://bucket/mine/peak_lr={rate}" for rate in (0.1, 0.2, 0.3)
    ]


def test_a_failure_is_told_rather_than_a_stop(place):
    for rate, code in ((0.1, 3), (0.2, 76)):
        (place / "out" / f"make_{rate}").write_text(f"sys.exit({code})")
    assert run(place) == 3


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return []", "no point"),
        ("return {'a': 1}", "list of dicts"),
        ("return [{'a': 1}, {'a': 1}]", "twice"),
        ("return sweep_lib.grid({'a': []})", "mine.py:9: ValueError: a=[]"),
    ],
)
def test_mistakes_in_the_file(place, body, words):
    (place / "mine.py").write_text(EXPERIMENT.rpartition("return")[0] + body)
    with pytest.raises(ConfigError) as caught:
        run(place)
    assert words in str(caught.value)


def test_command_line(place, capsys):
    assert sweep.main(["--config", str(place / "mine.py"), "--dry_run"]) == 0
    assert capsys.readouterr().out.split() == ["peak_lr=0.1", "peak_lr=0.2", "peak_lr=0.3"]
    for flag, words in (("optim.lr", "did you mean optim.peak_lr"), ("optim.peak_lr", "the same")):
        flags = ["--dry_run", f"--config.{flag}=3"]
        assert sweep.main(["--config", str(place / "mine.py"), *flags]) == 2
        assert words in capsys.readouterr().err
    assert sweep.main(["--config", str(place / "none.py")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("tool", "flags"),
    [
        (sweep, ["--config", "experiments/history.py", "--workdir"]),
        (history, ["--workdir"]),
        (convert, ["--from", ".", "--to"]),
    ],
    ids=["sweep", "history", "convert"],
)
def test_a_url_is_no_folder(tool, flags, capsys):
    assert tool.main([*flags, "gs://bucket/x"]) == 2
    assert f"{flags[-1]}=gs://bucket/x: give a folder" in capsys.readouterr().err


def test_an_experiment_may_have_numbers_of_numpy_and_paths():
    config = ConfigDict({"train": {"num_steps": np.int64(3)}, "data": {"path": Path("a.txt")}})
    assert sweep._readable(config).to_dict() == {
        "train": {"num_steps": 3},
        "data": {"path": "a.txt"},
    }
