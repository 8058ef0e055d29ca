"""Images that tests import: small, deterministic, built once a session."""

from __future__ import annotations

import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.programs import require_program

BLOCK = 4096
# Where ragged.raw has data, as (start, end) in bytes; all else is a hole. Its end is on no boundary
# that a disk or a file system knows.
RAGGED_SIZE = (3 << 20) + 1237
RAGGED_DATA = (
    (0, 17 * BLOCK),
    (200 * BLOCK, 201 * BLOCK),
    (300 * BLOCK, 420 * BLOCK),
    (700 * BLOCK, RAGGED_SIZE),
)


@dataclass(frozen=True, slots=True)
class Images:
    """`derived` is `base` with some files changed and some added; `noise` does not compress."""

    base_tree: Path
    base: Path
    derived: Path
    ragged: Path
    noise: Path


def build_images(directory: Path) -> Images:
    """Write all images into `directory`."""
    base_tree, derived_tree = directory / "base", directory / "derived"
    _write_tree(base_tree, {})
    _write_tree(derived_tree, {7: 70_001, 23: 9_000, 41: 150_000})
    for i in range(5):
        (derived_tree / f"added-{i}").write_bytes(_content(random.Random(1000 + i), 60_000))
    noise = directory / "noise.raw"
    noise.write_bytes(random.Random(4).randbytes(16 << 20))
    return Images(
        base_tree,
        make_erofs(base_tree, directory / "base.erofs"),
        make_erofs(derived_tree, directory / "derived.erofs"),
        write_ragged(directory / "ragged.raw"),
        noise,
    )


def make_erofs(tree: Path, image: Path, *options: str) -> Path:
    """Build an image with mkfs.erofs, its build time fixed."""
    require_program("mkfs.erofs")
    subprocess.run(
        ["mkfs.erofs", "--quiet", *options, image, tree],
        check=True,
        capture_output=True,
    )
    return image


def write_ragged(image: Path) -> Path:
    """A raw image with holes, RAGGED_SIZE bytes long."""
    source = random.Random(3)
    with image.open("wb") as file:
        file.truncate(RAGGED_SIZE)
        for start, end in RAGGED_DATA:
            file.seek(start)
            file.write(source.randbytes(end - start))
    return image


def _write_tree(tree: Path, changed: dict[int, int]) -> None:
    tree.mkdir()
    for number in range(60):
        source = random.Random(number)
        size = changed.get(number, source.choice((0, 100, 5_000, 40_000, 90_000, 300_000)))
        if number in changed:
            source = random.Random(-number)
        path = tree / f"directory-{number % 5}" / f"file-{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_content(source, size))
        os.utime(path, (0, 0))
    for path in tree.rglob("*"):
        os.utime(path, (0, 0))
    os.utime(tree, (0, 0))


def _content(source: random.Random, size: int) -> bytes:
    """Half words, half noise: compresses like ordinary files do."""
    words = [source.randbytes(6).hex().encode() for _ in range(50)]
    text = b" ".join(source.choices(words, k=size // 24 + 1))
    return (text + source.randbytes(size))[: size // 2] + source.randbytes(size - size // 2)
