"""The types of a config's values: read from the command line's text, checked where Python gave them.

A type is bool, int, float, str, `Duration`, or a tuple of types: `tuple[float, ...]`, `tuple[str, float]`.
"""

import ast
import math
import re
import typing
from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any

Duration = int | str  # steps, or "100 steps", "1e6 tokens", "2 epochs", "10%" (of train.num_steps)

_DURATION = re.compile(r"([0-9._eE+]+)\s*(%|steps?|tokens?|epochs?|)")
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def type_name(hint: Any) -> str:
    """Return the words for a field's type in help and errors."""
    if hint == Duration:
        return "duration"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def from_text(text: str, hint: Any) -> Any:
    """Read a command-line value; ValueError or KeyError where it is none of the type."""
    if hint is bool:
        return _BOOLS[text.lower()]
    if hint in (int, float):
        return from_value(int(text) if re.fullmatch(r"[+-]?[0-9_]+", text) else float(text), hint)
    if typing.get_origin(hint) is not tuple:
        return from_value(text, hint)
    if Ellipsis not in typing.get_args(hint):  # a rule: pattern=value
        return _tuple(text.rsplit("=", 1), hint, read=from_text)
    if text[:1] in ("(", "["):
        try:
            return from_value(ast.literal_eval(text), hint)
        except (ValueError, SyntaxError):
            pass  # a regular expression or a path may start with a bracket too
    return _tuple([item for item in text.split(",") if item], hint, read=from_text)


def from_value(value: Any, hint: Any) -> Any:
    """Check a Python value, and bring it to exactly its type; ValueError where it is none."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if hint is int and number and abs(value) < 2**63 and value == int(value):
        return int(value)
    if hint is float and number and math.isfinite(float(value)):
        return float(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint == Duration:
        amount, unit = parse_duration(value)
        return int(amount) if unit == "step" else value
    if typing.get_origin(hint) is tuple:
        # One string stands for a list of one, as in data.path = "a.txt".
        return _tuple([value] if isinstance(value, str) else value, hint, read=from_value)
    raise ValueError(value)


def _tuple(items: Sequence[Any], hint: Any, *, read: Callable[[Any, Any], Any]) -> tuple[Any, ...]:
    hints = typing.get_args(hint)
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(items)
    return tuple(read(item, inner) for item, inner in zip(items, hints, strict=True))


def parse_duration(value: Duration) -> tuple[Fraction, str]:
    """Return (amount, "step", "token", "epoch" or "%"). Raises ValueError for what is no duration."""
    match = _DURATION.fullmatch(str(value).strip())
    if match and float(match[1]) >= 2**63:  # of a large exponent a fraction takes for ever
        raise ValueError(f"too many: {value}")
    amount, unit = Fraction(match[1] if match else "none"), match[2] if match else ""
    if amount >= 2**63 or (unit in ("", "step", "steps") and amount.denominator != 1):
        raise ValueError(f"too many, or a part of a step: {value}")
    return amount, unit.rstrip("s") or "step"
