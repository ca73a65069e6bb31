"""The second place: what is good here is there, whole or not at all; and a run goes on from there."""

import itertools
import json
import os
import shutil
import signal
import threading
import time
import uuid
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import checkpoint, manifests, receipt, remote, signals, train
from lm.config import ConfigError
from lm.exits import Interrupted
from lm.metrics import read_rows, untimed


def state(value=0.0):
    return {"params": {"a": jnp.full((4, 2), float(value))}}


def abstract():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state())


@pytest.fixture(params=["folder", "file", "memory"])
def url(request, tmp_path):
    there = tmp_path / "there"
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    return str(there) if request.param == "folder" else f"file://{there}"


@pytest.fixture
def said():
    return []


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.01)


def begun(run):
    """Return a run's folder, with the files that no copy is made without."""
    run.mkdir(parents=True, exist_ok=True)
    for name in {"config.json", "data.json"} - {path.name for path in run.iterdir()}:
        (run / name).write_text("{}")
    return run


def save(run, url, steps, said, **fields):
    cfg = checkpoint.Config(keep=2, remote=url, **fields)
    begun(run)
    with checkpoint.Checkpointer(run, cfg, said.append) as saver:
        for step in steps:
            saver.save(step, state(step), {"eval/loss": 9.0 - step})
            saver.settle()
            while saver._remote.needed():  # one after the other
                time.sleep(0.01)


def resumed(run, url, said):
    with checkpoint.Checkpointer(run, checkpoint.Config(remote=url), said.append) as saver:
        saver.fetch()
        found = saver.restore_latest(abstract())
        return None if found is None else float(found["params"]["a"][0, 0])


def edit(url, name, change):
    """Change one file there; None deletes it."""
    fs, root = fsspec.core.url_to_fs(url)
    path = f"{root}/{name}"
    if change is None:
        fs.rm_file(path)
    else:
        fs.pipe_file(path, change(fs.cat_file(path)))


def a_file(run, step):
    return next(iter(manifests.read(run / "checkpoints", step)["files"]))


def test_every_good_checkpoint_is_there_and_comes_back(tmp_path, url, said):
    save(tmp_path / "run", url, [1, 2, 3], said)
    fs, root = fsspec.core.url_to_fs(url)
    assert sorted(path.rpartition("/")[2] for path in fs.ls(root, False)) == ["1", "2", "3"]
    assert manifests.good_steps(tmp_path / "run" / "checkpoints") == [2, 3]
    assert resumed(tmp_path / "other", url, said) == 3.0
    assert manifests.good_steps(tmp_path / "other" / "checkpoints") == [3]
    assert all(text.startswith("waiting for the copy") for text in said)


def test_every_so_many_steps_and_the_last(tmp_path, url, said):
    save(tmp_path / "run", url, [1, 2, 3], said, remote_every=2)
    with checkpoint.Checkpointer(
        tmp_path / "run", checkpoint.Config(remote=url, remote_every=2), said.append
    ) as saver:
        saver.save(5, state(5), {}, wait=True)
    assert remote.Remote(url, saver.folder, said.append).steps() == [2, 5]


