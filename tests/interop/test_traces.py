"""`trace record` and `trace show` against the real nbdkit, and files where FUSE is."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedupstore.traces import Trace, read_trace
from tests.interop.rig import (
    DEDUPSTORE,
    PATIENCE_SECONDS,
    Server,
    Servers,
    StoreDirectory,
    client_command,
    mounts_below,
    refusal,
    scrape,
    wait_until,
)
from tests.programs import require_root

READ = "h = connect(); h.pread(4096, int(arguments[0]))"
READ_ALL = "h = connect(); read_all(h)"


@pytest.fixture
def files() -> Iterator[Path]:
    require_root()
    with tempfile.TemporaryDirectory(prefix="ds-", dir="/tmp") as directory:
        yield Path(directory)
        assert mounts_below(Path(directory)) == []


def record(store: StoreDirectory, server: Server, name: str, file: Path, *more: str) -> str:
    return store.do("trace", "record", name, file, "--metrics", server.directory / "metrics", *more)


def recorded(
    store: StoreDirectory, server: Server, name: str, file: Path, *command: str | Path
) -> Trace:
    """The trace of what a command reads."""
    record(store, server, name, file, "--", *map(str, command))
    return read_trace(file)


@contextmanager
def recorder(
    store: StoreDirectory, server: Server, name: str, file: Path
) -> Iterator[subprocess.Popen[str]]:
    """A recording that has begun, and is ended by Ctrl-C."""
    metrics = server.directory / "metrics"
    process = subprocess.Popen(
        [DEDUPSTORE, "--store", store.path, "trace", "record", name, file, "--metrics", metrics],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = f"/trace/{store.digest(name)}"
    wait_until(lambda: " 200 " in scrape(metrics, f"HEAD {path} HTTP/1.0\r\n\r\n".encode()))
    try:
        yield process
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.wait()


def test_what_a_command_reads_is_recorded_in_order(
    server: Servers, store_dir: StoreDirectory, tmp_path: Path
) -> None:
    running = server(metrics=True)
    running.client(READ_ALL, "base")  # everything is in the cache
    first, last, whole = (tmp_path / name for name in ("first", "last", "whole"))
    at_start = recorded(
        store_dir, running, "base", first, *client_command(running.uri("base"), READ, "0")
    )
    size = json.loads(store_dir.do("info", "base", "--json"))["size"]
    at_end = recorded(
        store_dir,
        running,
        "clone",
        last,
        *client_command(running.uri("base"), READ, str(size // 2)),
    )
    both = "h = connect(); [h.pread(4096, int(at)) for at in arguments]"
    in_order = recorded(
        store_dir,
        running,
        "base",
        whole,
        *client_command(running.uri("clone"), both, str(size // 2), "0", str(size // 2)),
    )
    assert len(at_start.digests) == 1
    assert in_order.digests == (*at_end.digests, *at_start.digests)
    assert in_order.image == at_end.image == bytes.fromhex(store_dir.digest("base"))


def test_files_and_nbd_connections_are_recorded_alike(
    files: Path, server: Servers, store_dir: StoreDirectory, tmp_path: Path
) -> None:
    running = server(f"files={files}", metrics=True)
    wait_until(lambda: mounts_below(files) != [])
    by_nbd, by_file = tmp_path / "nbd", tmp_path / "file"
    command = client_command(running.uri("base"), READ_ALL)
    over_nbd = recorded(store_dir, running, "base", by_nbd, *command)
    file = files / store_dir.digest("base")
    as_file = recorded(store_dir, running, "base", by_file, "cksum", file)
    assert set(over_nbd.digests) == set(as_file.digests)
    chunks = json.loads(store_dir.do("info", "base", "--json"))
    assert over_nbd.bytes == chunks["unique_bytes"]


def test_recording_lasts_until_ctrl_c_and_leaves_nothing_behind(
    server: Servers, store_dir: StoreDirectory, tmp_path: Path
) -> None:
    running = server(metrics=True)
    file = tmp_path / "trace"
    with recorder(store_dir, running, "base", file):
        running.client(READ, "base", "0")
        assert not file.exists()
    assert len(read_trace(file).digests) == 1
    assert stat.S_IMODE(file.stat().st_mode) & 0o111 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "trace"]
    # The server has forgotten it: the next recording begins empty.
    record(store_dir, running, "base", file, "--seconds", "0")
    assert read_trace(file).digests == ()


def test_a_failed_recording_says_why_in_one_line_and_leaves_the_file_alone(
    server: Servers, store_dir: StoreDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = server("image=derived", metrics=True)
    metrics = running.directory / "metrics"
    file = tmp_path / "trace"
    file.write_text("what was there")
    ask = ("trace", "record", "base", file, "--seconds", "0")
    assert "does not serve image 'base'" in store_dir.refuse(*ask, "--metrics", metrics)
    assert "no server runs there" in store_dir.refuse(*ask, "--metrics", tmp_path / "none")
    monkeypatch.setenv("DEDUPSTORE_RUN", str(running.directory / "run"))
    assert "no server runs there" in store_dir.refuse(*ask)
    assert "no image named 'x'" in store_dir.refuse("trace", "record", "x", file)
    of_derived = ("trace", "record", "derived", file, "--metrics", metrics)
    assert "none-such: No such" in store_dir.refuse(*of_derived, "--", "./none-such")
    with recorder(store_dir, running, "derived", tmp_path / "other"):
        assert "recorded already" in store_dir.refuse(*of_derived, "--seconds", "0")
    assert file.read_text() == "what was there"
    nowhere = ("trace", "record", "derived", tmp_path / "no" / "file", "--metrics", metrics)
    assert "No such file" in store_dir.refuse(*nowhere, "--seconds", "0")


def test_a_command_that_fails_is_told_and_its_reads_are_kept(
    server: Servers, store_dir: StoreDirectory, tmp_path: Path
) -> None:
    running = server(metrics=True)
    file = tmp_path / "trace"
    command = client_command(running.uri("base"), READ + "; sys.exit(3)", "0")
    result = store_dir.cli(
        "trace", "record", "base", file, "--metrics", running.directory / "metrics", "--", *command
    )
    assert "ended with status 3" in refusal(result.returncode, result.stderr)
    assert len(read_trace(file).digests) == 1


def test_a_killed_server_ends_the_recording_with_one_line(
    server: Servers, store_dir: StoreDirectory, tmp_path: Path
) -> None:
    running = server(metrics=True)
    file = tmp_path / "trace"
    kill = [sys.executable, "-c", f"import os; os.kill({running.process.pid}, 15)"]
    result = store_dir.cli(
        *("trace", "record", "base", file, "--metrics", running.directory / "metrics", "--", *kill)
    )
    refusal(result.returncode, result.stderr)
    assert not file.exists()


def test_a_trace_of_one_version_is_of_use_to_the_next(
    server: Servers, store_dir: StoreDirectory, tmp_path: Path
) -> None:
    running = server(metrics=True)
    file = tmp_path / "trace"
    trace = recorded(
        store_dir, running, "base", file, *client_command(running.uri("base"), READ_ALL)
    )
    shown = json.loads(store_dir.do("trace", "show", file, "--image", "derived", "--json"))
    diff = json.loads(store_dir.do("diff", "base", "derived", "--json"))
    assert shown["chunks"] == len(trace.digests)
    assert shown["bytes_in_image"] == diff["shared_bytes"] > shown["bytes"] // 2
    assert shown["missing_bytes"] == 0
    own = json.loads(store_dir.do("trace", "show", file, "--image", "base", "--json"))
    assert own["bytes_in_image"] == own["bytes"] == trace.bytes
    assert "chunks" in store_dir.do("trace", "show", file)
    file.write_bytes(file.read_bytes()[:-3])
    assert "cut off" in store_dir.refuse("trace", "show", file)


def test_the_socket_that_controls_is_its_owners_alone(
    server: Servers, store_dir: StoreDirectory
) -> None:
    running = server(metrics=True)
    metrics = running.directory / "metrics"
    assert stat.S_IMODE(metrics.stat().st_mode) == 0o600
    for request in ("PUT /metrics", "DELETE /trace/x", "HEAD /", f"DELETE /trace/{'0' * 64}"):
        assert " 404 " in scrape(metrics, f"{request} HTTP/1.0\r\n\r\n".encode()).splitlines()[0]
    assert running.metrics()["dedup_exports_open"] == 0
