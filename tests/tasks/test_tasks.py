"""What every task promises, tried on every file of the folder."""

import pkgutil
import re
import types

import numpy as np
import pytest

from lm import tasks
from lm.config import ConfigError
from lm.data import tokenizers
from lm.data.corpus import Split

BYTE = tokenizers.Byte()
END = BYTE.end_of_text
PAIRS = [("one little cat", "yes"), ("a", "no"), ("dogs " * 30, "yes"), ("the end", "maybe")]


def paired_split(tokenizer=BYTE):
    texts = [text for pair in PAIRS for text in pair]
    return stream(texts, tokenizer=tokenizer, paired=True)


def stream(texts, *, tokenizer=BYTE, paired=False):
    rows = [np.append(tokenizer.encode(text), END) for text in texts]
    tokens = np.concatenate([[END], *rows]).astype(np.uint16)
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    return Split("train", tokens, starts, sum(map(len, texts)), paired)


def plain_split():
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat"]
    return stream([" ".join(rng.choice(words, 40)) for _ in range(5)])


NAMES = sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))
CASES = [(name, kind) for name in NAMES for kind in tasks.kinds(tasks.config_class(name)())]


def make(name, kind, *, seed=0, **fields):
    labels = tuple(sorted({label for _, label in PAIRS}))
    setting = tasks.Setting(kind, BYTE, labels, seed)
    return tasks.build(tasks.config_class(name)(**fields), setting)


def split_for(name):
    return paired_split() if name == "classify" else plain_split()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_batch_has_the_contracts_arrays(name, kind):
    task, split = make(name, kind), split_for(name)
    rows = task.num_rows(split)
    batch = task.rows(split, np.array([0, rows - 1, rows, 0]))
    widths = dict.fromkeys(
        ("inputs", "targets", "segments", "positions", "weights"), task.row_length
    )
    if kind == "source":
        source = ("source", "source_segments", "source_positions")
        widths |= dict.fromkeys(source, task.source_length)
    assert {key: array.shape for key, array in batch.items()} == {
        key: (4, width) for key, width in widths.items()
    }
    for key, array in batch.items():
        assert array.dtype == (np.float32 if key == "weights" else np.int32), key
        assert not array[2].any(), f"{key}: a row past the end is empty"
        np.testing.assert_array_equal(array[0], array[3], err_msg=key)
        if not key.endswith(("weights",)):
            assert array.min() >= 0 and array.max() < max(task.vocab_size, task.row_length), key
    assert batch["weights"][0].sum() > 0
    assert (batch["weights"] > 0).sum(axis=1).max() <= task.max_scored
    assert not batch["weights"][batch["segments"] == 0].any(), "padding is never scored"
    padding = batch["segments"] == 0
    assert (np.diff(padding.astype(int), axis=1) >= 0).all(), "padding is on the right"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rows_are_a_function_of_their_arguments(name, kind):
    """One by one or at once, in any order, twice: the same."""
    task, split = make(name, kind), split_for(name)
    indices = np.arange(task.num_rows(split))
    epochs = indices % 3
    whole = task.rows(split, indices, epochs=epochs)
    for index in indices:
        alone = make(name, kind).rows(
            split, indices[index : index + 1], epochs=epochs[index : index + 1]
        )
        for key, array in alone.items():
            np.testing.assert_array_equal(array[0], whole[key][index], err_msg=key)


def test_masks_change_with_the_epoch_and_the_seed_only_where_asked():
    split, rows = plain_split(), np.zeros(1, np.int64)

    def inputs(epoch, **fields):
        return make("masked_lm", "masked", **fields).rows(split, rows, epochs=np.array([epoch]))[
            "inputs"
        ]

    assert (inputs(0) != inputs(1)).any() and (inputs(0) != inputs(0, seed=1)).any()
    np.testing.assert_array_equal(inputs(0, dynamic=False), inputs(1, dynamic=False))
    evaluated = make("masked_lm", "masked").rows(split, rows)["inputs"]
    np.testing.assert_array_equal(evaluated, inputs(0))


