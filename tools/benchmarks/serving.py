"""Warm reads over NBD: dedupstore's plugin against other servers of the same image.

Corpus: the second image. Client: fio's nbd engine, one connection, seeded by its own default, the
same offsets for everybody. Every server runs from beginning to end and has been read from
completely once, so nothing reads from the disk. Client and server have two cores between them: the
figures are of both together, as a host would see them.

    tools/bench warm sweep
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tools.benchmarks.processes import DEDUPSTORE, PLUGIN, Server, nbdkit, run, serving
from tools.benchmarks.report import Bench, Curve, alternate

Start = Callable[[], AbstractContextManager[Server]]

FILE = "nbdkit file"
_QEMU_RAW = "qemu-nbd, raw"
_QEMU_QCOW2 = "qemu-nbd, qcow2 on raw"
_SECONDS = 3
_SWEEP_SECONDS = 1
_QEMU_CLIENTS_MAX = 16
_SIZES = {"4k": 4, "16k": 16, "64k": 64, "128k": 128, "256k": 256, "1m": 1024}
_DEPTHS = (1, 4, 16)

_JOBS: dict[str, tuple[dict[str, object], float]] = {
    "4 KiB random, depth 16": ({"rw": "randread", "bs": "4k", "iodepth": 16}, 1.0),
    "4 KiB random, depth 1": ({"rw": "randread", "bs": "4k", "iodepth": 1}, 1.0),
    "64 KiB random, depth 16": ({"rw": "randread", "bs": "64k", "iodepth": 16}, 1.0),
    "128 KiB sequential": ({"rw": "read", "bs": "128k", "iodepth": 4}, 1.3),
    "1 MiB sequential": ({"rw": "read", "bs": "1m", "iodepth": 4}, 1.0),
}


def warm(bench: Bench) -> None:
    """The access patterns that have targets, and the servers that people would use instead."""
    with _warm_servers(bench, qemu=True) as servers:
        for name, (options, target) in _JOBS.items():
            runs = {
                key: lambda server=server, options=options: fio(
                    server.uri(), time_based=1, runtime=_SECONDS, **options
                )
                for key, server in servers.items()
            }
            figures = alternate(bench.rounds, runs)
            bench.report.compare(f"warm {name}", "MB/s", figures, targets={FILE: target})


def sweep(bench: Bench) -> None:
    """Random reads of every block size at every depth: curves, no targets."""
    with _warm_servers(bench, qemu=False) as servers:
        for depth in _DEPTHS:
            found: dict[str, list[float]] = {name: [] for name in servers}
            for size in _SIZES:
                for name, server in servers.items():
                    options = {"rw": "randread", "bs": size, "iodepth": depth}
                    rate = fio(server.uri(), time_based=1, runtime=_SWEEP_SECONDS, **options)
                    found[name].append(rate)
            for name, rates in found.items():
                label = f"{'dedupstore' if name == 'ours' else name}, depth {depth}"
                curve = Curve(
                    plot="throughput by block size and depth",
                    label=label,
                    x_label="block size, KiB",
                    y_label="MB/s",
                    x=tuple(map(float, _SIZES.values())),
                    y=tuple(rates),
                )
                bench.report.curve(curve)


@contextmanager
def _warm_servers(bench: Bench, *, qemu: bool) -> Iterator[Mapping[str, Server]]:
    """The servers to compare, each with all of the second image read once."""
    image = bench.images[1]
    store = store_with(bench.work, image)
    starts = {
        "ours": plugin(bench.work / "ours", store, "image=image"),
        FILE: file_plugin(bench.work / "file", image),
    }
    if qemu:
        overlay = _overlay(bench.work / "overlay.qcow2", image)
        starts[_QEMU_RAW] = _qemu_nbd(bench.work / "raw", "raw", image)
        starts[_QEMU_QCOW2] = _qemu_nbd(bench.work / "qcow2", "qcow2", overlay)
    with ExitStack() as stack:
        servers = {name: stack.enter_context(start()) for name, start in starts.items()}
        for server in servers.values():
            run("nbdcopy", server.uri(), "null:")
        yield servers


def plugin(socket: Path, store: Path, *parameters: object) -> Start:
    """An nbdkit with the plugin, its cache large enough for the image."""
    command = nbdkit(socket, "python", PLUGIN, f"store={store}", "cache=2G", *parameters)
    return partial(serving, socket, *command)


def file_plugin(socket: Path, *parameters: object) -> Start:
    """An nbdkit with its own file plugin: the other server of every target."""
    return partial(serving, socket, *nbdkit(socket, "-r", "file", *parameters))


def _qemu_nbd(socket: Path, kind: str, image: Path) -> Start:
    """A qemu-nbd that serves through the page cache, as nbdkit does, with its own worker threads:
    what it does by default, and its fastest way to serve what is cached already."""
    options = ("--cache=writeback", "--aio=threads", "-e", _QEMU_CLIENTS_MAX)
    command = ["qemu-nbd", "-r", "-t", "-k", socket, *options, "-f", kind, image]
    return partial(serving, socket, *command)


def _overlay(path: Path, backing: Path) -> Path:
    """An empty qcow2 image over a raw one: a clone, as qemu makes them."""
    run("qemu-img", "create", "-f", "qcow2", "-b", backing, "-F", "raw", path)
    return path


def fio(*uris: str, **options: object) -> float:
    """MB/s of one fio job for each export, all at once: bytes over the longest job's time, which
    starts when all have connected. Jobs are threads of one process."""
    common = {
        "ioengine": "nbd",
        "thread": 1,
        "group_reporting": 1,
        "randrepeat": 1,
        "output-format": "json",
        **options,
    }
    command = ["fio", *(f"--{key}={value}" for key, value in common.items())]
    for number, uri in enumerate(uris):
        command += [f"--name=job{number}", f"--uri={uri}"]
    # fio leaves its files where it runs.
    output = subprocess.check_output(command, cwd="/tmp", stderr=subprocess.DEVNULL)
    document = json.loads(output[output.index(b"{") :])
    return float(document["jobs"][0]["read"]["bw_bytes"]) / 1e6


def store_with(work: Path, image: Path) -> Path:
    """A new store that has `image` under the name `image`."""
    store = work / "store"
    run(DEDUPSTORE, "--store", store, "init")
    run(DEDUPSTORE, "--store", store, "import", image, "image")
    return store
