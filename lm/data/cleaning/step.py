"""What every step of the cleaning is: a frozen dataclass whose fields are its arguments."""

import dataclasses
import importlib.metadata
from dataclasses import dataclass
from typing import Any, ClassVar

from lm.config import ConfigError


@dataclass(frozen=True)
class Step:
    """A pure function of a text: (the text it leaves, why the document is dropped or "").

    Arguments are checked in `__post_init__`, which raises ConfigError; a reason is the name of the argument
    whose bound was passed, where there is one.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ()  # packages of the extra `data` that it needs
    TARGETS: ClassVar[bool] = False  # whether of a pair the target is given to it as well

    def __call__(self, text: str) -> tuple[str, str]:
        raise NotImplementedError

    def depends_on(self) -> dict[str, Any]:
        """Return all that the result depends on beside this code. Raises ConfigError: a missing package."""
        return dataclasses.asdict(self) | {name: _version(name) for name in self.LIBRARIES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"needs the package {package}; pip install -e '.[data]'") from None


def check_share(step: Step, *names: str) -> None:
    """Raise ConfigError for an argument that is no share in [0, 1]."""
    for name in names:
        if not 0 <= getattr(step, name) <= 1:
            raise ConfigError(f"{name}={getattr(step, name)}: use a share from 0 to 1")


def check_least(step: Step, **least: int) -> None:
    """Raise ConfigError for an argument below its least value."""
    for name, value in least.items():
        if getattr(step, name) < value:
            raise ConfigError(f"{name}={getattr(step, name)}: too small; use {value} or more")
