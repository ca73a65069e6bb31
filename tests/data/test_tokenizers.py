"""decode(encode(x)) == x, bytes are counted exactly, and training depends on the text alone."""

import ast
import inspect

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm.config import ConfigError
from lm.data import tokenizers

PROSE = [inspect.getsource(inspect), inspect.getsource(ast)]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
AWKWARD = st.lists(
    st.sampled_from(
        [
            " ",
            "\n",
            "\t",
            "\r\n",
            "\u2581",
            "\u2585",
            "</s>",
            "<unk>",
            "<0x0A>",
            "<|endoftext|>",
            "\0",
            "def",
            "é",
            "\u0301",
        ]
    ),
    max_size=30,
).map("".join)


@pytest.fixture(scope="module", params=["byte", "unigram", "bpe", "byte_bpe"])
def tokenizer(request):
    name = "sentencepiece" if request.param in ("unigram", "bpe") else request.param
    return tokenizers.train(name, PROSE, vocab_size=700, model=request.param)


@given(text=ANY_TEXT | AWKWARD)
@example(text=" \u2581 \u2581\u2581")
@example(text="\n" + 40 * " " + "x\n\n\n   y\n\t z ")
@example(text="<s></s><unk><0xE2><0x96><0x81>")
@example(text="\ufeff\0\ufffd")
@settings(deadline=None, max_examples=200)
def test_decode_returns_any_text_and_token_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32
    assert tokenizer.counts_bytes and tokenizer.token_bytes[ids].sum() == len(text.encode())
    # Text that looks like a special token is plain text.
    assert tokenizer.end_of_text not in ids


@pytest.mark.parametrize("name", ["byte", "char", "sentencepiece", "byte_bpe"])
def test_ids_past_the_vocabulary_are_replaced(name):
    """A model's vocabulary may be larger than its tokenizer's, and sampled from."""
    tokenizer = tokenizers.train(name, PROSE, vocab_size=700, model="bpe")
    ids = tokenizer.encode("the").tolist()
    past = [tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.vocab_size + 99]
    assert tokenizer.decode([*ids, *past, *ids]) == "the\ufffd\ufffdthe"


def test_many_texts_at_once_are_each_encoded_alone(tokenizer):
    texts = [*PROSE, "", " \u2581", "\n    x"]
    for ids, text in zip(tokenizer.encode_all(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_all([]) == []


def test_the_vocabulary_counts_end_of_text_which_is_no_text(tokenizer):
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0
    assert tokenizer.decode([tokenizer.end_of_text]) == ""
    assert tokenizer.stop_tokens == (tokenizer.end_of_text,)


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "folder")
    loaded = tokenizers.load(tmp_path / "deep" / "folder")
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode(PROSE[0]), tokenizer.encode(PROSE[0]))


def test_char_holds_its_characters_and_refuses_others_by_name_and_place():
    tokenizer = tokenizers.train("char", ["hello", "wörld\n"], vocab_size=0, model="")
    assert tokenizer.vocab_size == len(set("hellowörld\n")) + 1
    ids = tokenizer.encode("hörd")
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == "hörd"
    assert tokenizer.token_bytes[ids].tolist() == [1, 2, 1, 1]
    for text in ("hexe", "heXe", "he\U0001f600e"):
        with pytest.raises(ConfigError, match=r"U\+[0-9A-F]{4,} at position|at position") as caught:
            tokenizer.encode(text)
        assert f"{text[2]!r} (U+{ord(text[2]):04X}) at position 2" in str(caught.value)


def test_char_survives_saving(tmp_path):
    tokenizer = tokenizers.train("char", ["añ\u2028\n"], vocab_size=0, model="")
    tokenizer.save(tmp_path)
    assert tokenizers.load(tmp_path).characters == tokenizer.characters


def test_a_lone_surrogate_is_refused_by_place(tokenizer):
    with pytest.raises(ConfigError, match=r"at position 2 is a lone surrogate"):
        tokenizer.encode("ab\ud800")


def test_unknown_names_and_unreadable_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer=words: no such tokenizer; use byte"):
        tokenizers.train("words", (), vocab_size=0, model="")
    with pytest.raises(ConfigError, match="no readable tokenizer"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"name": "sentencepiece"}')
    (tmp_path / "sentencepiece.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="no readable tokenizer"):
        tokenizers.load(tmp_path)
