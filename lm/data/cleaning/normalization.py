"""Characters and white space: what changes how a text is written and not what it says."""

import functools
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lm.config import ConfigError
from lm.data.cleaning import segmentation
from lm.data.cleaning.step import Step, check_least

_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_LINE_END = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
# Controls but newline and tab; soft hyphen; Mongolian vowel separator; zero-width space, word joiner and byte
# order mark; marks of direction, invisible operators and format characters without effect; annotations;
# tags. Joiners (U+200C, U+200D) stay: they are part of words in Persian and Hindi, and of emoji.
_INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


@dataclass(frozen=True)
class Unicode(Step):
    """Bring characters to a Unicode normal form (Unicode Standard Annex 15).

    NFC writes an accent and its letter as one character. NFKC also replaces compatibility forms, among them
    the full-width punctuation of Chinese and Japanese; it is not the default.
    """

    TARGETS: ClassVar[bool] = True

    form: str = "NFC"  # NFC, NFD, NFKC or NFKD

    def __post_init__(self):
        if self.form not in _FORMS:
            raise ConfigError(
                f"form={self.form}: no such normal form; use one of {', '.join(_FORMS)}"
            )

    def __call__(self, text: str) -> tuple[str, str]:
        return segmentation.normalized(text, self.form), ""


@dataclass(frozen=True)
class Mojibake(Step):
    """Repair UTF-8 that was read in another encoding ("schÃ¶n" for "schön").

    By ftfy (Robyn Speer, 2019), with only its repairs of encoding: width, quotes, ligatures and HTML entities
    stay as they are, so that Chinese, Japanese and Korean pass unchanged.
    """

    TARGETS: ClassVar[bool] = True
    LIBRARIES: ClassVar[tuple[str, ...]] = ("ftfy",)

    def __call__(self, text: str) -> tuple[str, str]:
        if text.isascii():
            return text, ""
        import ftfy

        return ftfy.fix_text(
            text,
            unescape_html=False,
            remove_terminal_escapes=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=False,
            fix_line_breaks=False,
            remove_control_chars=False,
            normalization=None,
        ), ""


@dataclass(frozen=True)
class Control(Step):
    """Take out control and invisible characters; newline and tab stay, and every line end is a newline."""

    TARGETS: ClassVar[bool] = True

    def __call__(self, text: str) -> tuple[str, str]:
        if _has_controls(text):
            text = _LINE_END.sub("\n", _INVISIBLE.sub("", text))
        return text, ""


def _has_controls(text: str) -> bool:
    """Return whether the patterns would find anything, several times as fast as they do."""
    block = 1 << 20
    return any(
        _controls()[np.frombuffer(text[at : at + block].encode("utf-32-le"), np.uint32)].any()
        for at in range(0, len(text), block)
    )


@functools.cache
def _controls() -> np.ndarray:
    codes = np.arange(0x110000, dtype="<u4")
    every = codes[(codes < 0xD800) | (codes > 0xDFFF)].tobytes().decode("utf-32-le")
    table = np.zeros(0x110000, bool)
    for pattern in (_INVISIBLE, _LINE_END):
        table[[ord(found) for found in pattern.findall(every)]] = True
    return table


@dataclass(frozen=True)
class Whitespace(Step):
    """Take out blanks at the ends of lines, and blank lines at both ends and beyond `blank_lines` in a row.

    Blanks before a line's text stay: code and verse mean them. So does a newline at the end.
    """

    TARGETS: ClassVar[bool] = True

    blank_lines: int = 1  # that stay where there are more in a row

    def __post_init__(self):
        check_least(self, blank_lines=0)

    def __call__(self, text: str) -> tuple[str, str]:
        kept: list[str] = []
        blank = 0
        for line in map(str.rstrip, text.split("\n")):
            if not line:
                blank += 1
                continue
            if kept:
                kept.extend([""] * min(blank, self.blank_lines))
            kept.append(line)
            blank = 0
        return "\n".join(kept) + ("\n" if kept and blank else ""), ""
