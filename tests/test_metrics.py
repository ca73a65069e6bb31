"""No row is lost or torn by a kill, and a resumed run's record holds each step once."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lm import metrics, tensorboard
from lm.config import ConfigError


def test_means_of_two_batches_are_the_mean_of_all():
    left = {"loss": (jnp.float32(6.0), jnp.float32(3.0)), "router": (1.0, 2.0)}
    right = {"loss": (np.float32(8.0), 1), "accuracy": (3, 4)}
    total = metrics.add(left, right)
    assert metrics.summarize(total) == {"loss": 3.5, "router": 0.5, "accuracy": 0.75}
    assert left["loss"][0] == 6.0  # unchanged


def test_nothing_weighed_is_nan_and_not_zero():
    assert math.isnan(metrics.summarize({"loss": (0.0, 0.0)})["loss"])


def test_jsonl_rows_are_there_at_once_and_valid(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics.Jsonl(path)
    writer.write(np.int64(3), {"train/loss": jnp.float32(0.5), "mfu": math.nan, "x": -math.inf})
    text = path.read_text()  # before close or sync
    refuse = pytest.fail
    assert json.loads(text, parse_constant=refuse) == {
        "step": 3,
        "train/loss": 0.5,
        "mfu": None,
        "x": None,
    }
    assert text.startswith('{"step": 3, ')
    (row,) = metrics.read_rows(path)
    assert row["train/loss"] == 0.5
    assert math.isnan(row["mfu"])
    writer.close()


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 3, "loss"', b"\0" * 9, b'{"step": 3}'])
def test_jsonl_goes_on_after_a_torn_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [row["step"] for row in metrics.read_rows(path)] == [1, 2]
    writer = metrics.Jsonl(path)
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in metrics.read_rows(path)] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ("hello", "3", "[" * 100_000):
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(ConfigError, match=r"metrics.jsonl:2: not a JSON object"):
            metrics.read_rows(path)


def test_a_value_that_is_no_number_is_an_error_where_numbers_are_wanted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": "low"}\n')
    assert len(metrics.read_rows(path)) == 2
    with pytest.raises(ConfigError, match=r"metrics.jsonl:2: loss is 'low', no number; delete"):
        metrics.read_rows(path, numbers=True)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_is_replaced_or_deleted_meanwhile_gets_the_rows_that_come(
    tmp_path, capsys, replaced
):
    writer = metrics.Jsonl(path := tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": 1.0})
    if replaced:  # as an editor does
        (tmp_path / "new").write_bytes(path.read_bytes().rstrip())
        (tmp_path / "new").replace(path)
    else:
        path.unlink()
    for step in (2, 3):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in metrics.read_rows(path)] == ([1, 2, 3] if replaced else [2, 3])
    assert capsys.readouterr().err.count("was replaced or deleted; going on in the file") == 1


@pytest.mark.parametrize("how", ["cut", "added"])
def test_a_file_that_is_changed_meanwhile_tears_no_row_that_comes(tmp_path, capsys, how):
    writer = metrics.Jsonl(path := tmp_path / "metrics.jsonl")
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
    with path.open("ab") as file:
        file.truncate(path.stat().st_size - 5) if how == "cut" else file.write(b'{"st')
    for step in (3, 4):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert capsys.readouterr().err.count("was changed by another program") == 1
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[-2:]] == [3, 4]
    torn = 2 if how == "cut" else 3
    with pytest.raises(ConfigError, match=rf"metrics\.jsonl:{torn}: .*delete that line"):
        metrics.read_rows(path)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    writer = metrics.Jsonl(path := tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": 1.0})
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no plain file any more; move it away"):
        writer.write(2, {"loss": 1.0})


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(path := tmp_path / "metrics.jsonl")
    for use in (metrics.read_rows, metrics.Jsonl, lambda p: metrics.move_rows_aside(p, after=1)):
        with pytest.raises(ConfigError, match=r"metrics.jsonl: no plain file; move it away"):
            use(path)


def test_rows_that_were_added_are_moved_aside_and_scores_of_the_step_are_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    own = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
    path.write_text(own)
    mark = metrics.Jsonl(path).mark
    late = '{"step": 2, "eval/loss": 2.5}\n'
    strange = '{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 2.0}\n{"step": 1, "eval/loss": 2.0}\n'
    path.write_text(own + late)
    assert not metrics.check_rows(path, mark, at=2)
    path.write_text(own + strange + late)
    assert "added that the run did not write; moved to" in metrics.check_rows(path, mark, at=2)
    assert path.read_text() == own + late
    assert (tmp_path / "metrics.1.jsonl").read_text() == strange
    assert not metrics.check_rows(path, mark, at=2)


def test_only_a_newline_ends_a_line(tmp_path):
    """One bit turns the minus of a number into a carriage return; JSON takes one between its words."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "lr": 4.9e\r05}\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl:1: not a JSON object"):
        metrics.move_rows_aside(path, after=1)
    path.write_bytes(b'{"step": 1,\r"lr": 4.9e-05}\n{"step": 2}\n')
    mark = metrics.Jsonl(path).mark
    assert mark[0] == 2 and not metrics.check_rows(path, mark, at=2)
    assert metrics.move_rows_aside(path, after=1)
    assert [row["step"] for row in metrics.read_rows(path)] == [1]


