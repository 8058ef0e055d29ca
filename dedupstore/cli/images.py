"""Commands about images: init, import, clone, rename, rm, ls, info, export, diff."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from dedupstore.cli.context import Context, pass_context
from dedupstore.cli.output import (
    human_bytes,
    json_option,
    print_json,
    print_pairs,
    print_table,
    progress,
)
from dedupstore.errors import UsageError
from dedupstore.export import export_image
from dedupstore.ingest import Imported
from dedupstore.store import STANDARD_INPUT, ImageInfo, Store


@click.command()
@pass_context
def init(context: Context) -> None:
    """Create a store. Refuses to touch one that is there."""
    Store.create(context.path).close()
    click.echo(f"created {context.path}")


@click.command("import")
@click.argument("source")
@click.argument("name", required=False)
@json_option
@pass_context
def import_(context: Context, source: str, name: str | None, as_json: bool) -> None:
    """Import SOURCE as image NAME (default: SOURCE's name without its suffix).

    SOURCE is an EROFS or any raw image file, a block device, a directory or tar archive (built into
    an EROFS image), or - for standard input.
    """
    if source == STANDARD_INPUT and name is None:
        raise UsageError("import from standard input: give the image a name")
    with context.open() as store, progress(f"import {source}") as on_progress:
        if source == STANDARD_INPUT:
            assert name is not None
            imported = store.import_stream(sys.stdin.buffer, name, on_progress)
        else:
            name, imported = store.import_path(Path(source), name, on_progress)
    _show_import(name, imported, as_json=as_json)


def _show_import(name: str, imported: Imported, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "name": name,
                "digest": imported.digest.hex(),
                "size": imported.size,
                "chunks": imported.chunks,
                "unique_bytes": imported.unique_bytes,
                "zero_bytes": imported.zero_bytes,
                "new_chunks": imported.new_chunks,
                "new_bytes": imported.new_bytes,
                "stored_bytes": imported.stored_bytes,
            }
        )
        return
    click.echo(
        f"imported {name}: {human_bytes(imported.size)}, of which "
        f"{human_bytes(imported.new_bytes)} new, stored in {human_bytes(imported.stored_bytes)}"
    )


@click.command()
@click.argument("source")
@click.argument("target")
@pass_context
def clone(context: Context, source: str, target: str) -> None:
    """Make TARGET a clone of image SOURCE: instant, shares everything."""
    with context.open() as store:
        store.clone(source, target)


@click.command()
@click.argument("old")
@click.argument("new")
@pass_context
def rename(context: Context, old: str, new: str) -> None:
    """Rename image OLD to NEW."""
    with context.open() as store:
        store.rename(old, new)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@pass_context
def rm(context: Context, names: tuple[str, ...]) -> None:
    """Remove images, all or none of them. 'gc' then reclaims their space."""
    with context.open() as store:
        store.remove(list(names))


@click.command()
@json_option
@pass_context
def ls(context: Context, as_json: bool) -> None:
    """List the images."""
    with context.open() as store:
        found = store.images()
    if as_json:
        print_json({"images": found})
        return
    print_table(
        [
            {
                "NAME": image.name,
                "SIZE": human_bytes(image.size),
                "UNIQUE": human_bytes(image.unique_bytes),
                "KIND": image.kind,
                "DIGEST": image.digest[:16],
                "CREATED": _date(image),
            }
            for image in found
        ]
    )


def _date(image: ImageInfo) -> str:
    moment = datetime.fromtimestamp(image.created, UTC).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M")


@click.command()
@click.argument("name")
@json_option
@pass_context
def info(context: Context, name: str, as_json: bool) -> None:
    """Show one image."""
    with context.open() as store:
        image = store.image(name)
    if as_json:
        print_json(image)
        return
    print_pairs(
        {
            "name": image.name,
            "size": f"{image.size} ({human_bytes(image.size)})",
            "digest": image.digest,
            "kind": image.kind,
            "created": _date(image),
            "chunks": str(image.chunks),
            "unique": human_bytes(image.unique_bytes),
            "zeros": human_bytes(image.zero_bytes),
        }
    )


@click.command()
@click.argument("name")
@click.argument("file")
@pass_context
def export(context: Context, name: str, file: str) -> None:
    """Write image NAME back to FILE, byte for byte; - is standard output."""
    with context.open() as store, progress(f"export {name}") as on_progress:
        if file == "-":
            export_image(store, name, None, on_progress)
        else:
            export_image(store, name, Path(file), on_progress)


@click.command()
@click.argument("a")
@click.argument("b")
@json_option
@pass_context
def diff(context: Context, a: str, b: str, as_json: bool) -> None:
    """Show what images A and B share and do not share."""
    with context.open() as store:
        found = store.diff(a, b)
    if as_json:
        print_json(found)
        return
    if found.identical:
        click.echo(f"{a} and {b} are identical")
    print_pairs(
        {
            "shared": f"{human_bytes(found.shared_bytes)} in {found.shared_chunks} chunks",
            f"only {a}": f"{human_bytes(found.only_a_bytes)} in {found.only_a_chunks} chunks",
            f"only {b}": f"{human_bytes(found.only_b_bytes)} in {found.only_b_chunks} chunks",
        }
    )


COMMANDS = (init, import_, clone, rename, rm, ls, info, export, diff)
