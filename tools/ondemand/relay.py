"""The process of a link: `python -m tools.ondemand.relay TARGET_PORT`.

A loop over one selector carries every connection. Commands come on standard input, a line of JSON
each, and are answered likewise on standard output, the first line unasked: the port. It ends when
standard input does. `link` is the other end and documents the commands.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tools.ondemand.connection import Connection
from tools.ondemand.exchanges import Request
from tools.ondemand.mischief import Mischief, Strike
from tools.ondemand.shaping import Direction

_REQUESTS_MAX = 200_000  # kept for `requests`
_CONNECT_SECONDS = 2.0


class Relay:
    """A link that listens on a port of 127.0.0.1 from construction on."""

    def __init__(self, target: int) -> None:
        self.selector: selectors.BaseSelector = selectors.DefaultSelector()
        self.up = Direction(None, 0.0)
        self.down = Direction(None, 0.0)
        self._target = ("127.0.0.1", target)
        self._connections: set[Connection] = set()
        self._counts: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._requests: list[Request] = []
        self._mischief = Mischief()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._listening = True
        self._frozen = False
        self._troubles = 0
        self._ended = False
        self._typed = b""
        self._listener, self.port = _listen()
        self.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self.selector.register(0, selectors.EVENT_READ, self._hear)

    def run(self) -> None:
        """Carry connections until standard input ends."""
        wait: float | None = None
        while not self._ended:
            for key, mask in self.selector.select(wait):
                key.data(mask)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
            times = [self._timers[0][0]] if self._timers else []
            if not self._frozen:
                times += [at for way in (self.up, self.down) if (at := way.run(now)) is not None]
            for connection in list(self._connections):
                connection.watch()
            wait = max(0.0, min(times) - time.monotonic()) if times else None

    # --- for connections ---

    def begun(self, request: Request) -> Strike | None:
        self._counts["requests"] += 1
        if len(self._requests) < _REQUESTS_MAX:
            self._requests.append(request)
        return self._mischief.choose(request)

    def done(self, kind: str) -> None:
        self._faults[kind] += 1

    def moved(self, way: str, count: int) -> None:
        self._counts[f"bytes_{way}"] += count

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), work))

    def gone(self, connection: Connection) -> None:
        self._connections.discard(connection)

    # --- events ---

    def _accept(self, _mask: int) -> None:
        if not self._listening:  # it was ended after select had seen this
            return
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._target, _CONNECT_SECONDS)
        except OSError:
            client.close()
            return
        self._counts["connections"] += 1
        connection = Connection(self, client, server)
        self._connections.add(connection)
        # The kernel's handshake here took no time; over the link it is one round trip.
        self.later(self.up.delay + self.down.delay, connection.start)

    def _hear(self, _mask: int) -> None:
        data = os.read(0, 65536)
        self._ended = not data
        *lines, self._typed = (self._typed + data).split(b"\n")
        for line in lines:
            words = json.loads(line)
            try:
                answer = getattr(self, f"do_{words.pop('do')}")(**words)
            except ValueError as error:
                answer = {"error": str(error)}
            say({} if answer is None else answer)

    # --- commands ---

    def do_shape(self, rtt: float, rate: float | None) -> None:
        for way in (self.up, self.down):
            way.rate, way.delay = rate, rtt / 2

    def do_strike(self, kind: str, count: int, match: str) -> None:
        self._mischief.strike(kind, count, match)

    def do_chaos(self, probability: float, kinds: list[str], seed: int, match: str) -> None:
        self._mischief.chaos(probability, kinds, seed, match)

    def do_down(self, seconds: float | None) -> None:
        self._faults["down"] += 1
        if self._listening:
            self._listening = False
            # A socket that was bound to a port of its own keeps it, though it does not listen.
            self.selector.unregister(self._listener)
            self._listener.shutdown(socket.SHUT_RD)
        self._abort()
        self._until(seconds)

    def do_up(self) -> None:
        self._troubles += 1
        self._frozen = False
        if not self._listening:
            self._listening = True
            self._listener.listen(1024)
            self.selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def do_freeze(self, seconds: float | None) -> None:
        self._faults["freeze"] += 1
        self._frozen = True
        self._until(seconds)

    def do_clear(self) -> None:
        self._mischief.clear()
        self._abort()
        self.do_up()

    def do_counters(self, *, reset: bool) -> dict[str, Any]:
        names = ("connections", "requests", "bytes_up", "bytes_down")
        told = {name: self._counts[name] for name in names}
        answer: dict[str, Any] = {**told, "faults": dict(self._faults)}
        if reset:
            self._counts.clear()
            self._faults.clear()
            self._requests.clear()
        return answer

    def do_requests(self) -> dict[str, Any]:
        return {"requests": [[x.method, x.target, x.range] for x in self._requests]}

    def _until(self, seconds: float | None) -> None:
        """Be up again after so long, unless there is other trouble by then."""
        self._troubles += 1
        this = self._troubles
        if seconds is not None:
            self.later(seconds, lambda: self.do_up() if this == self._troubles else None)

    def _abort(self) -> None:
        for connection in list(self._connections):
            connection.abort()


def _listen() -> tuple[socket.socket, int]:
    """A listener on a free port that stays its own when it does not listen for a while: that needs
    a port which was asked for by number."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return socket.create_server(("127.0.0.1", port), backlog=1024), port


def say(document: dict[str, Any]) -> None:
    """Answer the other end."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    relay = Relay(int(sys.argv[1]))
    say({"port": relay.port})
    relay.run()
