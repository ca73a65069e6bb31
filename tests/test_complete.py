"""Text in, text out: going on, answering, filling in, classifying, through a run of each kind."""

import json
import math
import re
import struct
import types

import numpy as np
import pytest
import tokenizers as huggingface
from ml_collections import ConfigDict

from lm import checkpoint, generate, train
from lm import workdir as workdirs
from lm.complete import Completer, Sampling
from lm.config import ConfigError
from lm.data import external, llama2c, tokenizers
from tools import evaluate as evaluate_tool
from tools import generate as generate_tool

GREEDY = Sampling(max_tokens=4, temperature=0.0, top_k=3)
ENCODER = {"name": "bert", "num_layers": 1, "model_dim": 32, "num_heads": 2}
SEQ2SEQ = {"name": "seq2seq", "num_layers": 1, "model_dim": 32}


def run(tiny, folder, model, task, **overrides):
    """Train a tiny run and return what completes with it."""
    config = tiny(**{"train__num_steps": 2, "eval__every_steps": 0, **overrides})
    config.model, config.task = ConfigDict(model), ConfigDict(task)
    train.run(config, folder)
    return workdirs.completer(folder, checkpoint.load(folder))


@pytest.fixture
def labelled(tmp_path):
    rows = [("good fine great", "yes"), ("bad poor awful", "no")] * 60
    path = tmp_path / "labels.tsv"
    path.write_text("".join(f"{text} {i}\t{label}\n" for i, (text, label) in enumerate(rows)))
    return {"data__path": (str(path),), "data__source_field": "0", "data__label_field": "1"}


def test_an_encoder_fills_masks(tiny, tmp_path, capsys):
    completer = run(
        tiny, tmp_path, ENCODER, {"name": "masked_lm", "length": 24}, train__sample_tokens=4
    )
    assert "[MASK]" in capsys.readouterr().out, "the sample shows what was masked"
    (text,) = completer.complete(["the [MASK]at [MASK]"], GREEDY)
    places = text.splitlines()
    assert len(places) == 2 and all(len(place.split("  ")) == 3 for place in places)
    row = completer.encode("the [MASK]at [MASK]")
    (found,) = generate.fill_masks(
        completer.model, completer.params, [row], mask=completer.task.gaps[0], top_k=400
    )
    for place in found:
        assert sum(probability for _, probability in place) == pytest.approx(1, abs=1e-5)
        assert [p for _, p in place] == sorted((p for _, p in place), reverse=True)
    for flags, shown in (([], 5), (["--top_k", "7"], 7)):
        assert generate_tool.main(["--workdir", str(tmp_path), "--prompt", "a [MASK]", *flags]) == 0
        assert len(capsys.readouterr().out.split("\n")[1].split("  ")) == shown
    with pytest.raises(ConfigError, match=r"nothing to fill in.*\[MASK\]"):
        completer.complete(["the cat"], GREEDY)
    with pytest.raises(ConfigError, match="prompt: 25 tokens, and the model reads 24"):
        completer.complete(["the cat sat on a " + "m" * 5 + "[MASK]"], GREEDY)
    for wrong in ({"top_k": -1}, {"top_p": 2.0}, {"temperature": math.nan}, {"max_tokens": 2**40}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            completer.complete(["a [MASK]"], Sampling(**wrong))


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        (ENCODER, 1),
        pytest.param(SEQ2SEQ, None, marks=pytest.mark.slow),
        ({"name": "gpt", "num_layers": 1, "model_dim": 32, "num_heads": 2}, None),
    ],
    ids=["encoder", "encoder-decoder", "decoder"],
)
def test_every_kind_of_family_classifies(tiny, tmp_path, labelled, model, lines, capsys):
    task = {"name": "classify", "length": 24, "label_length": 6}
    completer = run(tiny, tmp_path / "run", model, task, train__sample_tokens=4, **labelled)
    assert re.search(r"sample:  (good fine great|bad poor awful) \d+ -> ", capsys.readouterr().out)
    (text,) = completer.complete(["good great"], GREEDY)
    if lines:
        assert text.startswith(("yes 0.", "no 0.")) and len(text.split("  ")) == 2
    else:
        assert not completer.goes_on and "good" not in text
    long, longer = (completer.encode("good great " * count) for count in (9, 20))
    assert long == longer, "as long a text as in training is read"
    encode = completer.tokenizer.encode
    pair = encode("good great " * 20), encode(completer.task.labels[0])
    split = types.SimpleNamespace(
        paired=True, num_pairs=1, pair=lambda _: pair, end_of_text=completer.tokenizer.end_of_text
    )
    trained = completer.task.rows(split, np.zeros(1, np.int64))
    source = trained["source" if completer.kind == "source" else "inputs"][0]
    assert longer == source[: len(longer)].tolist()


