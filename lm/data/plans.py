"""Plans of rows: made where a corpus is prepared, or at the first start that needs another one, then read.

The latter are kept in `plans/` of the cache, by the corpus's fingerprint, and so for all of the same tokens.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

from lm.data import packing, prepare
from lm.data.packing import Plan
from lm.data.shards import Damaged
from lm.data.streams import Split


class Kept:
    """The plans of a corpus's splits by name and capacity: read from `folder`, or made and kept there.

    What is read of them and not compared with its digest is put into `unchecked`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: str,
        splits: tuple[Split, ...],
        unchecked: dict[Path, dict[str, Any]],
    ):
        self._folder, self._fingerprint, self._splits = folder, fingerprint, splits
        self._found: dict[tuple[str, int], dict[str, Plan]] = {}
        self._unchecked = unchecked

    def __call__(self, split: str, name: str, capacity: int) -> Plan:
        """Return the plan of a split. Where it cannot be kept, that is said and it is made anyway."""
        if (name, capacity) not in self._found:
            self._found[name, capacity] = self._read(name, capacity) or self._first(name, capacity)
        return self._found[name, capacity][split]

    def keep(self, split: str, name: str, capacity: int) -> Plan:
        """Return the plan of a split. Raises OSError where it cannot be kept."""
        if (name, capacity) not in self._found:
            self._found[name, capacity] = self._make(name, capacity)
        return self._found[name, capacity][split]

    def _read(self, name: str, capacity: int) -> dict[str, Plan] | None:
        with contextlib.suppress(Damaged, OSError):
            found = packing.read(self._folder, name, capacity, fingerprint=self._fingerprint)
            self._unchecked |= found[1] if found else {}
            return found and found[0]
        return None

    def _first(self, name: str, capacity: int) -> dict[str, Plan]:
        try:
            return self._make(name, capacity)
        except OSError as error:
            print(
                f"{self._folder}: the plan of rows cannot be kept, and is made at each start "
                f"({error.strerror or error})",
                file=sys.stderr,
                flush=True,
            )
        return {
            split.name: packing.make(name, split.starts, split.num_inputs, capacity)
            for split in self._splits
        }

    def _make(self, name: str, capacity: int) -> dict[str, Plan]:
        """Make and keep a plan, while others that need it wait and then read it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with prepare.locked(self._folder):
            if found := self._read(name, capacity):
                return found
            packing.drop_damaged(self._folder)
            windows = {
                split.name: packing.windows(name, split.starts, split.num_inputs, capacity)
                for split in self._splits
            }
            packing.save(self._folder, name, capacity, windows, fingerprint=self._fingerprint)
            if found := self._read(name, capacity):
                return found
        raise OSError(f"{self._folder}: what was written there is not what is read")
