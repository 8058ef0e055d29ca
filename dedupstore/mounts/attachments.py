"""One image content, one device: attachments are found, made, and let go when nobody has them.

An attachment is in use while `attach` gave its device out (a claim) or while the kernel shows a
mount of it, whoever made that. It is let go in the order in which the kernel allows it, and EBUSY
on the way (an overlay or another mount namespace still has it) leaves it for a later try. Callers
hold the runtime's lock, except for `find` and the properties.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dedupstore.mounts import devices, kernel
from dedupstore.mounts.devices import Roots, fuse_file
from dedupstore.mounts.servers import ensure_server, stop_server
from dedupstore.mounts.state import Record, Runtime, Target, load_record, save_record

# The kernel finishes taking a loop device off its file after the call that asked for it.
_LOOP_SECONDS = 2.0
_FILES = ("record.new", "nbdfuse.pid", "nbdfuse.log", "record.json")


@dataclass(frozen=True, slots=True)
class Attachment:
    """An attachment on record. `record` may be changed, then `save`d."""

    directory: Path
    record: Record
    roots: Roots

    @property
    def file(self) -> Path:
        """nbdfuse's file, where there is no nbd device."""
        return fuse_file(self.directory)

    @property
    def anchor(self) -> Path:
        """Where the file is mounted first. The mounts that users see are bind mounts of it: the
        same file mounted twice would be two superblocks with a page cache each."""
        return self.directory / "mnt"

    @property
    def device(self) -> Path | None:
        """The block device, if there is one now: nbd, or a loop over the file."""
        record = self.record
        if record.device is None:
            return next(iter(kernel.loops_over(self.file)), None)
        device = Path(record.device)
        ours = devices.nbd_is_ours(device, Path(record.socket), record.name, self.roots)
        return device if ours else None

    @property
    def block_bytes(self) -> int:
        """Logical block size of the block device."""
        return devices.block_bytes(self.record.kind, self.record.size)

    def superblocks(self, table: Sequence[kernel.MountPoint]) -> set[str]:
        """The device numbers that mounts of this attachment have."""
        found = {point.device for point in table if point.directory == self.anchor}
        device = self.device
        return found if device is None else {*found, kernel.device_number(device)}

    def mounts(self, table: Sequence[kernel.MountPoint]) -> list[kernel.MountPoint]:
        """The mounts of this attachment in this namespace but for the anchor."""
        ours = self.superblocks(table)
        return [p for p in table if p.device in ours and p.directory != self.anchor]

    def responds(self) -> bool:
        """Whether reading works all the way from the store."""
        path = self.device if self.record.device is not None else self.file
        return path is not None and devices.responds(path)

    def ensure_device(self) -> Path:
        """The block device; for nbdfuse a loop device is made. Raises OSError."""
        return self.device or kernel.attach_loop(self.file, self.block_bytes)

    def save(self) -> None:
        """Write the record."""
        save_record(self.directory, self.record)


def attachments(runtime: Runtime, roots: Roots) -> list[Attachment]:
    """Those with a record."""
    found = [(path, load_record(path)) for path in runtime.directories()]
    return [Attachment(path, record, roots) for path, record in found if record is not None]


def find(runtime: Runtime, digest: str, roots: Roots) -> Attachment | None:
    """The attachment of a content that works, if there is one."""
    for attachment in attachments(runtime, roots):
        if attachment.record.digest == digest and attachment.responds():
            return attachment
    return None


def ensure(runtime: Runtime, target: Target, roots: Roots) -> Attachment:
    """The attachment of the image's content, with its server; made if there is none that works.

    One that does not work any more stays under its mounts until they are unmounted. Raises
    MountError, ProgramError; nothing half-made stays.
    """
    socket = ensure_server(runtime, target)  # first: nbd-client then reconnects by itself
    found = find(runtime, target.image.digest, roots)
    if found is not None:
        return found
    _drop_dead(runtime, target.image.digest, roots)
    made = _new(runtime.new_directory(target.image.digest), target, socket, roots)
    made.directory.mkdir(mode=0o700)
    try:
        if not _connect_nbd(runtime, made):
            devices.start_nbdfuse(made.directory, socket, target.image.name)
            made.save()
    except BaseException:
        release(made)
        raise
    return made


