"""What the store's file and its reader table look like while others work on it.

Owns one thread that samples both. The environment is opened once, and read through LMDB's own
calls; no transaction is held.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from dedupstore.env import Environment

_INTERVAL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Sample:
    """The file `seconds` after the watch began: what it occupies and how long it is, in bytes."""

    seconds: float
    file_bytes: int
    file_length: int


class Watch:
    """Samples from its construction to `stop`."""

    def __init__(self, store: Path) -> None:
        self._env = Environment(store)
        self._stop = threading.Event()
        self._since: dict[tuple[int, int, int], float] = {}
        self.samples: list[Sample] = []
        self.oldest: dict[int, float] = {}  # seconds of the longest read transaction, by process
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        begin = time.monotonic()
        while not self._stop.wait(_INTERVAL_SECONDS):
            now = time.monotonic()
            self.samples.append(
                Sample(round(now - begin, 1), self._env.file_bytes(), self._env.file_length())
            )
            readers = self.readers()
            self._since = {reader: self._since.get(reader, now) for reader in readers}
            for reader, since in self._since.items():
                self.oldest[reader[0]] = max(self.oldest.get(reader[0], 0.0), now - since)

    def readers(self) -> set[tuple[int, int, int]]:
        """(process, thread, transaction) of every read transaction that runs now."""
        rows = [row.split() for row in self._env.raw.readers().splitlines()]
        return {
            (int(row[0]), int(row[1], 16), int(row[2]))
            for row in rows
            if len(row) == 3 and row[2].isdecimal()
        }

    def stop(self) -> None:
        """End the samples."""
        self._stop.set()
        self._thread.join()

    def close(self) -> None:
        self._env.close()
