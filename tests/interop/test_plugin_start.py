"""How the plugin starts, how it refuses to, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from dedupstore import format as fmt
from dedupstore.env import Environment
from tests.interop.corpus import Images
from tests.interop.rig import (
    DEDUPSTORE,
    PATIENCE_SECONDS,
    PLUGIN,
    Servers,
    StoreDirectory,
    read_metrics,
    refusal,
    require_nbdkit,
    run,
    takes_connections,
    wait_until,
)

CONTRACT_METRICS = {
    "dedup_cache_hits_total",
    "dedup_cache_misses_total",
    "dedup_cache_bytes",
    "dedup_store_reads_total",
    "dedup_read_bytes_total",
    "dedup_read_errors_total",
}

LOAD = """\
def load():
    try:
        h = connect()
        while True:
            read_all(h)
            ready.release()
    except nbd.Error:
        pass  # the server has gone


ready = threading.Semaphore(0)
threads = [threading.Thread(target=load) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    ready.acquire()
print("ready", flush=True)
for thread in threads:
    thread.join()
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for a unix socket's."""
    with tempfile.TemporaryDirectory(prefix="ds-", dir="/tmp") as directory:
        yield Path(directory)


def start_refused(*parameters: str) -> str:
    """The line with which nbdkit refuses to start."""
    require_nbdkit()
    result = subprocess.run(
        ["nbdkit", "--foreground", "--unix=-", "python", PLUGIN, *parameters, "--run", "false"],
        capture_output=True,
        check=False,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    return refusal(result.returncode, result.stderr)


def test_missing_store_is_refused(tmp_path: Path) -> None:
    line = start_refused(f"store={tmp_path}/nowhere")
    assert f"{tmp_path}/nowhere: no store here" in line


def test_directory_that_is_no_store_is_refused(tmp_path: Path) -> None:
    assert "no store here" in start_refused(f"store={tmp_path}")


def test_unknown_image_is_refused(store_dir: StoreDirectory) -> None:
    assert "no image named 'nope'" in start_refused(f"store={store_dir.path}", "image=nope")


def test_unknown_parameter_is_refused(store_dir: StoreDirectory) -> None:
    assert "imgae=: unknown parameter" in start_refused(f"store={store_dir.path}", "imgae=base")


@pytest.mark.parametrize("size", ["", "lots", "-1", "1.5G", "12Q", "٣"])
def test_cache_that_is_no_size_is_refused(store_dir: StoreDirectory, size: str) -> None:
    line = start_refused(f"store={store_dir.path}", f"cache={size}")
    assert f"cache={size}: not a size" in line


def test_metrics_in_a_missing_directory_is_refused(store_dir: StoreDirectory) -> None:
    line = start_refused(f"store={store_dir.path}", f"metrics={store_dir.path}/no/m")
    assert "no such directory" in line


def test_metrics_path_longer_than_a_socket_s_is_refused(store_dir: StoreDirectory) -> None:
    line = start_refused(f"store={store_dir.path}", f"metrics={store_dir.path}/{'m' * 120}")
    assert "longer than 107 bytes" in line


def test_metrics_never_replaces_an_ordinary_file(store_dir: StoreDirectory, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    path = os.path.relpath(tmp_path / "precious")
    line = start_refused(f"store={store_dir.path}", f"metrics={path}")
    assert "metrics=" in line
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.damaged
def test_store_of_a_newer_format_version_is_refused(store_dir: StoreDirectory) -> None:
    env = Environment(store_dir.path)
    with env.write() as txn:
        newer = fmt.Superblock(bytes(16), 0, version=fmt.FORMAT_VERSION + 1)
        txn.put(b"superblock", fmt.encode_superblock(newer), db=env.meta)
    env.close()
    assert "use a newer dedupstore" in start_refused(f"store={store_dir.path}")
    assert "use a newer dedupstore" in store_dir.refuse("ls")


@pytest.mark.damaged
def test_lmdb_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path)) as other, other.begin(write=True) as txn:
        txn.put(b"key", b"value")
    assert "not a dedupstore store" in start_refused(f"store={tmp_path}")


def test_starts_without_pythonpath_from_another_directory(server: Servers, images: Images) -> None:
    # A server's working directory is its own, and nothing of ours is in its environment.
    running = server(command=("env", "-i", f"PATH={os.environ['PATH']}", "nbdkit"))
    assert running.read("base") == images.base.read_bytes()


def test_store_comes_from_the_environment_without_a_parameter(
    store_dir: StoreDirectory, short_path: Path
) -> None:
    require_nbdkit()
    listed = subprocess.run(
        ["nbdkit", f"--unix={short_path}/s", "python", PLUGIN, "--run", 'nbdinfo --list "$uri"'],
        env=os.environ | {"DEDUPSTORE": str(store_dir.path)},
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert 'export="derived"' in listed


def test_daemon_serves_a_relative_store_from_any_directory(
    store_dir: StoreDirectory, images: Images, short_path: Path, tmp_path: Path
) -> None:
    require_nbdkit()
    plugin = os.path.relpath(PLUGIN, tmp_path)
    store = os.path.relpath(store_dir.path, tmp_path)
    (short_path / "w").symlink_to(tmp_path)
    subprocess.run(
        [
            "nbdkit",
            f"--unix={short_path}/s",
            f"--pidfile={short_path}/pid",
            "python",
            plugin,
            f"store={store}",
            f"metrics={short_path}/m",
        ],
        cwd=tmp_path,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    wait_until((short_path / "pid").exists)
    pid = int((short_path / "pid").read_text())
    try:
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        run("nbdcopy", f"nbd+unix:///base?socket={short_path}/s", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == images.base.read_bytes()
        assert read_metrics(short_path / "m")["dedup_store_reads_total"] > 0
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not _runs(pid))
    assert not (short_path / "m").exists()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_signal_under_load_ends_the_server_cleanly(server: Servers, how: signal.Signals) -> None:
    running = server("cache=600K", metrics=True)
    with running.start_client(LOAD, "base") as clients:
        assert clients.stdout is not None
        assert clients.stdout.readline() == "ready\n"
        running.signal(how)
        running.stop()
        assert clients.wait(PATIENCE_SECONDS) == 0
    assert not (running.directory / "metrics").exists()


IDLE = """\
h = connect()
h.pread(512, 0)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_server_although_clients_are_idle(
    server: Servers, how: signal.Signals
) -> None:
    running = server()
    with running.start_client(IDLE, "base") as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        running.signal(how)
        running.stop()
        assert client.poll() is None
        client.communicate("go\n", PATIENCE_SECONDS)


BACKLOG = """\
h = connect()
buffers = [nbd.Buffer(1 << 20) for _ in range(48)]
answers = []
cookies = [h.aio_pread(buffer, 0, lambda error: answers.append(error.value)) for buffer in buffers]
print("asked", flush=True)
while len(answers) < len(cookies):
    h.poll(-1)
print(answers.count(0), len({hashlib.sha256(b.to_bytearray()).digest() for b in buffers}))
"""


def test_what_was_asked_before_the_signal_is_answered(server: Servers) -> None:
    running = server()
    with running.start_client(BACKLOG, "base") as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "asked\n"
        running.signal(signal.SIGTERM)
        running.stop()
        assert client.communicate(timeout=PATIENCE_SECONDS)[0] == "48 1\n"


def test_stale_metrics_socket_is_replaced(
    server: Servers, store_dir: StoreDirectory, short_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_path / "m"))
    server(f"metrics={short_path}/m")
    wait_until(lambda: takes_connections(short_path / "m"))
    assert read_metrics(short_path / "m")["dedup_store_reads_total"] == 0


def test_metrics_socket_of_a_running_server_is_not_taken_over(
    server: Servers, store_dir: StoreDirectory
) -> None:
    running = server(metrics=True)
    line = start_refused(f"store={store_dir.path}", f"metrics={running.directory}/metrics")
    assert "another server uses it" in line
    assert running.metrics()["dedup_store_reads_total"] == 0


def test_metrics_socket_is_the_owner_s_alone(server: Servers) -> None:
    running = server(metrics=True)
    assert (running.directory / "metrics").stat().st_mode & 0o777 == 0o600


def test_metrics_of_the_contract_are_present(server: Servers) -> None:
    assert server(metrics=True).metrics().keys() >= CONTRACT_METRICS


def test_scraper_that_hangs_up_leaves_the_server_running(server: Servers) -> None:
    running = server(metrics=True)
    for request in (b"", b"GET", b"GET /metrics HTTP/1.1\r\n\r\n", b"\0\xff\n" * 1000):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(running.directory / "metrics"))
            connection.sendall(request)
    assert running.metrics()["dedup_store_reads_total"] == 0


def test_serve_command_runs_the_server_in_the_foreground(
    store_dir: StoreDirectory, images: Images, short_path: Path
) -> None:
    require_nbdkit()
    command = [
        DEDUPSTORE,
        "--store",
        store_dir.path,
        "serve",
        "base",
        "--socket",
        short_path / "s",
        "--cache",
        "8M",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as serving:
        wait_until(lambda: (short_path / "s").exists() or serving.poll() is not None)
        run("nbdcopy", f"nbd+unix:///?socket={short_path}/s", short_path / "copy")
        serving.terminate()
        _, printed = serving.communicate(timeout=PATIENCE_SECONDS)
    assert (serving.returncode, printed) == (0, "")
    assert (short_path / "copy").read_bytes() == images.base.read_bytes()


def test_serve_command_refuses_a_missing_store_in_one_line(tmp_path: Path) -> None:
    assert "no store here" in StoreDirectory(tmp_path / "nowhere").refuse("serve")
