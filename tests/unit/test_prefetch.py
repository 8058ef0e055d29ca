"""Prefetching: what is elsewhere comes in the wanted order, and in the background without being in
anybody's way. Against a real remote, a directory."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dedupstore import format as fmt, wishes
from dedupstore.check import check_store
from dedupstore.cli.main import _run
from dedupstore.erofs import read_tree
from dedupstore.errors import ImageNotFoundError, StoreFullError, UsageError
from dedupstore.places import Place
from dedupstore.remote import background, fetching, keeping
from dedupstore.remote.fetching import Fetcher
from dedupstore.remote.grouping import IDLE, REPLAY, Pace, Wanted, groups
from dedupstore.store import Store
from dedupstore.traces import Trace, make_trace
from nbdplugin.session import Config, Session
from tests.conftest import flip_record, in_threads, noise, opened, read_image, read_range, silent
from tests.interop.rig import wait_until

# Some 30 frames, in two packs.
IMAGE = noise(1, 6 << 20) + bytes(1 << 16) + noise(2, 3 << 20)
NEXT = noise(3, 49 * 4096) + IMAGE[: 4 << 20] + noise(4, 100_000)


@dataclass(slots=True)
class Rig:
    """A store whose images are elsewhere, and what was asked of the remote: frames by request."""

    path: Path
    remote: Path
    requests: list[list[int]] = field(default_factory=list)
    gate: Callable[[list[int]], None] | None = None

    def cli(self, *arguments: str) -> int:
        return _run(["--store", str(self.path), *arguments])

    def pull(self, name: str, prefetch: int | None = None, trace: Trace | None = None) -> None:
        with Store(self.path) as store:
            store.pull("r", name, name, silent, lazy=True, prefetch=prefetch, trace=trace)

    def missing(self, name: str) -> int:
        with Store(self.path) as store:
            return store.missing_bytes(name)


def run(store: Path, *arguments: str) -> None:
    assert _run(["--store", str(store), *arguments]) == 0


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a remote that has images `a` and `b`; never changed."""
    directory = tmp_path_factory.mktemp("pushed")
    run(directory / "source", "init")
    run(directory / "source", "remote", "add", "r", str(directory / "remote"))
    for name, data in (("a", IMAGE), ("b", NEXT)):
        (directory / name).write_bytes(data)
        run(directory / "source", "import", str(directory / name), name)
        run(directory / "source", "push", "r", name)
    return directory


@pytest.fixture
def rig(
    pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Rig]:
    found = Rig(tmp_path / "store", tmp_path / "remote")
    shutil.copytree(pushed / "remote", found.remote)
    run(found.path, "init")
    run(found.path, "remote", "add", "r", str(found.remote))
    request = Fetcher._request

    def noted(self: Fetcher, place: Place, group: list[Wanted]) -> Any:
        frames = [wanted.frame for wanted in group]
        found.requests.append(frames)
        if found.gate is not None:
            found.gate(frames)
        return request(self, place, group)

    monkeypatch.setattr(Fetcher, "_request", noted)
    yield found
    assert check_store(found.path).findings == ()
    capfd.readouterr()


def chunks(store: Store, name: str) -> list[tuple[int, bytes, int, int]]:
    """(offset, digest, length, frame) of each chunk of an image."""
    manifest = store.open_manifest(name)
    found = []
    with store.env.read() as txn:
        for start, length, ref in manifest.runs(0, manifest.size):
            frame, slot = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
            record = txn.get(fmt.frame_key(frame), db=store.env.frames) if ref else None
            at = start
            while record is not None and at < start + length:
                one = fmt.decode_frame_header(record, frame).slots[slot]
                found.append((at, one.digest, one.length, frame))
                at, slot = at + one.length, slot + 1
    store.close_manifest(manifest)
    return found


def trace_of(store: Store, name: str, order: list[int]) -> tuple[Trace, list[int]]:
    """A trace of chunks by their number, and their frames, each once, in the same order."""
    found = chunks(store, name)
    picked = [found[at] for at in order]
    trace = make_trace(bytes(32), [(digest, length) for _, digest, length, _ in picked])
    return trace, list(dict.fromkeys(frame for *_, frame in picked))


