"""mounts over nbd devices, which this kernel may not have: a laid-out /sys, /dev and /proc, and a
stand-in for nbd-client that changes them as the real one makes the kernel do."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from dedupstore.errors import ProgramError
from dedupstore.mounts import attachments, devices, handshake, kernel, servers
from dedupstore.mounts.devices import Roots
from dedupstore.mounts.mounts import Host
from dedupstore.mounts.state import Export, Runtime, Target, default_run, load_record

SIZE = 8 << 20
CLIENT_PID = 4711
EXPORT = Export("ab" * 32, SIZE, "erofs")
CLIENT = """\
#!/bin/sh -e
echo "$*" >> {root}/calls
if [ "$1" = -d ]; then
    block={root}/sys/block/${{2##*/}}
    rm $block/pid
    echo 0 > $block/size
    exit
fi
[ ! -e {root}/broken ] || {{ echo "Negotiation: .." >&2; echo "Error: it broke" >&2; exit 1; }}
block={root}/sys/block/${{3##*/}}
printf '%s\\0' nbd-client "$@" > {root}/proc/{pid}/cmdline
echo {sectors} > $block/size
echo {pid} > $block/pid
"""


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    """Twelve free nbd devices, and nbd-client on PATH."""
    found = Roots(tmp_path / "sys", tmp_path / "dev", tmp_path / "proc")
    (found.proc / str(CLIENT_PID)).mkdir(parents=True)
    found.dev.mkdir()
    for number in range(12):
        block = found.sys / "block" / f"nbd{number}"
        block.mkdir(parents=True)
        (block / "size").write_text("0\n")
        (found.dev / f"nbd{number}").write_bytes(bytes(4096))
    client = tmp_path / "bin" / "nbd-client"
    client.parent.mkdir()
    client.write_text(CLIENT.format(root=tmp_path, pid=CLIENT_PID, sectors=SIZE // 512))
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    return found


@pytest.fixture
def host(tmp_path: Path, roots: Roots, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host whose server always runs; with the nodes' device numbers, which files do not have."""
    monkeypatch.setattr("dedupstore.mounts.mounts._require_root", lambda command: None)
    monkeypatch.setattr(attachments, "ensure_server", lambda runtime, store, export: runtime.socket)
    monkeypatch.setattr(kernel, "device_number", lambda device: f"43:{device.name[3:]}")
    return Host(tmp_path / "run", roots)


@pytest.fixture
def target(tmp_path: Path) -> Callable[[str], Target]:
    """An image of that name; all have the same content."""

    def make(name: str) -> Target:
        store, uuid = tmp_path / "store", "0123456789abcdef" * 2
        return Target(store, uuid, name, EXPORT.digest, EXPORT)

    return make


def calls(roots: Roots) -> list[str]:
    return (roots.sys.parent / "calls").read_text().splitlines()


def test_command_asks_for_one_persistent_device_over_the_socket(roots: Roots) -> None:
    command = devices.nbd_client_command(Path("/dev/nbd3"), Path("/run/x.sock"), "a/b c", 4096)
    assert command[1:] == shlex.split(
        "-unix /run/x.sock /dev/nbd3 -N 'a/b c' -b 4096 -C 4 -persist -nonetlink"
    )


def test_device_with_a_process_or_a_size_or_without_a_node_is_never_free(roots: Roots) -> None:
    (roots.sys / "block" / "nbd0" / "pid").write_text("1\n")
    (roots.sys / "block" / "nbd1" / "size").write_text("8\n")
    (roots.dev / "nbd2").unlink()
    (roots.sys / "block" / "nbd3").rename(roots.sys / "block" / "nbd3p1")
    assert devices.free_nbd(roots) == roots.dev / "nbd4"


def test_devices_are_taken_in_the_order_of_their_numbers(roots: Roots) -> None:
    for number in range(10):
        (roots.sys / "block" / f"nbd{number}" / "pid").write_text("1\n")
    assert devices.free_nbd(roots) == roots.dev / "nbd10"


def test_without_nbd_devices_or_nbd_client_there_is_none(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert devices.free_nbd(Roots(tmp_path, tmp_path, tmp_path)) is None

    def missing(name: str, package: str) -> str:
        raise ProgramError(name, "not found")

    monkeypatch.setattr(devices, "find_program", missing)
    assert devices.free_nbd(roots) is None


def test_image_and_clone_are_one_device_disconnected_after_the_last_name(
    host: Host, roots: Roots, target: Callable[[str], Target]
) -> None:
    device = host.attach(target("base"))
    assert device == roots.dev / "nbd0"
    assert host.attach(target("clone")) == device
    _, (attached,) = host.list_mounts()
    assert attached.names == ["base", "clone"]
    store = Path(attached.store)
    host.detach("base", store)
    assert len(calls(roots)) == 1
    host.detach(str(device), store)
    assert calls(roots)[1:] == [f"-d {device}"]
    assert host.list_mounts() == ([], [])
    assert devices.free_nbd(roots) == device


def test_device_that_somebody_else_has_by_now_is_not_disconnected(
    host: Host, roots: Roots, target: Callable[[str], Target]
) -> None:
    device = host.attach(target("base"))
    (roots.proc / str(CLIENT_PID) / "cmdline").write_bytes(b"nbd-client\0other\0")
    assert host.list_mounts() == ([], [])
    assert host.attach(target("base")) == roots.dev / "nbd1"
    assert f"-d {device}" not in calls(roots)


def test_device_without_a_claim_is_an_orphan_and_goes(
    host: Host, roots: Roots, target: Callable[[str], Target]
) -> None:
    host.attach(target("base"))
    runtime = Runtime(host.run, target("base").store_uuid)
    (attachment,) = attachments.attachments(runtime, roots)
    attachment.record.claims.clear()
    attachment.save()
    attachments.sweep(runtime, roots)
    assert calls(roots)[-1] == f"-d {roots.dev / 'nbd0'}"
    assert runtime.directories() == []


def test_failing_nbd_client_is_quoted_and_leaves_nothing(
    host: Host, roots: Roots, target: Callable[[str], Target]
) -> None:
    (roots.sys.parent / "broken").touch()
    with pytest.raises(ProgramError, match=r"^nbd-client: Error: it broke$"):
        host.attach(target("base"))
    assert Runtime(host.run, target("base").store_uuid).directories() == []


def test_device_that_never_becomes_ready_is_disconnected(
    host: Host, roots: Roots, target: Callable[[str], Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_READY_SECONDS", 0.3)
    monkeypatch.setattr(devices, "_sectors", lambda block: 0)
    with pytest.raises(ProgramError, match="did not become ready"):
        host.attach(target("base"))
    assert calls(roots)[-1] == f"-d {roots.dev / 'nbd0'}"
    assert Runtime(host.run, target("base").store_uuid).directories() == []


def test_plan_of_mount_is_nbd_client_and_mount(
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
    name = f"/{EXPORT.digest}"
    assert connect.endswith(f"-unix /s {device} -N {name} -b 4096 -C 4 -persist -nonetlink")
    assert mount == f"mount -t erofs -o ro {device} {anchor}"
    assert bind == f"mount --bind {anchor} {tmp_path}"
    assert host.plan_attach(target("base")) == [connect]


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
