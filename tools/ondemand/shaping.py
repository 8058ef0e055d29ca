"""One direction of a link: bytes go in, and come out later, at a rate, in order.

Connections (`Flow`s) take turns of a millisecond each, as under the fair queueing that hosts and
routers have: a small answer does not wait behind megabytes of another connection. What has passed
is delivered a constant delay later. Not modelled: loss, TCP's slow start, and queues of routers.

Knows no sockets and no clock; everything is told the time. Not thread-safe.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

_TURN_SECONDS = 0.001
_TURN_BYTES_MIN, _TURN_BYTES_MAX = 4096, 256 << 10
# How late the owner may be with `run` without the link losing capacity by it.
_SLACK_SECONDS = 0.01


class End(enum.Enum):
    """How a connection ends: in order, or at once."""

    CLOSED = enum.auto()
    RESET = enum.auto()


Item = bytes | memoryview | End


@dataclass(eq=False, slots=True)
class Flow:
    """What one connection sends in one direction. `pending` counts the bytes that are on their way;
    whoever has taken them off the link subtracts them."""

    deliver: Callable[[Item], None]
    pending: int = 0
    queue: deque[Item] = field(default_factory=deque)


class Direction:
    """The link from one side to the other: bytes a second (None: any number), and seconds."""

    def __init__(self, rate: float | None, delay: float) -> None:
        self.rate = rate
        self.delay = delay
        self._turns: deque[Flow] = deque()
        self._in_air: deque[tuple[float, Flow, Item]] = deque()
        self._free_at = 0.0

    def send(self, flow: Flow, item: Item) -> None:
        """Queue bytes, or the connection's end, behind what the connection has sent."""
        if not flow.queue:
            self._turns.append(flow)
        flow.queue.append(item)
        if not isinstance(item, End):
            flow.pending += len(item)

    def run(self, now: float) -> float | None:
        """Do what is due; returns when to run again, None when there is nothing under way."""
        self._transmit(now)
        while self._in_air and self._in_air[0][0] <= now:
            _, flow, item = self._in_air.popleft()
            flow.deliver(item)
        times = [self._in_air[0][0]] if self._in_air else []
        if self._turns:
            times.append(self._free_at)
        return min(times, default=None)

    def _transmit(self, now: float) -> None:
        self._free_at = max(self._free_at, now - _SLACK_SECONDS)
        while self._turns and (self.rate is None or self._free_at <= now):
            flow = self._turns.popleft()
            item = flow.queue.popleft()
            if not isinstance(item, End):
                item, rest = self._turn(item)
                if rest:
                    flow.queue.appendleft(rest)
                if self.rate is not None:
                    self._free_at += len(item) / self.rate
            if flow.queue:
                self._turns.append(flow)
            self._in_air.append((max(now, self._free_at) + self.delay, flow, item))

    def _turn(self, item: bytes | memoryview) -> tuple[bytes | memoryview, bytes | memoryview]:
        """What goes in one turn, and the rest."""
        if self.rate is None:
            return item, b""
        length = int(self.rate * _TURN_SECONDS)
        length = min(max(length, _TURN_BYTES_MIN), _TURN_BYTES_MAX)
        view = memoryview(item)
        return view[:length], view[length:]
