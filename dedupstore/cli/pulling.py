"""Commands that bring images from remotes, and make room again: pull, prefetch, evict."""

from __future__ import annotations

import re
from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dedupstore import format as fmt
from dedupstore.cli.context import Context, pass_context
from dedupstore.cli.output import human_bytes, json_option, print_json, progress
from dedupstore.errors import UsageError
from dedupstore.traces import Trace, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from dedupstore.remote.pulling import Pulled
    from dedupstore.store import Store

_PREFETCH = {name: number for number, name in fmt.PREFETCH_NAMES.items()}
_UNITS = {"": 0, "B": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@click.command()
@click.argument("remote")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--lazy", is_flag=True, help="Bring the manifest only; contents come when they are read."
)
@click.option("--as", "target", metavar="NAME", help="The image's name here, if another.")
@click.option(
    "--prefetch",
    "ahead",
    type=click.Choice(tuple(fmt.PREFETCH_NAMES.values())),
    help="With --lazy: what servers fetch while nobody waits. Default: none.",
)
@click.option(
    "--trace",
    "trace_file",
    type=click.Path(path_type=Path),
    help="With --lazy: bring what is in this trace, too (see 'trace record'); with --prefetch "
    "trace: have servers do it.",
)
@click.option(
    "--metadata", is_flag=True, help="With --lazy: bring the file system's metadata, too."
)
@click.option(
    "--replace", is_flag=True, help="A name that stands for another image here changes over."
)
@json_option
@pass_context
def pull(
    context: Context,
    remote: str,
    names: tuple[str, ...],
    lazy: bool,
    ahead: str | None,
    trace_file: Path | None,
    metadata: bool,
    target: str | None,
    replace: bool,
    as_json: bool,
) -> None:
    """Bring images NAME... from REMOTE: what is not here already.

    Contents are verified against their digests, whenever they come.
    """
    if target is not None and len(names) != 1:
        raise UsageError("--as: for one image at a time")
    if (ahead is not None or metadata or trace_file is not None) and not lazy:
        raise UsageError("--prefetch, --trace, --metadata: for images that are pulled --lazy")
    if ahead == "trace" and trace_file is None:
        raise UsageError("--prefetch trace: of which? (--trace FILE)")
    if ahead in ("none", "all") and trace_file is not None:
        raise UsageError(f"--prefetch {ahead}: takes no --trace")
    recorded = None if trace_file is None else read_trace(trace_file)
    now = recorded if ahead is None else None
    pulled = []
    with context.open(grows=True) as store:
        for name in dict.fromkeys(names):
            with progress(f"pull {name}") as on_progress:
                one = store.pull(
                    remote,
                    name,
                    target or name,
                    on_progress,
                    lazy=lazy,
                    replace=replace,
                    prefetch=None if ahead is None else _PREFETCH[ahead],
                    trace=recorded,
                )
                if metadata or now is not None:
                    one = _bring(store, one, now, on_progress, metadata=metadata)
            pulled.append(one)
            if not as_json:
                show_pulled(one, lazy=lazy)
    if as_json:
        print_json({"images": pulled})


def _bring(
    store: Store,
    pulled: Pulled,
    trace: Trace | None,
    on_progress: Callable[[int, int], None],
    *,
    metadata: bool,
) -> Pulled:
    """Fetch what is asked for of an image whose contents are elsewhere."""
    before = store.fetcher().counters.bytes
    if metadata:
        store.fetch_metadata(pulled.name)
    if trace is not None:
        store.prefetch(pulled.name, trace, on_progress)
    came = store.fetcher().counters.bytes - before
    left = store.missing_bytes(pulled.name)
    return replaced(pulled, fetched_bytes=pulled.fetched_bytes + came, missing_bytes=left)


def show_pulled(pulled: Pulled, *, lazy: bool) -> None:
    """Say what a pull did."""
    there = f", {human_bytes(pulled.missing_bytes)} left there" if lazy else ""
    click.echo(
        f"pulled {pulled.name}: {human_bytes(pulled.size)}, "
        f"{human_bytes(pulled.fetched_bytes)} fetched{there}"
    )


@click.command()
@click.argument("name")
@click.option(
    "--trace",
    "trace_file",
    type=click.Path(path_type=Path),
    help="Only what is in this trace, in the order of first use (see 'trace record').",
)
@click.option("--pause", is_flag=True, help="Have servers fetch nothing of it in the background.")
@click.option("--resume", is_flag=True, help="Have them go on.")
@json_option
@pass_context
def prefetch(
    context: Context, name: str, trace_file: Path | None, pause: bool, resume: bool, as_json: bool
) -> None:
    """Fetch now what is elsewhere of image NAME. Ctrl-C leaves what came.

    --pause and --resume fetch nothing: they are about what 'pull --lazy --prefetch' has servers do,
    those that run included.
    """
    if pause + resume + (trace_file is not None) > 1:
        raise UsageError("--trace, --pause, --resume: one of them")
    if pause or resume:
        with context.open() as store:
            if not store.pause(name, paused=pause):
                raise UsageError(f"image {name!r}: servers fetch nothing (see 'pull --prefetch')")
        if as_json:
            print_json({"name": name, "paused": pause})
        return
    recorded = None if trace_file is None else read_trace(trace_file)
    with context.open(grows=True) as store, progress(f"prefetch {name}") as on_progress:
        done = store.prefetch(name, recorded, on_progress)
    if as_json:
        print_json(done)
        return
    click.echo(
        f"prefetched {name}: {human_bytes(done.missing_bytes - done.left_bytes)} of "
        f"{human_bytes(done.wanted_bytes)}, {human_bytes(done.fetched_bytes)} fetched"
    )
    if done.left_bytes:
        click.echo(f"{human_bytes(done.left_bytes)} could not be stored (is the disk full?)")


def parse_size(text: str) -> int:
    """Bytes of a size such as 512M or 20G. Raises UsageError."""
    found = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(?:I?B)?", text.strip().upper())
    if found is None:
        raise UsageError(f"{text}: not a size (such as 512M or 20G)")
    return int(found[1]) << 10 * _UNITS[found[2]]


@click.command()
@click.argument("limit")
@json_option
@pass_context
def evict(context: Context, limit: str, as_json: bool) -> None:
    """Drop contents that a remote has, the longest unused first, until the store's file takes LIMIT
    (such as 20G) or less. They come back when they are read."""
    bytes_max = parse_size(limit)
    with context.open() as store, progress("evict") as on_progress:
        done = store.evict(bytes_max, on_progress)
    if as_json:
        print_json(done)
        return
    click.echo(
        f"dropped {done.frames} frames, {human_bytes(done.freed_bytes)}; "
        f"the store takes {human_bytes(done.file_bytes)}"
    )
    if done.file_bytes > bytes_max:
        click.echo(f"the rest is not in a remote that keeps it: above {human_bytes(bytes_max)}")


COMMANDS = (pull, prefetch, evict)
