"""Words between spaces: which are kept, what stands for the others, and back."""

import numpy as np
import pytest

from lm import checkpoint, train
from lm import workdir as workdirs
from lm.complete import Sampling
from lm.config import ConfigError
from lm.data import corpus, settings, tokenizers, words

TEXT = " no it was n't black monday \n but while it <unk> was N \n it"


def test_the_most_frequent_words_are_kept_and_others_are_unknown():
    tokenizer = words.train([TEXT], vocab_size=6)
    assert tokenizer.words == ["<unk>", "<eos>", "it", "was", "N"]  # of those seen once, the first
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (6, 5)
    assert tokenizer.encode("it N dog\nwas <unk>\n").tolist() == [2, 4, 0, 1, 3, 0, 1]
    assert tokenizer.encode("").tolist() == tokenizer.encode("  \t ").tolist() == []
    assert tokenizer.encode("\n\n").tolist() == [1, 1]
    assert tokenizer.encode("it").dtype == np.int32


def test_a_run_ends_with_a_sample_and_goes_on(tiny, tmp_path, capsys):
    config = tiny(data__tokenizer="word", data__vocab_size=64, train__sample_tokens=4)
    train.run(config, tmp_path)
    completer = workdirs.completer(tmp_path, checkpoint.load(tmp_path))
    (text,) = completer.complete(["the cat"], Sampling(max_tokens=4, temperature=0.0))
    assert all(word in completer.tokenizer.words for word in text.split())
    assert text.startswith((" ", "\n")), "what goes on is a word of its own"


def test_bits_per_byte_are_not_guessed(tiny, tmp_path):
    config = tiny(data__tokenizer="word", data__vocab_size=64)
    scores = train.run(config, tmp_path / "run")
    assert "eval/loss" in scores and "eval/bits_per_byte" not in scores
    config.checkpoint = {"best_metric": "eval/bits_per_byte"}
    with pytest.raises(ConfigError, match=r"the ids of word do not tell how many bytes.*eval/loss"):
        train.run(config, tmp_path / "best")


def test_a_vocabulary_larger_than_the_text_is_as_large_as_the_text():
    tokenizer = words.train([TEXT], vocab_size=100)
    assert tokenizer.vocab_size == 9 + 3
    ids = tokenizer.encode(TEXT)
    assert (ids == 0).sum() == 1 and (ids == 1).sum() == 2  # <unk> is the text's own
    assert tokenizer.decode(ids) == "no it was n't black monday\nbut while it <unk> was N\nit"


def test_words_one_space_apart_come_back_and_count_their_bytes():
    text = "it was black\nmonday it was\n"
    tokenizer = words.train([TEXT], vocab_size=100)
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids[:3], tokenizer.end_of_text, *ids[3:]]) == text
    # A word has the space after it; here two have the newline there, which is a token of its own.
    assert tokenizer.token_bytes[ids].sum() == len(text) + 2
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0


def test_an_id_past_the_vocabulary_is_told_apart():
    tokenizer = words.train([TEXT], vocab_size=6)
    assert tokenizer.decode([2, 6, 3]) == f"it {tokenizers.UNKNOWN} was"


def test_what_looks_like_a_newline_token_in_the_text_is_a_word_that_is_unknown():
    tokenizer = words.train(["<eos> <eos> a"], vocab_size=10)
    assert tokenizer.encode("a <eos>").tolist() == [2, 0]


def test_words_survive_saving(tmp_path):
    tokenizer = tokenizers.train("word", [TEXT], vocab_size=7, model="")
    tokenizer.save(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert loaded.words == tokenizer.words and loaded.fingerprint == tokenizer.fingerprint
    other = words.train([TEXT], vocab_size=8)
    assert other.fingerprint != tokenizer.fingerprint


def test_a_corpus_of_words_is_made_of_its_training_text_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a b a\n" * 9 + "c a b\n" * 1)
    fields = {
        "path": (str(tmp_path / "text.txt"),),
        "tokenizer": "word",
        "validation_fraction": 0.1,
    }
    made = corpus.build(settings.Config(**fields, vocab_size=5))
    assert made.tokenizer.words == ["<unk>", "<eos>", "a", "b"]
    assert made.validation.tokens.tolist() == [4, 0, 2, 3, 1, 4]
    # Another size is another vocabulary, and not what the cache holds.
    smaller = corpus.build(settings.Config(**fields, vocab_size=4))
    assert smaller.tokenizer.words == ["<unk>", "<eos>", "a"]


def test_no_room_for_a_word_is_refused():
    with pytest.raises(ConfigError, match=r"data\.vocab_size=3: .* use 4 or more"):
        words.train([TEXT], vocab_size=3)


def test_a_lone_surrogate_is_refused_by_place():
    with pytest.raises(ConfigError, match="at position 1 is a lone surrogate"):
        words.train([TEXT], vocab_size=6).encode("a\ud800")


def test_counting_holds_no_more_than_so_many_words(monkeypatch):
    monkeypatch.setattr(words, "_MOST_WORDS", 100)
    texts = [f"the cat and rare{i} the once{i}" for i in range(1000)]
    assert words.train(texts, vocab_size=6).words[2:] == ["the", "and", "cat"]
    assert words.train(texts[:10], vocab_size=99).vocab_size == 3 + 3 + 20
    assert len(words.train(texts, vocab_size=9999).words) <= 2 + 100 + 6


def test_a_continuation_is_apart_from_the_words_before_it():
    tokenizer = words.train(["the dog barks loud\n"], vocab_size=20)
    ids = tokenizer.encode("barks\nloud").tolist()
    assert tokenizer.decode_behind("the dog", ids) == " barks\nloud"
    assert tokenizer.decode_behind("the dog ", ids) == "barks\nloud"
    assert tokenizer.decode_behind("the dog\nthe", [1, *ids]) == "\nbarks\nloud"
    assert tokenizer.decode_behind("the dog", []) == ""
