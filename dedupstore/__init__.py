"""Content-addressed store of disk images: N clones cost one.

`dedupstore.store.Store` is the entry point; README.md and docs/design.md explain the layers.
"""

__version__ = "0.1.0"