def test_other_texts_are_scored_by_the_labels_that_the_model_knows(
    tiny, tmp_path, labelled, capsys
):
    """Whatever labels the other texts have, and in whatever order."""
    task = {"name": "classify", "length": 24}
    completer = run(tiny, tmp_path / "run", ENCODER, task, train__num_steps=20, **labelled)
    other = tmp_path / "other.tsv"
    other.write_text("good fine great 7\tyes\n" * 8)
    args = ["--workdir", str(tmp_path / "run"), "--config.data.path", str(other)]
    assert evaluate_tool.main([*args, "--json", str(tmp_path / "scores.json")]) == 0
    loss = json.loads((tmp_path / "scores.json").read_text())["loss"]
    (text,) = completer.complete(["good fine great 7"], GREEDY)
    shares = dict(part.split(" ") for part in text.split("  "))
    assert abs(float(shares["yes"]) - 0.5) > 0.1, "a model that has learnt something"
    assert math.exp(-loss) == pytest.approx(float(shares["yes"]), abs=2e-3)
    capsys.readouterr()
    other.write_text("good fine great 7\tmaybe\n" * 8)
    assert evaluate_tool.main(args) == 2
    assert "'maybe' is none of the 2 labels" in capsys.readouterr().err


def test_an_encoder_decoder_answers_with_what_it_was_trained_on(tiny, tmp_path, capsys):
    """A source alone and one among longer ones give the same answer."""
    task = {"name": "seq2seq", "source_length": 16, "length": 16}
    completer = run(tiny, tmp_path, SEQ2SEQ, task, train__sample_tokens=4)
    assert " -> " in capsys.readouterr().out
    alone = completer.complete(["the cat"], GREEDY)[0]
    together = completer.complete(["the cat sat on the mat and ran", "the cat"], GREEDY)[1]
    assert alone == together
    assert (
        generate_tool.main(
            ["--workdir", str(tmp_path), "--prompt", "the cat", "--temperature", "0"]
        )
        == 0
    )


def masked(tokenizer, gap):
    """Return what completes with a tokenizer, and no model."""
    task = types.SimpleNamespace(KINDS=("masked",), gaps=[gap], cls=gap + 1, sep=gap + 2, names={})
    return Completer(types.SimpleNamespace(accepts={"masked"}), None, task, tokenizer, False)


@pytest.mark.parametrize(
    ("name", "size"), [("sentencepiece", 320), ("byte_bpe", 280), ("byte", 0), ("char", 0)]
)
def test_the_space_before_a_mask_is_the_masked_piece_s(name, size):
    """In training a mask stands for a piece with its space; a lone space before it was never read."""
    text = "return the end of the list. a cat sat on the mat. " * 40
    tokenizer = tokenizers.train(name, [text], vocab_size=size, model="bpe")
    mask = tokenizer.vocab_size
    row = masked(tokenizer, mask).encode("return the [MASK] of the list.")
    before = "return the " if name in ("byte", "char") else "return the"
    parts = [tokenizer.encode(part).tolist() for part in (before, " of the list.")]
    assert row == [mask + 1, *parts[0], mask, *parts[1], mask + 2]


@pytest.mark.parametrize(("left", "right"), [(True, False), (False, True), (False, False)])
def test_a_mask_of_others_takes_the_spaces_that_its_tokenizer_says(left, right, tmp_path):
    """As the library itself, where it finds the token in a text."""
    library = huggingface.Tokenizer(huggingface.models.BPE())
    library.pre_tokenizer = huggingface.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = huggingface.decoders.ByteLevel()
    alphabet = huggingface.pre_tokenizers.ByteLevel.alphabet()
    trainer = huggingface.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["return the end of the list"] * 9, trainer)
    library.add_special_tokens([huggingface.AddedToken("[MASK]", lstrip=left, rstrip=right)])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    tokenizer = external.open_tokenizer(tmp_path)
    prompt = "return the [MASK] of the list"
    row = masked(tokenizer, tokenizer.specials["mask"]).encode(prompt)
    assert row[1:-1] == library.encode(prompt).ids


def test_gaps_in_a_prompt_are_sentinels(tiny, tmp_path):
    model = {"name": "t5", "num_layers": 1, "model_dim": 32, "num_heads": 2}
    completer = run(tiny, tmp_path, model, {"name": "span_corruption", "source_length": 48})
    row = completer.encode("the [MASK] sat [MASK].")
    marks = [token for token in row if token >= completer.tokenizer.vocab_size]
    assert marks == list(completer.task.gaps[:2])
    assert completer.decode([*b"ab", marks[0], *b"cd"]) == "ab [0] cd"
    with pytest.raises(ConfigError, match="times"):
        completer.encode("[MASK]" * 99)


def test_a_mask_means_nothing_to_a_classifier(tiny, tmp_path, labelled):
    completer = run(tiny, tmp_path / "run", SEQ2SEQ, {"name": "classify", "length": 24}, **labelled)
    with pytest.raises(ConfigError, match="leave it out"):
        completer.complete(["good [MASK]"], GREEDY)


def test_counting_families_write(tiny, tmp_path, capsys):
    completer = run(
        tiny, tmp_path, {"name": "ngram", "order": 4}, {"name": "causal_lm", "length": 32, "context": 3},
        train__num_steps="1 epochs",
    )  # fmt: skip
    (text,) = completer.complete(["the "], Sampling(max_tokens=12, temperature=0.0, top_k=0))
    assert len(text) == 12 and set(text) <= set("abcdefghijklmnopqrstuvwxyz .\n")
    assert np.isfinite(np.asarray(next(iter(completer.params.values())))).all()


