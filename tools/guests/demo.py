"""What sharing saves of a kernel's page cache: the table in the README, on kernels in guests.

    tools/demo --guest

Corpus: the two Debian roots of tools/fetch-roots, imported as directories. In each guest containers
are mounted by the project's own logic, over real nbd devices, and every file is read; caches are
dropped before the first of each row. Page cache is the growth of Cached + Buffers; MB are 10^6
bytes. Every file of the shared mounts is compared with its tree.

Numbers would mean nothing with readers that splice (on Linux 7 spliced pages are private copies),
without dropping caches, or where others fill the page cache meanwhile: a guest's is its own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dedupstore.server import ServerOptions, server_command
from dedupstore.store import Store
from tools.guests import cache, inside, sharing
from tools.guests.content import checkout_files
from tools.guests.guest import Guest, GuestError
from tools.guests.sharing import Containers, Cost, best_share

_START_SECONDS = 30
_HEAD = (
    *("page cache, MB", "sharing", "first container", "second container"),
    *("its NBD reads, MB", "its store reads", "identical clone"),
)


class _DemoError(Exception):
    """What stops the demo, in one line."""


def main() -> int:
    """Print the table; 1 if something failed or a file differs."""
    roots = os.environ["DEDUPSTORE_ROOTS"]
    try:
        with tempfile.TemporaryDirectory(prefix="dedupstore-demo-") as work:
            print(_demonstrate(Path(roots), Path(work)))
    except (GuestError, cache.UnavailableError, _DemoError) as error:
        print(f"tools/demo: {error}", file=sys.stderr)
        return 1
    return 0


def _demonstrate(roots: Path, work: Path) -> str:
    with ExitStack() as opened:
        store = opened.enter_context(Store.create(work / "store"))
        for name in ("base", "derived"):
            _say(f"importing {name}")
            store.import_path(roots / name, name, lambda _done, _all: None)
        store.clone("base", "clone")
        rows = [row for suite in cache.SUITES for row in _measure(store, suite, roots, work)]
        own = store.diff("base", "derived")
    return "\n".join(
        (
            f"Two Debian roots; the second has {own.only_b_bytes / 1e6:.1f} MB of chunks in "
            f"{own.only_b_chunks} chunks that the first has not.",
            "",
            _table([_HEAD, *rows]),
        )
    )


def _measure(store: Store, suite: str, roots: Path, work: Path) -> Iterator[tuple[str, ...]]:
    """The rows of one kernel."""
    path = work / f"{suite}.sock"
    with (
        _server(store.path, path, work / f"{suite}.metrics") as store_reads,
        Guest(
            suite,
            files=checkout_files(*sharing.PROJECT),
            sockets={sharing.SOCKET: path},
            fetch=True,
        ) as guest,
    ):
        containers = Containers(guest, store, store_reads)
        release = ".".join(guest.release.split(".")[:2])
        best = best_share(guest)
        for share in ("none", best):
            _say(f"Linux {release}, {share}")
            guest.python(inside.drop_caches)
            costs = [
                containers.cost(name, f"/mnt/{name}", share)
                for name in ("base", "derived", "clone")
            ]
            if share == best:
                _compare(guest, roots)
            containers.umount("/mnt/base", "/mnt/derived", "/mnt/clone")
            yield _row(f"Linux {release}", share, *costs)


def _compare(guest: Guest, roots: Path) -> None:
    for name in ("base", "derived"):
        found = guest.python(inside.inventory, f"/mnt/{name}", timeout=300)
        if found != inside.inventory(str(roots / name)):
            raise _DemoError(f"the mount of {name} differs from its tree")


def _row(kernel: str, share: str, first: Cost, second: Cost, clone: Cost) -> tuple[str, ...]:
    return (
        *(kernel, share, _mb(first.cached_bytes), _mb(second.cached_bytes)),
        *(_mb(second.nbd_bytes), str(second.store_reads), _mb(clone.cached_bytes)),
    )


def _mb(size: int) -> str:
    return f"{max(size, 0) / 1e6:.1f}"


def _table(rows: list[tuple[str, ...]]) -> str:
    """Markdown that is also readable as text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = tuple(
        "-" * width if i < 2 else f"{'-' * (width - 1)}:" for i, width in enumerate(widths)
    )
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = (
            (text.ljust if i < 2 else text.rjust)(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@contextmanager
def _server(store: Path, path: Path, metrics: Path) -> Iterator[Callable[[], int]]:
    """A server of its own for a guest; yields what counts the chunks it has loaded."""
    command = server_command(ServerOptions(store, path, metrics=metrics), "--foreground")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not metrics.exists() or not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise _DemoError("nbdkit does not start")
            time.sleep(0.05)
        yield lambda: _store_reads(metrics)
    finally:
        process.terminate()
        process.wait()


def _store_reads(metrics: Path) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(metrics))
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with connection.makefile("r") as lines:
            samples = dict(line.split(" ", 1) for line in lines if line.startswith("dedup_"))
    return int(float(samples["dedup_store_reads_total"]))


def _say(text: str) -> None:
    print(f"tools/demo: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