def flat(requests: list[list[int]]) -> list[int]:
    return [frame for group in requests for frame in group]


# --- in the foreground ---


def test_prefetch_brings_all_that_is_elsewhere_and_then_nothing(rig: Rig) -> None:
    rig.pull("a")
    with Store(rig.path) as store:
        done = store.prefetch("a", None, silent)
        assert done.missing_bytes == done.wanted_bytes == len(IMAGE) - (1 << 16)
        assert done.left_bytes == 0
        assert done.fetched_bytes > 0
        asked = len(rig.requests)
        again = store.prefetch("a", None, silent)
        assert (again.missing_bytes, again.fetched_bytes, len(rig.requests)) == (0, 0, asked)
    with Store(rig.path) as store:
        shutil.rmtree(rig.remote)
        assert read_image(store, "a") == IMAGE


def test_prefetch_by_a_trace_brings_its_chunks_and_no_others(rig: Rig) -> None:
    rig.pull("a")
    with Store(rig.path) as store:
        last = len(chunks(store, "a")) - 1
        trace, frames = trace_of(store, "a", [last, 0, last // 2, last - 1])
        seen: list[tuple[int, int]] = []
        done = store.prefetch("a", trace, lambda step, total: seen.append((step, total)))
        assert sorted(flat(rig.requests)) == sorted(frames)
        assert done.wanted_bytes == trace.bytes
        assert done.left_bytes == 0
        assert sum(step for step, _ in seen) == seen[0][1]
        before = len(rig.requests)
        for offset, digest, _, _ in chunks(store, "a"):
            if digest in trace.digests:
                read_range_of(store, "a", offset)
        assert len(rig.requests) == before


def read_range_of(store: Store, name: str, offset: int) -> None:
    with opened(store, name) as reader:
        assert read_range(reader, offset, 1) == IMAGE[offset : offset + 1]


def test_a_trace_of_one_version_is_replayed_on_the_next(rig: Rig) -> None:
    rig.pull("a")
    with Store(rig.path) as store:
        count = len(chunks(store, "a"))
        trace, _ = trace_of(store, "a", list(range(count - 1, -1, -1)))
    rig.pull("b")
    with Store(rig.path) as store:
        shared = {digest for _, digest, _, _ in chunks(store, "b")} & set(trace.digests)
        done = store.prefetch("b", trace, silent)
        assert done.wanted_bytes == sum(
            length
            for digest, length in zip(trace.digests, trace.lengths, strict=True)
            if digest in shared
        )
        assert done.left_bytes == 0
        assert 0 < store.missing_bytes("b") < 1 << 20  # what only the next version has


def test_an_interrupted_prefetch_leaves_what_came(rig: Rig) -> None:
    rig.pull("a")
    with Store(rig.path) as store:
        before = store.missing_bytes("a")

        def interrupt(_step: int, _total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.prefetch("a", None, interrupt)
    assert 0 <= rig.missing("a") < before


def test_what_lies_together_comes_together_and_the_first_of_it_decides_when() -> None:
    def wanted(frame: int, offset: int, pack: bytes = b"a") -> Wanted:
        return Wanted(frame, (), (Place(0, pack, offset, 10),))

    near = [wanted(1, 100), wanted(2, 50), wanted(3, 110), wanted(4, 0, b"b"), wanted(5, 60)]
    pace = Pace(25, 5, 1)
    assert [[w.frame for w in group] for group in groups(near, pace)] == [[1, 3], [2, 5], [4]]
    long = [wanted(n, 10 * n) for n in range(6)]
    assert [len(group) for group in groups(long, pace)] == [2, 2, 1, 1]
    alone = [[w.frame for w in group] for group in groups(near, Pace(25, 1, 1))]
    assert alone == [[1], [2], [3], [4], [5]]


# --- in the background ---


@pytest.fixture
def serve(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Session]]:
    """Starts a server without nbdkit; it looks for changed wishes as often as it can."""
    monkeypatch.setattr(background, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(background, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(fetching, "_FAILING_SECONDS", 0.0)
    sessions: list[Session] = []

    def start() -> Session:
        sessions.append(Session(Config(rig.path)))
        return sessions[-1]

    yield start
    rig.gate = None
    for session in sessions:
        session.close()


def looked(session: Session, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Return once the background thread has looked at wishes that often."""
    assert session.background is not None
    look, seen = background.Background._wish, threading.Semaphore(0)

    def noted(self: background.Background, image: Any) -> Any:
        found = look(self, image)
        seen.release()
        return found

    monkeypatch.setattr(background.Background, "_wish", noted)
    for _ in range(times):
        assert seen.acquire(timeout=60)
    monkeypatch.setattr(background.Background, "_wish", look)


def test_all_of_an_open_image_comes_without_anybody_reading(
    rig: Rig, serve: Callable[[], Session]
) -> None:
    rig.pull("a", fmt.PREFETCH_ALL)
    session = serve()
    assert not rig.requests
    reader = session.open("a")
    wait_until(lambda: session.store.missing_bytes("a") == 0)
    assert session.background is not None
    wait_until(lambda: session.background.bytes == len(IMAGE) - (1 << 16))  # type: ignore[union-attr]
    lazy = session.store.laziness("a")
    assert lazy is not None
    assert (lazy.done, lazy.prefetch, lazy.missing_bytes) == (1.0, "all", 0)
    session.close_export(reader)


def test_an_open_images_trace_comes_and_nothing_else_does(
    rig: Rig, serve: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.pull("a")
    with Store(rig.path) as store:
        count = len(chunks(store, "a"))
        trace, frames = trace_of(store, "a", [count - 1, 5, count // 2, 0])
        store.pull("r", "a", "a", silent, lazy=True, prefetch=fmt.PREFETCH_TRACE, trace=trace)
    monkeypatch.setattr(background, "REPLAY", replace(REPLAY, requests=1))
    session = serve()
    reader = session.open("a")
    looked(session, monkeypatch, 3)
    wait_until(lambda: session.store.laziness("a").wanted_missing_bytes == 0)  # type: ignore[union-attr]
    assert flat(rig.requests) == frames  # one at a time, to tell the order
    assert session.store.missing_bytes("a") > 0
    session.close_export(reader)


def test_a_server_of_images_without_a_wish_has_no_such_thread(
    rig: Rig, serve: Callable[[], Session]
) -> None:
    with Store(rig.path) as store:
        store.pull("r", "a", "a", silent, lazy=True)
    session = serve()
    reader = session.open("a")
    assert session.background is None
    session.close_export(reader)


def test_a_pause_holds_until_it_is_ended_and_outlives_the_server(
    rig: Rig, serve: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.pull("a", fmt.PREFETCH_ALL)
    assert rig.cli("prefetch", "a", "--pause") == 0
    session = serve()
    reader = session.open("a")
    looked(session, monkeypatch, 3)
    assert not rig.requests
    assert session.store.laziness("a").paused  # type: ignore[union-attr]
    assert session.store.pause("a", paused=False)
    wait_until(lambda: session.store.missing_bytes("a") == 0)
    session.close_export(reader)


def test_a_pause_stops_what_is_under_way(
    rig: Rig, serve: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.pull("a", fmt.PREFETCH_ALL)
    session = serve()

    def pause_once(_frames: list[int]) -> None:
        monkeypatch.setattr(background, "_LOOK_SECONDS", 0.0)
        rig.gate = None
        session.store.pause("a", paused=True)

    rig.gate = pause_once
    reader = session.open("a")
    wait_until(lambda: bool(rig.requests))
    looked(session, monkeypatch, 3)
    assert len(rig.requests) == 1
    session.close_export(reader)


def test_it_ends_when_the_image_is_closed(rig: Rig, serve: Callable[[], Session]) -> None:
    rig.pull("a", fmt.PREFETCH_ALL)
    session = serve()
    begun, go_on = threading.Event(), threading.Event()

    def hold(_frames: list[int]) -> None:
        begun.set()
        assert go_on.wait(60)

    rig.gate = hold
    readers = [session.open("a"), session.open("a")]
    assert begun.wait(60)
    for reader in readers:
        session.close_export(reader)
    go_on.set()
    assert session.background is not None
    session.background.close()
    assert len(rig.requests) == 1


def test_it_begins_nothing_while_a_reader_waits(rig: Rig, serve: Callable[[], Session]) -> None:
    rig.pull("a", fmt.PREFETCH_ALL)
    session = serve()
    background_begun, reader_waits, answer = (threading.Event() for _ in range(3))
    names: list[str] = []

    def hold(_frames: list[int]) -> None:
        own = threading.current_thread().name
        names.append(own)
        if own == "background":
            background_begun.set()
            assert reader_waits.wait(60)  # the reader comes while this one is under way
        else:
            reader_waits.set()
            assert answer.wait(60)

    rig.gate = hold
    reader = session.open("a")
    assert background_begun.wait(60)
    with session.store.env.read():
        where = chunks(session.store, "a")[-1][0]
    reading = threading.Thread(target=read_range, args=(reader, where, 1), name="reader")
    reading.start()
    try:
        assert reader_waits.wait(60)
        fetcher = session.store.fetching
        assert fetcher is not None
        wait_until(lambda: fetcher.counters.requests >= 1)  # the background's first has come
        # It sees a reader wait now: what it would begin next is not begun.
        for _ in range(50):
            threading.Event().wait(0.002)
            assert names.count("background") == 1, names
    finally:
        for event in (reader_waits, answer):
            event.set()
    reading.join(60)
    wait_until(lambda: session.store.missing_bytes("a") == 0)
    assert names.count("background") > 1
    session.close_export(reader)


def test_readers_beside_it_get_the_right_bytes_and_no_frame_comes_twice(
    rig: Rig, serve: Callable[[], Session]
) -> None:
    rig.pull("a", fmt.PREFETCH_ALL)
    session = serve()

    def read(number: int) -> None:
        reader = session.open("a")
        for step in range(60):
            offset = (number * 997 + step * 7919) * 1237 % (len(IMAGE) - 5000)
            assert read_range(reader, offset, 5000) == IMAGE[offset : offset + 5000]
        session.close_export(reader)

    in_threads(4, read)
    kept = session.open("a")
    wait_until(lambda: session.store.missing_bytes("a") == 0)
    session.close_export(kept)
    assert len(flat(rig.requests)) == len(set(flat(rig.requests)))


def test_a_remote_that_comes_back_is_gone_on_with(rig: Rig, serve: Callable[[], Session]) -> None:
    rig.pull("a", fmt.PREFETCH_ALL)
    away = rig.remote.with_name("away")
    rig.remote.rename(away)
    session = serve()
    reader = session.open("a")
    session_errors = session.store.fetcher().counters
    wait_until(lambda: session_errors.errors >= 1)
    away.rename(rig.remote)
    wait_until(lambda: session.store.missing_bytes("a") == 0)
    session.close_export(reader)


def test_what_cannot_be_stored_is_not_fetched_on_and_on(
    rig: Rig, serve: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreFullError("no space left")

    monkeypatch.setattr(keeping.Keeper, "_commit", full)
    monkeypatch.setattr(background, "_SLICE_FRAMES", 4)
    monkeypatch.setattr(background, "_RETRY_SECONDS", 3600.0)
    rig.pull("a", fmt.PREFETCH_ALL)
    session = serve()
    reader = session.open("a")
    wait_until(lambda: len(flat(rig.requests)) >= 4)
    session.close_export(reader)
    session.background.close()  # type: ignore[union-attr]
    assert len(flat(rig.requests)) == 4


# --- on record ---


def test_a_wish_and_its_trace_go_with_their_image(rig: Rig) -> None:
    rig.pull("a")
    with Store(rig.path) as store:
        digest = bytes.fromhex(store.image("a").digest)
        trace, _ = trace_of(store, "a", [3, 1])
        store.pull("r", "a", "a", silent, lazy=True, prefetch=fmt.PREFETCH_TRACE, trace=trace)
        kept = wishes.trace_path(store.env, digest)
        assert wishes.find_trace(store.env, digest) == trace
        assert kept.stat().st_mode & 0o777 == 0o600
        assert kept.parent.stat().st_mode & 0o777 == 0o700
        store.clone("a", "c")
        store.remove(["a"])
        store.collect_garbage()
        assert store.has_wish(digest)
        store.remove(["c"])
        store.collect_garbage()
        assert not store.has_wish(digest)
        assert not kept.exists()


def test_pulling_again_keeps_the_wish_unless_another_is_given(rig: Rig) -> None:
    rig.pull("a", fmt.PREFETCH_ALL)
    rig.pull("a")
    with Store(rig.path) as store:
        assert store.laziness("a").prefetch == "all"  # type: ignore[union-attr]
    rig.pull("a", fmt.PREFETCH_NONE)
    with Store(rig.path) as store:
        assert store.laziness("a").prefetch == "none"  # type: ignore[union-attr]
        assert not store.pause("a", paused=True)
        with pytest.raises(ImageNotFoundError):
            store.pause("x", paused=True)


@pytest.mark.damaged
def test_check_finds_a_damaged_wish_and_repair_mends_it(rig: Rig) -> None:
    rig.pull("a", fmt.PREFETCH_ALL)
    with Store(rig.path) as store:
        digest = bytes.fromhex(store.image("a").digest)
        flip_record(store, "meta", fmt.wish_key(digest), 66)
        assert not store.has_wish(digest)
    assert [finding.what for finding in check_store(rig.path).findings] == ["lazy"]
    assert rig.cli("check", "--repair") == 0
    with Store(rig.path) as store:
        assert store.laziness("a").prefetch == "all"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "arguments",
    [
        ("pull", "r", "a", "--prefetch", "all"),
        ("pull", "r", "a", "--lazy", "--prefetch", "trace"),
        ("pull", "r", "a", "--trace", "file"),
        ("pull", "r", "a", "--lazy", "--prefetch", "all", "--trace", "file"),
        ("prefetch", "a", "--pause", "--resume"),
        ("prefetch", "a", "--pause", "--trace", "file"),
    ],
)
def test_options_that_do_not_go_together_are_refused(rig: Rig, arguments: tuple[str, ...]) -> None:
    assert rig.cli(*arguments) == UsageError.exit_status


def test_idle_fetching_is_one_request_at_a_time() -> None:
    assert (IDLE.requests, IDLE.urgent) == (1, False)


# --- metadata ---


@pytest.fixture
def tree(pushed: Path, rig: Rig, tmp_path: Path) -> Rig:
    """The store of `rig`, with image `tree` pulled lazily: an EROFS of 60 directories."""
    root = tmp_path / "root"
    for number in range(60):
        directory = root / f"{number % 7}" / f"{number}"
        directory.mkdir(parents=True)
        (directory / "file").write_bytes(noise(number, 100_000))
        (directory / "link").symlink_to("x" * 100)
    source = tmp_path / "source"
    run(source, "init")
    run(source, "remote", "add", "r", str(rig.remote))
    run(source, "import", str(root), "tree")
    run(source, "push", "r", "tree")
    return rig


def test_metadata_is_fetched_in_few_requests_and_then_suffices(tree: Rig) -> None:
    with Store(tree.path) as store:
        store.pull("r", "tree", "tree", silent, lazy=True)
        assert store.fetch_metadata("tree")
        asked = len(tree.requests)
        assert 0 < asked <= 10
        assert store.missing_bytes("tree") > 5_000_000  # of six megabytes of contents

        with opened(store, "tree") as reader:
            size = reader.manifest.size

            def read_at(offset: int, length: int) -> bytes:
                return read_range(reader, offset, max(0, min(length, size - offset)))

            root = read_tree(read_at, size, None, lambda _ranges: None)
        assert len(root.entries) == 7
        assert len(tree.requests) == asked


def test_an_image_that_is_no_erofs_has_no_metadata_to_fetch(rig: Rig) -> None:
    rig.pull("a")
    with Store(rig.path) as store:
        assert not store.fetch_metadata("a")
        assert len(rig.requests) <= 1
