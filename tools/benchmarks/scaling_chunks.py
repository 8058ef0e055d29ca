"""How cost grows with the number of chunks: 2 million against 20 thousand, per chunk touched.

In one process, like `scaling`. What a process does once however little it touches (opening a store,
walking pages before gc or a server trusts them) is measured by itself. Both stores stay in the page
cache; what they hold is synthetic (`synthetic`).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

from dedupstore.gc import Collector
from dedupstore.store import Store
from nbdplugin.session import Config
from tools.benchmarks import synthetic
from tools.benchmarks.report import Bench, alternate
from tools.benchmarks.scaling import Figures, elapsed, silent

_CHUNKS = {"ours": 2_000_000, "smaller": 20_000}
_KNOWN_BYTES = 64 << 20
_GARBAGE_CHUNKS = 20_000
_GROWTH_MAX = 1.5
_MARKED_PER_SECOND_MIN = 500_000


def chunks(bench: Bench) -> None:
    """Import of a known image, gc, and opening, in both stores in turn."""
    paths = {name: bench.work / f"chunks-{name}" for name in _CHUNKS}
    known = bench.work / "known.img"
    known.write_bytes(random.Random(5).randbytes(_KNOWN_BYTES))
    for name, total in _CHUNKS.items():
        taken = elapsed(partial(synthetic.make_store, paths[name], total))
        bench.report.note(f"making a store of {total:,} chunks", "s", [taken])
        with Store(paths[name]) as store:
            store.import_path(known, "known", silent)
    _opening(bench, paths)
    stores = {name: Store(path) for name, path in paths.items()}
    try:
        _touching(bench, stores, known)
        _collecting(bench, stores)
    finally:
        for store in stores.values():
            store.close()


def _opening(bench: Bench, paths: dict[str, Path]) -> None:
    """What is done once: `validate` is what a server's start adds to opening."""

    def opened(path: Path) -> None:
        Store(path).close()

    def checked(path: Path) -> None:
        Config(path).validate()

    _milliseconds(bench, "look at a store before serving", paths, checked)
    _growth(bench, "opening a store", _milliseconds(bench, "opening a store", paths, opened))


def _milliseconds(
    bench: Bench, what: str, paths: dict[str, Path], work: Callable[[Path], None]
) -> Figures:
    figures = _alternate(bench, lambda name: work(paths[name]))
    for name, values in figures.items():
        milliseconds = [1e3 * value for value in values]
        bench.report.note(f"{what}, {_CHUNKS[name]:,} chunks", "ms", milliseconds)
    return figures


def _touching(bench: Bench, stores: dict[str, Store], known: Path) -> None:
    """Importing and opening one image, of as many chunks in either store."""
    names = (f"known-{i}" for i in count())
    touched = stores["ours"].image("known").chunks

    def opened(name: str) -> None:
        stores[name].close_manifest(stores[name].open_manifest("known"))

    for store in stores.values():
        store.import_path(known, next(names), silent, reread=True)  # its pages are walked before
    imports = _alternate(
        bench, lambda name: stores[name].import_path(known, next(names), silent, reread=True), 3
    )
    _per_chunk(bench, "import of a known image", imports, dict.fromkeys(stores, touched))
    opens = _alternate(bench, opened, 10)
    _per_chunk(bench, "opening an image", opens, dict.fromkeys(stores, touched))


def _collecting(bench: Bench, stores: dict[str, Store]) -> None:
    totals = {name: store.stats().chunks for name, store in stores.items()}

    def mark(name: str) -> None:
        Collector(stores[name].env, stores[name].path).run(dry_run=True)

    def walk(name: str) -> None:
        stores[name].env.verify(skip=frozenset())

    # The target is for all of gc; its two parts are shown for what they are.
    marked = _alternate(bench, mark)
    _per_chunk(bench, "gc: marking and the index", marked, totals, bound=False)
    speeds = [totals["ours"] / taken for taken in marked["ours"]]
    bench.report.floor("gc: marking and the index", "chunks/s", speeds, _MARKED_PER_SECOND_MIN)
    walked = _alternate(bench, walk)
    _per_chunk(bench, "gc: walk of all pages before", walked, totals, bound=False)
    whole = _alternate(bench, lambda name: stores[name].collect_garbage())
    _per_chunk(bench, "gc that finds nothing", whole, totals)
    _sweeping(bench, stores)


def _sweeping(bench: Bench, stores: dict[str, Store]) -> None:
    """What deleting adds: its chunks' index entries lie all over the index, a page each in a large
    one and many to a page in a small one, so this grows with no other work to blame."""
    figures: Figures = {name: [] for name in stores}
    for _ in range(bench.rounds):
        for name, store in stores.items():
            idle = elapsed(store.collect_garbage)
            synthetic.add_chunks(store, "garbage", _GARBAGE_CHUNKS, seed=6)
            store.remove(["garbage"])
            figures[name].append(elapsed(store.collect_garbage) - idle)
    for name, values in figures.items():
        microseconds = [1e6 * value / _GARBAGE_CHUNKS for value in values]
        bench.report.note(f"gc: sweeping, {_CHUNKS[name]:,} chunks", "us/chunk", microseconds)


def _alternate(bench: Bench, work: Callable[[str], object], times: int = 1) -> Figures:
    runs = {name: partial(elapsed, partial(work, name)) for name in _CHUNKS}
    return alternate(bench.rounds * times, runs)


def _per_chunk(
    bench: Bench, what: str, figures: Figures, touched: dict[str, int], *, bound: bool = True
) -> None:
    for name, values in figures.items():
        microseconds = [1e6 * value / touched[name] for value in values]
        bench.report.note(f"{what}, {_CHUNKS[name]:,} chunks", "us/chunk", microseconds)
    each = {name: [v / touched[name] for v in values] for name, values in figures.items()}
    _growth(bench, f"{what}, per chunk", each, bound=bound)


def _growth(bench: Bench, what: str, figures: Figures, *, bound: bool = True) -> None:
    growth = statistics.median(figures["ours"]) / statistics.median(figures["smaller"])
    row = f"{what}: {_CHUNKS['ours']:,} against {_CHUNKS['smaller']:,} chunks"
    if bound:
        bench.report.bound(row, "x", [growth], _GROWTH_MAX)
    else:
        bench.report.note(row, "x", [growth])