def test_rows_of_later_steps_move_aside_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {s},  "loss": 1e-0{s}}}\n' for s in (0, 1, 2, 2, 3)]
    path.write_text("".join(lines) + '{"st')
    assert metrics.move_rows_aside(path, after=2).name == "metrics.1.jsonl"
    assert path.read_text() == "".join(lines[:4])
    assert (tmp_path / "metrics.1.jsonl").read_text() == lines[4]
    assert metrics.move_rows_aside(path, after=2) is None
    assert metrics.move_rows_aside(path, after=0).name == "metrics.2.jsonl"
    assert path.read_text() == lines[0]
    assert (tmp_path / "metrics.2.jsonl").read_text() == "".join(lines[1:4])
    assert sorted(os.listdir(tmp_path)) == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]


def test_moving_aside_killed_at_either_write_loses_no_row(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1}, {"step": 2}]
    real = os.replace
    for survived in (0, 1):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        calls = []

        def replace(source, target, calls=calls, survived=survived):
            if len(calls) == survived:
                raise KeyboardInterrupt
            calls.append(real(source, target))

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            metrics.move_rows_aside(path, after=1)
        monkeypatch.setattr(os, "replace", real)
        kept = [row for file in tmp_path.glob("metrics*") for row in metrics.read_rows(file)]
        assert all(row in kept for row in rows)
    metrics.move_rows_aside(path, after=1)
    assert metrics.read_rows(path) == rows[:1]


def events(folder):
    """Return (tag, step, value) of all scalars in the event files of `folder`, in reading order."""
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        for _, record in tensorboard.records(path.read_bytes()):
            event = Event.FromString(record[12:-4])
            found += [(v.tag, event.step, scalar_of(v)) for v in event.summary.value]
    return found


def scalar_of(value):
    return value.simple_value or sum(value.tensor.float_val)


def open_quiet(folder, **arguments):
    return metrics.open_writers(folder, num_steps=10, **arguments)


def test_resuming_leaves_each_step_once_in_both_files(tmp_path):
    for resume_step, steps in [(None, range(0, 7)), (4, range(5, 9)), (2, range(3, 5))]:
        writers = open_quiet(tmp_path, resume_step=resume_step)
        for step in steps:  # the value says which try wrote it
            writers.write(step, {"train/loss": float(step + 10 * (resume_step or 0))})
        writers.sync()
        jsonl = [
            (r["step"], r["train/loss"]) for r in metrics.read_rows(tmp_path / "metrics.jsonl")
        ]
        board = sorted((step, value) for _, step, value in events(tmp_path / "tensorboard"))
        assert board == jsonl  # before close: sync has written all
        writers.close()
    assert jsonl == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    moved = [
        row["step"] for n in (1, 2) for row in metrics.read_rows(tmp_path / f"metrics.{n}.jsonl")
    ]
    assert moved == [5, 6, 3, 4, 5, 6, 7, 8]
    aside = [path for path in (tmp_path / "tensorboard").iterdir() if "tfevents" not in path.name]
    assert sorted(
        event.step
        for path in aside
        for event, _ in tensorboard.records(path.read_bytes())
        if event.HasField("summary")
    ) == sorted(moved)


