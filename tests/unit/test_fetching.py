"""Frames that come from a remote when they are read: each once, verified, kept."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.check import check_store
from dedupstore.errors import DedupError, ImageExistsError, RemoteError, StoreFullError
from dedupstore.places import find_places
from dedupstore.remote import fetching, keeping, objects
from dedupstore.remote.configuration import add_remote
from dedupstore.store import Store
from tests.conftest import (
    import_bytes,
    in_threads,
    keys_of,
    noise,
    opened,
    read_image,
    read_range,
    silent,
)
from tests.lazy import IMAGES, asked, distant_frames, make_remote, pack_files, pull
from tests.remotes import split_root, write_root

BIG = noise(21, 12 << 20)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A remote that no test changes."""
    return make_remote(tmp_path_factory.mktemp("far"), {**IMAGES, "big": BIG})


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a remote that is broken on purpose."""
    monkeypatch.setattr(objects, "TRIES_MAX", 2)
    monkeypatch.setattr(objects, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(objects, "BACKOFF_SECONDS_MAX", 0.001)
    monkeypatch.setattr(fetching, "_FAILING_SECONDS", 0.05)
    monkeypatch.setattr(keeping, "_PAUSE_SECONDS", 0.05)


@pytest.fixture
def lazy(store: Store, kept: Path) -> Store:
    add_remote(store.env, "far", [str(kept)])
    for name in (*IMAGES, "big"):
        pull(store, name)
    return store


def flush(store: Store) -> None:
    store.fetcher().keeper.flush()


# --- once ---


def test_many_threads_that_read_an_image_fetch_each_frame_once(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = len(distant_frames(lazy))
    with asked(monkeypatch) as remote, opened(lazy, "big") as one, opened(lazy, "big") as two:

        def work(i: int) -> None:
            rng = random.Random(i)
            for at in rng.sample(range(0, len(BIG), 1 << 19), len(BIG) >> 19):
                assert read_range((one, two)[i % 2], at, 1 << 19) == BIG[at : at + (1 << 19)]

        in_threads(16, work)
    flush(lazy)
    ranges = sorted(remote.packs())
    for (path, at, length), (other, begin, _) in pairwise(ranges):
        assert path != other or at + length <= begin, "a byte was fetched twice"
    assert lazy.fetcher().counters.frames == frames - len(distant_frames(lazy))
    assert lazy.fetcher().kept == (lazy.fetcher().counters.frames, 0)


READ = """
import json, random, sys, time
from pathlib import Path
from dedupstore.remote import directory
from dedupstore.store import Store
sys.path.insert(0, sys.argv[3])
from tests.conftest import opened, read_range
slow = float(sys.argv[4])
read = directory.Directory.read
def late(self, path, offset, length):
    time.sleep(slow)
    return read(self, path, offset, length)
directory.Directory.read = late
with Store(Path(sys.argv[1])) as store:
    with opened(store, "big") as reader:
        size, rng = reader.manifest.size, random.Random(int(sys.argv[2]))
        print("ready", flush=True)
        sys.stdin.readline()
        for at in rng.sample(range(0, size, 1 << 19), size >> 19):
            read_range(reader, at, 1 << 19)
            print(at, flush=True)
    store.fetcher().keeper.flush()
    counters = store.fetcher().counters
    print(json.dumps([counters.frames, *store.fetcher().kept]))
"""


def reading(store: Path, seed: int, slow: float = 0.01) -> subprocess.Popen[str]:
    """A process that reads an image in some order, once it gets a line."""
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", READ, str(store), str(seed), root, str(slow)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_many_processes_on_a_store_fetch_each_frame_once(lazy: Store) -> None:
    before = len(distant_frames(lazy))
    lazy.close()
    processes = [reading(lazy.path, seed) for seed in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = [json.loads(p.communicate(timeout=60)[0].splitlines()[-1]) for p in processes]
    assert all(process.returncode == 0 for process in processes)
    with Store(lazy.path) as again:
        came = before - len(distant_frames(again))
        assert read_image(again, "big") == BIG
    assert sum(frames for frames, _, _ in results) == came
    assert sum(stored for _, stored, _ in results) == came
    assert sum(frames > 0 for frames, _, _ in results) > 1  # they shared the work
    assert check_store(lazy.path).findings == ()


def test_killed_process_loses_nothing_and_the_next_goes_on(lazy: Store) -> None:
    before = len(distant_frames(lazy))
    lazy.close()
    rng = random.Random(3)
    for seed in range(3):
        process = reading(lazy.path, seed, 0.02)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        for _ in range(rng.randrange(2, 6)):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert check_store(lazy.path).findings == ()
    with Store(lazy.path) as again:
        left = len(distant_frames(again))
        assert left < before
        assert read_image(again, "big") == BIG
        flush(again)
        # What was stored before the kills is not fetched again.
        assert again.fetcher().counters.frames <= left


# --- what one request brings ---


def test_sequential_reads_come_in_few_requests(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with asked(monkeypatch) as remote, opened(lazy, "big", readahead=True) as reader:
        for at in range(0, len(BIG), 128 << 10):
            assert read_range(reader, at, 128 << 10) == BIG[at : at + (128 << 10)]
    assert len(remote.packs()) < 26  # of more than 50 frames
    assert remote.bytes() <= 1.02 * len(BIG)


def test_random_reads_bring_little_more_than_what_was_read(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(9)
    frames = set()
    with asked(monkeypatch) as remote, opened(lazy, "big", readahead=True) as reader:
        for at in rng.sample(range(0, len(BIG), 64 << 10), 20):
            read_range(reader, at, 16 << 10)
            refs = reader.manifest.refs
            runs = range(len(refs))
            starts = reader.manifest.starts
            frames |= {
                refs[run] >> fmt.REF_SLOT_BITS
                for run in runs
                if starts[run] < at + (16 << 10) and starts[run + 1] > at
            }
    databases = lazy.env.open_remote()
    with lazy.env.read() as txn:
        needed = sum(find_places(txn, databases, frame).places[0].length for frame in frames)
    assert remote.bytes() <= 1.25 * needed


def test_clone_and_second_image_bring_nothing_that_is_here(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_image(lazy, "base") == IMAGES["base"]
    lazy.clone("base", "again")
    with asked(monkeypatch) as remote:
        assert read_image(lazy, "again") == IMAGES["base"]
        assert not remote.packs()
        assert read_image(lazy, "derived") == IMAGES["derived"]
    # Some of it may have come with the end of the first: reading goes on ahead of the reader.
    assert 0 < remote.bytes() < 1.05 * 320_000


def test_fetched_frames_are_stored_in_few_commits(lazy: Store) -> None:
    with lazy.env.read() as txn:
        before = txn.id()
    with opened(lazy, "big") as reader:
        read_range(reader, 0, len(BIG))
    flush(lazy)
    with lazy.env.read() as txn:
        assert txn.id() - before <= lazy.fetcher().counters.requests
        assert txn.id() - before < lazy.fetcher().counters.frames / 2


def test_close_stores_what_has_come(lazy: Store) -> None:
    with opened(lazy, "base") as reader:
        read_range(reader, 0, 400_000)
    came = lazy.fetcher().counters.frames
    before = len(distant_frames(lazy))
    lazy.close()
    assert came > 0
    with Store(lazy.path) as again:
        assert len(distant_frames(again)) <= before
        assert again.stats().distant_frames == len(distant_frames(again))
        again_came = again.stats().frames - len(distant_frames(again))
        assert again_came == came


# --- what goes wrong ---


def test_full_disk_serves_and_does_not_store_and_recovers(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = keeping.Keeper._commit

    def full(_self: object, _frames: object) -> None:
        raise StoreFullError("no space left")

    monkeypatch.setattr(keeping.Keeper, "_commit", full)
    frames = len(distant_frames(lazy))
    assert read_image(lazy, "base") == IMAGES["base"]
    flush(lazy)
    assert len(distant_frames(lazy)) == frames
    stored, unstored = lazy.fetcher().kept
    assert stored == 0
    assert unstored > 0
    monkeypatch.setattr(keeping.Keeper, "_commit", commit)
    time.sleep(0.06)
    assert read_image(lazy, "base") == IMAGES["base"]
    flush(lazy)
    assert lazy.fetcher().kept[0] > 0
    assert len(distant_frames(lazy)) < frames


def test_pull_that_finds_no_room_fails_and_gives_no_name(
    store: Store, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: object, _frames: object) -> None:
        raise StoreFullError("no space left")

    add_remote(store.env, "far", [str(kept)])
    with monkeypatch.context() as patch:
        patch.setattr(keeping.Keeper, "_commit", full)
        with pytest.raises(StoreFullError):
            pull(store, "big", lazy=False)
    assert store.names() == []
    time.sleep(0.06)
    pull(store, "big", lazy=False)
    assert not set(distant_frames(store))


def fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ETIMEDOUT, errno.ENOENT])
def test_failing_remote_is_an_input_output_error_and_then_recovers(
    lazy: Store, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with opened(lazy, "base") as reader:
        with asked(monkeypatch) as remote:
            remote.before.append(lambda: fail(code))
            with pytest.raises(RemoteError) as caught:
                read_range(reader, 0, 4096)
            assert caught.value.errno == errno.EIO
            assert "\n" not in str(caught.value)
            assert lazy.fetcher().counters.errors == 1
        time.sleep(0.06)
        assert read_range(reader, 0, 8192) == IMAGES["base"][:8192]


def test_failed_reads_leave_no_place_taken_in_the_reader_table(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDB has 1,024: tracebacks must not keep the transactions of who was refused."""
    monkeypatch.setattr(fetching, "_FAILING_SECONDS", 60)
    gc.collect()
    gc.disable()
    try:
        with opened(lazy, "base") as reader, asked(monkeypatch) as remote:
            remote.before.append(lambda: fail(errno.EIO))
            for _ in range(100):
                with pytest.raises(RemoteError):
                    read_range(reader, 0, 4096)
        readers = lazy.env.raw.readers().splitlines()[1:]
    finally:
        gc.enable()
    assert len(readers) < 50


