"""The tokenizer of llama2.c (Karpathy 2023), `tok512.bin` and such.

As with the others that were trained elsewhere (`lm/data/external.py`), a text that begins with `end_of_text`
loses the space that the tokenizer puts before it.
"""

import heapq
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lm import manifests
from lm.config import ConfigError
from lm.data.tokenizers import UNKNOWN, Tokenizer, checked, digest

SAVED = "llama2c.bin"  # in a run's tokenizer/


class Llama2C(Tokenizer):
    """The pieces of a file, given as its bytes.

    An int32, the longest piece's size; then for each piece a float32 score, an int32 size and its bytes.
    Ids 0 to 2 are <unk>, <s> and </s>, then come the 256 bytes. Text, behind a space, is cut to
    characters, or bytes where there is no such piece; then the neighbours whose joint piece has the best
    score are joined, as SentencePiece's BPE does, until none are left.
    """

    name = "llama2c"
    end_of_text = 1
    stop_tokens = (1, 2)
    specials: Mapping[str, int] = {"unk": 0, "bos": 1, "eos": 2}
    BYTES = 3  # id of byte 0

    def __init__(self, content: bytes):
        self.content = content
        self._pieces, self._scores = _read_pieces(content)
        self.vocab_size = len(self._pieces)
        first_piece = self.BYTES + 256
        ordinary = range(first_piece, self.vocab_size)
        self._ids = {self._pieces[i]: i for i in reversed(ordinary)}
        sizes = [0] * self.BYTES + [1] * 256 + [len(self._pieces[i]) for i in ordinary]
        self.token_bytes = np.array(sizes, np.int32)
        self.fingerprint = f"llama2c-{digest(content)}"

    def encode(self, text: str) -> np.ndarray:
        ids: list[int] = []
        for character in f" {text}" if checked(text) else "":
            piece = character.encode()
            known = self._ids.get(piece)
            ids += [self.BYTES + byte for byte in piece] if known is None else [known]
        return np.array(self._joined(ids), np.int32)

    def _joined(self, ids: list[int]) -> list[int]:
        """Join neighbours, the best score first and of equals the leftmost."""
        left = list(range(-1, len(ids) - 1))
        right = [*range(1, len(ids)), -1]
        heap: list[tuple[float, int, int, int]] = []

        def consider(at: int) -> None:
            if at >= 0 and right[at] >= 0:
                pair = self._pieces[ids[at]] + self._pieces[ids[right[at]]]
                joint = self._ids.get(pair)
                if joint is not None:
                    heapq.heappush(heap, (-self._scores[joint], at, ids[at], ids[right[at]]))

        for at in range(len(ids)):
            consider(at)
        while heap:
            _, at, first, second = heapq.heappop(heap)
            gone = right[at]
            if ids[at] != first or gone < 0 or ids[gone] != second:
                continue  # one of the two has been joined since
            ids[at] = self._ids[self._pieces[first] + self._pieces[second]]
            ids[gone] = -1
            right[at] = right[gone]
            if right[at] >= 0:
                left[right[at]] = at
            consider(at)
            consider(left[at])
        return [i for i in ids if i >= 0]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        known = [self._bytes(i) for i in ids]
        text = b"".join(known).decode(errors="replace")
        return text.removeprefix(" ") if ids[:1] == [self.end_of_text] else text

    def _bytes(self, index: int) -> bytes:
        if index in self.stop_tokens:
            return b""
        if not 0 < index < self.vocab_size:
            return UNKNOWN.encode()
        byte = index - self.BYTES
        return bytes([byte]) if byte < 256 else self._pieces[index]

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        manifests.write_whole(Path(folder) / SAVED, self.content)


def _read_pieces(content: bytes) -> tuple[list[bytes], list[float]]:
    """Return the pieces and scores of a llama2.c file. Raises ConfigError where it is none."""
    pieces: list[bytes] = []
    scores: list[float] = []
    try:
        (longest,) = struct.unpack_from("<i", content)
        at = 4
        while at < len(content):
            score, size = struct.unpack_from("<fi", content, at)
            at += 8 + size
            if not 0 <= size <= longest or at > len(content) or score != score:
                raise ValueError(f"piece {len(pieces)} has a size of {size} bytes, score {score}")
            pieces.append(content[at - size : at])
            scores.append(score)
    except (struct.error, ValueError) as error:
        raise ConfigError(f"not a tokenizer of llama2.c's ({error})") from None
    bytes_of = [f"<0x{byte:02X}>".encode() for byte in range(256)]
    if pieces[Llama2C.BYTES : Llama2C.BYTES + 256] != bytes_of:
        raise ConfigError("not a tokenizer of llama2.c's (pieces 3 to 258 are not the 256 bytes)")
    return pieces, scores
