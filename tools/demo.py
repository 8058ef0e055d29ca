"""Shows what sharing saves, on this machine's own files: the table in the README.

    tools/demo [--megabytes N]    (tools/demo --guest is another: guests/demo.py)

Corpus: a base tree of files from the first standard directories that exist (`BASE`), taken in
order of their names; a derived tree with every 25th file changed and 5 % added from elsewhere; one
EROFS image of each, made by mkfs.erofs with its defaults. Both images are imported, the base is
cloned, and everything is served by one nbdkit with the plugin, mounted with the kernel's EROFS over
nbdfuse and read file by file. Then the same with ``nbdkit file`` serving three plain image files.

Progress goes to standard error, the table (Markdown) to standard output. Everything read is
compared with the trees; the exit status is 1 when anything differs or when reading the clone
touched the store. Each row is what one more image adds. Columns, MB being 10^6 bytes:

on disk         blocks allocated to the store (its growth), or to the image file
read from disk  by the server process, as the kernel counts it
server memory   the server's anonymous memory, plus page cache of the files it serves from
time            to read every file once through the mount, whose own page cache starts empty
store reads     dedup_store_reads_total: chunks loaded from LMDB

Both servers start with none of their files in page cache. Only those files are dropped from it:
/proc/sys/vm/drop_caches would also disturb everyone else on the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from xxhash import xxh3_128

ROOT = Path(__file__).resolve().parent.parent
DEDUPSTORE = Path(sys.executable).with_name("dedupstore")

BASE = ("/usr/lib/python3*", "/usr/share/perl*", "/usr/bin", "/usr/lib/*-linux-gnu")
ADDED = ("/usr/sbin", "/usr/lib/git-core", "/usr/share/locale", "/usr/share/doc", "/usr/libexec")
# No source directory may fill more than this part of a tree: variety is what real roots have.
SOURCE_SHARE = 0.4
ADDED_SHARE = 0.05
CHANGED_EVERY = 25
CHANGE = b"\n# changed by tools/demo\n"

# The rows. The first is not an image: what the server needs before anyone reads from it.
IDLE = "idle"
IMAGES = {"base": "first image", "clone": "a clone of it", "derived": "derived image"}

READ_BYTES = 1 << 20
PATIENCE_SECONDS = 30
SOCKET_PATH_BYTES_MAX = 107

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
PROT_READ, MAP_SHARED = 1, 1
CAP_SYS_ADMIN = 21

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
libc.mount.argtypes = [*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p]


class DemoError(Exception):
    """What stops the demo; `str(error)` is the one line that is reported."""


def say(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)


def run(*command: str | Path) -> None:
    """Run a program; its last line of output is the error when it fails."""
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        lines = result.stdout.strip().splitlines() or [f"exit status {result.returncode}"]
        raise DemoError(f"{Path(command[0]).name}: {lines[-1]}")


# --- the corpus ----------------------------------------------------------------------------------


def public_files(directory: Path) -> Iterator[Path]:
    """Everybody's regular files and symbolic links under a directory, in order of their names."""
    for parent, directories, names in os.walk(directory):
        directories.sort()
        for name in sorted(names):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            # No set-id programs: the copy lies in a temporary directory.
            public = mode & stat.S_IROTH and not mode & (stat.S_ISUID | stat.S_ISGID)
            if stat.S_ISLNK(mode) or (stat.S_ISREG(mode) and public):
                yield path


def copy_files(sources: Iterable[str], tree: Path, bytes_max: int) -> None:
    """Copy files from the directories that `sources` (globs) name until `bytes_max` are copied."""
    found = (path for glob in sources for path in sorted(Path("/").glob(glob.lstrip("/"))))
    directories = [path for path in found if path.is_dir()]
    links: dict[tuple[int, int], Path] = {}
    left = bytes_max
    for directory in directories:
        share = min(left, int(bytes_max * SOURCE_SHARE))
        left -= share
        for path in public_files(directory):
            status = path.lstat()
            if status.st_size > share:
                continue
            target = tree / path.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            # A file with several names is one file in the copy too, or sharing would look better
            # than it is.
            first = links.setdefault((status.st_dev, status.st_ino), target)
            if first is target:
                shutil.copy2(path, target, follow_symlinks=False)
                share -= status.st_size
            else:
                os.link(first, target, follow_symlinks=False)
        left += share


