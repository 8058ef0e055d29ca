"""Directories and archives -> EROFS images, by the programs that do it best today.

The seam for a writer of our own: `build_image` is all that importing knows. A tree gives the same
image bytes wherever and whenever it is built: fixed UUID and build time, the files' own times.
File tails are kept out of the metadata (noinline_data): files then share chunks however their
inodes shift, and page cache where the kernel shares it. Thread-safe.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dedupstore.errors import ProgramError, SourceError, StoreFullError
from dedupstore.programs import find_program

_UUID = "00000000-0000-0000-0000-000000000000"
# The image's build time: fixed, for the same tree to give the same bytes, and far ahead, because
# mkfs.erofs sets back the files' times that lie behind it (2100-01-01; -T would replace them all).
_SOURCE_DATE_EPOCH = "4102444800"
_TAR_MAGIC = b"ustar"
_TAR_MAGIC_AT = 257
_HEAD_BYTES = 512
_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}


def is_tar(path: Path) -> bool:
    """Whether a file is a tar archive, plain or compressed with gzip, bzip2 or xz."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
        for magic, opener in _COMPRESSED.items():
            if head.startswith(magic):
                with opener(path, "rb") as stream:
                    head = stream.read(_HEAD_BYTES)
    except (OSError, EOFError, lzma.LZMAError, zlib.error):
        return False
    return head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + len(_TAR_MAGIC)] == _TAR_MAGIC


def build_image(tree: Path, image: Path) -> None:
    """Write the EROFS image of a directory to `image`.

    Raises SourceError when the directory cannot be read, ProgramError when mkfs.erofs is missing or
    fails for another reason, StoreFullError when `image`'s file system is full.
    """
    try:
        next(tree.iterdir(), None)
    except OSError as error:
        raise SourceError(f"{tree}: {error.strerror}") from None
    _run(
        "mkfs.erofs",
        [
            "--quiet",
            "--preserve-mtime",
            "-U",
            _UUID,
            "-Enoinline_data",
            str(image.absolute()),
            str(tree.absolute()),  # a relative one may look like an option
        ],
        package="erofs-utils",
        subject=tree,
    )


def unpack_tar(archive: Path, tree: Path) -> None:
    """Unpack a tar archive into the empty directory `tree`.

    Owners are kept when run by root; xattrs, ACLs and sparse files always. GNU tar refuses members
    that would land outside. Folders that the archive does not list get the time 0, so that the same
    archive always gives the same tree. Raises SourceError, ProgramError, StoreFullError.
    """
    began = tree.stat().st_mtime_ns
    _run(
        "tar",
        [
            "--extract",
            "--force-local",
            "--file",
            str(archive),
            "--directory",
            str(tree),
            "--numeric-owner",
            "--preserve-permissions",
            "--delay-directory-restore",
            "--xattrs",
            "--xattrs-include=*",
            "--acls",
        ],
        package="tar",
        subject=archive,
    )
    ended = time.time_ns()
    for folder, _, _ in os.walk(tree):
        if began <= Path(folder).stat().st_mtime_ns <= ended:
            os.utime(folder, (0, 0))


def _run(program: str, arguments: Sequence[str], *, package: str, subject: Path) -> None:
    found = find_program(program, package)
    result = subprocess.run(
        ["env", "LC_ALL=C", f"SOURCE_DATE_EPOCH={_SOURCE_DATE_EPOCH}", found, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if result.returncode == 0:
        return
    lines = result.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
    # mkfs.erofs has no words for some errors: "[Error -13] Unknown error -13".
    if any("No space left" in line or "Error -28" in line for line in lines):
        raise StoreFullError(f"no space left to build the image of {subject}")
    if any("Permission denied" in line or "Error -13" in line for line in lines):
        raise SourceError(f"{subject}: Permission denied ({lines[0]})")
    raise ProgramError(program, f"{subject}: {lines[0]}")
