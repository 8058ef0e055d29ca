"""The command line: the only part of the package that prints and that reads the environment.

`main` is the entry point; `images`, `maintenance` and `serving` define the commands, `output` how
results and failures are shown, `guard` what happens when LMDB itself crashes on a damaged file.
"""

from dedupstore.cli.main import main

__all__ = ["main"]
