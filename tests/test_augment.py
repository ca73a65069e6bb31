"""Noise has the share that was asked for, touches nothing special, and is gone in evaluation."""

import types

import numpy as np
import pytest

from lm import augment, tasks
from lm.config import ConfigError
from lm.data import tokenizers
from lm.data.corpus import Split
from lm.data.pipeline import Batches

END, MASK, SIZE = 100, 99, 20_000
TOKENIZER = types.SimpleNamespace(vocab_size=101, end_of_text=END, specials={"mask": MASK})


def tokens():
    made = np.random.default_rng(0).integers(0, 99, SIZE).astype(np.int32)
    made[::50] = END
    return made


def noisy(given, *, row=0, epoch=0, seed=0, **shares):
    cfg = augment.SourceNoise(**shares)
    return augment.Augmenter(cfg, TOKENIZER, seed)(given, epoch, row)


def test_shares_are_kept_and_ends_of_text_stay():
    before = tokens()
    dropped = noisy(before, drop_tokens=0.2)
    assert abs((dropped == MASK).mean() - 0.2 * 0.98) < 0.01
    kept = dropped != MASK
    np.testing.assert_array_equal(dropped[kept], before[kept])
    replaced = noisy(before, replace_tokens=0.3)
    assert abs((replaced != before).mean() - 0.3 * 0.98 * 98 / 99) < 0.01
    assert not (replaced == MASK).any()
    swapped = noisy(before, swap_tokens=0.1)
    assert 0.12 < (swapped != before).mean() < 0.2
    assert sorted(swapped) == sorted(before)
    for after in (dropped, replaced, swapped):
        np.testing.assert_array_equal(after == END, before == END)


def test_spans_are_cut_out_and_the_rest_stays_in_order():
    before = np.arange(SIZE, dtype=np.int32) % 99
    after = noisy(before, delete_spans=0.15)
    assert 0.11 < 1 - len(after) / SIZE < 0.17
    steps = np.diff(after) % 99
    gaps = steps[steps > 1] - 1
    assert 2 < gaps.mean() < 4, "spans of three on average, some of which meet"
    assert len(noisy(before[:1], delete_spans=0.99)) == 1, "never all of a text"


def test_noise_is_a_function_of_seed_epoch_and_row():
    before = tokens()
    first = noisy(before, drop_tokens=0.2)
    np.testing.assert_array_equal(first, noisy(before, drop_tokens=0.2))
    for other in ({"row": 1}, {"epoch": 1}, {"seed": 1}):
        assert (first != noisy(before, drop_tokens=0.2, **other)).any()
    np.testing.assert_array_equal(before, tokens())  # what was given is not written to


def make(name, kind, **fields):
    setting = tasks.Setting(kind, TOKENIZER)
    return tasks.build(tasks.config_class(name)(**fields), setting)


def test_a_language_model_reads_noise_and_is_asked_for_the_text():
    stream = np.concatenate([[END], tokens()[1:], [END]]).astype(np.uint16)
    split = Split("train", stream, np.flatnonzero(stream == END)[:-1], 1)
    for packing in tasks.PACKINGS:
        plain = make("causal_lm", "causal", length=64, packing=packing)
        task = make("causal_lm", "causal", length=64, packing=packing, drop_tokens=0.3)
        rows, epochs = np.arange(9), np.zeros(9, np.int64)
        clean, trained = (
            plain.rows(split, rows, epochs=epochs),
            task.rows(split, rows, epochs=epochs),
        )
        assert (clean["inputs"] != trained["inputs"]).mean() > 0.1
        for name in ("targets", "segments", "positions", "weights"):
            np.testing.assert_array_equal(clean[name], trained[name])
        np.testing.assert_array_equal(task.rows(split, rows)["inputs"], clean["inputs"])


def test_streams_read_noise_too_another_each_time_around():
    stream = np.concatenate([[END], tokens()[1:], [END]]).astype(np.uint16)
    split = Split("train", stream, np.flatnonzero(stream == END)[:-1], 1)
    plain, noisy_rows = (
        Batches(
            [split],
            make("causal_lm", "causal", length=32, **noise),
            batch_size=2,
            seed=0,
            order="stream",
        )
        for noise in ({}, {"drop_tokens": 0.3})
    )
    around = int(plain.steps_per_epoch)
    first, again = noisy_rows[0]["inputs"], noisy_rows[around]["inputs"]
    np.testing.assert_array_equal(plain[0]["inputs"], plain[around]["inputs"])
    assert (first != plain[0]["inputs"]).mean() > 0.1 and (first != again).mean() > 0.1
    np.testing.assert_array_equal(noisy_rows[0]["targets"], plain[0]["targets"])


@pytest.mark.parametrize(("kind", "place"), [("source", "source"), ("causal", "inputs")])
def test_pairs_have_noisy_sources_in_training_alone(kind, place):
    texts = [np.arange(20), np.arange(30, 36)] * 4
    stream = np.concatenate([[END], *(np.append(text, END) for text in texts)]).astype(np.uint16)
    split = Split("train", stream, np.flatnonzero(stream == END)[:-1], 1, paired=True)
    sizes = {"source_length": 24, "length": 8}
    task = make("seq2seq", kind, **sizes, delete_spans=0.2, replace_tokens=0.2)
    clean = make("seq2seq", kind, **sizes).rows(split, np.arange(4))
    trained = task.rows(split, np.arange(4), epochs=np.zeros(4, np.int64))
    assert all((clean[place][row] != trained[place][row]).any() for row in range(4))
    for row in range(4):
        scored = clean["weights"][row] > 0, trained["weights"][row] > 0
        np.testing.assert_array_equal(
            clean["targets"][row][scored[0]], trained["targets"][row][scored[1]]
        )
    for name, values in task.rows(split, np.arange(4)).items():
        np.testing.assert_array_equal(values, clean[name])


@pytest.mark.parametrize("packing", ["best_fit", "split"])
def test_no_token_swaps_with_one_of_a_neighbour_in_its_row(packing):
    """A document that is longer than a row goes on beside another without an end of text between them."""
    texts = [np.full(10, 1), np.full(30, 2)]
    stream = np.concatenate([[END], *(np.append(text, END) for text in texts)]).astype(np.uint16)
    split = Split("train", stream, np.flatnonzero(stream == END)[:-1], 1)
    plain, task = (
        make("causal_lm", "causal", length=24, packing=packing, **noise)
        for noise in ({}, {"swap_tokens": 0.9})
    )
    rows = np.arange(plain.num_rows(split))
    clean, trained = (x.rows(split, rows, epochs=np.zeros_like(rows)) for x in (plain, task))
    assert (
        packing == "split" or ((clean["inputs"] == 1).any(1) & (clean["inputs"] == 2).any(1)).any()
    )
    np.testing.assert_array_equal(clean["inputs"], trained["inputs"])


NOISES = [
    {"drop_tokens": 0.3},
    {"replace_tokens": 0.3},
    {"swap_tokens": 0.3},
    {"delete_spans": 0.3},
]


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: next(iter(noise)))
@pytest.mark.parametrize(
    ("kind", "place"), [("masked", "inputs"), ("source", "source"), ("causal", "inputs")]
)
def test_classified_texts_are_noisy_in_training_alone_and_labels_never(kind, place, noise):
    byte, labels = tokenizers.Byte(), ("no", "yes")
    end = byte.end_of_text
    letters = np.arange(97, 121)
    texts = [
        x for number in range(8) for x in (letters + number % 3, byte.encode(labels[number % 2]))
    ]
    stream = np.concatenate([[end], *(np.append(text, end) for text in texts)]).astype(np.uint16)
    split = Split("train", stream, np.flatnonzero(stream == end)[:-1], 1, paired=True)
    setting, rows = tasks.Setting(kind, byte, labels), np.arange(8)
    plain, noisy_task = (
        tasks.build(tasks.config_class("classify")(length=40, label_length=5, **fields), setting)
        for fields in ({}, noise)
    )
    clean = plain.rows(split, rows)
    first, again, later = (
        noisy_task.rows(split, rows, epochs=np.full(8, epoch)) for epoch in (0, 0, 1)
    )
    assert (first[place] != clean[place]).any(axis=1).all()
    assert (first[place] != later[place]).any(axis=1).all()
    for name, values in noisy_task.rows(split, rows).items():
        np.testing.assert_array_equal(values, clean[name])
        np.testing.assert_array_equal(first[name], again[name])
    for row in rows:
        asked = [batch["targets"][row][batch["weights"][row] > 0] for batch in (clean, first)]
        np.testing.assert_array_equal(*asked)
        if kind == "masked":  # [CLS] and [SEP] stay
            ends = [
                batch["inputs"][row][batch["segments"][row] > 0][[0, -1]]
                for batch in (clean, first)
            ]
            np.testing.assert_array_equal(*ends)
        else:  # what is read of the label is the label
            known = [batch["inputs"][row][batch["weights"][row] > 0] for batch in (clean, first)]
            np.testing.assert_array_equal(*known)
        if "swap_tokens" in noise:
            np.testing.assert_array_equal(np.sort(first[place][row]), np.sort(clean[place][row]))
        if "delete_spans" in noise:
            sizes = [np.count_nonzero(batch[place][row]) for batch in (clean, first)]
            assert sizes[1] < sizes[0]


def test_shares_that_are_none_and_noise_without_pairs_are_refused():
    for share in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"task\.drop_tokens=.*use a share in \[0, 1\)"):
            tasks.config_class("causal_lm")(drop_tokens=share)
    split = Split("train", np.array([END, 1, 2, END], np.uint16), np.array([0]), 2)
    with pytest.raises(ConfigError, match="noise is for the sources of pairs"):
        make("seq2seq", "source", drop_tokens=0.1).num_rows(split)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_spans_take_out_the_share_that_is_asked_for(share):
    before = np.arange(20_000)
    left = [len(noisy(before, delete_spans=share, row=row)) for row in range(5)]
    assert 1 - np.mean(left) / len(before) == pytest.approx(share, abs=0.015)
