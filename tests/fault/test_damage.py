"""A data.mdb that is truncated or has flipped bits: what is whole is served, what is not is named,
and nothing is written."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.check import check_store
from dedupstore.pages import FREE_LIST, META, verify_pages
from dedupstore.store import Store
from tests.fault.conftest import Command
from tests.interop.corpus import BLOCK, Images
from tests.interop.rig import (
    PLUGIN,
    Servers,
    StoreDirectory,
    refusal,
    require_nbdkit,
)

pytestmark = pytest.mark.damaged

READING = (["ls"], ["info", "base"], ["stats"], ["diff", "base", "derived"], ["gc", "--dry-run"])
WRITING = (["clone", "base", "new"], ["rename", "base", "new"], ["rm", "clone"], ["gc"])

# Reads an image block by block; prints the offsets that fail with EIO, and a digest of the rest.
READ_BLOCKS = """\
h = connect()
digest = hashlib.sha256()
for at in range(0, h.get_size(), 4096):
    try:
        digest.update(h.pread(min(4096, h.get_size() - at), at))
    except nbd.Error as error:
        assert error.errnum == 5, error
        print(at)
print(digest.hexdigest())
h.shutdown()
"""


def plugin_refused(store: Path) -> str:
    """The line with which nbdkit refuses to start on a store."""
    require_nbdkit()
    result = subprocess.run(
        ["nbdkit", "-f", "-U-", "python", PLUGIN, f"store={store}", "image=base", "--run", "true"],
        capture_output=True,
        check=False,
        text=True,
    )
    return refusal(result.returncode, result.stderr)


def silent_or_one_line(result: tuple[int, str, str]) -> int:
    """The status of a command that did its work or failed as a command should."""
    status, _, err = result
    if status:
        refusal(status, err)
    else:
        assert err == ""
    return status


# --- truncation ---


CUTS = {
    "empty": 0.0,
    "within-the-first-page": 0.2,
    "one-page": 1.0,
    "within-the-second-page": 1.99,
    "two-pages": 2.0,
    "a-third": 1 / 3,
    "half": 1 / 2,
    "last-page-missing": -1.0,
    "last-byte-missing": -1 / BLOCK,
}
"""How much of the file is left: pages from its start, or (a third, half) a part of it, or pages
less than it needs."""


def truncate(store: StoreDirectory, cut: str) -> bytes:
    """Cut data.mdb short; return what is left."""
    data = store.path / "data.mdb"
    size = data.stat().st_size
    if cut in {"a-third", "half"}:
        os.truncate(data, int(size * CUTS[cut]))
    elif CUTS[cut] >= 0:
        os.truncate(data, int(CUTS[cut] * BLOCK))
    else:
        # Free pages at the end are no loss: a healthy file may be without them.
        while not verify_pages(data).findings:
            size -= BLOCK
            os.truncate(data, size)
        os.truncate(data, int(size + BLOCK + CUTS[cut] * BLOCK))
    return data.read_bytes()


@pytest.mark.parametrize("cut", CUTS)
def test_truncated_file_is_refused_by_every_command_in_one_line(
    store_dir: StoreDirectory, command: Command, cut: str, tmp_path: Path
) -> None:
    damaged = truncate(store_dir, cut)
    (tmp_path / "source").write_bytes(b"new")
    others = (["import", str(tmp_path / "source")], ["export", "base", str(tmp_path / "out")])
    for words in (*READING, *WRITING, *others):
        status, out, err = command(store_dir.path, *words)
        assert "data.mdb" in refusal(status, err)
        assert out == ""
    status, out, err = command(store_dir.path, "check")
    assert (status, err) == (1, "")
    assert "truncated" in out or "lies beyond the end" in out
    assert (store_dir.path / "data.mdb").read_bytes() == damaged


@pytest.mark.parametrize("cut", CUTS)
def test_repair_of_a_truncated_file_saves_what_is_left_or_says_that_nothing_is(
    store_dir: StoreDirectory, filled_store: Path, command: Command, cut: str
) -> None:
    damaged = truncate(store_dir, cut)
    data = store_dir.path / "data.mdb"
    status, _, err = command(store_dir.path, "check", "--repair", "--from", filled_store)
    if err:
        assert "init" in refusal(status, err) or "restore" in err
        assert data.read_bytes() == damaged
        return
    assert data.with_name("data.mdb.damaged").read_bytes() == damaged
    assert verify_pages(data).findings == ()
    for name in store_dir.names():
        assert command(store_dir.path, "export", name, os.devnull)[::2] == (0, "")


@pytest.mark.parametrize("cut", ["empty", "two-pages", "half", "last-page-missing"])
def test_truncated_file_is_not_served(store_dir: StoreDirectory, cut: str) -> None:
    truncate(store_dir, cut)
    assert "truncated" in plugin_refused(store_dir.path)


def test_file_of_noise_is_refused(store_dir: StoreDirectory, command: Command) -> None:
    (store_dir.path / "data.mdb").write_bytes(random.Random(1).randbytes(1 << 20))
    status, _, err = command(store_dir.path, "ls")
    assert "data.mdb" in refusal(status, err)
    assert "data.mdb" in plugin_refused(store_dir.path)


def test_missing_data_file_is_no_store(store_dir: StoreDirectory, command: Command) -> None:
    (store_dir.path / "data.mdb").unlink()
    status, _, err = command(store_dir.path, "check")
    assert "no store here" in refusal(status, err)


# --- damaged frames ---


@dataclass(frozen=True, slots=True)
class Wound:
    """A frame with a flipped bit, and the blocks of image base that lie in it."""

    frame: int
    blocks: list[int]


def wound(store: StoreDirectory, number: int) -> Wound:
    """Flip one bit, at random, in the record of one of base's frames."""
    source = random.Random(number)
    with Store(store.path) as opened:
        manifest = opened.open_manifest("base")
        frame = source.choice(sorted({ref >> 16 for ref in manifest.refs if ref}))
        hit = [
            (manifest.starts[i], manifest.starts[i + 1])
            for i, ref in enumerate(manifest.refs)
            if ref >> 16 == frame
        ]
        with opened.env.read() as txn:
            record = bytes(txn.get(fmt.frame_key(frame), db=opened.env.frames))
        opened.close_manifest(manifest)
    data = store.path / "data.mdb"
    at = data.read_bytes().index(record) + source.randrange(len(record))
    with data.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << source.randrange(8)]))
    blocks = sorted({b for start, end in hit for b in range(start - start % BLOCK, end, BLOCK)})
    return Wound(frame, blocks)