def test_the_newest_good_of_both_is_taken(tmp_path, url, said, capsys):
    run = tmp_path / "run"
    save(run, url, [1, 2, 3], said)
    name = a_file(run, 3)
    (run / "checkpoints" / "3" / name).write_bytes(b"?")
    assert resumed(run, url, said) == 3.0
    told = capsys.readouterr().out.splitlines()
    assert f"file {name} is not what was written" in told[0] and "3.aside0" in told[0]
    assert told[1] == f"checkpoint 3 is taken from {url}"
    shutil.rmtree(run / "checkpoints" / "3")
    edit(url, f"3/{name}", lambda data: data + b"?")
    assert resumed(run, url, said) == 2.0, "newer than what is damaged there"
    assert f"checkpoint 3 of {url} is not used: file {name} is not" in capsys.readouterr().out
    edit(url, "3/manifest.json", None)
    assert resumed(run, url, said) == 2.0
    assert "no whole manifest.json" in capsys.readouterr().out
    assert not list((run / "checkpoints").glob("*.fetching"))


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda data: data.replace(b"1", b"2"), "is not what was written"), (None, "is missing")],
)
def test_damage_in_the_files_of_the_run_is_found(tmp_path, url, said, capsys, change, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "skipped.json").write_text('{"1": "why"}')
    save(tmp_path / "run", url, [1, 2], said)
    first = manifests.read(tmp_path / "run" / "checkpoints", 1)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    save(tmp_path / "run", url, [3], said)
    said.clear()
    edit(url, "3/run/metrics.jsonl", change)
    assert resumed(tmp_path / "rows", url, said) == 3.0, "rows are no reason"
    assert f"file run/metrics.jsonl of checkpoint 3 {words}; going on without it" in said[0]
    assert not (tmp_path / "rows" / "metrics.jsonl").exists()
    edit(url, "3/manifest.json", None)
    edit(url, "2/run/skipped.json", change)
    assert resumed(tmp_path / "other", url, said) == 1.0
    assert f"checkpoint 2 of {url} is not used: file run/skipped.json {words}" in (
        capsys.readouterr().out
    )
    assert not list((tmp_path / "other").glob("*.partial"))
    assert (tmp_path / "other" / "skipped.json").read_text() == '{"1": "why"}'
    own = manifests.read(tmp_path / "other" / "checkpoints", 1)
    assert own == first and "run" not in own


def test_a_copy_that_arrives_wrong_is_made_again(tmp_path, url, said, monkeypatch):
    original, left = remote.Remote._sync, [1]

    def wrong(self, there):
        if left and "/state/" in there:
            left.pop()
            self._fs.pipe_file(there, b"?")
        original(self, there)

    monkeypatch.setattr(remote.Remote, "_sync", wrong)
    save(tmp_path / "run", url, [1], said)
    assert len(said) == 1 and "did not arrive whole; trying again" in said[0]
    assert resumed(tmp_path / "other", url, said) == 1.0


def test_a_remote_that_fails_never_stops_the_run(tmp_path, said, monkeypatch):
    def fails(*args):
        raise RuntimeError("503 slow down\nand more")

    monkeypatch.setattr(remote.Remote, "_put", fails)
    cfg = checkpoint.Config(remote=f"memory://{uuid.uuid4().hex}")
    with checkpoint.Checkpointer(tmp_path, cfg, said.append) as saver:
        saver.save(1, state(1), {}, wait=True)
        while not said:
            time.sleep(0.01)
        saver.save(2, state(2), {}, wait=True)
    assert manifests.good_steps(tmp_path / "checkpoints") == [1, 2]
    assert all("503 slow down" in text for text in said if "is not copied" in text)
    assert said[-1].endswith("given up")


def test_one_that_cannot_be_read_is_an_error_only_where_there_is_nothing_here(
    tmp_path, said, monkeypatch, capsys
):
    url = f"memory://{uuid.uuid4().hex}"
    save(tmp_path / "run", url, [1], said)

    def fails(*args, **kwargs):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "info", fails)
    assert resumed(tmp_path / "run", url, said) == 1.0
    assert "no route to host; going on with checkpoint 1 here" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"no route to host.*checkpoint\.remote=''"):
        resumed(tmp_path / "other", url, said)


@pytest.mark.parametrize("name", ["there", "there/1/manifest.json"])
def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, said, name):
    """As one without rights, or a server that does not answer: here a link that leads to itself."""
    save(tmp_path / "run", str(tmp_path / "there"), [1], said)
    (tmp_path / name).rename(tmp_path / "kept")
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(ConfigError, match=r"Too many levels.*checkpoint\.remote=''"):
        resumed(tmp_path / "other", str(tmp_path / "there"), said)
    (tmp_path / name).unlink()
    (tmp_path / "kept").rename(tmp_path / name)
    assert resumed(tmp_path / "other", str(tmp_path / "there"), said) == 1.0


