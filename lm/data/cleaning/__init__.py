"""Cleaning of documents: named steps in an order, each a pure function, with counts of what each did.

    cleaner = open_cleaner(("unicode", "language keep=en,de min_probability=0.5", "near_duplicates"))
    duplicates, report = cleaner.duplicates(), cleaner.report()
    for cleaned in pool.map(cleaner.clean, texts):  # in any number of processes, in the documents' order
        cleaned = duplicates.admit(cleaned)
        report.add(cleaned)
        if not cleaned.dropped_by:
            ...  # cleaned.text

`STEPS` are all steps by name. A step is a frozen dataclass in a file here (see `step.Step`): its fields are
its arguments, its docstring says what it does and whose rule it is. What compares documents comes last, as
it is asked in their order.

Of a pair of texts both are cleaned by what brings text into shape, masks it or looks for an evaluation's
(`step.Step.TARGETS`), and the rules of quality ask the source alone: they are for documents, and a short
target would fail them.

Any text is taken, in time linear in its length but for a logarithm, and what comes out is valid text.
"""

import dataclasses
import difflib
import hashlib
import json
import shlex
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lm import config
from lm.config import ConfigError
from lm.data import documents
from lm.data.cleaning.boilerplate import Boilerplate
from lm.data.cleaning.c4 import C4
from lm.data.cleaning.duplicates import ExactDuplicates, NearDuplicates
from lm.data.cleaning.fineweb import FineWeb
from lm.data.cleaning.gopher import GopherQuality, GopherRepetition
from lm.data.cleaning.language import Language
from lm.data.cleaning.masking import Mask
from lm.data.cleaning.normalization import Control, Mojibake, Unicode, Whitespace
from lm.data.cleaning.overlap import Overlap
from lm.data.cleaning.pages import Html
from lm.data.cleaning.step import Step

FORMAT = 4  # of the steps' results: one more for every change of what they do
STEPS: dict[str, type[Step]] = {
    "html": Html,
    "mojibake": Mojibake,
    "unicode": Unicode,
    "control": Control,
    "whitespace": Whitespace,
    "boilerplate": Boilerplate,
    "language": Language,
    "gopher_quality": GopherQuality,
    "gopher_repetition": GopherRepetition,
    "c4": C4,
    "fineweb": FineWeb,
    "mask": Mask,
    "overlap": Overlap,
    "exact_duplicates": ExactDuplicates,
    "near_duplicates": NearDuplicates,
}
_ACROSS = (ExactDuplicates, NearDuplicates)  # compare documents


class Cleaned(NamedTuple):
    """What became of one document."""

    text: str  # empty where it was dropped
    dropped_by: str = ""  # the step
    reason: str = ""
    changed: tuple[str, ...] = ()  # the steps that changed it
    sizes: tuple[int, ...] = ()  # characters before the first step and after each that ran
    signatures: tuple[Any, ...] = ()  # for each step that compares documents
    second: str = ""  # of a pair, the target


class Cleaner:
    """Steps in an order. It holds no state, and can be sent to other processes."""

    def __init__(self, steps: Sequence[tuple[str, Step]], depends_on: Sequence[Any]):
        self._within = [(name, step) for name, step in steps if not isinstance(step, _ACROSS)]
        self._across = [(name, step) for name, step in steps if isinstance(step, _ACROSS)]
        self.names = tuple(name for name, _ in steps)
        self.compares = bool(self._across)  # documents with earlier ones
        parts = json.dumps([FORMAT, unicodedata.unidata_version, self.names, depends_on])
        self.fingerprint = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def clean(self, text: str, second: str = "") -> Cleaned:
        """Return what the steps make of a text; those that compare documents are left to `Duplicates`.

        Lone surrogates, which no text has, become U+FFFD first. A document that a step leaves empty is
        dropped by it; one that was empty passes. `second` is the target of a pair, without which that is
        dropped too.
        """
        text, second = documents.whole(text).text, documents.whole(second).text
        sizes = [len(text) + len(second)]
        changed: list[str] = []
        if not text:
            return Cleaned("")
        for name, step in self._within:
            before = text, second
            text, reason = step(text)
            reason = reason or ("" if text else "empty")
            if second and step.TARGETS and not reason:
                second, reason = step(second)
                reason = reason or ("" if second else "empty")
            sizes.append(0 if reason else len(text) + len(second))
            if reason:
                return Cleaned("", name, reason, tuple(changed), tuple(sizes))
            if (text, second) != before:
                changed.append(name)
        signatures = tuple(step.signature(text) for _, step in self._across)
        return Cleaned(text, "", "", tuple(changed), tuple(sizes), signatures, second)

    def duplicates(self) -> "Duplicates":
        """Return a new memory of documents for the steps that compare them."""
        return Duplicates(self._across)

    def report(self) -> "Report":
        """Return counts of nothing yet."""
        return Report(self.names)


