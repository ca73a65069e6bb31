"""What looks like a special token in a text is text, for every kind of tokenizer; symbols alone are found."""

import json

import pytest
import tokenizers as huggingface
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lm.data import external, tokenizers

MARKS = [
    "<|endoftext|>",
    "<|eot|>",
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<mask>",
    "<eos>",
    "[MASK]",
    "[CLS]",
]
MARKS += ["[SEP]", "[UNK]", "[PAD]", "<extra_id_0>", "<0x0A>", "<|user|>"]
TEXT = f"the cat sat on the mat; é {' '.join(MARKS)} <br> [x] the end."
TEXTS = st.lists(st.sampled_from([*MARKS, *TEXT.split(), " ", "\n"]), max_size=12).map("".join)


def byte_pairs(specials, single="$A"):
    """GPT-2's kind; with what begins a text, RoBERTa's and Llama 3's."""
    library = huggingface.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TEXT] * 9, trainer)
    named = [(token, library.token_to_id(token)) for token in single.split() if token != "$A"]
    if named:
        library.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    return library


def word_pieces():
    """BERT's kind."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library = huggingface.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=specials, show_progress=False
    )
    library.train_from_iterator([TEXT] * 9, trainer)
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return library


def unigram():
    """T5's kind, with pieces that the model itself could find, and llama-like symbols that are none."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(c, -5.0) for c in sorted(set(TEXT) | {"\u2581", "\n"})] + [("\u2581the", -2.0)]
    library = huggingface.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    library.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return library


GIVEN = {
    "gpt2": lambda: byte_pairs(["<|endoftext|>"]),
    "roberta": lambda: byte_pairs(
        ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)], "<s> $A </s>"
    ),
    "llama3": lambda: byte_pairs(["<|endoftext|>", "<|eot|>", "<|user|>"], "<|endoftext|> $A"),
    "bert": word_pieces,
    "t5": unigram,
}
TRAINED = ("byte", "char", "word", "unigram", "bpe", "byte_bpe")


@pytest.fixture(scope="module", params=[*GIVEN, *TRAINED])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def opened(kind, tmp_path_factory):
    """Return the tokenizer and the ids of its special tokens."""
    if kind in GIVEN:
        file = tmp_path_factory.mktemp(kind) / "tokenizer.json"
        library = GIVEN[kind]()
        file.write_text(library.to_str())
        tokenizer = external.open_tokenizer(file)
        special = {i for i, t in library.get_added_tokens_decoder().items() if t.special}
        return tokenizer, special - {library.token_to_id("<unk>"), library.token_to_id("[UNK]")}
    name = "sentencepiece" if kind in ("unigram", "bpe") else kind
    size = {"word": 99, "byte_bpe": 300}.get(kind, 320)
    tokenizer = tokenizers.train(name, [TEXT + "\n"] * 9, vocab_size=size, model=kind)
    return tokenizer, set()


@given(text=TEXTS)
@example(text="".join(MARKS))
@example(text=" ".join(MARKS))
@settings(deadline=None, max_examples=60)
def test_no_text_is_encoded_as_a_special_token(kind, opened, text):
    tokenizer, special = opened
    ids = set(tokenizer.encode(text).tolist())
    assert not ids & {*special, *tokenizer.stop_tokens, tokenizer.end_of_text}
    if kind not in ("word", "bert", "t5"):  # which lose spaces
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_special_tokens_are_there_all_the_same(kind, opened):
    tokenizer, special = opened
    assert 0 <= tokenizer.end_of_text < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.end_of_text]) == ""
    assert not special or special >= set(tokenizer.stop_tokens)


def test_a_token_that_a_file_adds_as_text_is_found_in_a_text(tmp_path):
    library = byte_pairs(["<|endoftext|>"])
    library.add_tokens([AddedToken("<|user|>", normalized=False)])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    tokenizer = external.open_tokenizer(tmp_path)
    wanted = library.token_to_id("<|user|>")
    assert tokenizer.encode("<|endoftext|><|user|>").tolist().count(wanted) == 1
    assert json.loads(tokenizer.content)["added_tokens"][-1]["special"] is False


CUT = {
    "gpt2": "\\S(?=[ \\n]\\w)",
    "roberta": "\\S(?=[ \\n]\\w)",
    "bert": "\\S(?=[ \\n]\\w)",
    "t5": "\\S(?= \\w)",
}


@pytest.mark.parametrize("name", CUT)
def test_a_long_text_is_cut_where_that_changes_no_id(name, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text(GIVEN[name]().to_str())
    tokenizer = external.open_tokenizer(tmp_path)
    assert tokenizer._cut.pattern == CUT[name]
    text = f"{TEXT}\nthe  12 cat's\n\n  {TEXT}\u4e0d\n\u4e0d " * 3
    whole = tokenizer.encode(text).tolist()
    monkeypatch.setattr(external, "_CHUNK", 1)
    monkeypatch.setattr(external, "_BATCH", 20)
    assert len(tokenizer._parts(text)) > 50
    assert "".join(tokenizer._parts(text)) == text
    assert [ids.tolist() for ids in tokenizer.encode_all([text, "", text])] == [whole, [], whole]


def test_words_that_go_over_spaces_or_take_newlines_are_not_cut_there(tmp_path):
    library = byte_pairs(["<|endoftext|>"])
    cl100k = huggingface.Regex(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for splitter, wanted in (
        (pre_tokenizers.Split(cl100k, "isolated"), external._CUTS[1][0]),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), external._CUTS[2][0]),
        (pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None),
    ):
        library.pre_tokenizer = splitter
        (tmp_path / "tokenizer.json").write_text(library.to_str())
        assert external.open_tokenizer(tmp_path)._cut == wanted
    library = byte_pairs(["<|endoftext|>"])
    library.add_tokens([AddedToken("cat sat", normalized=False)])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    assert external.open_tokenizer(tmp_path)._cut is None
