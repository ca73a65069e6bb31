"""Training reads any amount of text and gives the same pieces; symbols are whole; unknown is a choice."""

import ast
import inspect
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import tokenizers as huggingface
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm.config import ConfigError
from lm.data import corpus, subwords, tokenizers
from lm.data.settings import Config

PROSE = [inspect.getsource(inspect), inspect.getsource(ast)]
SYMBOLS = ("<tool>", "a,b", ' "q" ', "ab", "bab", "|", "\u2192", "line\nend", "  ", "<|")
PARTS = st.sampled_from(
    [*SYMBOLS, "a", "b", "x", " ", "\n", "é", "<", ">", "tool", "|>", "\u2192 ", "end"]
)
TEXTS = st.lists(PARTS, max_size=20).map("".join)
KINDS = ("unigram", "bpe", "byte_bpe")


def train(kind, texts=PROSE, *, vocab_size=700, **options):
    name = "byte_bpe" if kind == "byte_bpe" else "sentencepiece"
    return tokenizers.train(name, texts, vocab_size=vocab_size, model=kind, **options)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def with_symbols(kind):
    return train(kind, symbols=SYMBOLS)


@pytest.fixture(scope="module")
def sentencepiece():
    return train("unigram")


@given(cut=st.integers(1, 50), text=TEXTS)
@settings(deadline=None, max_examples=50)
def test_long_text_is_encoded_in_parts_without_loss(sentencepiece, cut, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subwords, "_CHUNK", cut)
        assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_parts_are_bounded_and_cut_before_newlines_where_they_can_be(monkeypatch):
    monkeypatch.setattr(subwords, "_CHUNK", 10)
    cuts = subwords._any_of(["\u2581", "gh", "ghij"])
    text = "abcdef\nghijkl\nm" + 15 * "n"
    assert subwords._chunks(text, cuts) == ["abcdef\n", "ghij", "kl", "\nm" + 8 * "n", 7 * "n"]
    assert subwords._chunks("abcdef\nxxxxxxx", cuts) == ["abcdef", "\nxxxxxxx"]
    assert subwords._chunks("a\u2581\u2581", cuts) == ["a", "\u2581", "\u2581"]


def test_training_again_gives_the_same_pieces(kind):
    def fingerprint(texts):
        return train(kind, texts, vocab_size=500).fingerprint

    assert fingerprint(PROSE[1:]) == fingerprint(iter(PROSE[1:]))
    assert fingerprint(PROSE[1:]) != fingerprint(PROSE[:1])


@pytest.mark.parametrize("kind", ["unigram", "byte_bpe"])
def test_a_newline_and_its_indentation_are_one_token(kind):
    tokenizer = train(kind)
    assert len(tokenizer.encode("\n        return")) == 2
    assert len(tokenizer.encode("\n\n    def")) == 2


def test_a_large_corpus_is_sampled_evenly_and_a_small_one_whole(monkeypatch):
    monkeypatch.setattr(subwords, "_TRAIN_SIZE", 300)
    lines = [f"{i:03}" for i in range(1000)]  # 3,000 characters, of which 300 may stay
    assert subwords.sampled(iter(lines)) == lines[::16]
    assert subwords.sampled(lines[:100]) == lines[:100]
    assert subwords.sampled(lines[:101]) == lines[:101:2]
    assert subwords.sampled([]) == []
    assert len(subwords.sampled(["x" * 400, "", "y" * 400, ""])) <= 2


def test_what_is_sampled_of_is_never_held(monkeypatch):
    monkeypatch.setattr(subwords, "_TRAIN_SIZE", 10_000)
    tracemalloc.start()
    try:
        kept = subwords.sampled(
            f"{i:010}" for i in range(100_000)
        )  # a megabyte, and six as objects
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 500 <= len(kept) <= 1000
    assert peak < 500_000


def test_a_vocabulary_that_the_text_does_not_allow_names_one_that_it_does(kind):
    def sized(vocab_size, texts=("some few words\n" * 3,)):
        return train(kind, texts, vocab_size=vocab_size, symbols=("<tool>",))

    with pytest.raises(ConfigError, match=r"data\.vocab_size=9999: .* at most \d+ pieces") as most:
        sized(9999)
    fix = int(str(most.value).split("set data.vocab_size=")[1].split()[0])
    assert sized(fix).vocab_size == fix
    with pytest.raises(ConfigError, match=r"data\.vocab_size=200: .*take \d+ pieces"):
        sized(200)


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_sentencepiece_wants_a_word_to_train_on(model):
    with pytest.raises(ConfigError, match=r"no words to train on; use data\.tokenizer=byte"):
        train(model, ["\n\n"], vocab_size=300)


@given(text=TEXTS)
@example(text="xaby ababab line\nend|<|>")
@settings(deadline=None, max_examples=150)
def test_a_symbol_is_one_piece_wherever_it_stands(with_symbols, text):
    ids = with_symbols.encode(text)
    assert with_symbols.decode(ids) == text
    assert with_symbols.token_bytes[ids].sum() == len(text.encode())
    cuts = subwords._any_of(SYMBOLS)
    parts = [with_symbols.encode(part) for part in cuts.split(text)]
    assert all(len(symbol) == 1 for symbol in parts[1::2])
    np.testing.assert_array_equal(ids, np.concatenate(parts))


