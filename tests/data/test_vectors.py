"""Word vectors of three formats, whole and damaged, and the embeddings that they begin."""

import gzip
import struct
import tracemalloc

import jax
import numpy as np
import pytest

from lm import checkpoint, experiment, initial, sharding, train
from lm.config import ConfigError
from lm.data import vectors

WORDS = {"the": [1.0, -2.5, 0.25], "cat": [3.0, 0.5, -1.0], "größe": [0.1, 0.2, 0.3]}


def glove():
    return "".join(f"{w} {' '.join(map(str, v))}\n" for w, v in WORDS.items()).encode()


def word2vec_text():
    return b"3 3\n" + glove()


def word2vec_binary(end=b"\n"):
    rows = (w.encode() + b" " + struct.pack("<3f", *v) + end for w, v in WORDS.items())
    return b"3 3\n" + b"".join(rows)


def read(tmp_path, content, ids, name="vectors.bin"):
    (tmp_path / name).write_bytes(content)
    return vectors.read(tmp_path / name, ids, field="train.vectors")


@pytest.mark.parametrize(
    "content", [glove(), word2vec_text(), word2vec_binary(), word2vec_binary(end=b"")]
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_format_gives_the_words_that_are_wanted(tmp_path, content, suffix):
    packed = gzip.compress(content, mtime=0) if suffix else content
    ids, found = read(tmp_path, packed, {"größe": 7, "cat": 2, "dog": 1}, f"vectors{suffix}")
    assert ids.tolist() == [2, 7]
    np.testing.assert_array_equal(found, np.array([WORDS["cat"], WORDS["größe"]], np.float32))


def test_a_word_that_is_kept_keeps_no_block_of_the_file(tmp_path):
    """Of 16 MB of vectors 16 are wanted, of 16 blocks that are read."""
    rows = (f"w{i} ".encode() + np.full(256, i, "<f4").tobytes() for i in range(1 << 14))
    (tmp_path / "large.bin").write_bytes(b"16384 256\n" + b"".join(rows))
    wanted = {f"w{1024 * i + 500}": i for i in range(16)}
    tracemalloc.start()
    ids, _ = vectors.read(tmp_path / "large.bin", wanted, field="train.vectors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(ids) == 16 and peak < 8 << 20


def test_the_first_of_two_counts(tmp_path):
    _, found = read(tmp_path, b"a 1 2\na 3 4\n", {"a": 0})
    assert found.tolist() == [[1, 2]]


def test_a_word_may_have_spaces(tmp_path):
    ids, found = read(
        tmp_path, b"the 1 2\n. . . 3 4\nto me@x.y 5 6\n", {". . .": 0, "to me@x.y": 1}
    )
    assert ids.tolist() == [0, 1] and found.tolist() == [[3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1"),
        (b"just text, no numbers\n", "line 1"),
        (b"a 1 2\nb 1\n", "vectors of \\[1, 2\\]"),
        (b"b 1 2\na 1 2 3\n", "vectors of \\[2, 3\\]"),
        (b"b 1 2\nx . a 3\n", "line 2 is no word"),
        (b"a 1 nan\n", "not finite"),
        (b"5 3\n" + glove(), "word 4 of 5"),
        (word2vec_binary()[:-7], "word 3 of 3"),
        (b"9 3\n" + word2vec_binary()[4:], "word 4 of 9"),
        (b"99999999999 99999999999\nx", "vectors of 99999999999 numbers"),
        (b"3 3\n" + bytes(1000), "word 1 of 3"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, words):
    with pytest.raises(ConfigError, match=rf"train\.vectors=.*vectors\.bin.*{words}"):
        read(tmp_path, content, {"a": 0, "b": 1})


def vectors_of(path, letters, size):
    rng = np.random.default_rng(0)
    rows = {letter: rng.normal(size=size).round(3) for letter in letters}
    path.write_text("".join(f"{k} {' '.join(map(str, v))}\n" for k, v in rows.items()))
    return rows


@pytest.mark.parametrize("freeze", [False, True])
def test_a_run_starts_from_them_and_may_leave_them(tiny, tmp_path, capsys, freeze):
    rows = vectors_of(tmp_path / "letters.txt", "aeiou", 32)
    config = tiny(train__vectors=str(tmp_path / "letters.txt"), train__freeze_vectors=freeze)
    train.run(config, tmp_path / "run")
    assert "vectors:" in capsys.readouterr().out
    table = jax.device_get(checkpoint.load(tmp_path / "run").params)["embed"]["embedding"]
    for letter, row in rows.items():
        same = np.allclose(table[ord(letter)], row, atol=1e-6)
        assert same == freeze, letter


@pytest.mark.parametrize(
    ("letters", "size", "words"),
    [("ae", 31, "vectors of 31 numbers.*has 32"), ("äö", 32, "none of the")],
)
def test_vectors_that_do_not_fit_are_refused(tiny, tmp_path, letters, size, words):
    vectors_of(tmp_path / "letters.txt", letters, size)
    with pytest.raises(ConfigError, match=words):
        train.run(tiny(train__vectors=str(tmp_path / "letters.txt")), tmp_path / "run")


FAMILIES = {
    "rnn": ({"embed_dim": 8, "model_dim": 16, "num_layers": 1}, "causal_lm"),
    "linear_rnn": ({"model_dim": 8, "num_layers": 1, "num_heads": 2}, "causal_lm"),
    "bert": ({"model_dim": 8, "num_layers": 1, "num_heads": 2}, "masked_lm"),
    "seq2seq": ({"model_dim": 8, "num_layers": 1}, "span_corruption"),
    "t5": ({"model_dim": 8, "num_layers": 1, "num_heads": 2}, "span_corruption"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_with_an_embedding_starts_from_them(tiny, tmp_path, name):
    rows = vectors_of(tmp_path / "letters.txt", "aeiou", 8)
    (model, task) = FAMILIES[name]
    config = tiny(
        model={"name": name, **model},
        task={"name": task},
        train__vectors=str(tmp_path / "letters.txt"),
    )
    made = experiment.build(config)
    with sharding.use(made.mesh):
        params = initial.fresh_state(made, experiment.jitted(made)[0]).params
    table = jax.device_get(params)["embed"]["embedding"]
    for letter, row in rows.items():
        np.testing.assert_allclose(table[ord(letter)], row, rtol=1e-6)
    assert np.abs(table[ord("b")]).max() > 0


def test_a_family_without_an_embedding_refuses_them(tiny, tmp_path):
    """Also where a file of settings, and no flag, asks for them."""
    vectors_of(tmp_path / "letters.txt", "aeiou", 8)
    config = tiny(model={"name": "ngram"}, train__vectors=str(tmp_path / "letters.txt"))
    with pytest.raises(
        ConfigError, match=r"train\.vectors=.*model\.name='ngram' has no embedding.*leave"
    ):
        train.run(config, tmp_path / "run")


def test_freezing_needs_vectors(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.freeze_vectors"):
        train.run(tiny(train__freeze_vectors=True), tmp_path)
