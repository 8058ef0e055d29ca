"""Whatever an image's bytes are, it is imported and exported as it came, at a bounded cost."""

from __future__ import annotations

import os
import random
import resource
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.errors import NotShareableError
from dedupstore.export import export_image
from dedupstore.store import Store
from dedupstore.views import ensure_view
from tests.conftest import silent
from tests.interop.corpus import make_erofs
from tests.interop.rig import DEDUPSTORE
from tests.programs import erofs_programs
from tools.fuzzing import images
from tools.fuzzing.messages import check_message

MUTATED = 60  # of each image
# What a command may cost that imports a crafted image of some megabytes. Measured are 2 s and 110
# MiB; Python and the libraries alone take 60.
COMMAND_BYTES_MAX = 512 << 20
COMMAND_CPU_SECONDS_MAX = 60
ROOT = 36  # nids count 32 bytes
DIRECTORY, REGULAR = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644
PLAIN, INLINE, CHUNKS = 0, 2, 4


def sound_images(directory: Path) -> dict[str, bytes]:
    """Images of both writers, with contents and without, compressed and not."""
    tree = directory / "tree"
    (tree / "deep" / "deeper").mkdir(parents=True)
    source = random.Random(5)
    for number in range(40):
        (tree / "deep" / f"{number:030}").write_bytes(source.randbytes(number * 97))
    (tree / "text").write_bytes(b"".join(b"%d " % n for n in range(9000)))
    found = {"written": images.written(fingerprints=True), **images.drawn()}
    for name, options in {
        "mkfs": (),
        "mkfs-lz4": ("-zlz4hc", "-C16384"),
        "mkfs-chunks": ("--chunksize=4096", "-Eforce-chunk-indexes"),
    }.items():
        found[name] = make_erofs(tree, directory / name, *options).read_bytes()
    for program in erofs_programs("mkfs.erofs")[1:]:
        for name, options in {
            "zstd": ("-zzstd", "-C16384"),
            "fragments": ("-zlz4hc", "-Ededupe,fragments"),
            "metabox": ("-m4096", "--xattr-prefix=user.note."),
        }.items():
            command = [program, "--quiet", *options, directory / name, tree]
            subprocess.run(command, check=True, capture_output=True)
            found[f"new-{name}"] = (directory / name).read_bytes()
    return found


def mutated(image: bytes, rng: random.Random) -> bytes:
    """The image with some of its bytes, most of them of metadata, changed, moved or cut off."""
    changed = bytearray(image)
    used = [at for at in range(1024, len(image)) if image[at]]
    for _ in range(rng.randrange(1, 9)):
        at = rng.choice(used)
        what = rng.random()
        if what < 0.4:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif what < 0.6:
            changed[at & ~3 : (at & ~3) + 4] = struct.pack(
                "<I", rng.choice((0, 1 << 31, 0xFFFFFFFF))
            )
        elif what < 0.9:
            other, length = rng.choice(used) & ~31, rng.choice((32, 64, 512))
            changed[at & ~31 : (at & ~31) + length] = image[other : other + length]
        else:
            changed[1024 + rng.randrange(144)] ^= 1 << rng.randrange(8)
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed)) :]
    else:
        del changed[len(image) :]
    return bytes(changed)


def test_mutated_images_are_exported_as_they_came(store: Store, tmp_path: Path) -> None:
    kinds: dict[str, int] = {}
    source, target = tmp_path / "source", tmp_path / "target"
    for name, image in sound_images(tmp_path).items():
        rng = random.Random(name)
        count = MUTATED if name.startswith(("mkfs", "new", "written")) else MUTATED // 10
        for number in range(count):
            data = mutated(image, rng)
            source.write_bytes(data)
            label = f"{name}-{number}"
            store.import_path(source, label, silent, reread=True)
            export_image(store, label, target, silent)
            assert target.read_bytes() == data, label
            target.unlink()
            kind = store.image(label).kind
            kinds[kind] = kinds.get(kind, 0) + 1
    assert kinds["raw"] > 100, "hardly any was refused by the parser"
    assert kinds["erofs"] > 100, "hardly any got past the superblock"