@pytest.mark.parametrize("place", [3, 9, 14, 30, -2])
def test_a_damaged_event_file_is_moved_aside_whole(tmp_path, capsys, place):
    for resume_step in (None, 4):
        writers = open_quiet(tmp_path, resume_step=resume_step)
        for step in (5, 6):
            writers.write(step, {"train/loss": 1.0})
        writers.close()
        (path, *_) = sorted((tmp_path / "tensorboard").glob("*tfevents*"))
        content = bytearray(path.read_bytes())
        content[place] ^= 4
        path.write_bytes(content)
    (aside,) = (tmp_path / "tensorboard").glob("*.damaged.*")
    assert f"{path.parent}" in (said := capsys.readouterr().err) and f"moved to {aside}" in said
    assert len(metrics.read_rows(tmp_path / "metrics.jsonl")) == 2


def test_an_event_file_that_is_none_is_moved_aside(tmp_path, capsys):
    folder = tmp_path / "tensorboard"
    (folder / "events.out.tfevents.1.folder").mkdir(parents=True)
    (folder / "events.out.tfevents.1.link").symlink_to(tmp_path / "nowhere")
    open_quiet(tmp_path, resume_step=None).close()
    said = capsys.readouterr().err
    for name in ("folder", "link"):
        assert os.path.lexists(aside := folder / f"events.out.damaged.1.{name}.aside0")
        assert f"moved to {aside}" in said
    (found,) = folder.glob("*tfevents*")
    assert found.is_file()


def test_rows_that_are_missing_or_changed_are_said(tmp_path, capsys):
    writers = open_quiet(tmp_path, resume_step=None)
    for step in (1, 2, 3):
        writers.write(step, {"train/loss": step / 8, "mfu": 0.5})
    mark = writers.mark
    writers.write(4, {"train/loss": 1.0})
    writers.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for content, words in (
        (b"".join(lines), ""),
        (lines[0] + lines[1] + lines[3], "2 rows are there of the 3 that were written"),
        (lines[0], "1 rows are there of the 3 that were written"),
        (b"".join(lines).replace(b"0.25", b"0.24"), "rows are not what was written"),
        (b"".join(lines).replace(b"0.5", b"0.9"), ""),  # how fast it was
    ):
        path.write_bytes(content)
        again = open_quiet(tmp_path, resume_step=3, mark=mark)
        again.close()
        said = capsys.readouterr().err
        assert words in said if words else "rows" not in said
        assert (mark == again.mark) == (not words)


def test_a_fresh_start_moves_everything_of_an_earlier_try(tmp_path):
    for _ in range(2):
        writers = open_quiet(tmp_path, resume_step=None)
        writers.write(0, {"eval/loss": 2.0})
        writers.close()
    assert len(metrics.read_rows(tmp_path / "metrics.jsonl")) == 1
    assert len(events(tmp_path / "tensorboard")) == 1


def test_an_evaluation_that_is_made_again_leaves_one_row(tmp_path):
    """A kill between its row and the note in the checkpoint that there is one."""
    for scored in (True, False):
        writers = open_quiet(tmp_path, resume_step=None if scored else 4, scored=scored)
        for step in (4, 5) if scored else (5,):
            writers.write(step, {"train/loss": 3.0})
        writers.write(4, {"eval/loss": 2.0, "eval/tokens": 8.0})
        writers.close()
    rows = [(row["step"], *row) for row in metrics.read_rows(tmp_path / "metrics.jsonl")]
    assert sorted(rows) == [
        (4, "step", "eval/loss", "eval/tokens"), (4, "step", "train/loss"), (5, "step", "train/loss"),
    ]  # fmt: skip
    found = sorted((step, tag) for tag, step, _ in events(tmp_path / "tensorboard"))
    assert found == [(4, "eval/loss"), (4, "eval/tokens"), (4, "train/loss"), (5, "train/loss")]


def test_events_tell_an_open_tensorboard_from_where_to_forget(tmp_path):
    tensorboard.TensorBoard(tmp_path, first_step=5).close()
    (path,) = tmp_path.iterdir()
    logs = [
        (event.step, event.session_log.status)
        for _, record in tensorboard.records(path.read_bytes())
        if (event := Event.FromString(record[12:-4])).HasField("session_log")
    ]
    assert logs == [(5, SessionLog.START)]


def test_two_event_files_within_a_second_do_not_overwrite_each_other(tmp_path):
    for step in (1, 2):
        board = tensorboard.TensorBoard(tmp_path, first_step=step)
        board.write(step, {"x": 1.0})
        board.close()
    assert [step for _, step, _ in events(tmp_path)] == [1, 2]


