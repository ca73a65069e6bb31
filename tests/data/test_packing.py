"""Rows of a plan hold each place of the stream once, as a plain best-fit decreasing puts them together."""

import tracemalloc
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import tasks
from lm.data import packing
from lm.data.streams import Split
from lm.tasks import causal_lm

END = 50


def split_of(sizes):
    """Documents of the given sizes, of which none repeats another."""
    tokens = [END]
    for number, size in enumerate(sizes):
        tokens += [*((7 * number + np.arange(size)) % END).tolist(), END]
    starts = np.cumsum([0, *(size + 1 for size in sizes)])[:-1]
    return Split("train", np.array(tokens, np.uint16), starts.astype(np.int64), sum(sizes))


def naive(name, sizes, capacity, window):
    """Return the rows of the documents as lists of (begin, length): one piece after the other."""
    ends = np.cumsum([size + 1 for size in sizes]).tolist()
    documents = [(end - size - 1, end) for end, size in zip(ends, sizes, strict=True)]
    found = []
    for low in range(0, len(documents), window):
        pieces = [
            (at, min(capacity, end - at))
            for begin, end in documents[low : low + window]
            for at in range(begin, end, capacity)
        ]
        rows = [[piece] for piece in pieces] if name == "pad" else best_fit(pieces, capacity)
        found += sorted(sorted(row) for row in rows)
    return found


def best_fit(pieces, capacity):
    """Put each piece, the longest first, where the least room is left; of equal ones the first."""
    rows, rooms = [], []  # rooms: (room left, when it became so much, row)
    for time, (begin, length) in enumerate(sorted(pieces, key=lambda piece: -piece[1])):
        fitting = [room for room in rooms if room[0] >= length]
        room = min(fitting, default=(capacity, time, len(rows)))
        if fitting:
            rooms.remove(room)
        else:
            rows.append([])
        rows[room[2]].append((begin, length))
        rooms.append((room[0] - length, time, room[2]))
    return rows


@given(
    name=st.sampled_from(["best_fit", "pad"]),
    sizes=st.lists(st.integers(0, 40), max_size=40),
    capacity=st.integers(1, 24),
    window=st.sampled_from([1, 3, 1 << 20]),
)
@settings(deadline=None, max_examples=300)
def test_rows_are_those_of_a_plain_best_fit_decreasing(name, sizes, capacity, window):
    split = split_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_WINDOW", window)
        plan = packing.make(name, split.starts, split.num_inputs, capacity)
    rows = [plan.pieces(row) for row in range(plan.num_rows)]
    places = [at for row in rows for begin, size in row for at in range(begin, begin + size)]
    assert sorted(places) == list(range(split.num_inputs))
    assert all(0 < sum(size for _, size in row) <= capacity for row in rows)
    assert rows == naive(name, sizes, capacity, window)


@given(
    name=st.sampled_from(["best_fit", "pad"]),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    length=st.integers(1, 24),
    isolate=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_rows_ask_for_every_token_once_after_the_one_before_it(name, sizes, length, isolate):
    split = split_of(sizes)
    cfg = causal_lm.Config(length=length, packing=name, isolate_documents=isolate)
    setting = tasks.Setting("causal", types.SimpleNamespace(vocab_size=END + 1))
    task = causal_lm.Task(cfg, setting)
    batch = task.rows(split, np.arange(task.num_rows(split)))
    scored = batch["weights"] > 0
    np.testing.assert_array_equal(scored, batch["segments"] > 0)
    asked = sorted(zip(batch["inputs"][scored], batch["targets"][scored], strict=True))
    assert asked == sorted(zip(split.tokens[:-1], split.tokens[1:], strict=True))
    for row, pieces in enumerate(task.pieces(split, np.arange(len(scored)))):
        sizes_here = [size for _, size in pieces]
        parts = sizes_here if isolate else [sum(sizes_here)]
        segments = np.repeat(np.arange(len(parts)) + 1, parts)
        positions = np.concatenate([np.arange(size) for size in parts])
        np.testing.assert_array_equal(batch["segments"][row][scored[row]], segments)
        np.testing.assert_array_equal(batch["positions"][row][scored[row]], positions)
        places = np.concatenate([begin + np.arange(size) for begin, size in pieces])
        np.testing.assert_array_equal(batch["inputs"][row][scored[row]], split.tokens[places])
        np.testing.assert_array_equal(batch["targets"][row][scored[row]], split.tokens[places + 1])


def test_a_plan_is_kept_window_by_window(tmp_path, monkeypatch):
    """The same files as of the plan in memory, of which only windows ever are there."""
    monkeypatch.setattr(packing, "_WINDOW", 2000)
    starts = np.arange(0, 17 * 200_000, 17)
    splits = {"train": (starts, 17 * 200_000), "validation": (starts[:0], 0)}
    tracemalloc.start()
    lazy = {split: packing.windows("pad", *of, 8) for split, of in splits.items()}
    packing.save(tmp_path, "pad", 8, lazy, fingerprint="a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept, _ = packing.read(tmp_path, "pad", 8, fingerprint="a")
    size = 0
    for split, of in splits.items():
        for found, expected in zip(kept[split], packing.make("pad", *of, 8), strict=True):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype
            size += expected.nbytes
    assert peak < 2 << 20 < 8 << 20 < size


def test_so_is_a_best_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_WINDOW", 7)
    starts = np.cumsum(np.random.default_rng(0).integers(1, 30, 100))
    lazy = {name: packing.windows("best_fit", starts, 2000, 24) for name in ("train", "validation")}
    packing.save(tmp_path, "best_fit", 24, lazy, fingerprint="a")
    expected = packing.make("best_fit", starts, 2000, 24)
    for plan in packing.read(tmp_path, "best_fit", 24, fingerprint="a")[0].values():
        assert [plan.pieces(row) for row in range(plan.num_rows)] == [
            expected.pieces(row) for row in range(expected.num_rows)
        ]
