"""What an import did, for those who show it: light, because most commands read nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did. Bytes; `new_bytes` were not in the store before, `stored_bytes` is what
    they took in it."""

    digest: bytes
    size: int
    chunks: int
    unique_bytes: int
    zero_bytes: int
    new_chunks: int
    new_bytes: int
    stored_bytes: int