def test_symbols_are_whole_at_the_edge_of_a_part_and_after_loading(
    with_symbols, monkeypatch, tmp_path
):
    whole = with_symbols.encode("x<tool>" * 5)
    monkeypatch.setattr(subwords, "_CHUNK", 3)
    np.testing.assert_array_equal(with_symbols.encode("x<tool>" * 5), whole)
    with_symbols.save(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert loaded.fingerprint == with_symbols.fingerprint
    assert loaded.vocab_size == 700
    np.testing.assert_array_equal(loaded.encode("x<tool>" * 5), whole)


@pytest.mark.parametrize(
    ("name", "symbol", "why"),
    [
        ("sentencepiece", "", "empty"),
        ("sentencepiece", "</s>", "a piece of its own already"),
        ("sentencepiece", "<0x0A>", "a piece of its own already"),
        ("sentencepiece", "a\u2581", r"U\+2581"),
        ("byte_bpe", "<|endoftext|>", "a piece of its own already"),
        ("byte_bpe", "é", "stand for bytes"),
        ("byte_bpe", "\u0120a", "stand for bytes"),
    ],
)
def test_a_symbol_that_cannot_be_a_piece_is_refused_before_anything_is_read(name, symbol, why):
    with pytest.raises(ConfigError, match=rf"data\.user_symbols='.*': .*{why}"):
        Config(tokenizer=name, user_symbols=("<ok>", symbol))
    with pytest.raises(ConfigError, match="given twice"):
        Config(tokenizer=name, user_symbols=("<ok>", "<ok>"))


def test_an_unknown_character_is_its_bytes_or_one_piece_or_refused(tmp_path):
    text = "if x == '\u4e00\u4e01': \u2581"
    ids = {
        unknown: train("unigram", unknown=unknown, vocab_size=650) for unknown in ("bytes", "unk")
    }
    assert ids["bytes"].decode(ids["bytes"].encode(text)) == text
    some = ids["unk"]
    assert some.decode(some.encode(text)) == "if x == '\ufffd': \ufffd"
    assert list(some.encode(text)).count(0) == 2  # neighbours are one
    assert some.token_bytes[0] == 3 and ids["bytes"].token_bytes[0] == 0
    assert not some.counts_bytes and ids["bytes"].counts_bytes

    strict = train("unigram", ["a \u4e00 b\n" + PROSE[0]], unknown="refuse", vocab_size=300)
    assert strict.decode(strict.encode("a \u4e00 b")) == "a \u4e00 b"  # rare, but seen
    strict.save(tmp_path)
    for tokenizer in (strict, tokenizers.load(tmp_path)):
        for bad, where in (("a b\u4e01", 3), ("a \u2581", 2)):
            with pytest.raises(
                ConfigError, match=rf"at position {where} has no piece.*data\.unknown"
            ):
                tokenizer.encode_all(["a", bad])
    assert len({strict.fingerprint, some.fingerprint, ids["bytes"].fingerprint}) == 3


def test_a_model_that_makes_the_unknown_piece_writes_one_sign(sentencepiece):
    assert sentencepiece.decode([*sentencepiece.encode("a"), 0]) == "a\ufffd"


def test_the_options_reach_the_tokenizer_and_the_name_of_the_cache(text_file):
    options = [
        {"tokenizer": "sentencepiece", "vocab_size": 300},
        {"tokenizer": "sentencepiece", "vocab_size": 300, "user_symbols": ("the dog",)},
        {"tokenizer": "sentencepiece", "vocab_size": 60, "unknown": "unk"},
        {"tokenizer": "sentencepiece", "vocab_size": 60, "unknown": "refuse"},
        {"tokenizer": "byte_bpe", "vocab_size": 270},
        {"tokenizer": "byte_bpe", "vocab_size": 270, "user_symbols": ("the dog",)},
    ]
    made = [corpus.build(Config(path=(str(text_file),), **some)).tokenizer for some in options]
    assert len({tokenizer.fingerprint for tokenizer in made}) == len(made)
    assert [len(made[n].encode("the dog")) == 1 for n in (1, 5)] == [True, True]
    assert made[2].encode("é").tolist() == [0]
    with pytest.raises(ConfigError, match="has no piece"):
        made[3].encode("é")


def test_byte_bpe_is_a_file_that_the_library_reads_alike(tmp_path):
    tokenizer = train("byte_bpe", symbols=("<tool>",))
    tokenizer.save(tmp_path)
    library = huggingface.Tokenizer.from_file(str(tmp_path / "huggingface.json"))
    text = PROSE[0] + "<tool> é"
    assert tokenizer.encode(text).tolist() == library.encode(text).ids
    assert library.decode(library.encode(text).ids) == text


THREADS = """
import os, sys
from lm.data import tokenizers
if sys.argv[1] == "one":
    tokenizers.use_one_thread()
tokenizer = tokenizers.load(sys.argv[2])
before = len(os.listdir("/proc/self/task"))
ids = tokenizer.encode_all(["the cat sat on the mat"] * 2000)
print(len(os.listdir("/proc/self/task")) - before, tokenizers.num_threads(), sum(map(sum, ids)))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_a_process_can_be_held_to_one_thread_with_the_same_ids(tmp_path):
    train("byte_bpe").save(tmp_path)
    found = {}
    for how in ("one", "many"):
        command = [sys.executable, "-c", THREADS, how, str(tmp_path)]
        environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found[how] = [int(word) for word in done.stdout.split()]
    assert found["one"][:2] == [0, 1]
    assert found["many"][0] >= 1
    assert found["one"][2] == found["many"][2]


def test_what_is_inside_a_symbol_is_not_trained_on():
    texts = ["<tool> cat <tool>sat <tool>\n"] * 9
    tokenizer = train("byte_bpe", texts, vocab_size=262, symbols=("<tool>",))
    assert tokenizer.vocab_size == 262
    assert len(tokenizer.encode("tool")) == 4


def test_a_vocabulary_without_end_is_refused_before_a_library_tries():
    with pytest.raises(ConfigError, match=r"data\.vocab_size=1000000000: use 16777216 or fewer"):
        Config(vocab_size=10**9)
