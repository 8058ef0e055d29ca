"""Containers in a guest: mounted there by the project's own mount logic, each with what it costs.

The store and its server are on this machine; the guest knows the server's socket, and what to mount
for an image is found (and a view derived) here. Owns that and the counting; what the figures should
be is for tests and the demo. Not thread-safe, as `Guest`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dedupstore.mounts.servers import SERVE_SOCKET
from dedupstore.mounts.targets import find_target
from dedupstore.store import Store
from tools.guests import inside, mounting
from tools.guests.guest import Guest

# What of the project runs in a guest, on Python's library alone.
PROJECT = (
    *("dedupstore/__init__.py", "dedupstore/constants.py", "dedupstore/errors.py"),
    *("dedupstore/location.py", "dedupstore/programs.py", "dedupstore/server.py"),
    *("dedupstore/listening.py", "dedupstore/syscalls.py"),
    *("dedupstore/mounts", "tools/guests/mounting.py"),
)
# Where the guest believes the store to be; its server's socket is the one `serve` has by default.
STORE = "/srv/store"
SOCKET = f"{STORE}/{SERVE_SOCKET}"
_SECONDS = 300.0


def best_share(guest: Guest) -> str:
    """How the guest's kernel shares between different images."""
    return "kernel" if int(guest.release.split(".")[0]) >= 7 else "pool"


@dataclass(frozen=True, slots=True)
class Cost:
    """What mounting and reading a container took of a guest and of this machine's server: bytes of
    page cache, bytes over NBD, chunks loaded from the store; and the bytes of its files."""

    cached_bytes: int
    nbd_bytes: int
    store_reads: int
    file_bytes: int


class Containers:
    """The images of one store, mounted in one guest that has PROJECT and SOCKET."""

    def __init__(self, guest: Guest, store: Store, store_reads: Callable[[], int]) -> None:
        """`store_reads()` is how many chunks the guest's server has loaded so far."""
        self._guest = guest
        self._store = store
        self._store_reads = store_reads
        # Loaded now, modules cost no container page cache.
        guest.do("modprobe nbd; modprobe erofs; modprobe overlay")
        guest.python(mounting.list_mounts)

    def target(self, name: str, share: str) -> dict[str, Any]:
        """What to mount for an image, as the guest takes it."""
        found = find_target(self._store, name, (share,))
        return dataclasses.asdict(found) | {"store": STORE}

    def mount(self, name: str, directory: str, share: str) -> None:
        """Mount an image in the guest. Raises GuestError."""
        target = self.target(name, share)
        self._guest.python(mounting.mount, target, directory, timeout=_SECONDS)

    def umount(self, *directories: str) -> None:
        """Unmount directories in the guest. Raises GuestError."""
        for directory in directories:
            self._guest.python(mounting.umount, directory, timeout=_SECONDS)

    def attach(self, name: str) -> str:
        """Make an image a device in the guest; which one. Raises GuestError."""
        target = self.target(name, "none")
        device: str = self._guest.python(mounting.attach, target, timeout=_SECONDS)
        return device

    def detach(self, what: str) -> None:
        """Give back a device or name in the guest. Raises GuestError."""
        self._guest.python(mounting.detach, what, STORE, timeout=_SECONDS)

    def reconnect(self) -> None:
        """Give the guest's devices new connections to a server that was restarted. Raises
        GuestError."""
        self._guest.python(mounting.reconnect, STORE, timeout=_SECONDS)

    def mounts(self) -> list[dict[str, Any]]:
        """What `mount --list` would say in the guest."""
        found: list[dict[str, Any]] = self._guest.python(mounting.list_mounts)
        return found

    def cost(
        self, name: str, directory: str, share: str, *, part: str = "", mapped: bool = False
    ) -> Cost:
        """Mount an image and read every file of it, or of a part of its tree, by mmap if `mapped`;
        what that cost."""
        target = self.target(name, share)
        before = self._counters()
        self._guest.python(mounting.mount, target, directory, timeout=_SECONDS)
        return self._read(f"{directory}/{part}", before, mapped=mapped)

    def read_cost(self, directory: str) -> Cost:
        """Read every file of what is mounted; what that cost."""
        return self._read(directory, self._counters(), mapped=False)

    def _read(self, directory: str, before: tuple[int, int, int], *, mapped: bool) -> Cost:
        read = inside.map_all if mapped else inside.read_all
        file_bytes = self._guest.python(read, directory, timeout=_SECONDS)
        after = self._counters()
        return Cost(*(late - early for late, early in zip(after, before, strict=True)), file_bytes)

    def _counters(self) -> tuple[int, int, int]:
        cached = self._guest.python(inside.cached_bytes)
        return cached, self._guest.python(mounting.nbd_bytes_read), self._store_reads()