def test_a_text_that_nothing_is_before_has_no_space_before_it(tmp_path, monkeypatch, capsys):
    """As Llama's own decoding has it: its tokenizer puts a space before every text."""
    pieces = [
        b"<unk>",
        b"\n<s>\n",
        b"\n</s>\n",
        *(f"<0x{i:02X}>".encode() for i in range(256)),
        b" a",
    ]
    body = b"".join(struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces)
    tokenizer = llama2c.Llama2C(struct.pack("<i", 9) + body)
    a = tokenizer.vocab_size - 1
    task = types.SimpleNamespace(KINDS=("causal",), names={}, gaps=())
    model = types.SimpleNamespace(accepts={"causal"})

    def generated(model, params, rows, *, on_tokens, **sampling):
        for row in range(len(rows) if on_tokens else 0):
            on_tokens(row, [a])
            on_tokens(row, [a])
        return [[a, a] for _ in rows]

    monkeypatch.setattr(generate, "generate", generated)
    writes = Completer(model, {}, task, tokenizer, paired=False)
    assert writes.complete(["", "a"], GREEDY) == ["a a", " a a"]
    answers = Completer(model, {}, task, tokenizer, paired=True)
    assert answers.complete(["", "a"], GREEDY) == ["a a", "a a"]
    for completer, prompt, text in (
        (writes, "", "a a"),
        (writes, "a", "a a a"),
        (answers, "a", "a a"),
    ):
        monkeypatch.setattr(checkpoint, "load", lambda *a, **k: None)
        monkeypatch.setattr(workdirs, "completer", lambda *a, completer=completer: completer)
        assert generate_tool.main(["--workdir", str(tmp_path), "--prompt", prompt]) == 0
        assert capsys.readouterr().out == f"{text}\n"


def test_what_cannot_be_sampled_is_said_before_training(tiny, tmp_path, capsys):
    masked = {"name": "masked_lm", "length": 24}
    for wrong, words in (
        ({"train__sample_prompt": "the cat"}, r"train\.sample_prompt: prompt: nothing to fill in"),
        ({"train__sample_tokens": 2**40}, r"train\.sample_tokens: max_tokens=1099511627776: use"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(tiny, tmp_path / "run", ENCODER, masked, **wrong)
    assert not (tmp_path / "run").exists()
    # One that is too long for the model is seen when it is tried: the run has ended well all the same.
    long = "the cat sat on a mat and the dog ran [MASK]"
    run(tiny, tmp_path / "run", ENCODER, masked, train__sample_tokens=4, train__sample_prompt=long)
    assert "sample:  none, as prompt: 40 tokens" in capsys.readouterr().out


def test_an_encoder_shows_a_mask_also_where_its_first_row_has_none(tiny, tmp_path):
    completer = run(
        tiny, tmp_path, ENCODER, {"name": "masked_lm", "length": 200, "mask_rate": 0.01}
    )
    mask = completer.task.gaps[0]
    for place in (None, 3, 150):  # of the row's own [MASK]
        row = [65] * 200
        if place:
            row[place] = mask
        shown = completer._around_a_mask(row)
        assert mask in shown and len(shown) <= 64 and row.count(mask) == bool(place)
    batch = {"inputs": np.full((1, 200), 65), "segments": np.ones((1, 200), int)}
    object.__setattr__(completer, "task", Stub(completer.task, batch))
    assert "[MASK]" in completer.example(None, "", GREEDY)


class Stub:
    """A task whose rows are those given."""

    def __init__(self, task, batch):
        self._task, self._batch = task, batch

    def rows(self, split, indices):
        return self._batch

    def __getattr__(self, name):
        return getattr(self._task, name)


def test_other_text_is_scored_whole_whatever_the_run_read_of_its_own(tiny, tmp_path, capsys):
    """A run on a field of records, with evaluations of a part, scores all of a plain text."""
    records = tmp_path / "own.jsonl"
    records.write_text(
        "".join(json.dumps({"content": f"the cat {i} sat"}) + "\n" for i in range(300))
    )
    own = {"data__path": (str(records),), "data__field": "content", "eval__max_tokens": 64}
    run(tiny, tmp_path / "run", {"name": "gpt", "num_layers": 1, "model_dim": 32, "num_heads": 2},
        {"name": "causal_lm", "length": 16}, **own)  # fmt: skip
    other = tmp_path / "other.txt"
    other.write_text("the dog ran. " * 100)
    args = ["--workdir", str(tmp_path / "run"), "--json", str(tmp_path / "scores.json")]
    assert evaluate_tool.main([*args, f"--config.data.path={other}"]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["tokens"] == 1300 + 1
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"content": "x" * 100}) + "\n")
    assert evaluate_tool.main([*args, f"--config.data.path={more}"]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["tokens"] == 100 + 1
    assert evaluate_tool.main(args) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["tokens"] <= 128, "its own, a part"