def test_a_torn_event_is_left_out(tmp_path):
    board = tensorboard.TensorBoard(tmp_path)
    board.write(1, {"x": 1.0})
    board.write(2, {"x": 1.0})
    board.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert [step for _, step, _ in events(tmp_path)] == [1]


def test_synced_rows_survive_a_kill(tmp_path):
    code = (
        "import sys, time; from lm import metrics\n"
        f"w = metrics.open_writers({str(tmp_path)!r}, resume_step=None, num_steps=9)\n"
        "w.write(1, {'train/loss': 1.0}); w.sync(); print('synced', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while "synced" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}]
    assert [step for _, step, _ in events(tmp_path / "tensorboard")] == [1]


ROW = {"train/loss": 2.34567, "tokens_per_second": 53211.0, "mfu": 0.412}


def test_a_log_file_gets_a_line_every_ten_seconds_and_the_last(tmp_path):
    now = [0.0]
    stream = io.StringIO()
    console = metrics.Console(first_step=0, num_steps=100, stream=stream, clock=lambda: now[0])
    for step in range(1, 101):
        console.write(step, ROW)
        now[0] += 1.0
    console.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{s}/100" for s in [*range(1, 100, 10), 100]]
    assert lines[5] == "step 51/100  loss 2.3457  53.2k tokens/s  MFU 41.2%  00:49 left"
    assert "left" not in lines[-1]
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("bar", [False, True])
def test_evaluations_get_a_line_of_their_own(bar):
    stream = io.StringIO()
    console = metrics.Console(first_step=40, num_steps=100, stream=stream, bar=bar)
    console.write(50, {"train/loss": 2.0, "mfu": math.nan})
    console.write(50, {"eval/loss": 1.23456, "eval_raw/loss": 1.5})
    console.say("a sample")
    console.close()
    lines = [line.strip() for line in stream.getvalue().replace("\r", "\n").splitlines()]
    assert "step 50  eval/loss 1.235  eval_raw/loss 1.5" in lines
    assert "a sample" in lines
    assert "nan" not in stream.getvalue()
    if bar:
        assert any("50/100" in line and "loss 2.0000" in line for line in lines)
        assert any("40/100" in line for line in lines)  # begins where the run resumes


def test_progress_without_a_peak_leaves_mfu_out():
    assert metrics._progress_words({"train/loss": 1.0}) == "loss 1.0000"


def test_reading_rows_does_not_import_torch():
    code = "import sys, lm.metrics; print({'torch', 'tensorboardX', 'jax'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_rows_cost_little(tmp_path):
    writers = open_quiet(tmp_path, resume_step=None)
    values = {f"train/{n}": 0.1 for n in range(10)}
    began = time.process_time()
    for step in range(200):
        writers.write(step, values)
    seconds = (time.process_time() - began) / 200
    writers.close()
    assert seconds < 5e-3  # measured 0.5 ms; a hundredth of a small model's step


def test_weights_and_biases_is_one_run_a_workdir(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"pip install"):
        monkeypatch.setitem(sys.modules, "wandb", None)
        open_quiet(tmp_path, resume_step=None, wandb_project="mine")

    calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    def init(**kwargs):
        calls.append(("init", (), kwargs))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_step in (None, 3):
        writers = open_quiet(
            tmp_path, resume_step=resume_step, wandb_project="mine", config={"seed": 1}
        )
        writers.write(4, {"train/loss": 1.0})
        writers.close()
    open_quiet(tmp_path / "a" / tmp_path.name, resume_step=None, wandb_project="mine").close()
    open_quiet(tmp_path / "b" / tmp_path.name, resume_step=None, wandb_project="mine").close()
    inits = [kwargs for name, _, kwargs in calls if name == "init"]
    assert inits[0]["id"] == inits[1]["id"]
    assert len({kwargs["id"] for kwargs in inits}) == 3, "folders of one name are runs of their own"
    assert inits[0]["config"] == {"seed": 1}
    assert ("log", ({"step": 4, "train/loss": 1.0},), {}) in calls
    assert calls[-1][0] == "finish"


@pytest.mark.parametrize(
    "line", ['{"train/loss": 3}', '{"step": null}', '{"step": "a"}', '{"step": 1e999}', "[1]"]
)
def test_a_row_without_a_step_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n' + line + "\n")
    with pytest.raises(
        ConfigError, match=r"metrics\.jsonl:2: not a JSON object with a step; delete"
    ):
        metrics.read_rows(path)