@pytest.mark.parametrize("number", range(4))
def test_bit_flip_in_a_frame_fails_its_reads_alone_and_is_logged_with_its_place(
    server: Servers, store_dir: StoreDirectory, number: int
) -> None:
    hurt = wound(store_dir, number)
    running = server(metrics=True)
    *failed, _ = running.client(READ_BLOCKS, "base").split()
    assert [int(at) for at in failed] == hurt.blocks
    assert running.metrics()["dedup_read_errors_total"] == len(hurt.blocks)
    running.expect_log(rf"pread: error: image 'base' offset \d+: chunk {hurt.frame} is damaged: ")
    offsets = [int(re.search(r"offset (\d+)", line)[1]) for line in running.log()]  # type: ignore[index]
    assert offsets == hurt.blocks


def test_images_without_the_damaged_frame_are_served_whole(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    hurt = wound(store_dir, 0)
    running = server()
    *failed, _ = running.client(READ_BLOCKS, "base").split()
    assert failed
    running.expect_log(f"chunk {hurt.frame} is damaged")
    assert running.read("ragged") == images.ragged.read_bytes()


def test_server_starts_and_other_commands_work_on_a_store_with_a_damaged_frame(
    store_dir: StoreDirectory, command: Command
) -> None:
    wound(store_dir, 1)
    for words in (*READING, *WRITING[:1]):
        assert command(store_dir.path, *words)[::2] == (0, "")


@pytest.mark.parametrize("number", range(3))
def test_export_of_a_damaged_image_names_the_place_and_leaves_no_file(
    store_dir: StoreDirectory, command: Command, tmp_path: Path, number: int
) -> None:
    hurt = wound(store_dir, number)
    status, _, err = command(store_dir.path, "export", "base", tmp_path / "out")
    line = refusal(status, err)
    assert f"image 'base' offset {hurt.blocks[0]}: chunk {hurt.frame} is damaged" in line
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("number", range(3))
def test_check_names_image_offset_and_chunk_of_a_damaged_frame(
    store_dir: StoreDirectory, command: Command, number: int
) -> None:
    hurt = wound(store_dir, number)
    status, out, err = command(store_dir.path, "check", "--json")
    assert (status, err) == (1, "")
    findings = json.loads(out)["findings"]
    assert {"base", "clone"} <= {finding["image"] for finding in findings}
    places = [x for x in findings if x["image"] == "base" and x["what"] == "chunk"]
    assert places[0]["offset"] == hurt.blocks[0]
    assert all(x["chunk"].startswith(f"{hurt.frame}.") for x in places)


def test_gc_on_a_store_with_a_damaged_frame_loses_no_other_chunk(
    store_dir: StoreDirectory, command: Command, images: Images
) -> None:
    wound(store_dir, 2)
    store_dir.remove("ragged")
    assert command(store_dir.path, "gc")[::2] == (0, "")
    assert {finding.what for finding in check_store(store_dir.path).findings} == {"chunk"}


def test_damaged_image_is_whole_again_after_repair_and_a_new_import_of_its_source(
    store_dir: StoreDirectory, command: Command, images: Images
) -> None:
    wound(store_dir, 3)
    command(store_dir.path, "check", "--repair")
    assert command(store_dir.path, "import", images.base, "again")[::2] == (0, "")
    assert store_dir.export("again") == images.base.read_bytes()


# --- damaged pages ---

_PAGE = struct.Struct("<QHHHH")


def _live_pages(data: bytes) -> Iterator[int]:
    """Pages that say they are part of a tree."""
    for page in range(2, len(data) // 4096):
        number, _, flags, _, _ = _PAGE.unpack_from(data, page * 4096)
        if number == page and flags in {1, 2}:
            yield page


@pytest.fixture(scope="module")
def wounded_pages(filled_store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Flip]:
    """Bit flips in tree and meta pages, each of which `verify_pages` finds."""
    data = (filled_store / "data.mdb").read_bytes()
    copy = tmp_path_factory.mktemp("flips") / "data.mdb"
    pages = [0, 1, *_live_pages(data)]
    source = random.Random(7)
    flips: list[Flip] = []
    while len(flips) < 40:
        page = source.choice(pages)
        size = 152 if page < 2 else 4096
        at = page * 4096 + source.randrange(min(size, 64) if source.random() < 0.5 else size)
        flip = Flip(at, 1 << source.randrange(8), "")
        flip.write(copy, data)
        report = verify_pages(copy)
        if report.findings:
            flips.append(Flip(flip.at, flip.mask, report.findings[0].database))
    return flips


@dataclass(frozen=True, slots=True)
class Flip:
    """A bit to flip in data.mdb, and the database that it hurts."""

    at: int
    mask: int
    database: str

    def write(self, path: Path, data: bytes) -> None:
        changed = bytearray(data)
        changed[self.at] ^= self.mask
        path.write_bytes(changed)

    @property
    def is_large(self) -> bool:
        """Whether it hurts one of the trees that gc and check alone walk before they write."""
        return self.database in {"frames", "chunks"}


def test_commands_on_damaged_pages_end_with_one_line_at_most_and_write_nothing(
    store_dir: StoreDirectory, command: Command, wounded_pages: list[Flip]
) -> None:
    path = store_dir.path / "data.mdb"
    data = path.read_bytes()
    for flip in wounded_pages:
        flip.write(path, data)
        damaged = path.read_bytes()
        for words in READING[:3]:
            silent_or_one_line(command(store_dir.path, *words))
        for words in WRITING:
            if flip.is_large and words != ["gc"]:
                continue
            status, _, err = command(store_dir.path, *words)
            assert "data.mdb" in refusal(status, err), flip
            assert path.read_bytes() == damaged, (flip, words)


def test_check_finds_damaged_pages_and_a_repair_makes_a_new_file(
    store_dir: StoreDirectory,
    command: Command,
    wounded_pages: list[Flip],
    filled_store: Path,
    images: Images,
) -> None:
    path = store_dir.path / "data.mdb"
    data = path.read_bytes()
    for number, flip in enumerate(wounded_pages):
        flip.write(path, data)
        damaged = path.read_bytes()
        status, out, err = command(store_dir.path, "check")
        assert (status, err) == (1, ""), flip
        assert "page" in out
        assert path.read_bytes() == damaged
        if number % 8 == 0:
            repair = ("check", "--repair", "--from", filled_store)
            assert command(store_dir.path, *repair)[::2] == (0, ""), flip
            assert store_dir.export("clone") == images.base.read_bytes()
            assert store_dir.export("ragged") == images.ragged.read_bytes()


def test_plugin_does_not_start_on_damaged_pages_that_it_would_follow(
    store_dir: StoreDirectory, wounded_pages: list[Flip]
) -> None:
    path = store_dir.path / "data.mdb"
    data = path.read_bytes()
    databases = {flip.database: flip for flip in wounded_pages if flip.database != "chunks"}
    assert {META, FREE_LIST, "frames"} <= databases.keys()
    for flip in databases.values():
        flip.write(path, data)
        assert "data.mdb" in plugin_refused(store_dir.path), flip
