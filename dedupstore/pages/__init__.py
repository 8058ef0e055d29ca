"""Verifies the page structure of the store's LMDB data file before LMDB is trusted with it.

It only reads, and only with pread: LMDB maps the file and follows page numbers, node offsets and
sizes as it finds them, so on a damaged or truncated file it ends the process (SIGSEGV, SIGBUS,
abort) where this package reports. It does not look inside values: those carry checksums of their
own, which other layers verify. Databases with flags (MDB_DUPSORT, MDB_INTEGERKEY, ...) are reported
as unsupported, never walked: the store has none.

Each module imports only from those before it: `findings` what is reported, `layout` the format of
the file, `datafile` the open file and its meta pages, `pagemap` which pages are accounted for,
`walk` the way through the trees, `header` the quick look before LMDB opens the file, `verify` the
walks that callers ask for, `freelist` the pages that are not in use, `records` what a damaged file
still holds.

Thread-safe: every call opens the file anew and shares nothing.
"""

from dedupstore.pages.findings import FREE_LIST, MAIN, META, Finding, PageReport
from dedupstore.pages.freelist import FreePages, read_free_pages
from dedupstore.pages.header import verify_header
from dedupstore.pages.records import RecordReader
from dedupstore.pages.verify import verify_pages, verify_trees
from dedupstore.pages.walk import FINDINGS_MAX, Progress

__all__ = [
    "FINDINGS_MAX",
    "FREE_LIST",
    "MAIN",
    "META",
    "Finding",
    "FreePages",
    "PageReport",
    "Progress",
    "RecordReader",
    "read_free_pages",
    "verify_header",
    "verify_pages",
    "verify_trees",
]
