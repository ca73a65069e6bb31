"""What a run's numbers depend on, written at each of its starts: `<workdir>/receipts/0001.json` and on.

The resolved config with where each value is from, the code (commit, and a file with what differs from
it, "unknown" where git does not say), the versions of all packages, devices and flags, the hashes of
tokenizer and data, the seed. No receipt is ever overwritten; `tools.verify --compare` says in which two runs
differ.
"""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm import config as config_lib
from lm import experiment, manifests, peers
from lm.config import ConfigError

FOLDER = "receipts"
FORMAT = 1
DEFAULT, FILE, DERIVED = "default", "file", "derived"  # origins; of others the caller says
UNKNOWN = "unknown"  # what differs from the commit, where git does not say
# The same whatever a user has set for git, and such that it can be applied.
_DIFF = (
    "diff", "--no-ext-diff", "--no-color", "--no-textconv", "--binary", "--src-prefix=a/", "--dst-prefix=b/",
)  # fmt: skip
_ROOT = Path(__file__).parent.parent
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "NCCL_", "LM_CACHE_DIR", "NPROC")
_OF_ONE_PROCESS = ("JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS")


def origins(
    given: Mapping[str, Any], made: experiment.Experiment, said: Mapping[str, str]
) -> dict[str, str]:
    """Return where each value of the resolved config of `made` is from.

    `given` has what the experiment file and the caller set, `said` the fields among them that the caller
    knows better of: those of the command line, of a sweep.
    """
    before, after = config_lib.flatten(given), config_lib.flatten(made.config)
    complete = config_lib.flatten(config_lib.complete(given, experiment.SCHEMA))

    def origin(name: str) -> str:
        if config_lib.plain(complete.get(name)) != config_lib.plain(after[name]):
            return DERIVED
        return said.get(name, FILE if name in before else DEFAULT)

    return {name: origin(name) for name in after}


def write(
    workdir: Path, made: experiment.Experiment, first: int, origin: Mapping[str, str]
) -> Path:
    """Write the receipt of a start at step `first` and return its path."""
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(path.stem) for path in _all(workdir)), default=0) + 1
    while (path := folder / f"{number:04d}.json").exists():  # where the folder could not be listed
        number += 1
    flat = config_lib.flatten(made.config)
    found = {
        "format": FORMAT,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": sys.argv,
        "first_step": first,
        "config": {name: [flat[name], origin.get(name, DEFAULT)] for name in flat},
        "code": _code(folder),
        "packages": packages(),
        "environment": experiment.environment(made),
        "variables": variables(),
        "data": {
            "tokenizer": made.corpus.tokenizer.fingerprint,
            "corpus": made.corpus.fingerprint,
        },
        "seeds": {"seed": made.config.seed},
    }
    manifests.write_sealed(path, found)
    return path


def _all(workdir: Path) -> list[Path]:
    """Return the receipts of a run, in order; a copy that something else has put there is none."""
    found = (workdir / FOLDER).glob("*.json")
    return sorted(
        (path for path in found if path.stem.isdecimal()), key=lambda path: int(path.stem)
    )


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """Return the object in one of the workdir's own files, `sealed` where it is written with a digest.

    Raises ConfigError where it is damaged.
    """
    try:
        found = dict(json.loads(manifests.content(path)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged ({error}); restore the file") from None
    if sealed and "digest" not in found:
        raise ConfigError(f"{path}: damaged (it has no digest); restore the file")
    if found.pop("digest", digest := manifests.digest(found)) != digest:
        raise ConfigError(f"{path}: damaged (not what was written); restore the file")
    return found


def read_all(workdir: Path) -> list[dict[str, Any]]:
    """Return the receipts of a run, in the order of its starts. Raises ConfigError where one is damaged."""
    return [_read(path) for path in _all(workdir)]


def last(workdir: Path) -> dict[str, Any]:
    """Return the newest receipt of a run; {} where it has none. Raises ConfigError where it is damaged."""
    found = _all(workdir)
    return _read(found[-1]) if found else {}


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path, sealed=True)
    if not isinstance(found.get("config"), dict):
        raise ConfigError(f"{path}: damaged (it has no config); restore the file")
    return found


def in_force(receipts: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """Return that of `receipts` whose start took the step after `step`; {} where none tells."""
    # A later start that went back took its steps again.
    first = ((found.get("first_step", math.inf), found) for found in reversed(receipts))
    return next((found for begun, found in first if begun <= step), {})


def config_at(workdir: Path, step: int) -> dict[str, Any]:
    """Return {field: value} of the start that took the step after `step`; {} where no receipt tells."""
    found = in_force(read_all(workdir), step).get("config", {})
    return {name: value for name, (value, _) in found.items()}


def environment(workdir: Path) -> dict[str, Any]:
    """Return the environment of a run's newest start; of a run of an earlier version it is a file's."""
    old = workdir / "environment.json"
    if (found := last(workdir)) or not old.exists():
        return found.get("environment", {})
    return read_json(old)


@functools.cache
def packages() -> dict[str, str]:
    """Return the version of every installed package: of one that is there twice the one that is imported."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        about = distribution.metadata  # read anew each time
        if name := about["Name"]:
            found.setdefault(name, about["Version"])
    return {name: found[name] for name in sorted(found)}


def variables() -> dict[str, str]:
    """Return the environment variables that jax, XLA and this package read, but for those of one process."""
    names = [name for name in os.environ if name.startswith(_VARIABLES)]
    return {name: os.environ[name] for name in sorted(names) if name not in _OF_ONE_PROCESS}


def _code(folder: Path) -> dict[str, str]:
    """Say which code this is; what differs from its commit goes into a file in `folder`, once."""
    digest = {"digest": peers.code_version()}
    commit = _git("rev-parse", "HEAD")
    if not commit or _git("ls-files", "--error-unmatch", "lm/receipt.py") is None:
        return {**digest, "commit": UNKNOWN if (_ROOT / ".git").exists() else "not a repository"}
    if not (diff := _diff()):
        return {**digest, "commit": commit.strip(), "diff": UNKNOWN if diff is None else ""}
    name = f"{hashlib.sha256(diff.encode()).hexdigest()[:16]}.diff"
    if not (folder / name).exists():
        manifests.write_whole(folder / name, diff)
    return {**digest, "commit": commit.strip(), "diff": name}


def _diff() -> str | None:
    """Return what differs from the commit, with files that it does not have; None where git does not say."""
    others = _git(
        "ls-files", "--others", "--exclude-standard", "-z", "--", "lm", "tools", "experiments"
    )
    if others is None:
        return None
    parts = [_git(*_DIFF, "HEAD")]
    for name in filter(None, others.split("\0")):
        parts.append(_git(*_DIFF, "--no-index", "--", os.devnull, name))
    return None if None in parts else "".join(filter(None, parts))


def _git(*words: str) -> str | None:
    """Return what git says of this code; None where it has nothing to say, or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *words],
            capture_output=True,
            timeout=30,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # With --no-index 1 is: they differ.
    accepted = (0, 1) if "--no-index" in words else (0,)
    return done.stdout.decode(errors="replace") if done.returncode in accepted else None
