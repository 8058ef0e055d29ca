"""Commands about the store as a whole: gc, check, stats."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dedupstore.check import Checked, Finding, check_store
from dedupstore.cli.context import Context, pass_context
from dedupstore.cli.output import (
    human_bytes,
    json_option,
    print_json,
    print_pairs,
    progress_to,
)
from dedupstore.errors import UsageError

if TYPE_CHECKING:
    from dedupstore.compaction import Compacted
    from dedupstore.gc import Collected


@click.command()
@click.option("--dry-run", is_flag=True, help="Only report what would be reclaimed.")
@click.option("--compact", is_flag=True, help="Then give free space back to the file system.")
@json_option
@pass_context
def gc(context: Context, dry_run: bool, compact: bool, as_json: bool) -> None:
    """Reclaim what no image needs. Safe while images are served and imported."""
    if compact and dry_run:
        raise click.UsageError("--compact changes the store's file, --dry-run nothing")
    compacted = None
    with context.open() as store:
        with progress_to("gc", "frames") as on_progress:
            collected = store.collect_garbage(dry_run=dry_run, on_progress=on_progress)
        if not as_json:
            _show_collected(collected)
        try:
            if compact:
                with progress_to("compact", "pages") as on_progress:
                    compacted = store.compact(on_progress=on_progress)
        finally:  # what gc has done is done
            if as_json:
                print_json({**asdict(collected), "compacted": compacted})
    if compacted and not as_json:
        _show_compacted(compacted)


def _show_collected(collected: Collected) -> None:
    verb = "would reclaim" if collected.dry_run else "reclaimed"
    click.echo(
        f"{verb} {human_bytes(collected.bytes)}: {collected.chunks} chunks, "
        f"{collected.manifests} manifests, {collected.drafts} drafts of dead imports"
    )


def _show_compacted(compacted: Compacted) -> None:
    held = (
        f"; {human_bytes(compacted.bytes_held)} more were being read"
        if compacted.bytes_held
        else ""
    )
    click.echo(f"gave {human_bytes(compacted.bytes)} back to the file system{held}")


@click.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended.")
@click.option(
    "--from",
    "sources",
    multiple=True,
    metavar="SOURCE",
    type=click.Path(path_type=Path),
    help="With --repair: mend from another store's directory, or from an image file or device, too."
    " May be repeated.",
)
@json_option
@pass_context
def check(context: Context, repair: bool, sources: tuple[Path, ...], as_json: bool) -> int:
    """Verify the whole store: every page, chunk, manifest and name. Exits 1 on damage.

    One line for each thing that is damaged, or with --repair was: it ends in "(mended)" or says
    what is still lost. What cannot be mended is put into quarantine, with or without --repair, so
    that the next import of the same content stores it anew.
    """
    if sources and not repair:
        raise UsageError("check --from: give --repair, too")
    with progress_to("check", "frames") as on_progress:
        checked = check_store(context.path, repair=repair, sources=sources, on_progress=on_progress)
    if as_json:
        print_json({**asdict(checked), "intact": checked.intact})
    else:
        _show(checked)
    return 0 if checked.intact else 1


def _show(checked: Checked) -> None:
    for finding in checked.findings:
        click.echo(_line(finding))
    verdict = f"{len(checked.findings)} findings" if checked.findings else "intact"
    mended = sum(finding.mended for finding in checked.findings)
    if mended:
        verdict += ", all mended" if checked.intact else f", {mended} mended"
    chunks = f"{checked.chunks} chunks ({human_bytes(checked.bytes)})"
    click.echo(f"{checked.images} images, {chunks} verified: {verdict}")
    if checked.advice:
        click.echo(f"to go on: {checked.advice}")


def _line(finding: Finding) -> str:
    where = finding.what
    if finding.image is not None:
        where = f"image {finding.image!r}"
        if finding.offset is not None:
            where += f" offset {finding.offset}"
    chunk = f" chunk {finding.chunk}:" if finding.chunk else ""
    return f"{where}:{chunk} {finding.reason}" + (" (mended)" if finding.mended else "")


@click.command()
@json_option
@pass_context
def stats(context: Context, as_json: bool) -> None:
    """Show what the store holds and what sharing saves."""
    with context.open() as store:
        found = store.stats()
    if as_json:
        print_json(found)
        return
    print_pairs(
        {
            "images": str(found.images),
            "logical": human_bytes(found.logical_bytes),
            "unique": f"{human_bytes(found.unique_bytes)} (dedup {found.dedup_ratio:.2f} x)",
            "stored": f"{human_bytes(found.stored_bytes)} "
            f"(compression {found.compression_ratio:.2f} x)",
            "file": f"{human_bytes(found.file_bytes)} on disk",
            "chunks": str(found.chunks),
        }
        | (
            {"in remotes": f"{human_bytes(found.distant_bytes)} in {found.distant_chunks} chunks"}
            if found.distant_frames
            else {}
        )
    )


COMMANDS = (gc, check, stats)
