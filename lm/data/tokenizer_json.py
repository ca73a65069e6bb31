"""What a `tokenizer.json` of Hugging Face's says of itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import pre_tokenizers

from lm.config import ConfigError

_NO_UTF8 = set("ÀÁõö÷øùúûüýþÿ")  # what stands for the bytes that UTF-8 has not


def types(part: Any) -> set[str]:
    """Return the types of a part of a `tokenizer.json`, and of those in it."""
    if not isinstance(part, dict):
        return set()
    inside = (inner for value in part.values() if isinstance(value, list) for inner in value)
    return {part.get("type", ""), *(name for inner in inside for name in types(inner))}


def holds_bytes(byte_level: bool, model: Any, vocabulary: Mapping[str, int]) -> bool:
    """Return whether there is a token for every byte that UTF-8 has.

    Raises ConfigError where the others, for want of an unknown token too, would vanish from a text.
    """
    if not byte_level:
        names = (f"<0x{byte:02X}>" for byte in range(256))
        return bool(model.get("byte_fallback")) and all(name in vocabulary for name in names)
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - _NO_UTF8 - vocabulary.keys()
    if missing and model.get("type") == "BPE" and model.get("unk_token") is None:
        raise ConfigError(
            f"it has no token for {len(missing)} bytes and none for what is unknown: text would be lost; "
            "train it with the whole alphabet of bytes"
        )
    return not missing


def around(part: Any, begins: Sequence[str | int]) -> dict[str, str]:
    """Return "cls" and "sep" of a post_processor that puts both around a text.

    Of a template's first token that is in `begins` it is not known whether it means more than that.
    """
    if not isinstance(part, dict):
        return {}
    if part.get("type") in ("RobertaProcessing", "BertProcessing"):
        return {role: part[role][0] for role in ("cls", "sep")}
    for inner in part.get("processors", ()):
        if found := around(inner, begins):
            return found
    ends = [piece.get("SpecialToken", {}).get("id") for piece in part.get("single", ())]
    both = len(ends) > 2 and ends[0] and ends[-1] and ends[0] not in begins
    return {"cls": ends[0], "sep": ends[-1]} if both else {}
