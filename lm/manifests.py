"""The part of a checkpoint that says it is whole: its manifest. Files and folders only, no arrays.

A checkpoint is the folder `<workdir>/checkpoints/<step>/`. Its `manifest.json` is written last: size and
SHA-256 of every file, shape, type and fingerprint of every array, the metrics. Without one that matches,
it is not good. Nothing here deletes: what is not good is moved aside.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

MANIFEST = "manifest.json"
IDENTITY = "identity.json"  # in the workdir: which run it is of, as are its checkpoints, here and elsewhere
FORMAT = 3
# Errors of reading that say nothing of the file: try again.
PASSING = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN,
)  # fmt: skip
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # and those that say that there is none
READ = (2, 3)  # formats that are read: 2 has no fingerprints
LARGEST = 10**9  # bytes of a manifest: a larger one is damaged, and would fill the memory
UNREADABLE = "cannot be read"  # of a file that may be as it was
FOREIGN = "it is another run's"
EARLY = 2**20  # bytes: smaller files are hashed in no time when all are there
Known = dict[tuple[int, int, int], str]  # hashes by (inode, bytes, nanoseconds of the last change)


@contextlib.contextmanager
def hashing(target: Path) -> Iterator[Known]:
    """Within, large files below `target` are hashed as they are finished, while others are written."""
    known: Known = {}
    written = threading.Event()

    def follow_file(path: Path) -> None:
        key = _key(path)
        unfinished = path.name.endswith(".__lock")  # as tensorstore names what it is writing
        if key[1] >= EARLY and key not in known and not unfinished and not written.is_set():
            known[key] = hash_file(path)

    def follow() -> None:
        while not written.wait(0.02):
            for folder, _, names in os.walk(target):  # which goes on where a folder was renamed
                for name in names:
                    with contextlib.suppress(OSError):  # renamed too, or `write` tells of it
                        follow_file(Path(folder, name))

    thread = threading.Thread(target=follow, name="hashing", daemon=True)
    thread.start()
    try:
        yield known
    finally:
        written.set()
        thread.join()


def _key(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file does, and not when it is renamed."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def write(
    target: Path,
    manifest: dict[str, Any],
    known: Mapping = MappingProxyType({}),
    check: Callable[[], None] = lambda: None,
) -> None:
    """Make the checkpoint at `target` good: hash its files, then write the manifest, all of it synced.

    Raises OSError where it cannot be written, or is then not what was written.

    Args:
      known: what `hashing` gave; a file that changed since, or is not in it, is hashed now.
      check: raises OSError where `target` is not the folder any more that it was; then it is left alone.
    """
    check()
    for name in (MANIFEST, f"{MANIFEST}.partial"):  # of a try that failed
        (target / name).unlink(missing_ok=True)
    found = below(target)
    files = [path for path in found if path.is_file()]
    manifest["files"] = {
        str(path.relative_to(target)): [
            path.stat().st_size,
            known.get(_key(path)) or hash_file(path),
        ]
        for path in files
    }
    # Folders too, and those that hold it: a file whose name is not on the disk is lost with the power.
    for path in (*found, target.parent, target.parent.parent):
        sync(path)
    manifest["digest"] = digest(manifest)
    check()
    write_whole(target / MANIFEST, json.dumps(manifest, indent=1))
    if bad := problem(target.parent, int(target.name)):
        changed = f": {IDENTITY} in the run's folder was changed; restore it"
        raise OSError(f"{bad}{changed if bad == FOREIGN else ''}")


def add_metrics(folder: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Put `metrics` into the manifest of a good checkpoint, whose files are not read again."""
    manifest = read(folder, step)
    if manifest is None:
        raise OSError(f"it has no whole {MANIFEST}")
    manifest["metrics"] = {**manifest["metrics"], **metrics}
    manifest["digest"] = digest(manifest)
    write_whole(folder / str(step) / MANIFEST, json.dumps(manifest, indent=1))


def digest(manifest: Mapping[str, Any]) -> str:
    """Return what `manifest["digest"]` is when nothing of it was changed."""
    body = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file so that it is whole, as before or absent whatever happens."""
    partial = path.with_name(f"{path.name}.partial")
    if isinstance(content, str):
        partial.write_text(content, encoding="utf-8")
    else:
        partial.write_bytes(content)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object whole, with a digest of all that is in it, which `receipt.read_json` checks."""
    plain = json.loads(json.dumps(content, default=str, allow_nan=False))
    write_whole(path, json.dumps({**plain, "digest": digest(plain)}, indent=1) + "\n")


def below(folder: Path) -> list[Path]:
    """Return all that is in a folder and its folders, sorted. Raises OSError of what cannot be listed."""
    return sorted(
        Path(at, name)
        for at, folders, files in os.walk(folder, onerror=_raise)
        for name in (*folders, *files)
    )


def _raise(error: OSError) -> None:
    raise error


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move_aside(path: Path, name: str = "") -> Path | None:
    """Rename a checkpoint's folder, or a file, out of the way, losing nothing; None when there is none.

    The new name is `name`, or the old one, with .aside and a number.
    """
    if not os.path.lexists(path):
        return None
    number = 0
    while os.path.lexists(aside := path.with_name(f"{name or path.name}.aside{number}")):
        number += 1
    return path.rename(aside)


