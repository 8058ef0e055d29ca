"""attach, detach, mount, unmount, list and plan: what the commands of those names do.

A `Host` is one runtime directory. Operations of one store are serialised by its lock, over
processes; `list_mounts` and the plans take none. Every failure is a MountError, a ProgramError or
what the store raises, and leaves nothing half-made behind.

How mounts of different images could share page cache (issue 3: inode_share, an overlay over a pool)
is decided where the kernel's mount is made, in `Host._mount_on`, and there alone.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dedupstore.errors import MountError
from dedupstore.mounts import attachments, devices, kernel
from dedupstore.mounts.attachments import Attachment
from dedupstore.mounts.devices import Roots
from dedupstore.mounts.servers import find_server, start_command
from dedupstore.mounts.state import Runtime, Target, runtimes

EROFS = "erofs"
# File-backed EROFS mounts: refused before Linux 6.12; directio came later. Without it the kernel
# keeps nbdfuse's file in its cache as well: 307 MB for an image of 150.
_FILE_OPTIONS = ("directio", "")
_FILE_BACKED_SINCE = (6, 12)


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount as the kernel has it. Mounts with the same `superblock` ("major:minor") share inodes
    and page cache. `device` is the block device or file below; `via` is nbd, loop or file."""

    name: str
    directory: str
    device: str
    via: str
    fstype: str
    superblock: str
    digest: str
    store: str


@dataclass(frozen=True, slots=True)
class Attached:
    """A device that `attach` gave out, for `names`."""

    names: list[str]
    device: str
    via: str
    digest: str
    store: str


