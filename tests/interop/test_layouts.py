"""EROFS in the layouts that mkfs.erofs offers: byte-exact through the store, and mounted by the
kernel equal to the tree it was made of, file by file."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedupstore.check import check_store
from dedupstore.export import export_image
from dedupstore.store import Store
from tests.interop.rig import (
    PATIENCE_SECONDS,
    Servers,
    StoreDirectory,
    mounts_below,
    no_progress,
    wait_until,
)
from tests.programs import (
    erofs_options_honoured,
    erofs_programs,
    require_program,
    require_root,
    unavailable,
)

LAYOUTS = {
    "plain": (),
    "noinline": ("-Enoinline_data",),
    "chunks-4K": ("--chunksize=4096",),
    "chunks-64K": ("--chunksize=65536",),
    "compact-inodes": ("--ignore-mtime",),
    "extended-inodes": ("-Eforce-inode-extended",),
    "xattrs-everywhere-inline": ("-x100",),
    "lz4": ("-zlz4",),
    "lz4hc": ("-zlz4hc",),
    "lz4hc-noinline": ("-zlz4hc", "-Enoinline_data"),
    "lz4hc-legacy": ("-zlz4hc", "-Elegacy-compress"),
    "lz4hc-64K-clusters": ("-zlz4hc", "-C65536"),
    "lz4hc-ztailpacking": ("-zlz4hc", "-Eztailpacking"),
    "lz4hc-fragments": ("-zlz4hc", "-Efragments"),
    "lz4hc-all-fragments": ("-zlz4hc", "-Eall-fragments"),
    "lz4hc-dedupe": ("-zlz4hc", "-Ededupe"),
    "lz4hc-dedupe-fragments": ("-zlz4hc", "-Ededupe,fragments"),
    "lzma": ("-zlzma",),
    "lzma-64K-clusters-ztailpacking": ("-zlzma", "-C65536", "-Eztailpacking"),
    "deflate": ("-zdeflate",),
    "deflate-64K-clusters-fragments": ("-zdeflate", "-C65536", "-Efragments"),
    "zstd": ("-zzstd",),
    "zstd-64K-clusters-dedupe-fragments": ("-zzstd", "-C65536", "-Ededupe,fragments"),
}
OPTIONAL_IN_KERNEL = ("lzma", "deflate", "zstd")  # each has a switch in the kernel's configuration
NO_OWN_MTIME = {"compact-inodes"}


def write_tree(tree: Path) -> Path:
    """A tree with every kind of inode that EROFS knows and files of every size class."""
    source = random.Random(11)
    text = " ".join(source.choices([f"word{i}" for i in range(300)], k=60_000)).encode()
    files = {
        "empty": b"",
        "one-byte": b"x",
        "tail-only": text[:700],
        "one-block": text[:4096],
        "block-and-tail": text[:4097],
        "text": text,
        "noise": source.randbytes(200_003),
        "mixed": text[:90_000] + source.randbytes(90_000) + text[:90_000],
        "same-as-text": text,
        "zeros": bytes(300_000),
        "deep/er/and/er": text[1000:30_000],
        "größe-Ω": text[:5000],
        "setuid": text[:100],
    }
    for name, data in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with (tree / "sparse").open("wb") as sparse:
        sparse.truncate(2 << 20)
        sparse.seek(1 << 20)
        sparse.write(text[:10_000])
    (tree / "many").mkdir()
    for i in range(300):
        (tree / "many" / f"entry-with-a-rather-long-name-{i}").write_bytes(b"%d" % (i % 7))
    (tree / "link").symlink_to("text")
    (tree / "long-link").symlink_to("d/" * 1000 + "end")
    (tree / "hard").hardlink_to(tree / "noise")
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "device", stat.S_IFCHR | 0o640, os.makedev(259, 70_000))
    os.chown(tree / "text", 1234, 70_000)
    os.chown(tree / "link", 3, 4, follow_symlinks=False)
    (tree / "setuid").chmod(0o6751)
    (tree / "many").chmod(0o1777)
    os.setxattr(tree / "text", "user.comment", b"a comment")
    os.setxattr(tree / "empty", "user.large", source.randbytes(600))
    os.setxattr(tree / "many", "trusted.overlay.opaque", b"y")
    for i, path in enumerate(sorted(tree.rglob("*"))):
        os.utime(path, ns=(0, 1_600_000_000_000_000_000 + i * 1_000_000_007), follow_symlinks=False)
    os.utime(tree, (1, 1))
    return tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_root()
    return write_tree(tmp_path_factory.mktemp("layouts") / "tree")


def build(tree: Path, image: Path, layout: str) -> Path:
    """The tree's image in a layout, by the first mkfs.erofs that knows it."""
    for program in erofs_programs("mkfs.erofs"):
        command = [program, "--quiet", *LAYOUTS[layout], image, tree]
        done = subprocess.run(command, check=False, capture_output=True)
        if done.returncode == 0 and erofs_options_honoured(LAYOUTS[layout], image):
            return image
    unavailable(f"no mkfs.erofs here can {layout}")