def test_masked_rows():
    split, task = plain_split(), make("masked_lm", "masked", length=64)
    indices = np.arange(task.num_rows(split))
    counts = {"mask": 0, "other": 0, "same": 0}
    for epoch in range(60):
        batch = task.rows(split, indices, epochs=np.full(len(indices), epoch))
        scored = batch["weights"] > 0
        assert (batch["inputs"] == batch["targets"])[~scored].all()
        assert (batch["inputs"][:, 0] == task.ids["cls"]).all() and not scored[:, 0].any()
        assert not scored[batch["targets"] == END].any(), "an end of text is never masked"
        assert (scored[:-1].sum(axis=1) == round(0.15 * 62)).mean() > 0.5
        inputs, targets = batch["inputs"][scored], batch["targets"][scored]
        counts["mask"] += (inputs == task.ids["mask"]).sum()
        counts["same"] += (inputs == targets).sum()
        counts["other"] += ((inputs != targets) & (inputs != task.ids["mask"])).sum()
    total = sum(counts.values())
    shares = {name: count / total for name, count in counts.items()}
    assert abs(shares["mask"] - 0.8) < 0.02 and abs(shares["other"] - 0.1) < 0.02
    sizes = (batch["segments"] > 0).sum(axis=1)
    assert (batch["targets"][indices, sizes - 1] == task.ids["sep"]).all()
    text = np.concatenate(
        [row[1 : size - 1] for row, size in zip(batch["targets"], sizes, strict=True)]
    )
    np.testing.assert_array_equal(text, split.tokens[1:], "every token is in a row once")


def test_whole_words_are_masked_whole():
    split, task = (
        plain_split(),
        make("masked_lm", "masked", length=64, whole_word=True, mask_rate=0.3),
    )
    batch = task.rows(split, np.arange(task.num_rows(split)))
    seen = 0
    for row in range(len(batch["inputs"])):
        text = "".join(chr(t) if t < 256 else "\n" for t in batch["targets"][row])
        scored = batch["weights"][row] > 0
        for place in np.flatnonzero(scored):
            if text[place].isalnum():
                left = right = place
                while text[left - 1].isalnum():
                    left -= 1
                while right + 1 < len(text) and text[right + 1].isalnum():
                    right += 1
                assert scored[left : right + 1].all()
                seen += 1
    assert seen > 20


def test_in_chinese_each_character_is_a_word():
    text = "我们在北京学习语言模型的训练方法并且测试每一个步骤的结果"
    pieces = sorted(set(text))
    tokenizer = types.SimpleNamespace(
        vocab_size=len(pieces) + 1, end_of_text=len(pieces), specials={}, decode=None,
        piece=lambda i: [*pieces, ""][i],
    )  # fmt: skip
    cfg = tasks.config_class("masked_lm")(length=30, whole_word=True, mask_rate=0.15)
    task = tasks.build(cfg, tasks.Setting("masked", tokenizer))
    tokens = np.array([len(pieces), *map(pieces.index, text)], np.uint16)
    split = Split("train", tokens, np.array([0]), 1, False)
    for epoch in range(5):
        batch = task.rows(split, np.array([0]), epochs=np.array([epoch]))
        assert batch["weights"].sum() == round(0.15 * len(text)), "one clause is no one word"


@pytest.mark.parametrize("whole", [False, True])
def test_words_are_known_by_the_tokenizers_pieces(whole):
    """Where a token is a word, whole words are tokens; where ## goes on, it goes on."""
    pieces = [" un", "##aff", "##able", " cat"]
    tokenizer = types.SimpleNamespace(
        vocab_size=5, end_of_text=4, specials={}, decode=lambda ids: "".join(pieces[i] for i in ids),
        piece=lambda i: [" un", "aff", "able", " cat", ""][i],
    )  # fmt: skip
    cfg = tasks.config_class("masked_lm")(length=18, whole_word=whole, mask_rate=0.3)
    task = tasks.build(cfg, tasks.Setting("masked", tokenizer))
    tokens = np.array([4, *[0, 1, 2, 3] * 4], np.uint16)
    split = Split("train", tokens, np.array([0]), 1, False)
    alone = 0
    for epoch in range(20):
        batch = task.rows(split, np.array([0]), epochs=np.array([epoch]))
        scored = batch["weights"][0][1:17].reshape(4, 4)[:, :3].sum(axis=1)
        assert batch["weights"].sum() > 0
        alone += int(((scored > 0) & (scored < 3)).sum())
    assert (alone == 0) == whole


def test_next_sentence_rows():
    split, task = plain_split(), make("masked_lm", "masked", length=31, next_sentence=True)
    batch = task.rows(
        split, np.arange(task.num_rows(split)), epochs=np.full(task.num_rows(split), 3)
    )
    cls, sep = task.ids["cls"], task.ids["sep"]
    row = batch["targets"][0]
    assert row[0] == cls and (row == sep).sum() == 2 and row[15] == sep and row[30] == sep
    np.testing.assert_array_equal(batch["types"][0], [0] * 16 + [1] * 15)
    assert set(batch["labels"].tolist()) == {0, 1}
    follows = np.flatnonzero(batch["labels"] == 0)[0]
    both = np.concatenate([batch["targets"][follows][1:15], batch["targets"][follows][16:30]])
    np.testing.assert_array_equal(both, split.tokens[1 + 28 * follows : 1 + 28 * (follows + 1)])
    with pytest.raises(ConfigError, match="isolate_documents"):
        make("masked_lm", "masked", next_sentence=True, isolate_documents=True)


