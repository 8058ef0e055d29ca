"""attach, detach, mount and umount on this machine: real nbdkit, FUSE, loop and EROFS mounts.

The nbd devices that this kernel may lack are in tests/unit/test_nbd_devices.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupstore import syscalls
from dedupstore.cli import serving
from dedupstore.errors import MountError
from dedupstore.mounts import kernel, servers, sharing
from dedupstore.mounts.mounts import Host
from dedupstore.mounts.targets import find_target
from dedupstore.store import Store
from tests.interop.corpus import Images
from tests.interop.mountrig import (
    MountRig,
    is_running,
    kill,
    loops_below,
    mount_rig,
    processes_with,
)
from tests.interop.rig import (
    DEDUPSTORE,
    SYSTEM_PYTHON,
    StoreDirectory,
    refusal,
    run,
    wait_until,
)
from tests.programs import require_program, require_root

NOBODY = 65534


@pytest.fixture
def rig(store_dir: StoreDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[MountRig]:
    with mount_rig(store_dir, monkeypatch) as made:
        yield made


# --- content ---


def describe(tree: Path) -> dict[str, tuple[object, ...]]:
    """Everything that stat, xattrs and content say of each file, and which are hard links."""
    found: dict[str, tuple[object, ...]] = {}
    first_names: dict[int, str] = {}
    for path in [tree, *sorted(tree.rglob("*"))]:
        status = path.lstat()
        name = str(path.relative_to(tree))
        is_regular = stat.S_ISREG(status.st_mode)
        found[name] = (
            *(status.st_mode, status.st_uid, status.st_gid, status.st_rdev, status.st_mtime_ns),
            status.st_size if is_regular or path.is_symlink() else None,
            status.st_nlink if is_regular else None,
            first_names.setdefault(status.st_ino, name),
            {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            },
            hashlib.sha256(path.read_bytes()).hexdigest() if is_regular else None,
            path.readlink() if path.is_symlink() else None,
        )
    return found


def write_everything(tree: Path) -> None:
    """A tree with one of each thing that a file system can hold."""
    (tree / "a" / "empty").mkdir(parents=True)
    (tree / "a" / "long").write_bytes(os.urandom(300_001))
    (tree / "a" / "short").write_bytes(b"tail")
    (tree / "none").touch()
    os.link(tree / "a" / "long", tree / "hard")
    (tree / "soft").symlink_to("a/short")
    with (tree / "sparse").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"head")
    os.mknod(tree / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mkfifo(tree / "pipe")
    (tree / "setuid").write_bytes(b"#!")
    os.chown(tree / "setuid", 1234, 5678)
    (tree / "setuid").chmod(0o4755)
    os.setxattr(tree / "none", "user.note", b"kept")
    os.setxattr(tree / "a", "trusted.note", b"kept, too")
    os.utime(tree / "none", ns=(1, 981_173_106_123_456_789))


def read_all(tree: Path) -> int:
    return sum(len(path.read_bytes()) for path in tree.rglob("*") if path.is_file())


def test_mount_shows_every_file_with_its_metadata_as_in_the_tree(
    rig: MountRig, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    write_everything(tree)
    run("mkfs.erofs", "--quiet", tmp_path / "tree.erofs", tree)  # -T would change the times
    rig.store.import_file(tmp_path / "tree.erofs", "tree")
    directory = rig.mount("tree")
    assert describe(directory) == describe(tree)
    assert os.statvfs(directory).f_flag & os.ST_RDONLY
    rig.umount(directory)
    rig.assert_nothing_left()


def test_mount_is_a_file_backed_one_that_any_user_reads(rig: MountRig, images: Images) -> None:
    rig.base.chmod(0o755)
    directory = rig.mount("base")
    (point,) = (p for p in kernel.mount_table() if p.directory == directory)
    assert (point.fstype, [Path(point.source)]) == ("erofs", rig.devices())
    assert loops_below(rig.base) == []
    name = "directory-1/file-11"
    copy = subprocess.run(["cat", directory / name], user=NOBODY, capture_output=True, check=True)
    assert copy.stdout == (images.base_tree / name).read_bytes()


def test_clone_shares_the_superblock_and_its_reads_reach_neither_server_nor_store(
    rig: MountRig, images: Images
) -> None:
    first = rig.mount("base")
    assert read_all(first) == read_all(images.base_tree)
    before = rig.metrics()
    second = rig.mount("clone")
    assert second.stat().st_dev == first.stat().st_dev
    assert describe(second) == describe(images.base_tree)
    after = rig.metrics()
    assert after["dedup_store_reads_total"] == before["dedup_store_reads_total"]
    # One direct read asked whether the device still works; not one came from the file system.
    assert after["dedup_read_bytes_total"] - before["dedup_read_bytes_total"] == mmap.PAGESIZE
    assert rig.mount("derived").stat().st_dev != first.stat().st_dev
    assert len(rig.devices()) == 2
    assert len(processes_with(str(rig.runtime / "nbd.sock"))) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_last_umount_in_any_order_ends_device_and_server(
    rig: MountRig, order: tuple[int, ...]
) -> None:
    directories = [rig.mount("base"), rig.mount("clone")]
    server, (file,) = rig.server(), rig.devices()
    for position in order:
        assert is_running(server)
        assert file.exists()
        assert all(read_all(directories[i]) for i in order[order.index(position) :])
        rig.umount(directories[position])
    assert not is_running(server)
    assert not file.exists()
    rig.assert_nothing_left()


def test_names_and_directories_with_slashes_and_blanks(rig: MountRig, images: Images) -> None:
    name = "team/base 1%&+#é"
    rig.store.clone("base", name)
    directory = rig.directory("mount \\ of\t")
    rig.store.do("mount", "--share=none", name, directory)
    assert describe(directory) == describe(images.base_tree)
    (mount,) = rig.listed()["mounts"]
    assert (mount["name"], mount["directory"]) == (name, str(directory))
    rig.umount(directory)
    rig.assert_nothing_left()


def test_list_says_what_is_mounted_and_attached(rig: MountRig) -> None:
    assert rig.listed() == {"mounts": [], "attachments": []}
    first, second, device = rig.mount("base"), rig.mount("clone"), rig.attach("base")
    digest = json.loads(rig.store.do("info", "base", "--json"))["digest"]
    status = first.stat()
    common = {
        "share": "none",
        "device": str(next(rig.runtime.glob("*.0")) / "img"),
        "via": "file",
        "fstype": "erofs",
        "superblock": f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}",
        "digest": digest,
        "store": str(rig.store.path),
    }
    assert rig.listed() == {
        "mounts": [
            {"name": "base", "directory": str(first), **common},
            {"name": "clone", "directory": str(second), **common},
        ],
        "attachments": [
            {
                "names": ["base"],
                "device": str(device),
                "via": "loop",
                "digest": digest,
                "store": str(rig.store.path),
            }
        ],
    }
    table = rig.store.do("mount", "--list").splitlines()
    assert [line.split()[0] for line in table] == ["NAME", "base", "clone", "base"]


# --- sharing ---


def write_root(tree: Path, own: bytes) -> Path:
    """A tree of every kind of file and some MB of contents; `own` is the content of one of them,
    the others are the same in every such tree."""
    tree.mkdir()
    write_everything(tree)
    (tree / "a" / "long").write_bytes(random.Random(1).randbytes(3_000_001))
    for number in range(40):
        (tree / f"file-{number}").write_bytes(random.Random(number).randbytes(50_000 + number))
    (tree / "own").write_bytes(own)
    for path in tree.rglob("*"):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789), follow_symlinks=False)
    return tree


@pytest.fixture
def roots(rig: MountRig, tmp_path: Path) -> tuple[Path, Path]:
    """Two trees that differ in one file, imported as one and two."""
    trees = (
        write_root(tmp_path / "one", b"1" * 700_000),
        write_root(tmp_path / "two", b"2" * 80_000),
    )
    for tree in trees:
        rig.store.do("import", tree, tree.name)
    return trees


@pytest.mark.parametrize("foreign", [False, True], ids=["built here", "by mkfs.erofs"])
def test_pool_mount_is_as_its_tree(
    rig: MountRig, roots: tuple[Path, Path], tmp_path: Path, foreign: bool
) -> None:
    one, two = roots
    names = ["one", "two"]
    if foreign:
        for tree in roots:
            image = tmp_path / f"{tree.name}.erofs"
            run("mkfs.erofs", "--quiet", image, tree)
            rig.store.import_file(image, f"{tree.name}-foreign")
        names = [f"{name}-foreign" for name in names]
    first, second = (rig.mount(name, "pool") for name in names)
    assert describe(first) == describe(one)
    assert describe(second) == describe(two)
    assert {mount["share"] for mount in rig.listed()["mounts"]} == {"pool"}
    rig.umount(first)
    assert describe(second) == describe(two)
    rig.umount(second)
    rig.assert_nothing_left()


def test_pool_mounts_read_common_contents_once(rig: MountRig, roots: tuple[Path, Path]) -> None:
    first, second = rig.mount("one", "pool"), rig.mount("two", "pool")
    total = read_all(first)
    before = rig.metrics()
    assert read_all(second) > total - 700_000
    after = rig.metrics()
    fetched = after["dedup_read_bytes_total"] - before["dedup_read_bytes_total"]
    assert fetched < 80_000 + (64 << 10)  # its own file, its metadata, and their readahead


def test_image_and_clone_are_one_overlay(rig: MountRig, roots: tuple[Path, Path]) -> None:
    rig.store.do("clone", "one", "same")
    first, second = rig.mount("one", "pool"), rig.mount("same", "pool")
    assert first.stat().st_dev == second.stat().st_dev
    assert len(rig.devices()) == 1
    before = rig.metrics()["dedup_read_bytes_total"]
    read_all(first)
    between = rig.metrics()["dedup_read_bytes_total"]
    read_all(second)
    assert rig.metrics()["dedup_read_bytes_total"] == between > before
    rig.umount(first)
    rig.umount(second)
    rig.assert_nothing_left()


def test_image_imported_later_shares_with_what_is_mounted(
    rig: MountRig, roots: tuple[Path, Path], tmp_path: Path
) -> None:
    first = rig.mount("one", "pool")
    read_all(first)
    three = write_root(tmp_path / "three", b"3" * 90_000)
    rig.store.do("import", three, "three")
    third = rig.mount("three", "pool")
    before = rig.metrics()["dedup_read_bytes_total"]
    read_all(third)
    assert rig.metrics()["dedup_read_bytes_total"] - before < 90_000 + (64 << 10)
    assert describe(third) == describe(three)


def test_home_stays_as_long_as_an_overlay_reads_from_it(
    rig: MountRig, roots: tuple[Path, Path]
) -> None:
    _, two = roots
    rig.umount(rig.mount("one", "pool"))
    rig.assert_nothing_left()
    second = rig.mount("two", "pool")  # attaches the view of one, too
    assert len(rig.devices()) == 2
    assert [mount["name"] for mount in rig.listed()["mounts"]] == ["two"]
    first = rig.mount("one", "pool")
    assert len(rig.devices()) == 2
    rig.umount(first)
    rig.store.do("rm", "one")
    rig.store.do("gc")
    assert describe(second) == describe(two)
    rig.umount(second)
    rig.assert_nothing_left()


def test_sharing_is_chosen_for_what_kernel_and_image_allow(
    rig: MountRig, roots: tuple[Path, Path], tmp_path: Path
) -> None:
    best = sharing.candidates("auto")[0]
    assert best == ("kernel" if kernel.knows_option("erofs", "inode_share") else "pool")
    image = tmp_path / "packed.erofs"
    run("mkfs.erofs", "--quiet", "-zlz4", image, roots[0])
    rig.store.import_file(image, "packed")
    mounted = [rig.mount(name, "auto") for name in ("one", "packed")]
    found = {mount["name"]: mount["share"] for mount in rig.listed()["mounts"]}
    assert found == {"one": best, "packed": "none"}
    directory = rig.directory()
    line = rig.store.refuse("mount", "--share=pool", "packed", directory)
    assert line == "dedupstore: image 'packed', --share=pool: compressed file contents"
    for each in mounted:
        rig.umount(each)
    rig.assert_nothing_left()


def test_kernel_sharing_is_refused_where_the_kernel_has_none(
    rig: MountRig, roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel.knows_option("erofs", "inode_share"):
        pytest.skip("this kernel has inode_share; tests/vm has both kinds")
    line = rig.store.refuse("mount", "--share=kernel", "one", rig.directory())
    assert line == (
        "dedupstore: --share=kernel: this kernel's EROFS has no inode_share "
        "(it came with Linux 7.0)"
    )


def test_programs_run_and_map_from_a_pool_mount(rig: MountRig, tmp_path: Path) -> None:
    tree = tmp_path / "programs"
    tree.mkdir()
    shutil.copy2("/bin/busybox" if Path("/bin/busybox").exists() else "/bin/true", tree / "program")
    (tree / "data").write_bytes(random.Random(5).randbytes(300_000))
    rig.store.do("import", tree, "programs")
    directory = rig.mount("programs", "pool")
    subprocess.run([directory / "program", "true"], check=True)
    with (directory / "data").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == (tree / "data").read_bytes()
        assert os.sendfile(os.open(os.devnull, os.O_WRONLY), file.fileno(), 0, 300_000) == 300_000
    rig.umount(directory)


def test_container_over_a_pool_mount_reads_and_writes(
    rig: MountRig, roots: tuple[Path, Path]
) -> None:
    lower, merged = rig.mount("one", "pool"), rig.directory()
    upper, work = tmpfs_directories(rig)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    run("mount", "-t", "overlay", "-o", options, "none", merged)
    try:
        assert read_all(merged) == read_all(roots[0])
        with (merged / "own").open("ab") as file:
            file.write(b"more")
        assert (merged / "own").read_bytes() == b"1" * 700_000 + b"more"
        assert (lower / "own").read_bytes() == b"1" * 700_000
    finally:
        run("umount", merged)
        run("umount", upper.parent)
    rig.umount(lower)
    rig.assert_nothing_left()


def tmpfs_directories(rig: MountRig) -> tuple[Path, Path]:
    """An upper and a work directory: overlayfs may not take them from what holds the test."""
    place = rig.directory()
    run("mount", "-t", "tmpfs", "none", place)
    for name in ("upper", "work"):
        (place / name).mkdir()
    return place / "upper", place / "work"


def test_dry_run_of_a_pool_mount_names_both_views_and_the_overlay(
    rig: MountRig, roots: tuple[Path, Path]
) -> None:
    directory = rig.directory()
    rig.store.do("mount", "--share=pool", "--dry-run", "one", directory)  # derives the home
    plan = rig.store.do("mount", "--share=pool", "--dry-run", "two", directory)
    assert not rig.run.exists()
    assert plan.count("mount -t erofs") == 2
    assert "lowerdir=" in plan
    assert plan.splitlines()[-1].startswith("mount --bind ")


# --- devices ---


def read_direct(device: Path, size: int) -> bytes:
    descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 1 << 20) as buffer:
            parts = []
            for at in range(0, size, len(buffer)):
                count = os.preadv(descriptor, [buffer], at)
                parts.append(buffer[:count])
        return b"".join(parts)
    finally:
        os.close(descriptor)


def test_attach_gives_a_read_only_block_device_with_the_image(
    rig: MountRig, images: Images
) -> None:
    device = rig.attach("base")
    assert stat.S_ISBLK(device.stat().st_mode)
    data = images.base.read_bytes()
    assert read_direct(device, len(data)) == data
    sysfs = Path("/sys/block") / device.name
    settings = {
        "ro": "1",
        "loop/dio": "1",
        "loop/autoclear": "0",
        "queue/logical_block_size": "4096",
    }
    assert {key: (sysfs / key).read_text().strip() for key in settings} == settings
    rig.store.do("detach", str(device))
    rig.assert_nothing_left()


def test_image_of_no_known_kind_attaches_with_sectors_of_512_bytes(
    rig: MountRig, images: Images
) -> None:
    device = rig.attach("ragged")
    data = images.ragged.read_bytes()
    assert read_direct(device, len(data)) == data[: len(data) // 512 * 512]
    rig.store.do("detach", "ragged")
    rig.assert_nothing_left()


def test_image_and_clone_are_one_device_that_goes_with_the_last_name(rig: MountRig) -> None:
    device = rig.attach("base")
    assert rig.attach("clone") == device
    assert rig.attach("base") == device
    rig.store.do("detach", "base")
    assert rig.listed()["attachments"][0]["names"] == ["clone"]
    assert read_direct(device, 4096)
    assert "not attached" in rig.store.refuse("detach", "base")
    rig.store.do("detach", "clone")
    rig.assert_nothing_left()


def test_detach_leaves_mounts_and_umount_leaves_devices(rig: MountRig) -> None:
    device, directory = rig.attach("base"), rig.mount("clone")
    rig.store.do("detach", "base")
    assert loops_below(rig.base) == []
    assert read_all(directory)
    device = rig.attach("base")
    rig.umount(directory)
    assert read_direct(device, 4096)
    rig.store.do("detach", str(device))
    rig.assert_nothing_left()


def test_detach_refuses_a_device_that_somebody_mounted(rig: MountRig) -> None:
    device, directory = rig.attach("base"), rig.directory()
    run("mount", "-t", "erofs", "-o", "ro", device, directory)
    assert f"in use, mounted on {directory}" in rig.store.refuse("detach", "base")
    assert read_all(directory)
    run("umount", directory)
    rig.store.do("detach", "base")
    rig.assert_nothing_left()


def test_other_file_systems_mount_with_their_type_over_one_device(
    rig: MountRig, tmp_path: Path
) -> None:
    require_program("mkfs.ext4")
    tree, image = tmp_path / "tree", tmp_path / "image.ext4"
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(100_000))
    run("mkfs.ext4", "-q", "-b", "1024", "-d", tree, image, "2M")
    rig.store.import_file(image, "ext")
    first, second = rig.directory(), rig.directory()
    assert "--type" in rig.store.refuse("mount", "ext", first)
    rig.store.do("mount", "ext", first, "--type", "ext4")
    rig.store.do("mount", "ext", second, "--type=ext4")
    assert first.stat().st_dev == second.stat().st_dev
    assert (second / "file").read_bytes() == (tree / "file").read_bytes()
    assert len(loops_below(rig.base)) == 1
    assert [mount["via"] for mount in rig.listed()["mounts"]] == ["loop", "loop"]
    rig.umount(first)
    rig.umount(second)
    rig.assert_nothing_left()


# --- mount(8) ---


@pytest.fixture
def helper() -> Iterator[Path]:
    """The helper where mount(8) looks for it, as an installation has it."""
    require_root()
    path = Path("/sbin/mount.dedupstore")
    if path.is_symlink() or path.exists():
        pytest.fail(f"{path} is there already")
    path.symlink_to(DEDUPSTORE.with_name("mount.dedupstore"))
    try:
        yield path
    finally:
        path.unlink()


@pytest.mark.parametrize("share", ["none", "pool"])
def test_restrictions_hold_for_their_mount_alone(
    rig: MountRig, roots: tuple[Path, Path], share: str
) -> None:
    free, restricted = rig.mount("one", share), rig.directory()
    options = ("-o", "nosuid", "--option=nodev", "-o", "noexec")
    rig.store.do("mount", f"--share={share}", *options, "one", restricted)
    flags = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
    assert os.statvfs(restricted).f_flag & flags == flags
    assert os.statvfs(free).f_flag & flags == 0
    assert os.statvfs(restricted).f_flag & os.ST_RDONLY
    assert free.stat().st_dev == restricted.stat().st_dev
    plan = rig.store.do("mount", "--dry-run", f"--share={share}", *options, "one", rig.directory())
    assert "-o ro,nosuid,nodev,noexec" in plan.splitlines()[-1]
    rig.umount(free)
    rig.umount(restricted)
    rig.assert_nothing_left()


def test_mount_8_and_fstab_mount_by_type(
    rig: MountRig, images: Images, helper: Path, tmp_path: Path
) -> None:
    by_hand, by_fstab = rig.directory(), rig.directory()
    options = f"store={rig.store.path},share=none"
    run("mount", "-t", "dedupstore", "-o", options, "base", by_hand)
    fstab = tmp_path / "fstab"
    fstab.write_text(f"clone {by_fstab} dedupstore {options},nofail,noauto 0 0\n")
    run("mount", "--fstab", fstab, by_fstab)
    assert describe(by_hand) == describe(by_fstab) == describe(images.base_tree)
    assert by_hand.stat().st_dev == by_fstab.stat().st_dev
    run("umount", by_hand)
    rig.umount(by_fstab)
    rig.assert_nothing_left()
    done = subprocess.run(
        ["mount", "-t", "dedupstore", "-o", options, "none", by_hand],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "no image named 'none'" in done.stderr


def test_kernel_without_file_backed_mounts_gets_a_loop_device(
    rig: MountRig, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Linux before 6.12 says to a file-backed mount, everything else real."""
    mount_2 = syscalls.mount

    def before_6_12(
        source: Path, target: Path, fstype: str | None, flags: int, options: str = ""
    ) -> None:
        if fstype == "erofs" and source.name == "img":
            raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK), str(source))
        mount_2(source, target, fstype, flags, options)

    monkeypatch.setattr(syscalls, "mount", before_6_12)
    directories = rig.directory(), rig.directory()
    host = Host(rig.run)
    for name, directory in zip(("base", "clone"), directories, strict=True):
        with Store(rig.store.path) as store:
            target = find_target(store, name)
        host.mount(target, directory)
        assert describe(directory) == describe(images.base_tree)
    assert directories[0].stat().st_dev == directories[1].stat().st_dev
    (loop,) = loops_below(rig.base)
    assert (Path("/sys/block") / loop.name / "loop" / "dio").read_text() == "1\n"
    assert {mount["via"] for mount in rig.listed()["mounts"]} == {"loop"}
    for directory in directories:
        host.unmount(directory)
    rig.assert_nothing_left()