@contextmanager
def nbdfuse(uri: str, directory: Path) -> Iterator[Path]:
    """A file that is the NBD export."""
    require_program("nbdfuse", "fusermount3" if shutil.which("fusermount3") else "fusermount")
    directory.mkdir()
    file = directory / "image"
    with subprocess.Popen(["nbdfuse", "-r", file, uri], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: directory in mounts_below(directory) or process.poll() is not None)
            assert process.poll() is None
            yield file
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)
            for point in mounts_below(directory):
                subprocess.run(["umount", "--lazy", point], check=True)


@contextmanager
def kernel_mount(image: Path, point: Path) -> Iterator[Path]:
    """The kernel's EROFS on a file, without the loop device that mount(8) would put under it."""
    if error := mount_erofs(image, point):
        unavailable(f"kernel: {os.strerror(error)}")
    try:
        yield point
    finally:
        unmount(point)


def mount_erofs(image: Path, point: Path) -> int:
    """Make the directory and mount the image there; returns 0 or the kernel's errno."""
    point.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    read_only = 1
    failed = libc.mount(os.fsencode(image), os.fsencode(point), b"erofs", read_only, None)
    return ctypes.get_errno() if failed else 0


def unmount(point: Path) -> None:
    assert ctypes.CDLL(None).umount2(os.fsencode(point), 0) == 0


def kernel_decompresses(image: Path, point: Path) -> bool:
    """Ask the kernel with the image itself; EROFS refuses a compressor it was built without."""
    error = mount_erofs(image, point)
    if not error:
        unmount(point)
    return error != errno.EOPNOTSUPP


Inode = tuple[object, ...]


def inventory(root: Path, *, mtimes: bool) -> dict[str, Inode]:
    """Everything that a mounted tree shows, by relative path."""
    groups: dict[int, list[str]] = {}
    found: dict[str, Inode] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        name = str(path.relative_to(root))
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
            groups.setdefault(status.st_ino, []).append(name)
        elif stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        found[name] = (
            content,
            oct(status.st_mode),
            (status.st_uid, status.st_gid),
            0 if stat.S_ISDIR(status.st_mode) else status.st_size,
            0 if stat.S_ISDIR(status.st_mode) else status.st_nlink,
            status.st_rdev,
            status.st_mtime_ns if mtimes else 0,
            {x: os.getxattr(path, x, follow_symlinks=False) for x in xattrs(path)},
        )
    for names in groups.values():
        for name in names:
            found[name] = (*found[name], tuple(names))
    return found


def xattrs(path: Path) -> list[str]:
    return sorted(x for x in os.listxattr(path, follow_symlinks=False) if x != "security.selinux")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_comes_back_byte_for_byte_and_mounts_like_its_tree(
    server: Servers, tree: Path, tmp_path: Path, layout: str
) -> None:
    image = build(tree, tmp_path / "image.erofs", layout)
    path = tmp_path / "layouts"
    with Store.create(path) as store:
        store.import_path(image, "image", no_progress)
        export_image(store, "image", tmp_path / "exported", no_progress)
        assert store.image("image").kind == "erofs"
    assert (tmp_path / "exported").read_bytes() == image.read_bytes()
    assert check_store(path).findings == ()
    if layout.startswith(OPTIONAL_IN_KERNEL) and not kernel_decompresses(image, tmp_path / "asked"):
        return  # byte for byte is all that can be asked for here

    running = server(store=path)
    wanted = inventory(tree, mtimes=layout not in NO_OWN_MTIME)
    with (
        nbdfuse(running.uri("image"), running.directory / "fuse") as file,
        kernel_mount(file, tmp_path / "mounted") as mounted,
    ):
        found = inventory(mounted, mtimes=layout not in NO_OWN_MTIME)
        assert found.keys() == wanted.keys()
        for name, inode in wanted.items():
            assert found[name] == inode, name


def test_directory_import_mounts_like_the_directory(
    server: Servers, empty_store_dir: StoreDirectory, tree: Path, tmp_path: Path
) -> None:
    empty_store_dir.do("import", tree, "tree")
    running = server(store=empty_store_dir.path)
    with (
        nbdfuse(running.uri("tree"), running.directory / "fuse") as file,
        kernel_mount(file, tmp_path / "mounted") as mounted,
    ):
        found = inventory(mounted, mtimes=True)
    assert found == inventory(tree, mtimes=True)


def test_clone_mounts_beside_its_original(
    server: Servers, empty_store_dir: StoreDirectory, tree: Path, tmp_path: Path
) -> None:
    empty_store_dir.do("import", tree, "tree")
    empty_store_dir.do("clone", "tree", "clone")
    running = server(store=empty_store_dir.path, metrics=True)
    with (
        nbdfuse(running.uri("tree"), running.directory / "a") as a,
        kernel_mount(a, tmp_path / "one") as one,
        nbdfuse(running.uri("clone"), running.directory / "b") as b,
        kernel_mount(b, tmp_path / "two") as two,
    ):
        first = inventory(one, mtimes=True)
        before = running.metrics()["dedup_store_reads_total"]
        assert inventory(two, mtimes=True) == first
        assert running.metrics()["dedup_store_reads_total"] == before > 0
