"""How cost grows with the number of images and with an image's size: what is O(1) stays flat.

Everything runs in this process, so that the start of an interpreter hides nothing; what a process
does once, before its first write, has rows of its own. The store is synthetic (`synthetic`) and
lies on a disk: each change waits until it is synced.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from dedupstore.store import Store
from nbdplugin.session import Config, Session
from tools.benchmarks import synthetic
from tools.benchmarks.report import Bench, Curve

_LIMIT_MS = 5.0
_REPEATS = 51
_COUNTS = (10, 1_000, 10_000)
_SMALL, _LARGE, _SPARSE = "small-000000", "large", "sparse"
_SUBJECTS = {_SMALL: "one chunk", _LARGE: "1 GB", _SPARSE: "16 TiB"}
# The largest file that ext4 has: one block less than 16 TiB.
_SPARSE_BYTES = (16 << 40) - 4096
_SPARSE_REGIONS = 1_000
_REGION_BYTES = 64 << 10
_CLONES = 1_000
_MANIFEST_BYTES_PER_CHUNK_MAX = 16
_KIB = 1 << 10

Figures = dict[str, list[float]]


def silent(_done: int, _all: int) -> None:
    """A progress callback that does nothing."""


def elapsed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def images(bench: Bench) -> None:
    """Milliseconds of clone, info, rm and opening an export, by number and size of images."""
    path = bench.work / "images"
    with Store.create(path) as store:
        synthetic.add_small_images(store, 0, 1)
        synthetic.add_large_image(store, _LARGE, 1 << 30, distinct=2_000, seed=1)
        _import_sparse(bench, store)
        _manifests(bench, store)
    _first_opens(bench)
    medians: Figures = {}
    for total in _COUNTS:
        _fill(path, total)
        figures = {"first write of a process": [_first_write(path) for _ in range(bench.rounds)]}
        bench.report.note(f"first write of a process, {total:,} images", "ms", *figures.values())
        figures |= _operations(bench, path, total)
        for operation, values in figures.items():
            medians.setdefault(operation, []).append(statistics.median(values))
    x = tuple(map(float, _COUNTS))
    for operation, y in medians.items():
        plot = "time against number of images"
        bench.report.curve(Curve(plot, operation, "images", "ms", x, tuple(y)))


def _import_sparse(bench: Bench, store: Store) -> None:
    """Import a file of 16 TiB with some data all over it, its first and last block included."""
    source = bench.work / "sparse.img"
    places = random.Random(4)
    last = _SPARSE_BYTES - _REGION_BYTES
    inner = (places.randrange(last) & -4096 for _ in range(_SPARSE_REGIONS - 2))
    with source.open("wb") as file:
        for at in (0, *inner, last):
            file.seek(at)
            file.write(places.randbytes(_REGION_BYTES))
    taken = elapsed(lambda: store.import_path(source, _SPARSE, silent))
    source.unlink()
    regions = f"{_SPARSE_REGIONS:,} x {_REGION_BYTES // _KIB} KiB"
    bench.report.note(f"import of a sparse file of 16 TiB with {regions} of data", "s", [taken])


def _manifests(bench: Bench, store: Store) -> None:
    """What an image's chunks cost in memory and on disk, and that its clones cost them once."""
    synthetic.add_clones(store, _LARGE, _CLONES, "open-")
    names = store.names("open-")
    opened = [store.open_manifest(name) for name in names]
    distinct = {id(manifest): manifest for manifest in opened}
    shared = f"manifests in memory with {_CLONES:,} clones of a 1 GB image open"
    bench.report.bound(shared, "", [len(distinct)], 1)
    chunks = store.image(_LARGE).chunks
    # Without what every image costs: the arrays' heads, and the one start that is its end.
    heads = 2 * sys.getsizeof(array("Q")) + array("Q").itemsize
    memory = sys.getsizeof(opened[0].starts) + sys.getsizeof(opened[0].refs) - heads
    per_chunk = "bytes of manifest per chunk, each a run of its own"
    bench.report.bound(
        f"{per_chunk}, in memory", "B", [memory / chunks], _MANIFEST_BYTES_PER_CHUNK_MAX
    )
    with store.env.read() as txn:
        stored = len(txn.get(opened[0].digest, db=store.env.manifests) or b"")
    bench.report.note(f"{per_chunk}, on disk", "B", [stored / chunks])
    for manifest in opened:
        store.close_manifest(manifest)
    store.remove(names)


