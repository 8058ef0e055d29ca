"""What is reported: findings, the report of a walk, and faults on their way to becoming either.

Owns the names under which the parts of the file without a name of their own are reported, and the
wording of the error that refuses a damaged file. Knows nothing of the format. Pure, thread-safe.
"""

import os
from dataclasses import dataclass
from typing import Final

from dedupstore.errors import StoreDamagedError

META: Final = "(meta)"
FREE_LIST: Final = "(free list)"
MAIN: Final = "(main)"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong: the page's number, the database it serves, and the reason in words.

    Where a page cannot be trusted at all (out of range, used twice), `page` is its number and
    `reason` says so; where a database's own record is wrong, `page` is the page that holds it.
    """

    page: int
    database: str
    reason: str

    def __str__(self) -> str:
        return f"page {self.page} of {self.database}: {self.reason}"


@dataclass(frozen=True, slots=True)
class PageReport:
    """What a walk saw. The structure is sound if `findings` is empty.

    `pages_walked`: meta, tree and overflow pages accounted for (pages on the free list are not
    counted). `entries`: per database, the keys in the leaves that could be read; FREE_LIST and MAIN
    are among them, MAIN's entries being the databases.
    """

    pages_walked: int
    entries: dict[str, int]
    findings: tuple[Finding, ...]


class Fault(Exception):  # noqa: N818 (not an error of the program: it becomes a finding)
    """The page at hand is wrong; whoever knows the database makes a finding of it."""

    def __init__(self, reason: str, page: int | None = None) -> None:
        super().__init__(reason, page)
        self.reason = reason
        self.page = page


def damaged(path: str | os.PathLike[str], fault: Fault) -> StoreDamagedError:
    """The error that refuses the file: one line with the file, the reason and what to do."""
    where = "" if fault.page is None else f"page {fault.page}: "
    return StoreDamagedError(
        f"{os.fspath(path)}: {where}{fault.reason} "
        "(do not write to the store; restore this file from a copy)"
    )
