"""Where a task keeps the documents of a row apart, a document's words change nothing for its neighbours."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import models, tasks
from lm.data import tokenizers
from lm.data.streams import Split

BYTE = tokenizers.Byte()
END = BYTE.end_of_text
TINY = {
    "gpt": {"num_layers": 2, "model_dim": 32, "num_heads": 2},
    "bert": {"num_layers": 2, "model_dim": 32, "num_heads": 2},
    "t5": {"num_layers": 2, "model_dim": 32, "num_heads": 2},
    "linear_rnn": {"num_layers": 2, "model_dim": 32, "num_heads": 2, "chunk": 4},
    "rnn": {"num_layers": 1, "model_dim": 32},
    "seq2seq": {"num_layers": 1, "model_dim": 32},
}
CASES = [
    ("causal_lm", "gpt", {"length": 24}),
    ("causal_lm", "linear_rnn", {"length": 24}),
    ("causal_lm", "rnn", {"length": 24}),
    ("masked_lm", "bert", {"length": 26, "mask_rate": 0.3}),
    ("span_corruption", "t5", {"source_length": 25, "corruption_rate": 0.4}),
    ("span_corruption", "seq2seq", {"source_length": 25, "corruption_rate": 0.4}),
]


def split_of(sizes, changed=()):
    """Documents of letters that say which one it is; those of `changed` have other words."""
    tokens = [END]
    for number, size in enumerate(sizes):
        first = 97 + number % 13 + (13 if number in changed else 0)
        tokens += [*([first] * size), END]
    starts = np.cumsum([0, *(size + 1 for size in sizes)])[:-1]
    return Split("train", np.array(tokens, np.uint16), starts.astype(np.int64), sum(sizes))


def make(name, family, fields):
    kind = tasks.kind_for(
        tasks.kinds(tasks.config_class(name)()), models.family(family).Model.accepts
    )
    return tasks.build(tasks.config_class(name)(**fields), tasks.Setting(kind, BYTE))


def logits_of(task, family, batch):
    cfg = models.resolve(
        models.config_class(family)(**TINY[family]),
        vocab_size=task.vocab_size,
        max_length=task.row_length,
        max_source_length=task.source_length,
        packed=task.cfg.packed,
    )
    model = models.build(cfg)

    def both(module, batch):
        return module.logits(module(batch))

    params = nn.unbox(model.init(jax.random.key(0), batch, method=both))
    return np.asarray(jax.jit(lambda p, b: model.apply(p, b, method=both))(params, batch))


def rows_before_and_after(task, sizes, changed):
    """Return the rows of two texts that differ in one document, and which positions are of the others."""
    before, after = (split_of(sizes, here) for here in ((), (changed,)))
    assert task.num_rows(before) == 1
    batches = [task.rows(split, np.array([0])) for split in (before, after)]
    ours = batches[0]["segments"][0] == changed + 1
    others = (batches[0]["segments"][0] > 0) & ~ours
    return batches, ours, others


@pytest.mark.parametrize(("name", "family", "fields"), CASES)
@pytest.mark.parametrize("packing", ["best_fit", "split"])
def test_a_neighbours_words_change_no_logit(name, family, fields, packing):
    task = make(name, family, {**fields, "packing": packing, "isolate_documents": True})
    batches, ours, others = rows_before_and_after(task, [5, 9, 6], 1)
    assert ours.any() and others.any()
    one, two = (logits_of(task, family, batch)[0] for batch in batches)
    np.testing.assert_array_equal(one[others], two[others])
    assert (one[ours] != two[ours]).any()


@pytest.mark.parametrize(("name", "family", "fields"), CASES[::5] + CASES[3:5])
def test_without_it_they_read_each_other(name, family, fields):
    """So that the test above would see it."""
    task = make(name, family, {**fields, "packing": "best_fit", "isolate_documents": False})
    together = [task.rows(split_of([5, 9, 6], here), np.array([0])) for here in ((), (1,))]
    assert set(together[0]["segments"][0]) <= {0, 1}
    one, two = (logits_of(task, family, batch)[0] for batch in together)
    last = np.flatnonzero(together[0]["segments"][0])[-1]
    assert (one[last] != two[last]).any()


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=25),
    packing=st.sampled_from(tasks.PACKINGS),
    source_length=st.integers(8, 50),
    rate=st.sampled_from([0.15, 0.4, 0.5]),
    mean_span=st.sampled_from([2.0, 3.0, 8.0]),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=200)
def test_documents_cut_apart_are_whole_again(sizes, packing, source_length, rate, mean_span, epoch):
    fields = {"corruption_rate": rate, "mean_span": mean_span, "packing": packing}
    task = make(
        "span_corruption",
        "t5",
        {"source_length": source_length, "isolate_documents": True, **fields},
    )
    split = split_of(sizes)
    rows = np.arange(task.num_rows(split))
    batch = task.rows(split, rows, epochs=np.full(len(rows), epoch))
    for row, pieces in enumerate(task.pieces(split, rows)):
        texts = [split.tokens[begin : begin + size] for begin, size in pieces]
        if not batch["segments"][row].any():
            assert not batch["source_segments"][row].any()
            continue
        text = np.concatenate(texts).tolist()
        rebuilt = []
        for number in range(1, batch["source_segments"][row].max() + 1):
            rebuilt += [*document(task, batch, row, number), END]
        assert rebuilt == text + ([] if text[-1] == END else [END])
    assert (batch["weights"] > 0).sum(axis=1).max(initial=0) <= task.max_scored


def document(task, batch, row, number):
    """Return a document of a row with its spans put back, and check how its parts stand."""
    read = batch["source_segments"][row] == number
    asked = batch["segments"][row] == number
    for here, places in ((read, "source_positions"), (asked, "positions")):
        np.testing.assert_array_equal(batch[places][row][here], np.arange(here.sum()))
    source, target = batch["source"][row][read].tolist(), batch["targets"][row][asked].tolist()
    assert source.pop() == END
    if target:
        assert batch["inputs"][row][asked].tolist() == [END, *target[:-1]]
        assert target.pop() == END
    spans = {}
    for token in target:
        if token in task.sentinels:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == task.sentinels[: len(spans)].tolist() and all(spans.values())
    return [token for mark in source for token in spans.get(mark, [mark])]


def test_as_much_is_cut_from_documents_apart_as_from_one_text():
    split = split_of([30] * 200)
    fields = {"source_length": 128, "packing": "best_fit"}
    shares = []
    for isolate in (False, True):
        task = make("span_corruption", "t5", {**fields, "isolate_documents": isolate})
        rows = np.arange(task.num_rows(split))
        batch = task.rows(split, rows, epochs=rows)
        cut = (batch["weights"] > 0) & (batch["targets"] < END)
        shares.append(cut.sum() / split.num_inputs)
    assert shares[1] == pytest.approx(shares[0], rel=0.1)


def test_the_defaults_are_the_papers():
    """Language models keep documents apart; BERT and T5 as published do not."""
    found = {
        name: field.default
        for name in ("causal_lm", "masked_lm", "span_corruption")
        for field in dataclasses.fields(tasks.config_class(name))
        if field.name == "isolate_documents"
    }
    assert found == {"causal_lm": True, "masked_lm": False, "span_corruption": False}
