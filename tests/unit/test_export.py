"""Writing images back."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.errors import ChunkDamagedError, ImageNotFoundError, TargetError
from dedupstore.export import _stretches, export_image
from dedupstore.frames import FrameLoader
from dedupstore.imported import Imported
from dedupstore.manifest import Manifest
from dedupstore.store import Store
from tests.conftest import blocks, flip_record, keys_of, noise, silent, text

Add = Callable[[str, bytes], Imported]

IMAGES = {
    "mixed": noise(1, 1_000_000) + bytes(3 << 20) + text(2, 700_000) + noise(1, 1_000_000) + b"end",
    "empty": b"",
    "one byte": b"x",
    "zeros": bytes(2 << 20),
    "ends in a hole": blocks(1) + bytes(1 << 20),
    "begins with a hole": bytes(1 << 20) + blocks(1),
}
IMAGES["alternating frames"] = blocks(*range(1, 150), *range(149, 1, -1), 0, *range(1, 150, 7))
EACH_IMAGE = pytest.mark.parametrize("data", IMAGES.values(), ids=IMAGES)


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder to export to."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@EACH_IMAGE
def test_exported_file_is_byte_identical(store: Store, add: Add, out: Path, data: bytes) -> None:
    add("image", data)
    export_image(store, "image", out / "image", silent)
    assert (out / "image").read_bytes() == data
    assert files_in(out) == ["image"]


@EACH_IMAGE
def test_exported_stream_is_byte_identical(
    store: Store, add: Add, data: bytes, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    add("image", data)
    export_image(store, "image", None, silent)
    assert capfdbinary.readouterr().out == data


def test_image_that_wanders_between_frames_loads_each_once(
    store: Store, add: Add, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two images' frames, then a third image that takes long turns from one and the other.
    turns = [range(first, first + 32) for first in range(1, 513, 32)]
    evens, odds = turns[0::2], turns[1::2]
    add("evens", b"".join(blocks(*turn) for turn in evens))
    add("odds", b"".join(blocks(*turn) for turn in odds))
    add("both", b"".join(blocks(*turn) for turn in turns))
    loaded: list[int] = []
    load = FrameLoader.load

    def counting(loader: FrameLoader, frame: int) -> tuple[bytes, tuple[int, ...]]:
        loaded.append(frame)
        return load(loader, frame)

    monkeypatch.setattr(FrameLoader, "load", counting)
    export_image(store, "both", out / "image", silent)
    assert (out / "image").read_bytes() == b"".join(blocks(*turn) for turn in turns)
    assert len(loaded) == len(set(loaded)) > 4


def test_stretches_cover_the_image_and_are_bounded_in_bytes_and_runs() -> None:
    lengths = array("Q", [1] * 2500 + [1 << 30] + [200 << 10] * 7)
    refs = array("Q", [*range(1 << 16, 2500 + (1 << 16)), 0, *(n << 17 for n in range(1, 8))])
    counts = array("I", [1 if ref else 0 for ref in refs])
    zeros = 1 << 30
    record = fmt.ManifestRecord(sum(lengths), sum(counts), 1, zeros, lengths, refs, counts)
    stretches = list(_stretches(Manifest(bytes(32), record)))
    assert [run for stretch in stretches for run in stretch] == list(range(len(refs)))
    # IOV_MAX is 1024.
    assert [len(stretch) for stretch in stretches] == [1000, 1000, 500, 1, 6, 1]


def test_holes_take_no_space(store: Store, add: Add, out: Path) -> None:
    size = 16 << 20
    add("image", blocks(1) + bytes(size) + blocks(2))
    export_image(store, "image", out / "image", silent)
    status = (out / "image").stat()
    assert status.st_size == size + 8192
    assert status.st_blocks * 512 < size // 4


def test_progress_adds_up_to_the_size(store: Store, add: Add, out: Path) -> None:
    data = IMAGES["mixed"]
    add("image", data)
    steps: list[tuple[int, int]] = []
    export_image(store, "image", out / "image", lambda *step: steps.append(step))
    assert sum(step for step, _ in steps) == len(data)
    assert {total for _, total in steps} == {len(data)}


def test_existing_file_is_replaced_as_a_whole(store: Store, add: Add, out: Path) -> None:
    add("image", blocks(1))
    (out / "image").write_bytes(noise(9, 100_000))
    export_image(store, "image", out / "image", silent)
    assert (out / "image").read_bytes() == blocks(1)


def test_pipe_is_written_in_place(store: Store, add: Add, out: Path) -> None:
    data = IMAGES["mixed"]
    add("image", data)
    os.mkfifo(out / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((out / "pipe").read_bytes()))
    reader.start()
    export_image(store, "image", out / "pipe", silent)
    reader.join()
    assert got == [data]
    assert files_in(out) == ["pipe"]


@pytest.mark.damaged
@pytest.mark.parametrize("frame", [0, -1])
def test_damage_leaves_no_file_and_names_image_and_offset(
    store: Store, add: Add, out: Path, frame: int
) -> None:
    add("image", noise(1, 2 << 20))
    flip_record(store, "frames", keys_of(store, "frames")[frame], -1)
    with pytest.raises(ChunkDamagedError) as caught:
        export_image(store, "image", out / "image", silent)
    assert caught.value.image == "image"
    assert caught.value.offset is not None
    assert files_in(out) == []


@pytest.mark.damaged
def test_damage_leaves_the_file_that_was_there(store: Store, add: Add, out: Path) -> None:
    add("image", noise(1, 2 << 20))
    (out / "image").write_bytes(b"precious")
    flip_record(store, "frames", keys_of(store, "frames")[-1], -1)
    with pytest.raises(ChunkDamagedError):
        export_image(store, "image", out / "image", silent)
    assert (out / "image").read_bytes() == b"precious"
    assert files_in(out) == ["image"]


@pytest.mark.damaged
@pytest.mark.parametrize("slots", [0, 1])
def test_chunk_that_its_frame_does_not_hold_is_damage(
    store: Store, add: Add, out: Path, slots: int
) -> None:
    add("image", noise(1, 200_000) + bytes(4096) + blocks(7))
    (key,) = keys_of(store, "frames")
    record = store.loader()._codecs.encode([fmt.DROPPED] * slots, b"")
    fmt.seal_frame(record, fmt.decode_frame_key(key))
    with store.env.write() as txn:
        txn.put(key, bytes(record), db=store.env.frames)
    with pytest.raises(ChunkDamagedError, match="'image'"):
        export_image(store, "image", out / "image", silent)
    manifest = store.open_manifest("image")
    manifest.refs[0] += 3
    with pytest.raises(ChunkDamagedError, match="'image'"):
        export_image(store, "image", out / "image", silent)
    store.close_manifest(manifest)
    assert files_in(out) == []


def test_missing_image_leaves_no_file(store: Store, out: Path) -> None:
    with pytest.raises(ImageNotFoundError):
        export_image(store, "nothing", out / "image", silent)
    assert files_in(out) == []


@pytest.mark.parametrize("target", ["missing/image", ".", "x" * 300])
def test_target_that_cannot_be_written_is_a_target_error(
    store: Store, add: Add, out: Path, target: str
) -> None:
    add("image", blocks(1))
    with pytest.raises(TargetError) as caught:
        export_image(store, "image", out / target, silent)
    assert "\n" not in str(caught.value)
    assert files_in(out) == []
    assert store.leases._held == {}


def test_interrupted_export_leaves_no_file(store: Store, add: Add, out: Path) -> None:
    add("image", noise(1, 1 << 20))

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_image(store, "image", out / "image", interrupt)
    assert files_in(out) == []
    assert store.leases._held == {}


def test_name_removed_during_the_export_does_not_matter(store: Store, add: Add, out: Path) -> None:
    data = noise(1, 8 << 20)
    add("image", data)

    def remove(_done: int, _total: int) -> None:
        if store.names():
            store.remove(["image"])
            store.collect_garbage()

    export_image(store, "image", out / "image", remove)
    assert (out / "image").read_bytes() == data