# --- what others do to it ---


def test_two_mounts_at_once_start_one_server_and_one_device(rig: MountRig) -> None:
    directories = [rig.directory() for _ in range(4)]
    names = ["base", "clone", "derived", "base"]
    command = [DEDUPSTORE, "--store", rig.store.path, "mount", "--share=none"]
    started = [
        subprocess.Popen([*command, name, directory])
        for name, directory in zip(names, directories, strict=True)
    ]
    assert [process.wait(60) for process in started] == [0, 0, 0, 0]
    assert len(processes_with(str(rig.runtime / "nbd.pid"))) == 1
    assert len(rig.devices()) == 2
    assert len({directory.stat().st_dev for directory in directories}) == 2
    stopped = [subprocess.Popen([*command[:-2], "umount", path]) for path in directories]
    assert [process.wait(60) for process in stopped] == [0, 0, 0, 0]
    rig.assert_nothing_left()


def test_after_a_kill_umount_works_and_so_does_the_next_mount(
    rig: MountRig, images: Images
) -> None:
    dead = rig.mount("base")
    kill(rig.server())
    alive = rig.mount("base")  # beside the dead one
    assert describe(alive) == describe(images.base_tree)
    assert alive.stat().st_dev != dead.stat().st_dev
    rig.umount(dead)
    rig.umount(alive)
    rig.assert_nothing_left()


