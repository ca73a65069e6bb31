"""Tokenizers that others trained: Hugging Face's `tokenizer.json`, and what else lies in such folders.

Behind the interface of `lm.data.tokenizers`, where one id ends a text and begins the next. Some have two:
`end_of_text` is then the one that the tokenizer itself begins a text with (Llama's <s>), as a model never
read a text without it, and `stop_tokens` are both. A token for a text's class (BERT's [CLS]) is neither.

Some put a space before a text. `decode` takes it away where the ids begin with `end_of_text`; other ids are
taken for what follows a text. `token_bytes` counts it: sums over a text are then one byte more. They are
exact where every byte has a token and text is not normalised, and a guess elsewhere (`counts_bytes`).
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as huggingface

from lm import manifests
from lm.config import ConfigError
from lm.data import llama2c, tokenizer_json, tokenizers
from lm.data.tokenizers import UNKNOWN, Tokenizer, checked, digest

MAX_BYTES = 256 << 20  # of a tokenizer's file; the largest published are about 35 MB
# In a run's tokenizer/, by the kind.
SAVED = {
    "huggingface": "huggingface.json",
    "byte_bpe": "huggingface.json",
    "llama2c": llama2c.SAVED,
}
OURS = "lm_tokenizer"  # folder of a tokenizer of ours beside weights of others
SPACE = "\u2581"
_SPACES = (SPACE, "Ġ")  # what a piece begins with that holds its space
_CHUNK = 1 << 16  # characters; a longer text is cut at the next place where that changes no id
_BATCH = 1 << 21  # characters
# Normalisers that leave a text's bytes as they are; nearly all text is in form C already.
_KEEP_BYTES = {"Sequence", "Prepend", "Replace", "NFC"}

# Such places, with what may stand before and after; the first that a tokenizer's words allow counts.
_ENDS = ("cat", "é", "12", "不", "end.", "x_")
_CUTS = (
    (re.compile(r"\S(?=[ \n]\w)"), _ENDS, (" a", "\nb", " 1", "\n不")),
    (re.compile(r"[^\W\d_](?=[ \n][^\W\d_])"), _ENDS[:2], (" a", "\nb", "\n不")),
    (re.compile(r"\S(?= \w)"), _ENDS, (" a", " 1")),
)
_NO_IDS = np.zeros(0, np.int32)
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
CONFIGS = ("config.json", "generation_config.json")
# Where no file beside the tokenizer's names them.
USUAL = {
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"),
    "sep": ("[SEP]",),
    "cls": ("[CLS]",),
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("[MASK]", "<mask>"),
}


class HuggingFace(Tokenizer):
    """Any `tokenizer.json`, given as its bytes.

    `roles` names, for each of `ROLES`, tokens or ids of which the first in the vocabulary has the role; of
    "eos" every id of a special token ends a text. T5's <extra_id_0> is sentinel_0, and so on.
    """

    name = "huggingface"

    def __init__(self, content: bytes, roles: Mapping[str, Sequence[str | int]]):
        self.content = content
        with _refusing():
            self._library = huggingface.Tokenizer.from_str(content.decode())
            settings = json.loads(content)
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # in a text they are plain characters
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self._tokens = {index: token for token, index in vocabulary.items()}
        self.vocab_size = 1 + max(self._tokens, default=0)
        if self.vocab_size > 2 * len(self._tokens) + 1000:
            raise ConfigError(
                f"its {len(self._tokens)} tokens have ids up to {self.vocab_size - 1}"
            )
        self.specials = _first_known(roles, vocabulary)
        number = 0
        while (sentinel := f"<extra_id_{number}>") in vocabulary:
            self.specials[f"sentinel_{number}"] = vocabulary[sentinel]
            number += 1
        added = self._library.get_added_tokens_decoder()
        flagged = {i for i, token in added.items() if token.special} | set(self.specials.values())
        ends = [self.specials[role] for role in ("eos", "sep", "bos") if role in self.specials][:1]
        with _refusing():
            begins = self._library.encode("a").ids[:1]
            first = self._library.encode("a", add_special_tokens=False).ids
        if begins and begins[0] in flagged - {self.specials.get("cls")}:
            ends.insert(0, begins[0])
        ends += [i for i in roles.get("eos", ()) if type(i) is int and i in flagged]
        if not ends:
            raise ConfigError("it names no token for the end of a text (eos_token)")
        self.end_of_text, self.stop_tokens = ends[0], tuple(sorted(set(ends)))
        # GPT-2 gives all roles to one token: one that ends a text is not unknown text.
        self._unknown = {self.specials.get("unk", self.end_of_text)} - set(ends)
        self._special = flagged - self._unknown
        self.fingerprint = f"huggingface-{digest(content)}-{self.end_of_text}"
        decoder = tokenizer_json.types(settings.get("decoder"))
        self._set_sizes("ByteLevel" in decoder, set(added))
        self._added = added
        self._word_pieces = "WordPiece" in decoder
        if getattr(self._library.model, "dropout", None):
            self._library.model.dropout = None  # it would encode a text otherwise each time
        whole = tokenizer_json.holds_bytes(
            "ByteLevel" in decoder, settings.get("model"), vocabulary
        )
        self.counts_bytes = (
            whole and tokenizer_json.types(settings.get("normalizer")) <= _KEEP_BYTES
        )
        # What stands for a special token that the model itself found in a text.
        self._plain = {
            i: [j for c in self._tokens[i] for j in self._id_of(c)] for i in self._special
        }
        prefixed = bool(first) and self._tokens[first[0]].startswith(SPACE)
        self._anchor = first[-1:] if prefixed else []
        self._cut = self._find_cut()

    def _id_of(self, character: str) -> set[int]:
        index = self._library.token_to_id(character)
        return self._unknown if index is None else {index}

    def _set_sizes(self, byte_level: bool, added: set[int]) -> None:
        def size(index: int) -> int:
            token = self._tokens.get(index, "")
            if index in self._special:
                return 0
            if byte_level:
                return len(token.encode()) if index in added else len(token)
            if len(token) == 6 and token.startswith("<0x"):
                return 1
            return len(token.removeprefix("##").replace(SPACE, " ").encode())

        sizes = map(size, range(self.vocab_size))
        self.token_bytes = np.fromiter(sizes, np.int32, self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts = [self._parts(checked(text)) for text in texts]
        encoded = self._encode_parts([part for own in parts for part in own])
        return [np.concatenate([_NO_IDS, *(next(encoded) for _ in own)]) for own in parts]

    def _encode_parts(self, parts: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield the ids of each; the library, which takes about 100 bytes a character, gets a few at once."""
        for batch in _batched(parts):
            with _refusing():
                encoded = self._library.encode_batch_fast(batch, add_special_tokens=False)
            for one in encoded:
                yield self._without_special(np.array(one.ids, np.int32))

    def _parts(self, text: str) -> list[str]:
        """Cut a long text where its ids stay the same, if this tokenizer has such places."""
        parts, start = [], 0
        while self._cut and len(text) - start > _CHUNK:
            place = self._cut.search(text, start + _CHUNK)
            end = place.end() if place else len(text)
            parts.append(text[start:end])
            start = end
        return [*parts, text[start:]]

    def _find_cut(self) -> re.Pattern[str] | None:
        """Return the places that are between words as the tokenizer takes them, by examples."""
        normalizer, splitter = self._library.normalizer, self._library.pre_tokenizer
        added = self._library.get_added_tokens_decoder().values()
        if splitter is None or any(
            not token.special and (token.lstrip or token.rstrip or re.search(r"\s", token.content))
            for token in added
        ):
            return None

        def words(text: str) -> list[str]:
            text = normalizer.normalize_str(text) if normalizer else text
            return [word for word, _ in splitter.pre_tokenize_str(text)]

        for pattern, befores, afters in _CUTS:
            if all(words(b + a) == words(b) + words(a) for b in befores for a in afters):
                return pattern
        return None

    def _without_special(self, ids: np.ndarray) -> np.ndarray:
        if not np.isin(ids, list(self._plain)).any():
            return ids
        parts = [self._plain.get(i, [i]) for i in ids.tolist()]
        return np.array([i for part in parts for i in part], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        known: list[list[int]] = [[]]
        ids = [int(i) for i in ids]
        for i in ids:
            if i not in self._tokens or i in self._unknown:
                known.append([])
            elif i not in self._special:
                known[-1].append(i)
        begins = ids[:1] == [self.end_of_text]
        return UNKNOWN.join(
            self._text(part, begins and number == 0) for number, part in enumerate(known)
        )

    def _text(self, ids: list[int], begins: bool) -> str:
        if begins or not self._anchor:
            return self._library.decode(ids)
        # Behind a token, as what begins a text loses its space.
        before = len(self._library.decode(self._anchor))
        return self._library.decode([*self._anchor, *ids])[before:]

    def piece(self, index: int) -> str:
        if not self._word_pieces:
            return self.decode([index])
        token = self._tokens.get(index, "")
        return token[2:] if token.startswith("##") else f" {token}"

    def beside(self, mark: int, before: str, after: str) -> tuple[str, str]:
        if token := self._added.get(mark):
            before = before.rstrip() if token.lstrip else before
            return before, after.lstrip() if token.rstrip else after
        pieces = [self._tokens[i] for i in self.encode("a a").tolist()]
        if any(len(piece) > 1 and piece[0] in _SPACES for piece in pieces):
            before = before.removesuffix(" ")
        return before, after

    def role_tokens(self) -> dict[str, str]:
        """Return the tokens of `ROLES` that there are."""
        return {r: self._tokens[self.specials[r]] for r in ROLES if r in self.specials}

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        manifests.write_whole(Path(folder) / SAVED[self.name], self.content)

    def _settings(self) -> dict[str, Any]:
        roles = {role: [index] for role, index in self.specials.items()}
        if "eos" in roles:
            roles["eos"] += sorted({*self.stop_tokens} - {self.end_of_text, *roles["eos"]})
        return {"roles": roles}


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn what Hugging Face's library raises, a panic of its Rust included, into a ConfigError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ConfigError(f"not a tokenizer of Hugging Face's ({error})") from error


def _batched(parts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of parts of about _BATCH characters."""
    batch: list[str] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first_known(
    roles: Mapping[str, Sequence[str | int]], vocabulary: Mapping[str, int]
) -> dict[str, int]:
    """Return for each role the id of its first candidate that the vocabulary has."""
    ids, found = set(vocabulary.values()), {}
    for role, candidates in roles.items():
        known = [c if type(c) is int else vocabulary.get(str(c)) for c in candidates]
        for index in reversed(known):
            if index in ids:
                found[role] = index
    return found


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer in a file or folder, whichever kind it is.

    Args:
      path: a `tokenizer.json` of Hugging Face's, a llama2.c `.bin`, the folder `tokenizer/` of a run, or
        a folder that holds one of these, or GPT-2's `vocab.json` and `merges.txt`.

    Raises:
      ConfigError: nothing of these is there, or it is damaged.
    """
    file = _find(Path(path))
    if file.name == "tokenizer.json" and "name" in read_object(file):  # what `Tokenizer.save` wrote
        return tokenizers.load(file.parent)
    roles = read_roles(file.parent)
    try:
        if file.suffix == ".bin":
            return llama2c.Llama2C(read_bounded(file))
        if file.name == "vocab.json":
            return HuggingFace(_byte_pair_encoding(file.parent), roles)
        content = read_bounded(file)
        with _refusing():
            found = tokenizer_json.around(json.loads(content).get("post_processor"), roles["bos"])
        return HuggingFace(content, {**roles, **{r: [*roles[r], found[r]] for r in found}})
    except ConfigError as error:
        raise ConfigError(f"tokenizer {file}: {error}; give another file") from None


def restore(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer whose `save` wrote `settings` into `folder`."""
    content = (folder / SAVED[settings["name"]]).read_bytes()
    if settings["name"] == llama2c.Llama2C.name:
        return llama2c.Llama2C(content)
    return HuggingFace(content, settings["roles"])


def _find(path: Path) -> Path:
    """Return the file that `open_tokenizer` reads."""
    if path.is_file():
        if path.suffix in (".json", ".bin"):
            return path
        raise ConfigError(
            f"tokenizer {path}: neither a tokenizer.json nor a llama2.c .bin; make the first with "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    found = [path / "tokenizer.json", *sorted(path.glob("tok*.bin"))]
    found.append(path / OURS / "tokenizer.json")
    if (path / "merges.txt").is_file():
        found.append(path / "vocab.json")
    for file in found:
        if file.is_file():
            return file
    raise ConfigError(
        f"tokenizer {path}: no tokenizer.json, tok*.bin or vocab.json with merges.txt there; make the first "
        "with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def read_roles(folder: Path) -> dict[str, list[str | int]]:
    """Return which tokens have a role, by the files of a Hugging Face folder and by what is usual."""
    roles: dict[str, list[str | int]] = {role: [] for role in ROLES}
    for name in ("tokenizer_config.json", "special_tokens_map.json", *CONFIGS):
        settings = read_object(folder / name) if (folder / name).is_file() else {}
        for role in ROLES:
            for key in (f"{role}_token", f"{role}_token_id"):
                value = settings.get(key)
                values = value if isinstance(value, list) else [value]
                contents = [v.get("content") if isinstance(v, dict) else v for v in values]
                roles[role] += [c for c in contents if isinstance(c, str | int)]
    return {role: [*found, *USUAL.get(role, ())] for role, found in roles.items()}


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ConfigError where there is none."""
    try:
        value = json.loads(read_bounded(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a JSON object ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: not a JSON object; restore the file")
    return value


def _byte_pair_encoding(folder: Path) -> bytes:
    """Return the tokenizer.json of a folder's `vocab.json` and `merges.txt`, GPT-2's."""
    try:
        model = huggingface.models.BPE.from_file(
            str(folder / "vocab.json"), str(folder / "merges.txt")
        )
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"not GPT-2's vocab.json and merges.txt ({error})") from error
    library = huggingface.Tokenizer(model)
    library.pre_tokenizer = huggingface.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = huggingface.decoders.ByteLevel()
    end = USUAL["eos"][0]
    if library.token_to_id(end) is not None:
        library.add_special_tokens([end])
    return library.to_str().encode()


def read_bounded(file: Path) -> bytes:
    """Return a tokenizer's file; ConfigError where it is too large to be one."""
    if file.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{file.stat().st_size:,} bytes are too many for a tokenizer")
    return file.read_bytes()
