"""Which frames one range request brings together, when many are wanted.

Owns the choice; fetches nothing. Pure, thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from dedupstore import format as fmt
from dedupstore.places import Place


@dataclass(frozen=True, slots=True)
class Wanted:
    """A frame that is to be fetched: its number, its slots, and where its bytes are."""

    frame: int
    slots: tuple[fmt.Slot, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Pace:
    """How many frames are fetched: at most `bytes_max` per request, so many `requests` at once, and
    among so many frames of the order (`window`) those that lie together in a pack come together,
    with the first of them. Not `urgent`: no request begins while a reader waits for one."""

    bytes_max: int
    window: int
    requests: int
    urgent: bool = True


BULK = Pace(2 << 20, 64, 8)
"""All of an image."""
REPLAY = Pace(512 << 10, 16, 4)
"""A trace, beside readers who need what comes first: their turn comes sooner."""
IDLE = Pace(512 << 10, 16, 1, urgent=False)
"""What nobody waits for."""


def groups(wanted: Iterable[Wanted], pace: Pace) -> Iterator[list[Wanted]]:
    """What one request each brings: frames that follow one another in a pack."""
    remaining = iter(wanted)
    while batch := list(islice(remaining, pace.window)):
        turns = {one.frame: turn for turn, one in enumerate(batch)}
        batch.sort(key=lambda one: (one.places[0].pack, one.places[0].offset))
        found = list(runs(batch, pace.bytes_max))
        found.sort(key=lambda group: min(turns[one.frame] for one in group))
        yield from found


def runs(wanted: Iterable[Wanted], bytes_max: int | None = None) -> Iterator[list[Wanted]]:
    """Frames in an order, cut where one does not follow the other in its pack, or beyond so many
    bytes."""
    run: list[Wanted] = []
    pack, end, size = b"", -1, 0
    for one in wanted:
        place = one.places[0]
        follows = run and place.pack == pack and place.offset == end
        if run and (not follows or (bytes_max is not None and size + place.length > bytes_max)):
            yield run
            run, size = [], 0
        run.append(one)
        pack, end, size = place.pack, place.offset + place.length, size + place.length
    if run:
        yield run
