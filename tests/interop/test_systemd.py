"""`serve` under systemd: its sockets, the units of the package, and those units in a real systemd,
which is the first process of namespaces of its own and knows no other units."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.interop.corpus import Images
from tests.interop.rig import (
    DEDUPSTORE,
    PATIENCE_SECONDS,
    StoreDirectory,
    client_command,
    refusal,
    require_nbdkit,
    run,
    takes_connections,
    wait_until,
)
from tests.programs import require_program, require_root, unavailable
from tools.ondemand import servers

ROOT = Path(__file__).parents[2]
UNITS = ("dedupstore@.service", "dedupstore@.socket")


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose sockets have short enough paths."""
    with tempfile.TemporaryDirectory(prefix="ds-", dir="/tmp") as directory:
        yield Path(directory)


# --- socket activation ---


def activated(socket: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """`dedupstore` as systemd starts it when a client connects to `socket`."""
    require_nbdkit()
    require_program("systemd-socket-activate")
    command = ["systemd-socket-activate", "--listen", socket, DEDUPSTORE, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: socket.exists() or process.poll() is not None)
    return process


def test_serve_takes_the_socket_that_systemd_has_opened(
    store_dir: StoreDirectory, images: Images, short_path: Path
) -> None:
    with activated(short_path / "s", "--store", store_dir.path, "serve", "base") as server:
        run("nbdcopy", f"nbd+unix:///?socket={short_path}/s", short_path / "copy")
        server.terminate()
        assert server.wait(PATIENCE_SECONDS) == 0
    assert (short_path / "copy").read_bytes() == images.base.read_bytes()
    assert not (store_dir.path / "nbd.sock").exists()


def test_serve_refuses_a_socket_beside_systemd_s(
    store_dir: StoreDirectory, short_path: Path
) -> None:
    arguments = ("--store", store_dir.path, "serve", "--socket", short_path / "other")
    with activated(short_path / "s", *arguments) as server:
        subprocess.run(
            ["nbdinfo", f"nbd+unix:///?socket={short_path}/s"], check=False, capture_output=True
        )
        _, printed = server.communicate(timeout=PATIENCE_SECONDS)
    assert server.returncode == 2
    assert "systemd has opened the socket already" in printed
    assert not (short_path / "other").exists()


def test_serve_starts_where_a_killed_one_left_its_socket(
    store_dir: StoreDirectory, images: Images, short_path: Path
) -> None:
    require_nbdkit()
    socket = short_path / "s"
    command = [DEDUPSTORE, "--store", store_dir.path, "serve", "base", "--socket", socket]
    with ended(command, socket) as killed:
        refused = subprocess.run(command, capture_output=True, check=False, text=True)
        assert "in use" in refusal(refused.returncode, refused.stderr)  # by one that lives
        killed.kill()
    wait_until(lambda: not takes_connections(socket))
    assert socket.exists()
    with ended(command, socket) as server:
        run("nbdcopy", f"nbd+unix:///?socket={socket}", short_path / "copy")
        server.terminate()
        assert server.wait(PATIENCE_SECONDS) == 0
    assert (short_path / "copy").read_bytes() == images.base.read_bytes()


@contextmanager
def ended(command: Sequence[str | Path], socket: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that takes connections; killed in the end if it has not ended by then."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: takes_connections(socket) or process.poll() is not None)
            yield process
        finally:
            process.kill()


# --- the package ---


def test_units_are_in_wheel_and_sdist_where_systemd_looks_for_them(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    left_out = shutil.ignore_patterns(".git", ".venv", "tests", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left_out)
    for kind in ("wheel", "sdist"):
        build = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
        command = [sys.executable, "-c", build, out]
        subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        installed = {name.partition(".data/data/")[2] for name in archive.namelist()}
    assert {f"lib/systemd/system/{unit}" for unit in UNITS} <= installed
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {f"systemd/{unit}" for unit in UNITS} <= names


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    require_program("systemd-analyze")
    units, programs = tmp_path / "usr/lib/systemd/system", tmp_path / "usr/bin"
    units.mkdir(parents=True)
    programs.mkdir()
    shutil.copy(shutil.which("true") or "/bin/true", programs / "dedupstore")
    for unit in UNITS:
        shutil.copy(ROOT / "systemd" / unit, units)
    verify = ["systemd-analyze", "verify", f"--root={tmp_path}", "--recursive-errors=no"]
    names = [unit.replace("@", "@srv-images") for unit in UNITS]
    done = subprocess.run([*verify, *names], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- a systemd ---

# Mounts are this namespace's own. Of the host's control groups systemd gets a part.
START = """
set -e
mount --make-rprivate /
mount -t tmpfs none /run
mount -t tmpfs none /usr/local/bin
ln -s {program} /usr/local/bin/dedupstore
if grep -q 'name=systemd' /proc/self/cgroup; then
    mount -t tmpfs none /sys/fs/cgroup
    mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
    mount -t cgroup2 none /sys/fs/cgroup/unified
else
    mount -t cgroup2 none /sys/fs/cgroup
fi
export container=test SYSTEMD_UNIT_PATH={units}
exec /lib/systemd/systemd --system --unit=default.target --show-status=no --log-target=null
"""
TARGETS = ("basic", "default", "multi-user", "shutdown", "sockets", "sysinit")
PROPERTIES = ("ActiveState", "ExecMainStatus", "NRestarts", "Result")


@dataclass(frozen=True, slots=True)
class Systemd:
    """A systemd with the project's units, and one store in a directory with a blank in its name."""

    pid: int
    store: StoreDirectory
    unit: str

    @property
    def uri(self) -> str:
        socket = str(self.store.path / "nbd.sock").replace(" ", "%20")
        return f"nbd+unix:///base?socket={socket}"

    def enter(self, *command: str | Path) -> str:
        return run("nsenter", "--target", str(self.pid), "--all", *command).strip()

    def control(self, *arguments: str) -> str:
        return self.enter("systemctl", "--no-pager", *arguments)

    def shows(self, name: str) -> str:
        return self.control("show", f"{self.unit}.service", "--property", name, "--value")

    def server(self) -> str:
        """The process of nbdkit, which runs once a client has had an answer."""
        for path in Path("/proc").glob("[0-9]*/cgroup"):
            with suppress(OSError):
                is_nbdkit = (path.parent / "comm").read_text() == "nbdkit\n"
                if is_nbdkit and f"/{self.unit}.service" in path.read_text():
                    return path.parent.name
        raise AssertionError("no server")


@pytest.fixture
def systemd(images: Images, short_path: Path) -> Iterator[Systemd]:
    """The socket's unit is started, and no more."""
    require_root()
    require_nbdkit()
    require_program("systemd-analyze", "unshare", "nsenter")
    units = short_path / "units"
    units.mkdir()
    for unit in UNITS:
        shutil.copy(ROOT / "systemd" / unit, units)
    for target in TARGETS:
        (units / f"{target}.target").write_text(f"[Unit]\nDescription={target}\n")
    store = StoreDirectory(short_path / "a store")
    store.create()
    store.do("import", images.base, "base")
    namespaces = ["--mount", "--pid", "--uts", "--ipc", "--cgroup", "--mount-proc"]
    script = START.format(program=DEDUPSTORE, units=units)
    command = ["unshare", "--fork", "--kill-child", *namespaces, "sh", "-c", script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = Systemd(_child(process), store, _unit(store.path))
            wait_until(lambda: _answers(found) or process.poll() is not None)
            if process.poll() is not None:
                assert process.stderr is not None
                unavailable(f"no systemd in namespaces: {process.stderr.read()}")
            found.control("start", f"{found.unit}.socket")
            yield found
            found.control("stop", f"{found.unit}.socket", f"{found.unit}.service")
        finally:
            process.kill()
    store.check()


def _child(process: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text() != "" or process.poll() is not None)
    return int((children.read_text() or "0").split()[0])


def _answers(found: Systemd) -> bool:
    probe = [
        "nsenter",
        "--target",
        str(found.pid),
        "--all",
        "systemctl",
        "is-active",
        "x.target",
    ]
    done = subprocess.run(probe, capture_output=True, check=False)
    return done.stdout in (b"active\n", b"inactive\n")


def _unit(path: Path) -> str:
    return f"dedupstore@{run('systemd-escape', '--path', path).strip()}"


def test_client_s_connection_starts_the_server_in_its_sandbox(
    systemd: Systemd, images: Images, short_path: Path
) -> None:
    assert systemd.shows("ActiveState") == "inactive"
    run("nbdcopy", systemd.uri, short_path / "copy")
    assert (short_path / "copy").read_bytes() == images.base.read_bytes()
    status = Path(f"/proc/{systemd.server()}/status").read_text()
    fields = dict(line.split(":\t") for line in status.splitlines())
    assert int(fields["CapEff"], 16) == 0
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


def test_killed_server_is_back_for_whoever_connects(
    systemd: Systemd, images: Images, short_path: Path
) -> None:
    run("nbdinfo", systemd.uri)
    for restarts in range(1, 4):
        run("kill", "-KILL", systemd.server())
        run("nbdcopy", systemd.uri, short_path / "copy")
        assert (short_path / "copy").read_bytes() == images.base.read_bytes()
        wait_until(lambda: systemd.shows("ActiveState") == "active")
        assert systemd.shows("NRestarts") == str(restarts)


def test_stopped_server_ends_with_status_0_and_holds_nothing(systemd: Systemd) -> None:
    script = 'h = connect()\nprint("ready", flush=True)\nsys.stdin.readline()\n'
    command = client_command(systemd.uri, script)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        systemd.store.do("rm", "base")
        assert reclaimed(systemd.store) == 0
        systemd.control("stop", f"{systemd.unit}.socket", f"{systemd.unit}.service")
        shown = {name: systemd.shows(name) for name in PROPERTIES}
        assert client.poll() is None
    assert reclaimed(systemd.store) == 1
    assert shown == {
        "ActiveState": "inactive",
        "ExecMainStatus": "0",
        "NRestarts": "0",
        "Result": "success",
    }
    assert not (systemd.store.path / "nbd.sock").exists()


def reclaimed(store: StoreDirectory) -> int:
    """How many manifests gc finds that nobody needs, and deletes."""
    found: int = json.loads(store.do("gc", "--json"))["manifests"]
    return found


def test_unit_fetches_from_a_remote_with_the_drop_in_that_the_documentation_has(
    systemd: Systemd, images: Images, short_path: Path
) -> None:
    require_program("nginx")
    page = (ROOT / "docs" / "mounting.md").read_text()
    (drop_in,) = (
        text for text in re.findall(r"```ini\n(.*?)```", page, re.S) if "IPAddress" in text
    )
    directory = short_path / "units" / "dedupstore@.service.d"
    directory.mkdir()
    (directory / "network.conf").write_text(drop_in)
    systemd.control("daemon-reload")
    (short_path / "root").mkdir()
    origin = StoreDirectory(short_path / "origin")
    origin.create()
    origin.do("import", images.derived, "lazy")
    origin.do("remote", "add", "far", short_path / "root" / "far")
    origin.do("push", "far", "lazy")
    with servers.nginx(short_path / "root", short_path / "nginx") as web:
        systemd.store.do("remote", "add", "far", f"{web.url}/far")
        systemd.store.do("pull", "--lazy", "far", "lazy")
        copy = short_path / "copy"
        run("nbdcopy", systemd.uri.replace("/base?", "/lazy?"), copy)
    assert copy.read_bytes() == images.derived.read_bytes()
