"""Every kind of record that format.md knows, with flipped bits: found, named, mended."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dedupstore import catalog, format as fmt, gc, origins, quarantine, wishes
from dedupstore.check import Checked, check_store
from dedupstore.constants import SEGMENT_BYTES
from dedupstore.env import DATA_FILE
from dedupstore.errors import ChunkDamagedError, SourceError, StoreAccessError, StoreDamagedError
from dedupstore.export import export_image
from dedupstore.frames import TOTALS_KEY
from dedupstore.pages import verify_pages
from dedupstore.places import Place, add_places
from dedupstore.remote.configuration import add_remote
from dedupstore.store import Store
from tests.conftest import (
    flip_record,
    flipped,
    handle_of,
    import_bytes,
    keys_of,
    noise,
    opened,
    read_image,
    read_range,
    silent,
    text as words,
)

pytestmark = pytest.mark.damaged

FORMAT = Path(__file__).resolve().parents[2] / "docs" / "format.md"

# Compressed frames and stored ones, a hole, several frames; the other image shares some of it.
COMMON = noise(1, 300_000 // 4096 * 4096) + bytes(8192)
IMAGES = {
    "base": COMMON + words(2, 400_000) + noise(3, 20_000),
    "other": noise(4, SEGMENT_BYTES) + COMMON + noise(5, 50_000),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of record: its database, which of its keys to hurt, and what `check` calls it."""

    database: str
    found_as: str
    pick: Callable[[bytes], bool] = lambda _: True
    names_image: bool = False


def is_meta(kind: str) -> Callable[[bytes], bool]:
    return lambda key: fmt.meta_kind(key) == kind


KINDS = {
    "superblock": Kind("meta", "superblock", is_meta("superblock")),
    "totals": Kind("meta", "totals", is_meta("totals")),
    "Frame record": Kind("frames", "chunk", names_image=True),
    "Place record": Kind("places", "places"),
    "Index entry": Kind("chunks", "index"),
    "Manifest record": Kind("manifests", "manifests", names_image=True),
    "Image record": Kind("images", "images", lambda key: key == b"base", names_image=True),
    "View record": Kind("meta", "views", is_meta("view")),
    "Origin record": Kind("meta", "origins", is_meta("origin")),
    "Lost record": Kind("meta", "lost", is_meta("lost")),
    "Lazy record": Kind("meta", "lazy", is_meta("lazy")),
    "Remote record": Kind("meta", "remotes", is_meta("remote")),
    "Draft record": Kind("drafts", "drafts"),
}


