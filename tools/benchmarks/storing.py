"""Space, import and export: dedupstore against borg, casync, restic and desync on the same images.

    tools/bench space import known export

Every timed run begins with nothing left to write back from the one before and with what it reads
in the page cache; its time is that of the whole command. What a command leaves in the page cache,
to be written later, is not in its time, for any program. Programs take turns; the slow ones
(`rounds_max` in competitors.py) sit out after three rounds. How they are set up: competitors.py;
which versions they are: the raw figures.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count, repeat
from pathlib import Path

from blake3 import blake3

from tools.benchmarks.competitors import TOOLS, Borg, DedupStore, Tool
from tools.benchmarks.processes import run, warm_up
from tools.benchmarks.report import Bench, alternate

_BLOCK = 4096


def space(bench: Bench) -> None:
    """Bytes on disk for the whole corpus, and the dedup ratio against fixed 4 KiB chunks."""
    sizes: dict[str, float] = {}
    ratio = 0.0
    for kind in _present(bench):
        with _stored(bench, kind) as tool:
            os.sync()
            sizes[kind.name] = tool.disk_bytes() / 1e6
            if isinstance(tool, DedupStore):
                ratio = tool.dedup_ratio()
    figures = {name: [size] for name, size in sizes.items()}
    bench.report.compare("corpus on disk", "MB", figures, lower_is_better=True)
    ours = sizes.pop("ours")
    if sizes:
        smallest = min(sizes, key=lambda name: sizes[name])
        what = f"corpus on disk, share of the smallest other ({smallest})"
        bench.report.bound(what, "", [ours / sizes[smallest]], 0.92)
    share = ratio / _fixed_ratio(bench.images)
    bench.report.floor("dedup ratio, share of fixed 4 KiB chunks'", "", [share], 0.96)


def ingest(bench: Bench) -> None:
    """Seconds to import the whole corpus into a new, empty store; making it is not counted."""

    def timed(kind: type[Tool]) -> float:
        with _empty(bench, kind) as tool:
            warm_up(*bench.images)
            return _seconds(lambda: _store(tool, bench.images))

    figures = _in_turn(bench, {kind: partial(timed, kind) for kind in _present(bench)})
    targets = {"borg zstd,3": 2.5, "casync": 4}
    bench.report.compare(
        "import of the corpus", "s", figures, targets=targets, lower_is_better=True
    )


def known(bench: Bench) -> None:
    """Seconds to import the largest image into a store that has it: from the very file it came
    from, which a program may recognise unread, and from a copy of it, which it has to read."""
    image = bench.images[-1]
    what = "import of a known image"
    with ExitStack() as stack, tempfile.TemporaryDirectory(dir=bench.work) as directory:
        kinds = _present(bench, DedupStore, Borg)
        tools = [stack.enter_context(_stored(bench, kind)) for kind in kinds]
        copies = _copies(image, Path(directory))
        bench.report.compare(
            f"{what}, the same file",
            "s",
            _known_seconds(bench, tools, repeat(image)),
            targets={"cp to /dev/null": 0.5},
            lower_is_better=True,
        )
        figures = _known_seconds(bench, tools, copies)
        bench.report.compare(f"{what}, a fresh copy", "s", figures, lower_is_better=True)


def _known_seconds(
    bench: Bench, tools: list[Tool], sources: Iterator[Path]
) -> dict[str, list[float]]:
    """What each program takes for the next of `sources`, and what cp takes to read it."""
    numbers = count()

    def storing(tool: Tool) -> float:
        source = next(sources)
        warm_up(source)
        return _seconds(lambda: tool.store(source, f"{source.stem}-{next(numbers)}"))

    def reading() -> float:
        source = next(sources)
        warm_up(source)
        return _seconds(lambda: run("cp", source, "/dev/null"))

    runs: dict[str, Callable[[], float]] = {tool.name: partial(storing, tool) for tool in tools}
    runs["cp to /dev/null"] = reading
    return alternate(bench.rounds, runs)


def export(bench: Bench) -> None:
    """Seconds to write the largest image, of a store of them all, to a new file; the store is in
    the page cache, the file is not synced. Every program's bytes are compared once, before."""
    image = bench.images[-1]

    def timed(tool: Tool) -> float:
        with tempfile.TemporaryDirectory(dir=bench.work) as directory:
            return _seconds(lambda: tool.extract(image.stem, Path(directory)))

    with ExitStack() as stack:
        runs = {}
        for kind in _present(bench):
            tool = stack.enter_context(_stored(bench, kind))
            _verify(bench, tool, image)
            runs[kind] = partial(timed, tool)
        figures = _in_turn(bench, runs)
    targets = {"borg zstd,3": 2.0, "desync": 2.0}
    bench.report.compare("export to a file", "s", figures, targets=targets, lower_is_better=True)


def _present(bench: Bench, *kinds: type[Tool]) -> list[type[Tool]]:
    """Those of the programs (all, when none is named) that can be had. Reports the versions of
    these and the absence of the others."""
    present = []
    for kind in kinds or TOOLS:
        if kind.available():
            present.append(kind)
        else:
            bench.report.missing(kind.name)
    versions = {kind.name: kind.version() for kind in present}
    bench.report.raw.append({"suite": bench.report.suite, "what": "versions", "versions": versions})
    return present


@contextmanager
def _empty(bench: Bench, kind: type[Tool]) -> Iterator[Tool]:
    """A program with a new store, removed at the end."""
    with tempfile.TemporaryDirectory(dir=bench.work) as directory:
        tool = kind(Path(directory))
        tool.init()
        yield tool


@contextmanager
def _stored(bench: Bench, kind: type[Tool]) -> Iterator[Tool]:
    """A program with a store of the whole corpus, removed at the end."""
    with _empty(bench, kind) as tool:
        _store(tool, bench.images)
        yield tool


def _store(tool: Tool, images: list[Path]) -> None:
    for image in images:
        tool.store(image, image.stem)


def _seconds(action: Callable[[], None]) -> float:
    """How long it takes, after all earlier writes are on disk."""
    os.sync()
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def _in_turn(
    bench: Bench, runs: Mapping[type[Tool], Callable[[], float]]
) -> dict[str, list[float]]:
    """Like `alternate`, but slow programs sit out the later rounds."""
    figures: dict[str, list[float]] = {kind.name: [] for kind in runs}
    for round_ in range(bench.rounds):
        for kind, timed in runs.items():
            if round_ < kind.rounds_max:
                figures[kind.name].append(timed())
    return figures


def _copies(image: Path, directory: Path) -> Iterator[Path]:
    """New copies of a file. Each stays until the next is there, so that no two in a row have the
    same inode."""
    previous: Path | None = None
    for i in count():
        copy = directory / f"copy-{i}{image.suffix}"
        shutil.copyfile(image, copy)
        if previous is not None:
            previous.unlink()
        previous = copy
        yield copy


def _verify(bench: Bench, tool: Tool, image: Path) -> None:
    """Extract an image and compare it; brings what that reads into the page cache, too."""
    with tempfile.TemporaryDirectory(dir=bench.work) as directory:
        tool.extract(image.stem, Path(directory))
        (written,) = (path for path in Path(directory).rglob("*") if path.is_file())
        run("cmp", written, image)


def _fixed_ratio(images: list[Path]) -> float:
    """The dedup ratio that chunks of 4 KiB at multiples of it would have."""
    seen: set[bytes] = set()
    blocks = 0
    for image in images:
        with image.open("rb") as stream:
            while block := stream.read(_BLOCK):
                blocks += 1
                seen.add(blake3(block).digest())
    return blocks / len(seen)
