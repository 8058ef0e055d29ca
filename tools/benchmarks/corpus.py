"""The corpus: three Debian roots as EROFS images, built once and kept.

base: bookworm minbase; python: the same with python3, python3-numpy and git; science: that with
nginx and python3-scipy. Needs root and Debian's packages; an existing directory with three *.erofs
files is used as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

_LAYERS = (
    ("1-base", ()),
    ("2-python", ("python3", "python3-numpy", "git")),
    ("3-science", ("nginx", "python3-scipy")),
)
_UUID = "00000000-0000-0000-0000-000000000001"


def images(directory: Path) -> list[Path]:
    """The three images in order, built when `directory` does not hold them."""
    found = sorted(directory.glob("*.erofs"))
    if len(found) >= len(_LAYERS):
        return found[: len(_LAYERS)]
    directory.mkdir(parents=True, exist_ok=True)
    print("building the corpus (once)", file=sys.stderr)
    previous: Path | None = None
    for name, packages in _LAYERS:
        root = directory / f"{name}.root"
        if previous is None:
            _bootstrap(root)
        else:
            _run("cp", "-a", str(previous), str(root))
            _run("chroot", str(root), "apt-get", "install", "-y", *packages)
        _run("chroot", str(root), "apt-get", "clean")
        image = directory / f"{name}.erofs"
        _run("mkfs.erofs", "--quiet", "-T0", "-U", _UUID, str(image), str(root))
        if previous is not None:
            shutil.rmtree(previous)
        previous = root
    if previous is not None:
        shutil.rmtree(previous)
    return sorted(directory.glob("*.erofs"))[: len(_LAYERS)]


def _bootstrap(root: Path) -> None:
    """Make the first root from the first of this machine's mirrors that has it."""
    program = Path(__file__).parents[1] / "debian-mirrors"
    printed = subprocess.run([program], stdout=subprocess.PIPE, check=True, text=True).stdout
    mirrors = printed.split()
    for mirror in mirrors[:-1]:
        command = ["debootstrap", "--variant=minbase", "bookworm", str(root), mirror]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
        shutil.rmtree(root, ignore_errors=True)
    _run("debootstrap", "--variant=minbase", "bookworm", str(root), mirrors[-1])


def _run(*command: str) -> None:
    environment = {
        "PATH": "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin",
        "DEBIAN_FRONTEND": "noninteractive",
        "LC_ALL": "C",
    }
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    if result.returncode:
        sys.exit(f"{command[0]} failed: {result.stderr.decode(errors='replace')[-500:]}")
