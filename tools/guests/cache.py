"""Kernels and programs for guests, from Debian packages, trimmed and kept in the user's cache.

A kernel is its vmlinuz and an archive of the modules that guests need; the programs are one archive
for all kernels. Fetched by tools/debian-packages, without root; nothing is installed. What an entry
was made of is part of its name, so another version of this file makes another one. Entries appear
complete or not at all; remove a kernel's directory to get a newer one. Two that start at once: the
second waits, and then finds it done.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.guests import cpio

SUITES = ("bookworm", "trixie-backports")

_TOOLS = Path(__file__).parents[1]
_SYSTEM_PATH = "/usr/sbin:/sbin"  # off an ordinary user's PATH
# What is modprobed in a guest, or asked for by the kernel itself; their dependencies come along.
_MODULES = (
    *("virtio_pci", "virtio_console", "virtio_net"),
    *("nbd", "erofs", "overlay", "loop", "dm_mod"),
)
# Found by the kernel through aliases; some kernels have them built in, under other names.
_ALIASES = ("crypto-crc32c", "fs-erofs", "fs-overlay")

_PROGRAMS_SUITE = "bookworm"
_PACKAGES = (
    *("busybox-static", "coreutils", "nbd-client", "socat"),
    *("python3-minimal", "libpython3-stdlib"),
)
# busybox's dd knows no iflag=direct, its nbd-client only half the options.
_PROGRAMS = ("bin/dd", "sbin/nbd-client", "usr/bin/socat", "usr/bin/python3.11")
_PYTHON = "usr/lib/python3.11"
_NOT_IN_GUESTS = (
    *("asyncio", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test"),
    *("unittest", "wsgiref", "xmlrpc", "curses", "dbm", "sqlite3", "email/mime", "__pycache__"),
)
_EXTENSIONS = ("_ctypes", "_hashlib", "_json", "_queue", "mmap", "termios", "resource")


class UnavailableError(Exception):
    """There is no guest to be had here; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in the cache."""

    suite: str
    directory: Path

    @property
    def vmlinuz(self) -> Path:
        """The kernel itself."""
        return self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        """The archive of its modules."""
        return self.directory / "modules.cpio"

    @property
    def release(self) -> str:
        """What `uname -r` says in the guest."""
        return (self.directory / "release").read_text().strip()


def kernel(suite: str, *, fetch: bool = False) -> Kernel:
    """The kernel of a Debian suite. Raises UnavailableError, without `fetch` also when it would
    have to be fetched."""
    key = _key(suite, *_MODULES, *_ALIASES)
    return Kernel(suite, _entry(f"kernel-{suite}-{key}", _make_kernel, suite, fetch))


def programs(*, fetch: bool = False) -> Path:
    """The archive of the programs. Raises as `kernel`."""
    key = _key(*_PACKAGES, *_PROGRAMS, *_NOT_IN_GUESTS, *_EXTENSIONS)
    directory = _entry(f"programs-{key}", _make_programs, _PROGRAMS_SUITE, fetch)
    return directory / "programs.cpio"


def _key(*inputs: str) -> str:
    """Names what an entry is made of: the inputs and the code that makes it."""
    code = [Path(__file__).read_text(), Path(cpio.__file__).read_text()]
    return hashlib.sha256("\0".join((*inputs, *code)).encode()).hexdigest()[:12]


def _cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "dedupstore" / "guests"


def _entry(name: str, make: Callable[[str, Path, Path], None], suite: str, fetch: bool) -> Path:
    """A directory of the cache, made if need be: `make(suite, scratch, result)`."""
    cache = _cache()
    target = cache / name
    if target.is_dir():
        return target
    if not fetch:
        raise UnavailableError(f"no {target} (run tools/guest --fetch)")
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=cache) as directory:
                result = Path(directory) / "result"
                result.mkdir()
                make(suite, Path(directory), result)
                result.rename(target)
    return target


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _run(*command: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a program that must succeed; what it printed. Raises UnavailableError."""
    path = f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"
    program = shutil.which(command[0], path=path)
    if program is None:
        raise UnavailableError(f"not installed: {command[0]}")
    result = subprocess.run(
        [program, *command[1:]],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "LC_ALL": "C", **(environment or {})},
    )
    if result.returncode:
        raise UnavailableError(result.stderr.strip() or f"{command[0]}: exit {result.returncode}")
    return result.stdout


# --- kernels ---


