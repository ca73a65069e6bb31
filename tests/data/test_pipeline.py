"""The batch of step s is a pure function of (seed, s), the same rows on any count of hosts."""

import types
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import tasks
from lm.config import ConfigError
from lm.data import corpus, pipeline, shuffle, tokenizers
from lm.data.settings import Config
from lm.tasks import causal_lm

END = 99


def make_split(sizes, name="train"):
    """Documents of the given sizes whose tokens count up, so that a place shows in its value."""
    pieces = [np.array([END])]
    for size in sizes:
        pieces += [np.arange(size) % 90, np.array([END])]
    starts = np.cumsum([0, *(size + 1 for size in sizes)])[:-1]
    tokens = np.concatenate(pieces).astype(np.uint16)
    return corpus.Split(name, tokens, starts, sum(sizes))


def make_task(**settings):
    cfg = causal_lm.Config(**{"length": 4, **settings})
    return causal_lm.Task(cfg, tasks.Setting("causal", SimpleNamespace(vocab_size=1000)))


def batches(split, task, **settings):
    settings = {"batch_size": 4, "seed": 0, "order": "shuffle", **settings}
    return pipeline.Batches([split], task, **settings)


def row_indices(made, steps):
    """Return which rows of the stream the batches of these steps hold."""
    seen = []
    task = types.SimpleNamespace(
        num_rows=made.task.num_rows,
        row_length=made.task.row_length,
        max_scored=made.task.max_scored,
        rows=lambda split, indices, **rest: seen.append(indices.copy()),
    )
    made.task = task
    for step in steps:
        made[step]
    return np.array(seen)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_permute_is_a_bijection(size, seed, epoch):
    places = np.arange(size)
    assert sorted(shuffle.permute(places, size, seed=seed, epoch=epoch)) == places.tolist()


def test_permute_of_a_part_is_a_part_of_permute():
    size = 3 * 10**12
    places = np.array([0, 5, size - 1])
    together = shuffle.permute(places, size, seed=1, epoch=2)
    alone = [shuffle.permute(places[i : i + 1], size, seed=1, epoch=2)[0] for i in range(3)]
    assert together.tolist() == alone
    assert together.max() < size


def test_permute_is_as_even_as_chance():
    size, epochs = 7, 2000
    rows = [shuffle.permute(np.arange(size), size, seed=3, epoch=e) for e in range(epochs)]
    counts = np.stack([np.bincount(column, minlength=size) for column in np.array(rows).T])
    expected = epochs / size
    # Chi-squared with 36 degrees of freedom: 36 on average, above 80 once in thirty thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 80
    # Neighbours do not stay neighbours.
    far = shuffle.permute(np.arange(10**5), 10**5, seed=3, epoch=0)
    assert abs(np.corrcoef(far[:-1], far[1:])[0, 1]) < 0.02


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_every_epoch_reads_every_row_once_in_an_order_of_its_own(rows, batch_size, seed):
    made = batches(make_split([rows * 4 - 1]), make_task(), batch_size=batch_size, seed=seed)
    assert made.num_rows == rows
    assert made.steps_per_epoch == rows / batch_size
    order = row_indices(made, range(-(-3 * rows // batch_size))).ravel()
    epochs = order[: 3 * rows].reshape(3, rows)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(rows), (3, 1)))
    if rows > 20:
        assert not (epochs[0] == epochs[1]).all()


def test_seeds_give_other_orders():
    split, task = make_split([999]), make_task()
    orders = [row_indices(batches(split, task, seed=seed), range(9)) for seed in (0, 1)]
    assert (orders[0] != orders[1]).mean() > 0.9


@pytest.mark.parametrize("order", ["shuffle", "stream"])
@pytest.mark.parametrize("host_count", [1, 2, 4])
def test_the_hosts_hold_the_global_batch_between_them(order, host_count):
    split, task = make_split([50, 3, 200, 9, 41]), make_task()
    whole = batches(split, task, batch_size=8, order=order)
    hosts = [
        batches(split, task, batch_size=8, order=order, host_index=i, host_count=host_count)
        for i in range(host_count)
    ]
    for step in (0, 3, 11, 10**9):
        parts = [host[step] for host in hosts]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert_same(joined, whole[step])


def test_a_step_is_the_same_whenever_it_is_asked_for():
    split, task = make_split([50, 3, 200]), make_task(context=2)
    one, two = batches(split, task), batches(split, task)
    one[0], one[7]
    assert_same(one[5], two[5])


@pytest.mark.parametrize("isolate", [True, False])
def test_streams_are_contiguous_and_positions_go_on(isolate):
    split, task = make_split([5, 30, 2, 9, 60, 11]), make_task(isolate_documents=isolate)
    made = batches(split, task, batch_size=3, order="stream")
    window = made.num_rows // 3
    assert made.steps_per_epoch == window
    read = [made[step] for step in range(window)]
    for b in range(3):
        first = b * window * 4
        inputs = np.concatenate([batch["inputs"][b] for batch in read])
        np.testing.assert_array_equal(inputs, split.tokens[first : first + len(inputs)])
        expected, position = [], -1
        for token in inputs:
            position = 0 if isolate and token == END else position + 1
            expected.append(position)
        positions = np.concatenate([batch["positions"][b] for batch in read])
        np.testing.assert_array_equal(positions, expected)
    assert_same(made[window], made[0])  # and again from the beginning


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 30))
def test_epochs_are_counted_in_batches_exactly(rows, batch_size, epochs):
    task = SimpleNamespace(num_rows=lambda split: rows)
    made = pipeline.Batches([None], task, batch_size=batch_size, seed=0, order="shuffle")
    steps = made.steps_in(epochs)
    assert (steps - 1) * batch_size < epochs * rows <= steps * batch_size