def test_attach_after_a_kill_gives_a_device_that_reads(rig: MountRig, images: Images) -> None:
    rig.attach("base")
    kill(rig.server())
    data = images.base.read_bytes()
    assert read_direct(rig.attach("clone"), len(data)) == data
    assert len(loops_below(rig.base)) == 1
    rig.store.do("detach", "clone")
    rig.assert_nothing_left()


def test_what_umount_8_leaves_goes_with_the_next_command(rig: MountRig) -> None:
    run("umount", rig.mount("base"))
    directory = rig.mount("derived")
    assert len(rig.devices()) == 1
    rig.umount(directory)
    rig.assert_nothing_left()


def test_records_that_a_reboot_outdated_are_dropped(rig: MountRig) -> None:
    directory = rig.mount("base")
    saved = {path: path.read_bytes() for path in rig.runtime.glob("*/record.json")}
    rig.umount(directory)
    for path, record in saved.items():
        path.parent.mkdir()
        path.write_bytes(record)
    (rig.runtime / f"{'0' * 32}.7").mkdir()
    (rig.runtime / "nbd.pid").write_text(f"{os.getpid()}\n")  # somebody else's by now
    assert rig.listed()["mounts"] == []
    assert "no mount of dedupstore's" in rig.store.refuse("umount", directory)
    rig.umount(rig.mount("base"))
    rig.assert_nothing_left()


