"""One connection over a link: a client's socket, a server's, and what travels between them.

Owns both sockets and their places in the selector. Not thread-safe; driven by `relay`.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tools.ondemand.exchanges import Answer, Request, Requests
from tools.ondemand.mischief import STATUS, TRICKLE_BYTES, TRICKLE_SECONDS, Strike
from tools.ondemand.shaping import Direction, End, Flow, Item

_RECEIVE_BYTES = 256 << 10
# What may be on its way in one direction, as a TCP window: far above rate x round trip of any link
# here.
_WINDOW_BYTES = 4 << 20
_RESET = struct.pack("ii", 1, 0)


class Owner(Protocol):
    """What a connection needs of the link."""

    selector: selectors.BaseSelector
    up: Direction
    down: Direction

    def begun(self, request: Request) -> Strike | None: ...
    def done(self, kind: str) -> None: ...
    def moved(self, way: str, count: int) -> None: ...
    def later(self, seconds: float, work: Callable[[], None]) -> None: ...
    def gone(self, connection: Connection) -> None: ...


class _Side:
    """One socket: what is still to be sent to it, and whether it is to be read."""

    def __init__(self, owner: Owner, end: socket.socket, way: str) -> None:
        self.socket = end
        self.flow = Flow(self.deliver)  # to this side
        self.reads = False
        self.ended: Callable[[End], None] = lambda _end: None
        self.heard: Callable[[bytes], None] = lambda _data: None
        self.source: Flow | None = None  # from this side
        self._owner = owner
        self._way = way
        self._unsent: deque[Item] = deque()
        self._events = 0
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def deliver(self, item: Item) -> None:
        """What has come over the link for this side."""
        self._unsent.append(item)
        self._send()

    def _send(self) -> None:
        try:
            while self._unsent:
                item = self._unsent[0]
                if isinstance(item, End):
                    self._unsent.popleft()
                    self.ended(item)
                    return
                sent = self.socket.send(item)
                self.flow.pending -= sent
                self._owner.moved(self._way, sent)
                if sent < len(item):
                    self._unsent[0] = memoryview(item)[sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.ended(End.RESET)

    def _receive(self) -> None:
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.ended(End.RESET)
            return
        self.reads = bool(data)
        self.heard(data)

    def on_event(self, mask: int) -> None:
        """The socket can be read or written."""
        if mask & selectors.EVENT_WRITE:
            self._send()
        if mask & selectors.EVENT_READ and self.reads:
            self._receive()

    def watch(self) -> None:
        """Ask for the events that are wanted now."""
        if self.socket.fileno() < 0:
            return
        room = self.source is None or self.source.pending < _WINDOW_BYTES
        events = selectors.EVENT_READ if self.reads and room else 0
        events |= selectors.EVENT_WRITE if self._unsent else 0
        if events == self._events:
            return
        if not events:
            self._owner.selector.unregister(self.socket)
        elif self._events:
            self._owner.selector.modify(self.socket, events, self.on_event)
        else:
            self._owner.selector.register(self.socket, events, self.on_event)
        self._events = events

    def close(self, *, reset: bool) -> None:
        if self._events:
            self._owner.selector.unregister(self.socket)
            self._events = 0
        if reset:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.socket.close()


class Connection:
    """From `start` until it calls the owner's `gone`."""

    def __init__(self, owner: Owner, client: socket.socket, server: socket.socket) -> None:
        self._owner = owner
        self._client = _Side(owner, client, "down")
        self._server = _Side(owner, server, "up")
        self._client.source, self._server.source = self._server.flow, self._client.flow
        self._client.heard, self._server.heard = self._from_client, self._from_server
        self._client.ended = lambda end: self._end(self._client, end)
        self._server.ended = lambda end: self._end(self._server, end)
        self._open = 2
        self._requests = Requests()
        self._answer = Answer()
        self._strike: Strike | None = None
        self._muted = False

    def start(self) -> None:
        """Begin to read."""
        self._client.reads = self._server.reads = self._open == 2

    def watch(self) -> None:
        """Ask for the events that are wanted now."""
        self._client.watch()
        self._server.watch()

    def abort(self) -> None:
        """Reset both ends at once."""
        if self._open:
            self._open = 0
            self._client.close(reset=True)
            self._server.close(reset=True)
            self._owner.gone(self)

    def _end(self, side: _Side, end: End) -> None:
        """What came over the link to `side` has ended."""
        if not self._open:
            return
        if end is End.RESET:
            self.abort()
            return
        self._open -= 1
        with contextlib.suppress(OSError):
            side.socket.shutdown(socket.SHUT_WR)
        if not self._open:
            self._client.close(reset=False)
            self._server.close(reset=False)
            self._owner.gone(self)

    def _from_client(self, data: bytes) -> None:
        up = self._owner.up
        if not data:
            up.send(self._server.flow, End.CLOSED)
            return
        if self._muted:
            return
        request, passed = self._requests.feed(data)
        if request is not None:
            self._answer = Answer()
            self._strike = self._owner.begun(request)
        kind = self._strike.kind if self._strike else ""
        if kind == "hang":
            self._mute(kind)
        elif kind == "refuse":
            self._mute(kind)
            self._owner.down.send(self._client.flow, End.RESET)
        elif kind in STATUS:
            if self._requests.complete:
                self._mute(kind)
                head = f"HTTP/1.1 {STATUS[kind]}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                self._say(head.encode(), End.CLOSED)
        elif passed:
            up.send(self._server.flow, passed)

    def _from_server(self, data: bytes) -> None:
        if self._muted:
            return
        if not data:
            self._say(End.CLOSED)
        elif self._strike is None:
            self._say(data)
        else:
            head, body = self._answer.feed(data)
            self._say(head)
            if self._answer.length or self._answer.seen:
                self._spoil(self._strike, body)
            elif head:
                self._strike = None  # there is no body to strike

    def _spoil(self, strike: Strike, body: bytes) -> None:
        """Pass on a part of a body as the fault has it."""
        answer = self._answer
        at = int(strike.at * answer.length) - (answer.seen - len(body))  # in this part
        here = 0 <= at < len(body)
        if strike.kind == "trickle":
            if answer.seen == len(body):
                self._owner.done(strike.kind)
            self._drip(body)
        elif not here:
            self._say(body)
        elif strike.kind == "flip":
            self._owner.done(strike.kind)
            self._say(body[:at], bytes([body[at] ^ 1 << strike.bit]), body[at + 1 :])
        else:
            self._mute(strike.kind)
            self._say(body[:at], End.RESET if strike.kind == "reset" else End.CLOSED)

    def _drip(self, body: bytes) -> None:
        """Pass on a little, and the rest later; meanwhile nothing more is read."""
        if self._open < 2:
            return
        self._say(body[:TRICKLE_BYTES])
        rest = body[TRICKLE_BYTES:]
        self._server.reads = not rest
        if rest:
            self._owner.later(TRICKLE_SECONDS, lambda: self._drip(rest))

    def _mute(self, kind: str) -> None:
        """Nothing more is passed on; the fault has struck."""
        self._muted = True
        self._owner.done(kind)

    def _say(self, *items: Item) -> None:
        for item in items:
            if isinstance(item, End) or item:
                self._owner.down.send(self._client.flow, item)
