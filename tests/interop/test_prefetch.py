"""Images on demand with the real nbdkit: traces from one store to another, and fetching ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dedupstore.traces import read_trace
from tests.interop.corpus import Images
from tests.interop.rig import Server, Servers, StoreDirectory, client_command, wait_until

READ = "h = connect(); [h.pread(4096, int(at)) for at in arguments]"
PLACES = ("3000000", "0", "1500000")


@pytest.fixture
def elsewhere(store_dir: StoreDirectory, tmp_path: Path) -> StoreDirectory:
    """Another host's store, which knows the remote that images of `store_dir` were pushed to."""
    remote = tmp_path / "remote"
    store_dir.do("remote", "add", "r", remote)
    store_dir.do("push", "r", "base", "derived")
    other = StoreDirectory(tmp_path / "other")
    other.do("init")
    other.do("remote", "add", "r", remote)
    return other


def missing(store: StoreDirectory, name: str) -> int:
    return int(json.loads(store.do("info", name, "--json"))["missing_bytes"])


def record(store: StoreDirectory, server: Server, name: str, file: Path) -> None:
    """Record a trace of reading PLACES of an image."""
    command = client_command(server.uri(name), READ, *PLACES)
    metrics = server.directory / "metrics"
    store.do("trace", "record", name, file, "--metrics", metrics, "--", *command)


def test_after_a_prefetch_by_its_trace_a_run_asks_the_remote_for_nothing(
    server: Servers, store_dir: StoreDirectory, elsewhere: StoreDirectory, tmp_path: Path
) -> None:
    here = server(metrics=True)
    trace = tmp_path / "trace"
    record(store_dir, here, "base", trace)
    elsewhere.do("pull", "r", "base", "--lazy")
    done = json.loads(elsewhere.do("prefetch", "base", "--trace", trace, "--json"))
    assert done["wanted_bytes"] == read_trace(trace).bytes
    assert done["left_bytes"] == 0
    assert missing(elsewhere, "base") > 0
    there = server(store=elsewhere.path, metrics=True)
    there.client(READ, "base", *PLACES)
    assert there.metrics()["dedup_remote_requests_total"] == 0


@pytest.fixture
def trace(server: Servers, store_dir: StoreDirectory, tmp_path: Path) -> Path:
    """A trace of reading PLACES of `base`."""
    here = server(metrics=True)
    file = tmp_path / "base.trace"
    record(store_dir, here, "base", file)
    return file


def test_a_pull_with_a_trace_brings_what_is_in_it_at_once(
    server: Servers, elsewhere: StoreDirectory, trace: Path
) -> None:
    pulled = json.loads(elsewhere.do("pull", "r", "base", "--lazy", "--trace", trace, "--json"))
    (image,) = pulled["images"]
    assert image["fetched_bytes"] > 0
    assert 0 < image["missing_bytes"] == missing(elsewhere, "base")
    there = server(store=elsewhere.path, metrics=True)
    there.client(READ, "base", *PLACES)
    assert there.metrics()["dedup_remote_requests_total"] == 0


def test_an_image_that_was_pushed_with_a_trace_starts_with_one_request(
    server: Servers, store_dir: StoreDirectory, tmp_path: Path, trace: Path, images: Images
) -> None:
    store_dir.do("remote", "add", "laid-out", tmp_path / "laid-out")
    store_dir.do("push", "laid-out", "base", "--trace", trace)
    other = StoreDirectory(tmp_path / "third")
    other.do("init")
    other.do("remote", "add", "r", tmp_path / "laid-out")
    other.do("pull", "r", "base", "--lazy")
    there = server(store=other.path, metrics=True)
    there.client(READ, "base", *PLACES)
    assert there.metrics()["dedup_remote_requests_total"] == 1
    assert there.read("base") == images.base.read_bytes()


def test_a_running_server_fetches_ahead_and_heeds_pause_and_resume(
    server: Servers, elsewhere: StoreDirectory, images: Images
) -> None:
    elsewhere.do("pull", "r", "base", "--lazy", "--prefetch", "all")
    elsewhere.do("prefetch", "base", "--pause")
    there = server(store=elsewhere.path, metrics=True)
    client = there.start_client(
        "h = connect(); print(len(h.pread(4096, 0)), flush=True); input()", "base"
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "4096\n"
    assert there.metrics()["dedup_background_bytes_total"] == 0
    info = json.loads(elsewhere.do("info", "base", "--json"))
    assert (info["prefetch"], info["paused"]) == ("all", True)
    assert info["done"] < 1
    elsewhere.do("prefetch", "base", "--resume")
    wait_until(lambda: missing(elsewhere, "base") == 0)
    assert "all, 100% done" in elsewhere.do("info", "base")
    assert there.metrics()["dedup_background_bytes_total"] > 0
    client.communicate("\n")
    assert there.read("base") == images.base.read_bytes()


def test_a_trace_goes_with_the_image_and_is_replayed_by_the_server(
    server: Servers, store_dir: StoreDirectory, elsewhere: StoreDirectory, tmp_path: Path
) -> None:
    here = server(metrics=True)
    trace = tmp_path / "trace"
    record(store_dir, here, "derived", trace)
    elsewhere.do("pull", "r", "derived", "--lazy", "--prefetch", "trace", "--trace", trace)
    trace.unlink()
    there = server(store=elsewhere.path, metrics=True)
    client = there.start_client("h = connect(); input()", "derived")
    wait_until(lambda: json.loads(elsewhere.do("info", "derived", "--json"))["done"] == 1)
    assert missing(elsewhere, "derived") > 0
    client.communicate("\n")


def test_a_lazy_pull_with_metadata_leaves_contents_where_they_are(
    elsewhere: StoreDirectory,
) -> None:
    pulled = json.loads(elsewhere.do("pull", "r", "base", "--lazy", "--metadata", "--json"))
    (image,) = pulled["images"]
    assert image["fetched_bytes"] > 0
    assert 0 < image["missing_bytes"] == missing(elsewhere, "base")
