"""Commands that move whole images: import, export."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dedupstore.cli.context import Context, pass_context
from dedupstore.cli.output import human_bytes, json_option, print_json, progress
from dedupstore.errors import UsageError
from dedupstore.imported import Imported
from dedupstore.store import STANDARD_INPUT


@click.command("import")
@click.argument("source")
@click.argument("name", required=False)
@click.option(
    "--reread", is_flag=True, help="Read a file even if it is unchanged since it was imported."
)
@json_option
@pass_context
def import_(context: Context, source: str, name: str | None, reread: bool, as_json: bool) -> None:
    """Import SOURCE as image NAME (default: SOURCE's name without its suffix).

    SOURCE is an EROFS or any raw image file, a block device, a directory or tar archive (built into
    an EROFS image), or - for standard input. An image file whose inode, size and times are those of
    one that was imported before is not read again.
    """
    if source == STANDARD_INPUT and name is None:
        raise UsageError("import from standard input: give the image a name")
    with context.open(grows=True) as store, progress(f"import {source}") as on_progress:
        if source == STANDARD_INPUT:
            assert name is not None
            imported = store.import_stream(sys.stdin.buffer, name, on_progress)
        else:
            name, imported = store.import_path(Path(source), name, on_progress, reread=reread)
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
@click.argument("name")
@click.argument("file")
@pass_context
def export(context: Context, name: str, file: str) -> None:
    """Write image NAME back to FILE, byte for byte; - is standard output."""
    from dedupstore.export import export_image  # noqa: PLC0415 - 5 ms, for export only

    with context.open() as store, progress(f"export {name}") as on_progress:
        if file == "-":
            export_image(store, name, None, on_progress)
        else:
            export_image(store, name, Path(file), on_progress)


COMMANDS = (import_, export)
