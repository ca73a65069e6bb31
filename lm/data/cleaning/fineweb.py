"""The rules of FineWeb: The FineWeb Datasets (Penedo et al. 2024, arXiv 2406.17557), section 3.6.

Thresholds are the paper's; the rule of newlines is only in the code that made the data set. What differs
here: a mark in quotes or brackets ends a line too, and lengths are in letters of an alphabet (see
`segmentation`), so that 30 characters of English are 10 of Chinese.
"""

from dataclasses import dataclass

from lm.data.cleaning import segmentation
from lm.data.cleaning.step import Step, check_least, check_share


@dataclass(frozen=True)
class FineWeb(Step):
    """Drop lists and menus: few lines that end as sentences do, many short lines, lines again and again."""

    min_terminal_lines: float = 0.12  # share of lines that end with a terminal mark
    max_short_lines: float = 0.67  # share of lines up to short_line characters
    short_line: int = 30  # characters
    max_duplicate_characters: float = 0.1  # share of characters in lines that stood earlier
    max_newlines: float = 0.3  # newlines a word

    def __post_init__(self):
        check_share(self, "min_terminal_lines", "max_short_lines", "max_duplicate_characters")
        check_least(self, short_line=0)

    def __call__(self, text: str) -> tuple[str, str]:
        return text, self._fault(text)

    def _fault(self, text: str) -> str:
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        if not lines:
            return "empty"
        if sum(map(segmentation.ends_sentence, lines)) / len(lines) < self.min_terminal_lines:
            return "min_terminal_lines"
        short = sum(segmentation.count_letters(line) <= self.short_line for line in lines)
        if short / len(lines) > self.max_short_lines:
            return "max_short_lines"
        characters = sum(map(len, lines))
        again = characters - sum(map(len, set(lines)))
        if again / characters > self.max_duplicate_characters:
            return "max_duplicate_characters"
        count = len(segmentation.words(text, hashed=False).letters)
        if text.count("\n") / max(count, 1) > self.max_newlines:
            return "max_newlines"
        return ""
