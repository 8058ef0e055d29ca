"""Fetching the first of an image while its manifest is being stored, when the link would be idle.

What comes before the frames have numbers waits in memory; from then on each frame is claimed before
it is asked for, so no other process of the host fetches it too, and is stored as it comes. Ends
with the fetcher: servers go on by the image's wish. docs/concurrency.md, "Fetching". Thread-safe.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from dedupstore.errors import DedupError
from dedupstore.remote.fetching import Fetcher
from dedupstore.remote.grouping import REPLAY, Wanted, runs
from dedupstore.remote.remote import Remote


@dataclass(eq=False, slots=True)
class _Group:
    """What one request brings, and what it has brought. `ours`: frames that were claimed."""

    wanted: list[Wanted]
    data: bytes | None = None
    ours: list[Wanted] = field(default_factory=list)


class Ahead:
    """Frames that are fetched ahead; `Wanted.frame` is anything that tells them apart until
    `number`."""

    def __init__(self, fetcher: Fetcher, remote: Remote, wanted: Iterable[Wanted]) -> None:
        """Begin to fetch, in this order."""
        self._fetcher = fetcher
        self._remote = remote
        self._lock = threading.Lock()
        self._left = deque(_Group(group) for group in runs(wanted, REPLAY.bytes_max))
        self._started: list[_Group] = []
        self._numbers: Mapping[int, int] | None = None
        for _ in self._left.copy():
            fetcher.run_early(self._work)

    def number(self, numbers: Mapping[int, int]) -> None:
        """The numbers of the frames, which are stored now, without their bytes; nobody else must
        know them yet."""
        with self._lock:
            self._numbers = numbers
            for group in self._started:
                self._claim(group)
            came = [group for group in self._started if group.data is not None]
        for group in came:
            self._deliver(group)

    def abandon(self) -> None:
        """The frames get no numbers: ask for nothing more, and forget what came."""
        self._left.clear()

    def _claim(self, group: _Group) -> None:
        assert self._numbers is not None
        numbered = [replace(one, frame=self._numbers[one.frame]) for one in group.wanted]
        group.ours = [one for one in numbered if self._fetcher.expect(one.frame)]

    def _work(self) -> None:
        """Fetch the next group."""
        with self._lock:
            if not self._left:
                return
            group = self._left.popleft()
            if self._numbers is None:
                self._started.append(group)
            else:
                self._claim(group)
        try:
            data = self._fetch(group)
        except DedupError:  # of no concern: whoever reads these frames is told
            self._left.clear()
            data = b""
        with self._lock:
            group.data = data
            deliver = self._numbers is not None
        if deliver:
            self._deliver(group)

    def _fetch(self, group: _Group) -> bytes:
        first, last = group.wanted[0].places[0], group.wanted[-1].places[0]
        length = last.offset + last.length - first.offset
        return self._remote.read(first.pack, first.offset, length)

    def _deliver(self, group: _Group) -> None:
        assert group.data is not None
        begin = group.wanted[0].places[0].offset
        view = memoryview(group.data)
        for one in group.ours:
            place = one.places[0]
            at = place.offset - begin
            self._fetcher.deliver(one, view[at : at + place.length])
