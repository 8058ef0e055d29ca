"""How results, progress and failures look. Owns formatting; decides nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def print_json(value: Any) -> None:
    """Print a result as one JSON document."""
    click.echo(json.dumps(value, default=_plain, indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"no JSON form for {type(value).__name__}")


def human_bytes(count: int) -> str:
    """A size for people, in decimal units as disks are sold."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def print_table(rows: list[dict[str, str]]) -> None:
    """Print rows as aligned columns, headed by their keys; columns of sizes to the right."""
    if not rows:
        return
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    numeric = {name for name in names if all(row[name][:1].isdigit() for row in rows)}
    for row in ({name: name for name in names}, *rows):
        cells = (
            row[name].rjust(widths[name]) if name in numeric else row[name].ljust(widths[name])
            for name in names
        )
        click.echo("  ".join(cells).rstrip())


def print_pairs(pairs: dict[str, str]) -> None:
    """Print names and values, one pair a line."""
    width = max(map(len, pairs)) + 2
    for name, value in pairs.items():
        click.echo(f"{name + ':':<{width}}{value}")


@contextmanager
def progress(what: str, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing otherwise. Yields a callback that takes (advance,
    total)."""
    if not sys.stderr.isatty():
        yield lambda _step, _total: None
        return
    from tqdm import tqdm  # noqa: PLC0415 - 30 ms, for a terminal only

    with tqdm(desc=what, unit=unit, unit_scale=True, file=sys.stderr, leave=False) as bar:

        def advance(step: int, total: int) -> None:
            bar.total = total
            bar.update(step)

        yield advance


@contextmanager
def progress_to(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Like `progress`, for callbacks that take (done so far, total)."""
    done = 0
    with progress(what, unit) as advance:

        def reach(now: int, total: int) -> None:
            nonlocal done
            advance(now - done, total)
            done = now

        yield reach
