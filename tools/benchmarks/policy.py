"""Which policy the cache should have: recorded block traces replayed at several cache sizes.

`traces` has what is recorded and how; `policies` the competitors. Ours is the product's own code:
each request of a trace goes through `dedupstore.reader.ImageReader` into a
`dedupstore.cache.FrameCache` whose loader makes up bytes of the right length. Readahead is either
off or always in time. The others are told of each frame that a request needs, once per request.

Two figures for each policy and cache size, which is a share of all the distinct bytes that the
trace touches: requests that found all their frames in the cache, and bytes loaded from the store,
which is what a miss costs. Frames are 256 KiB and requests 4 to 256, so most hits are neighbours
of a miss; bytes loaded tell policies apart.

What makes it meaningless: comparing across recordings (the host trace is a little different each
time), and shares of different traces: a quarter of `list` is a few megabytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from dedupstore import format as fmt
from dedupstore.cache import Entry, FrameCache
from dedupstore.manifest import Manifest
from dedupstore.reader import ImageReader, ReadCounters
from dedupstore.store import Store
from tools.benchmarks.policies import LRU, Min, Policy, S3Fifo, Sieve
from tools.benchmarks.processes import DEDUPSTORE, run
from tools.benchmarks.report import Bench, Curve, Report
from tools.benchmarks.traces import Trace, traces

_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
# The size whose figures are rows of the table; all are curves.
_SHOWN = 1 / 8
# Added to the frame numbers of one clone after the other where they are not to share.
_CLONE_BITS = 24
_FRAME_MASK = (1 << _CLONE_BITS) - 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """`hits` is the share of requests that found all they needed; `loaded` is in bytes."""

    hits: float
    loaded: int


Replay = Callable[[int], Outcome]


@dataclass(slots=True)
class Frames:
    """What the store's frames are like, read from it once each."""

    load: Callable[[int], tuple[bytes, tuple[int, ...]]]
    costs: dict[int, int] = field(default_factory=dict)
    _made_up: dict[int, tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)
    _zeros: dict[int, bytes] = field(default_factory=dict)

    def cost(self, frame: int) -> int:
        """Bytes that the frame takes in the cache."""
        if frame not in self.costs:
            raw, offsets = self.load(frame & _FRAME_MASK)
            zeros = self._zeros.setdefault(len(raw), bytes(len(raw)))
            self._made_up[frame] = zeros, offsets
            self.costs[frame] = Entry(frame, zeros, offsets).cost
        return self.costs[frame]

    def made_up(self, frame: int) -> tuple[bytes, tuple[int, ...]]:
        """The frame with zeros for its bytes."""
        self.cost(frame)
        return self._made_up[frame]


class _Prompt:
    """Readahead that is always in time."""

    def __init__(self, cache: FrameCache) -> None:
        self._cache = cache

    def request(self, frame: int) -> bool:
        self._cache.prefetch(frame)
        return True

    def loaded(self) -> None:
        """Nothing to tidy."""


class _Never:
    """No readahead."""

    def request(self, frame: int) -> bool:  # noqa: ARG002 - as the product's
        return False

    def loaded(self) -> None:
        """Nothing to tidy."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace and, for each of its connections, the manifest that it reads through."""

    trace: Trace
    manifests: list[Manifest]
    frames: Frames

    def needs(self) -> list[list[int]]:
        """The frames of each request in order, without requests for nothing but holes."""
        return [frames for request in self.trace.requests if (frames := self._needs(*request))]

    def _needs(self, connection: int, offset: int, length: int) -> list[int]:
        runs = self.manifests[connection].runs(offset, length)
        frames = dict.fromkeys(ref >> fmt.REF_SLOT_BITS for _, _, ref in runs if ref)
        return list(frames)

    def replay(self, budget: int, *, readahead: bool) -> Outcome:
        """Through the product's reader and cache."""
        loaded = 0

        def load(frame: int) -> tuple[bytes, tuple[int, ...]]:
            nonlocal loaded
            loaded += self.frames.cost(frame)
            return self.frames.made_up(frame)

        cache = FrameCache(budget, load)
        prefetcher = _Prompt(cache) if readahead else _Never()
        counters = ReadCounters()
        readers = [
            ImageReader(clone, manifest, cache, prefetcher, counters)  # type: ignore[arg-type]
            for (_, clone), manifest in zip(self.trace.connections, self.manifests, strict=True)
        ]
        buffer = memoryview(bytearray(max(length for _, _, length in self.trace.requests)))
        asked = missed = 0
        for request in self.trace.requests:
            if not self._needs(*request):
                continue
            connection, offset, length = request
            before = cache.misses
            readers[connection].read(buffer[:length], offset)
            asked += 1
            missed += cache.misses != before
        return Outcome(1 - missed / asked, loaded)


