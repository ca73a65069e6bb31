"""The settings in a folder's config.json, each read with its type and its default."""

from collections.abc import Collection, Mapping
from typing import Any

from lm.config import ConfigError
from lm.convert.safetensors_file import shown

MOST = 1 << 31  # no size of a model is larger


class Settings:
    """A config.json's object; `where` names it in errors, and `tensors` are the folder's, where there is one.

    A default is the one that transformers has for the architecture: configs leave such settings out.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, tensors: Collection[str] = ()
    ) -> None:
        self.values, self.where, self.tensors = values, where, tensors

    def __contains__(self, key: str) -> bool:
        return key in self.values and self.values[key] is not None

    def integer(self, key: str, default: int) -> int:
        """Return a size of 1 or more; 0 only where it is the default and left out."""
        value = self.values[key] if key in self else default
        if type(value) is not int or not (1 <= value < MOST or value == default):
            raise self.wrong(key, "a whole number from 1 on")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a number, 0 or more."""
        value = self.values[key] if key in self else default
        if type(value) not in (int, float) or not 0 <= value < float(MOST):
            raise self.wrong(key, "a number, 0 or more")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.values[key] if key in self else default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def one_of(self, key: str, default: str, options: Mapping[str, str]) -> str:
        """Return what `options` has for a text."""
        value = self.values[key] if key in self else default
        if not isinstance(value, str) or value not in options:
            raise self.wrong(key, f"one of {', '.join(options)}")
        return options[value]

    def only(self, **values: Any) -> None:
        """Refuse a setting that is given and not the one value that is known here."""
        for key, value in values.items():
            if key in self and self.values[key] != value:
                raise self.wrong(key, f"{value!r}, the only one that is known here")

    def section(self, key: str) -> "Settings":
        """Return an object inside this one; an empty one where it is left out."""
        value = self.values[key] if key in self else {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Settings(value, f"{self.where}: {key}")

    def wrong(self, key: str, wanted: str) -> ConfigError:
        """Return the error for a setting that is not `wanted`."""
        return ConfigError(f"{self.where}: {key}={shown(self.values.get(key))}, expected {wanted}")
