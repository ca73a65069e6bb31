"""Proportions are exact at every step, whatever the hosts; every row of a corpus comes once an epoch."""

import dataclasses
import json
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import tasks
from lm.config import ConfigError
from lm.data import corpus, mixture, pipeline, tokenizers
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


BYTE = tokenizers.Byte()
LABELS = ("no", "yes")


def make_split(sizes, first, *, end=END, paired=False):
    """Documents whose tokens tell split and place; of pairs the second is a label."""
    tokens, starts = [end], []
    for number, size in enumerate(sizes):
        starts.append(len(tokens) - 1)
        tokens += [*((first + number + i) % END for i in range(size)), end]
        if paired:
            starts.append(len(tokens) - 1)
            tokens += [*BYTE.encode(LABELS[number % 2]), end]
    return corpus.Split("train", np.array(tokens, np.uint16), np.array(starts), sum(sizes), paired)


def task_of(name, kind, **fields):
    cfg = tasks.config_class(name)(**fields)
    return tasks.build(cfg, tasks.Setting(kind, BYTE, LABELS))


NOISE = {"drop_tokens": 0.2, "replace_tokens": 0.1, "swap_tokens": 0.1}
PACKED = st.fixed_dictionaries(
    {"packing": st.sampled_from(tasks.PACKINGS), "isolate_documents": st.booleans()}
)
# Name, kind, fields and order: of a task, whether its data has pairs, and what it is not packed with.
CAUSAL = st.tuples(PACKED, st.sampled_from([{}, NOISE]))
CASES = st.one_of(
    CAUSAL.map(lambda two: ("causal_lm", "causal", {"length": 16, **two[0], **two[1]})),
    PACKED.map(lambda packed: ("masked_lm", "masked", {"length": 16, **packed})),
    PACKED.map(lambda packed: ("span_corruption", "source", {"source_length": 16, **packed})),
    st.sampled_from(
        [
            ("causal_lm", "causal", {"length": 16, "context": 5}),
            ("masked_lm", "masked", {"length": 16, "next_sentence": True}),
            ("masked_lm", "masked", {"length": 16, "dynamic": False, "whole_word": True}),
            ("seq2seq", "source", {"source_length": 9, "length": 7}),
            ("seq2seq", "causal", {"source_length": 9, "length": 7}),
            ("pairs", "source", {"source_length": 9, "length": 7, "delete_spans": 0.3, **NOISE}),
            ("classify", "masked", {"length": 9, "delete_spans": 0.3}),
            ("classify", "causal", {"length": 9, "label_length": 5}),
        ]
    ),
)
sizes = st.lists(st.integers(1, 30), min_size=1, max_size=20)
WEIGHTS = st.lists(st.integers(1, 9), min_size=4, max_size=4)


@given(
    corpora=st.lists(sizes, min_size=1, max_size=4),
    weights=WEIGHTS,
    stages=st.dictionaries(st.integers(1, 150), WEIGHTS, max_size=2),
    temperature=st.sampled_from([1.0, 2.0, 0.5]),
    case=CASES,
    order=st.sampled_from(["shuffle", "shuffle", "stream"]),
    once=st.booleans(),
    steps=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    seed=st.integers(0, 9),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_any_hosts_at_any_step_see_the_one_sequence(
    corpora, weights, stages, temperature, case, order, once, steps, seed, data
):
    """The global batch of a step is a function of (config, seed, step): hosts come and go at any step."""
    name, kind, fields = case
    paired = name in ("pairs", "classify")
    if order == "stream":  # one corpus from end to end, with enough rows for the streams
        name, kind, paired = "causal_lm", "causal", False
        fields, corpora = {"length": 16, **data.draw(st.sampled_from([{}, NOISE]))}, [[30] * 20]
    splits = [
        make_split(sizes, 7 * number, end=BYTE.end_of_text, paired=paired)
        for number, sizes in enumerate(corpora)
    ]
    size, mixed = len(splits), None
    if size > 1:
        mixed = mixture.make(
            weights[:size],
            stages=[(step, stages[step][:size]) for step in sorted(stages)],
            temperature=temperature,
            sizes=[split.num_inputs for split in splits],
            batch_size=24,
        )
    task = task_of("seq2seq" if name == "pairs" else name, kind, **fields)

    def batches(index=0, count=1):
        return pipeline.Batches(
            splits, task, batch_size=24, seed=seed, order=order, mixture=mixed, once=once,
            host_index=index, host_count=count,
        )  # fmt: skip

    for step in steps:
        whole = batches()[step]
        count = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
        parts = [batches(index, count)[step] for index in range(count)]
        assert whole.keys() == parts[0].keys()
        for key, values in whole.items():
            np.testing.assert_array_equal(values, np.concatenate([part[key] for part in parts]))


class Watched:
    """Tokens that keep which of their places are read, but for the next token of the last one."""

    def __init__(self, tokens, *, next_token):
        self.tokens, self.places, self._next = tokens, [], next_token

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, place):
        if isinstance(place, slice):
            self.places += range(len(self.tokens))[place][: -1 if self._next else None]
        return self.tokens[place]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        *(("causal_lm", "causal", {"length": 16, "packing": x}) for x in tasks.PACKINGS),
        *(("masked_lm", "masked", {"length": 16, "packing": x}) for x in tasks.PACKINGS),
        ("span_corruption", "source", {"source_length": 16}),
        ("seq2seq", "source", {"source_length": 31, "length": 7}),
        ("classify", "masked", {"length": 31}),
    ],
)
def test_hosts_read_what_no_other_reads(name, kind, fields, several, count):
    """In a step of one epoch; and all of them together what one alone reads."""
    task, paired = task_of(name, kind, **fields), name in ("seq2seq", "classify")

    def read_by(index, count, step):
        """Return the corpora and places that a host reads."""
        splits = []
        for number in range(2 if several else 1):
            split = make_split([13, 40, 5, 22] * 20, number, paired=paired)
            watched = Watched(split.tokens, next_token=name == "causal_lm")
            splits.append(dataclasses.replace(split, tokens=watched))
        made = pipeline.Batches(
            splits, task, batch_size=8, seed=1, order="shuffle",
            mixture=mixture.Mixture(((0, (1, 1)),)) if several else None,
            host_index=index, host_count=count,
        )  # fmt: skip
        assert not any(split.tokens.places for split in splits), "nothing is read before a step"
        made[step]
        return [(number, place) for number, x in enumerate(splits) for place in x.tokens.places]

    for step in (0, 3, 7):
        hosts = [read_by(index, count, step) for index in range(count)]
        together = [place for host in hosts for place in host]
        assert all(hosts) and len(together) == len(set(together))
        assert sorted(together) == sorted(read_by(0, 1, step))


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