def test_overlay_keeps_the_device_until_it_goes_itself(rig: MountRig, images: Images) -> None:
    lower, merged = rig.mount("base"), rig.directory()
    run("mount", "-t", "overlay", "-o", f"lowerdir={lower}:{rig.directory()}", "none", merged)
    rig.umount(lower)
    assert read_all(merged) == read_all(images.base_tree)
    run("umount", merged)
    rig.umount(rig.mount("derived"))
    rig.assert_nothing_left()


def test_running_serve_is_left_alone_where_there_is_no_nbd(rig: MountRig, images: Images) -> None:
    assert servers.SERVE_SOCKET == serving.SOCKET_NAME
    serve = subprocess.Popen([DEDUPSTORE, "--store", rig.store.path, "serve", "base"])
    socket = rig.store.path / serving.SOCKET_NAME
    try:
        wait_until(socket.exists)
        base = rig.mount("base")
        assert describe(base) == describe(images.base_tree)
        assert is_running(rig.server())  # it alone makes files
        rig.umount(base)
        assert serve.poll() is None
        rig.assert_nothing_left()
    finally:
        serve.terminate()
        serve.wait(60)
        socket.unlink(missing_ok=True)


# --- plans ---


def test_dry_run_changes_nothing_and_its_commands_do_what_attach_does(
    rig: MountRig, images: Images
) -> None:
    plan = rig.store.do("attach", "--dry-run", "base")
    assert not rig.run.exists()
    device = Path(run("sh", "-e", "-c", plan).strip())
    data = images.base.read_bytes()
    assert read_direct(device, len(data)) == data
    rig.umount(rig.mount("derived"))  # takes down what has no record
    rig.assert_nothing_left()


