"""Plans of rows that a corpus was not prepared with: made at the first start that needs one, then read.

They are kept in `plans/` of the cache, by the corpus's fingerprint, and so for all of the same tokens.
"""

import contextlib
import sys
from pathlib import Path

from lm.data import packing, prepare
from lm.data.packing import Plan
from lm.data.shards import Damaged
from lm.data.streams import Split


class Kept:
    """The plans of a corpus's splits by name and capacity: read from `folder`, or made and kept there."""

    def __init__(self, folder: Path, *, fingerprint: str, splits: tuple[Split, ...]):
        self._folder, self._fingerprint, self._splits = folder, fingerprint, splits
        self._found: dict[tuple[str, int], dict[str, Plan]] = {}

    def __call__(self, split: str, name: str, capacity: int) -> Plan:
        """Return the plan of a split. Where it cannot be kept, that is said and it is made anyway."""
        if (name, capacity) not in self._found:
            self._found[name, capacity] = self._read(name, capacity) or self._first(name, capacity)
        return self._found[name, capacity][split]

    def _read(self, name: str, capacity: int) -> dict[str, Plan] | None:
        with contextlib.suppress(Damaged, OSError):
            return packing.read(self._folder, name, capacity, fingerprint=self._fingerprint)
        return None

    def _first(self, name: str, capacity: int) -> dict[str, Plan]:
        """Make a plan, while others that need it wait and then read it."""
        made: dict[str, Plan] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with prepare.locked(self._folder):
                if found := self._read(name, capacity):
                    return found
                packing.drop_damaged(self._folder)
                made = self._make(name, capacity)
                packing.save(self._folder, name, capacity, made, fingerprint=self._fingerprint)
        except OSError as error:
            print(
                f"{self._folder}: the plan of rows cannot be kept, and is made at each start "
                f"({error.strerror or error})",
                file=sys.stderr,
                flush=True,
            )
        return made or self._make(name, capacity)

    def _make(self, name: str, capacity: int) -> dict[str, Plan]:
        return {
            split.name: packing.make(name, split.starts, split.num_inputs, capacity)
            for split in self._splits
        }
