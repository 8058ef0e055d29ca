"""Commands about remotes: remote add, ls, rm, images, delete, gc; push."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import click

from dedupstore import format as fmt
from dedupstore.cli.context import Context, pass_context
from dedupstore.cli.output import (
    human_bytes,
    json_option,
    print_json,
    print_table,
    progress,
)
from dedupstore.errors import StoreDamagedError
from dedupstore.places import needs_remote
from dedupstore.remote.collecting import GRACE_SECONDS, RemoteCollected, collect_remote
from dedupstore.remote.configuration import (
    add_remote,
    find_remote,
    find_to_change,
    list_remotes,
    remove_remote,
)
from dedupstore.remote.objects import without_credentials
from dedupstore.remote.pushing import Pushed
from dedupstore.remote.roots import Root
from dedupstore.traces import read_trace

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.group()
def remote() -> None:
    """Remotes: object stores, directories or HTTP servers that images are pushed to."""


@remote.command("add")
@click.argument("name")
@click.argument("urls", nargs=-1, required=True, metavar="URL [MIRROR_URL]...")
@pass_context
def remote_add(context: Context, name: str, urls: tuple[str, ...]) -> None:
    """Make a remote known as NAME; what is not one yet becomes one.

    URL is s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, http:// or
    https:// (to read only), file:///DIRECTORY or a directory. Credentials and endpoints come from
    the usual environment variables and instance profiles. MIRROR_URLs are read from when URL fails.
    """
    with context.open(grows=True) as store:
        added = add_remote(store.env, name, urls)
    click.echo(f"added {name}: {added.objects.where}")


@remote.command("ls")
@json_option
@pass_context
def remote_ls(context: Context, as_json: bool) -> None:
    """List the remotes that the store knows."""
    with context.open() as store, store.env.read() as txn:
        found = list(list_remotes(txn, store.env))
    for _, record in found:
        if isinstance(record, StoreDamagedError):
            raise record
    rows = [(name, record) for name, record in found if isinstance(record, fmt.RemoteRecord)]
    if as_json:
        print_json({"remotes": [_remote_document(*row) for row in rows]})
        return
    print_table(
        [
            {"NAME": name, "URL": without_credentials(url)}
            for name, record in rows
            for url in record.urls
        ]
    )


def _remote_document(name: str, record: fmt.RemoteRecord) -> dict[str, object]:
    return {
        "name": name,
        "number": record.number,
        "uuid": str(UUID(bytes=record.uuid)),
        "urls": [without_credentials(url) for url in record.urls],
    }


@remote.command("rm")
@click.argument("name")
@pass_context
def remote_rm(context: Context, name: str) -> None:
    """Forget a remote. What is in it stays as it is."""
    with context.open() as store:
        remove_remote(store.env, name, lambda txn, number: needs_remote(txn, store.env, number))


@remote.command("images")
@click.argument("name")
@json_option
@pass_context
def remote_images(context: Context, name: str, as_json: bool) -> None:
    """List the images in remote NAME."""
    with context.open() as store:
        found, _ = find_remote(store.env, name)
    roots = found.roots()
    if as_json:
        print_json({"images": [_image_document(root) for root in roots]})
        return
    print_table(
        [
            {
                "NAME": root.name,
                "SIZE": human_bytes(root.size),
                "KIND": fmt.KIND_NAMES[root.kind],
                "DIGEST": root.digest.hex()[:16],
                "PUSHED": _date(root.created),
            }
            for root in roots
        ]
    )


def _image_document(root: Root) -> dict[str, object]:
    return {
        "name": root.name,
        "size": root.size,
        "digest": root.digest.hex(),
        "kind": fmt.KIND_NAMES[root.kind],
        "created": root.created,
        "manifest_bytes": root.manifest_bytes,
    }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


@remote.command("delete")
@click.argument("name")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@pass_context
def remote_delete(context: Context, name: str, images: tuple[str, ...]) -> None:
    """Delete images of remote NAME. 'remote gc' then reclaims their space."""
    with context.open() as store:
        found, _ = find_to_change(store.env, name)
    for image in dict.fromkeys(images):
        found.delete_root(image)


def _seconds(_context: click.Context, _option: click.Parameter, value: str) -> float:
    """Seconds of `24h`, `90m`, `30s`, `7d`."""
    matched = re.fullmatch(r"(\d{1,9})([smhd])", value, re.ASCII)
    if matched is None:
        raise click.BadParameter(f"{value!r} is no time: give 24h, 90m, 30s or 7d")
    return float(int(matched[1]) * _UNITS[matched[2]])


@remote.command("gc")
@click.argument("name")
@click.option(
    "--grace",
    callback=_seconds,
    default=f"{GRACE_SECONDS // 3600}h",
    metavar="TIME",
    help="Delete what was condemned this long ago (24h, 90m); the default is 24h.",
)
@click.option("--dry-run", is_flag=True, help="Only report what would be done.")
@click.option("--force", is_flag=True, help="Allow a grace period that no push can rely on.")
@json_option
@pass_context
def remote_gc(
    context: Context, name: str, grace: float, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Reclaim what no image in remote NAME needs, in two steps a grace period apart.

    What is not needed is condemned by one run, and deleted by the next that comes a grace period
    later. Safe while images are pushed and pulled.
    """
    with context.open() as store:
        found, _ = find_to_change(store.env, name)
    with progress(f"gc {name}", "objects") as on_progress:
        collected = collect_remote(
            found, grace_seconds=grace, dry_run=dry_run, force=force, on_progress=on_progress
        )
    if as_json:
        print_json(collected)
        return
    _show_collected(collected)


def _show_collected(collected: RemoteCollected) -> None:
    would = "would have " if collected.dry_run else ""
    click.echo(
        f"{would}deleted {human_bytes(collected.deleted_bytes)} in {collected.deleted} objects, "
        f"condemned {human_bytes(collected.condemned_bytes)} in {collected.condemned}; "
        f"{collected.young} are too young"
    )


@click.command()
@click.argument("remote_name", metavar="REMOTE")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--replace", is_flag=True, help="Replace other images of these names.")
@click.option(
    "--trace",
    "trace_file",
    type=click.Path(path_type=Path),
    help="Lay out what is in this trace in its order, before the rest (see 'trace record').",
)
@json_option
@pass_context
def push(
    context: Context,
    remote_name: str,
    names: tuple[str, ...],
    replace: bool,
    trace_file: Path | None,
    as_json: bool,
) -> None:
    """Push images to a remote; chunks that it has are not sent.

    Any number of hosts may push to a remote at a time.
    """
    done = []
    trace = None if trace_file is None else read_trace(trace_file)
    with context.open(grows=True) as store:
        for name in dict.fromkeys(names):
            store.image(name)
        pusher = store.pusher(remote_name)
        for name in dict.fromkeys(names):
            with progress(f"push {name}") as on_progress:
                pushed = pusher.push(name, on_progress, replace=replace, trace=trace)
            done.append(pushed)
            if not as_json:
                show_pushed(pushed)
    if as_json:
        print_json({"images": done})


def show_pushed(pushed: Pushed) -> None:
    """Say what a push did."""
    if not pushed.sent_bytes:
        click.echo(f"{pushed.name}: is there already")
        return
    click.echo(
        f"pushed {pushed.name}: {human_bytes(pushed.size)}, of which "
        f"{human_bytes(pushed.new_bytes)} new, sent in {human_bytes(pushed.sent_bytes)}"
    )


COMMANDS = (remote, push)
