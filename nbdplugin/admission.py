"""How many clients may be connected at a time, from before they have said a word.

A connection costs nbdkit a thread, a descriptor and a buffer as large as the largest request it
ever made, at most 64 MiB (1.32). Without descriptors nbdkit's accept loop fails, logs and tries
again without a pause: 60 clients where 40 files may be open make 170,000 lines of log a second. Its
limit filter counts only those that have opened an export. So the bound is here, before the
handshake, and below that of open files. Thread-safe.
"""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path

from dedupstore.errors import ConnectionsError, UsageError

CONNECTIONS_MAX = 1024
"""Without `connections=`, and where as many files may be open."""

# Descriptors for all but clients: store, plugin, FUSE, scrapers of metrics.
_OTHER_FILES = 128
# Looking which of a thousand clients are still there takes 0.6 ms. After all were, nobody looks for
# this long, or those who are refused would keep a processor busy.
_FULL_SECONDS = 0.01
_THREADS = Path("/proc/self/task")


def reserve_files(connections: int | None) -> int:
    """Have as many files open as this process may; returns how many clients may be connected. What
    is above their number is for those who come at once: nbdkit accepts faster than it refuses.
    Before the fork. Raises UsageError if `connections` were asked for and cannot be."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return connections or CONNECTIONS_MAX
    if connections is None:
        return min(CONNECTIONS_MAX, hard // 2)
    if connections + _OTHER_FILES > hard:
        reason = f"with {_OTHER_FILES} more files open, above the limit of {hard} (ulimit -Hn)"
        raise UsageError(f"connections={connections}: {reason}")
    return connections


class Admission:
    """Counts connections by their threads: nbdkit gives each one, tells when it begins, and does
    not tell when it ends if the client never opened an export."""

    def __init__(self, connections_max: int) -> None:
        self._connections_max = connections_max
        self._threads: set[int] = set()
        self._full_until = 0.0  # of time.monotonic

    def admit(self) -> None:
        """Count the running thread's connection. Raises ConnectionsError, and then does not."""
        threads = self._threads
        own = threading.get_native_id()
        threads.add(own)
        if len(threads) <= self._connections_max:
            return
        if time.monotonic() >= self._full_until:
            self._forget_ended()
            if len(threads) > self._connections_max:
                self._full_until = time.monotonic() + _FULL_SECONDS
        if len(threads) > self._connections_max:
            threads.discard(own)
            raise ConnectionsError(self._connections_max)

    def _forget_ended(self) -> None:
        """Without a lock: each step is atomic under the GIL, and a thread that is added meanwhile
        is in no copy made before."""
        known = self._threads.copy()
        self._threads -= known.difference(int(path.name) for path in _THREADS.iterdir())
