"""Images of our own writer against other implementations: erofs-utils old and new, the kernel, and
GNU tar's idea of what an archive holds."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedupstore.erofs.tree import Directory, RegularFile
from dedupstore.erofs.writer import scan_directory, scan_tar, write_image
from tests.erofs_parser import Image, with_checksum
from tests.interop.test_layouts import inventory, kernel_mount, write_tree
from tests.programs import erofs_programs, require_program, require_root, unavailable

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, bits, ident)
    for tag, bits, ident in [
        (1, 7, 0xFFFFFFFF),
        (2, 4, 1234),
        (4, 5, 0xFFFFFFFF),
        (8, 6, 70_000),
        (16, 5, 0xFFFFFFFF),
        (32, 0, 0xFFFFFFFF),
    ]
)
TAR_OPTIONS = ("--sparse", "--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner")
# The kernel mounts blocks up to its page size, erofs-utils 1.5 know only 4096.
BLOCK_SIZES = (512, 1024, 2048, 4096)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `write_tree` makes, and what only a writer of one's own gets wrong."""
    require_root()
    tree = write_tree(tmp_path_factory.mktemp("writer") / "tree")
    (tree / "hole").touch()
    os.truncate(tree / "hole", 3 << 20)
    with (tree / "fragmented").open("wb") as file:
        for at in range(0, 4 << 20, 256 << 10):
            file.seek(at + 5000)
            file.write(b"data at %d" % at)
        file.truncate((4 << 20) + 1)
    os.link(tree / "link", tree / "second-link-of-a-link", follow_symlinks=False)
    os.link(tree / "device", tree / "second-device")
    os.mknod(tree / "block-device", stat.S_IFBLK | 0o600, os.makedev(8, 1))
    os.mknod(tree / "socket", stat.S_IFSOCK | 0o600)
    Path(os.fsdecode(os.fsencode(tree) + b"/\xff-no-text")).write_bytes(b"x" * 5000)
    (tree / ("n" * 255)).write_bytes(b"y")
    for name in ("text", "noise", "many"):
        os.setxattr(tree / name, "user.shared", b"the same for all " * 20)
    os.setxattr(tree / "text", "system.posix_acl_access", ACL)
    os.setxattr(tree / "many", "system.posix_acl_default", ACL)
    os.setxattr(tree / "setuid", "security.capability", struct.pack("<IIIII", 1 << 25, 4, 0, 0, 0))
    os.utime(tree / "one-byte", ns=(0, -1_500_000_000))
    os.utime(tree, ns=(0, 999_999_999))
    return tree


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "fingerprints"])
def image(
    request: pytest.FixtureRequest, tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("image") / "image"
    return write(scan_directory(tree), path, fingerprints=request.param)


def write(root: Directory, path: Path, *, fingerprints: bool, block_bytes: int = 4096) -> Path:
    with path.open("wb") as out:
        write_image(root, out, fingerprints=fingerprints, block_bytes=block_bytes)
    return path


def newest(name: str) -> str:
    """The program of erofs-utils 1.9 or later."""
    program = erofs_programs(name)[-1]
    version = subprocess.run([program, "-V"], check=False, capture_output=True, text=True)
    found = (version.stdout + version.stderr).replace(")", "").split()
    numbers = [word for word in found if word[:1].isdigit()]
    if tuple(map(int, numbers[0].split(".")[:2])) < (1, 9):
        unavailable(f"{name} is {numbers[0]}: see tools/fetch-erofs")
    return program


def complaints(program: str, *arguments: str | Path) -> str:
    """What fsck.erofs finds wrong: 1.9 ends with 0 even when the checksum does not match."""
    done = subprocess.run([program, *arguments], check=False, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if "<E>" in line]
    return "\n".join(errors) or (done.stderr if done.returncode else "")


@contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    require_program("losetup")
    done = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", image],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        unavailable(f"no loop device: {done.stderr}")
    device = done.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def assert_mounts_like(tree: Path, image: Path, point: Path) -> None:
    wanted = inventory(tree, mtimes=True)
    with kernel_mount(image, point) as mounted:
        found = inventory(mounted, mtimes=True)
    assert found.keys() == wanted.keys()
    for name, inode in wanted.items():
        assert found[name] == inode, name


def test_every_fsck_accepts_the_image(image: Path) -> None:
    for program in erofs_programs("fsck.erofs"):
        assert complaints(program, image) == "", program
        assert complaints(program, "--extract", image) == "", program


def test_new_fsck_verifies_the_digests(tree: Path, tmp_path: Path) -> None:
    image = write(scan_directory(tree), tmp_path / "image", fingerprints=True)
    command = (newest("fsck.erofs"), "--xattr-inode-digest", "--extract")
    assert complaints(*command, image) == ""

    data = bytearray(image.read_bytes())
    start, _ = Image(bytes(data)).names[b"noise"].blocks[0]
    data[start] ^= 1
    image.write_bytes(data)
    assert "MISMATCH" in complaints(*command, image)


def test_digests_count_for_fsck_with_the_prefix_feature_announced_as_well(
    tree: Path, tmp_path: Path
) -> None:
    image = write(scan_directory(tree), tmp_path / "image", fingerprints=True)
    data = bytearray(image.read_bytes())
    data[1024 + 80] |= 0x40
    image.write_bytes(with_checksum(bytes(data)))
    command = (newest("fsck.erofs"), "--xattr-inode-digest", "--extract")
    assert complaints(*command, image) == ""


def test_digests_are_those_of_mkfs(tree: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    program = newest("mkfs.erofs")
    subprocess.run(
        [program, "--quiet", "--xattr-inode-digest=erofs.fingerprint.v1", theirs, tree], check=True
    )
    ours = write(scan_directory(tree), tmp_path / "ours", fingerprints=True)
    wanted, found = Image(theirs.read_bytes()), Image(ours.read_bytes())
    assert found.names.keys() == wanted.names.keys()
    assert (found.prefixes, found.fingerprint_prefix) == (
        wanted.prefixes,
        wanted.fingerprint_prefix,
    )
    for name, inode in wanted.names.items():
        without_data = name == b"hole"  # nothing to share: see writer.fingerprints
        assert found.names[name].hidden == ({} if without_data else inode.hidden), name


def test_dump_shows_the_tree(tree: Path, image: Path) -> None:
    for program in erofs_programs("dump.erofs"):
        shown = subprocess.check_output([program, "-s", image], text=True)
        inodes = {(path.lstat().st_dev, path.lstat().st_ino) for path in [tree, *tree.rglob("*")]}
        assert f"Filesystem inode count:                       {len(inodes)}\n" in shown
        for folder in (tree, tree / "many", tree / "deep" / "er"):
            path = f"/{folder.relative_to(tree)}".replace("/.", "/")
            listing = subprocess.check_output([program, "--ls", f"--path={path}", image])
            lines = listing.split(b"FILENAME\n")[1].splitlines()
            names = {line.split(maxsplit=2)[2] for line in lines if line}
            assert names == {b".", b"..", *map(os.fsencode, os.listdir(folder))}  # noqa: PTH208


def test_image_mounts_like_its_tree_from_a_file(tree: Path, image: Path, tmp_path: Path) -> None:
    assert_mounts_like(tree, image, tmp_path / "mounted")


def test_image_mounts_like_its_tree_from_a_device(tree: Path, image: Path, tmp_path: Path) -> None:
    with loop_device(image) as device:
        assert_mounts_like(tree, device, tmp_path / "mounted")


@pytest.mark.parametrize("block_bytes", BLOCK_SIZES)
def test_every_block_size_mounts_like_the_tree(
    tree: Path, tmp_path: Path, block_bytes: int
) -> None:
    if block_bytes > os.sysconf("SC_PAGE_SIZE"):
        pytest.skip("larger than a page")
    path = tmp_path / "image"
    image = write(scan_directory(tree), path, fingerprints=True, block_bytes=block_bytes)
    assert complaints(newest("fsck.erofs"), "--xattr-inode-digest", "--extract", image) == ""
    assert_mounts_like(tree, image, tmp_path / "mounted")


def test_holes_stay_holes(tree: Path, image: Path, tmp_path: Path) -> None:
    with kernel_mount(image, tmp_path / "mounted") as mounted:
        for name in ("hole", "sparse"):
            assert (mounted / name).read_bytes() == (tree / name).read_bytes()
    assert image.stat().st_size < sum(
        path.stat().st_size for path in tree.rglob("*") if path.is_file()
    )


def test_file_of_holes_of_eight_tebibytes_mounts(tree: Path, tmp_path: Path) -> None:
    root = scan_directory(tree / "deep")
    attributes = root.attributes
    root.entries[b"metacopy"] = RegularFile(attributes, 8 << 40)
    image = write(root, tmp_path / "image", fingerprints=True)
    for program in erofs_programs("fsck.erofs"):
        assert complaints(program, image) == "", program
    with kernel_mount(image, tmp_path / "mounted") as mounted:
        file = mounted / "metacopy"
        assert file.stat().st_size == 8 << 40
        with file.open("rb") as opened:
            opened.seek((8 << 40) - 4097)
            assert opened.read() == bytes(4097)


def test_same_tree_gives_the_same_bytes_wherever_it_lies(tree: Path, tmp_path: Path) -> None:
    require_program("cp")
    copy = tmp_path / "copy"
    subprocess.run(["cp", "--archive", tree, copy], check=True)
    first = write(scan_directory(tree), tmp_path / "first", fingerprints=True)
    other = write(scan_directory(copy), tmp_path / "other", fingerprints=True)
    assert first.read_bytes() == other.read_bytes()


def what_tar_holds(tree: Path, copy: Path) -> Path:
    """A copy of the tree without a socket and without links to a device, which tar forgets."""
    subprocess.run(["cp", "--archive", tree, copy], check=True)
    (copy / "socket").unlink()
    (copy / "second-device").unlink()
    os.utime(copy, ns=(0, 999_999_999))
    return copy


@pytest.mark.parametrize("sparse", ["0.0", "0.1", "1.0"])
def test_pax_archive_and_directory_give_the_same_bytes(
    tree: Path, tmp_path: Path, sparse: str
) -> None:
    require_program("tar", "cp")
    source = what_tar_holds(tree, tmp_path / "source")
    archive = tmp_path / "tar"
    options = ("--format=posix", f"--sparse-version={sparse}", *TAR_OPTIONS)
    subprocess.run(["tar", "-C", source, *options, "-cf", archive, "."], check=True)
    with archive.open("rb") as file:
        made = write(scan_tar(file.fileno()), tmp_path / "made", fingerprints=True)
    wanted = write(scan_directory(source), tmp_path / "wanted", fingerprints=True)
    assert made.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_archive_is_what_tar_extracts(tree: Path, tmp_path: Path, form: str) -> None:
    """GNU's own format has whole seconds and its own sparse members and long names."""
    require_program("tar", "cp")
    source = what_tar_holds(tree, tmp_path / "source")
    archive, extracted = tmp_path / "tar", tmp_path / "extracted"
    options = ("--sparse", "--numeric-owner", f"--format={form}")
    if form == "posix":
        options = (*TAR_OPTIONS, "--format=posix")
    subprocess.run(["tar", "-C", source, *options, "-cf", archive, "."], check=True)
    (source / "text").write_bytes(b"replaced later")
    (source / "link").unlink()
    (source / "link").write_bytes(b"no link any more")
    subprocess.run(
        ["tar", "-C", source, *options, "-rf", archive, "./text", "./link", "./many"], check=True
    )
    extracted.mkdir()
    subprocess.run(["tar", "-C", extracted, *options[:-1], "-xpf", archive], check=True)
    with archive.open("rb") as file:
        made = write(scan_tar(file.fileno()), tmp_path / "made", fingerprints=False)
    assert_mounts_like(extracted, made, tmp_path / "mounted")
