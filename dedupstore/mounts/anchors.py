"""The mounts that users' mounts are bind mounts of: EROFS on its device, an overlay over views.

Every content is mounted once, in its attachment's directory. A file mounted twice would be two
superblocks with a page cache each, and so would an overlay. Owns the mount options and which of
them a kernel takes; tries rather than looks at version numbers. Callers hold the runtime's lock.

A pool view is an EROFS with two directories: `tree`, the image's own tree, whose regular files
have a size and the overlay attributes `metacopy` and `redirect`, and `data`, the objects that they
redirect to. Further objects are in the `data` of other views, its homes.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dedupstore import syscalls
from dedupstore.errors import MountError
from dedupstore.mounts import kernel
from dedupstore.mounts.attachments import Attachment
from dedupstore.mounts.devices import loop_command
from dedupstore.mounts.sharing import KERNEL, POOL, domain

EROFS = "erofs"
TREE, DATA = "tree", "data"
# File-backed EROFS mounts: refused before Linux 6.12; directio came later. Without it the kernel
# keeps the server's file in its cache as well: 307 MB for an image of 150.
_FILE_OPTIONS = ("directio", "")
_FILE_BACKED_SINCE = (6, 12)
# Readahead of a file-backed mount. The kernel's 128 KiB bound the requests, each of which wakes the
# server: with this much a cold tar of a Debian root takes a tenth less time. More adds nothing, and
# brings in what programs that map files do not use.
_READ_AHEAD_KIB = 512
# Layers that only hold data came with Linux 6.5; before, views of a pool are ordinary layers, and
# the tree hides their only directory by a whiteout.
_DATA_LAYERS = ("::", ":")
_DATA_LAYERS_SINCE = (6, 5)
_OVERLAY_SOURCE = Path("dedupstore")
_REFUSED = (errno.EINVAL, errno.ENOTBLK, errno.ENOENT)


@dataclass(frozen=True, slots=True)
class Call:
    """One mount(2), read-only."""

    source: Path
    target: Path
    fstype: str
    options: str

    def run(self) -> None:
        """Mount. Raises OSError."""
        self.target.mkdir(exist_ok=True)
        syscalls.mount(self.source, self.target, self.fstype, syscalls.MS_RDONLY, self.options)

    def lines(self) -> list[str]:
        """The same for a shell."""
        options = ",".join(filter(None, ("ro", self.options)))
        words = ["mount", "-t", self.fstype, "-o", options, str(self.source), str(self.target)]
        # mount(8) puts a loop device under a file, which a file-backed mount is there to avoid.
        remark = "  # mount(2) itself: no loop device" if self.source.name == "img" else ""
        return [shlex.join(["mkdir", "-p", str(self.target)]), shlex.join(words) + remark]


def mount(attachment: Attachment, homes: Sequence[Attachment], store_uuid: str) -> Path:
    """Mount an attachment's EROFS, and for a pool view the overlay, unless they are; return the
    directory to bind. Raises OSError, MountError."""
    for each in (*homes, attachment):
        _mount_erofs(each, store_uuid)
    if attachment.record.share != POOL:
        return attachment.anchor
    attachment.record.homes = [home.record.digest for home in homes]
    attachment.save()  # before: the homes must not be let go under the overlay
    if not kernel.is_mounted(attachment.top):
        _first([_overlay(attachment, homes, separator) for separator in _DATA_LAYERS])
    return attachment.top


def plan(attachment: Attachment, homes: Sequence[Attachment], store_uuid: str) -> list[str]:
    """The shell commands that do what `mount` would do now."""
    lines = []
    for each in (*homes, attachment):
        if not kernel.is_mounted(each.anchor):
            lines += _plan_erofs(each, store_uuid)
    if attachment.record.share == POOL and not kernel.is_mounted(attachment.top):
        separator = _DATA_LAYERS[0 if _since(_DATA_LAYERS_SINCE) else 1]
        lines += _overlay(attachment, homes, separator).lines()
    return lines


def _mount_erofs(attachment: Attachment, store_uuid: str) -> None:
    if kernel.is_mounted(attachment.anchor):
        return
    share = _domain(attachment, store_uuid)
    if attachment.record.device is not None or not _mount_file(attachment, share):
        Call(attachment.ensure_device(), attachment.anchor, EROFS, share).run()
    if share and not _shares(attachment.anchor):
        raise MountError(f"{attachment.record.name!r}: the kernel ignored {share}")


def _plan_erofs(attachment: Attachment, store_uuid: str) -> list[str]:
    share = _domain(attachment, store_uuid)
    nbd = attachment.record.device
    if nbd is not None:
        return Call(Path(nbd), attachment.anchor, EROFS, share).lines()
    if _since(_FILE_BACKED_SINCE):
        options = _joined(_FILE_OPTIONS[0], share)
        return Call(attachment.file, attachment.anchor, EROFS, options).lines()
    loop = shlex.join(loop_command(attachment.file, attachment.block_bytes))
    lines = Call(Path("LOOP"), attachment.anchor, EROFS, share).lines()
    return [f"device=$({loop})", *(line.replace(" LOOP ", ' "$device" ') for line in lines)]


def _mount_file(attachment: Attachment, share: str) -> bool:
    """Mount the server's file; False if this kernel mounts devices only."""
    before = kernel.read_ahead_knobs(EROFS)
    calls = [
        Call(attachment.file, attachment.anchor, EROFS, _joined(options, share))
        for options in _FILE_OPTIONS
    ]
    try:
        _first(calls)
    except OSError as error:
        if error.errno in _REFUSED:
            return False
        raise
    _widen_read_ahead(kernel.read_ahead_knobs(EROFS) - before)
    return True


def _widen_read_ahead(knobs: set[Path]) -> None:
    """Set the readahead of the mount that brought `knobs`; of several, somebody else mounts too,
    and it is left as it is. Where sysfs cannot be written, as in containers, likewise."""
    if len(knobs) == 1:
        with suppress(OSError):
            knobs.pop().write_text(f"{_READ_AHEAD_KIB}\n")


def _first(calls: Sequence[Call]) -> None:
    """Mount the first that the kernel takes. Raises the last one's OSError."""
    for call in calls[:-1]:
        try:
            call.run()
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        else:
            return
    calls[-1].run()


def _overlay(attachment: Attachment, homes: Sequence[Attachment], separator: str) -> Call:
    data = [each.anchor / DATA for each in (*homes, attachment)]
    layers = separator.join(map(_escaped, (attachment.anchor / TREE, *data)))
    options = f"lowerdir={layers},metacopy=on,redirect_dir=on"
    return Call(_OVERLAY_SOURCE, attachment.top, "overlay", options)


def _escaped(path: Path) -> str:
    """A path in overlay's option: colons part layers, commas options."""
    text = str(path)
    for character in "\\:,":
        text = text.replace(character, "\\" + character)
    return text


def _domain(attachment: Attachment, store_uuid: str) -> str:
    if attachment.record.share != KERNEL:
        return ""
    return f"inode_share,domain_id={domain(store_uuid)}"


def _shares(directory: Path) -> bool:
    return any(
        point.directory == directory and "inode_share" in point.options.split(",")
        for point in kernel.mount_table()
    )


def _joined(*options: str) -> str:
    return ",".join(filter(None, options))


def _since(release: tuple[int, int]) -> bool:
    """A guess, for plans; mounting asks the kernel."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= release