def test_dry_run_of_mount_names_server_device_and_mounts(rig: MountRig) -> None:
    directory = rig.directory()
    words = [line.split()[0] for line in plan_lines(rig, "base", directory)]
    assert " ".join(Path(word).name for word in words) == (
        "mkdir nbdkit until mkdir touch mount mkdir mount mount"
    )
    rig.mount("base")
    (line,) = plan_lines(rig, "clone", directory)
    assert line.startswith("mount --bind ")
    assert line.endswith(f" {directory}")


def plan_lines(rig: MountRig, name: str, directory: Path) -> list[str]:
    return rig.store.do("mount", "--share=none", "--dry-run", name, directory).splitlines()


# --- refusals ---


def test_refusals_are_one_line(rig: MountRig, tmp_path: Path) -> None:
    directory, file = rig.directory(), tmp_path / "file"
    file.touch()
    refuse = rig.store.refuse
    assert "no image named 'none'" in refuse("mount", "none", directory)
    assert "No such file or directory" in refuse("mount", "base", tmp_path / "none")
    assert "not a directory" in refuse("mount", "base", file)
    assert "--type" in refuse("mount", "ragged", directory)
    assert "no mount of dedupstore's" in refuse("umount", "/proc")
    assert "not attached" in refuse("detach", "base")
    assert not rig.run.exists() or list(rig.run.iterdir()) == []
    assert rig.store.cli("mount", "base").returncode == 2


