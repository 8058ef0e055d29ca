"""What a store holds, found out by the product's own check and by reading every image through the
server's reader, in a process of its own: what would crash it is a finding like any other."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from dedupstore.cache import FrameCache
from dedupstore.check import check_store
from dedupstore.errors import DedupError
from dedupstore.reader import ImageReader, Prefetcher, ReadCounters
from dedupstore.store import Store
from tools.crashes import program

_CACHE_BYTES = 64 << 20
_READ_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Observed:
    """`images`: name -> digest; `contents`: digest -> SHA-256 of what is read; `bytes` were."""

    findings: list[str]
    images: dict[str, str]
    contents: dict[str, str]
    leftovers: list[str]
    bytes: int


def observe(store: Path) -> Observed:
    """Check a store and read all of it. Raises DedupError's text as a finding."""
    answer = json.loads(program.in_fork(lambda: json.dumps(asdict(_observe(store)))))
    return Observed(**answer)


def _observe(path: Path) -> Observed:
    leftovers = []
    try:
        leftovers = [str(left) for left in (path / "tmp").iterdir()]
        checked = check_store(path)
        findings = [f"{found.what}: {found.reason}" for found in checked.findings]
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            # What is fetched to be looked at is stored in a copy: the store stays as it is.
            with Store(path) as store:
                images = {image.name: image.digest for image in store.images()}
                seen = path
                if store.stats().distant_frames:
                    seen = Path(shutil.copytree(path, Path(directory) / "copy"))
            with Store(seen) as store:
                contents, read = _read_all(store, images)
    except (DedupError, OSError) as error:  # without tmp/ it is no whole store
        return Observed([str(error)], {}, {}, leftovers, 0)
    return Observed(findings, images, contents, leftovers, read)


def _read_all(store: Store, images: dict[str, str]) -> tuple[dict[str, str], int]:
    cache = FrameCache(_CACHE_BYTES, store.loader().load)
    counters = ReadCounters()
    prefetcher = Prefetcher(cache, counters)
    contents: dict[str, str] = {}
    buffer = memoryview(bytearray(_READ_BYTES))
    for name, digest in images.items():
        if digest in contents:
            continue
        manifest = store.open_manifest(name)
        reader = ImageReader(name, manifest, cache, prefetcher, counters)
        found = hashlib.sha256()
        try:
            for at in range(0, manifest.size, _READ_BYTES):
                part = buffer[: min(_READ_BYTES, manifest.size - at)]
                reader.read(part, at)
                found.update(part)
            contents[digest] = found.hexdigest()
        except DedupError as error:
            contents[digest] = str(error)
        store.close_manifest(manifest)
    prefetcher.close()
    return contents, counters.bytes
