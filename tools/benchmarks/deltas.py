"""What moves between stores when they have something in common already, and what open images cost:
parts of the suite `ondemand`, which says what makes their figures meaningless.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from tools.benchmarks.connections import Client
from tools.benchmarks.lazymounts import served
from tools.benchmarks.processes import run
from tools.benchmarks.remotes import RATE, REMOTE, RTT, Host, site
from tools.benchmarks.report import Bench
from tools.ondemand import servers
from tools.ondemand.link import MEGABIT, Link

_PUSH_MAX = 1.05
_MANY = 100
_MANY_BYTES = 16 << 20


def sharing(bench: Bench) -> None:
    """What a clone and a derived image fetch, when the image they share with is here."""
    with site(bench.work, rtt=RTT, rate=RATE) as here:
        publisher = here.publisher()
        publisher.do("import", bench.images[0], "base")
        before = publisher.unique_bytes()
        publisher.do("import", bench.images[1], "derived")
        own = publisher.unique_bytes() - before
        publisher.do("push", REMOTE, "base", "derived")
        with here.fresh() as host:
            host.pull("base", "--lazy")
            _read(host, "base")
            host.do("clone", "base", "second")
            here.link.counters(reset=True)
            _read(host, "second")
            moved = here.link.counters().bytes_down
            bench.report.bound("second clone of a lazy image: bytes fetched", "", [moved], 0)
            here.link.counters(reset=True)
            host.pull("derived", "--lazy")
            _read(host, "derived")
            moved = here.link.counters().bytes_down
        what = "derived lazy image, all read: bytes fetched / its own new bytes"
        bench.report.bound(what, "", [moved / own], 1.0)


def _read(host: Host, name: str) -> None:
    with served(host) as server:
        run("nbdcopy", server.uri(name), "null:")


def pushing(bench: Bench) -> None:
    """What a push sends of an image that is derived from one that is there."""
    with servers.seaweedfs(bench.work / "weed") as server, Link(server.port) as link:
        link.shape(RTT, RATE)
        there = server.through(link.port)
        host = Host(bench.work / "store", f"{there.url}/pushed", **there.environment)
        host.do("import", bench.images[0], "base")
        host.do("push", REMOTE, "base")
        before = host.stored_bytes()
        host.do("import", bench.images[1], "derived")
        own = host.stored_bytes() - before
        link.counters(reset=True)
        begin = time.monotonic()
        host.do("push", REMOTE, "derived")
        seconds = time.monotonic() - begin
        counters = link.counters()
    what = "push of a derived image: bytes sent / its new compressed bytes"
    bench.report.bound(what, "", [counters.bytes_up / own], _PUSH_MAX)
    bench.report.note("push of a derived image: requests", "", [counters.requests])
    share = counters.bytes_up / seconds / RATE
    bench.report.note("push of a derived image: share of the link", "", [share])


def many(bench: Bench) -> None:
    """Memory of a server that has a hundred different lazy images open, and of one to which the
    same images are local."""
    with site(bench.work, rtt=0.0, rate=1000 * MEGABIT) as here:
        publisher = here.publisher()
        names = [f"image{number}" for number in range(_MANY)]
        source = bench.work / "source"
        with bench.images[0].open("rb") as image:
            content = image.read(_MANY_BYTES)
        for number, name in enumerate(names):
            source.write_bytes(content + number.to_bytes(8, "little") * 512)
            publisher.do("import", source, name)
        publisher.do("push", REMOTE, *names)
        with here.fresh() as host:
            host.do("pull", REMOTE, *names, "--lazy")
            memory = {"ours": [_memory_of(host, names)], "the same, local": []}
        with here.fresh() as host:
            host.do("pull", REMOTE, *names)
            memory["the same, local"].append(_memory_of(host, names))
    bench.report.compare(f"memory of {_MANY} open lazy images", "MB", memory, lower_is_better=True)


def _memory_of(host: Host, names: list[str]) -> float:
    """Megabytes of a server after each image was opened and its first block read."""
    with served(host) as server, ExitStack() as stack:
        for name in names:
            client = Client(server.socket, name)
            stack.callback(client.close)
            client.read([0], 4096)
        return server.memory_bytes() / 1e6
