"""The command that brings a store's images and a remote's in line: sync."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import click

from dedupstore.cli.context import Context, pass_context
from dedupstore.cli.output import json_option, print_json, progress
from dedupstore.cli.pulling import show_pulled
from dedupstore.cli.remotes import show_pushed
from dedupstore.errors import UsageError
from dedupstore.store import Store


@dataclass(frozen=True, slots=True)
class Plan:
    """What one side lacks: names to transfer, and to remove there."""

    transfer: list[str]
    remove: list[str]


def plan(
    source: Mapping[str, str], target: Mapping[str, str], patterns: Iterable[str], *, delete: bool
) -> Plan:
    """What it takes until `target` has what `source` has; both are digests by name."""
    wanted = tuple(patterns) or ("*",)

    def matching(names: Iterable[str]) -> list[str]:
        return sorted(n for n in names if any(fnmatchcase(n, pattern) for pattern in wanted))

    transfer = [name for name in matching(source) if target.get(name) != source[name]]
    remove = [name for name in matching(target) if name not in source] if delete else []
    return Plan(transfer, remove)


@click.command()
@click.argument("remote")
@click.argument("patterns", nargs=-1, metavar="[NAME|GLOB]...")
@click.option("--push", is_flag=True, help="The other way: the remote gets what is here.")
@click.option("--lazy", is_flag=True, help="As for pull.")
@click.option("--delete", is_flag=True, help="Names that the one side has not go on the other.")
@click.option("--dry-run", is_flag=True, help="Only report what would be done.")
@json_option
@pass_context
def sync(
    context: Context,
    remote: str,
    patterns: tuple[str, ...],
    push: bool,
    lazy: bool,
    delete: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Have here what REMOTE has, under the same names: what is new there or has changed is pulled.

    Names that stand for another image here change over. What is the same is not transferred.
    """
    if push and lazy:
        raise UsageError("--push, --lazy: contents are always pushed")
    with context.open(grows=True) as store:
        here = {image.name: image.digest for image in store.images()}
        there = store.remote_images(remote)
        todo = plan(*((here, there) if push else (there, here)), patterns, delete=delete)
        if not dry_run:
            transfer = _push if push else _pull
            transfer(store, remote, todo, lazy=lazy, quiet=as_json)
    if as_json:
        print_json({"transferred": todo.transfer, "removed": todo.remove, "dry_run": dry_run})
    elif dry_run:
        for name in todo.transfer:
            click.echo(f"would {'push' if push else 'pull'} {name}")
        for name in todo.remove:
            click.echo(f"would remove {name}")


def _pull(store: Store, remote: str, todo: Plan, *, lazy: bool, quiet: bool) -> None:
    for name in todo.transfer:
        with progress(f"pull {name}") as on_progress:
            pulled = store.pull(remote, name, name, on_progress, lazy=lazy, replace=True)
        if not quiet:
            show_pulled(pulled, lazy=lazy)
    if todo.remove:
        store.remove(todo.remove)
        if not quiet:
            click.echo(f"removed {', '.join(todo.remove)}")


def _push(store: Store, remote: str, todo: Plan, *, lazy: bool, quiet: bool) -> None:  # noqa: ARG001
    if not todo.transfer and not todo.remove:
        return
    pusher = store.pusher(remote)
    for name in todo.transfer:
        with progress(f"push {name}") as on_progress:
            pushed = pusher.push(name, on_progress, replace=True)
        if not quiet:
            show_pushed(pushed)
    for name in todo.remove:
        pusher.delete(name)
        if not quiet:
            click.echo(f"removed {name} from {remote}")


COMMANDS = (sync,)
