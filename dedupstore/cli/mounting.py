"""Commands that put images into the kernel: attach, detach, mount, umount, reconnect."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from dedupstore import format as fmt
from dedupstore.cli.context import Context, pass_context
from dedupstore.cli.output import json_option, print_json, print_table, progress
from dedupstore.mounts import sharing
from dedupstore.mounts.kernel import RESTRICTIONS
from dedupstore.mounts.mounts import Host
from dedupstore.mounts.state import Target, default_run
from dedupstore.mounts.targets import find_target
from dedupstore.store import Store
from dedupstore.traces import Trace, read_trace


@dataclass(frozen=True, slots=True)
class _Pull:
    """Where an image comes from that is not here, and what servers fetch of it."""

    remote: str
    trace: Trace | None


_dry_run = click.option("--dry-run", is_flag=True, help="Only print the commands that would run.")
_pull = click.option(
    "--pull",
    "remote",
    metavar="REMOTE",
    help="If the store has no image NAME, pull it from there: lazily, its contents come when they "
    "are read.",
)
_trace = click.option(
    "--trace",
    "trace_file",
    type=click.Path(path_type=Path),
    help="With --pull: have the server fetch what is in this trace (see 'trace record'). Default: "
    "the one that the image was pushed with.",
)


def _check_pull(remote: str | None, trace_file: Path | None, *, dry_run: bool) -> _Pull | None:
    """What the options ask to be pulled; None: nothing."""
    if trace_file is not None and remote is None:
        raise click.UsageError("--trace: for images that are pulled (--pull)")
    if remote is None:
        return None
    if dry_run:
        raise click.UsageError("--pull: changes the store, which a --dry-run does not")
    return _Pull(remote, None if trace_file is None else read_trace(trace_file))


def _host() -> Host:
    return Host(default_run(os.environ, os.getuid()).absolute())


def _target(context: Context, name: str, share: str = sharing.NONE) -> Target:
    with context.open(grows=True) as store:
        return _target_in(store, name, share)


def _target_in(store: Store, name: str, share: str) -> Target:
    with progress(f"share {name}") as on_progress:
        return find_target(store, name, sharing.candidates(share), on_progress)


@contextmanager
def _pulled_target(
    context: Context, name: str, share: str, directory: Path | None, pull: _Pull
) -> Iterator[Target]:
    """As `_target`, for an image that is pulled if the store has none of that name. The server
    starts meanwhile, and contents begin to come until it takes over."""
    with context.open(grows=True) as store:
        if not store.has_name(name):
            uuid = store.superblock.uuid.hex()
            with (
                _host().starting(store.path.resolve(), uuid, directory),
                progress(f"pull {name}") as on_progress,
            ):
                store.pull(
                    pull.remote,
                    name,
                    name,
                    on_progress,
                    lazy=True,
                    prefetch=None if pull.trace is None else fmt.PREFETCH_TRACE,
                    trace=pull.trace,
                    begin=True,
                )
        yield _target_in(store, name, share)


@click.command()
@click.argument("name")
@_pull
@_trace
@_dry_run
@pass_context
def attach(
    context: Context, name: str, remote: str | None, trace_file: Path | None, dry_run: bool
) -> None:
    """Make image NAME a read-only block device and print it. Needs root.

    An image that is attached already, under this name or by an identical clone, is not attached
    twice: its device is printed again.
    """
    pull = _check_pull(remote, trace_file, dry_run=dry_run)
    if pull is not None:
        with _pulled_target(context, name, sharing.NONE, None, pull) as target:
            click.echo(_host().attach(target))
        return
    target = _target(context, name)
    if dry_run:
        _print_lines(_host().plan_attach(target))
    else:
        click.echo(_host().attach(target))


@click.command()
@click.argument("what", metavar="DEVICE|NAME")
@pass_context
def detach(context: Context, what: str) -> None:
    """Give back what attach printed: for a NAME its claim, for a DEVICE every one."""
    _host().detach(what, context.path)


@click.command()
@click.argument("name", required=False)
@click.argument("directory", required=False, metavar="[DIR]", type=click.Path(path_type=Path))
@click.option("--type", "fstype", metavar="TYPE", help="The file system. Default: erofs.")
@click.option(
    "--share",
    type=click.Choice(sharing.CHOICES),
    default=sharing.AUTO,
    help="How to share page cache with mounts of other images. Default: auto.",
)
@click.option(
    "-o",
    "--option",
    "restrictions",
    type=click.Choice(tuple(RESTRICTIONS)),
    multiple=True,
    help="Forbid something on this mount; may be repeated.",
)
@_pull
@_trace
@click.option("--list", "as_list", is_flag=True, help="List mounts and attached devices.")
@_dry_run
@json_option
@pass_context
def mount(
    context: Context,
    name: str | None,
    directory: Path | None,
    fstype: str | None,
    share: str,
    restrictions: tuple[str, ...],
    remote: str | None,
    trace_file: Path | None,
    as_list: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Mount image NAME read-only on DIR, or list the mounts. Mounting needs root.

    Identical images share one device and one page cache. Different ones share the files that they
    have in common: with --share=kernel by Linux 7.0's inode_share, with --share=pool by an overlay;
    auto takes what this kernel has and the image allows, none turns it off.
    """
    if as_list:
        if name is not None:
            raise click.UsageError("--list takes no image")
        _list(as_json=as_json)
        return
    if name is None or directory is None:
        raise click.UsageError("give an image and a directory, or --list")
    pull = _check_pull(remote, trace_file, dry_run=dry_run)
    # Only EROFS is shared, and only the kernel can tell what another file system holds.
    share = sharing.NONE if fstype else share
    if pull is None:
        target = _target(context, name, share)
        if dry_run:
            _print_lines(_host().plan_mount(target, directory, fstype, restrictions))
        else:
            _host().mount(target, directory, fstype, restrictions)
    else:
        with _pulled_target(context, name, share, directory, pull) as target:
            _host().mount(target, directory, fstype, restrictions)


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)


def _list(*, as_json: bool) -> None:
    mounts, attached = _host().list_mounts()
    if as_json:
        print_json({"mounts": mounts, "attachments": attached})
        return
    rows = [(m.name, m.directory, m.share, m.via, m.superblock, m.device) for m in mounts]
    rows += [(", ".join(a.names), "-", "-", a.via, "-", a.device) for a in attached]
    names = ("NAME", "DIRECTORY", "SHARE", "VIA", "SUPERBLOCK", "DEVICE")
    print_table([dict(zip(names, row, strict=True)) for row in rows])


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def umount(directory: Path) -> None:
    """Unmount DIR. The last mount of an image lets its device go, the last of all the server."""
    _host().unmount(directory)


@click.command()
@pass_context
def reconnect(context: Context) -> None:
    """Give the store's nbd devices new connections after its server was restarted.

    What waited for the server then goes on. If no server runs, one is started. Needs root; may be
    done at any time.
    """
    _host().reconnect(context.path)


COMMANDS = (attach, detach, mount, umount, reconnect)