def replay(policy: Policy, needs: list[list[int]]) -> Outcome:
    """Requests, each given as the frames that it needs, through a policy."""
    hits = 0
    for frames in needs:
        hit = True
        for frame in frames:
            hit = policy.use(frame) and hit
        hits += hit
    return Outcome(hits / len(needs), policy.loaded_bytes)


def policy(bench: Bench) -> None:
    """Hit ratios and bytes loaded of our cache, LRU, SIEVE, S3-FIFO and MIN on real traces."""
    path = bench.work / "store"
    run(DEDUPSTORE, "--store", path, "init")
    for image in bench.images:
        run(DEDUPSTORE, "--store", path, "import", image)
    recorded = list(traces(bench.images, path, bench.work))
    with Store(path) as store:
        manifests = {image.stem: store.open_manifest(image.stem) for image in bench.images}
        frames = Frames(store.loader().load)
        for trace in recorded:
            shared = [manifests[image] for image, _ in trace.connections]
            workload = Workload(trace, shared, frames)
            apart = Workload(trace, _apart(trace, manifests), frames)
            _measure(workload, apart, bench.report)
        for manifest in manifests.values():
            store.close_manifest(manifest)


def _apart(trace: Trace, manifests: Mapping[str, Manifest]) -> list[Manifest]:
    """Manifests as a cache keyed by export would see them: no clone's frames are another's."""
    clones = sorted(set(trace.connections))
    own = {clone: _moved(manifests[clone[0]], i + 1) for i, clone in enumerate(clones)}
    return [own[connection] for connection in trace.connections]


def _moved(manifest: Manifest, number: int) -> Manifest:
    """The same runs in frames of other numbers."""
    base = number << _CLONE_BITS + fmt.REF_SLOT_BITS
    lengths = array("Q", (end - start for start, end in pairwise(manifest.starts)))
    refs = array("Q", (ref and ref + base for ref in manifest.refs))
    record = fmt.ManifestRecord(manifest.size, 0, 0, 0, lengths, refs, array("Q"))
    return Manifest(manifest.digest, record)


def _measure(workload: Workload, apart: Workload, report: Report) -> None:
    """All policies on one trace: curves for everything, rows for one size."""
    needs = workload.needs()
    uses = [frame for frames in needs for frame in frames]
    costs = {frame: workload.frames.cost(frame) for frame in uses}
    distinct = sum(costs.values())
    runs: dict[str, Replay] = {
        "ours": lambda budget: workload.replay(budget, readahead=False),
        "LRU": lambda budget: replay(LRU(budget, costs), needs),
        "SIEVE": lambda budget: replay(Sieve(budget, costs), needs),
        "S3-FIFO": lambda budget: replay(S3Fifo(budget, costs), needs),
        "MIN": lambda budget: replay(Min(budget, costs, uses), needs),
        "ours, readahead": lambda budget: workload.replay(budget, readahead=True),
        "ours, nothing shared": lambda budget: apart.replay(budget, readahead=False),
    }
    name = workload.trace.name
    report.note(f"{name}: requests", "", [len(needs)])
    report.note(f"{name}: distinct bytes", "MB", [distinct / 1e6])
    outcomes = {who: [run(int(distinct * s)) for s in _SHARES] for who, run in runs.items()}
    for who, found in outcomes.items():
        report.curve(_curve(f"hits-{name}", who, "requests that hit", [o.hits for o in found]))
        loaded = [outcome.loaded / distinct for outcome in found]
        report.curve(_curve(f"loads-{name}", who, "bytes loaded / distinct bytes", loaded))
    shown = _SHARES.index(_SHOWN)
    hits = {who: [found[shown].hits * 100] for who, found in outcomes.items()}
    loads = {who: [found[shown].loaded / 1e6] for who, found in outcomes.items()}
    report.compare(f"{name}, cache 1/8: requests that hit", "%", hits)
    report.compare(f"{name}, cache 1/8: loaded", "MB", loads, lower_is_better=True)


def _curve(plot: str, label: str, y_label: str, y: list[float]) -> Curve:
    return Curve(plot, label, "cache / distinct bytes", y_label, _SHARES, tuple(y))
