"""All clients of a soak: starting them, telling them the phase, and what they saw together.

Not thread-safe.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("client.py")
# libnbd's binding belongs to the distribution's interpreter, not to the virtual environment.
_PYTHON = "/usr/bin/python3"
_STEPS = 1 / math.log(1.02)  # as in client.py


@dataclass(frozen=True, slots=True)
class Seen:
    """What all clients saw in one phase. Latencies in milliseconds, within 2 %."""

    bytes_verified: int
    bytes_wrong: int
    requests: int
    images_read: int
    gone_before_open: int
    errors: list[str]
    p50_ms: float
    p99_ms: float
    max_ms: float


class Clients:
    """Running clients, spread over the servers."""

    def __init__(self, count: int, sockets: list[Path], sources: Path, rate: float) -> None:
        self._processes = [
            subprocess.Popen(
                [
                    *(_PYTHON, _SCRIPT, sockets[number % len(sockets)], sources),
                    *(str(number), str(rate)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def begin(self, phase: str) -> None:
        """Count under `phase` from now on."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(phase + "\n")
            process.stdin.flush()

    def finish(self) -> dict[str, Seen]:
        """End all and return what they saw by phase. Raises RuntimeError: one has crashed."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        found: list[dict[str, Any]] = []
        for process in self._processes:
            assert process.stdout is not None
            printed = process.stdout.read()
            if process.wait():
                raise RuntimeError(f"a client ended with status {process.returncode}")
            found.append(json.loads(printed))
        phases = {name for phases in found for name in phases}
        return {name: _together([phases[name] for phases in found]) for name in sorted(phases)}

    def kill(self) -> None:
        """End what still runs."""
        for process in self._processes:
            process.kill()
            process.wait()


def _together(seen: list[dict[str, Any]]) -> Seen:
    latencies: Counter[int] = Counter()
    for one in seen:
        latencies.update({int(step): count for step, count in one["latencies"].items()})
    return Seen(
        bytes_verified=sum(one["bytes"] for one in seen),
        bytes_wrong=sum(one["wrong"] for one in seen),
        requests=latencies.total(),
        images_read=sum(one["passes"] for one in seen),
        gone_before_open=sum(one["gone"] for one in seen),
        errors=[error for one in seen for error in one["errors"]],
        p50_ms=_quantile(latencies, 0.50),
        p99_ms=_quantile(latencies, 0.99),
        max_ms=_quantile(latencies, 1.0),
    )


def _quantile(latencies: Counter[int], share: float) -> float:
    """Milliseconds within which `share` of the requests were answered."""
    wanted = share * latencies.total()
    for step in sorted(latencies):
        wanted -= latencies[step]
        if wanted <= 0:
            return round(math.exp((step + 1) / _STEPS) / 1000, 3)
    return 0.0