def test_records_of_a_mixture_have_fields_too(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("a", "b"):
        lines = (json.dumps({"body": f"{name} {n}"}) for n in range(300))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    mixed = tuple((str(tmp_path / f"{name}.jsonl"), 1.0) for name in ("a", "b"))
    made = corpus.build(Config(mixture=mixed, field="body", tokenizer="byte"))
    counts = [len(s.starts) for m in made.members for s in (m.train, m.validation)]
    assert sum(counts) == 600
    with_text = corpus.build(
        Config(mixture=(*mixed, ("python_docs", 1.0)), field="body", tokenizer="byte")
    )
    assert sum(len(s.starts) for m in with_text.members for s in (m.train, m.validation)) > 700
    texts = Config(mixture=((str(tmp_path / "a.txt"), 1.0),), field="body", tokenizer="byte")
    with pytest.raises(ConfigError, match=r"data\.field=body: used only for JSON lines"):
        corpus.build(texts)


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
    with pytest.raises(ConfigError, match=r"data\.mixture: .*/a\.txt is named twice; name it once"):
        corpus.build(twice)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["text/a.jsonl.zst", "python_docs", "b/"], ["a", "python_docs", "b"]),
        (["web/*.jsonl", "books/*.jsonl", "c.txt"], ["web", "books", "c"]),
        (["web/part-*.jsonl"], ["web"]),
        (["mongodb://h/library.books", "mongodb://me@h/library.news?tls=true"], ["books", "news"]),
        (["mongodb://h/library.books", "mongodb://h/shop.books"], ["library", "shop"]),
        (["a/x.txt", "b/x.txt", "y.txt"], ["a", "b", "y"]),
        (["/data/a.txt", "/data/a.jsonl"], ["data_a.txt", "data_a.jsonl"]),
        (["one/x/a.txt", "two/x/a.txt"], ["one_x_a.txt", "two_x_a.txt"]),
        (["x/a.txt", "b/a.txt", "x.txt"], ["x_a.txt", "b", "x.txt"]),
        (["s3://bucket/*.jsonl", "https://h/c.txt?signed=secret"], ["bucket", "c"]),
        (["*.txt", "[ab].txt"], ["txt", "ab_.txt"]),
    ],
)
def test_corpora_are_called_by_the_shortest_names_that_tell_them_apart(paths, names):
    assert mixture.names(paths) == names


def test_globs_of_two_folders_are_mixed(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("web", "books"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"text of {name}")
    paths = [(f"{tmp_path}/{name}/*.txt", 1.0) for name in ("web", "books")]
    assert corpus.build(Config(mixture=tuple(paths), tokenizer="byte")).names == ("web", "books")


def test_a_stage_without_a_weight_is_named():
    with pytest.raises(
        ConfigError, match=r"data\.mixture_stages: weights 0\.0, 0\.0 are no proportions"
    ):
        mixture.make([1, 2], stages=[(5, (0.0, 0.0))], sizes=[1, 1], batch_size=4)
