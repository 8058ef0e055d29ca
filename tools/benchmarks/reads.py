"""Warm reads over NBD: dedupstore's plugin against nbdkit's file plugin on the raw image."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.benchmarks.ingest import DEDUPSTORE, _run
from tools.benchmarks.report import Report, alternate

_PLUGIN = Path(__file__).resolve().parents[2] / "nbdplugin/dedup.py"
_SECONDS = 3


@contextmanager
def server(socket_path: Path, *arguments: object) -> Iterator[str]:
    """A running nbdkit that listens; yields the URI of its default export."""
    socket_path.unlink(missing_ok=True)  # nbdkit leaves it behind
    command = ["nbdkit", "-f", "-U", str(socket_path), *map(str, arguments)]
    process = subprocess.Popen(command)
    try:
        for _ in range(200):
            if socket_path.exists():
                break
            time.sleep(0.05)
        yield f"nbd+unix:///?socket={socket_path}"
    finally:
        process.terminate()
        process.wait()


def _fio(uri: str, name: str, **options: object) -> float:
    """MB/s of one fio job."""
    arguments = {
        "ioengine": "nbd",
        "uri": uri,
        "name": name,
        "time_based": 1,
        "runtime": _SECONDS,
        "randrepeat": 1,
        "output-format": "json",
        **options,
    }
    command = ["fio", *(f"--{key}={value}" for key, value in arguments.items())]
    # fio leaves its files where it runs.
    output = subprocess.check_output(command, cwd="/tmp", stderr=subprocess.DEVNULL)
    document = json.loads(output[output.index(b"{") :])
    return float(document["jobs"][0]["read"]["bw_bytes"]) / 1e6


_JOBS = {
    "4 KiB random, depth 16": ({"rw": "randread", "bs": "4k", "iodepth": 16}, "(target >= 1)"),
    "4 KiB random, depth 1": ({"rw": "randread", "bs": "4k", "iodepth": 1}, ""),
    "64 KiB random, depth 16": ({"rw": "randread", "bs": "64k", "iodepth": 16}, ""),
    "128 KiB sequential": ({"rw": "read", "bs": "128k", "iodepth": 4}, "(target >= 1)"),
    "1 MiB sequential": ({"rw": "read", "bs": "1m", "iodepth": 4}, ""),
}


def warm(images: list[Path], work: Path, rounds: int, report: Report) -> None:
    """fio's nbd engine against both servers, everything cached in both."""
    image = images[1]
    store = _store(work, image)
    plugin = ("python", _PLUGIN, f"store={store}", "image=image", "cache=2G")
    with server(work / "a", *plugin) as ours, server(work / "b", "-r", "file", image) as theirs:
        for uri in (ours, theirs):
            _run("nbdcopy", uri, "null:")
        for name, (options, target) in _JOBS.items():
            runs = {
                "ours": lambda options=options: _fio(ours, "a", **options),
                "nbdkit file": lambda options=options: _fio(theirs, "b", **options),
            }
            report.add(f"warm {name}", "MB/s", alternate(rounds, runs), target=target)


def clone(images: list[Path], work: Path, rounds: int, report: Report) -> None:
    """Reading a clone of a cached image: store reads and seconds."""
    store = _store(work, images[1])
    _run(DEDUPSTORE, "--store", store, "clone", "image", "clone")
    plugin = ("python", _PLUGIN, f"store={store}", "cache=2G", f"metrics={work / 'm'}")
    first: list[float] = []
    second: list[float] = []
    moved = 0
    for _ in range(rounds):
        with server(work / "c", *plugin):
            uri = f"nbd+unix:///{{}}?socket={work / 'c'}"
            first.append(_seconds("nbdcopy", uri.format("image"), "null:"))
            before = _metric(work / "m", "dedup_store_reads_total")
            second.append(_seconds("nbdcopy", uri.format("clone"), "null:"))
            moved += _metric(work / "m", "dedup_store_reads_total") - before
    report.note("store reads for a clone", str(moved), "(target 0)")
    report.add(
        "whole clone, after the first",
        "s",
        {"ours": second, "first image": first},
        lower_is_better=True,
    )


def _store(work: Path, image: Path) -> Path:
    store = work / "reads"
    if not store.exists():
        _run(DEDUPSTORE, "--store", store, "init")
        _run(DEDUPSTORE, "--store", store, "import", image, "image")
    else:
        subprocess.run(
            [DEDUPSTORE, "--store", store, "rm", "clone"], check=False, stderr=subprocess.DEVNULL
        )
    return store


def _seconds(*command: object) -> float:
    begin = time.monotonic()
    _run(*command)
    return time.monotonic() - begin


def _metric(path: Path, name: str) -> int:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        client.shutdown(socket.SHUT_WR)
        text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    line = next(line for line in text.splitlines() if line.startswith(name + " "))
    return int(float(line.split()[1]))
