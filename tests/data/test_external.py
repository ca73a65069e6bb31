"""Tokenizers of others: their ids, decode(encode(x)) == x, bytes, and no special token out of a text."""

import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers as huggingface
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lm.config import ConfigError
from lm.data import corpus, external, llama2c, tokenizers
from lm.data.settings import Config

TEXT = ["the cat sat on the mat, and the dog ran to the sea.\n  Then café <|endoftext|> </s> é"] * 9
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
STORIES = Path(__file__).parents[2].parent / "shared" / "data" / "stories260k_llama"


def byte_level(end="<|endoftext|>"):
    """GPT-2's kind."""
    library = huggingface.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXT, trainer)
    return library


def prefixed():
    """Llama 2's kind: a space before the text, bytes where a character has no piece, <s> first."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["\u2581", *"abcdethmsrniolug<>/,.", "th", "the", "\u2581the", "\u2581a"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "a")]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True,
    )  # fmt: skip
    library = huggingface.Tokenizer(model)
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return library


def unigram():
    """T5's kind, whose model itself finds </s> in a text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(c, -5.0) for c in "\u2581abcdefgh</s>"]
    library = huggingface.Tokenizer(models.Unigram(pieces, unk_id=2))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return library


def opened(library, folder, **files):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(library.to_str())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return external.open_tokenizer(folder)


def llama2c_file(pieces):
    """Return a llama2.c file of (score, bytes) after the special pieces and the bytes."""
    whole = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n")]
    whole += [(0.0, f"<0x{byte:02X}>".encode()) for byte in range(256)] + list(pieces)
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for score, piece in whole)
    return struct.pack("<i", max(len(piece) for _, piece in whole)) + body


