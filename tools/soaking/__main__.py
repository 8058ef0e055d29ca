"""One soak: clients alone for a while, then clients and maintenance, then the verdict.

Exits 1 unless not a byte was wrong, nothing failed, nobody was left reading, the store is intact
and its file came back to the size that it had.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.benchmarks.processes import DEDUPSTORE, PLUGIN, nbdkit, run, serving
from tools.soaking.clients import Clients
from tools.soaking.content import write_image
from tools.soaking.maintenance import FRESH_ALIVE, FRESH_BYTES, Maintenance
from tools.soaking.watch import Watch

_KEPT = 3
_KEPT_BYTES = 48 << 20
_WARM_UP_SECONDS = 1.0
# While it is maintained, the file is at most this much longer than before, for each byte that
# maintenance keeps alive at a time: what was removed waits for gc, what gc freed for readers.
_GROWTH_MAX = 4
_FINAL_GROWTH_MAX = 1.10


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/soak", description=__doc__)
    parser.add_argument("images", nargs="*", type=Path, help="images to serve; default: made up")
    parser.add_argument("--seconds", type=float, default=60, help="clients with maintenance")
    parser.add_argument("--quiet", type=float, default=15, help="seconds of clients alone, before")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--cache", default="48M", help="of each server")
    parser.add_argument(
        "--rest", type=float, default=0.0, help="pause of a loop, in commands' time"
    )
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second of a client")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args()


def _fill(store: Path, sources: Path, images: list[Path]) -> list[str]:
    """Create the store; return the contents that stay."""
    run(DEDUPSTORE, "--store", store, "init")
    kept = []
    for number in range(len(images) or _KEPT):
        content = f"kept-{number}"
        if images:
            (sources / content).symlink_to(images[number].absolute())
        else:
            write_image(sources / content, number, _KEPT_BYTES, fresh=0.2)
        run(DEDUPSTORE, "--store", store, "import", sources / content, f"{content}.keep")
        kept.append(content)
    run(DEDUPSTORE, "--store", store, "gc", "--compact")
    return kept


def _file_bytes(store: Path) -> int:
    return (store / "data.mdb").stat().st_blocks * 512


def soak(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run one soak in `work`; return the figures."""
    store, sources = work / "store", work / "sources"
    sources.mkdir()
    kept = _fill(store, sources, arguments.images)
    before = _file_bytes(store)
    with ExitStack() as stack:
        servers = []
        logs = []
        for number in range(arguments.servers):
            logs.append(work / f"log-{number}")
            command = nbdkit(work / f"nbd-{number}", "python", PLUGIN, f"store={store}")
            command.append(f"cache={arguments.cache}")
            log = stack.enter_context(logs[-1].open("wb"))
            servers.append(stack.enter_context(serving(work / f"nbd-{number}", *command, log=log)))
        sockets = [server.socket for server in servers]
        clients = Clients(arguments.clients, sockets, sources, arguments.rate)
        stack.callback(clients.kill)
        time.sleep(_WARM_UP_SECONDS)
        clients.begin("quiet")
        time.sleep(arguments.quiet)
        watch = Watch(store)
        stack.callback(watch.close)
        maintenance = Maintenance(store, sources, kept, arguments.rest)
        clients.begin("load")
        maintenance.start()
        time.sleep(arguments.seconds)
        clients.begin("after")
        maintenance.stop()
        seen = clients.finish()
        watch.stop()
        left = watch.readers()
        pids = {server.pid for server in servers}
        server_read = max((s for pid, s in watch.oldest.items() if pid in pids), default=0.0)
        command_read = max((s for pid, s in watch.oldest.items() if pid not in pids), default=0.0)
    final = [
        subprocess.run(
            [DEDUPSTORE, "--store", store, *words], capture_output=True, check=False, text=True
        )
        for words in (["gc", "--compact"], ["check"])
    ]
    errors = [f"client: {error}" for phase in seen.values() for error in phase.errors]
    errors += maintenance.errors
    errors += [f"end: {done.stdout}{done.stderr}" for done in final if done.returncode]
    errors += [
        f"server: {line}"
        for log in logs
        for line in log.read_text().splitlines()
        if "no image named" not in line  # names that were gone before they were opened
    ]
    length_max = max(sample.file_length for sample in watch.samples)
    return {
        "seconds": arguments.seconds,
        "clients": arguments.clients,
        "servers": arguments.servers,
        "quiet": asdict(seen["quiet"]),
        "load": asdict(seen["load"]),
        "bytes_verified": sum(phase.bytes_verified for phase in seen.values()),
        "bytes_wrong": sum(phase.bytes_wrong for phase in seen.values()),
        "errors": errors,
        "operations": dict(sorted(maintenance.operations.items())),
        "operation_seconds_max": {
            kind: round(max(times), 2) for kind, times in sorted(maintenance.seconds.items())
        },
        "p99_ratio": round(seen["load"].p99_ms / seen["quiet"].p99_ms, 2),
        "read_transactions_left": len(left),
        "longest_read_transaction_of_a_server_seconds": round(server_read, 1),
        "longest_read_transaction_of_a_command_seconds": round(command_read, 1),
        "file_bytes_before": before,
        "file_bytes_after": _file_bytes(store),
        "file_length_before": watch.samples[0].file_length,
        "file_length_max": length_max,
        "file_length_bound": watch.samples[0].file_length
        + _GROWTH_MAX * (FRESH_ALIVE + 1) * FRESH_BYTES,
        "file_over_time": [
            asdict(sample) for sample in watch.samples[:: max(1, len(watch.samples) // 100)]
        ],
    }


def verdict(figures: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    wrong = [f"{len(figures['errors'])} errors: {error}" for error in figures["errors"][:10]]
    if figures["bytes_wrong"] or not figures["bytes_verified"]:
        wrong.append(f"{figures['bytes_wrong']} of {figures['bytes_verified']} bytes wrong")
    if figures["read_transactions_left"]:
        wrong.append(f"{figures['read_transactions_left']} read transactions left")
    if figures["file_length_max"] > figures["file_length_bound"]:
        wrong.append("the file grew beyond its bound")
    if figures["file_bytes_after"] > _FINAL_GROWTH_MAX * figures["file_bytes_before"]:
        wrong.append("the file did not come back to its size")
    return wrong


def _report(figures: dict[str, Any]) -> None:
    quiet, load = figures["quiet"], figures["load"]
    done = ", ".join(f"{count} {kind}" for kind, count in figures["operations"].items())
    print(
        f"{figures['bytes_verified'] / 1e9:.2f} GB verified, {figures['bytes_wrong']} bytes wrong"
    )
    print(f"{len(figures['errors'])} errors; {done}")
    print(
        f"p50 {quiet['p50_ms']} ms quiet, {load['p50_ms']} under load; "
        f"p99 {quiet['p99_ms']} quiet, {load['p99_ms']} under load: {figures['p99_ratio']} x"
    )
    print(
        f"file: {figures['file_bytes_before'] / 1e6:.1f} MB before, "
        f"at most {figures['file_length_max'] / 1e6:.1f} MB long "
        f"(bound {figures['file_length_bound'] / 1e6:.1f}), "
        f"{figures['file_bytes_after'] / 1e6:.1f} MB after"
    )


def main() -> int:
    arguments = _arguments()
    # On a disk: commits are to cost what they cost.
    work = Path(tempfile.mkdtemp(prefix="soak-", dir="/var/tmp"))
    try:
        figures = soak(arguments, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + os.linesep)
    _report(figures)
    wrong = verdict(figures)
    for line in wrong:
        print(f"tools/soak: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
