"""How mounts of different images can share page cache, and what this kernel offers.

    none     nothing between images; an image and its clones are one superblock all the same
    kernel   EROFS's inode_share (Linux 7.0): files with equal fingerprints in one domain are one
             inode to the page cache
    pool     an overlay whose files are objects of views that several mounts have in common

Owns the choice and the questions to the kernel; knows no images. Thread-safe.
"""

from __future__ import annotations

from dedupstore.errors import MountError
from dedupstore.mounts import kernel

AUTO, KERNEL, POOL, NONE = "auto", "kernel", "pool", "none"
CHOICES = (AUTO, KERNEL, POOL, NONE)

_LACKING = {
    KERNEL: "this kernel's EROFS has no inode_share (it came with Linux 7.0)",
    POOL: "this kernel has no overlayfs",
}


def candidates(wanted: str) -> tuple[str, ...]:
    """The modes to try for one of CHOICES, the best first.

    Raises MountError when this kernel lacks the one that was asked for.
    """
    if wanted == AUTO:
        best = [mode for mode in (KERNEL, POOL) if _offered(mode)]
        return (*best[:1], NONE)
    if not _offered(wanted):
        raise MountError(f"--share={wanted}: {_LACKING[wanted]}")
    return (wanted,)


def _offered(mode: str) -> bool:
    if mode == KERNEL:
        return kernel.knows_option("erofs", "inode_share")
    return mode == NONE or kernel.knows_option("overlay", "metacopy", "on")


def domain(store_uuid: str) -> str:
    """The domain_id of a store: what is not of this store never shares with it."""
    return f"dedupstore-{store_uuid}"
