"""The project's own mount logic, as called in a guest: arguments and results are JSON.

Needs Python's library and what of the project `sharing.PROJECT` lists.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dedupstore.mounts.mounts import Host
from dedupstore.mounts.state import Export, Target

_RUN = Path("/run/dedupstore")
_SECTOR_BYTES = 512


def mount(target: dict[str, Any], directory: str) -> None:
    """Mount what a `Target` says, given as its fields; the directory is made."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    Host(_RUN).mount(_target(target), Path(directory))


def attach(target: dict[str, Any]) -> str:
    """Make what a `Target` says a device, and return it."""
    return str(Host(_RUN).attach(_target(target)))


def detach(what: str, store: str) -> None:
    """Give back a device or a name of a store."""
    Host(_RUN).detach(what, Path(store))


def _target(fields: dict[str, Any]) -> Target:
    converted = {
        "store": Path(fields["store"]),
        "export": Export(**fields["export"]),
        "homes": tuple(Export(**home) for home in fields["homes"]),
    }
    return Target(**{**fields, **converted})


def umount(directory: str) -> None:
    """Unmount a directory."""
    Host(_RUN).unmount(Path(directory))


def reconnect(store: str) -> None:
    """Give the devices of a store new connections."""
    Host(_RUN).reconnect(Path(store))


def list_mounts() -> list[dict[str, Any]]:
    """What `mount --list` would say."""
    return [asdict(found) for found in Host(_RUN).list_mounts()[0]]


def nbd_bytes_read() -> int:
    """Bytes that all nbd devices have read since they exist."""
    stats = Path("/sys/block").glob("nbd*/stat")
    return sum(int(path.read_text().split()[2]) * _SECTOR_BYTES for path in stats)
