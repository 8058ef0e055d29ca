"""Commands about traces: trace record, trace show."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import click

from dedupstore.cli.context import Context, pass_context
from dedupstore.cli.output import human_bytes, json_option, print_json, print_pairs
from dedupstore.control import ServerRecording
from dedupstore.errors import ProgramError, RecordingError
from dedupstore.mounts.state import Runtime, default_run
from dedupstore.traces import read_trace, write_trace

# How often the server is asked whether it still records: less than its patience.
_ASK_SECONDS = 1.0
_LOOK_SECONDS = 0.05


@click.group()
def trace() -> None:
    """Which chunks of an image are used, in the order of their first use: record it on one host,
    prefetch by it on others."""


@trace.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@click.option("--seconds", type=click.FloatRange(min=0), help="Record for so long.")
@click.option(
    "--metrics",
    type=click.Path(path_type=Path),
    help="The metrics socket of the server that serves NAME. Default: that of 'mount'.",
)
@pass_context
def record(
    context: Context,
    name: str,
    file: Path,
    command: tuple[str, ...],
    seconds: float | None,
    metrics: Path | None,
) -> None:
    """Record what is read of image NAME, by whoever reads it, into FILE.

    Until Ctrl-C, for --seconds, or as long as COMMAND runs. What the kernel has in its page cache
    is not read again, and so not in the trace: mount the image for it, or mount it anew.
    """
    with context.open() as store:
        digest = store.image(name).digest
        uuid = store.superblock.uuid.hex()
    server = metrics or Runtime(default_run(os.environ, os.getuid()).absolute(), uuid).metrics
    recording = ServerRecording(server, name, digest)
    recording.begin()
    process = None
    try:
        process = _started(command)
        _wait(recording, process, seconds)
        recorded = recording.trace()
        write_trace(file, recorded)
    finally:
        with suppress(RecordingError):
            recording.end()
        status = 0 if process is None else process.wait()
    click.echo(f"recorded {file}: {len(recorded.digests)} chunks, {human_bytes(recorded.bytes)}")
    if status:
        raise ProgramError(command[0], f"ended with status {status} (its reads are recorded)")


def _started(command: tuple[str, ...]) -> subprocess.Popen[bytes] | None:
    if not command:
        return None
    try:
        return subprocess.Popen(command)
    except OSError as error:
        raise ProgramError(command[0], str(error.strerror)) from None


def _wait(
    recording: ServerRecording, process: subprocess.Popen[bytes] | None, seconds: float | None
) -> None:
    """Return when the recording is to end."""
    until = None if seconds is None else time.monotonic() + seconds
    ask_at = 0.0
    with suppress(KeyboardInterrupt):  # as good an end as any
        while process is None or process.poll() is None:
            now = time.monotonic()
            if until is not None and now >= until:
                return
            if now >= ask_at:
                recording.chunks()
                ask_at = now + _ASK_SECONDS
            time.sleep(_LOOK_SECONDS)


@trace.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--image", "name", metavar="NAME", help="Also how much of it this image has.")
@json_option
@pass_context
def show(context: Context, file: Path, name: str | None, as_json: bool) -> None:
    """Show what is in trace FILE."""
    recorded = read_trace(file)
    shown: dict[str, str | int] = {
        "image": recorded.image.hex(),
        "chunks": len(recorded.digests),
        "bytes": recorded.bytes,
    }
    if name is not None:
        with context.open() as store:
            found = store.replay(name, recorded)
        shown |= {
            "name": name,
            "chunks_in_image": found.chunks,
            "bytes_in_image": found.bytes,
            "missing_bytes": found.missing_bytes,
        }
    if as_json:
        print_json(shown)
        return
    pairs = {
        "recorded on": recorded.image.hex(),
        "chunks": str(len(recorded.digests)),
        "bytes": human_bytes(recorded.bytes),
    }
    if name is not None:
        pairs[f"in {name}"] = f"{human_bytes(found.bytes)} in {found.chunks} chunks"
        pairs["elsewhere"] = human_bytes(found.missing_bytes)
    print_pairs(pairs)


COMMANDS = (trace,)
