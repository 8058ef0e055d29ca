"""Images whose bytes are elsewhere: what it takes until they can be used, and what moves.

The remote is behind a link (tools/ondemand/link.py) of 20 ms and 100 Mbit/s: `ondemand`, and beside
others `ondemand-others`; of other kinds: `ondemand-links`. Served by nginx, which costs a tenth of
what the link lets through; pushes go to SeaweedFS' S3 gateway. The image is the third of the corpus
(1.1 GB), beside others the second (379 MB); the derived one is the second, with the first one as
its base. Each figure starts with an empty store of its own and cold kernel caches. Programs of this
machine (nbdkit, the commands) are in memory, and have to be started, except for the first byte:
that is read from a host's server, which is there for all images; beside it one that is started for
it, as desync is.

What makes these figures meaningless, beside what the package says:
- taking one "local" for the other: with a trace, time over the link is beside the same command
  with the remote on this machine's disk, and beside a mount of an image that is here already,
  which has no pull to wait for;
- another link in the way: the proxy carries 1 Gbit/s with a tenth of a core and 600 MB/s at most.
  It has no slow start and no loss, which flatters whoever opens connections often or moves little
  on each; all three here keep theirs open;
- a local disk that is slower than the link;
- reading the shares of the link from short runs: the first second of a pull is start-up;
- "casync mount" reads a tree of files, not a block device: what it fetches for one file is more,
  because its chunks span files; its row of the first byte is a listing of the root.

"Fetched" counts every byte that came over the link, headers and manifests included, compressed as
they are. "Touched" are the bytes of distinct chunks that were read, uncompressed, as a trace has
recorded them. The same in one unit, uncompressed bytes that came, is beside it: more, since what
comes are frames, in which chunks are compressed together.

    tools/bench ondemand ondemand-others ondemand-links
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.benchmarks import deltas
from tools.benchmarks.lazymounts import (
    IMAGE,
    THEIRS,
    LaidOut,
    Lazy,
    Ours,
    record_python,
    start_python,
)
from tools.benchmarks.mounted import Mounts
from tools.benchmarks.remotes import RATE, RTT, Observed, Site, site, workplace
from tools.benchmarks.report import Bench, alternate
from tools.ondemand.link import MEGABIT

_OTHER_LINKS = {"1 ms, 1 Gbit/s": (0.001, 1000 * MEGABIT), "80 ms, 50 Mbit/s": (0.08, 50 * MEGABIT)}
_FULL = "pull, mount"
_LOCAL = "mount, all here"
_NEAR = "the same, no link"
_FULL_RATIO = 10.0
_LOCAL_RATIO = 1 / 1.3
_AMPLIFICATION_MAX = 1.25
_LINK_SHARE_MIN = 0.8
_MEASURES: dict[str, tuple[str, Callable[[Observed], float]]] = {
    "time": ("s", lambda one: one.seconds),
    "requests": ("", lambda one: one.requests),
    "moved": ("MB", lambda one: one.bytes_down / 1e6),
}
_ROUNDS_MAX = 3  # a full download takes the link half a minute, whatever the program


def ondemand(bench: Bench) -> None:
    """Everything, at 20 ms and 100 Mbit/s."""
    with site(bench.work, rtt=RTT, rate=RATE) as here:
        ours = Ours(here, bench.work)
        ours.publish(bench.images[2])
        _start(bench, here, "20 ms, 100 Mbit/s")
        _sustained(bench, here, "20 ms, 100 Mbit/s", RATE)
    for part in (_traced, deltas.sharing, deltas.pushing, deltas.many):
        with workplace(bench.work) as work:
            part(Bench(bench.images, work, min(bench.rounds, _ROUNDS_MAX), bench.report))


def others(bench: Bench) -> None:
    """Beside desync and casync: on the second image, for casync fetches the third for minutes."""
    with site(bench.work, rtt=RTT, rate=RATE) as here:
        ours = Ours(here, bench.work)
        ours.publish(bench.images[1])
        _side_by_side(bench, ours)


def links(bench: Bench) -> None:
    """Start-up and sustained rate over other links."""
    for name, (rtt, rate) in _OTHER_LINKS.items():
        with workplace(bench.work) as work, site(work, rtt=rtt, rate=rate) as here:
            Ours(here, work).publish(bench.images[2])
            _start(bench, here, name)
            _sustained(bench, here, name, rate)


def _start(bench: Bench, here: Site, link: str) -> None:
    """To a running interpreter: lazily, after a full download, and with everything here."""
    ours = Ours(here, bench.work)
    runs: dict[str, Callable[[], float]] = {
        "mount --pull": lambda: ours.python().seconds,
        "pull --lazy, mount": lambda: ours.python_by_steps().seconds,
        _FULL: lambda: _python_after(here, bench.work, full=True).seconds,
    }
    figures = alternate(min(bench.rounds, _ROUNDS_MAX), runs)
    for way in ("mount --pull", "pull --lazy, mount"):
        what = f"{link}: {way} to running python"
        mine = {"ours": figures[way], _FULL: figures[_FULL]}
        bench.report.compare(what, "s", mine, targets={_FULL: _FULL_RATIO}, lower_is_better=True)


def _python_after(here: Site, work: Path, *, full: bool) -> Observed:
    """To a running interpreter, the full download counted or not."""
    with workplace(work) as directory, here.fresh() as host:
        if not full:
            host.pull(IMAGE)
        watch = here.watch()
        if full:
            host.pull(IMAGE)
        with Mounts(host.store) as mounts:
            mounts.mount(IMAGE, directory / "point", "none")
            start_python(directory / "point")
            return watch.stop()


def _traced(bench: Bench) -> None:
    """With a trace of the interpreter's start, recorded where everything is: given to the mount, to
    a command of its own, or to the push."""
    with site(bench.work, rtt=RTT, rate=RATE) as here:
        ours, laid_out = Ours(here, bench.work), LaidOut(here, bench.work)
        for side in (ours, laid_out):
            side.publish(bench.images[2])
        trace = bench.work / "python.trace"
        touched = record_python(ours.publisher, trace)
        after: list[float] = []
        ways: dict[str, Callable[[], float]] = {
            "mounted with it": lambda: ours.python("--trace", trace).seconds,
            "pushed with it": lambda: laid_out.python().seconds,
            "prefetched by it": lambda: _prefetched(here, bench.work, trace, after),
            _NEAR: lambda: laid_out.python(near=True).seconds,
            _LOCAL: lambda: _python_after(here, bench.work, full=False).seconds,
        }
        figures = alternate(bench.rounds, ways)
        targets = {_LOCAL: _LOCAL_RATIO, _NEAR: _LOCAL_RATIO}
        for way in ("mounted with it", "pushed with it"):
            what = f"mount --pull to running python, a trace: {way}"
            mine = {"ours": figures[way], _NEAR: figures[_NEAR], _LOCAL: figures[_LOCAL]}
            bench.report.compare(what, "s", mine, targets=targets, lower_is_better=True)
        started = {"ours": after, _LOCAL: figures[_LOCAL]}
        what = "mount and python, after prefetch --trace"
        bench.report.compare(
            what, "s", started, targets={_LOCAL: _LOCAL_RATIO}, lower_is_better=True
        )
        _amplification(bench, here, touched)


def _prefetched(here: Site, work: Path, trace: Path, after: list[float]) -> float:
    """Seconds to a running interpreter with a prefetch before the mount; `after` gets those of them
    after the prefetch."""
    with workplace(work) as directory, here.fresh() as host:
        watch = here.watch()
        host.pull(IMAGE, "--lazy")
        host.do("prefetch", IMAGE, "--trace", trace)
        prefetched = watch.stop().seconds
        with Mounts(host.store) as mounts:
            mounts.mount(IMAGE, directory / "point", "none")
            start_python(directory / "point")
            seconds = watch.stop().seconds
            after.append(seconds - prefetched)
            return seconds


def _amplification(bench: Bench, here: Site, touched: int) -> None:
    """What comes for an interpreter's start, beside what it reads."""
    came: list[float] = []
    moved: list[float] = []
    for _ in range(bench.rounds):
        with workplace(bench.work) as directory, here.fresh() as host:
            watch = here.watch()
            host.pull(IMAGE, "--lazy")
            before = host.unique_bytes()
            with Mounts(host.store) as mounts:
                mounts.mount(IMAGE, directory / "point", "none")
                start_python(directory / "point")
                moved.append(watch.stop().bytes_down)
            came.append((host.unique_bytes() - before) / touched)
    what = "python start-up, no prefetch: bytes fetched / touched"
    bench.report.bound(what, "", [one / touched for one in moved], _AMPLIFICATION_MAX)
    what = "python start-up, no prefetch: bytes fetched / touched, both uncompressed"
    bench.report.note(what, "", came)


