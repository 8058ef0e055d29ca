"""A link in front of a server on loopback: clients connect to its port instead.

A TCP proxy in a process of its own, because the kernel here has no netem. It gives the connections
that go through it, all together and in each direction, a bandwidth, and each byte a delay; counts
connections, HTTP requests and bytes; and does what unreliable servers and networks do, on command
or at random (`mischief.KINDS`). A new connection costs a round trip before its first byte, as a
handshake does. Delays are exact to about a millisecond.

What it is not: there is no packet loss and no slow start of TCP, which both favour whoever opens
many connections; requests are not pipelined, and there is no TLS.

    with servers.nginx(root, work) as server, Link(server.port) as link:
        link.shape(rtt=0.020, rate=100e6 / 8)
        there = server.through(link.port)

Thread-safe. The process ends with its context, and with its starter, whatever ends that.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.ondemand.exchanges import Request

_ROOT = Path(__file__).resolve().parents[2]
MEGABIT = 1e6 / 8
"""Bytes a second."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What has gone over a link. `bytes_up`: to the server. `faults`: that struck, by kind."""

    connections: int
    requests: int
    bytes_up: int
    bytes_down: int
    faults: dict[str, int]


class Link:
    """A link to a port of 127.0.0.1; at first without limits and delays."""

    def __init__(self, target: int) -> None:
        command = [sys.executable, "-m", "tools.ondemand.relay", str(target)]
        self._process = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()
        self.port = int(self._read()["port"])

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def shape(self, rtt: float = 0.0, rate: float | None = None) -> None:
        """From now on a round trip takes `rtt` seconds, and `rate` bytes a second go each way."""
        self._do("shape", rtt=rtt, rate=rate)

    def strike(self, kind: str, count: int = 1, match: str = "") -> None:
        """Let `count` requests fail, the next ones whose "METHOD TARGET" contains `match`."""
        self._do("strike", kind=kind, count=count, match=match)

    def chaos(
        self, probability: float, kinds: Sequence[str], seed: int = 0, match: str = ""
    ) -> None:
        """From now on let each request whose "METHOD TARGET" contains `match` fail with this
        probability, in one of these ways."""
        self._do("chaos", probability=probability, kinds=list(kinds), seed=seed, match=match)

    def down(self, seconds: float | None = None) -> None:
        """Reset every connection and refuse new ones, for so long or until `up`."""
        self._do("down", seconds=seconds)

    def freeze(self, seconds: float | None = None) -> None:
        """Let nothing through, though connections stay, for so long or until `up`."""
        self._do("freeze", seconds=seconds)

    def up(self) -> None:
        """End `down` and `freeze`."""
        self._do("up")

    def clear(self) -> None:
        """End every fault, and reset the connections that there are, hanging ones among them."""
        self._do("clear")

    def counters(self, *, reset: bool = False) -> Counters:
        """What has gone over it since it began or was last reset."""
        return Counters(**self._do("counters", reset=reset))

    def requests(self) -> list[Request]:
        """The requests since the counters were reset, in the order in which they came."""
        return [Request(*words) for words in self._do("requests")["requests"]]

    def _do(self, what: str, **words: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"do": what, **words}) + "\n")
            self._process.stdin.flush()
            answer = self._read()
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the link's process has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer
