"""What comes while an image's manifest is being stored: each frame once, kept if the image is
stored and forgotten if it is not. Against a real remote, a directory."""

from __future__ import annotations

import errno
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from dedupstore import format as fmt, wishes
from dedupstore.errors import RemoteError
from dedupstore.remote.configuration import add_remote
from dedupstore.remote.remote import Remote
from dedupstore.store import Store
from dedupstore.traces import Trace, make_trace
from tests.conftest import import_bytes, noise, opened, read_image, read_range, silent
from tests.interop.rig import wait_until
from tests.lazy import asked, distant_frames
from tests.remotes import push, split_root, write_root
from tests.unit.test_laid_out import chunk_at

IMAGE = noise(31, 6 << 20)
USED = (5 << 20, 1 << 20, 3 << 20)


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """A remote with image `a`, pushed with a trace of the chunks at USED."""
    with Store.create(tmp_path / "origin") as origin:
        add_remote(origin.env, "far", [str(tmp_path / "far")])
        import_bytes(origin, tmp_path, "a", IMAGE)
        push(origin, "far", "a", trace=trace_of(origin))
    return tmp_path / "far"


def trace_of(store: Store, *, offsets: tuple[int, ...] = USED) -> Trace:
    return make_trace(bytes(32), [chunk_at(store, "a", offset) for offset in offsets])


@pytest.fixture
def host(store: Store, far: Path) -> Store:
    add_remote(store.env, "far", [str(far)])
    return store


def begin(store: Store, trace: Trace | None = None) -> None:
    store.pull("far", "a", "a", silent, lazy=True, begin=True, trace=trace)


def read(store: Store, *offsets: int) -> None:
    with opened(store, "a") as reader:
        for offset in offsets:
            assert read_range(reader, offset, 4096) == IMAGE[offset : offset + 4096]


def test_first_block_and_trace_come_without_being_read_and_no_frame_twice(
    host: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with asked(monkeypatch) as remote:
        begin(host)
        before = len(distant_frames(host))
        wait_until(lambda: len(distant_frames(host)) <= before - 2)
        host.fetcher().keeper.flush()
        came = remote.packs()
        read(host, 0, *USED)
        assert remote.packs() == came
    ranges = sorted((pack, offset, offset + length) for pack, offset, length in came)
    for (pack, _, end), (other, start, _) in pairwise(ranges):
        assert pack != other or end <= start
    assert sum(length for _, _, length in came) < 1 << 20
    assert read_image(host, "a") == IMAGE


def test_a_reader_waits_for_what_is_on_its_way(
    host: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def wait_for_packs() -> None:
        if len(remote.packs()):
            go_on.wait(20)

    with asked(monkeypatch) as remote:
        remote.before.append(wait_for_packs)
        begin(host)
        under_way = len(remote.packs())
        assert under_way > 0
        reader = threading.Thread(target=read, args=(host, USED[0]))
        reader.start()
        go_on.set()
        reader.join(20)
        assert not reader.is_alive()
        packs = remote.packs()
    assert len(packs) == len(set(packs))


def test_a_pull_that_does_not_begin_brings_the_manifest_alone_and_leaves_the_trace_to_servers(
    host: Store, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with asked(monkeypatch) as remote:
        host.pull("far", "a", "a", silent, lazy=True)
        assert [path for path, _, _ in remote.reads] == ["images/a"]
    image = bytes.fromhex(host.image("a").digest)
    with host.env.read() as txn:
        wish = wishes.find_wish(txn, host.env, image)
    assert wish == fmt.Wish(fmt.PREFETCH_TRACE)
    kept = wishes.find_trace(host.env, image)
    assert kept is not None
    assert len(kept.digests) == len(USED)


@pytest.mark.parametrize("prefetch", [fmt.PREFETCH_NONE, fmt.PREFETCH_ALL])
def test_what_the_user_wishes_counts_more_than_the_images_trace(host: Store, prefetch: int) -> None:
    host.pull("far", "a", "a", silent, lazy=True, prefetch=prefetch)
    host.pull("far", "a", "b", silent, lazy=True)
    with host.env.read() as txn:
        image = bytes.fromhex(host.image("a").digest)
        assert wishes.find_wish(txn, host.env, image) == fmt.Wish(prefetch)


def test_a_trace_of_ones_own_comes_instead_of_the_images(
    host: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path / "origin") as origin:
        own = trace_of(origin, offsets=(2 << 20,))
    with asked(monkeypatch) as remote:
        begin(host, own)
        host.fetcher()._early.close(5)
        host.fetcher().keeper.flush()
        came = remote.packs()
        read(host, 2 << 20)
        assert remote.packs() == came
        read(host, USED[0])
        assert remote.packs() != came


def test_what_comes_for_an_image_that_is_not_what_it_says_is_forgotten(
    host: Store, far: Path
) -> None:
    document, parts = split_root(far, "a")
    write_root(far, "a", {**document, "digest": "0" * 64}, parts)
    with pytest.raises(RemoteError, match="digest"):
        begin(host)
    host.fetcher()._early.close(5)
    assert host.names() == []
    assert host.stats().frames == 0
    assert host.fetcher().kept == (0, 0)
    import_bytes(host, far.parent, "own", noise(32, 600_000))
    assert read_image(host, "own") == noise(32, 600_000)


def test_damage_and_failures_ahead_are_left_to_who_reads(
    host: Store, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = True

    def fail() -> None:
        if failing and remote.packs():
            raise PermissionError(errno.EACCES, "no")

    with asked(monkeypatch) as remote:
        remote.before.append(fail)
        begin(host)
        host.fetcher()._early.close(5)
        failing = False
        read(host, 0, *USED)
    assert read_image(host, "a") == IMAGE


def test_damaged_bytes_that_come_ahead_are_not_kept(
    host: Store, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_pack = Remote.read

    def flipped(self: Remote, *arguments: object) -> bytes:
        data = bytearray(read_pack(self, *arguments))  # type: ignore[arg-type]
        data[len(data) // 2] ^= 1
        return bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "read", flipped)
        begin(host)
        host.fetcher()._early.close(5)
    assert host.fetcher().kept == (0, 0)
    assert read_image(host, "a") == IMAGE


def test_pulls_leave_no_threads_behind(host: Store) -> None:
    begin(host)
    before = threading.active_count()
    for name in ("b", "c", "d"):
        host.pull("far", "a", name, silent, lazy=True, begin=True)
    wait_until(lambda: threading.active_count() <= before)
