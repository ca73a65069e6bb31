"""Documents that were there before. What is compared is made anywhere; who was first is told in order."""

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

from lm.config import ConfigError
from lm.data.cleaning import segmentation
from lm.data.cleaning.step import Step, check_least, check_share

_SEED = 42  # rensa's own


@dataclass(frozen=True)
class ExactDuplicates(Step):
    """Drop a document whose cleaned text is that of an earlier one. About 110 bytes a document that stays."""

    def signature(self, text: str) -> Any:
        """Return what is compared, to be sent between processes."""
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def index(self) -> "_Exact":
        """Return a new memory of documents."""
        return _Exact()


class _Exact:
    def __init__(self):
        self._known: set[bytes] = set()

    def seen(self, signature: bytes) -> bool:
        """Return whether the signature was there before, and remember it."""
        before = len(self._known)
        self._known.add(signature)
        return len(self._known) == before


@dataclass(frozen=True)
class NearDuplicates(Step):
    """Drop a document that shares most of its n-grams of words with an earlier one that stayed.

    MinHash (Broder 1997) and locality-sensitive hashing (Indyk and Motwani 1998), by rensa: earlier
    documents that agree in a band of hashes are compared by all hashes, whose share of equals estimates the
    Jaccard index of the two sets of n-grams, with a standard error of 0.035 at 0.8 from 128. About 2,100 to
    2,400 bytes a document that stays. Words are compared without case and punctuation; a document with fewer
    words than `ngram` is compared as a whole.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ("rensa",)

    threshold: float = 0.8  # Jaccard index of the n-grams from which two are one
    ngram: int = 5  # words
    permutations: int = 128  # hashes a document; a power of two

    def __post_init__(self):
        check_share(self, "threshold")
        check_least(self, ngram=1, permutations=16)
        if self.permutations & (self.permutations - 1):
            raise ConfigError(f"permutations={self.permutations}: use a power of two, such as 128")

    def signature(self, text: str) -> Any:
        """Return what is compared, to be sent between processes; None for a text without words."""
        import rensa

        hashes = segmentation.content_words(text).hashes
        if not len(hashes):
            return None
        ngrams = segmentation.ngrams(hashes, min(self.ngram, len(hashes)))
        signature = rensa.RMinHash(num_perm=self.permutations, seed=_SEED)
        signature.update(ngrams.view("V8").tolist())
        return signature

    def index(self) -> "_Near":
        """Return a new memory of documents."""
        return _Near(self.threshold, self.permutations)


class _Near:
    def __init__(self, threshold: float, permutations: int):
        import rensa

        self._count = 0
        self._known = rensa.RMinHashDeduplicator(
            threshold=threshold,
            num_perm=permutations,
            use_lsh=True,
            num_bands=_bands(threshold, permutations),
            seed=_SEED,
        )

    def seen(self, signature: Any) -> bool:
        """Return whether one like it was there before; remember it if not."""
        self._count += 1
        return signature is not None and not self._known.add(str(self._count), signature)


def _bands(threshold: float, permutations: int) -> int:
    """Return the fewest bands of which one is equal, at the threshold, 9 times in 10."""
    bands = 1
    while bands < permutations:
        if 1 - (1 - threshold ** (permutations // bands)) ** bands >= 0.9:
            break
        bands *= 2
    return bands