def test_every_kind_of_record_in_the_format_has_its_flips() -> None:
    headings = re.findall(r"^### ([^(\n]+?)(?: \(.*)?$", FORMAT.read_text(), re.MULTILINE)
    assert set(headings) == set(KINDS)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files to copy: a store with a record of every kind, and a second one with the images."""
    directory = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch, Store.create(directory / "store") as store:
        patch.setattr(origins, "SETTLED_NS", -(10**18))
        for name, data in IMAGES.items():
            (directory / name).write_bytes(data)
            store.import_path(directory / name, name, silent)
        (directory / "tree").mkdir()
        (directory / "tree" / "file").write_bytes(noise(9, 30_000))
        store.import_path(directory / "tree", "tree", silent)
        with store.env.write() as txn:
            refs = [fmt.make_ref(1, 0), fmt.make_ref(1, 1)]
            txn.put(fmt.draft_key(b"d" * 16, 0), fmt.encode_draft(refs), db=store.env.drafts)
            key = fmt.lost_key(fmt.make_ref(1 << 20, 0))
            record = fmt.encode_lost(fmt.LostChunk(b"x" * 32, 4096), key)
            txn.put(key, record, db=store.env.meta)
        add_remote(store.env, "r", [str(directory / "remote")])
        with store.env.write() as txn:
            base = catalog.find_image(txn, store.env, "base").digest
            wishes.put_wish(txn, store.env, base, fmt.Wish(fmt.PREFETCH_ALL), None)
        where = tuple(Place(remote, bytes([remote]) * 32, 4096, 5000) for remote in (7, 8))
        add_places(store.env, {1: where[0], 2: where[0]}, 500_000)
        add_places(store.env, {1: where[1]}, 500_000)
    assert check_store(directory / "store").findings == ()
    with Store.create(directory / "second") as second:
        # In another order, and with more before them: nothing lies where the first store has it.
        for name in ("tree", "other", "base"):
            second.import_path(directory / name, name, silent)
    return directory


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Iterator[Store]:
    opened = Store.create(tmp_path / "store")
    opened.close()
    copy(pristine, tmp_path / "store")
    with Store(tmp_path / "store") as opened:
        yield opened


def copy(pristine: Path, store: Path) -> None:
    (store / DATA_FILE).write_bytes((pristine / "store" / DATA_FILE).read_bytes())


def closed(store: Store) -> Path:
    store.close()
    return store.path


def assert_whole(path: Path, pristine: Path) -> None:
    """The store is intact, and every image as it was."""
    assert check_store(path).findings == ()
    with Store(path) as store:
        for name, data in IMAGES.items():
            assert read_image(store, name) == data
        export_image(store, "tree", path.parent / "exported", silent)
        with Store(pristine / "second") as second:
            assert (path.parent / "exported").read_bytes() == read_image(second, "tree")


def flip(store: Store, database: str, key: bytes, bits: list[int]) -> None:
    handle = handle_of(store, database)
    with store.env.write() as txn:
        record = bytes(txn.get(key, db=handle))
        for bit in bits:
            record = flipped(record, bit % (8 * len(record)))
        txn.put(key, record, db=handle)


def places(bits: int) -> list[int]:
    """Some bits of a record of that many: the first and last of it, and in between."""
    return sorted({0, 7, 65, bits // 3, bits // 2, bits - 1})


@pytest.mark.parametrize("many", [False, True], ids=["one-bit", "many-bits"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_flipped_bits_are_found_named_and_mended(
    pristine: Path, store: Store, kind: Kind, many: bool
) -> None:
    path = store.path
    key = next(key for key in keys_of(store, kind.database) if kind.pick(key))
    handle = handle_of(store, kind.database)
    with store.env.read() as txn:
        bits = 8 * len(txn.get(key, db=handle))
    if many and kind.found_as == "superblock":
        choices = [[8 * 40, 8 * 41 + 3]]  # what is left must say which release wrote it
    else:
        choices = [[bit, (bit + 77) % bits] if many else [bit] for bit in places(bits)]
    for flips in choices:
        store.close()
        copy(pristine, path)
        with Store(path) as hurt:
            flip(hurt, kind.database, key, flips)
        found = check_store(path)
        named = [finding for finding in found.findings if finding.what == kind.found_as]
        assert named, found
        assert found.advice
        assert not kind.names_image or {f.image for f in named} <= {*IMAGES, "tree"}, found
        mended = check_store(path, repair=True, sources=[pristine / "second"])
        assert mended.intact, (flips, mended)
        assert len(mended.findings) >= len(found.findings)
        assert_whole(path, pristine)


# --- other sources ---


def ruin(store: Store, wanted: Callable[[int], bool] = lambda _: True) -> int:
    """Damage every chunk of the frames that are `wanted` by their numbers; return how many."""
    frames = [key for key in keys_of(store, "frames") if wanted(fmt.decode_frame_key(key))]
    for key in frames:
        with store.env.write() as txn:
            record = bytearray(txn.get(key, db=store.env.frames))
            table = 16 + 36 * int.from_bytes(record[10:12], "little")
            for at in range(table, len(record), 512):
                record[at] ^= 0x10
            txn.put(key, bytes(record), db=store.env.frames)
    return len(frames)


def test_chunks_come_back_from_the_files_that_the_images_came_from(
    pristine: Path, store: Store
) -> None:
    ruin(store)
    second = pristine / "tree.erofs"
    with Store(pristine / "second") as whole:
        second.write_bytes(read_image(whole, "tree"))
    path = closed(store)
    found = check_store(path, repair=True, sources=[pristine / "base"])
    assert not found.intact
    left = {finding.image for finding in found.findings if not finding.mended}
    assert left == {"other", "tree"}
    assert found.advice
    found = check_store(path, repair=True, sources=[pristine / "other", second])
    assert found.intact, found
    assert_whole(path, pristine)


def test_file_that_is_nearly_the_image_gives_what_it_has_wherever_it_lies(
    pristine: Path, store: Store, tmp_path: Path
) -> None:
    ruin(store)
    path = closed(store)
    shifted = tmp_path / "shifted"
    shifted.write_bytes(noise(8, SEGMENT_BYTES) + IMAGES["base"])
    in_place = tmp_path / "in_place"
    in_place.write_bytes(IMAGES["other"][:-4096] + noise(6, 100_000))
    found = check_store(path, repair=True, sources=[shifted, in_place])
    left = {finding.image for finding in found.findings if not finding.mended}
    assert left == {"other", "tree"}
    with Store(path) as again:
        assert read_image(again, "base") == IMAGES["base"]
    chunk = next(f for f in found.findings if f.image == "other" and not f.mended)
    assert chunk.offset is not None
    assert chunk.offset > SEGMENT_BYTES + len(COMMON)
    assert check_store(path, repair=True, sources=[pristine / "second"]).intact
    assert_whole(path, pristine)


def test_two_damaged_stores_mend_each_other(pristine: Path, store: Store, tmp_path: Path) -> None:
    Store.create(tmp_path / "twin").close()
    (tmp_path / "twin" / DATA_FILE).write_bytes((pristine / "second" / DATA_FILE).read_bytes())
    with Store(tmp_path / "twin") as twin:
        ruin(twin, lambda frame: frame > 20)
    ruin(store, lambda frame: frame % 5 == 0)
    path = closed(store)
    before = (tmp_path / "twin" / DATA_FILE).read_bytes()
    first = check_store(path, repair=True, sources=[tmp_path / "twin"])
    assert (tmp_path / "twin" / DATA_FILE).read_bytes() == before
    assert check_store(path, repair=True, sources=[pristine / "second"]).intact
    assert any(finding.mended for finding in first.findings)
    assert check_store(tmp_path / "twin", repair=True, sources=[path]).intact
    assert_whole(path, pristine)
    assert_whole(tmp_path / "twin", pristine)


def test_source_that_lies_about_contents_under_guards_that_hold_mends_nothing(
    pristine: Path, store: Store, tmp_path: Path
) -> None:
    liar = tmp_path / "liar"
    Store.create(liar).close()
    (liar / DATA_FILE).write_bytes((pristine / "second" / DATA_FILE).read_bytes())
    with Store(liar) as forging, forging.env.write() as txn:
        for key in [bytes(key) for key in txn.cursor(db=forging.env.frames).iternext(values=False)]:
            record = bytearray(txn.get(key, db=forging.env.frames))
            record[-1] ^= 1  # of the last chunk, which is stored raw or fails to unpack
            fmt.seal_frame(record, fmt.decode_frame_key(key))
            txn.put(key, bytes(record), db=forging.env.frames)
    ruin(store)
    path = closed(store)
    assert not check_store(path, repair=True, sources=[liar]).intact
    with Store(path) as again:
        for name in IMAGES:
            with pytest.raises(ChunkDamagedError):
                read_image(again, name)
    assert check_store(path, repair=True, sources=[pristine / "second"]).intact
    assert_whole(path, pristine)


@pytest.mark.parametrize("source", ["store", "file"])
def test_lost_manifest_is_brought_back_from(pristine: Path, store: Store, source: str) -> None:
    with store.env.write() as txn:
        txn.delete(bytes.fromhex(store.image("base").digest), db=store.env.manifests)
    path = closed(store)
    found = check_store(path, repair=True)
    assert [(f.image, f.reason, f.mended) for f in found.findings] == [
        ("base", "has no manifest", False)
    ]
    given = pristine / ("second" if source == "store" else "base")
    assert check_store(path, repair=True, sources=[given]).intact
    assert_whole(path, pristine)


def test_manifest_and_frames_lost_together_come_back_from_a_store_that_lost_others(
    pristine: Path, store: Store, tmp_path: Path
) -> None:
    Store.create(tmp_path / "twin").close()
    (tmp_path / "twin" / DATA_FILE).write_bytes((pristine / "second" / DATA_FILE).read_bytes())
    with Store(tmp_path / "twin") as twin:
        manifest = twin.open_manifest("base")
        common = {ref >> 16 for ref in manifest.refs[:1]}
        twin.close_manifest(manifest)
        ruin(twin, lambda frame: frame in common)  # which our store has by way of `other`
    digest = bytes.fromhex(store.image("base").digest)
    with store.env.write() as txn:
        txn.delete(digest, db=store.env.manifests)
    path = closed(store)
    assert check_store(path, repair=True, sources=[tmp_path / "twin"]).intact
    assert_whole(path, pristine)


def test_source_of_a_newer_release_that_may_be_read_is_read(
    pristine: Path, store: Store, tmp_path: Path
) -> None:
    Store.create(tmp_path / "newer").close()
    with Store(tmp_path / "newer") as newer:
        import_bytes(newer, tmp_path, "x", IMAGES["base"])
        import_bytes(newer, tmp_path, "y", IMAGES["other"])
        superblock = fmt.Superblock(b"u" * 16, 1, features_compat=1 << 30)
        superblock = fmt.Superblock(
            b"u" * 16, 1, features_compat=1 << 30, features_readonly_compat=1 << 3
        )
        with newer.env.write() as txn:
            txn.put(fmt.SUPERBLOCK_KEY, fmt.encode_superblock(superblock), db=newer.env.meta)
    ruin(store, lambda frame: frame == 1)
    path = closed(store)
    assert check_store(path, repair=True, sources=[tmp_path / "newer"]).intact
    assert_whole(path, pristine)


def test_what_is_no_source_is_refused(store: Store, tmp_path: Path) -> None:
    path = closed(store)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="neither a store nor an image"):
        check_store(path, repair=True, sources=[tmp_path / "empty"])
    with pytest.raises(SourceError):
        check_store(path, repair=True, sources=[tmp_path / "absent"])


# --- quarantine ---


def test_import_after_a_check_alone_heals_every_image_that_shares_the_content(
    pristine: Path, store: Store
) -> None:
    hurt = ruin(store, lambda frame: frame == 1)
    assert hurt == 1
    path = closed(store)
    before = check_store(path)
    assert {f.image for f in before.findings if f.what == "chunk"} == {"base", "other"}
    with Store(path) as again:
        again.import_path(pristine / "base", "healed", silent)
        for name, data in (*IMAGES.items(), ("healed", IMAGES["base"])):
            assert read_image(again, name) == data
        again.remove(["healed"])
        again.collect_garbage()
        assert [key for key in keys_of(again, "meta") if fmt.meta_kind(key) == "lost"] == []
        assert fmt.frame_key(1) not in keys_of(again, "frames")
    assert_whole(path, pristine)


def test_import_of_the_content_in_another_image_heals_after_a_check(
    store: Store, pristine: Path, tmp_path: Path
) -> None:
    ruin(store, lambda frame: frame == 1)
    path = closed(store)
    check_store(path)
    with Store(path) as again:
        import_bytes(again, tmp_path, "third", noise(11, SEGMENT_BYTES) + COMMON)
        for name, data in IMAGES.items():
            assert read_image(again, name) == data


def test_check_alone_leaves_the_damaged_bytes_and_a_second_one_writes_nothing(
    store: Store,
) -> None:
    ruin(store, lambda frame: frame == 1)
    with store.env.read() as txn:
        before = bytes(txn.get(fmt.frame_key(1), db=store.env.frames))
    path = closed(store)
    found = check_store(path)
    data = (path / DATA_FILE).read_bytes()
    assert check_store(path) == found
    assert (path / DATA_FILE).read_bytes() == data
    with Store(path) as again, again.env.read() as txn:
        assert bytes(txn.get(fmt.frame_key(1), db=again.env.frames)) == before


def test_quarantine_marks_the_store_and_a_store_of_an_older_release_heals_all_the_same(
    pristine: Path, store: Store
) -> None:
    """What the release before lost records leaves after its repair: absent chunks, and no records
    of them."""
    with store.env.write() as txn:
        assert not flags(store) & fmt.FEATURE_COMPAT_LOST
        record = txn.get(fmt.frame_key(1), db=store.env.frames)
        header = fmt.decode_frame_header(record, 1)
        absent = bytearray(16)
        absent[10:12] = len(header.slots).to_bytes(2, "little")
        for slot in header.slots:
            absent += slot.digest + (fmt.SLOT_ABSENT << 30).to_bytes(4, "little")
            txn.delete(slot.digest, db=store.env.chunks)
        fmt.seal_frame(absent, 1)
        txn.put(fmt.frame_key(1), bytes(absent), db=store.env.frames)
    path = closed(store)
    found = check_store(path, repair=True, sources=[pristine / "second"])
    assert found.intact
    assert_whole(path, pristine)
    with Store(path) as again:
        assert flags(again) & fmt.FEATURE_COMPAT_LOST


def flags(store: Store) -> int:
    with store.env.read() as txn:
        record = txn.get(fmt.SUPERBLOCK_KEY, db=store.env.meta)
        return fmt.decode_superblock(record or b"").features_compat


def test_frame_numbers_are_not_used_again_when_the_totals_are_lost(
    store: Store, tmp_path: Path
) -> None:
    """A server may still cache a reclaimed frame by its number."""
    imported = import_bytes(store, tmp_path, "brief", noise(12, 1 << 20))
    assert imported.new_chunks
    used = {fmt.decode_frame_key(key) for key in keys_of(store, "frames")}
    store.remove(["brief"])
    store.collect_garbage()
    with store.env.write() as txn:
        txn.delete(TOTALS_KEY, db=store.env.meta)
    path = closed(store)
    assert check_store(path, repair=True).intact
    with Store(path) as again:
        before = set(keys_of(again, "frames"))
        import_bytes(again, tmp_path, "fresh", noise(13, 1 << 20))
        fresh = {fmt.decode_frame_key(key) for key in set(keys_of(again, "frames")) - before}
    assert fresh
    assert not fresh & used


def test_damaged_name_can_be_given_up(store: Store) -> None:
    flip(store, "images", b"base", [5, 100, 300])
    with store.env.write() as txn:
        record = bytearray(txn.get(b"base", db=store.env.images))
        record[8:40] = bytes(32)  # nor does the digest lead anywhere
        txn.put(b"base", bytes(record), db=store.env.images)
    path = closed(store)
    assert not check_store(path, repair=True).intact
    with Store(path) as again:
        with pytest.raises(StoreDamagedError):
            again.collect_garbage()
        again.remove(["base"])
        again.collect_garbage()
        assert read_image(again, "other") == IMAGES["other"]
    assert check_store(path).findings == ()


def test_reading_goes_on_around_what_is_lost(store: Store) -> None:
    """One chunk of a frame that is stored as it is: the others of the frame are read again after a
    repair, without any other source."""
    manifest = store.open_manifest("base")
    frame = manifest.refs[0] >> 16
    store.close_manifest(manifest)
    flip_record(store, "frames", fmt.frame_key(frame), -1)
    path = closed(store)
    found: Checked = check_store(path, repair=True)
    lost = {f.offset for f in found.findings if f.image == "base" and not f.mended}
    assert len(lost) == 1
    with Store(path) as again, pytest.raises(ChunkDamagedError):
        read_image(again, "base")


def test_random_damage_to_frames_is_mended_from_a_store(pristine: Path, store: Store) -> None:
    source = random.Random(5)
    for key in keys_of(store, "frames"):
        with store.env.read() as txn:
            bits = 8 * len(txn.get(key, db=store.env.frames))
        flip(store, "frames", key, [source.randrange(bits) for _ in range(3)])
    path = closed(store)
    assert check_store(path, repair=True, sources=[pristine / "second"]).intact
    assert_whole(path, pristine)


def test_chunk_that_gc_found_dead_and_a_repair_then_redirects_to_stays(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only sound copy belongs to an image without a name when gc marks."""
    lost = noise(21, 100_000 // 4096 * 4096)
    import_bytes(store, tmp_path, "hurt", lost)
    (frame,) = {ref >> 16 for ref in manifest_of(store, "hurt").refs}
    path = closed(store)
    with Store(path) as again:
        ruin(again, lambda one: one == frame)
    check_store(path, repair=True)
    with Store(path) as again:
        monkeypatch.setattr(quarantine, "redirect_all", lambda env: 0)
        import_bytes(again, tmp_path, "brief", noise(22, SEGMENT_BYTES) + lost)
        monkeypatch.undo()
        again.remove(["brief"])
        sweep = gc.Collector._sweep

        def late(self: gc.Collector, *arguments: object) -> None:
            assert quarantine.redirect_all(again.env) == 1
            sweep(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(gc.Collector, "_sweep", late)
        again.collect_garbage()
        assert read_image(again, "hurt") == lost
    assert check_store(path).findings == ()


def manifest_of(store: Store, name: str) -> fmt.ManifestRecord:
    digest = bytes.fromhex(store.image(name).digest)
    with store.env.read() as txn:
        return fmt.decode_manifest(bytes(txn.get(digest, db=store.env.manifests)), digest)


# --- pages of LMDB ---

PAGE = 4096
OVERFLOW_RUN = 4


def pages_by_kind(path: Path) -> dict[str, int]:
    """A page in use of every kind that LMDB has."""
    data = (path / DATA_FILE).read_bytes()
    newest = max((0, 1), key=lambda page: int.from_bytes(data[page * PAGE + 144 :][:8], "little"))
    free_root = int.from_bytes(data[newest * PAGE + 80 :][:8], "little")
    kinds = {"meta": newest, "free list": free_root}
    names = {1: "branch", 2: "leaf", OVERFLOW_RUN: "overflow"}
    for page in range(2, len(data) // PAGE):
        number, flags = data[page * PAGE :][:8], data[page * PAGE + 10 :][:2]
        kind = names.get(int.from_bytes(flags, "little"))
        if kind is None or int.from_bytes(number, "little") != page or kind in kinds:
            continue
        hurt = bytearray(data)
        hurt[page * PAGE + 10] ^= 8
        (path / DATA_FILE).write_bytes(hurt)
        if verify_pages(path / DATA_FILE).findings:  # else it is free
            kinds[kind] = page
    (path / DATA_FILE).write_bytes(data)
    return kinds


@pytest.mark.parametrize("kind", ["meta", "branch", "leaf", "overflow", "free list"])
def test_damaged_page_is_named_with_its_tree_and_mended_by_a_new_file(
    pristine: Path, store: Store, kind: str
) -> None:
    store.collect_garbage()  # of the draft: there are free pages
    path = closed(store)
    page = pages_by_kind(path)[kind]
    data = bytearray((path / DATA_FILE).read_bytes())
    data[page * PAGE + 10] ^= 8  # what kind of page it is
    (path / DATA_FILE).write_bytes(data)
    found = check_store(path)
    assert not found.intact
    assert any(re.fullmatch(rf"page {page} of .+", f.what) for f in found.findings), found
    assert "check --repair" in found.advice
    assert (path / DATA_FILE).read_bytes() == data
    mended = check_store(path, repair=True, sources=[pristine / "second"])
    assert mended.intact, mended
    assert (path / "data.mdb.damaged").read_bytes() == data
    assert_whole(path, pristine)


@pytest.mark.parametrize("seed", range(12))
def test_random_flips_in_pages_are_mended_by_a_new_file(
    pristine: Path, store: Store, seed: int
) -> None:
    source = random.Random(seed)
    path = closed(store)
    pristine_data = (path / DATA_FILE).read_bytes()
    while not verify_pages(path / DATA_FILE).findings:
        data = bytearray(pristine_data)
        kinds = pages_by_kind(path) if not seed else {}
        page = source.choice([0, 1, *kinds.values(), source.randrange(len(data) // PAGE)])
        data[page * PAGE + source.randrange(152 if page < 2 else 64)] ^= 1 << source.randrange(8)
        (path / DATA_FILE).write_bytes(data)
    mended = check_store(path, repair=True, sources=[pristine / "second"])
    assert mended.intact, mended
    assert_whole(path, pristine)


def test_chunks_of_a_damaged_frame_get_into_the_new_file(store: Store) -> None:
    """One chunk of a frame is lost, and beside it a page; there is no other source."""
    (frame,) = {ref >> 16 for ref in manifest_of(store, "base").refs[:1]}
    flip_record(store, "frames", fmt.frame_key(frame), -1)
    path = closed(store)
    page = pages_by_kind(path)["branch"]
    data = bytearray((path / DATA_FILE).read_bytes())
    data[page * PAGE + 10] ^= 8
    (path / DATA_FILE).write_bytes(data)
    found = check_store(path, repair=True)
    left = [finding for finding in found.findings if not finding.mended]
    assert {finding.image for finding in left} == {"base", "other"}
    with Store(path) as again, opened(again, "base") as reader:
        offset = next(f.offset for f in left if f.image == "base")
        assert offset
        assert read_range(reader, 0, offset) == IMAGES["base"][:offset]


def test_new_file_is_not_made_under_a_store_that_is_in_use(store: Store) -> None:
    path = store.path
    page = pages_by_kind(path)["leaf"]
    data = bytearray((path / DATA_FILE).read_bytes())
    data[page * PAGE + 10] ^= 8
    script = (
        "import sys; from pathlib import Path; from dedupstore.store import Store\n"
        "store = Store(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    store.close()
    with subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        (path / DATA_FILE).write_bytes(data)
        with pytest.raises(StoreAccessError, match="in use"):
            check_store(path, repair=True)
        assert (path / DATA_FILE).read_bytes() == data
        holder.communicate()
    check_store(path, repair=True)
    assert verify_pages(path / DATA_FILE).findings == ()
