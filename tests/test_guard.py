"""A bad step changes nothing, is skipped or undone; a run that is killed on the way is the same one."""

import os
import shutil
import signal
import types

import jax
import numpy as np
import pytest

from lm import guard, manifests, receipt, recorder, sharding, spikes, train
from lm.config import ConfigError
from lm.data import pipeline
from lm.exits import Diverged, Interrupted
from tests.test_train import arrays_of, assert_same_run, rows_of
from tools import verify

BAD = 3  # the step whose batch is bad, counted from 0


class Killed(Exception):
    """What a kill is to a run: nothing is saved on the way out."""


def killed_at(number, config, workdir):
    """Run until the batch of step `number` is asked for, and no further."""
    original = train.place_ahead

    def ahead(made, first, *rest):
        for now, batch in enumerate(original(made, first, *rest), start=first):
            if now == number:
                raise Killed
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "place_ahead", ahead)
        with pytest.raises(Killed):
            train.run(config, workdir)


def listed(workdir):
    """Return the steps that a run left out, and why."""
    found = receipt.read_json(workdir / "skipped.json")
    assert found.pop("identity") == receipt.read_json(workdir / "identity.json")["identity"]
    return found


def losses(workdir):
    return {row["step"]: row["train/loss"] for row in rows_of(workdir) if "train/loss" in row}


def skips(workdir):
    return {row["step"]: row["train/skipped"] for row in rows_of(workdir) if "train/skipped" in row}


@pytest.mark.parametrize("mode", ["skip", "rollback"])
def test_a_bad_step_keeps_its_number_without_an_update(tiny, tmp_path, poison, mode, capsys):
    config = tiny(train__on_bad_step=mode, optim__ema_decay=0.9)
    train.run(config, tmp_path / "good")
    poison(BAD)
    train.run(config, tmp_path / "bad")
    good, bad = losses(tmp_path / "good"), losses(tmp_path / "bad")
    assert set(good) == {1, 2, 3, 4, 5, 6} and set(bad) == {1, 2, 3, 5, 6}
    assert all(good[step] == bad[step] for step in (1, 2, 3)) and good[5] != bad[5]
    assert skips(tmp_path / "bad") == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1}
    rates = {
        name: [
            row["train/learning_rate"] for row in rows_of(tmp_path / name) if "train/loss" in row
        ]
        for name in ("good", "bad")
    }
    assert rates["bad"] == rates["good"][:5]  # that of the update that was made
    before, after = (
        arrays_of(tmp_path / "good", 2),
        arrays_of(tmp_path / "bad", 4),
    )
    assert before.keys() == after.keys() and int(after["step"]) == 4
    counts = [int(x) for name, x in after.items() if name.endswith("count")]
    assert counts and set(counts) == {
        3
    }  # of the optimizer: three updates, and none by the bad step
    for step, known in ((2, None), (4, [BAD]), (6, [BAD])):
        manifest = manifests.read(tmp_path / "bad" / "checkpoints", step)
        assert manifest.get("skipped") == (known and {str(BAD): "the loss is not finite"})
    assert listed(tmp_path / "bad") == {str(BAD): "the loss is not finite"}
    said = capsys.readouterr().out
    assert (
        f"step {BAD + 1} is skipped" in said
        or f"back to step 2, to go on without step {BAD + 1}" in said
    )


def test_skip_and_rollback_come_to_the_same_numbers(tiny, tmp_path, poison):
    """What lies between the checkpoint and the bad step is done again, the same."""
    poison(BAD, 5)  # the last step too
    for mode in ("skip", "rollback"):
        train.run(tiny(train__on_bad_step=mode), tmp_path / mode)
    assert_same_run(tmp_path / "skip", tmp_path / "rollback", 6)
    assert skips(tmp_path / "skip")[6] == 2 and 6 not in losses(tmp_path / "skip")


@pytest.mark.parametrize(
    ("mode", "at"),
    [
        ("skip", BAD + 1),
        ("rollback", BAD + 2),
        *(
            pytest.param(mode, at, marks=pytest.mark.slow)
            for mode, at in [("skip", BAD), ("skip", BAD + 2), ("rollback", BAD)]
        ),
    ],
)
def test_a_killed_run_leaves_out_the_same_steps(tiny, tmp_path, poison, mode, at):
    """Killed before the step, while it is not known to be bad yet, and after it was left out."""
    config = tiny(train__on_bad_step=mode, checkpoint__every_steps=0, eval__every_steps=0)
    poison(BAD)
    train.run(config, tmp_path / "whole")
    killed_at(at, config, tmp_path / "cut")
    train.run(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 6)


