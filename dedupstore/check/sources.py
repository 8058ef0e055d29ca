"""What a repair asks of a place where lost contents may be found.

Owns the contract: chunks are looked for by digest, whole images by theirs, names by their keys. A
source may be damaged itself: whatever it gives has been verified against the digest it was asked
for, and what it cannot read is not there. A source belongs to one thread; the `Source` of an import
that it makes is as thread-safe as those are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dedupstore import format as fmt
from dedupstore.chunker import Segment
from dedupstore.env import Environment
from dedupstore.sources import Source


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image had a lost chunk: offset and length in bytes."""

    offset: int
    length: int
    digest: bytes


Found = tuple[bytes, bytes]
"""A digest and the bytes that have it."""


class Origin(Protocol):
    """Something to mend from."""

    def chunks(self, wanted: set[bytes], places: Sequence[Place]) -> Iterator[Found]:
        """Every chunk of `wanted` that is here, once. `places` may lead to some."""

    def image(self, digest: bytes, ours: Environment) -> tuple[Source, Iterable[Segment]] | None:
        """An image of that digest, ready to be imported into `ours`; None: it is not here."""

    def record(self, name: bytes) -> fmt.ImageRecord | None:
        """What the name of this key stands for here, if it is known."""

    def names(self) -> Iterator[tuple[bytes, fmt.ImageRecord]]:
        """Every name that is known here, as its key, and what it stands for."""

    def close(self) -> None:
        """Close it."""
