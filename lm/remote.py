"""A second place for good checkpoints: a folder, or a URL that fsspec opens (gs://, s3://, file://, memory://).

Each is copied by a thread after it is good here: its files first, hashed again where they arrived, its
manifest last. So what has a whole manifest there is whole, and a copy that was cut short is none. Beside its
files lie those of the run's folder (`run/`: config, data, rows of metrics), so that a run goes on where
nothing is left of it here. Nothing but an unfinished or older copy of the same step is deleted there.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec

from lm import exits, manifests
from lm.config import ConfigError

FETCHED = "fetched"  # file of a workdir until a run goes on from what a second place had
FETCHING = "fetching"  # a folder's name while it is brought here
RUN = "run"  # beside a copy's state: files of the run's folder
RECEIPTS = "receipts"  # a folder of it
ABSENT = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
)  # all else says nothing of a file
TRIES = 3  # to reach it when a run begins or ends
WAIT = 5.0  # seconds between two tries; doubled each time while a run trains
LONGEST = 300.0
AT_LEAST = 1.0  # seconds to wait for the last copy, and between two looks at how long


class Remote:
    """Copies the good checkpoints of `folder` to `url`, and back."""

    def __init__(self, url: str, folder: Path, say: Callable[[str], None]):
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(
                f"checkpoint.remote={url}: {error}; give a folder, or a URL that fsspec opens"
            ) from None
        own = os.path.realpath(folder.parent)
        if self._local and Path(os.path.realpath(self._root)).is_relative_to(own):
            raise ConfigError(
                f"checkpoint.remote={url}: in the run's own folder, which it is to outlive; give another"
            )
        self.url, self._folder, self._say = url, folder, say
        self._due: int | None = None  # the next to be copied
        self._now: int | None = None  # the one that is copied
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def _local(self) -> bool:
        """Whether the place is a folder of this machine, or mounted on it."""
        return bool(getattr(self._fs, "local_file", False))

    def copy(self, step: int) -> None:
        """Begin to copy the checkpoint of `step`, which is good; return at once."""
        with self._changed:
            if self._due is not None:
                self._say(f"checkpoint {self._due} is not copied to {self.url}: {step} is newer")
            if self._thread is None:
                thread = threading.Thread(target=self._work, daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads
                    self._say(f"checkpoint {step} is not copied to {self.url}: {error}")
                    return
                self._thread = thread
            self._due = step
            self._changed.notify_all()

    def needed(self) -> set[int]:
        """Return the steps that are not to be deleted here yet."""
        with self._changed:
            return {step for step in (self._due, self._now) if step is not None}

    def close(self, seconds: float = 0.0, until: Callable[[], float] = lambda: math.inf) -> None:
        """Wait until what is due is copied, is given up, or time is over; say which.

        That is in `seconds`, of 0 never, or when time.monotonic is `until`, which may come nearer meanwhile.
        """
        with self._changed:
            self._closing = True
            if self._due is not None or self._now is not None:
                self._say(f"waiting for the copy to {self.url}")
            self._changed.notify_all()
        began = time.monotonic()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(AT_LEAST)
            now = time.monotonic()
            if now > min(until(), began + (seconds or math.inf)):
                break
        for step in sorted(self.needed()):
            self._say(
                f"checkpoint {step} is not copied to {self.url}: that takes longer than "
                f"{time.monotonic() - began:.3g} s (checkpoint.timeout_seconds; of a stop, the rest of "
                "checkpoint.grace_seconds); given up"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._due is not None)
                if self._due is None:
                    return
                self._now, self._due = self._due, None
            self._until_copied(self._now)
            with self._changed:
                self._now = None

    def _until_copied(self, step: int) -> None:
        """Try to copy until it is done, a newer one is due, or the run ends."""
        wait, left = WAIT, TRIES
        while True:
            try:
                self._upload(step)
                return
            except Exception as error:  # every file system raises its own
                problem = exits.line(error)
            with self._changed:
                closing = self._closing
                left -= closing
                given_up = left == 0 or self._due is not None
                then = "a newer one is" if self._due is not None else "given up"
                self._say(
                    f"checkpoint {step} is not copied to {self.url}: {problem}; "
                    f"{then if given_up else 'trying again'}"
                )
                if given_up:
                    return
                self._wait_for_news(min(wait, WAIT if closing else wait))
            wait = min(2 * wait, LONGEST)

    def _wait_for_news(self, seconds: float) -> None:
        """Wait until a newer one is due, the run begins to end, or `seconds` are over."""
        closing = self._closing
        self._changed.wait_for(
            lambda: self._due is not None or self._closing != closing, timeout=seconds
        )

    def _upload(self, step: int) -> None:
        """Copy a checkpoint, manifest last. Raises what the file system does, or OSError."""
        manifest = manifests.read(self._folder, step)
        if manifest is None:
            raise OSError("it is not good here any more")
        there, run = f"{self._root}/{step}", manifests.run_of(self._folder)
        found = self._manifest(step)
        if manifests.is_foreign(manifest, run) or manifests.is_foreign(found or {}, run):
            raise OSError(f"{self._folder / str(step)} or {there} is another run's")
        if found and found["arrays"] == manifest["arrays"] and self._is_whole(there, found):
            return
        if found:  # an older one of the same step: no copy from here on
            self._fs.rm_file(f"{there}/{manifests.MANIFEST}")
        for path in self._fs.find(there):  # by name: `rm` takes [ and * for patterns
            self._fs.rm_file(path)
        for name, (_, digest) in manifest["files"].items():
            self._put(self._folder / str(step) / name, f"{there}/{name}", digest)
        manifest[RUN] = {}
        workdir = self._folder.parent
        names = [name for name in sorted(os.listdir(workdir)) if ".json" in name]
        if missing := {"config.json", "data.json"} - set(names):
            raise OSError(f"{workdir / min(missing)} is missing, and a copy is none without it")
        with contextlib.suppress(FileNotFoundError):
            names += [f"{RECEIPTS}/{name}" for name in sorted(os.listdir(workdir / RECEIPTS))]
        for name in names:
            if (path := workdir / name).is_file() and path.suffix != ".partial":
                content = path.read_bytes()  # at once: rows are being added
                manifest[RUN][name] = hashlib.sha256(content).hexdigest()
                self._put(content, f"{there}/{RUN}/{name}", manifest[RUN][name])
        manifest["digest"] = manifests.digest(manifest)
        text = json.dumps(manifest, indent=1)
        self._fs.pipe_file(f"{there}/{manifests.MANIFEST}", text.encode())
        for place in (f"{there}/{manifests.MANIFEST}", there, self._root):
            self._sync(place)
        if self._manifest(step) != manifest:
            raise OSError(f"file {manifests.MANIFEST} did not arrive whole")

    def _put(self, what: Path | bytes, there: str, digest: str) -> None:
        """Write a file, or these bytes, and read them back. Raises OSError where they differ."""
        self._fs.makedirs(there.rpartition("/")[0], exist_ok=True)
        if isinstance(what, bytes):
            self._fs.pipe_file(there, what)
        else:
            self._fs.put_file(str(what), there)
        self._sync(there)
        if not self._has(there, digest):
            raise OSError(f"file {there.rpartition('/')[2]} did not arrive whole")

    def _has(self, there: str, digest: str) -> bool:
        with self._fs.open(there, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest

    def _is_whole(self, there: str, manifest: dict) -> bool:
        """Return whether every file of a copy is what its manifest says."""
        files = {name: digest for name, (_, digest) in manifest["files"].items()}
        files |= {f"{RUN}/{name}": digest for name, digest in manifest.get(RUN, {}).items()}
        try:
            return all(self._has(f"{there}/{name}", digest) for name, digest in files.items())
        except FileNotFoundError:
            return False

    def _sync(self, there: str) -> None:
        """Bring a file or folder to the disk, and its name, where the place is a folder."""
        if self._local:
            manifests.sync(Path(there))
            manifests.sync(Path(there).parent)

    def _manifest(self, step: int) -> dict | None:
        """Return the manifest of a copy, None where there is none that makes sense.

        Raises what the file system does where it cannot be told: its own `exists` would say no.
        """
        self._fs.invalidate_cache()
        try:
            text = self._fs.cat_file(f"{self._root}/{step}/{manifests.MANIFEST}")
        except ABSENT:
            return None
        return manifests.parsed(text, step)

    def steps(self) -> list[int]:
        """Return the steps of which there is a folder, ascending.

        Raises:
          ConfigError: the place is no folder, and will never hold a copy.
          OSError: none can be seen.
        """
        try:
            self._fs.invalidate_cache()
            if self._local and os.path.islink(self._root):
                _follow(self._root)
            folder = self._fs.info(self._root)["type"] == "directory"
            names = [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, False)]
        except FileNotFoundError:
            return []
        except Exception as error:  # every file system raises its own
            raise OSError(f"{self.url}: {error}") from error
        if not folder:
            raise ConfigError(f"checkpoint.remote={self.url}: it is no folder; give another place")
        return sorted(int(name) for name in names if manifests.is_step(name))

    def seen(self) -> tuple[list[int], str]:
        """Return the steps that are there, and what keeps them from being seen."""
        try:
            return self.steps(), ""
        except OSError as error:
            return [], str(error)

    def check_own(self, steps: Sequence[int]) -> None:
        """Raise ConfigError where the newest copy that can be read is of another run than this folder."""
        run = manifests.run_of(self._folder)
        for step in reversed(steps):
            try:
                manifest = self._manifest(step)
            except Exception:  # every file system raises its own, and `fetch` tells of it
                continue
            if manifest and manifests.is_foreign(manifest, run):
                raise ConfigError(
                    f"checkpoint.remote={self.url}: its checkpoint {step} is another run's; give this run a "
                    "place of its own"
                )
            if manifest:
                return

    def fetch(self, step: int, newest: bool = True) -> str:
        """Bring the checkpoint of `step` here, whole; return what is wrong with it, "" for nothing.

        Args:
          newest: there was none as new here; else the files of the run's folder that are here stay.

        Raises:
          ConfigError: it cannot be brought here, which says nothing of it.
        """
        for left in reversed(range(TRIES)):
            try:
                return self._fetch(step, newest)
            except Exception as error:  # every file system raises its own
                problem = exits.line(error)
            if left:
                time.sleep(WAIT)
        raise ConfigError(
            f"checkpoint.remote: checkpoint {step} of {self.url} cannot be brought here: {problem}; try "
            "again when it can, or set checkpoint.remote='' to go on without it"
        )

    def _fetch(self, step: int, newest: bool) -> str:
        target = self._folder / f"{step}.{FETCHING}"
        try:
            manifest = self._manifest(step)
            if manifest is None:
                return f"it has no whole {manifests.MANIFEST}"
            if manifests.is_foreign(manifest, manifests.run_of(self._folder)):
                return "it is another run's"
            shutil.rmtree(target, ignore_errors=True)
            for name in manifest["files"]:
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._fs.get_file(f"{self._root}/{step}/{name}", str(path))
                except ABSENT:
                    return f"file {name} is missing"
            digests = manifest.pop(RUN, None)
            manifest["digest"] = manifests.digest(manifest)
            manifests.write_whole(target / manifests.MANIFEST, json.dumps(manifest, indent=1))
            if problem := manifests.files_problem(target, manifest):
                return problem
            if problem := self._fetch_run(step, newest, digests):
                return problem
            for path in (target, *target.rglob("*")):
                manifests.sync(path)
            if newest:
                manifests.write_whole(self._folder.parent / FETCHED, self.url)
            target.rename(self._folder / str(step))
            for path in (self._folder, self._folder.parent):
                manifests.sync(path)
        finally:
            shutil.rmtree(target, ignore_errors=True)
        return ""

    def _fetch_run(self, step: int, newest: bool, digests: dict[str, str] | None) -> str:
        """Bring the files of the run's folder; those of an older part of the run are moved aside.

        Return which of those that its numbers depend on is not what was written, "" for none: of rows it is
        said, and they are left out. A copy of an older version has no digests.
        """
        there = f"{self._root}/{step}/{RUN}"
        names = digests
        if names is None:
            found: list[str] = []
            with contextlib.suppress(FileNotFoundError):
                found = self._fs.ls(there, False)
            names = dict.fromkeys((path.rstrip("/").rpartition("/")[2] for path in found), "")
        partials = {name: self._folder.parent / f"{name}.partial" for name in names}
        for partial in partials.values():
            partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            for name, partial in partials.items():
                if not (problem := self._fetch_file(f"{there}/{name}", partial, names[name])):
                    continue
                if not name.endswith(".jsonl") and not name.startswith(RECEIPTS):
                    return f"file {RUN}/{name} {problem}"
                self._say(f"file {RUN}/{name} of checkpoint {step} {problem}; going on without it")
                partial.unlink(missing_ok=True)
            for name, partial in partials.items():
                here = self._folder.parent / name
                if not partial.exists() or (here.exists() and not newest):
                    continue
                if not here.exists() or here.read_bytes() != partial.read_bytes():
                    manifests.move_aside(here)
                    partial.replace(here)
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
        return ""

    def _fetch_file(self, there: str, partial: Path, digest: str) -> str:
        """Bring one file here, synced; return what is wrong with it, "" for nothing."""
        try:
            self._fs.get_file(there, str(partial))
        except ABSENT:
            return "is missing"
        manifests.sync(partial)
        good = not digest or manifests.hash_file(partial) == digest
        return "" if good else "is not what was written"


def _follow(link: str) -> None:
    """Raise OSError, which is not FileNotFoundError, where a link leads to nothing: its disk is not there."""
    try:
        os.stat(link)
    except FileNotFoundError:
        raise OSError("a link to a folder that is not there; mount its disk") from None