def _sustained(bench: Bench, here: Site, link: str, rate: float) -> None:
    """Share of the link's capacity that a whole image moves at."""
    ours = Ours(here, bench.work)
    for what, observe in (("pull", ours.fetch), ("reading a lazy image", ours.read_through)):
        shares = []
        for _ in range(min(bench.rounds, _ROUNDS_MAX)):
            observed = observe()
            shares.append(observed.bytes_down / observed.seconds / rate)
        bench.report.floor(f"{link}: {what}, share of the link", "", shares, _LINK_SHARE_MIN)


def _first_byte_of_all(side: Lazy) -> Observed:
    return side.first_byte_of_all() if isinstance(side, Ours) else side.first_byte()


def _side_by_side(bench: Bench, ours: Ours) -> None:
    """The same image and link, with what others have for it, in turn."""
    sides: dict[str, Lazy] = {ours.name: ours}
    for other in (LaidOut, *THEIRS):
        if other.available():
            sides[other.name] = other(ours.site, bench.work)
            sides[other.name].publish(bench.images[1])
        else:
            bench.report.missing(other.name)
    actions: dict[str, tuple[int, Callable[[Lazy], Observed]]] = {
        "running python": (_ROUNDS_MAX, lambda side: side.python()),
        "first byte": (_ROUNDS_MAX, lambda side: side.first_byte()),
        "first byte, its server started for it": (_ROUNDS_MAX, _first_byte_of_all),
        "all, read in order": (1, lambda side: side.read_through()),
        "all, fetched": (1, lambda side: side.fetch()),
    }
    for what, (rounds, action) in actions.items():
        seen = {
            name: [action(side) for _ in range(min(rounds, bench.rounds, side.rounds_max))]
            for name, side in sides.items()
        }
        for measure, (unit, take) in _MEASURES.items():
            figures = {name: [take(one) for one in ones] for name, ones in seen.items()}
            for mine in (Ours.name, LaidOut.name):
                theirs = {
                    other.name: figures[other.name] for other in THEIRS if other.name in sides
                }
                bench.report.compare(
                    f"lazy image{mine.removeprefix(Ours.name)}, {what}: {measure}",
                    unit,
                    {"ours": figures[mine], **theirs},
                    targets=dict.fromkeys(theirs, 1.0),
                    lower_is_better=True,
                )