def derive_tree(base: Path, derived: Path, bytes_added: int) -> None:
    """Make a tree like `base` with some files changed in the middle and others added."""
    run("cp", "-al", base, derived)
    files = [path for path in public_files(derived) if not path.is_symlink()]
    for path in files[::CHANGED_EVERY]:
        status = path.stat()
        content = path.read_bytes()
        middle = len(content) // 2
        path.unlink()  # the base's tree has the same inode
        path.write_bytes(content[:middle] + CHANGE + content[middle:])
        path.chmod(stat.S_IMODE(status.st_mode))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    copy_files(ADDED, derived, bytes_added)


def read_tree(tree: Path) -> dict[str, str]:
    """Read every file with read(2). Returns what each path is: a digest, or a link's target."""
    found: dict[str, str] = {}
    buffer = bytearray(READ_BYTES)
    view = memoryview(buffer)
    for parent, directories, names in os.walk(tree):
        directories.sort()
        for name in sorted(names):
            path = Path(parent, name)
            key = str(path.relative_to(tree))
            if path.is_symlink():
                found[key] = f"link to {path.readlink()}"
                continue
            digest = xxh3_128()
            with open(path, "rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    digest.update(view[:count])
            found[key] = digest.hexdigest()
    return found


# --- what the machine is asked -------------------------------------------------------------------


def cached_bytes(path: Path) -> int:
    """Bytes of a file that are in the page cache, by mincore(2)."""
    size = path.stat().st_size
    if size == 0:
        return 0
    with path.open("rb") as stream:
        address = libc.mmap(None, size, PROT_READ, MAP_SHARED, stream.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise DemoError(f"{path}: {os.strerror(ctypes.get_errno())}")
    page = os.sysconf("SC_PAGE_SIZE")
    resident = (ctypes.c_ubyte * -(-size // page))()
    libc.mincore(address, size, resident)
    libc.munmap(address, size)
    return page * sum(flags & 1 for flags in resident)


def drop_from_cache(path: Path) -> None:
    """Write a file out and drop it from the page cache."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes(path: Path) -> int:
    """Bytes allocated to a file, or to the files in a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # allocation may be delayed until then
    return sum(512 * file.stat().st_blocks for file in files)


def process_value(pid: int, table: str, key: str) -> int:
    """A number from /proc/PID/`table`, in its unit there."""
    for line in Path(f"/proc/{pid}/{table}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    raise DemoError(f"/proc/{pid}/{table} has no {key}")


def store_reads(metrics: Path) -> int:
    """dedup_store_reads_total of the server whose metrics socket this is."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(metrics))
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with connection.makefile("r") as lines:
            for line in lines:
                name, _, value = line.partition(" ")
                if name == "dedup_store_reads_total":
                    return int(float(value))
    raise DemoError(f"{metrics}: no dedup_store_reads_total")


def why_not_mount() -> str | None:
    """The reason why this process cannot mount an image over FUSE, if there is one."""
    if os.geteuid() != 0:
        return "not root"
    capabilities = next(
        line.split()[1]
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("CapEff:")
    )
    if not int(capabilities, 16) >> CAP_SYS_ADMIN & 1:
        return "no permission to mount here (CAP_SYS_ADMIN)"
    for module in ("fuse", "erofs"):
        if f"\t{module}\n" not in Path("/proc/filesystems").read_text():
            load = ["modprobe", "--quiet", module]
            if shutil.which(load[0]) is not None:
                subprocess.run(load, stderr=subprocess.DEVNULL, check=False)
        if f"\t{module}\n" not in Path("/proc/filesystems").read_text():
            return f"the kernel has no {module}"
    return None if Path("/dev/fuse").exists() else "no /dev/fuse"


# --- servers and mounts --------------------------------------------------------------------------


@contextmanager
def started(command: list[str], ready: Callable[[], bool], log: Path) -> Iterator[int]:
    """A program that serves until the block ends. Yields its process id."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us: what depends on the server goes first
        )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").strip().splitlines() or ["did not start"]
                raise DemoError(f"{Path(command[0]).name}: {lines[-1]}")
            time.sleep(0.01)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def unmount(where: Path) -> None:
    if subprocess.run(["umount", where], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        subprocess.run(["umount", "-l", where], stderr=subprocess.DEVNULL, check=False)


def mount_erofs(image: Path, where: Path) -> None:
    """Mount a file with the kernel's EROFS, bypassing the file's own page cache where possible."""
    # mount(2), because mount(8) would put a loop device in between. Direct I/O came after
    # file-backed mounts, and those came with Linux 6.12.
    for options in (b"directio", b""):
        source, target = os.fsencode(image), os.fsencode(where)
        if libc.mount(source, target, b"erofs", MS_RDONLY | MS_NOSUID | MS_NODEV, options) == 0:
            return
    find = ["losetup", "--find", "--show", "--read-only", image]
    result = subprocess.run([*find, "--direct-io=on"], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise DemoError(f"losetup: {result.stderr.strip()}")
    device = result.stdout.strip()
    try:
        run("mount", "-t", "erofs", "-o", "ro,nosuid,nodev", device, where)
    finally:
        # While it is in use this only marks it to go with the mount.
        subprocess.run(["losetup", "--detach", device], check=False)


@contextmanager
def mounted(uri: str, work: Path) -> Iterator[Path]:
    """An NBD export as a mounted EROFS file system."""
    # Removed with the work directory, once nothing can be mounted any more.
    fuse, where = (Path(tempfile.mkdtemp(prefix="mount-", dir=work)) for _ in range(2))
    image = fuse / "img"
    command = ["nbdfuse", "-r", str(image), uri]
    with ExitStack() as stack:
        stack.enter_context(started(command, image.exists, work / "nbdfuse.log"))
        # Before what it undoes: Ctrl-C may come in between, and unmounting nothing does no harm.
        stack.callback(unmount, fuse)
        stack.callback(unmount, where)
        mount_erofs(image, where)
        yield where


def copied_digest(uri: str) -> str:
    """Read a whole export with nbdcopy. Returns the digest of its bytes."""
    digest = xxh3_128()
    with subprocess.Popen(["nbdcopy", uri, "-"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while block := process.stdout.read(READ_BYTES):
            digest.update(block)
    if process.returncode != 0:
        raise DemoError(f"nbdcopy: could not read {uri}")
    return digest.hexdigest()


# --- the measurement -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """What one more image costs. Bytes, seconds, chunks; None where there is nothing to count."""

    disk: int
    device: int
    memory: int
    seconds: float
    store_reads: int | None


@dataclass(frozen=True, slots=True)
class Server:
    """A running nbdkit, and the files that it serves from."""

    pid: int
    socket: Path
    files: list[Path]
    metrics: Path | None

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={quote(str(self.socket))}"

    def device_bytes(self) -> int:
        return process_value(self.pid, "io", "read_bytes")

    def memory_bytes(self) -> int:
        """Anonymous memory and page cache. The resident set size would count those pages of the
        page cache that are mapped twice, and leave out those that are not."""
        anonymous = process_value(self.pid, "status", "RssAnon") << 10
        return anonymous + sum(map(cached_bytes, self.files))

    def store_reads(self) -> int | None:
        return store_reads(self.metrics) if self.metrics else None


@contextmanager
def nbdkit(work: Path, name: str, plugin: list[str], files: list[Path]) -> Iterator[Server]:
    """One nbdkit that serves from `files`, none of which is in page cache."""
    for file in files:
        drop_from_cache(file)
    path = work / f"{name}.sock"
    metrics = work / f"{name}.metrics" if plugin[0] == "python" else None
    command = ["nbdkit", "--foreground", "--readonly", "--unix", str(path), *plugin]
    if metrics is not None:
        command.append(f"metrics={metrics}")
    ready = (lambda: path.exists() and metrics.exists()) if metrics else path.exists
    with started(command, ready, work / f"{name}.log") as pid:
        yield Server(pid, path, files, metrics)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The image files, and what reading each of them must give."""

    images: dict[str, Path]
    expected: dict[str, dict[str, str]]
    mounting: bool

    def read(self, server: Server, export: str, work: Path) -> float:
        """Read everything in an export and compare it. Returns the seconds reading took."""
        if not self.mounting:
            start = time.monotonic()
            found = {"image": copied_digest(server.uri(export))}
            seconds = time.monotonic() - start
        else:
            with mounted(server.uri(export), work) as where:
                start = time.monotonic()
                found = read_tree(where)
                seconds = time.monotonic() - start
        expected = self.expected[export]
        for path in sorted(expected.keys() | found.keys()):
            if expected.get(path) != found.get(path):
                raise DemoError(f"{export}: {path} differs from what went into the image")
        return seconds


def measure(corpus: Corpus, server: Server, disk: dict[str, int], work: Path) -> dict[str, Cost]:
    """Read every image of a server in turn. Returns what each one added."""
    idle = Cost(disk[IDLE], server.device_bytes(), server.memory_bytes(), 0, server.store_reads())
    costs = {IDLE: idle}
    for export, label in IMAGES.items():
        device, memory, reads = server.device_bytes(), server.memory_bytes(), server.store_reads()
        say(f"  reading the {label.removeprefix('a ')}")
        seconds = corpus.read(server, export, work)
        reads_now = server.store_reads()
        costs[export] = Cost(
            disk[export],
            server.device_bytes() - device,
            server.memory_bytes() - memory,
            seconds,
            None if reads is None or reads_now is None else reads_now - reads,
        )
    return costs


def build_corpus(work: Path, tree_bytes: int, *, mounting: bool) -> Corpus:
    """Make the trees and their images."""
    trees = {"base": work / "base", "derived": work / "derived"}
    say(f"collecting {tree_bytes / 1e6:.0f} MB of files, and a changed copy")
    copy_files(BASE, trees["base"], tree_bytes)
    derive_tree(trees["base"], trees["derived"], int(tree_bytes * ADDED_SHARE))
    say("building the two EROFS images")
    images = {name: work / f"{name}.img" for name in trees}
    for name, tree in trees.items():
        run("mkfs.erofs", "--quiet", images[name], tree)
    if mounting:
        expected = {name: read_tree(tree) for name, tree in trees.items()}
    else:
        expected = {name: {"image": file_digest(image)} for name, image in images.items()}
    return Corpus(images, {**expected, "clone": expected["base"]}, mounting)


def file_digest(path: Path) -> str:
    digest = xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def measure_shared(corpus: Corpus, work: Path) -> dict[str, Cost]:
    """The costs with dedupstore."""
    store = work / "store"
    dedupstore = [str(DEDUPSTORE), "--store", str(store)]
    run(*dedupstore, "init")
    steps = {
        "base": ("import", str(corpus.images["base"]), "base"),
        "clone": ("clone", "base", "clone"),
        "derived": ("import", str(corpus.images["derived"]), "derived"),
    }
    disk = {IDLE: disk_bytes(store)}
    for name, step in steps.items():
        say("dedupstore " + " ".join(Path(word).name for word in step))
        before = disk_bytes(store)
        run(*dedupstore, *step)
        disk[name] = disk_bytes(store) - before
    # Room for everything: what is shown is what is needed, not what a small cache forgets.
    cache_bytes = 2 * sum(image.stat().st_size for image in corpus.images.values())
    plugin = ["python", str(ROOT / "nbdplugin/dedup.py"), f"store={store}", f"cache={cache_bytes}"]
    say("serving all three from one nbdkit with the plugin")
    with nbdkit(work, "shared", plugin, [store / "data.mdb"]) as server:
        return measure(corpus, server, disk, work)


def measure_plain(corpus: Corpus, work: Path) -> dict[str, Cost]:
    """The costs with a plain file for each image."""
    plain = work / "plain"
    plain.mkdir()
    for name in IMAGES:
        shutil.copyfile(corpus.images["base" if name == "clone" else name], plain / name)
    files = [plain / name for name in IMAGES]
    disk = {IDLE: 0, **{file.name: disk_bytes(file) for file in files}}
    say("serving three plain image files from one nbdkit file")
    with nbdkit(work, "plain", ["file", f"dir={plain}"], files) as server:
        return measure(corpus, server, disk, work)


# --- the table -----------------------------------------------------------------------------------


def cells(label: str, plain: Cost, shared: Cost) -> list[str]:
    def megabytes(of_plain: int, of_shared: int) -> str:
        # A server may end up with a little less memory than before: that is nothing added.
        return f"{max(of_plain, 0) / 1e6:.1f} -> {max(of_shared, 0) / 1e6:.1f}"

    return [
        label,
        megabytes(plain.disk, shared.disk),
        megabytes(plain.device, shared.device),
        megabytes(plain.memory, shared.memory),
        f"{plain.seconds:.2f} -> {shared.seconds:.2f}",
        str(shared.store_reads),
    ]


def total(costs: dict[str, Cost]) -> Cost:
    rows = costs.values()
    return Cost(
        sum(cost.disk for cost in rows),
        sum(cost.device for cost in rows),
        sum(cost.memory for cost in rows),
        sum(cost.seconds for cost in rows),
        sum(cost.store_reads or 0 for cost in rows),
    )


def table(plain: dict[str, Cost], shared: dict[str, Cost]) -> str:
    """The result as a Markdown table that is also readable as text."""
    head = [
        "plain files -> dedupstore",
        "MB on disk",
        "MB read from disk",
        "MB server memory",
        "seconds to read all",
        "store reads",
    ]
    labels = {IDLE: "nothing read yet", **IMAGES}
    rows = [cells(label, plain[name], shared[name]) for name, label in labels.items()]
    rows.append(cells("in all", total(plain), total(shared)))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    lines = []
    for row in (head, rule, *rows):
        first, *others = (
            (text.ljust if index == 0 else text.rjust)(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(f"| {' | '.join((first, *others))} |")
    return "\n".join(lines)


def program_version(*command: str) -> str:
    """The last word of the first line a program says about its version."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return ((result.stdout or result.stderr).splitlines() or ["?"])[0].split()[-1]


# --- start and end -------------------------------------------------------------------------------


def stop_on_signals() -> None:
    """Let the first Ctrl-C, SIGTERM or SIGHUP unwind everything, and nothing disturb that."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, _frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        say("interrupted, cleaning up")
        raise SystemExit(128 + number)

    for each in signals:
        signal.signal(each, stop)


@contextmanager
def work_directory() -> Iterator[Path]:
    """A temporary directory that goes with everything in it, mounts included."""
    parent = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        work = Path(tempfile.mkdtemp(prefix="dedupstore-demo-", dir=parent)).resolve()
    except OSError as error:
        raise DemoError(f"{parent}: {error.strerror}") from None
    try:
        if len(os.fsencode(work / "shared.metrics")) > SOCKET_PATH_BYTES_MAX:
            raise DemoError(f"TMPDIR={parent}: too long for a unix socket in it")
        yield work
    finally:
        # An interruption may have come between a mount and the note to undo it.
        inside = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for where in reversed([path for path in inside if path.startswith(f"{work}/")]):
            unmount(Path(where))
        shutil.rmtree(work, ignore_errors=True)


def require_space(work: Path, tree_bytes: int) -> None:
    # Tree, changed copy, two images, three plain files and the store.
    needed = 7 * tree_bytes
    if shutil.disk_usage(work).free < needed:
        raise DemoError(f"{work.parent}: {needed / 1e6:.0f} MB of free space are needed (TMPDIR=)")


def demonstrate(tree_bytes: int) -> str:
    """Measure everything. Returns what to print."""
    obstacle = why_not_mount()
    if obstacle is not None:
        say(f"{obstacle}: reading the exports with nbdcopy instead of mounting them")
    with work_directory() as work:
        require_space(work, tree_bytes)
        corpus = build_corpus(work, tree_bytes, mounting=obstacle is None)
        shared = measure_shared(corpus, work)
        plain = measure_plain(corpus, work)
    if shared["clone"].store_reads != 0:
        raise DemoError(f"reading the clone loaded {shared['clone'].store_reads} chunks, not 0")
    how = (
        "mounted with the kernel's EROFS over nbdfuse, every file read and compared"
        if obstacle is None
        else f"read whole with nbdcopy and compared ({obstacle}: not mounted)"
    )
    return "\n".join(
        (
            f"Each row is what one more image adds, {how}.",
            f"Linux {os.uname().release}, nbdkit {program_version('nbdkit', '--version')}, "
            f"{len(os.sched_getaffinity(0))} CPUs.",
            "",
            table(plain, shared),
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--megabytes", type=int, default=200, metavar="N", help="size of the base (default: 200)"
    )
    arguments = parser.parse_args()
    if arguments.megabytes < 1:
        parser.error("--megabytes must be at least 1")
    stop_on_signals()
    # mkfs.erofs and losetup are off an ordinary user's PATH.
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
    try:
        print(demonstrate(arguments.megabytes * 10**6))
    except DemoError as error:
        say(str(error))
        return 1
    except OSError as error:  # a full disk, or an export that answers with an error
        say(f"{error.filename or 'I/O'}: {error.strerror}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
