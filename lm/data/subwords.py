"""Subword tokenizers that are trained here: SentencePiece, and byte-level BPE.

SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226; unigram: Kudo 2018, arXiv 1804.10959;
BPE: Sennrich et al. 2015, arXiv 1508.07909). What differs here: nothing in the text is normalised,
so decode(encode(x)) == x. A newline with the indentation after it is one token; U+2581, with which
the library writes a space, is encoded as any character without a piece is. That is as its bytes, or
where that is not wanted (`unknown`) as <unk>, one id for all, or not at all (a ConfigError).

Byte-level BPE (Radford et al. 2019, GPT-2): the 256 bytes, merged inside GPT-2's words. It is a
`tokenizer.json` of Hugging Face's, which other programs read.

Both train on an even sample of a large corpus, with results that do not depend on the machine. A
user's symbol is one piece wherever it stands: what is before it and after it is encoded by itself.
"""

import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers as huggingface
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm import manifests
from lm.config import ConfigError
from lm.data import external, tokenizers
from lm.data.tokenizers import UNKNOWN, Tokenizer, checked, digest

UNKNOWNS = ("bytes", "unk", "refuse")  # what becomes of a character without a piece
SPACE = external.SPACE
# One space fewer than the usual indentations as well: the last one belongs to the word after it.
_NEWLINES = [
    *("\n" + SPACE * spaces for spaces in range(17)),
    *("\n\n" + SPACE * spaces for spaces in (0, 3, 7)),
]
_TRAIN_SIZE = 16 << 20  # characters: half a minute of unigram training; more text moves few pieces
_TRAIN_THREADS = 4  # a constant: the sums of unigram training depend on it in their last bits
_LINE = 1000  # characters; longer lines are trained on in parts
_CHUNK = 1 << 16  # characters encoded at a time: bounds the memory of one long document
_NO_IDS = np.zeros(0, np.int32)
_END = "<|endoftext|>"
_BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())  # the letters that stand for the 256 bytes
# What a symbol cannot be: a piece that the vocabulary has already.
_TAKEN = {"sentencepiece": r"<unk>|</s>|<0x[0-9A-F]{2}>", "byte_bpe": re.escape(_END)}


class SentencePiece(Tokenizer):
    """A trained SentencePiece model, given as its serialized bytes."""

    name = "sentencepiece"

    def __init__(self, model: bytes, *, symbols: Sequence[str] = (), refuses: bool = False):
        self._model, self._symbols, self._refuses = model, list(symbols), refuses
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._unknown = self._processor.unk_id()
        self.counts_bytes = refuses or self._has_bytes
        self.vocab_size = self._processor.get_piece_size()
        self.end_of_text = self._processor.eos_id()
        self.stop_tokens = (self.end_of_text,)
        self.token_bytes = np.array([self._size(i) for i in range(self.vocab_size)], np.int32)
        options = repr((self._symbols, refuses)).encode()
        different = f"-{digest(options)}" if symbols or refuses else ""
        self.fingerprint = f"sentencepiece-{digest(model)}{different}"
        # What is cut out of a text: the library would not always find it, or take it for a space.
        pieces = {symbol: [symbol.replace(" ", SPACE)] for symbol in symbols}
        pieces[SPACE] = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
        self._fixed = {text: self._ids_of(names) for text, names in pieces.items()}
        self._cuts = _any_of(self._fixed)

    @property
    def _has_bytes(self) -> bool:
        return self._processor.piece_to_id("<0x00>") != self._unknown

    def _ids_of(self, pieces: Sequence[str]) -> np.ndarray:
        ids = [self._processor.piece_to_id(piece) for piece in pieces]
        return np.array(ids[:1] if ids[0] == self._unknown else ids, np.int32)

    def _size(self, index: int) -> int:
        if self._processor.is_unknown(index):
            return 0 if self._has_bytes else len(UNKNOWN.encode())
        if self._processor.is_control(index):
            return 0
        if self._processor.is_byte(index):
            return 1
        return len(self._processor.id_to_piece(index).replace(SPACE, " ").encode())

    def encode(self, text: str) -> np.ndarray:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        chunks = [_chunks(checked(text), self._cuts) for text in texts]
        # Ids do not depend on the number of threads: a chunk is encoded by itself.
        flat = [chunk for parts in chunks for chunk in parts]
        encoded = iter(
            self._processor.encode(flat, return_type="numpy", num_threads=tokenizers.num_threads())
        )
        return [
            self._joined(text, parts, [next(encoded) for _ in parts])
            for text, parts in zip(texts, chunks, strict=True)
        ]

    def _joined(self, text: str, parts: list[str], encoded: list[np.ndarray]) -> np.ndarray:
        found = (self._fixed.get(part, ids) for part, ids in zip(parts, encoded, strict=True))
        ids = np.concatenate([_NO_IDS, *found])
        if self._refuses and (ids == self._unknown).any():
            where = next(i for i, character in enumerate(text) if self._is_unknown(character))
            raise tokenizers.unknown_character(
                text, where, "has no piece, and data.unknown=refuse; remove it, or use bytes or unk"
            )
        return ids

    def _is_unknown(self, character: str) -> bool:
        piece = SPACE if character == " " else character
        return character == SPACE or self._processor.piece_to_id(piece) == self._unknown

    def beside(self, mark: int, before: str, after: str) -> tuple[str, str]:
        return before.removesuffix(" "), after  # a piece begins with its space

    def decode(self, ids: Iterable[int]) -> str:
        known: list[list[int]] = [[]]
        for i in map(int, ids):
            if i < self.vocab_size and i != self._unknown:
                known[-1].append(i)
            else:
                known.append([])
        return UNKNOWN.join(self._processor.decode(part) for part in known)

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        manifests.write_whole(Path(folder) / "sentencepiece.model", self._model)

    def _settings(self) -> dict[str, Any]:
        return {"symbols": self._symbols, "refuses": self._refuses}


