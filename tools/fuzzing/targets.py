"""The targets by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "corpus"
NAMES = (
    "erofs_extents",
    "erofs_tree",
    "records",
    "manifests",
    "pages",
    "archives",
    "exports",
    "parameters",
    "mount_records",
    "handshake",
    "remotes",
    "trace_files",
)


class Target(Protocol):
    """What a target's module has; see the package."""

    BYTES_MAX: int
    run: Callable[[bytes], None]
    seeds: Callable[[], Mapping[str, bytes]]


def load(name: str) -> Target:
    return cast(Target, importlib.import_module(f"tools.fuzzing.{name}"))


def write_seeds(name: str) -> None:
    """Write a target's seeds, instead of those it had."""
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("seed-*"):
        old.unlink()
    for label, data in load(name).seeds().items():
        (folder / f"seed-{label}").write_bytes(data)
