"""What a guest boots into: the caller's files, the agent, and the script that starts it.

Makes the archive that goes behind those of the cache. Everything Python that is given is compiled
here when this interpreter is of the guest's version: an emulated processor is slow at it.
"""

from __future__ import annotations

import importlib.util
import marshal
from collections.abc import Mapping
from pathlib import Path

from tools.guests import cpio

# In the guest's PYTHONPATH.
CHECKOUT = "/opt/checkout"
HOST_ADDRESS = "10.0.2.2"  # this machine, as qemu's user network shows it

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_OURS = ("tools/guests/__init__.py", "tools/guests/agent.py", "tools/guests/inside.py")
_GUEST_PYTHON = "cpython-311"
_GUEST_MAGIC = (3495).to_bytes(2, "little") + b"\r\n"

_INIT = f"""\
#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 PYTHONPATH={CHECKOUT}
mkdir -p /proc /sys /dev /run /tmp /mnt /root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
ln -s /proc/self/fd /dev/fd
for module in virtio_pci virtio_console virtio_net; do modprobe $module; done
ip link set lo up
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via {HOST_ADDRESS}
python3 -m tools.guests.agent
poweroff -f
"""


def content(files: Mapping[str, Path | bytes]) -> bytes:
    """The archive. `files` maps absolute paths in the guest to files or directories here, or to
    content."""
    entries = {
        "/init": cpio.file(_INIT.encode(), executable=True),
        "/sbin/modprobe": cpio.symlink("/bin/busybox"),  # where the kernel calls it
        "/etc/passwd": cpio.file(b"root:x:0:0:root:/root:/bin/sh\n"),
        "/etc/group": cpio.file(b"root:x:0:\n"),
    }
    ours = {f"{CHECKOUT}/{name}": _ROOT / name for name in _OURS}
    for path, source in {**ours, **files}.items():
        entries |= _entries(path, source)
    for path in [path for path in entries if path.endswith(".py")]:
        entries |= _compiled(path, entries[path].data)
    return cpio.archive(entries)


def checkout_files(*names: str) -> dict[str, Path | bytes]:
    """Files and packages of this checkout, for `Guest(files=…)`; the guest can import them."""
    return {f"{CHECKOUT}/{name}": _ROOT / name for name in names}


def _entries(path: str, source: Path | bytes) -> dict[str, cpio.Entry]:
    if isinstance(source, bytes):
        return {path: cpio.file(source)}
    if source.is_symlink():
        return {path: cpio.symlink(str(source.readlink()))}
    if source.is_dir():
        found = {path: cpio.DIRECTORY}
        for inner in sorted(source.iterdir()):
            if inner.name != "__pycache__":
                found |= _entries(f"{path}/{inner.name}", inner)
        return found
    executable = bool(source.stat().st_mode & 0o100)
    return {path: cpio.file(source.read_bytes(), executable=executable)}


def _compiled(path: str, source: bytes) -> dict[str, cpio.Entry]:
    """The cache file of a Python file; not checked against it."""
    if importlib.util.MAGIC_NUMBER != _GUEST_MAGIC:
        return {}
    directory, _, name = path.rpartition("/")
    code = marshal.dumps(compile(source, path, "exec", dont_inherit=True))
    unchecked = (1).to_bytes(4, "little") + bytes(8)
    cached = f"{directory}/__pycache__/{name.removesuffix('.py')}.{_GUEST_PYTHON}.pyc"
    return {cached: cpio.file(_GUEST_MAGIC + unchecked + code)}