def test_what_was_left_out_stays_so_where_it_does_not_come_again(
    tiny, tmp_path, poison, monkeypatch
):
    """As of a fault of the hardware: the run that resumes knows the step from skipped.json alone."""
    config = tiny(train__on_bad_step="skip", checkpoint__every_steps=0, eval__every_steps=0)
    with monkeypatch.context() as patch:
        original = pipeline.Batches.__getitem__
        poison(BAD)
        train.run(config, tmp_path / "whole")
        killed_at(BAD + 2, config, tmp_path / "cut")
        patch.setattr(pipeline.Batches, "__getitem__", original)
        config.train.on_bad_step = "stop"
        train.run(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 6)


def test_fingerprints_of_a_run_with_skips_are_the_same_again(tiny, tmp_path, poison, capsys):
    """Those of the step after the bad one too, whose state is not yet known when its batch comes."""
    config = tiny(
        train__on_bad_step="skip", train__fingerprint_every_steps=1, checkpoint__every_steps=0,
        eval__every_steps=0,
    )  # fmt: skip
    poison(BAD)
    train.run(config, tmp_path / "whole")
    killed_at(BAD + 2, config, tmp_path / "cut")
    train.run(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 6)
    trails = [(tmp_path / name / "fingerprints.jsonl").read_text() for name in ("whole", "cut")]
    assert trails[0] == trails[1] and len(trails[0].splitlines()) == 6
    capsys.readouterr()
    assert verify.main([str(tmp_path / "whole"), "--steps=0:6"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("mode", ["skip", "rollback"])
def test_too_many_are_the_end(tiny, tmp_path, poison, mode):
    poison(2, 3, 4)
    config = tiny(train__on_bad_step=mode, train__max_skips=2)
    with pytest.raises(Diverged, match=r"step 5: .* 2 steps are left out already \(train\.max"):
        train.run(config, tmp_path)
    config.train.max_skips = 3
    train.run(config, tmp_path)
    assert skips(tmp_path)[6] == 3


def test_a_rollback_goes_to_no_step_that_is_still_to_come(tiny, tmp_path, poison, monkeypatch):
    """As a newer checkpoint that cannot be read, and stays where it is."""
    poison(BAD)
    real = manifests.good_steps
    newer = lambda folder: [*found, 99] if (found := real(folder)) else found  # noqa: E731
    monkeypatch.setattr(manifests, "good_steps", newer)
    train.run(tiny(train__on_bad_step="rollback", checkpoint__every_steps=1), tmp_path)
    assert skips(tmp_path)[6] == 1


def test_what_a_hang_leaves_is_saved_unless_this_run_has_saved_it(tiny, tmp_path, monkeypatch):
    """A checkpoint of that step may be there that cannot be read."""
    done, saved = types.SimpleNamespace(done={3}, folder=tmp_path), []
    kept = object.__new__(guard.Guard)
    kept._saver, kept._log = done, types.SimpleNamespace(catch_up=lambda: None, healthy=True)
    kept._made = types.SimpleNamespace(mesh=sharding.make_mesh(sharding.Config()))
    monkeypatch.setattr(guard.Guard, "_save", lambda self, now, *_, **how: saved.append(now))
    monkeypatch.setattr(manifests, "good_steps", lambda folder: [3, 4])
    for now in (3, 4):
        kept.rescue(now, None)
    assert saved == [4]


def test_a_rollback_leaves_out_as_many_batches_as_asked(tiny, tmp_path, poison, capsys):
    poison(4)
    config = tiny(
        train__on_bad_step="rollback", train__rollback_batches=2, checkpoint__every_steps=3
    )
    train.run(config, tmp_path)
    assert "back to step 3, to go on without steps 4 to 5" in capsys.readouterr().out
    assert set(losses(tmp_path)) == {1, 2, 3, 6}


def test_parameters_that_an_update_has_broken_are_rolled_back(tiny, tmp_path, monkeypatch):
    """The step that is seen to be bad is not the one that did it, and to skip it would not help."""
    original = train.experiment.jitted

    def jitted(made):
        init, train_step, *rest = original(made)

        def breaking(state, batch):
            number = int(state.step)
            state, sums = train_step(state, batch)
            if number == BAD:
                broken = jax.tree.map(lambda x: x * np.float32(np.inf), state.params)
                state = train.step.dataclasses.replace(state, params=broken)
            return state, sums

        return init, breaking, *rest

    monkeypatch.setattr(train.experiment, "jitted", jitted)
    with pytest.raises(Diverged, match="nor are the parameters before it"):
        train.run(tiny(train__on_bad_step="skip", checkpoint__every_steps=0), tmp_path / "skip")
    for every in (2, 0):  # found when it is saved, and by the next step
        workdir = tmp_path / f"{every}"
        train.run(tiny(train__on_bad_step="rollback", checkpoint__every_steps=every), workdir)
        assert list(listed(workdir)) == [str(BAD)]
        assert set(losses(workdir)) == {1, 2, 3, 5, 6}


def spike(monkeypatch, step):
    """Let the batch of a step ask for what never comes."""
    original = pipeline.Batches.__getitem__

    def batch(self, number):
        found = original(self, number)
        if number == step:
            found["targets"] = np.full_like(found["targets"], 200)
        return found

    monkeypatch.setattr(pipeline.Batches, "__getitem__", batch)


def test_spikes_are_told_by_a_running_zscore():
    """Against the mean and deviation of all values so far, as long as they are no more than remembered."""
    values = np.random.default_rng(0).normal(5, 0.1, 40).astype(np.float32)
    limit, running = spikes.Limit(4.0, "loss", 40), spikes.begin()
    for value in values:
        jump, zscore, running = spikes.look(running, value, limit)
        assert not jump and zscore == 0
    np.testing.assert_allclose(running["mean"], values.mean(), rtol=1e-5)
    np.testing.assert_allclose(running["variance"], values.var(), rtol=1e-4)
    jump, zscore, _ = spikes.look(running, np.float32(5.5), limit)
    assert jump
    np.testing.assert_allclose(zscore, (5.5 - values.mean()) / values.std(), rtol=1e-4)
    assert not spikes.look(running, np.float32(4.0), limit)[0]  # far below is no harm
    jump, zscore, same = spikes.look(running, np.float32(np.nan), limit)  # nothing was scored
    assert not jump and zscore == 0 and same == running


@pytest.mark.parametrize(
    ("mode", "metric"),
    [
        ("stop", "loss"),
        ("skip", "grad_norm"),
        pytest.param("skip", "loss", marks=pytest.mark.slow),
        pytest.param("rollback", "loss", marks=pytest.mark.slow),
    ],
)
def test_a_spike_is_a_bad_step(tiny, tmp_path, poison, monkeypatch, mode, metric):
    """Targets that never come are what a loss jumps at; killed and resumed it is the same run."""
    spike(monkeypatch, 7)
    config = tiny(
        train__num_steps=10, train__on_bad_step=mode, train__spike_zscore=3.0, train__spike_steps=5,
        train__spike_metric=metric, optim__peak_lr=2e-2, checkpoint__every_steps=6,
    )  # fmt: skip
    if mode == "stop":
        with pytest.raises(Diverged, match=rf"step 8: its {metric} of .* standard deviations"):
            train.run(config, tmp_path)
        config.train.on_bad_step = "skip"
        train.run(config, tmp_path)  # goes on from there
        assert list(skips(tmp_path)) == [7, 8, 9, 10]
        return
    train.run(config, tmp_path / "whole")
    assert skips(tmp_path / "whole")[10] == 1 and 8 not in losses(tmp_path / "whole")
    killed_at(9, config, tmp_path / "cut")
    train.run(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 10)
    assert int(arrays_of(tmp_path / "cut", 10)["spikes.seen"]) == 9


def test_spikes_can_be_looked_for_from_a_checkpoint_on(tiny, tmp_path):
    train.run(tiny(train__num_steps=4), tmp_path)
    train.run(tiny(train__spike_zscore=5.0), tmp_path)
    assert int(arrays_of(tmp_path, 6)["spikes.seen"]) == 2
    assert verify.main([str(tmp_path), "--steps=4:6"]) == 0


def test_a_spike_is_told_by_what_its_own_metric_was(tiny, tmp_path):
    train.run(tiny(train__num_steps=4, train__spike_zscore=99.0), tmp_path)
    train.run(tiny(train__spike_zscore=99.0, train__spike_metric="grad_norm"), tmp_path)
    assert int(arrays_of(tmp_path, 6)["spikes.seen"]) == 2


def test_groups_that_train_apart_skip_together(tiny, tmp_path, poison):
    from ml_collections import ConfigDict

    mesh = ConfigDict({"dcn": 2, "data": -1, "local_steps": 5})
    poison(BAD)
    options = {"train__spike_zscore": 50.0, "train__spike_steps": 2}
    train.run(tiny(mesh=mesh, train__on_bad_step="skip", **options), tmp_path)
    assert skips(tmp_path)[6] == 1 and set(losses(tmp_path)) == {1, 2, 3, 5, 6}
    arrays = arrays_of(tmp_path, 6)
    assert int(arrays["spikes.seen"]) == 5 and arrays["spikes.seen"].shape == ()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("on_bad_step", "ignore", "choose one of stop, skip, rollback"),
        ("spike_metric", "acc", "choose one of loss, grad_norm"),
        ("spike_zscore", -1.0, "use 0 or more"),
        ("spike_steps", 1, "use 2 or more"),
        ("rollback_batches", 0, "use a positive number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tiny, tmp_path, field, value, words):
    with pytest.raises(ConfigError, match=rf"train\.{field}={value}.*{words}"):
        train.run(tiny(**{f"train__{field}": value}), tmp_path)


def test_a_damaged_list_is_named(tiny, tmp_path):
    train.run(tiny(train__num_steps=2), tmp_path)
    path = tmp_path / "skipped.json"
    for text in ("{", '{"3": "why"}', '{"3": "why", "digest": "0"}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"skipped\.json: damaged"):
            train.run(tiny(), tmp_path)
    manifests.write_sealed(path, {"one": "why"})
    with pytest.raises(ConfigError, match=r"skipped\.json: damaged \('one' is no step"):
        train.run(tiny(), tmp_path)


def test_a_list_of_another_run_is_not_obeyed(tiny, tmp_path, poison):
    poison(BAD)
    skipping = {"train__on_bad_step": "skip", "train__num_steps": 5}
    train.run(tiny(**skipping), tmp_path / "one")
    train.run(tiny(**skipping, seed=1), tmp_path / "two")
    shutil.copy(tmp_path / "one" / "skipped.json", tmp_path / "two")
    with pytest.raises(ConfigError, match=r"skipped\.json: another run's; restore"):
        train.run(tiny(**skipping, seed=1), tmp_path / "two")


def test_one_digit_of_the_list_is_not_another_step(tiny, tmp_path, poison):
    poison(BAD)
    train.run(tiny(train__on_bad_step="skip", train__num_steps=5), tmp_path)
    path = tmp_path / "skipped.json"
    assert listed(tmp_path).keys() == {str(BAD)}
    path.write_text(path.read_text().replace(f'"{BAD}"', f'"{BAD ^ 4}"'))
    with pytest.raises(ConfigError, match=r"skipped\.json: damaged \(not what was written"):
        train.run(tiny(train__on_bad_step="skip"), tmp_path)


def test_a_stop_that_is_asked_for_outlives_a_rollback(tiny, tmp_path, poison, monkeypatch, capfd):
    """The signal comes while the bad step is recorded, just before the run begins again."""
    poison(BAD)
    write = recorder.write

    def slow(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*args, **options)

    monkeypatch.setattr(recorder, "write", slow)
    config = tiny(train__on_bad_step="rollback", train__recordings=1)
    with pytest.raises(Interrupted, match="is saved"):
        train.run(config, tmp_path / "run")
    assert capfd.readouterr().err.count("stopping after this step") == 1
    train.run(config, tmp_path / "run")
    assert set(losses(tmp_path / "run")) == {1, 2, 3, 5, 6}


def test_a_recording_that_fails_is_said_and_the_run_goes_on(
    tiny, tmp_path, poison, monkeypatch, capsys
):
    poison(BAD)

    def fails(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(recorder, "_gradient_norms", fails)
    train.run(tiny(train__on_bad_step="skip", train__recordings=1), tmp_path / "run")
    assert "could not be recorded: RESOURCE_EXHAUSTED" in capsys.readouterr().err
    assert skips(tmp_path / "run")[6] == 1


def test_another_config_does_not_leave_out_what_one_that_saved_nothing_did(
    tiny, tmp_path, poison, capsys
):
    poison(1, 2)
    config = tiny(train__on_bad_step="skip", train__max_skips=1, checkpoint__every_steps=0)
    with pytest.raises(Diverged):
        train.run(config, tmp_path)
    with pytest.raises(Diverged):  # the same one goes by its list
        train.run(config, tmp_path)
    assert skips(tmp_path)
    before = manifests.run_of(tmp_path / "checkpoints")
    config.train.z_loss, config.train.max_skips = 1e-3, 2
    train.run(config, tmp_path)
    assert "skipped.json is of another config, which saved nothing" in capsys.readouterr().out
    assert skips(tmp_path)[6] == 2 and (tmp_path / "skipped.json.aside0").exists()
    train.run(config, tmp_path / "fresh")
    fresh, now = (manifests.run_of(run / "checkpoints") for run in (tmp_path / "fresh", tmp_path))
    assert fresh == now != before
    assert_same_run(tmp_path / "fresh", tmp_path, 6)
