"""N clones cost one: what the shared cache saves, counted by the server's own metrics."""

from __future__ import annotations

import json
import re

import pytest

from tests.interop.corpus import Images
from tests.interop.rig import Server, Servers, StoreDirectory, scrape, wait_until

READ_ALL = """\
h = connect()
print(hashlib.sha256(read_all(h)).hexdigest())
h.shutdown()
"""

READ_IN_PARALLEL = """\
connections = [connect() for _ in range(int(arguments[0]))]
together = threading.Barrier(len(connections))
digests = []


def read(h):
    together.wait()
    digests.append(hashlib.sha256(read_all(h)).hexdigest())


threads = [threading.Thread(target=read, args=(h,)) for h in connections]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for h in connections:
    h.shutdown()
assert len(digests) == len(connections)
print(*set(digests))
"""

THREADS = """\
import os

pid, count = map(int, arguments)


def threads():
    return len(os.listdir(f"/proc/{pid}/task"))


before = threads()
connections = [connect() for _ in range(count)]
for h in connections:
    for at in range(0, 1 << 20, 1 << 16):
        h.pread(1 << 16, at)
print(threads() - before)
for h in connections:
    h.shutdown()
"""

PREFETCH = """\
h = connect()
for at in range(0, h.get_size(), 1 << 20):
    h.cache(min(1 << 20, h.get_size() - at), at)
h.shutdown()
"""


def store_reads(server: Server) -> tuple[int, int]:
    """Frames and chunks loaded from the store so far."""
    metrics = server.metrics()
    return metrics["dedup_store_frame_reads_total"], metrics["dedup_store_reads_total"]


def test_first_read_of_an_image_loads_each_of_its_frames_once(
    server: Servers, store_dir: StoreDirectory
) -> None:
    running = server(metrics=True)
    running.client(READ_ALL, "base")
    frames, chunks = store_reads(running)
    assert frames == len(store_dir.frames_of("base"))
    assert chunks == json.loads(store_dir.do("info", "base", "--json"))["chunks"]


def test_read_of_a_clone_after_its_original_loads_nothing(server: Servers) -> None:
    running = server(metrics=True)
    original = running.client(READ_ALL, "base")
    before = store_reads(running)
    assert running.client(READ_ALL, "clone") == original
    assert store_reads(running) == before


def test_derived_image_loads_only_frames_of_its_own(
    server: Servers, store_dir: StoreDirectory
) -> None:
    own = store_dir.frames_of("derived") - store_dir.frames_of("base")
    running = server(metrics=True)
    running.client(READ_ALL, "base")
    before, _ = store_reads(running)
    running.client(READ_ALL, "derived")
    assert store_reads(running)[0] - before == len(own) > 0


def test_derived_image_loads_as_many_chunks_as_its_import_added(
    server: Servers, empty_store_dir: StoreDirectory, images: Images
) -> None:
    empty_store_dir.import_file(images.base, "base")
    added = json.loads(empty_store_dir.do("import", images.derived, "derived", "--json"))
    running = server(store=empty_store_dir.path, metrics=True)
    running.client(READ_ALL, "base")
    _, before = store_reads(running)
    running.client(READ_ALL, "derived")
    assert store_reads(running)[1] - before == added["new_chunks"] > 0


def test_concurrent_first_reads_load_each_frame_once(
    server: Servers, store_dir: StoreDirectory
) -> None:
    running = server(metrics=True)
    digests = running.client(READ_IN_PARALLEL, "base", "8").split()
    assert len(digests) == 1
    assert store_reads(running)[0] == len(store_dir.frames_of("base"))


def test_a_connection_has_one_thread(server: Servers) -> None:
    """More would hand the GIL to one another and cost memory: docs/concurrency.md."""
    running = server()
    assert int(running.client(THREADS, "base", str(running.process.pid), "6")) == 6


@pytest.mark.parametrize("budget", [0, 300_000, 2 << 20])
def test_cache_budget_holds_under_parallel_reads_of_a_much_larger_image(
    server: Servers, store_dir: StoreDirectory, images: Images, budget: int
) -> None:
    store_dir.import_file(images.noise, "noise")
    running = server(f"cache={budget}", metrics=True)
    seen = []
    with running.start_client(READ_IN_PARALLEL, "noise", "3") as client:
        while client.poll() is None:
            seen.append(running.metrics()["dedup_cache_bytes"])
    assert client.returncode == 0
    seen.append(running.metrics()["dedup_cache_bytes"])
    assert max(seen) <= budget
    assert seen[-1] > 0 or budget == 0


def test_images_beyond_the_budget_are_served_byte_exact(server: Servers, images: Images) -> None:
    assert server("cache=600K").read("base") == images.base.read_bytes()


def test_cache_of_no_bytes_serves_byte_exact(server: Servers, images: Images) -> None:
    assert server("cache=0").read("ragged") == images.ragged.read_bytes()


def test_cache_command_brings_an_image_in_so_that_reads_load_nothing(
    server: Servers, store_dir: StoreDirectory
) -> None:
    running = server(metrics=True)
    running.client(PREFETCH, "base")
    before = store_reads(running)
    assert before[0] == len(store_dir.frames_of("base"))
    running.client(READ_ALL, "base")
    assert store_reads(running) == before


def test_cache_command_on_one_block_loads_one_frame(server: Servers) -> None:
    running = server(metrics=True)
    running.client("h = connect()\nh.cache(4096, 1 << 20)\nh.shutdown()\n", "base")
    assert store_reads(running)[0] == 1


def test_read_of_a_hole_loads_nothing(server: Servers) -> None:
    running = server(metrics=True)
    running.client("h = connect()\nassert not any(h.pread(65536, 1 << 19))\n", "ragged")
    assert store_reads(running) == (0, 0)


def test_bytes_hits_and_misses_are_counted(server: Servers, images: Images) -> None:
    running = server(metrics=True)
    running.client(READ_ALL, "base")
    metrics = running.metrics()
    assert metrics["dedup_read_bytes_total"] == images.base.stat().st_size
    assert metrics["dedup_cache_hits_total"] > 0
    assert metrics["dedup_cache_misses_total"] > 0
    assert metrics["dedup_read_errors_total"] == 0


def test_open_exports_are_counted_until_clients_leave(server: Servers) -> None:
    running = server(metrics=True)
    script = "h = connect()\nprint('open', flush=True)\nsys.stdin.readline()\nh.shutdown()\n"
    with running.start_client(script, "base") as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "open\n"
        assert running.metrics()["dedup_exports_open"] == 1
        client.communicate("leave\n")
    wait_until(lambda: running.metrics()["dedup_exports_open"] == 0)


def test_bare_connection_to_the_metrics_socket_gets_the_text(server: Servers) -> None:
    text = scrape(server(metrics=True).directory / "metrics", b"")
    assert re.search(r"^dedup_store_reads_total 0", text, re.MULTILINE)