class Host:
    """The attachments and mounts under one runtime directory."""

    def __init__(self, run: Path, roots: Roots | None = None) -> None:
        self.run = run
        self.roots = roots or Roots()

    def attach(self, target: Target) -> Path:
        """Make the image a block device, or find that it or an identical one is; return it."""
        _require_root("attach")
        with self._changing(Runtime(self.run, target.store_uuid)) as runtime:
            attachment = attachments.ensure(runtime, target, self.roots)
            try:
                device = attachment.ensure_device()
            except OSError as error:
                raise MountError(f"loop device over {attachment.file}: {error.strerror}") from None
            if target.image.name not in attachment.record.claims:
                attachment.record.claims.append(target.image.name)
                attachment.save()
            return device

    def detach(self, what: str, store: Path) -> None:
        """Take back what `attach` gave out: a device, or a name of the store at `store`.

        Mounts made by `mount` keep the device; anything else that uses it is an error.
        """
        _require_root("detach")
        for runtime in runtimes(self.run):
            if not self._claimed(runtime, what, store):
                continue
            with self._changing(runtime):
                for attachment, names in self._claimed(runtime, what, store):
                    self._unclaim(attachment, names)
                    return
        raise MountError(f"{what}: not attached (see 'dedupstore mount --list --json')")

    def _claimed(
        self, runtime: Runtime, what: str, store: Path
    ) -> list[tuple[Attachment, list[str]]]:
        """The attachments that `what` means, each with the claims that end."""
        found = []
        for attachment in attachments.attachments(runtime, self.roots):
            claims = attachment.record.claims
            if what in claims and attachment.record.store == str(store.resolve()):
                found.append((attachment, [what]))
            elif claims and str(attachment.device) == what:
                found.append((attachment, list(claims)))
        return found

    @staticmethod
    def _unclaim(attachment: Attachment, names: list[str]) -> None:
        record = attachment.record
        left = [name for name in record.claims if name not in names]
        mounts = attachment.mounts(kernel.mount_table())
        foreign = [str(p.directory) for p in mounts if str(p.directory) not in record.mounts]
        if not left and foreign:
            raise MountError(f"{attachment.device}: in use, mounted on {foreign[0]}")
        device = attachment.device
        if not left and not mounts and device is not None and kernel.is_claimed(device):
            raise MountError(f"{device}: in use")
        record.claims = left
        attachment.save()

    def mount(self, target: Target, directory: Path, fstype: str | None = None) -> None:
        """Mount an image read-only. `fstype` defaults to erofs for EROFS images."""
        _require_root("mount")
        fstype = _choose_type(target, fstype)
        directory = _resolve_directory(directory)
        with self._changing(Runtime(self.run, target.store_uuid)) as runtime:
            self._require_unmounted(runtime, directory)
            attachment = attachments.ensure(runtime, target, self.roots)
            try:
                self._mount_on(attachment, directory, fstype)
            except OSError as error:
                what = f"mounting {target.image.name!r} on {directory}"
                raise MountError(f"{what} as {fstype}: {error.strerror}") from None
            attachment.record.mounts[str(directory)] = target.image.name
            attachment.save()

    def _require_unmounted(self, runtime: Runtime, directory: Path) -> None:
        for mount in self._mounts_of(runtime):
            if mount.directory == str(directory):
                raise MountError(f"{directory}: image {mount.name!r} is mounted there already")

    @staticmethod
    def _mount_on(attachment: Attachment, directory: Path, fstype: str) -> None:
        if attachment.record.device is None and fstype == EROFS and _mount_file(attachment):
            kernel.mount(attachment.anchor, directory, None, kernel.MS_BIND)
            return
        # The kernel gives a block device that is mounted already the same superblock again.
        kernel.mount(attachment.ensure_device(), directory, fstype, kernel.MS_RDONLY)

    def unmount(self, directory: Path) -> None:
        """Unmount a directory; the last mount of an image lets its device go, the last of a store
        its server. Raises MountError also for what this tool did not mount."""
        _require_root("umount")
        # Not resolved itself: a mount whose server is gone may not answer.
        resolved = directory.absolute().parent.resolve() / directory.name
        for candidate in dict.fromkeys((resolved, directory.resolve())):
            for runtime in runtimes(self.run):
                if self._top_mount(runtime, candidate) is None:
                    continue
                with self._changing(runtime):
                    attachment = self._top_mount(runtime, candidate)
                    if attachment is not None:
                        _unmount(candidate)
                        return
        raise MountError(f"{directory}: no mount of dedupstore's")

    def _top_mount(self, runtime: Runtime, directory: Path) -> Attachment | None:
        """The attachment whose mount is the visible one on `directory`."""
        table = kernel.mount_table()
        here = [point for point in table if point.directory == directory]
        for attachment in attachments.attachments(runtime, self.roots):
            if here and here[-1] in attachment.mounts(table):
                return attachment
        return None

    def list_mounts(self) -> tuple[list[Mount], list[Attached]]:
        """All mounts and attached devices, of every store."""
        found = runtimes(self.run)
        mounts = [mount for runtime in found for mount in self._mounts_of(runtime)]
        attached = [
            Attached(
                attachment.record.claims,
                str(device),
                _via(device),
                attachment.record.digest,
                attachment.record.store,
            )
            for runtime in found
            for attachment in attachments.attachments(runtime, self.roots)
            if attachment.record.claims and (device := attachment.device) is not None
        ]
        return mounts, attached

    def _mounts_of(self, runtime: Runtime) -> Iterator[Mount]:
        table = kernel.mount_table()
        for attachment in attachments.attachments(runtime, self.roots):
            record = attachment.record
            for point in attachment.mounts(table):
                yield Mount(
                    record.mounts.get(str(point.directory), record.name),
                    str(point.directory),
                    point.source,
                    _via(Path(point.source)),
                    point.fstype,
                    point.device,
                    record.digest,
                    record.store,
                )

    @contextmanager
    def _changing(self, runtime: Runtime) -> Iterator[Runtime]:
        """Hold the store's lock; clean up before, and after however it ends."""
        runtime.create()
        try:
            with runtime.lock():
                attachments.sweep(runtime, self.roots)
                try:
                    yield runtime
                finally:
                    attachments.sweep(runtime, self.roots)
        except OSError as error:
            raise MountError(f"{error.filename or runtime.path}: {error.strerror}") from None

    # --- dry runs ---

    def plan_attach(self, target: Target) -> list[str]:
        """The shell commands that do what `attach` would do now."""
        lines, attachment = self._plan(target)
        if attachment.device is None and attachment.record.device is None:
            lines.append(shlex.join(devices.loop_command(attachment.file, attachment.block_bytes)))
        return lines

    def plan_mount(self, target: Target, directory: Path, fstype: str | None = None) -> list[str]:
        """The shell commands that do what `mount` would do now."""
        fstype = _choose_type(target, fstype)
        directory = _resolve_directory(directory)
        lines, attachment = self._plan(target)
        device = attachment.record.device or attachment.device
        if attachment.record.device is None and fstype == EROFS and _has_file_backed_mounts():
            anchor = str(attachment.anchor)
            if not kernel.is_mounted(attachment.anchor):
                lines.append(shlex.join(["mkdir", "-p", anchor]))
                options = f"ro,{_FILE_OPTIONS[0]}"
                command = ["mount", "-t", EROFS, "-o", options, str(attachment.file), anchor]
                lines.append(f"{shlex.join(command)}  # mount(2) itself: no loop device")
            lines.append(shlex.join(["mount", "--bind", anchor, str(directory)]))
            return lines
        if device is None:
            loop = shlex.join(devices.loop_command(attachment.file, attachment.block_bytes))
            lines.append(f"device=$({loop})")
        words = ["mount", "-t", fstype, "-o", "ro"]
        source = '"$device"' if device is None else shlex.quote(str(device))
        lines.append(f"{shlex.join(words)} {source} {shlex.quote(str(directory))}")
        return lines

    def _plan(self, target: Target) -> tuple[list[str], Attachment]:
        """The commands up to a device, and the attachment as it is or would be."""
        runtime = Runtime(self.run, target.store_uuid)
        found = attachments.find(runtime, target.image.digest, self.roots)
        if found is not None:
            return [], found
        socket = find_server(runtime, target)
        planned, lines = attachments.plan(runtime, target, socket or runtime.socket, self.roots)
        if socket is None:
            start = shlex.join(start_command(runtime, target.store))
            lines = [shlex.join(["mkdir", "-p", str(runtime.path)]), start, *lines]
        return lines, planned