@pytest.mark.parametrize("where", [".", "checkpoints", "checkpoints/copies"])
def test_the_run_s_own_folder_is_no_second_place(tmp_path, where):
    cfg = checkpoint.Config(remote=str(tmp_path / "run" / where))
    with pytest.raises(ConfigError, match=r"checkpoint\.remote=.*: in the run's own folder"):
        checkpoint.Checkpointer(tmp_path / "run", cfg)


def test_where_no_thread_can_start_the_run_goes_on_and_copies_later(tmp_path, said, without_thread):
    without_thread("Remote._work")
    save(tmp_path / "run", str(tmp_path / "there"), [1, 2], said)
    assert "checkpoint 1 is not copied" in said[0] and "can't start new thread" in said[0]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["2"]


def test_an_end_wakes_who_waits_to_try_again(tmp_path, said, monkeypatch):
    fails = itertools.chain([True], itertools.repeat(False))

    def put(self, *args, real=remote.Remote._put):
        if next(fails):
            raise OSError("503")
        real(self, *args)

    monkeypatch.setattr(remote, "WAIT", 60)
    monkeypatch.setattr(remote.Remote, "_put", put)
    began, url = time.monotonic(), str(tmp_path / "there")
    cfg = checkpoint.Config(remote=url)
    with checkpoint.Checkpointer(begun(tmp_path / "run"), cfg, said.append) as saver:
        saver.save(1, state(1), {}, wait=True)
        while not said:
            time.sleep(0.01)
    assert (tmp_path / "there" / "1" / "manifest.json").is_file()
    assert time.monotonic() - began < 30


def test_a_stop_before_training_waits_for_no_copy(tmp_path, said, monkeypatch):
    save(tmp_path / "run", str(tmp_path / "other"), [1], said)
    freed = threading.Event()
    monkeypatch.setattr(remote.Remote, "_put", lambda *_: freed.wait())
    began = time.monotonic()
    cfg = checkpoint.Config(remote=str(tmp_path / "there"))
    with (
        pytest.raises(KeyboardInterrupt),
        checkpoint.Checkpointer(tmp_path / "run", cfg, said.append) as saver,
    ):
        saver.copy(1)
        raise KeyboardInterrupt
    freed.set()
    assert time.monotonic() - began < 30 and "checkpoint 1 is not copied" in said[-1]


def test_the_same_step_again_is_copied_only_where_it_differs(tmp_path, url, said):
    save(tmp_path / "run", url, [1], said)
    before = fsspec.core.url_to_fs(url)[0].cat_file
    root = fsspec.core.url_to_fs(url)[1]
    first = before(f"{root}/1/manifest.json")
    save(tmp_path / "run", url, [1], said)
    assert before(f"{root}/1/manifest.json") == first
    with checkpoint.Checkpointer(
        tmp_path / "run", checkpoint.Config(remote=url), said.append
    ) as saver:
        saver.save(1, state(7), {}, wait=True)
    assert resumed(tmp_path / "other", url, said) == 7.0


def test_what_is_copied_is_not_deleted_meanwhile(tmp_path, said, monkeypatch):
    url, held = f"memory://{uuid.uuid4().hex}", []
    original = remote.Remote._upload

    def slow(self, step):
        while step == 1 and not held:
            time.sleep(0.01)
        original(self, step)

    monkeypatch.setattr(remote.Remote, "_upload", slow)
    cfg = checkpoint.Config(keep=1, keep_best=False, remote=url)
    with checkpoint.Checkpointer(begun(tmp_path), cfg, said.append) as saver:
        for step in (1, 2, 3):
            saver.save(step, state(step), {}, wait=True)
        assert manifests.good_steps(saver.folder) == [1, 3], "1 is on its way"
        held.append(True)
    assert "checkpoint 2 is not copied" in said[0] and "3 is newer" in said[0]
    assert remote.Remote(url, saver.folder, said.append).steps() == [1, 3]