def test_spans_are_as_many_and_as_long_as_in_the_paper():
    """Of 568 tokens 15% in spans of 3: 512 are left and 114 to write, as T5's code has them."""
    cfg = tasks.config_class("span_corruption")(source_length=512)
    assert cfg.sizes == (568, 114)
    split = stream(["the cat sat on a mat " * 800])
    task = make("span_corruption", "source", source_length=512)
    indices = np.arange(task.num_rows(split) - 1)
    batch = task.rows(split, indices, epochs=indices)
    lengths, begins = [], []
    for row in indices.tolist():
        source, target = batch["source"][row], batch["targets"][row]
        marks = np.flatnonzero(np.isin(target, task.sentinels))
        assert len(marks) == np.isin(source, task.sentinels).sum() == round(round(0.15 * 568) / 3)
        ends = [*marks[1:], np.flatnonzero(batch["weights"][row])[-1]]
        lengths += (np.array(ends) - marks - 1).tolist()
        begins.append(np.isin(source[0], task.sentinels))
        assert sum(lengths[-len(marks) :]) == round(0.15 * 568)
    assert not any(begins), "the first token is kept"
    share = np.bincount(lengths, minlength=12) / len(lengths)
    # Borders drawn without repetition: spans of 1 to many, shorter ones more often.
    assert share[0] == 0 and 0.25 < share[1] < 0.42 and share[1] > share[3] > share[6] > 0


