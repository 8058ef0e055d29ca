"""The command line: the only part of the package that prints and that reads the environment.

`main` is the entry point and loads the module that a command is in: `images`, `transfers`,
`maintenance`, `serving`, `mounting` or `remotes`. `output` is how results and failures are shown,
`guard` what happens when LMDB itself crashes on a damaged file. `mounthelper` is a second entry
point, for mount(8).
"""

from dedupstore.cli.main import main

__all__ = ["main"]
