"""attach, detach, mount, unmount, reconnect, list and plan: what the commands of those names do.

A `Host` is one runtime directory. Operations of one store are serialised by its lock, over
processes; `list_mounts` and the plans take none. Every failure is a MountError, a ProgramError or
what the store raises, and leaves nothing half-made behind.

What is mounted for an image, and so how it shares with others, was decided when its `Target` was
made; `anchors` makes the mount.
"""

from __future__ import annotations

import errno
import os
import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dedupstore import syscalls
from dedupstore.errors import DedupError, MountError
from dedupstore.mounts import anchors, attachments, devices, kernel, nbd
from dedupstore.mounts.anchors import EROFS
from dedupstore.mounts.attachments import Attachment
from dedupstore.mounts.nbd import Roots
from dedupstore.mounts.servers import find_server, start_command, start_early
from dedupstore.mounts.sharing import POOL
from dedupstore.mounts.state import Export, Runtime, Target, runtimes


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount as the kernel has it. Mounts with the same `superblock` ("major:minor") share inodes
    and page cache; so do, file by file, those of one store with the same `share` but "none".
    `device` is the block device or file below; `via` is nbd, loop or file; `digest` the image's."""

    name: str
    directory: str
    share: str
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
            attachment = self._ensure(runtime, target, target.export, mounting=False)
            try:
                device = attachment.ensure_device()
            except OSError as error:
                raise MountError(f"loop device over {attachment.file}: {error.strerror}") from None
            if target.name not in attachment.record.claims:
                attachment.record.claims.append(target.name)
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

    def mount(
        self,
        target: Target,
        directory: Path,
        fstype: str | None = None,
        restrictions: Sequence[str] = (),
    ) -> None:
        """Mount an image read-only. `fstype` defaults to erofs for EROFS images; `restrictions` are
        keys of kernel.RESTRICTIONS, and hold for this mount alone."""
        _require_root("mount")
        fstype = _choose_type(target, fstype)
        directory = _resolve_directory(directory)
        with self._changing(Runtime(self.run, target.store_uuid)) as runtime:
            self._require_unmounted(runtime, directory)
            homes = [self._ensure(runtime, target, home, mounting=True) for home in target.homes]
            attachment = self._ensure(runtime, target, target.export, mounting=True)
            record = attachment.record
            record.image, record.name = target.digest, target.name
            try:
                if fstype == EROFS:
                    top = anchors.mount(attachment, homes, target.store_uuid)
                    _bind(top, directory, _flags(restrictions))
                else:
                    # The kernel gives a device that is mounted already the same superblock again.
                    device = attachment.ensure_device()
                    flags = syscalls.MS_RDONLY | _flags(restrictions)
                    syscalls.mount(device, directory, fstype, flags)
            except OSError as error:
                what = f"mounting {target.name!r} on {directory}"
                raise MountError(f"{what} as {fstype}: {error.strerror}") from None
            record.mounts[str(directory)] = target.name
            attachment.save()

    @contextmanager
    def starting(self, store: Path, store_uuid: str, directory: Path | None) -> Iterator[None]:
        """While the image that is going to be mounted on `directory`, or attached (None), is made,
        in the block: start the store's server, if need be, which takes as long. Raises MountError,
        before the block, for what is no directory."""
        if directory is None:
            _require_root("attach")
        else:
            _require_root("mount")
            _resolve_directory(directory)
        runtime = Runtime(self.run, store_uuid)
        thread = threading.Thread(target=_start_early, args=(runtime, store), name="server")
        thread.start()
        try:
            yield
        except BaseException:
            thread.join()
            with self._changing(runtime):  # which stops a server that nobody uses
                raise
        thread.join()

    def _ensure(
        self, runtime: Runtime, target: Target, export: Export, *, mounting: bool
    ) -> Attachment:
        return attachments.ensure(runtime, target, export, self.roots, mounting=mounting)

    def _require_unmounted(self, runtime: Runtime, directory: Path) -> None:
        for mount in self._mounts_of(runtime):
            if mount.directory == str(directory):
                raise MountError(f"{directory}: image {mount.name!r} is mounted there already")

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

    def reconnect(self, store: Path) -> None:
        """After the server of the store at `store` was started again: give the nbd devices that
        hung on it new connections, and what waited goes on. Without a server one is started. May be
        done at any time. Raises MountError for a device that cannot be helped, after the others."""
        _require_root("reconnect")
        resolved = str(store.resolve())
        for runtime in runtimes(self.run):
            found = attachments.attachments(runtime, self.roots)
            if any(each.record.store == resolved for each in found):
                with self._changing(runtime):
                    attachments.reconnect(runtime, self.roots)

    def list_mounts(self) -> tuple[list[Mount], list[Attached]]:
        """All mounts and attached devices, of every store."""
        found = runtimes(self.run)
        mounts = [mount for runtime in found for mount in self._mounts_of(runtime)]
        attached = [
            Attached(
                attachment.record.claims,
                str(device),
                _via(device),
                attachment.record.image,
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
            source = self._source(attachment, table)
            for point in attachment.mounts(table):
                yield Mount(
                    record.mounts.get(str(point.directory), record.name),
                    str(point.directory),
                    record.share,
                    source,
                    _via(Path(source)),
                    point.fstype,
                    point.device,
                    record.image,
                    record.store,
                )

    @staticmethod
    def _source(attachment: Attachment, table: list[kernel.MountPoint]) -> str:
        """What an attachment's EROFS is mounted from; else what it would be."""
        for point in table:
            if point.directory == attachment.anchor:
                return point.source
        return str(attachment.device or attachment.file)

    @contextmanager
    def _changing(self, runtime: Runtime) -> Iterator[Runtime]:
        """Hold the store's lock; clean up before, and after however it ends."""
        runtime.create()
        try:
            with runtime.lock():
                # A server that nobody uses, yet, is of use to what comes next.
                attachments.release_unused(runtime, self.roots)
                try:
                    yield runtime
                finally:
                    attachments.sweep(runtime, self.roots)
        except OSError as error:
            raise MountError(f"{error.filename or runtime.path}: {error.strerror}") from None

    # --- dry runs ---

    def plan_attach(self, target: Target) -> list[str]:
        """The shell commands that do what `attach` would do now."""
        lines, (attachment,) = self._plan(target, [target.export], None)
        if attachment.device is None and attachment.record.device is None:
            lines.append(shlex.join(devices.loop_command(attachment.file, attachment.block_bytes)))
        return lines

    def plan_mount(
        self,
        target: Target,
        directory: Path,
        fstype: str | None = None,
        restrictions: Sequence[str] = (),
    ) -> list[str]:
        """The shell commands that do what `mount` would do now."""
        fstype = _choose_type(target, fstype)
        directory = _resolve_directory(directory)
        exports = [*target.homes, target.export]
        lines, (*homes, attachment) = self._plan(target, exports, target.share)
        if fstype == EROFS:
            lines += anchors.plan(attachment, homes, target.store_uuid)
            is_pool = attachment.record.share == POOL
            source = attachment.top if is_pool else attachment.anchor
            bind = ["mount", "--bind"]
            if restrictions:
                bind += ["-o", ",".join(("ro", *restrictions))]
            return [*lines, shlex.join([*bind, str(source), str(directory)])]
        device = attachment.record.device or attachment.device
        if device is None:
            loop = shlex.join(devices.loop_command(attachment.file, attachment.block_bytes))
            lines.append(f"device=$({loop})")
        words = shlex.join(["mount", "-t", fstype, "-o", ",".join(("ro", *restrictions))])
        source_word = '"$device"' if device is None else shlex.quote(str(device))
        return [*lines, f"{words} {source_word} {shlex.quote(str(directory))}"]

    def _plan(
        self, target: Target, exports: list[Export], share: str | None
    ) -> tuple[list[str], list[Attachment]]:
        """The commands up to the devices, and the attachments as they are or would be."""
        runtime = Runtime(self.run, target.store_uuid)
        socket = find_server(runtime, target.store, target.export)
        lines, planned = [], []
        free = nbd.free_devices(self.roots)
        for export in exports:
            attachment = attachments.find(runtime, export.digest, share, self.roots)
            if attachment is None:
                device = next(free, None)
                if device is None and socket != runtime.socket:
                    socket = None  # only the server of the runtime directory makes files
                attachment, commands = attachments.plan(
                    runtime, target, export, socket or runtime.socket, device, self.roots
                )
                lines += commands
            planned.append(attachment)
        return (lines if socket else [*self._plan_server(runtime, target), *lines]), planned

    @staticmethod
    def _plan_server(runtime: Runtime, target: Target) -> list[str]:
        files = shlex.quote(str(runtime.files))
        return [
            f"mkdir -p {files}",
            shlex.join(start_command(runtime, target.store)),
            f"until mountpoint -q {files}; do sleep 0.1; done",
        ]


def _start_early(runtime: Runtime, store: Path) -> None:
    with suppress(DedupError, OSError):  # `mount` will try again, and say why not
        runtime.create()
        with runtime.lock():
            start_early(runtime, store)


def _require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise MountError(f"{command} needs root")


def _choose_type(target: Target, fstype: str | None) -> str:
    if fstype is None and target.export.kind != EROFS:
        raise MountError(f"image {target.name!r} is not EROFS: say what it is with --type")
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


def _flags(restrictions: Sequence[str]) -> int:
    return sum(kernel.RESTRICTIONS[name] for name in set(restrictions))


def _bind(source: Path, directory: Path, flags: int) -> None:
    """A bind mount; its flags take a second step, without which it must not stay."""
    syscalls.mount(source, directory, None, syscalls.MS_BIND)
    if flags:
        try:
            again = syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY
            syscalls.mount(source, directory, None, again | flags)
        except OSError:
            syscalls.unmount(directory)
            raise


def _unmount(directory: Path) -> None:
    try:
        syscalls.unmount(directory)
    except OSError as error:
        reason = "in use" if error.errno == errno.EBUSY else error.strerror
        raise MountError(f"{directory}: {reason}") from None


def _via(source: Path) -> str:
    for prefix in ("nbd", "loop"):
        if source.parent == Path("/dev") and source.name.startswith(prefix):
            return prefix
    return "file"