class ByteBPE(external.HuggingFace):
    """A trained byte-level BPE, given as the bytes of its `tokenizer.json`."""

    name = "byte_bpe"

    def __init__(self, content: bytes):
        super().__init__(content, {"eos": [_END]})


def restore(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer whose `save` wrote `settings` into `folder`."""
    if settings["name"] == ByteBPE.name:
        return ByteBPE((folder / external.SAVED[ByteBPE.name]).read_bytes())
    model = (folder / "sentencepiece.model").read_bytes()
    symbols, refuses = settings.get("symbols", ()), settings.get("refuses", False)  # older: neither
    return SentencePiece(model, symbols=symbols, refuses=refuses)


def check_symbols(tokenizer: str, symbols: Sequence[str]) -> None:
    """Raise ConfigError for a symbol that cannot be a piece of the tokenizer of that name."""
    bytewise = tokenizer == ByteBPE.name
    for symbol in symbols:
        reasons = {
            "empty": not symbol,
            "given twice": symbols.count(symbol) > 1,
            "a piece of its own already": re.fullmatch(_TAKEN[tokenizer], symbol),
            "U+2581 stands for a space in SentencePiece": SPACE in symbol and not bytewise,
            # Its token would be that of those bytes.
            "all its letters stand for bytes in data.tokenizer=byte_bpe": bytewise
            and not symbol.isascii()
            and _BYTES.issuperset(symbol),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ConfigError(f"data.user_symbols={symbol!r}: {reason}; use another text")


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model: str,
    unknown: str = "bytes",
    symbols: Sequence[str] = (),
) -> SentencePiece:
    """Return SentencePiece's `model` ("unigram" or "bpe") of texts, which are read once.

    Raises ConfigError for a size that the texts do not allow, or symbols that cannot be pieces.
    """
    check_symbols(SentencePiece.name, symbols)
    lines = sampled(line for text in texts for line in _lines(text))
    _announce(model, vocab_size, lines)
    pieces = [symbol.replace(" ", SPACE) for symbol in symbols]
    # Else the rare characters of the training text itself would be refused.
    coverage: dict[str, Any] = {"character_coverage": 1.0} if unknown == "refuse" else {}
    serialized = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=serialized,
            model_type=model,
            vocab_size=vocab_size,
            byte_fallback=unknown == "bytes",
            **coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=list(dict.fromkeys([*_NEWLINES, *pieces])),
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
    return SentencePiece(serialized.getvalue(), symbols=symbols, refuses=unknown == "refuse")


def train_byte_bpe(
    texts: Iterable[str], *, vocab_size: int, symbols: Sequence[str] = ()
) -> ByteBPE:
    """Return the byte-level BPE of texts, which are read once.

    Raises ConfigError for a size that the texts do not allow, or symbols that cannot be pieces.
    """
    check_symbols(ByteBPE.name, symbols)
    learned = vocab_size - sum(symbol not in _BYTES for symbol in symbols)
    least = 1 + len(_BYTES) + vocab_size - learned
    if vocab_size < least:
        raise ConfigError(
            f"data.vocab_size={vocab_size}: bytes, symbols and end of text alone take {least} "
            f"pieces; set data.vocab_size={least} or more, or use data.tokenizer=byte"
        )
    blocks = sampled(block for text in texts for block in _blocks(text, symbols))
    _announce("byte-level BPE", vocab_size, blocks)
    library = huggingface.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=learned,
        special_tokens=[_END],
        initial_alphabet=sorted(_BYTES),
        show_progress=False,
    )
    library.train_from_iterator(iter(blocks), trainer)
    library.add_tokens([huggingface.AddedToken(symbol, normalized=False) for symbol in symbols])
    most = library.get_vocab_size()
    if most < vocab_size:
        raise _too_large(vocab_size, most)
    return ByteBPE(library.to_str().encode())


def sampled(lines: Iterable[str]) -> list[str]:
    """Return every s-th line, s the power of two that leaves at most _TRAIN_SIZE characters.

    No more than that, and a line, is ever held.
    """
    kept: list[str] = []
    size, stride = 0, 1
    for number, line in enumerate(lines):
        if number % stride:
            continue
        kept.append(line)
        size += len(line)
        if size > _TRAIN_SIZE:
            kept, stride = kept[::2], 2 * stride
            size = sum(map(len, kept))
    return kept


def _announce(what: str, vocab_size: int, lines: Sequence[str]) -> None:
    size = sum(map(len, lines))
    words = f"training a {what} tokenizer of {vocab_size:,} pieces on {size:,} characters"
    print(words, file=sys.stderr, flush=True)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern that splits a text at any of `texts`, the longest first, and keeps them."""
    by_size = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, by_size))})")