def test_mount_of_a_damaged_image_leaves_nothing(rig: MountRig, tmp_path: Path) -> None:
    rig.store.import_file(make_raw(tmp_path / "noise.raw"), "noise")
    directory = rig.directory()
    line = rig.store.refuse("mount", "noise", directory, "--type=erofs")
    assert line.startswith(f"dedupstore: mounting 'noise' on {directory} as erofs: ")
    rig.assert_nothing_left()


def make_raw(path: Path) -> Path:
    path.write_bytes(os.urandom(1 << 20))
    return path


def test_mount_onto_a_mounted_directory_is_refused(rig: MountRig) -> None:
    directory = rig.mount("base")
    assert "'base' is mounted there already" in rig.store.refuse("mount", "derived", directory)
    rig.umount(directory)
    rig.assert_nothing_left()


def test_umount_of_a_busy_mount_says_so_and_keeps_it(rig: MountRig) -> None:
    directory = rig.mount("base")
    with (directory / "directory-1" / "file-11").open("rb") as file:
        assert refusal(*failed(rig, "umount", directory)).endswith(f"{directory}: in use")
        assert file.read()
    rig.umount(directory)
    rig.assert_nothing_left()


def failed(rig: MountRig, *arguments: str | Path) -> tuple[int, str]:
    result = rig.store.cli(*arguments)
    return result.returncode, result.stderr


