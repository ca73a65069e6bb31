"""What is said of a step's rows is what they read: batches are made again from the places that are named."""

import re
import types

import numpy as np
import pytest

from lm import tasks
from lm.data import mixture, origins, pipeline, tokenizers
from lm.data.streams import Split

BYTE = tokenizers.Byte()
END = BYTE.end_of_text
LABELS = ("no", "yes")
FIELDS = {
    "causal_lm": {"length": 24},
    "masked_lm": {"length": 24},
    "span_corruption": {"source_length": 24, "corruption_rate": 0.3},
    "seq2seq": {"source_length": 16, "length": 10},
    "classify": {"length": 12, "label_length": 6},
}
NOISE = {"replace_tokens": 0.0, "delete_spans": 0.3}
PACKED = [
    (name, kind, {"packing": packing, "isolate_documents": isolate}, False)
    for name, kind in (("causal_lm", "causal"), ("masked_lm", "masked"), ("span_corruption", "source"))
    for packing in tasks.PACKINGS
    for isolate in (False, True)
]  # fmt: skip
PAIRED = [
    (name, kind, noise, True)
    for name in ("seq2seq", "classify")
    for kind in tasks.kinds(tasks.config_class(name)())
    for noise in ({}, NOISE)
]
OTHERS = [
    ("causal_lm", "causal", {"context": 7}, False),
    ("masked_lm", "masked", {"next_sentence": True}, False),
    ("masked_lm", "masked", {"next_sentence": True, "dynamic": False}, False),
    ("seq2seq", "source", {}, False),
    ("seq2seq", "causal", {}, False),
]


def member(seed, paired):
    """A corpus with documents of letters; of pairs the second is a label, and one is long."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(97, 123, int(size)) for size in rng.integers(1, 60, 40)]
    if paired:
        texts[1::2] = [np.array(BYTE.encode(LABELS[number % 2])) for number in range(20)]
        texts[5] = BYTE.encode("no")
    tokens = np.concatenate([[END], *(np.append(text, END) for text in texts)]).astype(np.uint16)
    starts = np.cumsum([0, *(len(text) + 1 for text in texts)])[:-1]
    return types.SimpleNamespace(train=Split("train", tokens, starts, 1, paired), parts=("part",))


def named(split, documents):
    """Return the tokens at the places that are named."""
    found = []
    for line in documents:
        numbers = re.fullmatch(r"document ([\d,]+), tokens ([\d,]+) to ([\d,]+) of ([\d,]+)", line)
        document, low, high, size = (int(x.replace(",", "")) for x in numbers.groups())
        begin, length = split.span(document)
        assert 0 <= low < high <= length == size
        found += split.tokens[begin + low : begin + high].tolist()
    return found


def read(task, batch, row):
    """Return the text of a row of a batch, as far as it is read, from its arrays alone."""
    if "source" in batch:
        parts = [batch["source"][row][batch["source_segments"][row] > 0].tolist()]
        if hasattr(task, "sentinels"):
            return put_back(task, batch, row)
        parts.append(batch["inputs"][row][batch["segments"][row] > 0].tolist())
        return [token for part in parts for token in part if token != END]
    masked = getattr(task, "at_first", False) or hasattr(task, "stride")
    known = batch["targets" if hasattr(task, "stride") else "inputs"][row]
    own = (END, task.cls, task.sep) if masked else (END,)
    text = [token for token in known[batch["segments"][row] > 0].tolist() if token not in own]
    if getattr(task, "at_first", False) and batch["segments"][row].any():
        text += BYTE.encode(LABELS[batch["targets"][row, 0]]).tolist()
    return text


def put_back(task, batch, row):
    """Return the text of a row with its spans back in their places."""
    text = []
    for number in range(1, batch["source_segments"][row].max(initial=0) + 1):
        spans = {}
        for token in batch["targets"][row][batch["segments"][row] == number].tolist():
            if token in task.sentinels:
                spans[token] = []
            elif token != END or spans:
                spans[list(spans)[-1]].append(token)
        for token in batch["source"][row][batch["source_segments"][row] == number].tolist():
            text += spans.get(token, [token])
    return [token for token in text if token != END]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("name", "kind", "fields", "paired"), PACKED + PAIRED + OTHERS)
def test_rows_are_made_again_from_what_is_said_of_them(name, kind, fields, paired, several):
    members = [member(seed, paired) for seed in range(2 if several else 1)]
    cfg = tasks.config_class(name)(**FIELDS[name], **fields)
    task = tasks.build(cfg, tasks.Setting(kind, BYTE, LABELS))
    mixed = mixture.Mixture(((0, (3, 1)), (40, (1, 2)))) if several else None
    made = pipeline.Batches(
        [each.train for each in members], task, batch_size=8, seed=3, order="shuffle", mixture=mixed
    )
    compare(made, members, (0, 3, 7, 40))


def test_streams_are_made_again_too():
    members = [member(0, False)]
    task = tasks.build(tasks.config_class("causal_lm")(length=24), tasks.Setting("causal", BYTE))
    made = pipeline.Batches([members[0].train], task, batch_size=4, seed=3, order="stream")
    compare(made, members, (0, 3, int(made.steps_per_epoch) + 1))


def compare(made, members, steps):
    """Compare all rows of some steps with what is said of them; with noise, that what is read is in it."""
    names = [f"m{number}" for number in range(len(members))]
    seen = 0
    for step in steps:
        batch = made[step]
        found = origins.of_step(made, members, names, step)
        assert len(found) == len(batch["inputs"])
        for row, said in enumerate(found):
            owner = names.index(said["row"].split()[0]) if len(members) > 1 else 0
            assert "corpus" not in batch or batch["corpus"][row] == owner
            expected = named(members[owner].train, said["documents"])
            text = read(made.task, batch, row)
            if getattr(made.task.cfg, "delete_spans", 0):
                places = iter(expected)
                assert all(token in places for token in text), "in this order"
                assert len(text) <= len(expected) and text[-1:] == expected[-1:]
            elif batch["segments"][row].any():
                assert text == expected
            seen += len(text)
    assert seen > 100