def test_a_last_copy_that_hangs_is_given_up_in_time(tmp_path, said, monkeypatch):
    freed = threading.Event()
    monkeypatch.setattr(remote.Remote, "_put", lambda *_: freed.wait())
    cfg = checkpoint.Config(remote=f"memory://{uuid.uuid4().hex}", timeout_seconds=0.5)
    began = time.monotonic()
    with checkpoint.Checkpointer(tmp_path, cfg, said.append) as saver:
        saver.save(1, state(1), {}, wait=True)
    freed.set()
    assert 0.5 <= time.monotonic() - began < 30
    assert manifests.good_steps(tmp_path / "checkpoints") == [1]
    assert "checkpoint 1 is not copied" in said[-1] and "timeout_seconds" in said[-1]


def test_a_stop_waits_for_a_copy_no_longer_than_its_grace(tiny, tmp_path, monkeypatch, capfd):
    url, freed = f"memory://{uuid.uuid4().hex}", threading.Event()
    put, stopped = remote.Remote._put, []

    def hangs(self, *args):
        # A copy that another test gave up may still be under way.
        if self.url == url and not stopped:
            stopped.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            freed.wait()
        put(self, *args)

    monkeypatch.setattr(remote.Remote, "_put", hangs)
    monkeypatch.setattr(signals.Stop, "until", lambda self, seconds: self.since + seconds - 197)
    config = tiny(
        train__num_steps=100_000, eval__every_steps=0, checkpoint__grace_seconds=200.0,
        checkpoint__remote=url,
    )  # fmt: skip
    with pytest.raises(Interrupted):
        train.run(config, tmp_path)
    took = time.monotonic() - stopped[0]
    freed.set()
    assert 3 < took < 30
    assert "is not copied" in (said := capfd.readouterr().err) and "grace_seconds" in said


def test_a_place_that_is_no_folder_is_refused_at_the_start(tiny, tmp_path):
    place = tmp_path / "file"
    place.write_text("not a folder")
    with pytest.raises(ConfigError, match=r"checkpoint\.remote=\S+: it is no folder"):
        train.run(tiny(checkpoint__remote=str(place)), tmp_path / "run")


def test_an_address_of_nothing_is_a_line():
    with pytest.raises(ConfigError, match=r"checkpoint\.remote=nosuch://x"):
        remote.Remote("nosuch://x", None, print)


def test_a_run_whose_folder_is_lost_goes_on_to_the_same_end(tiny, tmp_path):
    """Rows, too: those of before the checkpoint come from there."""

    def rows(workdir):
        found = read_rows(workdir / "metrics.jsonl")
        return [untimed(row) for row in found]

    url = str(tmp_path / "there")
    train.run(tiny(), tmp_path / "whole")
    train.run(tiny(checkpoint__remote=url), tmp_path / "run")
    shutil.rmtree(tmp_path / "there" / "6")
    train.run(tiny(checkpoint__remote=url), tmp_path / "again")
    assert rows(tmp_path / "again") == rows(tmp_path / "whole")
    last = [
        json.loads((tmp_path / name / "checkpoints" / "6" / "manifest.json").read_text())["arrays"]
        for name in ("again", "whole")
    ]
    assert last[0] == last[1]
    firsts = [found["first_step"] for found in receipt.read_all(tmp_path / "again")]
    assert firsts[0] == 0 and len(firsts) == 2, "what the run began with is known"
    with pytest.raises(ConfigError, match="seed 0 -> 1"):
        train.run(tiny(checkpoint__remote=url, seed=1), tmp_path / "third")
    assert np.array_equal(rows(tmp_path / "run"), rows(tmp_path / "whole"))


