"""What clients can cost by being there: many, silent, half connected, or not reading answers."""

from __future__ import annotations

import random
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.interop.corpus import BLOCK, Images
from tests.interop.rig import Server, Servers, StoreDirectory, run, wait_until
from tests.interop.test_hostile_clients import (
    CACHE,
    GO,
    OPTION,
    READ,
    REQUEST_MAGIC,
    Connection,
    connected,
)
from tests.interop.test_plugin_start import start_refused
from tests.programs import unavailable

NO_MORE = "clients are connected: no more"
# What a client does to nbdkit that goes away in the middle.
HUNG_UP = "(read|write).*: |Broken pipe|Connection reset|handshake"

MAP = """\
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(uri)
counts = []


def count(context, offset, entries, error):
    counts.append(len(entries) // 2)
    return 0


h.block_status(h.get_size(), 0, count)
print(*counts)
h.block_status(h.get_size(), 0, count, nbd.CMD_FLAG_REQ_ONE)
print(*counts[1:])
"""

Connect = Callable[[Server], socket.socket]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Opens sockets to a server, and closes them all before it is stopped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as opened:

        def open_socket(server: Server) -> socket.socket:
            client = opened.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(20)
            client.connect(str(server.socket))
            return client

        yield open_socket
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _with_files(soft: int, hard: int) -> tuple[str, ...]:
    """nbdkit that may have so many files open."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        unavailable(f"fewer than {hard} files may be open")
    return ("prlimit", f"--nofile={soft}:{hard}", "nbdkit")


def _is_greeted(client: socket.socket) -> bool:
    with suppress(ConnectionResetError):
        return client.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
    return False


def test_thousand_clients_are_connected_at_once_where_1024_files_are_the_usual_limit(
    server: Servers, connect: Connect, images: Images
) -> None:
    running = server(command=_with_files(256, 4096))
    clients = [connect(running) for _ in range(1000)]
    assert all(_is_greeted(client) for client in clients)
    assert running.read("base") == images.base.read_bytes()
    for client in clients:
        client.close()


def test_no_more_clients_than_connections_allows_and_others_once_they_left(
    server: Servers, connect: Connect
) -> None:
    running = server("connections=3")
    running.expect_log(NO_MORE)
    clients = [connect(running) for _ in range(3)]
    assert all(_is_greeted(client) for client in clients), "and say nothing from then on"
    for _ in range(5):
        assert not _is_greeted(connect(running))
    clients.pop().close()
    wait_until(lambda: _is_greeted(connect(running)))
    assert not _is_greeted(connect(running))
    for client in clients:
        client.close()


def test_clients_that_come_and_go_are_not_counted_for_ever(server: Servers) -> None:
    running = server("connections=8")
    running.expect_log(HUNG_UP)
    for _ in range(100):
        with connected(running) as client:
            assert client.go(b"base")
            client.socket.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 2, 7, 0, 0))
            assert client.socket.recv(1) == b"", "nbdkit has ended the connection"
    with connected(running) as client:
        client.socket.sendall(b"no option")


def test_server_with_few_files_refuses_clients_before_it_runs_out_of_them(
    server: Servers, connect: Connect
) -> None:
    running = server(command=_with_files(300, 300))
    running.expect_log(NO_MORE)
    clients = [connect(running)]
    while _is_greeted(clients[-1]):
        clients.append(connect(running))
    assert len(clients) - 1 == 150, "the other half is for those who come all at once"
    for _ in range(300):
        assert not _is_greeted(connect(running))
    assert len(running.log()) == 301, "nbdkit's loop does not spin"
    for client in clients:
        client.close()
    wait_until(lambda: _threads(running) < 20)
    assert running.read("base")


def _threads(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


def test_connections_that_files_do_not_suffice_for_are_refused(store_dir: StoreDirectory) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    line = start_refused(f"store={store_dir.path}", f"connections={hard}")
    assert f"connections={hard}: " in line
    assert "ulimit -Hn" in line


@pytest.mark.parametrize("number", ["", "0", "-1", "many", "1k", "9999999999"])
def test_connections_that_are_no_number_are_refused(store_dir: StoreDirectory, number: str) -> None:
    line = start_refused(f"store={store_dir.path}", f"connections={number}")
    assert f"connections={number}: not a number" in line


def test_silent_and_half_connected_clients_and_slow_readers_hold_up_nobody(
    server: Servers, connect: Connect, images: Images
) -> None:
    running = server("cache=8M")
    running.expect_log(HUNG_UP)
    size = images.base.stat().st_size
    option = OPTION + struct.pack(">II", GO, 10_000)
    stuck: list[socket.socket] = []
    for beginning in (b"", struct.pack(">I", 3), struct.pack(">I", 3) + option, b"\0\0"):
        for _ in range(50):
            stuck.append(connect(running))
            stuck[-1].sendall(beginning)
    for _ in range(20):
        slow = Connection(running)
        stuck.append(slow.socket)
        assert slow.go(b"base")
        request = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, READ, 7, 0, size)
        slow.socket.sendall(request * 16)  # and reads no answer
    assert running.read("base") == images.base.read_bytes()
    assert running.read("derived") == images.derived.read_bytes()
    for client in stuck:
        client.close()


def test_map_of_a_fragmented_image_is_answered_in_parts(
    server: Servers, store_dir: StoreDirectory, tmp_path: Path
) -> None:
    pieces = 20_000
    with (tmp_path / "fragmented").open("wb") as file:
        file.write((b"\x01" * BLOCK + bytes(BLOCK)) * pieces)
    store_dir.import_file(tmp_path / "fragmented", "fragmented")
    running = server()
    first, one = running.client(MAP, "fragmented").splitlines()
    assert (int(first), int(one)) == (1 << 14, 1)
    found = run("nbdinfo", "--map", running.uri("fragmented")).splitlines()
    assert len(found) == 2 * pieces


def test_client_that_fills_the_cache_does_not_wash_out_what_others_read(
    server: Servers, store_dir: StoreDirectory, images: Images, tmp_path: Path
) -> None:
    flood = tmp_path / "flood"
    flood.write_bytes(random.Random(5).randbytes(32 << 20))
    store_dir.import_file(flood, "flood")
    running = server("cache=16M", metrics=True)
    with connected(running) as client:
        assert client.go(b"flood")
        for piece in range(4):  # a use counts once in what loads a 32nd of the cache
            running.read("base")
            assert client.request(CACHE, piece << 20, 1 << 20) == (0, b"")
        assert client.request(CACHE, 0, 32 << 20) == (0, b"")
        before = running.metrics()["dedup_store_frame_reads_total"]
        running.read("base")
        after = running.metrics()["dedup_store_frame_reads_total"]
    assert after - before <= len(store_dir.frames_of("base")) // 10