def test_missing_program_is_named_with_its_package(
    rig: MountRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = rig.base / "bin"
    programs.mkdir()
    (programs / "dd").symlink_to(shutil.which("dd") or "dd")
    monkeypatch.setenv("PATH", str(programs))
    assert "nbdkit: not found (install the package nbdkit)" in rig.store.refuse("attach", "base")
    rig.assert_nothing_left()


def test_server_starts_although_another_python_comes_first_on_path(
    rig: MountRig, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pyenv's or a container image's own does; nbdkit's takes its library from beside it."""
    library = Path(os.__file__).parent
    other = tmp_path / "lib" / library.name
    other.mkdir(parents=True)
    for entry in library.iterdir():
        (other / entry.name).symlink_to(entry)
    (other / "os.py").unlink()  # what marks a library
    shutil.copy(library / "os.py", other)
    (other / "ssl.py").unlink()
    (other / "ssl.py").write_text("raise ImportError('made for another Python')")
    (tmp_path / "bin").mkdir()
    shutil.copy(SYSTEM_PYTHON, tmp_path / "bin" / "python3")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    directory = rig.mount("base")
    assert describe(directory) == describe(images.base_tree)
    rig.umount(directory)


def test_runtime_directory_that_others_may_write_is_refused(rig: MountRig) -> None:
    rig.run.mkdir()
    rig.run.chmod(0o777)
    assert "others can write here" in rig.store.refuse("attach", "base")


def test_ordinary_user_is_told_to_be_root(
    store_dir: StoreDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    with Store(store_dir.path) as store:
        target = find_target(store, "base")
    host = Host(tmp_path / "run")
    with pytest.raises(MountError, match=r"^mount needs root$"):
        host.mount(target, tmp_path)
    with pytest.raises(MountError, match=r"^attach needs root$"):
        host.attach(target)
    assert not (tmp_path / "run").exists()
