"""Directories and tar archives as sources: laid out as EROFS images while they are read.

Owns the way from a tree on disk or in an archive to a `BuiltSource`. Pure wiring; thread-safe.
"""

from __future__ import annotations

from pathlib import Path

from dedupstore.building import BuiltSource
from dedupstore.erofs.tree import Directory
from dedupstore.erofs.writer import plan_image, scan_directory, scan_tar
from dedupstore.errors import SourceError


def from_directory(path: Path) -> BuiltSource:
    """The image of a directory. Raises SourceError."""
    return build(scan_directory(path), str(path))


def from_archive(file: int, name: str) -> BuiltSource:
    """The image of the plain tar archive that the descriptor `file`, the caller's, is open on.
    Raises SourceError, with `name` for the archive."""
    try:
        root = scan_tar(file)
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from None
    return build(root, name)


def build(root: Directory, name: str) -> BuiltSource:
    """The image of a tree, with fingerprints. Raises SourceError, with `name` for the tree."""
    try:
        return BuiltSource(plan_image(root, fingerprints=True), name)
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from None
