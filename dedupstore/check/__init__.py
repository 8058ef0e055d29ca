"""Scrub and repair: verifies every byte of a store against what it claims to be, and mends it.

Each module imports only from those before it: `findings` what is reported, `frames` the scrub of
frames, `scrub` that of all records, `salvage` what a damaged frame still holds, `sources`, `stores`
and `files` where else lost contents may be found, `records` and `repair` the mending, `rebuild` a
new data file where pages are damaged, `run` the order of it all.

Returns typed findings, prints nothing. Runs beside servers, imports and gc.
"""

from dedupstore.check.findings import Checked, Finding
from dedupstore.check.run import check_store

__all__ = ["Checked", "Finding", "check_store"]
