"""The language of a document, by py3langid."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from lm.config import ConfigError
from lm.data.cleaning import segmentation
from lm.data.cleaning.step import Step, check_share

# Names that share a written standard with another are counted as that one, unless they are asked for.
_KIN = {"wuu": "zh", "yue": "zh", "nn": "no", "arz": "ar", "ary": "ar", "pcm": "en", "uzs": "uz"}
_PART = 1000  # characters of each part that is looked at


@dataclass(frozen=True)
class Language(Step):
    """Keep documents in the languages `keep`, each surer than `min_probability`.

    By py3langid (Barbaresi; after langid.py, Lui and Baldwin 2012), whose model of 140 languages is in the
    package. Of a long document it reads the beginning, the middle and the end, 1,000 characters each. Wu and
    Cantonese count as Chinese, Nynorsk as Norwegian, Egyptian and Moroccan Arabic as Arabic, Nigerian Pidgin
    as English, unless `keep` names them.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ("py3langid",)

    keep: tuple[str, ...] = ()  # ISO 639-1 codes, such as en,de
    min_probability: float = 0.65  # below it no language is taken for known

    def __post_init__(self):
        check_share(self, "min_probability")
        if not self.keep:
            raise ConfigError("keep: no language; name those to keep, as in keep=en,de")

    def depends_on(self) -> dict[str, Any]:
        versions = super().depends_on()  # first, as it says whether the package is there
        known = _identifier().labels
        for name in self.keep:
            if name not in known:
                raise ConfigError(
                    f"keep={name}: no such language; use codes of ISO 639, of {', '.join(sorted(known))}"
                )
        return versions

    def __call__(self, text: str) -> tuple[str, str]:
        if len(text) > 3 * _PART:
            middle = len(text) // 2 - _PART // 2
            text_read = f"{text[:_PART]}\n{text[middle : middle + _PART]}\n{text[-_PART:]}"
        else:
            text_read = text
        shares: dict[str, float] = {}
        for name, share in _identifier().rank(segmentation.normalized(text_read, "NFC")):
            if name not in self.keep:
                name = _KIN.get(name, name)
            shares[name] = shares.get(name, 0.0) + share
        best = max(shares, key=lambda name: shares[name])
        if shares[best] < self.min_probability:
            return text, "min_probability"
        return text, "" if best in self.keep else best


@functools.cache
def _identifier() -> Any:
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