def _chunks(text: str, cuts: re.Pattern[str]) -> list[str]:
    """Cut `text` before newlines into parts of at most _CHUNK characters; what `cuts` finds is one."""
    chunks = []
    for number, part in enumerate(cuts.split(text)):
        if number % 2:
            chunks.append(part)
            continue
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


def _blocks(text: str, symbols: Sequence[str]) -> Iterator[str]:
    """Yield the lines of `text`, each with the newlines before it, without any symbol."""
    for part in _any_of(symbols).split(text)[::2] if symbols else [text]:
        for block in re.split(r"(?<=[^\n])(?=\n)", part):
            for start in range(0, len(block), _LINE):
                yield block[start : start + _LINE]


def _too_large(vocab_size: int, most: int | str) -> ConfigError:
    return ConfigError(
        f"data.vocab_size={vocab_size}: the training text gives at most {most} pieces; "
        f"set data.vocab_size={most} or use data.tokenizer=byte"
    )


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    """Return the ConfigError that a failed training means, or the error itself."""
    if most := re.search(r"set it to a value <= (\d+)", str(error)):
        return _too_large(vocab_size, most[1])
    if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return ConfigError(
            f"data.vocab_size={vocab_size}: characters and special pieces alone take {least[1]} "
            f"pieces; set data.vocab_size={least[1]} or more, or use data.tokenizer=byte"
        )
    if "sentences_.empty()" in str(error):
        return ConfigError(
            "data.tokenizer=sentencepiece: no words to train on; use data.tokenizer=byte"
        )
    return error
