"""What was fetched from remotes, in figures. Apart: who shows them need not load the rest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class FetchCounters:
    """Sums since a fetcher began: range requests that were answered, the bytes and frames that they
    brought, fetches that failed everywhere, and seconds of waiting."""

    requests: int = 0
    bytes: int = 0
    frames: int = 0
    errors: int = 0
    seconds: float = 0.0