class Duplicates:
    """The documents seen, in one process and in their order."""

    def __init__(self, steps: Sequence[tuple[str, Any]]):
        self._indexes = [(name, step.index()) for name, step in steps]

    def admit(self, cleaned: Cleaned) -> Cleaned:
        """Return the document, dropped where an earlier one is its like, and remember it otherwise."""
        sizes = cleaned.sizes
        for (name, index), signature in zip(self._indexes, cleaned.signatures, strict=False):
            if index.seen(signature):
                sizes = (*sizes, 0)
                return Cleaned("", name, "seen before", cleaned.changed, sizes)
            sizes = (*sizes, sizes[-1])
        return cleaned._replace(sizes=sizes, signatures=())


class Report:
    """What each step did, in numbers."""

    def __init__(self, names: Sequence[str]):
        zeros = dict.fromkeys(
            ("documents", "changed", "dropped", "characters_before", "characters_after"), 0
        )
        self.counts: dict[str, dict[str, Any]] = {name: {**zeros, "reasons": {}} for name in names}

    def add(self, cleaned: Cleaned) -> None:
        """Count one document, each step that it came to."""
        for name, before, after in zip(
            self.counts, cleaned.sizes[:-1], cleaned.sizes[1:], strict=False
        ):
            counts = self.counts[name]
            counts["documents"] += 1
            counts["changed"] += name in cleaned.changed
            counts["characters_before"] += before
            counts["characters_after"] += after
            if name == cleaned.dropped_by:
                counts["dropped"] += 1
                reasons = counts["reasons"]
                reasons[cleaned.reason] = reasons.get(cleaned.reason, 0) + 1


def help_text() -> str:
    """Return a line for each step: its name, its arguments with their defaults, and what it does."""
    lines = ["Steps of data.clean, in any order but for those on duplicates, which come last:"]
    for name, cls in STEPS.items():
        fields = [f"{field.name}={field.default!r}" for field in dataclasses.fields(cls)]
        does = (cls.__doc__ or "").partition("\n")[0].removesuffix(".")
        lines.append(f"  {name:<18} {does}")
        lines += [f"  {'':<18} {', '.join(fields)}"] if fields else []
    return "\n".join(lines)


def split_steps(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return the steps of a setting, each "name argument=value ..."; in one string `;` is between them.

    A list that was split at its commas ("language keep=en", "de; mask") is put together again.
    """
    steps: list[str] = []
    for item in (given,) if isinstance(given, str) else given:
        first, *others = (part.strip() for part in item.split(";"))
        if steps and _goes_on(steps[-1], first):
            steps[-1] += f",{first}"
        else:
            steps.append(first)
        steps.extend(others)
    return tuple(step for step in steps if step)


def _goes_on(step: str, text: str) -> bool:
    """Return whether a text is the rest of the step's last argument rather than a step, misspelt or not."""
    begins = text.partition(" ")[0]
    in_value = "=" in step.rpartition(" ")[2] and begins and "=" not in begins
    return bool(in_value and not difflib.get_close_matches(begins, STEPS, n=1, cutoff=0.75))


def open_cleaner(steps: str | Sequence[str]) -> Cleaner:
    """Return the cleaner of steps such as ("unicode", "gopher_quality min_words=20").

    Raises ConfigError for an unknown step or argument (with the nearest), a value of the wrong type or out of
    range, a missing package or file, and a step that compares documents before one that does not.
    """
    opened: list[tuple[str, Step]] = []
    depends_on = []
    for given in split_steps(steps):
        try:
            name, step = _open_step(given)
            depends_on.append(step.depends_on())
        except ConfigError as error:
            message = str(error).replace("data.path", "path")  # of an evaluation's files
            raise ConfigError(f"data.clean={given!r}: {message}") from None
        if opened and isinstance(opened[-1][1], _ACROSS) and not isinstance(step, _ACROSS):
            raise ConfigError(
                f"data.clean={given!r}: stands after {opened[-1][0]}, which compares cleaned documents; put "
                "it before"
            )
        times = sum(other.split("#")[0] == name for other, _ in opened)
        opened.append((f"{name}#{times + 1}" if times else name, step))
    return Cleaner(opened, depends_on)


def _open_step(given: str) -> tuple[str, Step]:
    try:
        name, *arguments = shlex.split(given)
    except ValueError as error:  # a quote without its end
        raise ConfigError(f"{error}; close the quotes") from None
    if name not in STEPS:
        nearest = difflib.get_close_matches(name, STEPS, n=1)
        fix = f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(STEPS)}"
        raise ConfigError(f"{name}: no such step; {fix}")
    cls = STEPS[name]
    fields = [field.name for field in dataclasses.fields(cls)]
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: no value; write argument=value")
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            fix = f"did you mean {nearest[0]}?" if nearest else "it has none; leave it out"
            raise ConfigError(f"{key}: no such argument of {name}; {fix}")
    try:
        assignments = [f"{name}.{argument}" for argument in arguments]
        values = config.override(ConfigDict({name: {}}), assignments, {name: lambda _: cls})
        return name, config.freeze(cls, values[name] if arguments else {}, where=name)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{name}.", "")) from None