def test_views_of_mutated_images_are_made_or_refused(store: Store, tmp_path: Path) -> None:
    made = refused = 0
    source = tmp_path / "source"
    for name in ("written", "xattrs", "indexes", "table"):
        image = images.drawn().get(name) or images.written(fingerprints=True)
        rng = random.Random(name)
        for number in range(15):
            source.write_bytes(mutated(image, rng))
            label = f"{name}-{number}"
            store.import_path(source, label, silent, reread=True)
            digest = bytes.fromhex(store.image(label).digest)
            try:
                ensure_view(store, digest, fmt.VIEW_KERNEL, silent)
                ensure_view(store, digest, fmt.VIEW_POOL, silent)
                made += 1
            except NotShareableError as error:
                check_message(error)
                refused += 1
    assert made
    assert refused


# --- amplifiers: small images that claim much -------------------------------------------------


def inode(layout: int, mode: int, size: int, first: int = 0, xattrs: int = 0) -> bytes:
    """An extended inode."""
    head = struct.pack("<HHHHQI", layout << 1 | 1, xattrs, mode, 0, size, first)
    return head + bytes(44)


def entries(*names: tuple[bytes, int]) -> bytes:
    at = 12 * len(names)
    head = b""
    for name, nid in names:
        head += struct.pack("<QHxx", nid, at)
        at += len(name)
    return head + b"".join(name for name, _ in names)


def draw(parts: dict[int, bytes], size: int, block_bits: int = 12, xattr_block: int = 0) -> bytes:
    image = bytearray(size)
    head = struct.pack("<I8xBBH", 0xE0F5E1E2, block_bits, 0, ROOT)
    tail = struct.pack("<III", size >> block_bits, 0, xattr_block)
    for at, data in {1024: head, 1024 + 36: tail, **parts}.items():
        image[at : at + len(data)] = data
    return bytes(image)


def one_file(file: bytes, size: int = 1 << 20, **more: int) -> bytes:
    """A root with one file, whose inode and what follows begin at block 1."""
    listing = entries((b".", ROOT), (b"..", ROOT), (b"f", 128))
    return draw(
        {ROOT * 32: inode(INLINE, DIRECTORY, len(listing)) + listing, 4096: file}, size, **more
    )


def directory_that_names_itself() -> bytes:
    listing = entries((b".", ROOT), (b"..", ROOT), *[(b"%d" % n, ROOT) for n in range(3)])
    return draw({ROOT * 32: inode(INLINE, DIRECTORY, len(listing)) + listing}, 1 << 20)


def directories_that_share_their_blocks() -> bytes:
    """4,000 directories, each of which lists all 4,000 from the same blocks."""
    count = 4000
    names = [(b"%04d" % n, 128 + 2 * n) for n in range(count)]
    listing = b""
    for at in range(0, count, 250):
        block = entries(*names[at : at + 250])
        listing += block.ljust(4096, b"\0")
    start = 512 << 10
    one = inode(PLAIN, DIRECTORY, len(listing), start >> 12)
    parts = {ROOT * 32: one, start: listing}
    parts |= {nid * 32: one for _, nid in names}
    return draw(parts, 4 << 20)


def shared_attributes_that_overlap() -> bytes:
    """Every fourth byte of an area begins an attribute of 64 KB, and inodes ask for all of them."""
    area_at, area = 2 << 20, struct.pack("<BBH", 1, 1, 0xFFFF) * (1 << 18)
    inodes, names = {}, []
    for n in range(1000):
        nid = 4096 // 32 + n * 40
        ids = struct.pack("<255I", *(range(n * 255, n * 255 + 255)))
        body = struct.pack("<IB7x", 0, 255) + ids
        inodes[nid * 32] = inode(PLAIN, REGULAR, 0, 0, 1 + 255) + body
        names.append((b"%04d" % n, nid))
    listing = b"".join(
        entries(*names[at : at + 250]).ljust(4096, b"\0") for at in range(0, len(names), 250)
    )
    start = 3 << 20
    parts = {ROOT * 32: inode(PLAIN, DIRECTORY, len(listing), start >> 12), start: listing}
    parts |= {area_at: area} | inodes
    return draw(parts, 4 << 20, xattr_block=area_at >> 12)