def _require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise MountError(f"{command} needs root")


def _choose_type(target: Target, fstype: str | None) -> str:
    if fstype is None and target.image.kind != EROFS:
        raise MountError(f"image {target.image.name!r} is not EROFS: say what it is with --type")
    return fstype or EROFS


def _resolve_directory(directory: Path) -> Path:
    try:
        resolved = directory.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "too many links"
        raise MountError(f"{directory}: {reason}") from None
    if not resolved.is_dir():
        raise MountError(f"{directory}: not a directory")
    return resolved


def _mount_file(attachment: Attachment) -> bool:
    """Mount nbdfuse's file on the anchor, once; False if this kernel mounts devices only."""
    if kernel.is_mounted(attachment.anchor):
        return True
    attachment.anchor.mkdir(exist_ok=True)
    for options in _FILE_OPTIONS:
        try:
            kernel.mount(attachment.file, attachment.anchor, EROFS, kernel.MS_RDONLY, options)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTBLK):
                raise
        else:
            return True
    return False


def _has_file_backed_mounts() -> bool:
    """A guess, for plans; `_mount_file` asks the kernel."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= _FILE_BACKED_SINCE


def _unmount(directory: Path) -> None:
    try:
        kernel.unmount(directory)
    except OSError as error:
        reason = "in use" if error.errno == errno.EBUSY else error.strerror
        raise MountError(f"{directory}: {reason}") from None


def _via(source: Path) -> str:
    for prefix in ("nbd", "loop"):
        if source.parent == Path("/dev") and source.name.startswith(prefix):
            return prefix
    return "file"
