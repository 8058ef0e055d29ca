"""Exports as files: what is mounted where the kernel has no nbd device to give (see `nbd`).

The server makes the files; EROFS mounts them directly or a loop device goes over one. Owns what
both kinds of device have in common, too: block sizes, and whether reading works.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from dedupstore.constants import GRID_BYTES

_READ_SECONDS = 10.0
_SECTOR_BYTES = 512


def block_bytes(kind: str, size: int) -> int:
    """The logical block size of a device for an image, in bytes: EROFS's own where that fits; any
    other file system may be made of smaller blocks."""
    return GRID_BYTES if kind == "erofs" and size % GRID_BYTES == 0 else _SECTOR_BYTES


def responds(path: Path) -> bool:
    """Whether a device or file still reads, past every cache. In a process of its own: a read from
    a device whose server is gone may never return, and could then not even be killed."""
    process = subprocess.Popen(
        ["dd", f"if={path}", "of=/dev/null", f"bs={GRID_BYTES}", "count=1", "iflag=direct"],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(_READ_SECONDS) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        return False


def loop_command(file: Path, block: int) -> list[str]:
    """What `kernel.attach_loop` does, as a command for people."""
    options = ["--find", "--show", "--read-only", "--direct-io=on", "--sector-size", str(block)]
    return ["losetup", *options, str(file)]