def _drop_dead(runtime: Runtime, digest: str, roots: Roots) -> None:
    """Take back devices of a content that read no more, but for those that are mounted."""
    for attachment in attachments(runtime, roots):
        if attachment.record.digest == digest:
            attachment.record.claims.clear()
            attachment.save()
            if not attachment.mounts(kernel.mount_table()):
                release(attachment)


def _new(directory: Path, target: Target, socket: Path, roots: Roots) -> Attachment:
    image = target.image
    record = Record(
        str(target.store), image.digest, image.name, image.size, image.kind, str(socket)
    )
    return Attachment(directory, record, roots)


def plan(
    runtime: Runtime, target: Target, socket: Path, roots: Roots
) -> tuple[Attachment, list[str]]:
    """What `ensure` would make where nothing is found, and the shell commands that do it."""
    made = _new(runtime.new_directory(target.image.digest), target, socket, roots)
    name = target.image.name
    device = devices.free_nbd(roots)
    if device is None:
        mkdir = shlex.join(["mkdir", "-p", str(made.file.parent)])
        command = shlex.join(devices.nbdfuse_command(made.directory, socket, name))
        pidfile = shlex.quote(str(made.directory / "nbdfuse.pid"))
        wait = f"until [ -s {pidfile} ]; do sleep 0.1; done"
        return made, [mkdir, f"{command} &", wait]
    made.record.device = str(device)
    command = shlex.join(devices.nbd_client_command(device, socket, name, made.block_bytes))
    return made, [command]


def _connect_nbd(runtime: Runtime, made: Attachment) -> bool:
    with runtime.device_lock():
        device = devices.free_nbd(made.roots)
        if device is None:
            return False
        record = made.record
        record.device = str(device)
        made.save()  # before: the device must never be without a record
        devices.connect_nbd(
            device,
            Path(record.socket),
            record.name,
            block=made.block_bytes,
            size=record.size,
            roots=made.roots,
        )
    return True


def sweep(runtime: Runtime, roots: Roots) -> None:
    """Let go of whatever nobody uses: after each operation, and before each for what a killed
    process, a reboot or a umount(8) has left. The server goes with the last attachment."""
    for directory in runtime.directories():
        record = load_record(directory)
        if record is None:
            empty = Record("", "", "", 0, "", "")
            release(Attachment(directory, empty, roots))
            continue
        attachment = Attachment(directory, record, roots)
        _forget_gone(attachment)
        if not record.claims:
            _drop_loop(attachment)
            if not attachment.mounts(kernel.mount_table()):
                release(attachment)
    if not runtime.directories():
        stop_server(runtime)


def _forget_gone(attachment: Attachment) -> None:
    """Take out of the record what the kernel does not have (any more)."""
    record = attachment.record
    present = {str(point.directory) for point in attachment.mounts(kernel.mount_table())}
    mounts = {directory: name for directory, name in record.mounts.items() if directory in present}
    claims = record.claims if attachment.device is not None else []
    if (mounts, claims) != (record.mounts, record.claims):
        record.mounts, record.claims = mounts, claims
        attachment.save()


def _drop_loop(attachment: Attachment) -> bool:
    """Take loop devices that nobody has mounted off the file; False if some stay."""
    loops = kernel.loops_over(attachment.file)
    for loop in loops:
        if kernel.is_claimed(loop):
            return False
        kernel.detach_loop(loop)
    return True


def release(attachment: Attachment) -> bool:
    """Take an attachment down, device and directory. False: something in the kernel still uses it.

    Raises ProgramError if nbd-client fails.
    """
    directory = attachment.directory
    had_loop = bool(kernel.loops_over(attachment.file))
    if not _drop_loop(attachment):
        return False
    device = attachment.device
    if device is not None and attachment.record.device is not None:
        if kernel.is_claimed(device):
            return False
        devices.disconnect_nbd(device, attachment.roots)
    if kernel.is_mounted(attachment.anchor):
        try:
            kernel.unmount(attachment.anchor)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise
    if not devices.stop_nbdfuse(directory, patience_seconds=_LOOP_SECONDS if had_loop else 0):
        return False
    for name in _FILES:
        (directory / name).unlink(missing_ok=True)
    for path in (attachment.file.parent, attachment.anchor, directory):
        if path.exists():
            path.rmdir()
    return True
