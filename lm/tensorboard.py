"""Scalars for TensorBoard: an event file for each start, and what a run that goes on moves aside."""

import os
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm import aside, manifests


class Damaged(Exception):
    """An event file has a record that is not what was written."""


class TensorBoard:
    """Write rows as scalars to an event file of its own in `folder`.

    tensorboardX's SummaryWriter is passed by: its flush leaves rows in a queue, and two within one
    second overwrite each other's file.
    """

    def __init__(self, folder: str | Path, *, first_step: int = 0, flush_seconds: float = 10.0):
        # Imported here: it imports torch where there is one, 5 s that who reads rows need not wait.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._Event, self._scalar = Event, scalar
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unique = f".{os.getpid()}.{sum(1 for _ in folder.iterdir())}"
        self._events = EventsWriter(str(folder / "events"), filename_suffix=unique)
        self._flush_seconds = flush_seconds
        self._flushed = time.monotonic()
        # A TensorBoard that is open right now drops the rows it has read from this step on.
        self._write(first_step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, step: int, **content: Any) -> None:
        self._events.write_event(self._Event(step=step, wall_time=time.time(), **content))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step, summary=self._scalar(name, float(value)))
        if time.monotonic() - self._flushed > self._flush_seconds:
            self.sync()

    def sync(self) -> None:
        self._events.flush()  # to the disk: it calls fsync
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


def move_events_aside(folder: str | Path, *, after: int, scored: bool = True) -> list[Path]:
    """Move the TensorBoard events of steps > `after` out of the event files in `folder`.

    Of an evaluation as `move_rows_aside`. Return the side files, whose names no reader takes for event files.
    """
    sides = []
    for path in sorted(Path(folder).glob("*tfevents*")):
        parts = []
        try:
            if not path.is_file():
                raise Damaged
            for event, record in records(path.read_bytes()):
                names = [value.tag for value in event.summary.value]
                parts.append((aside.is_kept(event.step, names, after, scored), record))
        except Damaged:
            sides.append(manifests.move_aside(path, path.name.replace("tfevents", "damaged")))
            print(
                f"warning: {path}: damaged, and moved to {sides[-1]}", file=sys.stderr, flush=True
            )
            continue
        sides.append(aside.divide(path, parts, side=path.name.replace("tfevents", "aside.*")))
    return [side for side in sides if side]


def records(data: bytes) -> Iterator[tuple[Any, bytes]]:
    """Yield (event, bytes) of each whole record: length u64, its crc u32, event, its crc u32.

    Raises Damaged where one is not what was written; a last one that a kill cut short is left out.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    start = 0
    while start + 12 <= len(data):
        size, crc = struct.unpack_from("<QI", data, start)
        end = start + 12 + size + 4
        if crc != masked_crc32c(data[start : start + 8]):
            raise Damaged
        if end > len(data):
            return
        if struct.unpack("<I", data[end - 4 : end])[0] != masked_crc32c(data[start + 12 : end - 4]):
            raise Damaged
        yield Event.FromString(data[start + 12 : end - 4]), data[start:end]
        start = end