def _make_kernel(suite: str, scratch: Path, result: Path) -> None:
    root = scratch / "root"
    meta = ("--depends=linux-*-amd64", suite, root, "linux-image-amd64")
    _run(_TOOLS / "debian-packages", *meta)
    if not (root / "lib").exists():  # newer releases have it in /usr only
        (root / "lib").symlink_to("usr/lib")
    [modules] = (root / "lib/modules").iterdir()
    modules = modules.resolve()
    release = modules.name
    image = modules / "vmlinuz"
    (image if image.exists() else root / "boot" / f"vmlinuz-{release}").rename(result / "vmlinuz")
    (result / "release").write_text(f"{release}\n")

    _run("depmod", "-b", root, release)
    trimmed = scratch / "trimmed/lib/modules" / release
    trimmed.mkdir(parents=True)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copyfile(modules / name, trimmed / name)
    for module in _needed_modules(root, release):
        target = trimmed / module.relative_to(modules)
        target.parent.mkdir(parents=True, exist_ok=True)
        data = module.read_bytes()
        # Not compressed: busybox need not know how, and it is quicker.
        target.with_name(target.name.removesuffix(".xz")).write_bytes(
            lzma.decompress(data) if target.suffix == ".xz" else data
        )
    _run("depmod", "-b", scratch / "trimmed", release)
    found = {p for p in trimmed.rglob("*") if p.is_file() and p.suffix != ".bin"}
    entries = {f"/{p.relative_to(scratch / 'trimmed')}": cpio.file(p.read_bytes()) for p in found}
    (result / "modules.cpio").write_bytes(cpio.archive(entries))


def _needed_modules(root: Path, release: str) -> set[Path]:
    """The files of the modules that guests need."""
    found = set()
    for name in (*_MODULES, *_ALIASES):
        required = () if name in _MODULES else ("-q",)
        try:
            lines = _run("modprobe", "-d", root, "-S", release, "--show-depends", *required, name)
        except UnavailableError:
            if name in _MODULES:
                raise
            continue
        # "insmod FILE [PARAMETERS]", or "builtin NAME"
        found |= {Path(line.split()[1]) for line in lines.splitlines() if line[:7] == "insmod "}
    return {file.resolve() for file in found}


# --- programs ---


def _make_programs(suite: str, scratch: Path, result: Path) -> None:
    root = scratch / "root"
    _run(_TOOLS / "debian-packages", suite, root, *_PACKAGES)
    _compile_library(root)
    library = root / _PYTHON
    extensions = [next(library.glob(f"lib-dynload/{name}.*.so")) for name in _EXTENSIONS]
    binaries = [*(root / name for name in _PROGRAMS), *extensions]
    files = {*binaries, *_libraries(root, binaries), *library.rglob("*.pyc")}
    entries = {f"/{p.relative_to(root)}": _executable_or_data(p) for p in files}
    entries["/usr/bin/python3"] = cpio.symlink("python3.11")
    entries["/bin/busybox"] = _executable_or_data(root / "bin/busybox")
    there = {Path(path).name for path in entries}
    for applet in _run(root / "bin/busybox", "--list").split():
        if applet not in there:
            entries[f"/bin/{applet}"] = cpio.symlink("busybox")
    (result / "programs.cpio").write_bytes(cpio.archive(entries))


def _executable_or_data(path: Path) -> cpio.Entry:
    return cpio.file(path.read_bytes(), executable=os.access(path, os.X_OK))


def _loader(root: Path) -> list[str | Path]:
    """Runs a program of the packages on this machine, with the C library it was built for."""
    places = ":".join(str(root / p / "x86_64-linux-gnu") for p in ("lib", "usr/lib"))
    return [root / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "--library-path", places]


def _libraries(root: Path, binaries: list[Path]) -> set[Path]:
    """The shared libraries that programs and extensions load, as their names in the file system."""
    found = {root / "lib64/ld-linux-x86-64.so.2"}
    for binary in binaries:
        for line in _run(*_loader(root), "--list", binary).splitlines():
            path = Path(line.split(" => ")[-1].split(" (")[0].strip())
            if root in path.parents:
                found.add(path)
    return found


def _compile_library(root: Path) -> None:
    """Python's library, compiled by its own interpreter, in place of its sources: an emulated
    processor would take seconds for it. Not checked against sources, so always the same bytes."""
    library = root / _PYTHON
    for name in _NOT_IN_GUESTS:
        shutil.rmtree(library / name, ignore_errors=True)
    command = ("-m", "compileall", "-b", "-q", "-s", root, "-p", "/", library)
    _run(
        *(*_loader(root), root / "usr/bin/python3.11", *command),
        *("--invalidation-mode", "unchecked-hash"),
        environment={"PYTHONHOME": str(root / "usr"), "PYTHONDONTWRITEBYTECODE": "1"},
    )
