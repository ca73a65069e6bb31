"""Rows by hand, every target once, documents apart."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import tasks
from lm.config import ConfigError
from lm.data.corpus import Split
from lm.tasks import causal_lm

END = 7


def make_split(documents):
    tokens = np.array([END, *(t for d in documents for t in (*d, END))], np.uint16)
    starts = np.flatnonzero(tokens == END)[:-1]
    return Split("train", tokens, starts, 0)


def make_task(**settings):
    tokenizer = types.SimpleNamespace(vocab_size=END + 1)
    return tasks.build(causal_lm.Config(**settings), tasks.Setting("causal", tokenizer))


def test_rows_by_hand():
    split = make_split([[1, 2], [3, 4, 5]])  # the stream: 7 1 2 7 3 4 5 7
    task = make_task(length=3, context=2)
    assert (task.row_length, task.max_scored, task.vocab_size) == (5, 3, END + 1)
    assert task.cfg.packed and tasks.kinds(task.cfg) == ("causal",)
    assert task.num_rows(split) == 3
    batch = task.rows(split, np.array([0, 1, 2, 3]))
    expected = {
        "inputs": [[7, 1, 2, 0, 0], [1, 2, 7, 3, 4], [3, 4, 5, 0, 0], [0, 0, 0, 0, 0]],
        "targets": [[1, 2, 7, 0, 0], [2, 7, 3, 4, 5], [4, 5, 7, 0, 0], [0, 0, 0, 0, 0]],
        "segments": [[1, 1, 1, 0, 0], [1, 1, 2, 2, 2], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]],
        "positions": [[0, 1, 2, 0, 0], [0, 1, 0, 1, 2], [0, 1, 2, 0, 0], [0, 0, 0, 0, 0]],
        "weights": [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]],
    }
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(batch[key], value, err_msg=key)
        assert batch[key].dtype == (np.float32 if key == "weights" else np.int32)


def test_rows_of_a_stream_by_hand():
    split = make_split([[1, 2], [3, 4, 5]])  # the stream: 7 1 2 7 3 4 5 7
    rows, starts = np.array([1, 1, 2]), np.array([0, 2, 2])
    apart = make_task(length=2).rows(split, rows, stream_starts=starts)
    np.testing.assert_array_equal(apart["positions"], [[2, 0], [0, 0], [1, 2]])
    np.testing.assert_array_equal(apart["segments"], [[1, 2], [1, 2], [1, 1]])
    joined = make_task(length=2, isolate_documents=False).rows(split, rows, stream_starts=starts)
    np.testing.assert_array_equal(joined["positions"], [[2, 3], [0, 1], [2, 3]])
    np.testing.assert_array_equal(joined["segments"], np.ones((3, 2)))


def test_documents_that_share_a_row_can_see_each_other_only_where_asked():
    task = make_task(length=8, isolate_documents=False)
    batch = task.rows(make_split([[1, 2], [3, 4]]), np.array([0]))
    assert not task.cfg.packed
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3, 4, 5, 0, 0]])


documents = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=9)


@given(documents=documents, length=st.integers(1, 12), context=st.integers(0, 15))
@settings(deadline=None, max_examples=150)
def test_an_epoch_scores_every_target_once_in_order(documents, length, context):
    split = make_split(documents)
    task = make_task(length=length, context=context)
    batch = task.rows(split, np.arange(task.num_rows(split)))
    scored = batch["weights"] > 0
    np.testing.assert_array_equal(batch["targets"][scored], split.tokens[1:])
    np.testing.assert_array_equal(batch["inputs"][scored], split.tokens[:-1])
    assert scored.sum(axis=1).max() <= task.max_scored
    assert not (scored & (batch["segments"] == 0)).any()
    # Padding is on the right alone, and a row holds all the context that the stream has.
    real = batch["segments"] > 0
    assert (np.diff(real.astype(int), axis=1) <= 0).all()
    before = np.minimum(np.arange(len(real)) * length, context)
    np.testing.assert_array_equal((real & ~scored).sum(axis=1), before)


@given(documents=documents, length=st.integers(1, 12), context=st.integers(0, 5))
@settings(deadline=None, max_examples=100)
def test_segments_and_positions_begin_with_each_document(documents, length, context):
    split = make_split(documents)
    task = make_task(length=length, context=context)
    batch = task.rows(split, np.arange(task.num_rows(split)))
    for inputs, segments, positions in zip(
        batch["inputs"], batch["segments"], batch["positions"], strict=True
    ):
        segment, position = 0, 0
        for i in range(int((segments > 0).sum())):
            if i == 0 or inputs[i] == END:
                segment, position = segment + 1, 0
            assert (segments[i], positions[i]) == (segment, position)
            position += 1


def test_the_last_row_is_exact_where_the_stream_divides():
    split = make_split([[1, 2, 3], [4, 5, 6]])  # 8 targets
    task = make_task(length=4)
    assert task.num_rows(split) == 2
    assert task.rows(split, np.array([0, 1]))["weights"].sum() == 8


def test_an_empty_split_has_no_rows():
    assert make_task(length=4).num_rows(make_split([])) == 0


@pytest.mark.parametrize(("name", "value"), [("length", 0), ("context", -1)])
def test_sizes_that_cannot_be_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"task\.{name}={value}: too small"):
        causal_lm.Config(**{name: value})


def test_the_folder_is_the_registry():
    assert tasks.config_class("causal_lm") is causal_lm.Config
    assert isinstance(make_task(), causal_lm.Task)
    with pytest.raises(
        ConfigError, match=r"task\.name=casual_lm: no such task; did you mean causal_lm\?"
    ):
        tasks.config_class("casual_lm")