@pytest.mark.parametrize("text", ["abcdefgh", "abcdefghijklm"])
def test_what_does_not_follow_is_of_another_row(text):
    split, task = stream([text]), make("masked_lm", "masked", length=9, next_sentence=True)
    count = task.num_rows(split)
    windows = [split.tokens[1 + 6 * row :][:6].tolist() for row in range(count)]
    ends = [window[len(window) // 2 :] for window in windows]
    for epoch in range(40):
        batch = task.rows(split, np.arange(count), epochs=np.full(count, epoch))
        for row in range(count):
            second = batch["targets"][row][batch["types"][row] > 0][:-1].tolist()
            assert second in ends
            assert (second == ends[row]) == (batch["labels"][row] == 0)


def test_isolated_documents_of_masked_rows():
    split = stream(["aa", "bbb", "c"])
    task = make("masked_lm", "masked", length=10, isolate_documents=True)
    batch = task.rows(split, np.array([0]))
    # cls a a END b b b END c sep
    np.testing.assert_array_equal(batch["segments"][0], [1, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 0, 1, 2, 3, 0, 1, 2])


@pytest.mark.parametrize(
    "fields", [{}, {"source_length": 40, "corruption_rate": 0.5, "mean_span": 10.0}]
)
def test_spans_put_back_give_the_text(fields):
    split, task = plain_split(), make("span_corruption", "source", **fields)
    indices = np.arange(task.num_rows(split))
    batch = task.rows(split, indices, epochs=indices)
    text = []
    for row in range(len(indices)):
        source = batch["source"][row][batch["source_segments"][row] > 0]
        target = batch["targets"][row][batch["weights"][row] > 0]
        assert source[-1] == target[-1] == END
        np.testing.assert_array_equal(batch["inputs"][row][: len(target)], [END, *target[:-1]])
        spans = {}
        for token in target[:-1].tolist():
            if token in task.sentinels:
                spans[token] = []
                mark = token
            else:
                spans[mark].append(token)
        for token in source[:-1].tolist():
            text += spans[token] if token in task.sentinels else [token]
    np.testing.assert_array_equal(text, split.tokens[1 : 1 + len(text)])
    assert len(text) >= len(split.tokens) - 2, "all but a last row too short to cut"
    full = batch["source_segments"][0] > 0
    assert full.all() or full.sum() >= task.source_length - 1
    assert (batch["weights"][0] > 0).all()


def test_pairs_by_hand():
    batch = make("seq2seq", "source", source_length=6, length=4).rows(
        paired_split(), np.array([1, 0])
    )
    a, n, o = (ord(c) for c in "ano")
    np.testing.assert_array_equal(batch["source"][0], [a, END, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["inputs"][0], [END, n, o, 0])
    np.testing.assert_array_equal(batch["targets"][0], [n, o, END, 0])
    np.testing.assert_array_equal(batch["weights"][0], [1, 1, 1, 0])
    np.testing.assert_array_equal(batch["source"][1], [*b"one l", END])  # cut to fit
    joined = make("seq2seq", "causal", source_length=6, length=4).rows(
        paired_split(), np.array([1])
    )
    np.testing.assert_array_equal(joined["inputs"][0], [END, a, END, n, o, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(joined["targets"][0], [a, END, n, o, END, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(joined["weights"][0], [0, 0, 1, 1, 1, 0, 0, 0, 0, 0])


def test_a_text_that_goes_on_scores_what_causal_lm_does():
    split = plain_split()
    apart = make("seq2seq", "source", source_length=8, length=8)
    joined = make("seq2seq", "causal", source_length=8, length=8)
    windows = make("causal_lm", "causal", length=8, context=8, isolate_documents=False)
    indices = np.arange(windows.num_rows(split))
    assert apart.num_rows(split) == joined.num_rows(split) == len(indices)
    a, j, w = (task.rows(split, indices) for task in (apart, joined, windows))
    for key in w:
        np.testing.assert_array_equal(j[key], w[key])
    np.testing.assert_array_equal(a["targets"][a["weights"] > 0], split.tokens[1:])
    np.testing.assert_array_equal(a["source"][3], [*split.tokens[18:25], END])
    np.testing.assert_array_equal(a["inputs"][3], [END, *split.tokens[25:32]])
    np.testing.assert_array_equal(a["source"][0], [END, END] + [0] * 6)


@pytest.mark.parametrize("name", [name for name, kind in CASES if kind == "source"])
def test_a_target_begins_with_the_token_that_the_family_was_trained_with(name):
    split, labels = split_for(name), ("maybe", "no", "yes")
    cfg = tasks.config_class(name)()
    batches = [
        tasks.build(cfg, tasks.Setting("source", BYTE, labels, 0, start)).rows(split, np.arange(2))
        for start in (-1, 7)
    ]
    first = [batch["inputs"][:, 0].tolist() for batch in batches]
    assert first == [[END, END], [7, 7]]
    for key in batches[0]:
        cut = np.s_[:, 1:] if key == "inputs" else np.s_[:]
        np.testing.assert_array_equal(batches[0][key][cut], batches[1][key][cut])


def test_classification_by_hand():
    split = paired_split()
    task = make("classify", "masked", length=5)
    batch = task.rows(split, np.arange(4))
    assert task.num_classes == 3 and task.max_scored == 1
    np.testing.assert_array_equal(batch["inputs"][0], [task.cls, *b"one", task.sep])
    np.testing.assert_array_equal(batch["targets"][:, 0], [2, 1, 2, 0])  # of maybe, no, yes
    np.testing.assert_array_equal(batch["weights"].sum(axis=1), np.ones(4))
    written = make("classify", "causal", length=5, label_length=6).rows(split, np.array([1]))
    asked = written["targets"][written["weights"] > 0]
    np.testing.assert_array_equal(asked, [*b"no", END])


@pytest.mark.parametrize(
    ("name", "kind", "fields", "words"),
    [
        ("classify", "causal", {"label_length": 4}, "'maybe' takes 6"),
        ("masked_lm", "masked", {"mask_rate": 1.0}, "task.mask_rate=1.0"),
        (
            "span_corruption",
            "source",
            {"corruption_rate": 0.9, "mean_span": 1.0},
            "corruption_rate=0.9",
        ),
        ("seq2seq", "source", {"length": 1}, "task.length=1"),
    ],
)
def test_what_cannot_be_is_refused(name, kind, fields, words):
    with pytest.raises(ConfigError, match=words):
        make(name, kind, **fields)


def test_classes_need_labels():
    with pytest.raises(ConfigError, match=r"data\.label_field"):
        tasks.build(tasks.config_class("classify")(), tasks.Setting("masked", BYTE))


def test_a_label_is_known_by_its_tokens():
    class Lossy(type(BYTE)):
        """Reads every vowel as the same token."""

        def encode(self, text):
            return super().encode(re.sub("[aeiou]", "_", text))

    labels = ("maybe", "no", "yes")
    cfg, split = tasks.config_class("classify")(), paired_split(Lossy())
    task = tasks.build(cfg, tasks.Setting("masked", Lossy(), labels))
    batch = task.rows(split, np.arange(4))
    np.testing.assert_array_equal(batch["targets"][:, 0], [2, 1, 2, 0])
    long = tasks.Setting("masked", BYTE, ("no", "x" * 99))
    assert tasks.build(cfg, long).num_classes == 2, "an encoder writes no label"
    with pytest.raises(ConfigError, match=r"the label 'n[ou]' as another one"):
        tasks.build(cfg, tasks.Setting("masked", Lossy(), ("no", "nu")))


def test_a_tokenizers_own_special_tokens_are_used():
    tokenizer = types.SimpleNamespace(vocab_size=9, specials={"mask": 4})
    assert tasks.special_ids(tokenizer, ("cls", "sep", "mask")) == {"cls": 9, "sep": 10, "mask": 4}
