"""Proportions are exact at every step, whatever the hosts; every row of a corpus comes once an epoch."""

import dataclasses
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import tasks
from lm.config import ConfigError
from lm.data import corpus, mixture, pipeline
from lm.data.settings import Config
from lm.tasks import causal_lm

END = 90


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any), st.data())
@settings(deadline=None, max_examples=60)
def test_every_row_has_one_owner_and_each_its_share(weights, data):
    later = tuple(data.draw(st.permutations(weights)))
    made = mixture.Mixture(((0, tuple(weights)), (400, later)))
    owners, indices = made.locate(np.arange(1000))
    for number in range(len(weights)):
        mine = indices[owners == number]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))  # one after the other
    for rows in (0, 1, 13, 399, 400, 401, 1000):
        counts = np.bincount(owners[:rows], minlength=len(weights))
        np.testing.assert_array_equal(made.counts(rows), counts)
    share = np.arange(1, 401)[:, None] * np.array(weights) / sum(weights)
    so_far = np.cumsum(owners[:400, None] == np.arange(len(weights)), axis=0)
    assert np.abs(so_far - share).max() < 2.5
    for rows in range(sum(weights), 400, sum(weights)):
        np.testing.assert_array_equal(so_far[rows - 1], np.array(weights) * rows // sum(weights))


def test_rows_far_away_are_the_same_arithmetic():
    made = mixture.Mixture(((0, (3, 1 << 19, 77)),))
    far = np.array([10**12, 10**12 + 1, 10**12 + 2])
    owners, indices = made.locate(far)
    for place, owner, index in zip(far.tolist(), owners, indices, strict=True):
        assert made.counts(place)[owner] == index
        assert made.counts(place + 1)[owner] == index + 1
        assert made.counts(place).sum() == place


@pytest.mark.parametrize(
    ("weights", "temperature", "expected"),
    [
        ((0.7, 0.3), 1, (7, 3)),
        ((2.0, 4.0), 1, (1, 2)),
        ((1e9, 1.0), 1, (1 << 20, 1)),
        ((16.0, 1.0), 2, (4, 1)),
        ((5.0, 0.0), 1, (1, 0)),
    ],
)
def test_weights_become_the_smallest_integers(weights, temperature, expected):
    assert mixture.integers(weights, temperature) == expected


def test_a_weight_of_zero_is_the_size():
    made = mixture.make([0.0, 1.0], sizes=[3, 99], batch_size=2, stages=[(5, (0.0, 1.0))])
    assert made.stages == ((0, (3, 1)), (10, (0, 1)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weights": (0.0, 0.0), "sizes": (0, 0)}, "weights 0, 0 are no proportions"),
        ({"stages": [(5, (1.0,))]}, "1 weights from step 5 on, and data.mixture has 2"),
        ({"stages": [(5, (1.0, 2.0)), (5, (1.0, 1.0))]}, "step 5 does not come after 5"),
        ({"stages": [(0, (1.0, 2.0))]}, "step 0 does not come after 0"),
        ({"stages": [(3, (0.0, 0.0))]}, "no proportions"),
    ],
)
def test_what_is_no_mixture_is_named(fields, words):
    with pytest.raises(ConfigError, match=words):
        mixture.make(**{"weights": (1.0, 2.0), "sizes": (1, 1), "batch_size": 4} | fields)


def make_split(sizes, first):
    """Documents whose tokens tell split and place."""
    tokens = [END]
    for number, size in enumerate(sizes):
        tokens += [*((first + number + i) % END for i in range(size)), END]
    starts = np.cumsum([0, *(size + 1 for size in sizes)])[:-1]
    return corpus.Split("train", np.array(tokens, np.uint16), starts, sum(sizes))


sizes = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@given(
    corpora=st.lists(sizes, min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    packing=st.sampled_from(tasks.PACKINGS),
    steps=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    seed=st.integers(0, 9),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_any_hosts_at_any_step_see_the_one_sequence(corpora, weights, packing, steps, seed, data):
    """The global batch of a step is a function of (config, seed, step): hosts come and go at any step."""
    splits = [make_split(sizes, 7 * number) for number, sizes in enumerate(corpora)]
    setting = tasks.Setting("causal", types.SimpleNamespace(vocab_size=END + 1))
    task = causal_lm.Task(causal_lm.Config(length=16, packing=packing), setting)
    mixed = mixture.Mixture(((0, tuple(weights[: len(splits)])),)) if len(splits) > 1 else None

    def batches(index=0, count=1):
        return pipeline.Batches(
            splits,
            task,
            batch_size=24,
            seed=seed,
            order="shuffle",
            mixture=mixed,
            host_index=index,
            host_count=count,
        )

    for step in steps:
        whole = batches()[step]
        count = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
        parts = [batches(index, count)[step] for index in range(count)]
        assert whole.keys() == parts[0].keys()
        for name, values in whole.items():
            np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))


def test_each_corpus_is_read_once_an_epoch():
    splits = [make_split([5] * 30, 0), make_split([5] * 10, 0)]
    setting = tasks.Setting("causal", types.SimpleNamespace(vocab_size=END + 1))
    task = causal_lm.Task(causal_lm.Config(length=6, packing="pad"), setting)
    made = pipeline.Batches(
        splits, task, batch_size=4, seed=1, order="shuffle", mixture=mixture.Mixture(((0, (3, 1)),))
    )
    assert made.steps_per_epoch == 10
    seen = np.concatenate([np.stack(made.locate(np.arange(4) + 4 * step)) for step in range(20)], 1)
    orders = []
    for number, size in ((0, 30), (1, 10)):
        rows = seen[1, seen[0] == number]
        assert len(rows) == 2 * size
        first, second = rows[:size], rows[size:]
        assert sorted(first) == sorted(second) == list(range(size))
        assert (first != second).any()
        orders.append(first)
    assert (orders[0][orders[0] < 10] != orders[1]).any(), "each corpus has its own permutation"


def test_a_mixture_of_files_trains_one_tokenizer_and_scores_each(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "one.txt").write_text("a cat sat on the mat. " * 300)
    (tmp_path / "two.txt").write_text("ein Hund lief. " * 300)
    names = ((str(tmp_path / "one.txt"), 3.0), (str(tmp_path / "two.txt"), 1.0))
    cfg = Config(mixture=names, tokenizer="char")
    made = corpus.build(cfg)
    assert made.names == ("one", "two") and len(made.members) == 2
    assert {member.tokenizer.fingerprint for member in made.members} == {made.tokenizer.fingerprint}
    assert set("catmHundE.") - {"E"} <= set(made.tokenizer.characters)
    assert corpus.build(cfg).fingerprint == made.fingerprint
    swapped = corpus.build(dataclasses.replace(cfg, mixture=names[::-1]))
    assert swapped.fingerprint != made.fingerprint
    assert corpus.mixture_of(cfg, made).stages == ((0, (3, 1)),)
    assert "one: text" in made.summary() and "two: text" in made.summary()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixture": (("a.txt", 1.0),), "path": "b.txt"}, r"data\.path=b\.txt: data\.mixture"),
        ({"mixture_stages": ((1, (1.0,)),)}, r"data\.mixture_stages: used only with"),
        ({"mixture": (("a.txt", -1.0),)}, r"data\.mixture: a\.txt=-1\.0 is no weight"),
        ({"mixture_temperature": 0.0}, r"data\.mixture_temperature=0\.0: use a number from"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, words):
    with pytest.raises(ConfigError, match=words):
        Config(**fields)


def test_a_missing_corpus_and_a_name_given_twice(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    missing = Config(mixture=((str(tmp_path / "a.txt"), 1.0), (str(tmp_path / "b.txt"), 1.0)))
    with pytest.raises(ConfigError, match=r"b\.txt: no such file"):
        corpus.build(missing)
    twice = Config(mixture=((str(tmp_path / "a.txt"), 1.0), (str(tmp_path / "a.txt"), 1.0)))
    with pytest.raises(ConfigError, match="two corpora are called a"):
        corpus.build(twice)


def test_a_stage_without_a_weight_is_named():
    with pytest.raises(
        ConfigError, match=r"data\.mixture_stages: weights 0\.0, 0\.0 are no proportions"
    ):
        mixture.make([1, 2], stages=[(5, (0.0, 0.0))], sizes=[1, 1], batch_size=4)
