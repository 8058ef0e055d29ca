"""The page verifier against real LMDB files: healthy ones, and each kind of damage.

Damage is made by flipping bits at places found by a second, simpler reader of the format
(`Layout`), so a mistake in `dedupstore.pages` is not repeated here.
"""

import os
import random
import re
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import lmdb
import pytest

from dedupstore.errors import StoreAccessError, StoreDamagedError
from dedupstore.pages import FREE_LIST, MAIN, META, datafile, verify_header, verify_pages, walk

PAGE = 4096
NO_PAGE = 2**64 - 1


def open_store(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path), subdir=False, map_size=1 << 30, max_dbs=32, sync=False)


class Layout:
    """Finds things in a healthy file: offsets in bytes from its start, by plain recursion."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        transactions = [self.u64(at + 144) for at in (0, PAGE)]
        self.meta = PAGE * (transactions[1] > transactions[0])
        self.last_page = self.u64(self.meta + 136)

    def u16(self, at: int) -> int:
        return int(struct.unpack_from("<H", self.data, at)[0])

    def u64(self, at: int) -> int:
        return int(struct.unpack_from("<Q", self.data, at)[0])

    def record(self, database: str) -> int:
        """Offset of a database's record."""
        if database in (FREE_LIST, MAIN):
            return self.meta + (40 if database == FREE_LIST else 88)
        for node in self.leaf_nodes(MAIN):
            key_bytes = self.u16(node + 6)
            if self.data[node + 8 : node + 8 + key_bytes] == database.encode():
                return node + 8 + key_bytes
        raise AssertionError(database)

    def root(self, database: str) -> int:
        return self.u64(self.record(database) + 40)

    def nodes(self, page: int) -> list[int]:
        """Offsets of a page's nodes, in key order."""
        count = (self.u16(page * PAGE + 12) - 16) // 2
        return [page * PAGE + self.u16(page * PAGE + 16 + 2 * n) for n in range(count)]

    def child(self, node: int) -> int:
        return self.u64(node) & 0xFFFF_FFFF_FFFF

    def leaves(self, database: str) -> Iterator[int]:
        def below(page: int) -> Iterator[int]:
            if self.u16(page * PAGE + 10) == 2:
                yield page
                return
            for node in self.nodes(page):
                yield from below(self.child(node))

        if self.root(database) != NO_PAGE:
            yield from below(self.root(database))

    def leaf_nodes(self, database: str) -> Iterator[int]:
        for leaf in self.leaves(database):
            yield from self.nodes(leaf)

    def used(self) -> Iterator[int]:
        """Every page that is in use, branches excepted."""
        names = [self.data[n + 8 : n + 8 + self.u16(n + 6)] for n in self.leaf_nodes(MAIN)]
        for database in (FREE_LIST, MAIN, *(name.decode() for name in names)):
            yield from self.leaves(database)
            for node in self.leaf_nodes(database):
                if self.u16(node + 4) & 1:
                    first = self.u64(node + 8 + self.u16(node + 6))
                    (count,) = struct.unpack_from("<I", self.data, first * PAGE + 12)
                    yield from range(first, first + count)
            if self.root(database) != NO_PAGE:
                yield self.root(database)

    def run(self, database: str) -> int:
        """Number of the first overflow page of the first value that has one."""
        for node in self.leaf_nodes(database):
            if self.u16(node + 4) & 1:
                return self.u64(node + 8 + self.u16(node + 6))
        raise AssertionError(database)

    def flip(self, at: int, mask: int) -> None:
        """Invert the bits of `mask`, a little-endian number, from byte `at` on."""
        length = max(1, (mask.bit_length() + 7) // 8)
        value = int.from_bytes(self.data[at : at + length], "little") ^ mask
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(value.to_bytes(length, "little"))

    def put_u64(self, at: int, value: int) -> None:
        assert self.u64(at) != value, "no damage"
        self.flip(at, self.u64(at) ^ value)


@pytest.fixture(name="store")
def make_store(tmp_path: Path) -> Path:
    """'index': a tree with branches; 'frames': overflow values; 'empty': no page; free pages."""
    path = tmp_path / "data.mdb"
    env = open_store(path)
    index, frames = env.open_db(b"index"), env.open_db(b"frames")
    env.open_db(b"empty")
    for turn in range(4):
        with env.begin(write=True) as txn:
            for n in range(500):
                txn.put(b"%08d" % (n * 7), b"%04d" % turn * 10, db=index)
            for n in range(12):
                txn.put(b"%08d" % n, bytes([turn]) * (10_000 + n), db=frames)
            txn.delete(b"%08d" % turn, db=frames)
    env.close()
    return path


def findings_of(path: Path) -> list[tuple[int, str, str]]:
    return [(f.page, f.database, f.reason) for f in verify_pages(path).findings]


def assert_sound(path: Path) -> None:
    verify_header(path)
    assert findings_of(path) == []


def assert_found(path: Path, page: int, database: str, pattern: str) -> None:
    found = findings_of(path)
    assert any((page, database) == f[:2] and re.search(pattern, f[2]) for f in found), found


# ---- healthy files -------------------------------------------------------------------------------


def test_new_file_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    open_store(path).close()
    assert_sound(path)
    assert verify_pages(path).entries == {FREE_LIST: 0, MAIN: 0}


def test_healthy_store_is_sound_and_its_entries_are_counted(store: Path) -> None:
    assert_sound(store)
    entries = verify_pages(store).entries
    assert {name: entries[name] for name in ("index", "frames", "empty")} == {
        "index": 500,
        "frames": 11,
        "empty": 0,
    }
    assert entries[MAIN] == 3


def test_three_levels_and_the_longest_keys_are_sound(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    env = open_store(path)
    index = env.open_db(b"index")
    with env.begin(write=True) as txn:
        for n in random.Random(1).sample(range(10**6), 3000):
            txn.put(b"%06d" % n + b"k" * (n % 506), b"", db=index)
        assert txn.stat(index)["depth"] >= 3
    env.close()
    assert_sound(path)


def test_every_commit_of_a_changing_store_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    env = open_store(path)
    databases = [env.open_db(name) for name in (b"a", b"b", b"c")]
    rng = random.Random(7)
    reader = None
    for turn in range(120):
        if turn % 20 == 5:
            reader = env.begin()  # keeps pages from being reused: the free list grows
        if turn % 20 == 15 and reader is not None:
            reader.abort()
        with env.begin(write=True) as txn:
            for _ in range(rng.randrange(60)):
                database, key = rng.choice(databases), b"%05d" % rng.randrange(400)
                if rng.random() < 0.6:
                    value = b"v" * rng.choice([0, 9, 300, 2030, 5000, 30_000])
                    txn.put(key, value, db=database)
                else:
                    txn.delete(key, db=database)
            if turn == 60:
                txn.drop(databases[2], delete=False)
        assert_sound(path)
    env.close()


def test_free_list_in_overflow_pages_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    env = open_store(path)
    frames = env.open_db(b"frames")
    with env.begin(write=True) as txn:
        for n in range(40):
            txn.put(b"%03d" % n, b"v" * 200_000, db=frames)
    with env.begin(write=True) as txn:
        txn.drop(frames, delete=False)
    env.close()
    assert Layout(path).run(FREE_LIST)
    assert_sound(path)


def test_run_longer_than_its_value_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    env = open_store(path)
    frames = env.open_db(b"frames")
    with env.begin(write=True) as txn:
        txn.put(b"k", b"v" * 40_000, db=frames)
        txn.put(b"k", b"v" * 5_000, db=frames)
    env.close()
    layout = Layout(path)
    assert struct.unpack_from("<I", layout.data, layout.run("frames") * PAGE + 12) == (10,)
    assert_sound(path)


@pytest.mark.parametrize("compact", [False, True])
def test_copy_made_by_lmdb_is_sound(store: Path, *, compact: bool) -> None:
    env = open_store(store)
    copy = store.with_name("copy.mdb")
    env.copy(str(copy), compact=compact)
    env.close()
    assert_sound(copy)


@pytest.fixture(name="short_store")
def make_short_store(store: Path) -> Path:
    """A healthy file that ends before its last page: the tail was allocated and given back."""
    env = open_store(store)
    frames = env.open_db(b"frames")
    with env.begin(write=True) as txn:
        txn.put(b"0", b"v", db=frames)  # takes up the free list, so that what follows goes back
        txn.put(b"big", b"v" * 400_000, db=frames)
        txn.delete(b"big", db=frames)
    env.close()
    assert store.stat().st_size < (Layout(store).last_page + 1) * PAGE
    return store


def test_file_short_of_free_pages_only_is_sound(short_store: Path) -> None:
    assert_sound(short_store)


def test_short_file_that_lost_a_used_page_is_truncated(short_store: Path) -> None:
    layout = Layout(short_store)
    last = max(layout.used())
    os.truncate(short_store, last * PAGE)
    message = f"truncated: has {last * PAGE} bytes, needs {(last + 1) * PAGE} "
    with pytest.raises(StoreDamagedError, match=message):
        verify_header(short_store)
    assert findings_of(short_store)


def test_progress_ends_at_the_number_of_pages(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_PROGRESS_PAGES", 3)
    calls: list[tuple[int, int]] = []
    report = verify_pages(store, on_progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 5
    assert calls == sorted(calls)
    assert calls[-1] == (Layout(store).last_page + 1,) * 2
    assert 0 < report.pages_walked < calls[-1][1]


# ---- damage in the trees -------------------------------------------------------------------------

Damage = Callable[[Layout], tuple[int, str]]
"""Damages the file, and returns the page and the database to be named."""


def leaf_of(layout: Layout, database: str = "index", nth: int = 1) -> int:
    return list(layout.leaves(database))[nth]


def flip_in_root(at: int, mask: int) -> Damage:
    def damage(layout: Layout) -> tuple[int, str]:
        layout.flip(layout.root("index") * PAGE + at, mask)
        return layout.root("index"), "index"

    return damage


def flip_in_leaf(at: int, mask: int) -> Damage:
    def damage(layout: Layout) -> tuple[int, str]:
        layout.flip(leaf_of(layout) * PAGE + at, mask)
        return leaf_of(layout), "index"

    return damage


def flip_in_leaf_node(at: int, mask: int, nth: int = 3) -> Damage:
    def damage(layout: Layout) -> tuple[int, str]:
        layout.flip(layout.nodes(leaf_of(layout))[nth] + at, mask)
        return leaf_of(layout), "index"

    return damage


def flip_in_run(at: int, mask: int) -> Damage:
    def damage(layout: Layout) -> tuple[int, str]:
        layout.flip(layout.run("frames") * PAGE + at, mask)
        return layout.run("frames"), "frames"

    return damage


def flip_in_record(at: int, mask: int) -> Damage:
    def damage(layout: Layout) -> tuple[int, str]:
        layout.flip(layout.record("index") + at, mask)
        return layout.record("index") // PAGE, "index"

    return damage


def child_out_of_range(layout: Layout) -> tuple[int, str]:
    node = layout.nodes(layout.root("index"))[1]
    child = layout.child(node) ^ 1 << 30
    layout.flip(node, 1 << 30)
    return child, "index"


def child_used_twice(layout: Layout) -> tuple[int, str]:
    first, second = layout.nodes(layout.root("index"))[:2]
    layout.flip(second, layout.child(first) ^ layout.child(second))
    return layout.child(first), "index"


def separator_above_its_child(layout: Layout) -> tuple[int, str]:
    nodes = layout.nodes(layout.root("index"))[1:]
    node = next(node for node in nodes if layout.data[node + 15] % 2 == 0)
    layout.flip(node + 15, 1)  # the last digit of its key: the separators stay in order
    return layout.child(node), "index"


def separators_out_of_order(layout: Layout) -> tuple[int, str]:
    layout.flip(layout.nodes(layout.root("index"))[2] + 8, 0x40)
    return layout.root("index"), "index"


def leaf_lower_below_the_header(layout: Layout) -> tuple[int, str]:
    at = leaf_of(layout) * PAGE + 12
    layout.flip(at, layout.u16(at) ^ 12)
    return leaf_of(layout), "index"


def overflow_number_points_into_a_run(layout: Layout) -> tuple[int, str]:
    node = next(n for n in layout.leaf_nodes("frames") if layout.u16(n + 4) & 1)
    at = node + 8 + layout.u16(node + 6)
    layout.put_u64(at, layout.u64(at) + 1)
    return layout.u64(at) + 1, "frames"


def database_mark_cleared(layout: Layout) -> tuple[int, str]:
    layout.flip(layout.record("index") - len("index") - 8 + 4, 2)
    used = {layout.root("index"), *layout.leaves("index")}
    return min(used), FREE_LIST


def free_record(layout: Layout, nth: int = 0) -> tuple[int, int]:
    """Offset of the node, and of its value in the page."""
    node = list(layout.leaf_nodes(FREE_LIST))[nth]
    return node, node + 16


def free_count_wrong(layout: Layout) -> tuple[int, str]:
    node, value = free_record(layout)
    layout.flip(value, 1 << 8)
    return node // PAGE, FREE_LIST


def free_page_out_of_range(layout: Layout) -> tuple[int, str]:
    node, value = free_record(layout)
    layout.flip(value + 8, 1 << 40)
    return node // PAGE, FREE_LIST


def free_page_zero(layout: Layout) -> tuple[int, str]:
    node, value = free_record(layout)
    layout.put_u64(value + 8 * layout.u64(value), 1)
    return node // PAGE, FREE_LIST


def free_pages_out_of_order(layout: Layout) -> tuple[int, str]:
    node, value = free_record(layout)
    layout.put_u64(value + 16, layout.u64(value + 8))
    return node // PAGE, FREE_LIST


def free_page_in_use(layout: Layout) -> tuple[int, str]:
    for node in layout.leaf_nodes(FREE_LIST):
        count = layout.u64(node + 16)
        for at in range(node + 24, node + 24 + 8 * count, 8):
            above = layout.u64(at - 8) if at > node + 24 else layout.last_page + 1
            below = layout.u64(at + 8) if at < node + 16 + 8 * count else 1
            for used in layout.leaves("index"):
                if below < used < above:
                    layout.put_u64(at, used)
                    return used, "index"
    raise AssertionError("no place where the order of the free list would stay")


def free_transaction_from_the_future(layout: Layout) -> tuple[int, str]:
    node, _ = free_record(layout, -1)
    layout.flip(node + 8, 1 << 32)
    return node // PAGE, FREE_LIST


def free_key_of_odd_size(layout: Layout) -> tuple[int, str]:
    node, _ = free_record(layout)
    size = layout.u16(node)
    layout.flip(node, size ^ size - 2)
    layout.flip(node + 6, 8 ^ 10)
    return node // PAGE, FREE_LIST


TREE_DAMAGE: dict[str, tuple[Damage, str]] = {
    "branch_number": (flip_in_root(0, 1 << 5), "says it is page"),
    "branch_flags": (flip_in_root(10, 3), "is a leaf page where a branch page belongs"),
    "branch_lower": (flip_in_root(12, 1 << 14), "impossible bounds"),
    "branch_lower_by_one_node": (flip_in_root(12, 2), "gaps|outside"),
    "branch_upper": (flip_in_root(14, 1 << 15), "impossible bounds"),
    "branch_dirty_flag": (flip_in_root(10, 0x10), "has flags 0x11 where a branch page belongs"),
    "separators_out_of_order": (separators_out_of_order, "out of order"),
    "child_out_of_range": (child_out_of_range, "out of range"),
    "child_used_twice": (child_used_twice, "used twice"),
    "separator_above_its_child": (separator_above_its_child, "bounds its parent gives"),
    "leaf_number": (flip_in_leaf(3, 1), "says it is page"),
    "leaf_flags": (flip_in_leaf(10, 3), "is a branch page where a leaf page belongs"),
    "leaf_lower_below_the_header": (leaf_lower_below_the_header, "impossible bounds"),
    "leaf_upper": (flip_in_leaf(14, 2), "gaps|outside"),
    "leaf_offset": (flip_in_leaf(16 + 4, 1 << 15), "outside its bounds"),
    "leaf_offset_into_another_node": (flip_in_leaf(16 + 4, 2), "overlap|past"),
    "leaf_node_size": (flip_in_leaf_node(0, 1 << 6), "gaps"),
    "leaf_node_size_huge": (flip_in_leaf_node(0, 1 << 31), "runs past its end"),
    "leaf_node_key_size": (flip_in_leaf_node(6, 1 << 9), "overlap|past"),
    "leaf_node_flags_dup": (flip_in_leaf_node(4, 4), r"unsupported flags \(0x4\)"),
    "leaf_node_flags_record": (flip_in_leaf_node(4, 2), r"unsupported flags \(0x2\)"),
    "leaf_key_order": (flip_in_leaf_node(8, 1 << 7), "out of order"),
    "leaf_first_key_below_parent": (flip_in_leaf_node(8, 1 << 4, nth=0), "bounds"),
    "run_number": (flip_in_run(0, 1), "says it is page"),
    "run_flags": (flip_in_run(10, 6), "is a leaf page where an overflow page belongs"),
    "run_shorter_than_its_value": (flip_in_run(12, 2), "begins 1 pages"),
    "run_beyond_last_page": (flip_in_run(12, 1 << 20), "out of range"),
    "run_into_another": (flip_in_run(12, 4), "but the rest is"),
    "overflow_number": (overflow_number_points_into_a_run, "says it is page"),
    "record_pad": (flip_in_record(0, 8), "value size"),
    "record_dupsort": (flip_in_record(4, 4), r"unsupported flags \(0x4\)"),
    "record_integer_key": (flip_in_record(4, 8), r"unsupported flags \(0x8\)"),
    "record_depth_huge": (flip_in_record(6, 1 << 6), "impossible depth"),
    "record_branch_pages": (flip_in_record(8, 2), "branch pages"),
    "record_leaf_pages": (flip_in_record(16, 1), "leaf pages"),
    "record_overflow_pages": (flip_in_record(24, 1), "overflow pages"),
    "record_pages_impossible": (flip_in_record(24, 1 << 60), "more than the file has"),
    "record_entries": (flip_in_record(32, 1), "entries"),
    "record_root": (flip_in_record(40, 1 << 50), "root page"),
    "database_mark_cleared": (database_mark_cleared, "in no database, nor free"),
    "free_count": (free_count_wrong, "in room for"),
    "free_page_out_of_range": (free_page_out_of_range, "out of range"),
    "free_page_zero": (free_page_zero, "out of range"),
    "free_pages_out_of_order": (free_pages_out_of_order, "out of order"),
    "free_page_in_use": (free_page_in_use, "also on the free list"),
    "free_transaction_from_the_future": (free_transaction_from_the_future, "names transaction"),
    "free_key_of_odd_size": (free_key_of_odd_size, "has keys of"),
}


@pytest.mark.parametrize("kind", TREE_DAMAGE)
def test_damage_in_a_tree_is_found_with_page_and_database(store: Path, kind: str) -> None:
    damage, pattern = TREE_DAMAGE[kind]
    page, database = damage(Layout(store))
    assert_found(store, page, database, pattern)


def test_free_list_in_overflow_pages_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    env = open_store(path)
    frames = env.open_db(b"frames")
    with env.begin(write=True) as txn:
        for n in range(40):
            txn.put(b"%03d" % n, b"v" * 200_000, db=frames)
    with env.begin(write=True) as txn:
        txn.drop(frames, delete=False)
    env.close()
    layout = Layout(path)
    run = layout.run(FREE_LIST)
    layout.flip(run * PAGE + 16 + 8 * 700, 1 << 20)
    assert_found(path, run, FREE_LIST, "out of range")


def test_all_findings_are_collected_up_to_the_limit(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(store)
    leaves = list(layout.leaves("index"))
    for leaf in leaves:
        layout.flip(leaf * PAGE + 10, 3)
    assert {page for page, _, _ in findings_of(store)} == set(leaves)
    monkeypatch.setattr(walk, "FINDINGS_MAX", 4)
    assert len(findings_of(store)) == 4


def test_rest_of_a_damaged_store_is_still_walked(store: Path) -> None:
    layout = Layout(store)
    layout.flip(layout.root("index") * PAGE + 10, 3)
    entries = verify_pages(store).entries
    assert (entries["index"], entries["frames"]) == (0, 11)


# ---- damage in the meta pages, seen by both functions --------------------------------------------


@pytest.mark.parametrize(
    ("at", "mask", "pattern"),
    [
        (10, 0x08, "not marked as a meta page"),
        (16, 0x10, "no LMDB meta page"),
        (20, 0x02, "format version 3"),
        (40, 0x3000, "neither|different page sizes|impossible page size|no LMDB meta page"),
        (44, 0x04, "unsupported flags"),
        (46, 0x40, "impossible depth"),
        (80, 0x01, "page"),
        (92, 0x04, "unsupported flags"),
        (94, 0x02, "is a leaf page where a branch page belongs"),
        (128, 1 << 50, "root page"),
        (136, 1 << 20, "truncated"),
        (136, 1 << 60, "impossible last page"),
        (144, 0x01, "from transactions"),
        (144, 1 << 40, "from transactions"),
    ],
)
def test_damage_in_the_newest_meta_page_is_found(
    store: Path, at: int, mask: int, pattern: str
) -> None:
    layout = Layout(store)
    layout.flip(layout.meta + at, mask)
    with pytest.raises(StoreDamagedError, match=pattern) as error:
        verify_header(store)
    assert str(store) in str(error.value)
    assert "\n" not in str(error.value)
    assert findings_of(store)


@pytest.mark.parametrize("root_of", [FREE_LIST, MAIN])
def test_damaged_header_of_a_root_page_is_found(store: Path, root_of: str) -> None:
    layout = Layout(store)
    root = layout.root(root_of)
    layout.flip(root * PAGE + 14, 1 << 15)
    with pytest.raises(StoreDamagedError, match=f"page {root}: the root of .* impossible bounds"):
        verify_header(store)
    assert_found(store, root, root_of, "impossible bounds")


def test_bad_older_meta_page_is_damage_too_but_the_newest_is_walked(store: Path) -> None:
    layout = Layout(store)
    older = PAGE - layout.meta
    layout.flip(older + 16, 1)
    with pytest.raises(StoreDamagedError, match=f"page {older // PAGE}: .* the other .* is valid"):
        verify_header(store)
    with pytest.raises(lmdb.Error):  # LMDB, too, asks for both
        open_store(store)
    report = verify_pages(store)
    assert [(f.page, f.database) for f in report.findings] == [(older // PAGE, META)]
    assert report.entries["index"] == 500


def test_no_valid_meta_page_is_damage(store: Path) -> None:
    for at in (16, PAGE + 16):
        Layout(store).flip(at, 1)
    with pytest.raises(StoreDamagedError, match="neither meta page is valid"):
        verify_header(store)
    assert_found(store, 0, META, "neither meta page is valid")


def test_pages_exchanged_are_found(store: Path) -> None:
    layout = Layout(store)
    one, two = list(layout.leaves("index"))[1:3]
    for here, there in ((one, two), (two, one)):
        bits = int.from_bytes(layout.data[here * PAGE : (here + 1) * PAGE], "little")
        bits ^= int.from_bytes(layout.data[there * PAGE : (there + 1) * PAGE], "little")
        layout.flip(here * PAGE, bits)
    assert_found(store, one, "index", f"says it is page {two}")


# ---- truncation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 151, 152, 4095, 4096, 4247, 8191])
def test_file_without_both_meta_pages_is_truncated(store: Path, length: int) -> None:
    os.truncate(store, length)
    with pytest.raises(StoreDamagedError, match=f"truncated: has {length} bytes, needs "):
        verify_header(store)
    assert findings_of(store)


def test_file_truncated_anywhere_is_found_unless_only_free_pages_are_lost(store: Path) -> None:
    layout = Layout(store)
    needed = (max(layout.used()) + 1) * PAGE
    lost = [needed - 1, needed - PAGE, *range(2 * PAGE, needed, 5 * PAGE + 1)]
    os.truncate(store, needed)
    assert_sound(store)
    for length in sorted(lost, reverse=True):
        os.truncate(store, length)
        with pytest.raises(StoreDamagedError, match=f"truncated: has {length} bytes, needs "):
            verify_header(store)
        assert findings_of(store)


# ---- what the operating system refuses -----------------------------------------------------------


@pytest.mark.parametrize("function", [verify_header, verify_pages])
def test_file_that_cannot_be_opened_is_an_access_error(
    tmp_path: Path, function: Callable[[Path], object]
) -> None:
    with pytest.raises(StoreAccessError, match="cannot be opened: No such file"):
        function(tmp_path / "data.mdb")
    with pytest.raises(StoreAccessError, match="not a regular file"):
        function(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StoreAccessError, match="not a regular file"):
        function(tmp_path / "fifo")


def test_page_the_disk_cannot_read_is_a_finding(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = leaf_of(Layout(store))
    pread = os.pread

    def failing(fd: int, length: int, offset: int) -> bytes:
        if offset == leaf * PAGE:
            raise OSError(5, "Input/output error")
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert_found(store, leaf, "index", "cannot be read: Input/output error")


# ---- writers at work -----------------------------------------------------------------------------


class Writer:
    """Rewrites 'index' in small transactions, so that pages are soon reused."""

    def __init__(self, path: Path) -> None:
        self.env = open_store(path)
        self.index = self.env.open_db(b"index")
        self.turn = 0

    def commit(self, times: int = 1) -> None:
        for _ in range(times):
            self.turn += 1
            with self.env.begin(write=True, db=self.index) as txn:
                for n in range(0, 500, 5):
                    txn.put(b"%08d" % (n * 7), b"%09d" % self.turn)


@pytest.fixture(name="writer")
def make_writer(store: Path) -> Iterator[Writer]:
    writer = Writer(store)
    writer.commit(5)
    yield writer
    writer.env.close()


def test_walk_overtaken_by_a_writer_starts_again(
    store: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "_PROGRESS_PAGES", 1)
    starts = 0

    def progress(done: int, total: int) -> None:
        nonlocal starts
        starts += done <= 2 < total
        if starts == 1:
            writer.commit(3)

    report = verify_pages(store, on_progress=progress)
    assert report.findings == ()
    assert starts > 1


def test_walk_always_overtaken_gives_up(
    store: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "_PROGRESS_PAGES", 1)
    with pytest.raises(StoreAccessError, match="written to faster than it can be checked"):
        verify_pages(store, on_progress=lambda _done, _total: writer.commit(3))


def test_walk_with_a_read_transaction_ignores_writers(
    store: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "_PROGRESS_PAGES", 1)
    with writer.env.begin():
        report = verify_pages(
            store, on_progress=lambda _done, _total: writer.commit(3), snapshot_held=True
        )
    assert report.findings == ()
    assert report.entries["index"] == 500


def test_damage_is_reported_though_a_writer_overtakes_later(
    store: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(store)
    layout.flip(PAGE - layout.meta, 1)  # the older meta page's number: LMDB does not look at it
    monkeypatch.setattr(walk, "_PROGRESS_PAGES", 3)
    report = verify_pages(store, on_progress=lambda _done, _total: writer.commit(3))
    assert [f.reason for f in report.findings][:1] == [f"says it is page {layout.meta // PAGE}"]


def test_header_gives_no_false_alarm_while_a_writer_commits(store: Path, writer: Writer) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with writer.env.begin(write=True, db=writer.index) as txn:
                txn.put(b"key", b"%d" % random.getrandbits(64))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(2000):
            verify_header(store)
    finally:
        stop.set()
        thread.join()


def test_file_being_created_is_waited_for(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new.mdb"
    path.write_bytes(b"")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        path.write_bytes(store.read_bytes())

    # In this module alone: threads of other tests may be asleep.
    monkeypatch.setattr(datafile, "time", SimpleNamespace(sleep=wait))
    verify_header(path)
    assert len(waits) == 1
