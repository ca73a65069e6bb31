"""The trail names what differs, changes no number, and survives a resume whole."""

import json

import jax
import numpy as np
import pytest

from lm import experiment, initial, placement, sharding, trail, train
from tests.test_train import StopAfter, assert_same_run


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / trail.FILE).read_text().splitlines()]


def test_the_numbers_are_the_same_with_and_without(tiny, tmp_path):
    for every in (0, 1):
        train.run(tiny(train__fingerprint_every_steps=every), tmp_path / str(every))
    assert_same_run(tmp_path / "0", tmp_path / "1", 6)
    assert not (tmp_path / "0" / trail.FILE).exists()
    rows = rows_of(tmp_path / "1")
    assert [row["step"] for row in rows] == list(range(6))
    parts = {name.partition(".")[0] for name in rows[0]["fingerprints"]}
    assert parts >= {"batch", "params", "opt_state", "gradients"}


@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_resumed_run_appends_without_tearing_or_doubling(tiny, tmp_path, monkeypatch, stop_at):
    config = tiny(train__fingerprint_every_steps=1)
    train.run(config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        StopAfter(patched, stop_at)
        with pytest.raises(train.Interrupted):
            train.run(config, tmp_path / "cut")
    with open(tmp_path / "cut" / trail.FILE, "ab") as file:
        file.write(b'{"step": 99, "batch": "of a run that was killed la')
    train.run(config, tmp_path / "cut")
    assert (tmp_path / "cut" / trail.FILE).read_bytes() == (
        tmp_path / "whole" / trail.FILE
    ).read_bytes()


def test_one_bit_is_named(tiny):
    made = experiment.build(tiny())
    with sharding.use(made.mesh):
        init, *_ = experiment.jitted(made)
        state = initial.fresh_state(made, init)
        prints = trail.Fingerprints(made)
        batch = placement.place_batch(made.mesh, made.batches[0])
        before = prints.of_step(state, batch)
        flipped = np.array(batch["inputs"])
        flipped[3, 5] ^= 1
        other = {**batch, "inputs": jax.device_put(flipped, batch["inputs"].sharding)}
        after = prints.of_step(state, other)
    differ = {name for name in before if before[name] != after[name]}
    assert "batch.inputs" in differ and not any(name.startswith("params") for name in differ)
    assert any(name.startswith("gradients.") for name in differ)
    assert prints.of_state(state).items() <= before.items()