AMPLIFIERS: dict[str, Callable[[], bytes]] = {
    "itself": directory_that_names_itself,
    "shared-blocks": directories_that_share_their_blocks,
    "shared-attributes": shared_attributes_that_overlap,
    "file-of-2^63": lambda: one_file(inode(PLAIN, REGULAR, 1 << 63, 1)),
    "file-of-2^64-1": lambda: one_file(inode(PLAIN, REGULAR, (1 << 64) - 1, 1)),
    "directory-of-2^63": lambda: one_file(inode(PLAIN, DIRECTORY, 1 << 63, 1)),
    "map-of-2^63": lambda: one_file(inode(CHUNKS, REGULAR, 1 << 63, 0)),
    "chunks-of-2^43": lambda: one_file(inode(CHUNKS, REGULAR, 1 << 62, 31) + b"\1\0\0\0" * 999),
    "directory-in-chunks-of-2^43": lambda: one_file(
        inode(CHUNKS, DIRECTORY, 1 << 62, 31) + b"\1\0\0\0" * 999
    ),
    "blocks-far-apart": lambda: one_file(
        inode(CHUNKS, REGULAR, 4 << 30, 0)
        + struct.pack("<1000000I", *(n * 7919 % 500_000 * 2 for n in range(1_000_000))),
        8 << 20,
        block_bits=12,
    ),
    "index-of-2^48": lambda: one_file(
        inode(1, REGULAR, 1 << 60, 1) + struct.pack("<IHBB", 0xFFFFFFFF, 1 | 3 << 1, 0xFF, 0x7F)
    ),
    "attributes-of-256-KB": lambda: one_file(inode(PLAIN, REGULAR, 0, 0, 0xFFFF)),
}


def limited() -> None:
    """In the child: memory that is its own (the store's map is the file's), and CPU time."""
    resource.setrlimit(resource.RLIMIT_DATA, (COMMAND_BYTES_MAX, COMMAND_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (COMMAND_CPU_SECONDS_MAX, COMMAND_CPU_SECONDS_MAX))


def dedupstore(store: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEDUPSTORE, "--store", store, *arguments],
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )


@pytest.fixture(scope="module")
def limited_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("limited") / "store"
    Store.create(path).close()
    return path


@pytest.mark.parametrize("name", AMPLIFIERS)
def test_amplifier_costs_little(limited_store: Path, tmp_path: Path, name: str) -> None:
    image = AMPLIFIERS[name]()
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(image)
    done = dedupstore(limited_store, "import", source, name)
    assert (done.returncode, done.stderr) == (0, "")
    done = dedupstore(limited_store, "export", name, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert target.read_bytes() == image


VIEW = """
import sys
from pathlib import Path
from dedupstore import format as fmt
from dedupstore.errors import DedupError
from dedupstore.store import Store
from dedupstore.views import ensure_view
with Store(Path(sys.argv[1])) as store:
    digest = bytes.fromhex(store.image(sys.argv[2]).digest)
    for kind in (fmt.VIEW_KERNEL, fmt.VIEW_POOL):
        try:
            ensure_view(store, digest, kind, lambda done, total: None)
        except DedupError as error:
            print(error)
"""


@pytest.mark.parametrize("name", AMPLIFIERS)
def test_view_of_an_amplifier_costs_little(store: Store, tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(AMPLIFIERS[name]())
    store.import_path(source, name, silent)
    path = store.path
    store.close()
    python = DEDUPSTORE.with_name("python")
    done = subprocess.run(
        [python, "-c", VIEW, path, name],
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]


@pytest.mark.parametrize("size", [1 << 40, (1 << 63) - 4096])
def test_sparse_image_of_any_size_takes_the_time_of_its_data(
    limited_store: Path, tmp_path: Path, size: int
) -> None:
    head = images.written(fingerprints=True)
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.write(head)
        try:
            os.truncate(file.fileno(), size)
        except OSError:
            os.truncate(file.fileno(), 1 << 43)  # what ext4 can hold
    name = f"sparse-{size}"
    done = dedupstore(limited_store, "import", source, name, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert '"kind": "erofs"' in dedupstore(limited_store, "info", name, "--json").stdout