def test_local_frames_are_served_while_the_remote_is_away(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(lazy, "big") as reader:
        read_range(reader, 0, 100_000)
    flush(lazy)
    with asked(monkeypatch) as remote, opened(lazy, "big") as reader:
        remote.before.append(lambda: fail(errno.EIO))
        assert read_range(reader, 0, 100_000) == BIG[:100_000]


def test_all_who_wait_for_a_frame_get_the_error_each_his_own(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[BaseException] = []
    with asked(monkeypatch) as remote:
        remote.before.append(lambda: time.sleep(0.05))
        remote.before.append(lambda: fail(errno.EIO))
        frame = distant_frames(lazy)[0]

        def work(_i: int) -> None:
            try:
                lazy.fetcher().fetch(frame)
            except RemoteError as error:
                errors.append(error)

        in_threads(8, work)
    assert len({id(error) for error in errors}) == 8


def test_nobody_waits_longer_than_the_bound_and_what_comes_later_is_kept(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_READ_SECONDS", 0.2)
    answer = threading.Event()
    frame, *_ = distant_frames(lazy)
    with asked(monkeypatch) as remote:
        remote.before.append(lambda: answer.wait(60))

        def work(_i: int) -> None:
            with pytest.raises(RemoteError, match=r"no answer from the remote for 0\.2 seconds"):
                lazy.fetcher().fetch(frame)

        in_threads(3, work)
        # Whoever comes now waits for the same request, not for another one.
        work(0)
        answer.set()
        wait_for(lambda: frame not in distant_frames(lazy))
        assert len(remote.packs()) == 1
        assert lazy.fetcher().fetch(frame) is not None
        assert len(remote.packs()) == 1


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def own(tmp_path: Path, store: Store) -> tuple[Store, Path]:
    """A lazy store and a remote to damage."""
    url = make_remote(tmp_path)
    add_remote(store.env, "far", [str(url)])
    for name in IMAGES:
        pull(store, name)
    return store, url


def lie(url: Path, begin: int, step: int) -> None:
    for pack in pack_files(url):
        data = bytearray(pack.read_bytes())
        for at in range(begin, len(data), step):
            data[at] ^= 1
        pack.write_bytes(data)


def test_lying_remote_serves_and_stores_no_wrong_byte(own: tuple[Store, Path]) -> None:
    store, url = own
    whole = {pack: pack.read_bytes() for pack in pack_files(url)}
    lie(url, 700, 900_000)
    data = IMAGES["derived"]
    wrong: list[int] = []
    with opened(store, "derived") as reader:
        for at in range(0, len(data), 4096):
            try:
                wanted = data[at : at + 4096]
                assert read_range(reader, at, len(wanted)) == wanted
            except DedupError as error:
                wrong.append(error.errno)
    assert set(wrong) == {errno.EIO}
    assert 0 < len(wrong) < len(data) // 4096
    flush(store)
    assert distant_frames(store)
    for pack, contents in whole.items():
        pack.write_bytes(contents)
    assert read_image(store, "derived") == data


def test_truncated_pack_is_an_error_of_what_it_lacks(own: tuple[Store, Path]) -> None:
    store, url = own
    pack = max(pack_files(url), key=lambda path: path.stat().st_size)
    os.truncate(pack, pack.stat().st_size // 2)
    with opened(store, "base") as reader:
        assert read_range(reader, 0, 4096) == IMAGES["base"][:4096]
        with pytest.raises(DedupError):
            read_range(reader, 0, len(IMAGES["base"]))


def test_damage_of_a_neighbour_does_not_fail_who_reads_beside_it(own: tuple[Store, Path]) -> None:
    store, url = own
    remote = store.env.open_remote()
    first, second = distant_frames(store)[-2:]  # small ones: they come in one request
    with store.env.read() as txn:
        place = find_places(txn, remote, second)
    assert place is not None
    for pack in pack_files(url):
        if pack.name == place.places[0].pack.hex():
            data = bytearray(pack.read_bytes())
            data[place.places[0].offset + place.places[0].length - 3] ^= 1
            pack.write_bytes(data)
    store.fetcher().fetch(first)
    with pytest.raises(RemoteError):
        store.fetcher().fetch(second)


def test_mirror_takes_over_what_the_first_has_lost_or_damaged(
    own: tuple[Store, Path], tmp_path: Path
) -> None:
    store, url = own
    mirror = tmp_path / "mirror"
    subprocess.run(["cp", "-a", url, mirror], check=True)
    with store.env.write() as txn:
        key = fmt.remote_key("far")
        record = fmt.decode_remote(txn.get(key, db=store.env.meta), key)
        both = fmt.RemoteRecord(record.number, record.uuid, (str(url), str(mirror)))
        txn.put(key, fmt.encode_remote(both, key), db=store.env.meta)
    store.fetcher()._remotes.clear()  # as in a process that learns of the mirror now
    lie(url, 700, 50_000)
    pack_files(url)[-1].unlink()
    for name, data in IMAGES.items():
        assert read_image(store, name) == data
    flush(store)


# --- an old process ---


def test_process_that_had_the_store_open_before_serves_lazy_images(
    store: Store, kept: Path, tmp_path: Path
) -> None:
    import_bytes(store, tmp_path, "own", noise(3, 50_000))
    with opened(store, "own") as reader:
        assert store.env.remote is None
        url = str(kept)
        script = (
            "import sys; from pathlib import Path; from dedupstore.store import Store\n"
            "from dedupstore.remote.configuration import add_remote\n"
            "with Store(Path(sys.argv[1])) as store:\n"
            "    add_remote(store.env, 'far', [sys.argv[2]])\n"
            "    store.pull('far', 'base', 'base', lambda *_: None, lazy=True)\n"
        )
        subprocess.run([sys.executable, "-c", script, str(store.path), url], check=True)
        assert read_range(reader, 0, 50_000) == noise(3, 50_000)
        assert read_image(store, "base") == IMAGES["base"]
    flush(store)
    store.remove(["base", "own"])
    store.collect_garbage()
    assert store.stats().frames == 0


# --- pull ---


def test_pull_without_lazy_brings_everything_once(
    store: Store, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_remote(store.env, "far", [str(kept)])
    done: list[int] = []
    with asked(monkeypatch) as remote:
        pulled = store.pull("far", "base", "base", lambda n, _all: done.append(n), lazy=False)
    assert pulled.missing_bytes == 0
    assert not distant_frames(store)
    assert sum(done) > 0
    with asked(monkeypatch) as again:
        second = store.pull("far", "derived", "derived", silent, lazy=False)
        assert read_image(store, "derived") == IMAGES["derived"]
        assert read_image(store, "base") == IMAGES["base"]
    assert second.fetched_bytes < 400_000
    assert again.bytes() < 500_000 < remote.bytes()


def test_pull_of_another_manifest_is_refused(own: tuple[Store, Path], tmp_path: Path) -> None:
    _, url = own
    document, _ = split_root(url, "base")
    other, parts = split_root(url, "derived")
    write_root(url, "base", {**other, "name": "base", "digest": document["digest"]}, parts)
    with Store.create(tmp_path / "fresh") as fresh:
        add_remote(fresh.env, "far", [str(url)])
        with pytest.raises(RemoteError, match=r"digest|size"):
            pull(fresh, "base")
        assert fresh.names() == []
        assert keys_of(fresh, "manifests") == []


def test_name_that_is_taken_is_refused_before_anything_moves_and_replaced_on_request(
    lazy: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy.remove(["base"])
    import_bytes(lazy, tmp_path, "base", noise(8, 10_000))
    with asked(monkeypatch) as remote:
        with pytest.raises(ImageExistsError):
            pull(lazy, "base", lazy=False)
        assert not remote.packs()
    pull(lazy, "base", replace=True)
    assert read_image(lazy, "base") == IMAGES["base"]


def test_interrupted_pull_leaves_no_name_and_what_came_is_used(
    store: Store, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_remote(store.env, "far", [str(kept)])
    one_by_one = replace(fetching.BULK, requests=1)
    monkeypatch.setattr(fetching.Fetcher.fetch_all, "__defaults__", (one_by_one, None))
    with asked(monkeypatch) as remote:

        def later() -> None:
            if len(remote.packs()) > 4:
                fail(errno.EACCES)

        remote.before.append(later)
        with pytest.raises(RemoteError):
            pull(store, "big", lazy=False)
        assert store.names() == []
    came = store.fetcher().counters.bytes
    time.sleep(0.06)
    assert came > 0
    with asked(monkeypatch) as remote:
        pull(store, "big", lazy=False)
    assert remote.bytes() < len(BIG) - came + (1 << 20)
    assert read_image(store, "big") == BIG


def test_flight_never_outlives_a_reader_that_fails(own: tuple[Store, Path]) -> None:
    """A neighbour whose place is damaged must not keep others waiting."""
    store, _ = own
    frames = distant_frames(store)
    remote = store.env.open_remote()
    with store.env.write() as txn:
        key = fmt.frame_key(frames[-1])
        record = bytearray(txn.get(key, db=remote.places))
        before = bytes(record)
        record[20] ^= 1
        txn.put(key, bytes(record), db=remote.places)
    result: list[object] = []
    threads = [
        threading.Thread(target=lambda f=f: result.append(store.fetcher().fetch(f)))  # type: ignore[misc]
        for f in frames[-4:-1]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(result) == 3
    with store.env.write() as txn:
        txn.put(key, before, db=remote.places)
    flush(store)
