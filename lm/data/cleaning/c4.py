"""The rules of C4: Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer.

Raffel et al. 2020, arXiv 1910.10683, section 2.2. Bounds are those of the released code: 5 words a line, 3
sentences a page. What differs here: sentences are counted by their marks, as NLTK's splitter is English and
downloaded; eastern full stops end a line too; the list of bad words, which is downloaded, is left out;
repeated text is left to other steps.
"""

import re
from dataclasses import dataclass

from lm.data.cleaning import segmentation
from lm.data.cleaning.step import Step, check_least

POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_QUOTES = ('"', "”", "」", "』")
_CITED = r"\[(?:\d{0,9}|edit|citation needed)\]"
# One within brackets stays, as taking it out might leave another.
_CITATION = re.compile(rf"(\[[^\[\]]{{0,20}}{_CITED})|{_CITED}")
_SPLIT = re.compile(rf"\s|{segmentation.UNSPACED.pattern}")


@dataclass(frozen=True)
class C4(Step):
    """Keep lines that end as a sentence does, and documents of several sentences.

    Takes out lines without a terminal mark, with few words, a very long word, "javascript" or a policy on
    cookies, and citation marks such as [1]; drops a document with a curly bracket or "lorem ipsum" in a line
    that would stay.
    """

    min_line_words: int = 5  # of a line that stays
    max_word_length: int = 1000  # characters; a line with a longer word is taken out
    min_sentences: int = 3  # of what is left
    curly_brackets: bool = False  # keep documents that have one

    def __post_init__(self):
        check_least(self, min_line_words=0, max_word_length=1, min_sentences=0)

    def __call__(self, text: str) -> tuple[str, str]:
        kept = []
        for line in text.split("\n"):
            line = _CITATION.sub(r"\1", line).strip()
            if not (line and self._is_sentence(line)):
                continue
            lower = line.lower()
            if "lorem ipsum" in lower:
                return text, "lorem ipsum"
            if "javascript" in lower:
                continue
            if "{" in line and not self.curly_brackets:
                return text, "curly_brackets"
            if not any(phrase in lower for phrase in POLICY):
                kept.append(line)
        text = "\n".join(kept)
        return text, "" if segmentation.count_sentences(
            text
        ) >= self.min_sentences else "min_sentences"

    def _is_sentence(self, line: str) -> bool:
        if line.endswith("...") or not (line.endswith(_QUOTES) or segmentation.ends_sentence(line)):
            return False
        if segmentation.count_words(line) < self.min_line_words:
            return False
        return len(line) <= self.max_word_length or all(
            len(word) <= self.max_word_length for word in _SPLIT.split(line)
        )