def test_what_cannot_be_brought_here_is_no_damage_and_nothing_begins_anew(
    tiny, tmp_path, monkeypatch, capsys
):
    url = str(tmp_path / "there")
    train.run(tiny(checkpoint__remote=url), tmp_path / "run")
    calls = []

    def fails(self, *args):
        calls.append(args)
        raise PermissionError("403 Forbidden")

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.implementations.local.LocalFileSystem, "get_file", fails)
        with pytest.raises(ConfigError, match=r"checkpoint 6 of .* cannot be brought here: 403"):
            train.run(tiny(checkpoint__remote=url), tmp_path / "other")
    assert len(calls) == remote.TRIES
    assert not (tmp_path / "other" / "metrics.jsonl").exists()
    train.run(tiny(checkpoint__remote=url), tmp_path / "other")
    assert f"checkpoint 6 is taken from {url}" in capsys.readouterr().out


def test_a_damaged_copy_is_made_again_with_the_same_step(tmp_path, url, said):
    save(tmp_path / "run", url, [1], said)
    edit(url, f"1/{a_file(tmp_path / 'run', 1)}", lambda data: bytes(len(data)))
    save(tmp_path / "again", url, [1], said)
    assert resumed(tmp_path / "other", url, said) == 1.0
    assert all(text.startswith("waiting for the copy") for text in said)


def test_a_run_of_other_settings_does_not_take_the_place_of_another(tiny, tmp_path):
    """Nor where it is tried again: the checkpoint has come by then."""
    url, another = str(tmp_path / "there"), str(tmp_path / "another")
    train.run(tiny(checkpoint__remote=url), tmp_path / "run")
    words = rf"came from {url}, which holds a run of another config: optim\.peak_lr .*; set these back, or"
    for place in (url, another):
        with pytest.raises(ConfigError, match=words):
            train.run(tiny(checkpoint__remote=place, optim__peak_lr=0.05), tmp_path / "other")
    with pytest.raises(ConfigError, match=rf"came from {url}, .*: seed 0 -> 1; set"):
        train.run(tiny(checkpoint__remote=url, seed=1), tmp_path / "other")
    # As it says: either of both.
    train.run(tiny(checkpoint__remote=another, optim__peak_lr=0.05), tmp_path / "new")
    train.run(tiny(checkpoint__remote=url), tmp_path / "other")


def test_what_is_older_here_gives_way_to_the_rows_of_what_comes(tiny, tmp_path):
    """A machine that was taken away comes back after another one has gone on."""
    url = str(tmp_path / "there")
    with pytest.MonkeyPatch.context() as patch:
        original = train.place_ahead

        def three(made, first, *rest):
            yield from itertools.islice(original(made, first, *rest), 3 - first)
            raise InterruptedError

        patch.setattr(train, "place_ahead", three)
        with pytest.raises(InterruptedError):
            train.run(tiny(checkpoint__remote=url), tmp_path / "first")
    train.run(tiny(checkpoint__remote=url), tmp_path / "second")
    train.run(tiny(checkpoint__remote=url), tmp_path / "first")
    steps = [
        [row["step"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "train/loss" in row]
        for name in ("first", "second")
    ]
    assert steps[0] == steps[1] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "first" / "metrics.jsonl.aside0").exists()


def test_a_run_with_a_past_of_its_own_does_not_take_the_place_of_another(tiny, tmp_path):
    url = str(tmp_path / "there")
    train.run(tiny(checkpoint__remote=url), tmp_path / "long")
    train.run(tiny(optim__peak_lr=0.05, train__num_steps=2), tmp_path / "own")
    before = {path: path.read_bytes() for path in (tmp_path / "own").glob("*.json*")}
    copies = {path: path.read_bytes() for path in Path(url).rglob("*") if path.is_file()}
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"another run.s; give this run a place"):
            train.run(tiny(checkpoint__remote=url, optim__peak_lr=0.05), tmp_path / "own")
    assert {path: path.read_bytes() for path in (tmp_path / "own").glob("*.json*")} == before
    train.run(tiny(optim__peak_lr=0.05, train__num_steps=2), tmp_path / "own")
    assert {path: path.read_bytes() for path in Path(url).rglob("*") if path.is_file()} == copies


