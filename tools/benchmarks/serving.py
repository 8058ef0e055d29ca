"""Warm reads over NBD: dedupstore's plugin against nbdkit's file plugin on the raw image."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tools.benchmarks.processes import DEDUPSTORE, PLUGIN, nbdkit, run, serving
from tools.benchmarks.report import Bench, alternate

_SECONDS = 3


def fio(uri: str, **options: object) -> float:
    """MB/s of one fio job."""
    arguments = {
        "name": "job",
        "ioengine": "nbd",
        "uri": uri,
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
    "4 KiB random, depth 16": ({"rw": "randread", "bs": "4k", "iodepth": 16}, 1.0),
    "4 KiB random, depth 1": ({"rw": "randread", "bs": "4k", "iodepth": 1}, 1.0),
    "64 KiB random, depth 16": ({"rw": "randread", "bs": "64k", "iodepth": 16}, 1.0),
    "128 KiB sequential": ({"rw": "read", "bs": "128k", "iodepth": 4}, 1.3),
    "1 MiB sequential": ({"rw": "read", "bs": "1m", "iodepth": 4}, 1.0),
}


def warm(bench: Bench) -> None:
    """fio's nbd engine against both servers, everything cached in both."""
    image = bench.images[1]
    store = store_with(bench.work, image)
    ours = nbdkit(bench.work / "a", "python", PLUGIN, f"store={store}", "image=image", "cache=2G")
    theirs = nbdkit(bench.work / "b", "-r", "file", image)
    with serving(bench.work / "a", *ours) as a, serving(bench.work / "b", *theirs) as b:
        for server in (a, b):
            run("nbdcopy", server.uri(), "null:")
        for name, (options, target) in _JOBS.items():
            runs = {
                "ours": lambda options=options: fio(a.uri(), **options),
                "nbdkit file": lambda options=options: fio(b.uri(), **options),
            }
            figures = alternate(bench.rounds, runs)
            targets = {"nbdkit file": target}
            bench.report.compare(f"warm {name}", "MB/s", figures, targets=targets)


def store_with(work: Path, image: Path) -> Path:
    """A new store that has `image` under the name `image`."""
    store = work / "store"
    run(DEDUPSTORE, "--store", store, "init")
    run(DEDUPSTORE, "--store", store, "import", image, "image")
    return store