def test_the_last_batch_of_an_epoch_is_filled_up_from_the_next():
    made = batches(make_split([100 * 4 - 1]), make_task(), batch_size=32)
    assert made.num_rows == 100 and made.steps_in(1) == 4
    rows, epochs = made.locate(np.arange(3 * 32, 4 * 32))[1:]
    np.testing.assert_array_equal(epochs, [0] * 4 + [1] * 28)
    np.testing.assert_array_equal(made.locate(np.arange(100, 128))[1], rows[4:])
    np.testing.assert_array_equal(row_indices(made, [3]).ravel(), rows)
    first = row_indices(made, range(3)).ravel().tolist()
    assert sorted([*first, *rows[:4]]) == list(range(100))


def test_streams_refuse_what_they_cannot_do():
    split = make_split([50])
    with pytest.raises(ConfigError, match=r"task\.context=2: data\.order=stream"):
        batches(split, make_task(context=2), order="stream")
    with pytest.raises(ConfigError, match=r"data\.batch_size=99: more streams than the 13 rows"):
        batches(split, make_task(), order="stream", batch_size=99)
    with pytest.raises(ConfigError, match=r"task\.context=2: eval\.streams=2"):
        pipeline.EvalBatches(split, make_task(context=2), batch_size=1, streams=2)


def test_sizes_that_do_not_divide_and_empty_splits_are_refused():
    split, task = make_split([50]), make_task()
    with pytest.raises(ConfigError, match=r"data\.batch_size=4: does not divide over 3 hosts"):
        batches(split, task, host_count=3)
    with pytest.raises(ConfigError, match=r"eval\.batch_size=4: does not divide over 3 hosts"):
        pipeline.EvalBatches(split, task, batch_size=4, host_count=3)
    with pytest.raises(ConfigError, match=r"eval\.streams=2: does not divide over 3 hosts"):
        pipeline.EvalBatches(split, task, batch_size=3, streams=2, host_count=3)
    with pytest.raises(ConfigError, match="the validation split is empty"):
        batches(make_split([], name="validation"), task)
    with pytest.raises(ConfigError, match="the validation split is empty"):
        pipeline.EvalBatches(make_split([], name="validation"), task, batch_size=1)


def scored(evaluation):
    """Return the scored targets of all batches, and check what padding looks like."""
    targets = []
    for batch in evaluation:
        padding = batch["segments"] == 0
        for key in ("inputs", "targets", "positions", "weights"):
            assert not batch[key][padding].any()
        targets.append(batch["targets"][batch["weights"] > 0])
    return np.concatenate(targets)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_evaluation_scores_the_same_tokens_for_every_batch_size(batch_size, context):
    split, task = make_split([5, 30, 2, 9, 60, 12]), make_task(context=context)
    evaluation = pipeline.EvalBatches(split, task, batch_size=batch_size)
    assert all(batch["inputs"].shape == (batch_size, 4 + context) for batch in evaluation)
    np.testing.assert_array_equal(scored(evaluation), split.tokens[1:])
    # What fills the last batch holds nothing, not even context.
    rows = [row for batch in evaluation for row in batch["segments"].any(axis=1)]
    assert rows == [True] * 31 + [False] * (len(rows) - 31)


@pytest.mark.parametrize("streams", [1, 2, 5, 31, 40])
@pytest.mark.parametrize("max_tokens", [0, 50])
def test_evaluation_in_streams_scores_the_same_tokens_in_contiguous_rows(streams, max_tokens):
    split, task = make_split([5, 30, 2, 9, 60, 12]), make_task()
    plain = pipeline.EvalBatches(split, task, batch_size=1, max_tokens=max_tokens)
    evaluation = pipeline.EvalBatches(
        split, task, batch_size=7, max_tokens=max_tokens, streams=streams
    )
    assert np.bincount(scored(evaluation)).tolist() == np.bincount(scored(plain)).tolist()
    by_stream = [
        np.concatenate([batch["targets"][b][batch["weights"][b] > 0] for batch in evaluation])
        for b in range(streams)
    ]
    np.testing.assert_array_equal(np.concatenate(by_stream), scored(plain))
    assert evaluation[0]["positions"][:, 0].max() == 0


