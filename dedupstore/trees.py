"""Directories and tar archives as sources: laid out as EROFS images while they are read.

Owns the way from a tree on disk or in an archive to a `BuiltSource`. Pure wiring; thread-safe.
"""

from __future__ import annotations

import os
from pathlib import Path

from dedupstore.building import BuiltSource
from dedupstore.erofs.tree import Directory
from dedupstore.erofs.writer import plan_image, scan_directory, scan_tar
from dedupstore.errors import SourceError

# A member of 1 KB may be a file of one byte, which takes a block, or a sparse one, whose chunks are
# larger than its data. Beyond that an archive was made to keep us busy with zeros.
IMAGE_PER_ARCHIVE_BYTE = 64
IMAGE_BYTES_MIN = 16 << 30


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
    source = build(root, name)
    stored_bytes = os.fstat(file).st_blocks * 512  # a sparse archive may claim any size
    if source.size > stored_bytes * IMAGE_PER_ARCHIVE_BYTE + IMAGE_BYTES_MIN:
        raise SourceError(f"{name}: becomes {source.size} bytes, as no sound archive does")
    return source


def build(root: Directory, name: str) -> BuiltSource:
    """The image of a tree, with fingerprints. Raises SourceError, with `name` for the tree."""
    try:
        return BuiltSource(plan_image(root, fingerprints=True), name)
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from None