def test_a_copy_of_another_run_is_not_replaced(tiny, tmp_path, monkeypatch):
    """Nor where the place could not be looked at when the run began."""
    url = str(tmp_path / "there")
    train.run(tiny(checkpoint__remote=url), tmp_path / "one")
    copies = {path: path.read_bytes() for path in Path(url).rglob("*") if path.is_file()}
    monkeypatch.setattr(remote, "WAIT", 0.01)
    said: list = []
    train.run(tiny(seed=1), tmp_path / "two")
    other = remote.Remote(url, tmp_path / "two" / "checkpoints", said.append)
    other.copy(6)
    other.close()
    assert {path: path.read_bytes() for path in Path(url).rglob("*") if path.is_file()} == copies
    assert said and all("is another run's" in line for line in said if "not copied" in line)


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_no_copy_is_made_without_what_a_run_goes_on_by(tmp_path, said, name):
    (begun(tmp_path / "run") / name).unlink()
    url = str(tmp_path / "there")
    with checkpoint.Checkpointer(
        tmp_path / "run", checkpoint.Config(remote=url), said.append
    ) as saver:
        saver.save(1, state(1), {}, wait=True)
        while not said:
            time.sleep(0.01)
    assert f"{name} is missing, and a copy is none without it" in said[0]
    assert not (tmp_path / "there" / "1" / "manifest.json").exists()


def test_a_place_whose_name_is_a_pattern_loses_nothing_of_others(tmp_path, said):
    url = f"memory://{uuid.uuid4().hex}/run"
    save(tmp_path / "one", f"{url}1", [1], said)
    save(tmp_path / "two", f"{url}[12]", [1], said)
    name = a_file(tmp_path / "two", 1)
    edit(f"{url}[12]", f"1/{name}", lambda data: b"?")  # so it is copied anew
    save(tmp_path / "two", f"{url}[12]", [1], said)
    assert resumed(tmp_path / "again", f"{url}1", said) == 1.0


def test_a_link_to_a_place_that_is_not_there_is_not_an_empty_place(tmp_path, said):
    (tmp_path / "there").symlink_to(tmp_path / "disk")
    with pytest.raises(ConfigError, match=r"a link to a folder that is not there; mount its disk"):
        resumed(tmp_path / "run", str(tmp_path / "there"), said)


def test_what_keeps_its_place_here_is_not_brought_from_there(tmp_path, said, monkeypatch, capsys):
    run, url = tmp_path / "run", str(tmp_path / "there")
    save(run, url, [1, 2], said)
    (run / "checkpoints" / "2" / a_file(run, 2)).write_bytes(b"?")

    def fails(path, name=""):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "move_aside", fails)
        with checkpoint.Checkpointer(run, checkpoint.Config(remote=url), said.append) as saver:
            saver.fetch()
    told = capsys.readouterr().out
    assert "checkpoint 2 is not used" in told and "it stays where it is" in told
    assert "cannot be brought" not in told and "is taken from" not in told


def test_a_stop_that_comes_during_the_last_copy_ends_it(tmp_path, said, monkeypatch):
    """Within what is left of the grace period, not of checkpoint.timeout_seconds."""
    monkeypatch.setattr(remote.Remote, "_put", lambda *_: time.sleep(60))
    monkeypatch.setattr(remote, "AT_LEAST", 0.05)
    began, asked = time.monotonic(), []
    threading.Timer(0.5, lambda: asked.append(time.monotonic())).start()
    cfg = checkpoint.Config(remote=str(tmp_path / "there"))
    until = lambda: asked[0] + 0.5 if asked else float("inf")  # noqa: E731
    run = begun(tmp_path / "run")
    with checkpoint.Checkpointer(run, cfg, said.append, until=until) as saver:
        saver.save(1, state(1), {}, wait=True)
    assert 1.0 < time.monotonic() - began < 20
    assert "of a stop, the rest of checkpoint.grace_seconds); given up" in said[-1]
