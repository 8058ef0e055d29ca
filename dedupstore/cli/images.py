"""Commands about a store's images by name: init, clone, rename, rm, ls, info, diff."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import click

from dedupstore.cli.context import Context, pass_context
from dedupstore.cli.output import (
    human_bytes,
    json_option,
    print_json,
    print_pairs,
    print_table,
)
from dedupstore.creation import create_store
from dedupstore.store import ImageInfo, Laziness


@click.command()
@pass_context
def init(context: Context) -> None:
    """Create a store. Refuses to touch one that is there."""
    create_store(context.path)
    click.echo(f"created {context.path}")


@click.command()
@click.argument("source")
@click.argument("target")
@pass_context
def clone(context: Context, source: str, target: str) -> None:
    """Make TARGET a clone of image SOURCE: instant, shares everything."""
    with context.open(grows=True) as store:
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
        lazy = store.laziness(name)
    if as_json:
        print_json({**asdict(image), "missing_bytes": 0, **(asdict(lazy) if lazy else {})})
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
            **(_shown_laziness(lazy) if lazy else {}),
        }
    )


def _shown_laziness(lazy: Laziness) -> dict[str, str]:
    shown = {"elsewhere": human_bytes(lazy.missing_bytes)}
    if lazy.prefetch != "none":
        paused = ", paused" if lazy.paused else ""
        shown["prefetch"] = f"{lazy.prefetch}, {lazy.done:.0%} done{paused}"
    return shown


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


COMMANDS = (init, clone, rename, rm, ls, info, diff)
