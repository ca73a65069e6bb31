"""Text to token ids and back: bytes, characters, SentencePiece, behind one small interface.

Every vocabulary holds one id that is no text, end of text. What looks like a special token inside a
document is encoded as the plain characters it is.

SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226; unigram: Kudo 2018, arXiv 1804.10959;
BPE: Sennrich et al. 2015, arXiv 1508.07909). What differs here: nothing in the text is normalised,
so decode(encode(x)) == x. A newline with the indentation after it is one token; U+2581, with which
the library writes a space, is encoded as its bytes; training reads lines, an even sample of a large
corpus, with a thread count of its own, so that every machine trains the same pieces.
"""

import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from lm.config import ConfigError

NAMES = ("byte", "char", "word", "sentencepiece", "file")
_SPACE = "\u2581"
# One space fewer than the usual indentations as well: the last one belongs to the word after it.
_NEWLINES = [
    *("\n" + _SPACE * spaces for spaces in range(17)),
    *("\n\n" + _SPACE * spaces for spaces in (0, 3, 7)),
]
_TRAIN_BYTES = 16 << 20  # about half a minute of unigram training; more text moves few pieces
_TRAIN_THREADS = 4  # a constant: the sums of unigram training depend on it in their last bits
_LINE = 1000  # characters; longer lines are trained on in parts
_NO_IDS = np.zeros(0, np.int32)
UNKNOWN = "\ufffd"
_CHUNK = 1 << 16  # characters encoded at a time: bounds the memory of one long document


