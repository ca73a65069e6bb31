"""Documents that hold text of an evaluation are dropped, so that its scores are not of what was memorised."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lm.config import ConfigError
from lm.data import sources
from lm.data.cleaning import segmentation
from lm.data.cleaning.step import Step, check_least


@dataclass(frozen=True)
class Overlap(Step):
    """Drop a document, or a pair, that shares `ngram` words in a row with a text of the files `path`.

    As in GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C), which compares words in lower case without
    punctuation, 13 in a row. What differs here: the whole document is dropped, not 200 characters around; a
    character of a script without spaces is a word; a text with fewer words finds nothing. Files are read as
    those of data.path are, each named field for itself. The index takes 8 bytes a word of them.
    """

    TARGETS: ClassVar[bool] = True

    path: tuple[str, ...] = ()  # the evaluation's files and globs: text, JSON lines or tables
    ngram: int = 13  # words in a row
    field: tuple[str, ...] = ("text",)  # of JSON lines and tables: the fields that hold its texts

    def __post_init__(self):
        check_least(self, ngram=1)
        if not self.path:
            raise ConfigError("path: no file; name the evaluation's, as in path=test.jsonl")

    def depends_on(self) -> dict[str, Any]:
        content = [source.fingerprint() for source in self._sources()]
        return {"ngram": self.ngram, "content": content}

    def __call__(self, text: str) -> tuple[str, str]:
        ngrams = segmentation.ngrams(segmentation.content_words(text).hashes, self.ngram)
        if not len(self.index) or not len(ngrams):
            return text, ""
        nearest = np.searchsorted(self.index, ngrams)
        found = (self.index[np.minimum(nearest, len(self.index) - 1)] == ngrams).any()
        return text, "shared words" if found else ""

    @functools.cached_property
    def index(self) -> np.ndarray:
        """The hashes of the n-grams of the evaluation, sorted."""
        parts = [
            segmentation.ngrams(segmentation.content_words(document.text).hashes, self.ngram)
            for source in self._sources()
            for document in source
        ]
        return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))

    def __getstate__(self) -> dict[str, Any]:
        _ = self.index  # made once, and not again in every worker
        return self.__dict__

    def _sources(self) -> list[sources.Source]:
        return [
            sources.open_source(
                "python_docs",
                path=self.path,
                fields=sources.Fields(text=field),
                on_invalid="replace",
            )
            for field in self.field
        ]
