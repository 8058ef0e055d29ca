"""Which store a command means when it does not say. Pure; thread-safe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def default_store(environ: Mapping[str, str], uid: int) -> Path:
    """$DEDUPSTORE, else /var/lib/dedupstore for root, else the user's data directory."""
    if environ.get("DEDUPSTORE"):
        return Path(environ["DEDUPSTORE"])
    if uid == 0:
        return Path("/var/lib/dedupstore")
    data = environ.get("XDG_DATA_HOME") or str(Path(environ.get("HOME", "/")) / ".local/share")
    return Path(data) / "dedupstore"