class Tokenizer:
    """Encode text as int32 ids below `vocab_size` and decode them.

    `end_of_text` is the id between documents, counted in `vocab_size`; a text that is made ends before any
    of `stop_tokens`. `token_bytes` int32 [vocab_size] is how many bytes of UTF-8 text each id stands for (0
    for end of text), so the sum over an encoded text is the text's size. `fingerprint` is a hex digest of
    all that encoding depends on.
    """

    name: str
    vocab_size: int
    end_of_text: int
    stop_tokens: tuple[int, ...]
    token_bytes: np.ndarray
    fingerprint: str
    specials: Mapping[str, int] = {}  # ids by the tasks' names: cls, sep, mask, sentinel_0, ...

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`. Raises ConfigError for what the vocabulary cannot hold."""
        raise NotImplementedError

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; end of text is no text.

        A broken byte sequence is U+FFFD, and so is an id past the vocabulary: a model's may be larger.
        """
        raise NotImplementedError

    def piece(self, index: int) -> str:
        """Return the text of one id as it stands in a text: behind a space where it begins a word."""
        return self.decode([index])

    def save(self, folder: str | Path) -> None:
        """Write what `load` needs into `folder`, which is made where missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        settings = {"name": self.name, **self._settings()}
        (Path(folder) / "tokenizer.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def _settings(self) -> dict[str, Any]:
        return {}


class Byte(Tokenizer):
    """The 256 bytes of UTF-8."""

    name = "byte"
    vocab_size = 257
    end_of_text = 256
    stop_tokens = (256,)
    token_bytes = np.array([1] * 256 + [0], np.int32)
    fingerprint = "byte"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(checked(text).encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        known = (min(int(i), self.vocab_size) for i in ids)
        return b"".join(
            UNKNOWN.encode() if i == self.vocab_size else bytes([i])
            for i in known
            if i != self.end_of_text
        ).decode(errors="replace")


class Char(Tokenizer):
    """The characters given, in order of code point."""

    name = "char"

    def __init__(self, characters: Iterable[str]):
        self.characters = "".join(sorted(set(characters)))
        codes = np.array([ord(c) for c in self.characters], np.int64)
        self.end_of_text = len(codes)
        self.stop_tokens = (self.end_of_text,)
        self.vocab_size = len(codes) + 1
        sizes = [len(c.encode()) for c in self.characters]
        self.token_bytes = np.array([*sizes, 0], np.int32)
        self.fingerprint = f"char-{digest(self.characters.encode())}"
        self._ids = np.full(codes.max(initial=0) + 2, -1, np.int32)  # by code point
        self._ids[codes] = np.arange(len(codes))

    def encode(self, text: str) -> np.ndarray:
        checked(text)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            where = int(unknown[0])
            raise ConfigError(
                f"character {text[where]!r} (U+{ord(text[where]):04X}) at position {where} is not "
                f"one of the {len(self.characters)} characters of data.tokenizer=char; remove it, "
                "or train with data.tokenizer=byte or sentencepiece"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        known = f"{self.characters}\0{UNKNOWN}"
        return "".join(
            known[min(i, self.vocab_size)] for i in map(int, ids) if i != self.end_of_text
        )

    def _settings(self) -> dict[str, Any]:
        return {"characters": self.characters}


class SentencePiece(Tokenizer):
    """A trained SentencePiece model, given as its serialized bytes."""

    name = "sentencepiece"

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.get_piece_size()
        self.end_of_text = self._processor.eos_id()
        self.stop_tokens = (self.end_of_text,)
        self.token_bytes = np.array([self._size(i) for i in range(self.vocab_size)], np.int32)
        self.fingerprint = f"sentencepiece-{digest(model)}"
        pieces = [f"<0x{byte:02X}>" for byte in _SPACE.encode()]
        self._space = np.array([self._processor.piece_to_id(p) for p in pieces], np.int32)

    def _size(self, index: int) -> int:
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return 0
        if self._processor.is_byte(index):
            return 1
        return len(self._processor.id_to_piece(index).replace(_SPACE, " ").encode())

    def encode(self, text: str) -> np.ndarray:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        chunks = [_chunks(checked(text)) for text in texts]
        # Ids do not depend on the number of threads: a chunk is encoded by itself.
        flat = [chunk for parts in chunks for chunk in parts]
        threads = min(os.cpu_count() or 1, 16)
        encoded = iter(self._processor.encode(flat, return_type="numpy", num_threads=threads))
        return [
            np.concatenate([_NO_IDS, *(self._ids(part, next(encoded)) for part in parts)])
            for parts in chunks
        ]

    def _ids(self, chunk: str, encoded: np.ndarray) -> np.ndarray:
        return self._space if chunk == _SPACE else encoded

    def decode(self, ids: Iterable[int]) -> str:
        known: list[list[int]] = [[]]
        for i in map(int, ids):
            if i < self.vocab_size:
                known[-1].append(i)
            else:
                known.append([])
        return UNKNOWN.join(self._processor.decode(part) for part in known)

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        (Path(folder) / "sentencepiece.model").write_bytes(self._model)


def train(name: str, texts: Iterable[str], *, vocab_size: int, model: str) -> Tokenizer:
    """Return the tokenizer `name` for `texts`, which are read once.

    `vocab_size` is of use to SentencePiece and word, `model` ("unigram" or "bpe") to the former, `texts`
    to both and to char. Raises ConfigError for an unknown name or a size that the texts do not allow.
    """
    if name == "byte":
        return Byte()
    if name == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return Char(characters)
    if name == "word":
        from lm.data import words  # here, because it imports this file

        return words.train(texts, vocab_size=vocab_size)
    if name != "sentencepiece":  # "file" is opened, not trained: `lm.data.external`
        raise ConfigError(f"data.tokenizer={name}: no such tokenizer; use {', '.join(NAMES)}")
    lines = [line for text in texts for line in _lines(text)]
    return SentencePiece(_train_sentencepiece(_sample(lines), vocab_size, model))


def load(folder: str | Path) -> Tokenizer:
    """Return the tokenizer that `save` wrote into `folder`; ConfigError where there is none."""
    try:
        settings = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        name = settings["name"]
        if name == "byte":
            return Byte()
        if name == "char":
            return Char(settings["characters"])
        if name == "word":
            from lm.data import words  # here, because it imports this file

            return words.Word(settings["words"])
        if name in ("huggingface", "llama2c"):
            from lm.data import external  # here, because it imports this file

            return external.restore(Path(folder), settings)
        return SentencePiece((Path(folder) / "sentencepiece.model").read_bytes())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"{folder}: no readable tokenizer ({error}); restore the folder"
        ) from error


def digest(content: bytes) -> str:
    """Return 16 bytes of BLAKE2b, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def checked(text: str) -> str:
    """Return `text`; ConfigError where it holds a lone surrogate, which has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"character {text[error.start]!r} at position {error.start} is a lone surrogate, "
            "which is not text; remove it"
        ) from None
    return text


def _chunks(text: str) -> list[str]:
    """Cut `text` before newlines into parts of at most _CHUNK characters; each U+2581 is one."""
    chunks = []
    for part in re.split(f"({_SPACE})", text):
        start = 0
        while start < len(part):
            end = start + _CHUNK
            newline = part.rfind("\n", start + 1, end) if end < len(part) else -1
            chunks.append(part[start : newline if newline > 0 else end])
            start += len(chunks[-1])
    return chunks


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of `text` without what a newline token holds: all but one leading space."""
    for line in text.split("\n"):
        bare = line.lstrip(" ")
        content = bare if len(bare) == len(line) else " " + bare
        for start in range(0, len(content), _LINE):
            yield content[start : start + _LINE]


def _sample(lines: list[str]) -> list[str]:
    """Return every k-th line, k the least that leaves at most about _TRAIN_BYTES characters."""
    stride = -(-sum(map(len, lines)) // _TRAIN_BYTES)
    return lines[:: max(stride, 1)]


def _train_sentencepiece(lines: list[str], vocab_size: int, model: str) -> bytes:
    size = sum(map(len, lines)) / 1e6
    print(
        f"training a {model} tokenizer of {vocab_size:,} pieces on {size:.1f} MB of text",
        file=sys.stderr,
        flush=True,
    )
    serialized = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=serialized,
            model_type=model,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=_NEWLINES,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _LINE,
            num_threads=_TRAIN_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from error
    return serialized.getvalue()


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    """Return the ConfigError that a failed training means, or the error itself."""
    fix = "or use data.tokenizer=byte"
    if most := re.search(r"set it to a value <= (\d+)", str(error)):
        return ConfigError(
            f"data.vocab_size={vocab_size}: the training text gives at most {most[1]} pieces; "
            f"set data.vocab_size={most[1]} {fix}"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return ConfigError(
            f"data.vocab_size={vocab_size}: bytes and characters alone take {least[1]} pieces; "
            f"set data.vocab_size={least[1]} or more, {fix}"
        )
    if "sentences_.empty()" in str(error):
        return ConfigError(f"data.tokenizer=sentencepiece: no words to train on; {fix[3:]}")
    return error
