"""A remote behind a link that can be slow, can fail and counts: nginx, and tools/ondemand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.interop.rig import StoreDirectory, require_nbdkit
from tests.programs import require_program
from tools.ondemand import servers
from tools.ondemand.link import Link


@dataclass(slots=True)
class Far:
    """A remote with image `base`: its files, served by nginx behind a link."""

    folder: Path
    link: Link
    url: str


@contextmanager
def far_remote(directory: Path, image: Path) -> Iterator[Far]:
    """One with image `base`, pushed from a store `origin`."""
    require_nbdkit()
    require_program("nginx")
    (directory / "root").mkdir()
    origin = StoreDirectory(directory / "origin")
    origin.create()
    origin.do("import", image, "base")
    origin.do("remote", "add", "far", directory / "root" / "far")
    origin.do("push", "far", "base")
    with servers.nginx(directory / "root", directory / "nginx") as web, Link(web.port) as link:
        yield Far(directory / "root" / "far", link, f"{web.through(link.port).url}/far")
