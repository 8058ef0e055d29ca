"""mounts over nbd devices, which this kernel may not have: a laid-out /sys and /dev, and a stand-in
for the kernel's side of netlink that changes them as the real one does. What the kernel makes of
it is in tests/vm."""

from __future__ import annotations

import errno
import os
import shlex
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dedupstore.errors import MountError
from dedupstore.mounts import attachments, handshake, kernel, nbd, netlink, servers
from dedupstore.mounts.mounts import Host
from dedupstore.mounts.nbd import Roots
from dedupstore.mounts.state import Export, Runtime, Target, default_run, load_record
from dedupstore.remote import fetching

SIZE = 8 << 20
EXPORT = Export("ab" * 32, SIZE, "erofs")


@dataclass
class Driver:
    """The kernel's nbd driver: twelve free devices in `roots`."""

    roots: Roots
    calls: list[str] = field(default_factory=list)
    shows_backends: bool = True
    refuses: int = 0

    def __post_init__(self) -> None:
        self.roots.dev.mkdir()
        for number in range(12):
            self.block(number).mkdir(parents=True)
            (self.block(number) / "size").write_text("0\n")
            (self.roots.dev / f"nbd{number}").write_bytes(bytes(4096))

    def block(self, number: int) -> Path:
        return self.roots.sys / "block" / f"nbd{number}"

    def connect(self, index: int, sockets: list[socket.socket], **options: Any) -> None:
        if self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses))
        self.calls.append(f"connect {index} {len(sockets)} {options['size']} {options['block']}")
        block = self.block(index)
        (block / "size").write_text(f"{options['size'] // 512}\n")
        (block / "pid").write_text("1\n")
        if self.shows_backends:
            (block / "backend").write_text(f"{options['backend']}\n")

    def reconfigure(self, index: int, sockets: list[socket.socket], *, backend: str) -> None:
        self.calls.append(f"reconfigure {index} {len(sockets)}")
        if (self.block(index) / "backend").read_text() != f"{backend}\n":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def disconnect(self, index: int) -> None:
        self.calls.append(f"disconnect {index}")
        (self.block(index) / "size").write_text("0\n")
        for name in ("pid", "backend"):
            (self.block(index) / name).unlink(missing_ok=True)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The driver in the kernel's place, and a server that takes every connection."""
    found = Driver(Roots(tmp_path / "sys", tmp_path / "dev"))
    for name in ("connect", "reconfigure", "disconnect"):
        monkeypatch.setattr(netlink, name, getattr(found, name))
    monkeypatch.setattr(netlink, "has_nbd", lambda: True)

    def open_export(path: Path, export: str, timeout_seconds: float) -> handshake.Connection:
        return handshake.Connection(socket.socket(socket.AF_UNIX), SIZE, 0)

    monkeypatch.setattr(nbd, "open_export", open_export)
    return found


@pytest.fixture
def roots(driver: Driver) -> Roots:
    return driver.roots


@pytest.fixture
def host(tmp_path: Path, roots: Roots, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host whose server always runs; with the nodes' device numbers, which files do not have."""
    monkeypatch.setattr("dedupstore.mounts.mounts._require_root", lambda command: None)
    monkeypatch.setattr(attachments, "find_server", lambda runtime, store, export: runtime.socket)
    monkeypatch.setattr(kernel, "device_number", lambda device: f"43:{device.name[3:]}")
    return Host(tmp_path / "run", roots)


@pytest.fixture
def target(tmp_path: Path) -> Callable[[str], Target]:
    """An image of that name; all have the same content."""

    def make(name: str) -> Target:
        store, uuid = tmp_path / "store", "0123456789abcdef" * 2
        return Target(store, uuid, name, EXPORT.digest, EXPORT)

    return make


def test_device_with_a_process_or_a_size_or_without_a_node_is_never_free(roots: Roots) -> None:
    (roots.sys / "block" / "nbd0" / "pid").write_text("1\n")
    (roots.sys / "block" / "nbd1" / "size").write_text("8\n")
    (roots.dev / "nbd2").unlink()
    (roots.sys / "block" / "nbd3").rename(roots.sys / "block" / "nbd3p1")
    assert next(nbd.free_devices(roots)) == roots.dev / "nbd4"


def test_devices_are_taken_in_the_order_of_their_numbers(roots: Roots) -> None:
    for number in range(10):
        (roots.sys / "block" / f"nbd{number}" / "pid").write_text("1\n")
    assert next(nbd.free_devices(roots)) == roots.dev / "nbd10"


def test_without_nbd_devices_or_netlink_there_is_none(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(nbd.free_devices(Roots(tmp_path, tmp_path))) == []
    monkeypatch.setattr(netlink, "has_nbd", lambda: False)
    assert list(nbd.free_devices(roots)) == []


def test_image_and_clone_are_one_device_disconnected_after_the_last_name(
    host: Host, driver: Driver, target: Callable[[str], Target]
) -> None:
    device = host.attach(target("base"))
    assert device == driver.roots.dev / "nbd0"
    assert host.attach(target("clone")) == device
    _, (attached,) = host.list_mounts()
    assert attached.names == ["base", "clone"]
    store = Path(attached.store)
    host.detach("base", store)
    assert driver.calls == [f"connect 0 4 {SIZE} 4096", "reconfigure 0 4"]
    host.detach(str(device), store)
    assert driver.calls[2:] == ["disconnect 0"]
    assert host.list_mounts() == ([], [])
    assert next(nbd.free_devices(driver.roots)) == device


def test_device_that_somebody_else_has_by_now_is_left_alone(
    host: Host, driver: Driver, target: Callable[[str], Target]
) -> None:
    host.attach(target("base"))
    (driver.block(0) / "backend").write_text("somebody else's\n")
    assert host.list_mounts() == ([], [])
    host.reconnect(target("base").store)
    assert host.attach(target("base")) == driver.roots.dev / "nbd1"
    assert "disconnect 0" not in driver.calls
    assert "reconfigure 0 4" not in driver.calls


def test_device_without_a_claim_goes(
    host: Host, driver: Driver, target: Callable[[str], Target]
) -> None:
    host.attach(target("base"))
    runtime = Runtime(host.run, target("base").store_uuid)
    (attachment,) = attachments.attachments(runtime, driver.roots)
    attachment.record.claims.clear()
    attachment.save()
    attachments.sweep(runtime, driver.roots)
    assert driver.calls[-1] == "disconnect 0"
    assert runtime.directories() == []


def test_device_that_the_kernel_refuses_leaves_nothing(
    host: Host, driver: Driver, target: Callable[[str], Target]
) -> None:
    driver.refuses = errno.EBUSY
    with pytest.raises(MountError, match=r"nbd0: Device or resource busy$"):
        host.attach(target("base"))
    assert Runtime(host.run, target("base").store_uuid).directories() == []


def test_kernel_that_does_not_show_whose_a_device_is_gives_none(
    driver: Driver, tmp_path: Path
) -> None:
    driver.shows_backends = False
    device, roots = driver.roots.dev / "nbd0", driver.roots
    options: Any = {"backend": "x", "block": 4096, "size": SIZE, "timeout": 5, "roots": roots}
    assert not nbd.connect(device, tmp_path / "s", "/x", **options)
    assert next(nbd.free_devices(roots)) == device


def test_server_with_another_size_under_that_name_is_refused(
    driver: Driver, tmp_path: Path
) -> None:
    device, roots = driver.roots.dev / "nbd0", driver.roots
    with pytest.raises(MountError, match=f"'/x' has {SIZE} bytes, not 512"):
        nbd.connect(
            device, tmp_path, "/x", backend="x", block=512, size=512, timeout=5, roots=roots
        )
    assert driver.calls == []


def test_reconnecting_gives_every_device_of_the_store_connections(
    host: Host, driver: Driver, target: Callable[[str], Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    host.attach(target("base"))
    moved = host.run / "moved"
    monkeypatch.setattr(attachments, "find_server", lambda runtime, store, export: None)
    monkeypatch.setattr(attachments, "start_server", lambda runtime, store, export: moved)
    host.reconnect(target("base").store)
    assert driver.calls[1:] == ["reconfigure 0 4"]
    (attachment,) = attachments.attachments(
        Runtime(host.run, target("base").store_uuid), driver.roots
    )
    assert attachment.record.socket == str(moved)
    host.reconnect(Path("/another/store"))
    assert len(driver.calls) == 2


def test_plan_of_mount_names_device_and_mount(
    host: Host,
    roots: Roots,
    target: Callable[[str], Target],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "dedupstore.mounts.mounts.find_server", lambda runtime, store, export: Path("/s")
    )
    connect, mkdir, mount, bind = host.plan_mount(target("base"), tmp_path)
    device = roots.dev / "nbd0"
    anchor = mkdir.split()[-1]
    words = shlex.split(connect, comments=True)
    name = f"/{EXPORT.digest}"
    assert words == shlex.split(
        f"nbd-client -unix /s {device} -N {name} -b 4096 -C 4 -timeout {nbd.TIMEOUT_SECONDS}"
    )
    assert mount == f"mount -t erofs -o ro {device} {anchor}"
    assert bind == f"mount --bind {anchor} {tmp_path}"
    assert host.plan_attach(target("base")) == [connect]


@pytest.mark.parametrize("may_fetch", [False, True])
def test_device_waits_longer_than_a_server_does_for_a_remote_and_no_longer_without_one(
    host: Host,
    driver: Driver,
    target: Callable[[str], Target],
    monkeypatch: pytest.MonkeyPatch,
    may_fetch: bool,
) -> None:
    given: list[int] = []
    connect = driver.connect

    def noted(*arguments: Any, timeout_seconds: int, **options: Any) -> None:
        given.append(timeout_seconds)
        connect(*arguments, timeout_seconds=timeout_seconds, **options)

    monkeypatch.setattr(netlink, "connect", noted)
    image = replace(target("base"), may_fetch=may_fetch)
    monkeypatch.setattr(
        "dedupstore.mounts.mounts.find_server", lambda runtime, store, export: Path("/s")
    )
    (command,) = host.plan_attach(image)
    host.attach(image)
    seconds = nbd.timeout_seconds(may_fetch=may_fetch)
    assert given == [seconds]
    assert f" -timeout {seconds} " in command
    if may_fetch:  # else the kernel would drop connections on which an EIO is about to come
        assert seconds > fetching._READ_SECONDS
    else:
        assert seconds == nbd.TIMEOUT_SECONDS


def test_netlink_asks_the_kernel_for_its_families() -> None:
    assert netlink._family("nlctrl") == 16
    with pytest.raises(FileNotFoundError):
        netlink._family("no such family")


def test_netlink_message_is_laid_out_as_the_kernel_reads_it() -> None:
    with socket.socket(socket.AF_UNIX) as one:
        number = one.fileno().to_bytes(4, "little").hex()
        assert netlink._sockets([one]).hex() == f"1000 0700 0c00 0100 0800 0100 {number}".replace(
            " ", ""
        )
    assert netlink._text(10, "ab").hex() == "07000a0061620000"
    assert netlink._u64(4, 5).hex() == "0c0004000500000000000000"


def test_mountinfo_line_is_read_with_its_escapes_and_optional_fields() -> None:
    line = (
        r"44 27 0:40 / /mnt/a\040b\134c ro,relatime shared:1 master:2 - erofs /run/i\011mg ro,acl"
    )
    point = kernel._parse_mount(line + "\n")
    directory = Path("/mnt/a b\\c")
    assert point == kernel.MountPoint("0:40", directory, "erofs", "/run/i\tmg", "ro,acl")


def test_damaged_record_counts_as_none(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"store": 1}', '{"unknown": 1}'):
        (tmp_path / "record.json").write_text(text)
        assert load_record(tmp_path) is None


def test_runtime_directory_is_the_user_s_own() -> None:
    assert default_run({"DEDUPSTORE_RUN": "/x"}, 0) == Path("/x")
    assert default_run({}, 0) == Path("/run/dedupstore")
    assert default_run({"XDG_RUNTIME_DIR": "/y"}, 5) == Path("/y/dedupstore")
    assert default_run({}, 5) == Path("/run/user/5/dedupstore")


def test_socket_where_nobody_listens_is_no_server(tmp_path: Path) -> None:
    assert servers.find_server(Runtime(tmp_path, "0" * 32), tmp_path, EXPORT) is None
    with pytest.raises(FileNotFoundError):
        handshake.export_digest(tmp_path / "none", "base", 1.0)