def _first_opens(bench: Bench) -> None:
    """Opening an image that nobody has open decodes its manifest: the one cost that grows with the
    number of runs. Here each chunk is a run; of three Debian roots, a third or less are."""
    sizes = [(1 << 30) // 16, (1 << 30) // 4, 1 << 30, 4 << 30]
    medians: list[float] = []
    with Store.create(bench.work / "opens") as store:
        for number, size in enumerate(sizes):
            name = f"{size >> 20} MiB"
            synthetic.add_large_image(store, name, size, distinct=100, seed=number)
            values = _repeat(partial(_open, store, name))
            runs = store.image(name).chunks
            what = f"open: image of {name}, {runs:,} runs, nobody has it open"
            bench.report.bound(what, "ms", values, _LIMIT_MS)
            medians.append(statistics.median(values))
    x = tuple(size / 1e6 for size in sizes)
    curve = Curve("first open", "a run for each chunk", "image, MB", "ms", x, tuple(medians))
    bench.report.curve(curve)


def _open(store: Store, name: str) -> None:
    store.close_manifest(store.open_manifest(name))


def _fill(path: Path, total: int) -> None:
    """Bring the store to `total` images, half of the new ones clones."""
    with Store(path) as store:
        missing = total - len(store.names())
        synthetic.add_clones(store, _LARGE, missing // 2, f"clone-{total}-")
        synthetic.add_small_images(store, len(store.names("small-")), missing - missing // 2)
        assert len(store.names()) == total


def _first_write(path: Path) -> float:
    """Milliseconds: it walks the pages of names and manifests."""
    with Store(path) as store:
        taken = elapsed(lambda: store.clone(_LARGE, "first"))
        store.remove(["first"])
    return 1e3 * taken


def _operations(bench: Bench, path: Path, total: int) -> Figures:
    """Report every operation on the small image, and with most images on all; return the former's
    milliseconds."""
    subjects = _SUBJECTS if total == _COUNTS[-1] else (_SMALL,)
    with _session(path) as session:
        session.store.clone(_SMALL, "first")
        session.store.remove(["first"])
        measured = {subject: _measure(session, subject) for subject in subjects}
    for subject, figures in measured.items():
        for operation, values in figures.items():
            what = f"{operation}: image of {_SUBJECTS[subject]}, {total:,} images"
            bench.report.bound(what, "ms", values, _LIMIT_MS)
    return measured[_SMALL]


@contextmanager
def _session(path: Path) -> Iterator[Session]:
    session = Session(Config(path, cache_bytes=1 << 20))
    try:
        yield session
    finally:
        session.close()


def _measure(session: Session, name: str) -> Figures:
    """Milliseconds of each repetition of each operation on an image."""
    store = session.store
    made, removed = count(), count()

    def export(wanted: str) -> None:
        session.close_export(session.open(wanted))

    operations: dict[str, Callable[[], object]] = {
        "clone": lambda: store.clone(name, f"x{next(made)}"),
        "info": lambda: store.image(name),
        "rm": lambda: store.remove([f"x{next(removed)}"]),
        "open": lambda: export(name),
        "find the default export": session.default_export,
    }
    figures = {what: _repeat(work) for what, work in operations.items()}
    reader = session.open(name)
    figures["open beside another"] = _repeat(operations["open"])
    session.close_export(reader)
    return figures


def _repeat(work: Callable[[], object]) -> list[float]:
    return [1e3 * elapsed(work) for _ in range(_REPEATS)]
