"""One image or view, one device: attachments are found, made, and let go when nobody has them.

An attachment is in use while `attach` gave its device out (a claim), while the kernel shows a mount
of it, whoever made that, or while another one in use has it for a home. It is let go in the order
in which the kernel allows it, and EBUSY on the way (another mount namespace still has it) leaves it
for a later try. Callers hold the runtime's lock, except for `find` and the properties.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dedupstore import syscalls
from dedupstore.errors import MountError
from dedupstore.mounts import devices, kernel, nbd
from dedupstore.mounts.nbd import Roots
from dedupstore.mounts.programs import wait
from dedupstore.mounts.servers import ensure_file, find_server, start_server, stop_server
from dedupstore.mounts.state import Export, Record, Runtime, Target, load_record, save_record

# The kernel finishes taking a loop device off its file after the call that asked for it.
_LOOP_SECONDS = 2.0
_FILES = ("img", "record.new", "record.json")


@dataclass(frozen=True, slots=True)
class Attachment:
    """An attachment on record. `record` may be changed, then `save`d."""

    directory: Path
    record: Record
    roots: Roots

    @property
    def file(self) -> Path:
        """The server's file, where there is no nbd device. Bind-mounted to a place of its own, so
        that the kernel says whether anything still uses it."""
        return self.directory / "img"

    @property
    def anchor(self) -> Path:
        """Where its EROFS is mounted."""
        return self.directory / "mnt"

    @property
    def top(self) -> Path:
        """Where the overlay over a pool view is mounted."""
        return self.directory / "top"

    @property
    def device(self) -> Path | None:
        """The block device, if there is one now: nbd, or a loop over the file."""
        record = self.record
        if record.device is None:
            return next(iter(kernel.loops_over(self.file)), None)
        device = Path(record.device)
        return device if nbd.is_ours(device, self.backend, self.roots) else None

    @property
    def backend(self) -> str:
        """What the kernel shows for its nbd device: no other attachment's is the same."""
        return str(self.directory)

    @property
    def block_bytes(self) -> int:
        """Logical block size of the block device."""
        return devices.block_bytes(self.record.kind, self.record.size)

    def superblocks(self, table: Sequence[kernel.MountPoint]) -> set[str]:
        """The device numbers that mounts of this attachment have."""
        own = (self.anchor, self.top)
        found = {point.device for point in table if point.directory in own}
        device = self.device
        return found if device is None else {*found, kernel.device_number(device)}

    def mounts(self, table: Sequence[kernel.MountPoint]) -> list[kernel.MountPoint]:
        """The mounts of this attachment in this namespace but for its own."""
        ours = self.superblocks(table)
        own = (self.anchor, self.top)
        return [p for p in table if p.device in ours and p.directory not in own]

    def responds(self) -> bool:
        """Whether reading works all the way from the server, which itself is known to answer."""
        if self.record.device is not None:
            return self.device is not None  # `ensure` sees to its connections
        return devices.responds(self.file)

    def ensure_device(self) -> Path:
        """The block device; over a file a loop device is made. Raises OSError."""
        return self.device or kernel.attach_loop(self.file, self.block_bytes)

    def reconnect(self, server: Path) -> None:
        """Give an nbd device new connections for those that are dead. Raises MountError."""
        record = self.record
        if record.device is None or self.device is None:
            return
        device, name = Path(record.device), record.export.name
        nbd.reconnect(device, server, name, backend=self.backend, size=record.size)
        record.socket = str(server)
        self.save()

    def save(self) -> None:
        """Write the record."""
        save_record(self.directory, self.record)


def attachments(runtime: Runtime, roots: Roots) -> list[Attachment]:
    """Those with a record."""
    found = [(path, load_record(path)) for path in runtime.directories()]
    return [Attachment(path, record, roots) for path, record in found if record is not None]


def find(runtime: Runtime, digest: str, share: str | None, roots: Roots) -> Attachment | None:
    """The attachment of an export that works, if there is one.

    With `share` only one that is mounted in that way, or not yet, and then the record says so: how
    an EROFS shares is settled when it is mounted.
    """
    for attachment in attachments(runtime, roots):
        record = attachment.record
        suits = share in (None, record.share) or not kernel.is_mounted(attachment.anchor)
        if record.digest == digest and suits and attachment.responds():
            record.share = share or record.share
            return attachment
    return None


def ensure(
    runtime: Runtime, target: Target, export: Export, roots: Roots, *, mounting: bool
) -> Attachment:
    """The attachment of the target's export or one of its homes, with its server; made if there is
    none that works. `mounting`: it is going to be mounted as the target says, and then is one that
    can be.

    One that does not work any more stays under its mounts until they are unmounted. Raises
    MountError, ProgramError; nothing half-made stays.
    """
    socket = find_server(runtime, target.store, export)
    if socket is None:
        socket = start_server(runtime, target.store, export)
        with suppress(MountError):  # what is wrong with another image is no matter here
            reconnect(runtime, roots)
    found = find(runtime, export.digest, target.share if mounting else None, roots)
    if found is not None:
        found.reconnect(socket)
        found.save()
        return found
    _drop_dead(runtime, export.digest, roots)
    made = _new(runtime, target, export, socket, roots)
    made.directory.mkdir(mode=0o700)
    try:
        if not _connect_nbd(runtime, made):
            _bind_file(ensure_file(runtime, target.store, export), made.file)
            made.record.socket = str(runtime.socket)
            made.save()
    except BaseException:
        release(made)
        raise
    return made


def reconnect(runtime: Runtime, roots: Roots) -> None:
    """Give every nbd device of a store new connections where it needs them; a server is started if
    none runs. One that cannot be helped does not keep this from the others. Raises the first
    MountError, ProgramError."""
    failure = None
    for attachment in attachments(runtime, roots):
        record = attachment.record
        if record.device is None:
            continue
        try:
            store = Path(record.store)
            server = find_server(runtime, store, record.export)
            attachment.reconnect(server or start_server(runtime, store, record.export))
        except MountError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _drop_dead(runtime: Runtime, digest: str, roots: Roots) -> None:
    """Take back devices of an export that read no more, but for those that are in use."""
    for attachment in attachments(runtime, roots):
        if attachment.record.digest == digest and not attachment.responds():
            attachment.record.claims.clear()
            attachment.save()
            if not attachment.mounts(kernel.mount_table()):
                release(attachment)


def _new(
    runtime: Runtime, target: Target, export: Export, socket: Path, roots: Roots
) -> Attachment:
    record = Record(
        store=str(target.store),
        digest=export.digest,
        size=export.size,
        kind=export.kind,
        image=target.digest,
        name=target.name,
        socket=str(socket),
        share=target.share,
        may_fetch=target.may_fetch,
    )
    return Attachment(runtime.new_directory(export.digest), record, roots)


def plan(
    runtime: Runtime,
    target: Target,
    export: Export,
    socket: Path,
    device: Path | None,
    roots: Roots,
) -> tuple[Attachment, list[str]]:
    """What `ensure` would make where nothing is found, and the shell commands that do it.
    `device`: the nbd device that it would take, None for the server's file."""
    made = _new(runtime, target, export, socket, roots)
    if device is None:
        source = runtime.files / export.digest
        return made, [
            shlex.join(["mkdir", "-p", str(made.directory)]),
            shlex.join(["touch", str(made.file)]),
            shlex.join(["mount", "--bind", str(source), str(made.file)]),
        ]
    made.record.device = str(device)
    seconds = nbd.timeout_seconds(may_fetch=target.may_fetch)
    return made, [nbd.connect_command(device, socket, export.name, made.block_bytes, seconds)]


def _bind_file(source: Path, file: Path) -> None:
    file.touch()
    syscalls.mount(source, file, None, syscalls.MS_BIND)


def _connect_nbd(runtime: Runtime, made: Attachment) -> bool:
    with runtime.device_lock():
        nbd.load(made.roots)
        device = next(nbd.free_devices(made.roots), None)
        if device is None:
            return False
        record = made.record
        record.device = str(device)
        made.save()  # before: the device must never be without a record
        connected = nbd.connect(
            device,
            Path(record.socket),
            record.export.name,
            backend=made.backend,
            block=made.block_bytes,
            size=record.size,
            timeout=nbd.timeout_seconds(may_fetch=record.may_fetch),
            roots=made.roots,
        )
        if not connected:
            record.device = None
        return connected


def sweep(runtime: Runtime, roots: Roots) -> None:
    """Let go of whatever nobody uses, after each operation. The server goes with the last
    attachment."""
    release_unused(runtime, roots)
    if not runtime.directories():
        stop_server(runtime)


def release_unused(runtime: Runtime, roots: Roots) -> None:
    """Let go of the attachments that nobody uses: before each operation, for what a killed process,
    a reboot or a umount(8) has left."""
    for directory in runtime.directories():
        if load_record(directory) is None:
            release(Attachment(directory, _NO_RECORD, roots))
    found = attachments(runtime, roots)
    for attachment in found:
        _forget_gone(attachment)
    table = kernel.mount_table()
    used = [each for each in found if each.record.claims or each.mounts(table)]
    homes = {home for each in used for home in each.record.homes}
    # An overlay goes before what it reads from.
    for attachment in sorted(found, key=lambda each: not each.record.homes):
        if not attachment.record.claims:
            _drop_loop(attachment)
            if attachment not in used and attachment.record.digest not in homes:
                release(attachment)


_NO_RECORD = Record("", "", 0, "", "", "", "")


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

    Raises MountError if the kernel refuses to disconnect its device.
    """
    directory = attachment.directory
    if not (kernel.try_unmount(attachment.top) and kernel.try_unmount(attachment.anchor)):
        return False
    loops = kernel.loops_over(attachment.file)
    if not _drop_loop(attachment):
        return False
    if attachment.record.device is not None:
        device = attachment.device
        if device is not None and kernel.is_claimed(device):
            return False
        if device is not None:
            nbd.disconnect(device, attachment.roots)
    patience = _LOOP_SECONDS if loops else 0
    if not wait(lambda: kernel.try_unmount(attachment.file), patience):
        return False
    for name in _FILES:
        (directory / name).unlink(missing_ok=True)
    for path in (attachment.anchor, attachment.top, directory):
        if path.exists():
            path.rmdir()
    return True