def content(path: Path) -> bytes:
    """Return what is in one of a run's own files. Raises OSError where it is no plain file, or too large."""
    about = path.stat()  # a pipe would be waited for, and a device may have no end
    if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
        raise OSError(f"{path}: no plain file of at most {LARGEST:,} bytes")
    return path.read_bytes()


def read(folder: Path, step: int) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint; None where there is none that makes sense.

    Raises OSError of what passes (`PASSING`), and so says nothing of the file.
    """
    try:
        return parsed(content(folder / str(step) / MANIFEST), step)
    except OSError as error:
        if error.errno in PASSING:
            raise
        return None


def parsed(text: bytes, step: int) -> dict[str, Any] | None:
    """Return the manifest of `step` that a text is; None where it is none that makes sense."""
    try:
        manifest = json.loads(text)
        whole = manifest["digest"] == digest(manifest) and manifest["step"] == step
        inside = all(map(_is_inside, (*manifest["files"], *manifest.get("run", ()))))
        return manifest if whole and inside else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _is_inside(name: str) -> bool:
    """Return whether a file's name stays in the folder that it is given in."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def all_steps(folder: Path) -> list[int]:
    """Return every step that has a folder, good or not, ascending."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if is_step(path.name))


def run_of(folder: Path) -> str:
    """Return which run the checkpoints in `folder` are to be of; "" where nothing says so.

    Raises OSError of what says nothing of the file: it passes, or is a matter of rights.
    """
    try:
        found = json.loads(content(folder.parent / IDENTITY))
        return str(found["identity"]) if found.pop("digest") == digest(found) else ""
    except OSError as error:
        if error.errno in (*PASSING, errno.EACCES):
            raise
        return ""
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""


def identify(workdir: Path, begins: str) -> str:
    """Let a workdir say which run it is of: that of its newest checkpoint that says so, or what `begins`."""
    folder = workdir / "checkpoints"
    if run := run_of(folder):
        return run
    found = ((read(folder, step) or {}).get("identity") for step in reversed(good_steps(folder)))
    run = next(filter(None, found), begins)
    workdir.mkdir(parents=True, exist_ok=True)
    move_aside(workdir / IDENTITY)
    write_sealed(workdir / IDENTITY, {"identity": run})
    return run


def began_as(folder: Path, step: int) -> Path | None:
    """Return the identity that was moved aside here and that a checkpoint has, if there is one."""
    run = (read(folder, step) or {}).get("identity")
    for path in sorted(folder.parent.glob(f"{IDENTITY}.aside*")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            if run and json.loads(content(path))["identity"] == run:
                return path
    return None


def is_step(name: str) -> bool:
    """Return whether a folder's name is a step, as steps are written: no 030."""
    return name.isdecimal() and str(int(name)) == name


def good_steps(folder: Path) -> list[int]:
    """Return the steps whose checkpoints were finished by this run, ascending (their files are not read)."""
    run = run_of(folder)
    found = {step: read(folder, step) for step in all_steps(folder)}
    return [step for step, known in found.items() if known and not is_foreign(known, run)]


def best_step(folder: Path, metric: str) -> int | None:
    """Return the finished step with the lowest `metric`; None when none has it."""
    values = {
        step: value
        for step in good_steps(folder)
        if (value := (read(folder, step) or {"metrics": {}})["metrics"].get(metric)) is not None
        and math.isfinite(value)
    }
    return min(values, key=values.__getitem__) if values else None


def problem(folder: Path, step: int) -> str:
    """Return what is wrong with the files of a checkpoint, naming one; "" for nothing."""
    manifest = read(folder, step)
    if manifest is None and (why := _forbidden(folder / str(step) / MANIFEST)):
        return why
    if manifest is None:
        return f"it has no whole {MANIFEST}: its saving never finished, or the file is damaged"
    if manifest.get("format") not in READ:
        known = ", ".join(map(str, READ))
        return f"its format is {manifest.get('format')}, and this version reads {known}"
    if is_foreign(manifest, run_of(folder)):
        return FOREIGN
    return files_problem(folder / str(step), manifest)


def is_foreign(manifest: Mapping[str, Any], run: str) -> bool:
    """Return whether a checkpoint is of another run than `run`; one of an older version does not say."""
    return bool(run) and (manifest.get("identity") or run) != run


def files_problem(target: Path, manifest: Mapping[str, Any]) -> str:
    """Return which file of the folder `target` is not what its manifest says, and why; "" for none."""
    for name, (size, digest) in manifest["files"].items():
        path = target / name
        try:
            if not path.is_file():
                return f"file {name} is missing"
            if path.stat().st_size != size or hash_file(path) != digest:
                return f"file {name} is not what was written"
        except OSError as error:
            if error.errno in PASSING:
                raise
            return f"file {name} {UNREADABLE}: {error.strerror}"
    return ""


def _forbidden(path: Path) -> str:
    """Return that a file cannot be read, which says nothing of what is in it; "" where it can, or is none."""
    try:
        content(path)
    except OSError as error:
        if error.errno not in (None, *ABSENT):
            return f"file {path.name} {UNREADABLE}: {error.strerror}"
    return ""