PIECES = [(-1.0, b" t"), (-2.0, b"he"), (-3.0, b" the"), (-4.0, b"th"), (-0.5, b"aa")]
PIECES += [(-9.0, c.encode()) for c in " theacds<>"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return opened(byte_level(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    return opened(prefixed(), tmp_path_factory.mktemp("llama"), tokenizer_config=named)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    file = tmp_path_factory.mktemp("stories") / "tok.bin"
    file.write_bytes(llama2c_file(PIECES))
    return external.open_tokenizer(file)


KINDS = ["gpt2", "llama", "stories"]


@pytest.mark.parametrize("kind", KINDS)
@given(
    text=ANY_TEXT | st.sampled_from(["<s>", "</s> the", "<|endoftext|>", "<unk><0x0A>", " ", "\n"])
)
@settings(deadline=None, max_examples=150)
def test_a_document_decodes_to_itself_and_holds_no_special_token(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert not set(tokenizer.stop_tokens) & set(ids.tolist())
    if "\u2581" not in text or kind != "llama":  # which Llama's own tokenizer writes for a space
        assert tokenizer.decode([tokenizer.end_of_text, *ids]) == text
    prefix = kind != "gpt2" and text != ""
    assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + prefix
    assert tokenizer.counts_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_text_keeps_its_space(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("the cat the the").tolist()
    for cut in range(1, len(ids)):
        before = tokenizer.decode([tokenizer.end_of_text, *ids[:cut]])
        assert before + tokenizer.decode(ids[cut:]) == "the cat the the"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_past_the_vocabulary_and_unknown_text_are_replaced(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("the").tolist()
    end = tokenizer.end_of_text
    past = [end, *ids, tokenizer.vocab_size, *tokenizer.stop_tokens, tokenizer.vocab_size + 99]
    assert tokenizer.decode([*past, *ids]).replace(" ", "") == "the\ufffd\ufffdthe"
    if kind != "gpt2":
        assert tokenizer.decode([end, *ids, 0]) == "the\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_byte_for_byte(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path / "run")
    for loaded in (tokenizers.load(tmp_path / "run"), external.open_tokenizer(tmp_path / "run")):
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.specials, loaded.stop_tokens) == (tokenizer.specials, tokenizer.stop_tokens)
        np.testing.assert_array_equal(loaded.encode(TEXT[0]), tokenizer.encode(TEXT[0]))
    (file,) = [f for f in (tmp_path / "run").iterdir() if f.name != "tokenizer.json"]
    assert file.read_bytes() == tokenizer.content


@pytest.mark.parametrize("kind", KINDS)
def test_many_texts_at_once_are_each_encoded_alone(kind, request):
    tokenizer = request.getfixturevalue(kind)
    texts = ["the cat", "", " \n", "é"]
    for ids, text in zip(tokenizer.encode_all(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_ids_are_the_library_s_own(tmp_path):
    for name, library in (("byte_level", byte_level()), ("prefixed", prefixed())):
        ids = opened(library, tmp_path / name, config={"eos_token_id": [2, 0]}).encode("the\ncat é")
        assert ids.tolist() == library.encode("the\ncat é", add_special_tokens=False).ids


def test_the_end_of_text_is_what_the_tokenizer_begins_with_or_else_its_end(gpt2, llama, stories):
    assert (gpt2.end_of_text, gpt2.stop_tokens) == (0, (0,))
    assert (llama.end_of_text, llama.stop_tokens) == (1, (1, 2))
    assert (stories.end_of_text, stories.stop_tokens) == (1, (1, 2))
    assert llama.specials == {"bos": 1, "eos": 2, "unk": 0}


def word_piece():
    """BERT's kind."""
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "cat",
        "sat",
        "##s",
        ".",
        "[",
        "]",
    ]
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    library = huggingface.Tokenizer(model)
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    library.add_special_tokens(pieces[:5])
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return library


def test_the_token_of_a_class_is_not_the_end_of_a_text(tmp_path):
    tokenizer = opened(word_piece(), tmp_path)
    assert tokenizer.specials == {"unk": 1, "sep": 3, "pad": 0, "cls": 2, "mask": 4}
    assert (tokenizer.end_of_text, tokenizer.stop_tokens) == (3, (3,))
    ids = tokenizer.encode("the cats [MASK] sat.").tolist()
    assert ids == [5, 6, 8, 10, 1, 11, 7, 9]
    assert tokenizer.decode([7]) == "sat" and tokenizer.decode([3, 5, 6, 8]) == "the cats"
    np.testing.assert_array_equal(tokenizer.token_bytes[[5, 8, 3]], [3, 1, 0])
    assert not tokenizer.counts_bytes


def test_a_tokenizer_is_the_same_each_time_and_loses_nothing_in_silence(tmp_path):
    library = byte_level()
    library.model.dropout = 0.5
    tokenizer = opened(library, tmp_path / "dropout")
    assert len({tuple(tokenizer.encode("the cat sat on the mat").tolist()) for _ in range(9)}) == 1

    few = huggingface.Tokenizer(models.BPE())
    few.pre_tokenizer, few.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    few.train_from_iterator(["abc"], trainers.BpeTrainer(special_tokens=["<|endoftext|>"]))
    with pytest.raises(ConfigError, match=r"no token for \d+ bytes and none for what is unknown"):
        opened(few, tmp_path / "few", tokenizer_config={"eos_token": "<|endoftext|>"})

    model = models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>")
    words = opened(
        huggingface.Tokenizer(model), tmp_path / "words", tokenizer_config={"eos_token": "</s>"}
    )
    with pytest.raises(ConfigError, match="UNK"):
        words.encode("hello")


def test_what_loses_bytes_of_a_text_does_not_count_them(tmp_path):
    settings = json.loads(prefixed().to_str())
    settings["model"]["byte_fallback"] = False
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    without = huggingface.Tokenizer.from_str(json.dumps(settings))
    assert not opened(without, tmp_path / "without", tokenizer_config=named).counts_bytes
    assert not opened(unigram(), tmp_path / "unigram").counts_bytes  # <unk> may be anything
    for name, normalizer, counts in (
        ("none", None, True),
        ("nfc", normalizers.Sequence([normalizers.NFC()]), True),
        ("lower", normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]), False),
    ):
        library = byte_level()
        if normalizer:
            library.normalizer = normalizer
        assert opened(library, tmp_path / name).counts_bytes is counts


def test_t5_s_extra_ids_are_sentinels(tmp_path):
    library = unigram()
    library.add_special_tokens(["<extra_id_1>", "<extra_id_0>"])
    tokenizer = opened(library, tmp_path)
    first = library.token_to_id("<extra_id_1>")
    assert tokenizer.specials["sentinel_0"] == first + 1
    assert tokenizer.specials["sentinel_1"] == first
    assert tokenizer.end_of_text == 1
    assert not {first, first + 1} & set(tokenizer.encode("a <extra_id_0> b").tolist())


def test_roles_are_read_from_the_files_beside_it(tmp_path):
    library = byte_level(end="<end>")
    with pytest.raises(ConfigError, match="names no token for the end of a text"):
        opened(library, tmp_path / "none")
    for name, content in (
        ("tokenizer_config", {"eos_token": "<end>"}),
        ("special_tokens_map", {"eos_token": {"content": "<end>"}}),
        ("config", {"eos_token_id": 0}),
        ("config", {"eos_token_id": [0, 7]}),
    ):
        folder = tmp_path / f"{name}{len(str(content))}"
        assert opened(library, folder, **{name: content}).end_of_text == 0


FRAMES = {
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    "template": processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    ),
}
FRAMES["several"] = processors.Sequence([processors.ByteLevel(), FRAMES["template"]])


@pytest.mark.parametrize("kind", FRAMES)
def test_the_tokens_around_a_text_are_those_of_a_class_and_between_two(kind, tmp_path):
    """Where no other file names them, as beside roberta-base."""
    library = prefixed()
    library.post_processor = FRAMES[kind]
    ids = (
        {"eos_token_id": 2}
        if kind in ("template", "several")
        else {"bos_token_id": 1, "eos_token_id": 2}
    )
    tokenizer = opened(library, tmp_path, config=ids)
    assert (tokenizer.specials["cls"], tokenizer.specials["sep"]) == (1, 2)
    assert (tokenizer.end_of_text, tokenizer.stop_tokens) == (2, (2,))


def test_what_begins_every_text_is_no_token_of_a_class(tmp_path):
    library = prefixed()
    library.post_processor = FRAMES["template"]
    tokenizer = opened(library, tmp_path, tokenizer_config={"bos_token": "<s>"})
    assert not {"cls", "sep"} & set(tokenizer.specials)
    assert tokenizer.stop_tokens == (1, 2)


def test_all_ids_of_an_end_stop_a_text(tmp_path):
    """As Llama 3's: the end of a text, of a message and of a turn."""
    library = prefixed()
    ends = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    library.add_special_tokens(ends)
    first, second, third = map(library.token_to_id, ends)
    tokenizer = opened(
        library, tmp_path / "in", tokenizer_config={"eos_token": ends[2]},
        config={"eos_token_id": [first, 5]}, generation_config={"eos_token_id": [first, second, 10**6]},
    )  # fmt: skip
    assert tokenizer.specials["eos"] == third and tokenizer.end_of_text == 1
    assert tokenizer.stop_tokens == (1, first, second, third)  # 5 is text
    tokenizer.save(tmp_path / "out")
    again = tokenizers.load(tmp_path / "out")
    assert again.stop_tokens == tokenizer.stop_tokens and again.specials == tokenizer.specials


def test_a_special_token_that_the_model_itself_finds_becomes_its_characters(tmp_path):
    tokenizer = opened(unigram(), tmp_path)
    assert tokenizer.end_of_text == 1
    ids = tokenizer.encode("ab</s>cd").tolist()
    assert 1 not in ids and tokenizer.decode([1, *ids]) == "ab</s>cd"


def test_gpt2_s_two_files_make_the_same_tokenizer(gpt2, tmp_path):
    model = json.loads(gpt2.content)["model"]
    vocabulary = {**model["vocab"], "name": len(model["vocab"])}  # what marks a file of ours
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    lines = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    tokenizer = external.open_tokenizer(tmp_path)
    assert tokenizer.end_of_text == gpt2.end_of_text
    np.testing.assert_array_equal(tokenizer.encode(TEXT[0]), gpt2.encode(TEXT[0]))


@given(text=st.text("theacds <>\n\u00e9", max_size=40))
@settings(deadline=None, max_examples=100)
def test_llama2c_joins_the_best_score_first_and_the_leftmost(text):
    """Against a scan of all neighbours for each joint."""
    tokenizer = llama2c.Llama2C(llama2c_file(PIECES))
    known = {piece: 259 + i for i, (_, piece) in reversed(list(enumerate(PIECES)))}
    ids = []
    for character in f" {text}" if text else "":
        piece = character.encode()
        ids += [known[piece]] if piece in known else [3 + byte for byte in piece]
    while True:
        pairs = [tokenizer._pieces[a] + tokenizer._pieces[b] for a, b in itertools.pairwise(ids)]
        scores = [PIECES[known[pair] - 259][0] if pair in known else -1e9 for pair in pairs]
        if max(scores, default=-1e9) == -1e9:
            break
        at = int(np.argmax(scores))
        ids[at : at + 2] = [known[pairs[at]]]
    assert tokenizer.encode(text).tolist() == ids


def test_a_run_reads_its_text_with_a_given_tokenizer(tmp_path, text_file):
    file = tmp_path / "tok.bin"
    file.write_bytes(llama2c_file(PIECES))
    cfg = Config(path=(str(text_file),), tokenizer="file", tokenizer_path=str(file))
    made = corpus.build(cfg)
    assert made.tokenizer.fingerprint == external.open_tokenizer(file).fingerprint
    text = text_file.read_text()
    whole = np.concatenate([made.train.tokens[:-1], made.validation.tokens])
    parts = np.split(whole, np.flatnonzero(whole == 1))
    assert "".join(made.tokenizer.decode(part) for part in parts) == text
    with pytest.raises(ConfigError, match=r"data\.tokenizer=file: .*data\.tokenizer_path"):
        Config(tokenizer="file")


def model(**fields):
    return json.dumps({"version": "1.0", "added_tokens": [], "model": fields}).encode()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b"[" * 100_000, "not a JSON object"),
        ("tokenizer.json", b"\xff\xfe", "not a JSON object"),
        ("tokenizer.json", b"", "not a JSON object"),
        ("tokenizer.json", model(type="WordLevel", vocab={}, unk_token="?"), "not a tokenizer"),
        ("tokenizer.json", model(type="Unigram", vocab=[]), "not a tokenizer"),
        ("tokenizer.json", model(type="WordLevel", vocab={"a": 2**25}, unk_token="a"), "ids up to"),
        ("tok.bin", b"", "not a tokenizer of llama2.c's"),
        ("tok.bin", llama2c_file(PIECES)[:-1], "not a tokenizer of llama2.c's"),
        ("tok.bin", llama2c_file([(float("nan"), b"a")]), "score nan"),
        ("tok.bin", struct.pack("<ifi", 9, 0.0, -8), "size of -8"),
        ("tok.bin", struct.pack("<ifi", 9, 0.0, 2**31 - 1), "size of 2147483647"),
        ("tok.bin", struct.pack("<i", 9), "256 bytes"),
        ("tokenizer.model", b"sentencepiece", "AutoTokenizer.from_pretrained"),
        ("other.txt", b"", "no tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_one_line_that_names_the_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name if name == "tokenizer.model" else tmp_path
    with pytest.raises(ConfigError) as caught:
        external.open_tokenizer(path)
    message = str(caught.value)
    assert words in message and str(tmp_path) in message and "\n" not in message


def test_a_broken_file_beside_it_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: not a JSON object"):
        opened(byte_level(), tmp_path, tokenizer_config=[1])


def test_a_file_too_large_to_be_a_tokenizer_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(external, "MAX_BYTES", 10)
    (tmp_path / "tok.bin").write_bytes(llama2c_file(PIECES))
    with pytest.raises(ConfigError, match="too many for a tokenizer"):
        external.open_tokenizer(tmp_path)


def test_the_published_tokenizer_is_read():
    if not STORIES.exists():
        pytest.skip(f"{STORIES} is absent")
    tokenizer = external.open_tokenizer(STORIES)
    text = "Once upon a time, there was a little girl named Lily.\n"
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 512 and ids[:5].tolist() == [403, 407, 261, 378, 432]
    assert tokenizer.decode([1, *ids]) == text
