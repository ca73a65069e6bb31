"""Text to token ids and back, behind one small interface; here bytes and characters.

Every vocabulary holds one id that is no text, end of text. What looks like a special token inside a
document is encoded as the plain characters it is.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm import manifests
from lm.config import ConfigError

NAMES = ("byte", "char", "word", "sentencepiece", "byte_bpe", "file")
UNKNOWN = "\ufffd"
_ONE_THREAD = "TOKENIZERS_PARALLELISM"  # Hugging Face's library reads it at each call


class Tokenizer:
    """Encode text as int32 ids below `vocab_size` and decode them.

    `end_of_text` is the id between documents, counted in `vocab_size`; a text that is made ends before any
    of `stop_tokens`. `token_bytes` int32 [vocab_size] is how many bytes of UTF-8 text each id stands for (0
    for end of text). If the tokenizer `counts_bytes`, the sum over an encoded text is the text's size; else,
    with whole words or one id for all that is unknown, it is a guess, of which no score is made.
    `fingerprint` is a hex digest of all that encoding depends on.
    """

    name: str
    vocab_size: int
    end_of_text: int
    stop_tokens: tuple[int, ...]
    token_bytes: np.ndarray
    fingerprint: str
    counts_bytes: bool = True
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

    def decode_behind(self, before: str, ids: Iterable[int]) -> str:
        """Return the text of `ids` as it is read behind the text `before`, which has some."""
        return self.decode(ids)

    def beside(self, mark: int, before: str, after: str) -> tuple[str, str]:
        """Return the texts around a task's token `mark`, without spaces that belong to what it stands for."""
        return before, after

    def save(self, folder: str | Path) -> None:
        """Write what `load` needs into `folder`, which is made where missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        settings = {"name": self.name, **self._settings()}
        manifests.write_whole(Path(folder) / "tokenizer.json", json.dumps(settings) + "\n")

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
            raise unknown_character(
                text,
                int(unknown[0]),
                f"is not one of the {len(self.characters)} characters of data.tokenizer=char; remove "
                "it, or train with data.tokenizer=byte or sentencepiece",
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        known = f"{self.characters}\0{UNKNOWN}"
        return "".join(
            known[min(i, self.vocab_size)] for i in map(int, ids) if i != self.end_of_text
        )

    def _settings(self) -> dict[str, Any]:
        return {"characters": self.characters}


def train(
    name: str,
    texts: Iterable[str],
    *,
    vocab_size: int,
    model: str,
    unknown: str = "bytes",
    symbols: Sequence[str] = (),
) -> Tokenizer:
    """Return the tokenizer `name` for `texts`, which are read once and need not fit into memory.

    Args:
      texts: of use to all but byte.
      vocab_size: of use to all but byte and char.
      model: of SentencePiece: "unigram" or "bpe".
      unknown: of SentencePiece: what becomes of a character without a piece; see `lm.data.subwords`.
      symbols: of SentencePiece and byte_bpe: texts that are one piece each wherever they stand.

    Raises:
      ConfigError: an unknown name, or a size or symbols that cannot be.
    """
    if name == "byte":
        return Byte()
    if name == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return Char(characters)
    from lm.data import subwords, words  # here, because they import this file

    if name == "word":
        return words.train(texts, vocab_size=vocab_size)
    if name == "byte_bpe":
        return subwords.train_byte_bpe(texts, vocab_size=vocab_size, symbols=symbols)
    if name == "sentencepiece":
        return subwords.train_sentencepiece(
            texts, vocab_size=vocab_size, model=model, unknown=unknown, symbols=symbols
        )
    # "file" is opened, not trained: `lm.data.external`.
    raise ConfigError(f"data.tokenizer={name}: no such tokenizer; use {', '.join(NAMES)}")


def load(folder: str | Path) -> Tokenizer:
    """Return the tokenizer that `save` wrote into `folder`; ConfigError where there is none."""
    try:
        path = Path(folder) / "tokenizer.json"
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError(f"{path.name} is no plain file")
        settings = json.loads(path.read_text(encoding="utf-8"))
        name = settings["name"]
        if name == "byte":
            return Byte()
        if name == "char":
            return Char(settings["characters"])
        from lm.data import external, subwords, words  # here, because they import this file

        if name == "word":
            return words.Word(settings["words"])
        if name in ("sentencepiece", "byte_bpe"):
            return subwords.restore(Path(folder), settings)
        return external.restore(Path(folder), settings)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"{folder}: no readable tokenizer ({error}); restore the folder"
        ) from error


def use_one_thread() -> None:
    """Encode in the calling thread alone, in this process and those that it starts; ids are the same."""
    os.environ[_ONE_THREAD] = "false"


def num_threads() -> int:
    """Return how many threads `encode_all` may take."""
    if os.environ.get(_ONE_THREAD, "true").lower() in ("", "off", "false", "f", "no", "n", "0"):
        return 1
    return min(os.cpu_count() or 1, 16)


def digest(content: bytes) -> str:
    """Return 16 bytes of BLAKE2b, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def unknown_character(text: str, where: int, why: str) -> ConfigError:
    """Return the error for a character that cannot be encoded."""
    character = text[where]
    return ConfigError(
        f"character {character!r} (U+{ord(character):04X}) at position {where} {why}"
    )


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
