"""New folders that are whole or absent, and what a conversion says of itself."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lm import manifests
from lm.config import ConfigError

KEPT = "huggingface"  # in a run's folder: the files that it was made of, but for the weights
LAYOUT = "layout.json"  # there: how the weights lay in theirs
UNUSED = "unused.safetensors"  # there: numbers of theirs that the model does not use


class Converted(NamedTuple):
    """What was made: for a line to say."""

    architecture: str
    num_parameters: int
    dtypes: str
    tokenizer: str
    left_out: str = ""  # names of files that were not copied


@contextlib.contextmanager
def placed(target: Path, flag: str) -> Iterator[Path]:
    """Yield a folder that is renamed to `target` when all has gone well, and else removed."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{flag} {target}: there is something already; choose another folder")
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        unfinished.chmod(0o777 & ~_umask())
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            manifests.sync(path)
        os.replace(unfinished, target)
        manifests.sync(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