def test_a_limit_takes_a_fixed_prefix_of_whole_rows():
    split, task = make_split([5, 30, 2, 9, 60, 12]), make_task()
    for batch_size in (1, 2, 64):
        evaluation = pipeline.EvalBatches(split, task, batch_size=batch_size, max_tokens=10)
        np.testing.assert_array_equal(scored(evaluation), split.tokens[1:13])
    assert len(pipeline.EvalBatches(split, task, batch_size=2, max_tokens=10)) == 2
    assert len(pipeline.EvalBatches(split, task, batch_size=2, max_tokens=10**9)) == 16


@pytest.mark.parametrize("streams", [0, 4])
def test_hosts_hold_the_evaluation_between_them(streams):
    split, task = make_split([5, 30, 2, 9, 60, 12]), make_task()
    options = {"batch_size": 8, "streams": streams}
    whole = pipeline.EvalBatches(split, task, **options)
    hosts = [
        pipeline.EvalBatches(split, task, **options, host_index=i, host_count=4) for i in range(4)
    ]
    for index, batch in enumerate(whole):
        parts = [host[index] for host in hosts]
        assert_same({k: np.concatenate([p[k] for p in parts]) for k in batch}, batch)
    assert {len(host) for host in hosts} == {len(whole)}


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_prefetch_yields_the_batches_of_its_steps_in_order(threads):
    made = batches(make_split([300]), make_task())
    read = list(pipeline.prefetch(made, 5, 12, threads=threads, buffer=2))
    assert [step for step, _ in read] == list(range(5, 12))
    for step, batch in read:
        assert_same(batch, made[step])
    assert list(pipeline.prefetch(made, 5, 5, threads=threads, buffer=2)) == []


def test_prefetch_passes_an_error_on():
    class Broken:
        def __getitem__(self, step):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(pipeline.prefetch(Broken(), 0, 9, threads=2, buffer=2))


def test_a_batch_is_described_by_its_documents_weights_and_text():
    tokenizer = tokenizers.Byte()
    end = tokenizer.end_of_text
    tokens = np.array([end, *b"abc", end, *b"de\n", end])
    split = corpus.Split("train", tokens, np.array([0, 4]), 0)
    batch = make_task(length=5, context=2).rows(split, np.array([1, 0]))
    assert pipeline.describe_batch(batch, tokenizer, rows=2).splitlines() == [
        "row 0: 5 tokens of 2 documents, 3 scored, 2 padding",
        "  0-0: document 1, position 0, weight 0",
        "    inputs  'c'",
        "    targets '' <end of text> ''",
        "  1-1: document 2, position 0, weight 0",
        "    inputs  '' <end of text> ''",
        "    targets 'd'",
        "  2-4: document 2, position 1, weight 1",
        "    inputs  'de\\n'",
        "    targets 'e\\n' <end of text> ''",
        "row 1: 5 tokens of 2 documents, 5 scored, 2 padding",
        "  0-3: document 1, position 0, weight 1",
        "    inputs  '' <end of text> 'abc'",
        "    targets 'abc' <end of text> ''",
        "  4-4: document 2, position 0, weight 1",
        "    inputs  '' <end of text> ''",
        "    targets 'd'",
    ]


def test_paths_are_split_at_commas_and_a_suffix_allows_the_field():
    cfg = Config(path="a.jsonl, b.jsonl.gz", field="body")
    assert cfg.path == ("a.jsonl", "b.jsonl.gz")
    assert Config(source="jsonl", path=("a.txt",), field="body").field == "body"


def test_a_comma_in_a_files_name_is_no_end_of_it(tmp_path):
    path = tmp_path / "a,b.txt"
    path.write_text("text")
    assert Config(path=str(path)).path == Config(path=(str(path),)).path == (str(path),)
    assert Config(path=(str(path), "c,d")).path == (str(path), "c", "d")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "web"}, r"data\.source=web"),
        ({"path": ("a.txt",), "field": "body"}, r"data\.field=body: used only for JSON lines"),
        ({"on_invalid": "drop"}, r"data\.on_invalid=drop: not an option; use replace or refuse"),
        ({"tokenizer": "letters"}, r"data\.tokenizer=letters"),
        ({"sentencepiece_model": "char"}, r"data\.sentencepiece_model=char"),
        ({"order": "random"}, r"data\.order=random"),
        ({"validation_fraction": -0.1}, r"data\.validation_fraction=-0\.1"),
        ({"validation_fraction": float("nan")}, r"data\.validation_fraction=nan"),
        ({"batch_size": 0}, r"data\.batch_size=0: too small; use 1 or more"),
        ({"vocab_size": 0}, r"data\.vocab_size=0"),
        ({"prefetch_threads": -1}, r"data\.prefetch_threads=-1"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        Config(**values)
