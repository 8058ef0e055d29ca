"""What a link does to requests: which kinds of fault there are, and which request one strikes.

Strikes are either asked for one by one (`strike`), or come at random, from a seed (`chaos`): the
same requests in the same order then meet the same faults. Not thread-safe."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tools.ondemand.exchanges import Request

KINDS = {
    "refuse": "the connection is reset instead of an answer",
    "hang": "nothing comes, until the link says otherwise",
    "trickle": "the body comes, at 4 KB a second",
    "reset": "the connection is reset in the body",
    "truncate": "the connection is closed in the body",
    "flip": "one bit of the body is another",
    "500": "the answer is 500 Internal Server Error",
    "503": "the answer is 503 Service Unavailable",
}
STATUS = {"500": "500 Internal Server Error", "503": "503 Service Unavailable"}
TRICKLE_BYTES, TRICKLE_SECONDS = 400, 0.1


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault for one request. `at`: where in the body, as a share of it; `bit` of that byte."""

    kind: str
    at: float
    bit: int


class Mischief:
    """Decides for each request."""

    def __init__(self) -> None:
        self._ordered: deque[tuple[str, str]] = deque()
        self._probability = 0.0
        self._kinds: Sequence[str] = ()
        self._match = ""
        self._random = random.Random(0)

    def strike(self, kind: str, count: int, match: str) -> None:
        """Let the next `count` requests fail whose line contains `match`."""
        self._ordered.extend([(_known(kind), match)] * count)

    def chaos(self, probability: float, kinds: Sequence[str], seed: int, match: str) -> None:
        """From now on let each request whose line contains `match` fail with a probability."""
        self._kinds = [_known(kind) for kind in kinds]
        self._probability = probability if kinds else 0.0
        self._match = match
        self._random = random.Random(seed)

    def clear(self) -> None:
        """No more faults."""
        self._ordered.clear()
        self._probability = 0.0

    def choose(self, request: Request) -> Strike | None:
        """The fault that strikes this request; None: it is left alone."""
        line = f"{request.method} {request.target}"
        kind = None
        if self._ordered and self._ordered[0][1] in line:
            kind, _ = self._ordered.popleft()
        elif self._match in line and self._random.random() < self._probability:
            kind = self._random.choice(self._kinds)
        if kind is None:
            return None
        return Strike(kind, self._random.random(), self._random.randrange(8))


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"no fault is called {kind} (there are {', '.join(KINDS)})")
    return kind
