"""What another user of the machine can open, connect to or read: nothing that was not given away.

The directories above are open to everybody here, and the umask hides nothing: what is private is so
by itself.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dedupstore.export import export_image
from dedupstore.mounts.servers import start_command
from dedupstore.mounts.state import Runtime
from dedupstore.store import Store
from tests.interop.rig import (
    DEDUPSTORE,
    PLUGIN,
    Servers,
    StoreDirectory,
    in_foreground,
    no_progress,
    require_nbdkit,
    run,
    takes_connections,
    wait_until,
)
from tests.programs import require_root

NOBODY = 65534


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    require_root()
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that everybody may enter, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ds-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def open_store(open_path: Path, store_dir: StoreDirectory) -> StoreDirectory:
    """A store in it, whose own directory somebody has opened to all."""
    store = StoreDirectory(open_path / "store")
    store.create()
    source = open_path / "source"
    source.write_bytes(os.urandom(1 << 20))
    store.import_file(source, "base")
    store.path.chmod(0o755)
    return store


def as_nobody(action: Callable[[], object]) -> str:
    """What an ordinary user gets: "done", or the name of the error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "failed otherwise"
        with suppress(BaseException):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            try:
                action()
                outcome = "done"
            except OSError as error:
                outcome = type(error).__name__
        os.write(write, outcome.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(child, 0)
    return text


def connect(path: Path) -> Callable[[], object]:
    def action() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))

    return action


def test_store_is_its_owner_s_alone(open_path: Path) -> None:
    store = StoreDirectory(open_path / "store")
    store.create()
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700
    assert as_nobody(lambda: list(store.path.iterdir())) == "PermissionError"


def test_files_of_a_store_are_private_even_where_its_directory_is_not(
    open_store: StoreDirectory,
) -> None:
    with Store(open_store.path) as store:
        list(store.names())
    found = list(open_store.path.iterdir())
    assert {path.name for path in found} >= {"data.mdb", "lock.mdb", "locks", "tmp"}
    for path in found:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
        action = path.iterdir if path.is_dir() else path.read_bytes
        assert as_nobody(lambda action=action: list(action())) == "PermissionError", path


def test_nobody_else_connects_to_serve(open_store: StoreDirectory) -> None:
    require_nbdkit()
    path, metrics = open_store.path / "nbd.sock", open_store.path / "metrics"
    command = [DEDUPSTORE, "--store", open_store.path, "serve", "--metrics", metrics]
    with in_foreground(*command) as serving:
        wait_until(lambda: metrics.exists() or serving.poll() is not None)
        wait_until(lambda: takes_connections(metrics))
        for each in (path, metrics):
            assert takes_connections(each)
            assert as_nobody(connect(each)) == "PermissionError", each


def test_nobody_else_connects_to_plain_nbdkit(server: Servers) -> None:
    running = server(metrics=True)
    running.expect_log("handshake")
    running.directory.chmod(0o755)
    for each in (running.socket, running.directory / "metrics"):
        assert as_nobody(connect(each)) == "PermissionError", each
        each.chmod(0o666)
        assert as_nobody(connect(each)) == "done", "nothing else was in the way"


def test_nobody_else_connects_to_the_server_of_mounts(
    open_path: Path, open_store: StoreDirectory
) -> None:
    require_nbdkit()
    runtime = Runtime(open_path / "run", "0" * 32)
    runtime.create()
    assert stat.S_IMODE(runtime.run.stat().st_mode) == 0o700
    assert stat.S_IMODE(runtime.path.stat().st_mode) == 0o700
    runtime.files.mkdir(mode=0o700)
    run(*start_command(runtime, open_store.path))
    pid = int(runtime.pidfile.read_text())
    try:
        assert as_nobody(connect(runtime.socket)) == "PermissionError"
        # And if somebody opens the directories.
        runtime.run.chmod(0o755)
        runtime.path.chmod(0o755)
        wait_until(runtime.metrics.exists)
        for each in (runtime.socket, runtime.metrics):
            assert as_nobody(connect(each)) == "PermissionError", each
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_files_of_exports_are_root_s_alone(open_path: Path, open_store: StoreDirectory) -> None:
    require_nbdkit()
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse")
    files, path = open_path / "files", open_path / "s"
    files.mkdir()
    digest = open_store.digest("base")
    command = ["nbdkit", "--foreground", f"--unix={path}", "python", PLUGIN]
    parameters = [f"store={open_store.path}", f"files={files}"]
    with in_foreground(*command, *parameters) as serving:
        wait_until(lambda: files.is_mount() or serving.poll() is not None)
        assert len((files / digest).read_bytes()) == 1 << 20
        assert as_nobody((files / digest).read_bytes) == "PermissionError"
        assert as_nobody((files / digest).stat) == "PermissionError"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_exported_file_is_as_private_as_the_umask_says(
    open_store: StoreDirectory, tmp_path: Path, umask: int, mode: int
) -> None:
    os.umask(umask)
    with Store(open_store.path) as store:
        export_image(store, "base", tmp_path / "out", no_progress)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode
