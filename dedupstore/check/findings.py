"""What a check reports. Owns the records and how two checks are compared. Pure; thread-safe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

Progress = Callable[[int, int], None]
"""Gets (frames done, frames in all)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong. `image` and `offset` (bytes) say what a reader loses, where that is known;
    `chunk` is "frame" or "frame.slot"; `mended` is set once a repair has dealt with it."""

    what: str
    reason: str
    image: str | None = None
    offset: int | None = None
    chunk: str | None = None
    mended: bool = False


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check looked at and what it found. `bytes` are raw bytes whose digest was verified.
    `advice` says how to go on where something is left; empty if nothing is."""

    pages: int
    frames: int
    chunks: int
    bytes: int
    images: int
    findings: tuple[Finding, ...]
    advice: str = ""

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong, or all of it was mended."""
        return all(finding.mended for finding in self.findings)


def compared(before: Iterable[Finding], after: Iterable[Finding]) -> tuple[Finding, ...]:
    """What was found before a repair, mended unless it is found again after it; and at the end what
    was found only then."""
    left = {_place(finding): finding for finding in after}
    found = []
    for finding in before:
        again = left.pop(_place(finding), None)
        found.append(replace(finding, mended=True) if again is None else again)
    return (*found, *left.values())


def _place(finding: Finding) -> tuple[object, ...]:
    return finding.what, finding.image, finding.offset, finding.chunk
