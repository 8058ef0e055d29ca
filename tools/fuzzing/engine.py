"""Runs one target under libFuzzer, in a process of its own: python -m tools.fuzzing.engine TARGET
[LIBFUZZER-ARGUMENT]...

What the target imports is instrumented; the target itself is not.
"""

from __future__ import annotations

import os
import signal
import sys

SECONDS_MAX = 10  # for one input, on a busy machine; none needs a tenth of it on an idle one
RSS_MB_MAX = 1024  # for the process, some 120 MB of which are Python, libFuzzer and the corpus
_INSTRUMENTED = ["dedupstore", "nbdplugin", "tarfile"]


def main() -> None:
    name, *arguments = sys.argv[1:]
    sys.modules.pop("tarfile", None)
    import atheris  # noqa: PLC0415 - nothing else of the tools needs it

    from tools.fuzzing import targets  # noqa: PLC0415

    # atheris tells about every module.
    quiet = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(2)
    os.dup2(quiet, 2)
    with atheris.instrument_imports(include=_INSTRUMENTED):
        target = targets.load(name)
    os.dup2(kept, 2)

    def one_input(data: bytes) -> None:
        target.run(data)

    # SIGINT ends libFuzzer with its statistics.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    bounds = [
        f"-timeout={SECONDS_MAX}",
        f"-rss_limit_mb={RSS_MB_MAX}",
        f"-max_len={target.BYTES_MAX}",
    ]
    # libFuzzer runs itself again, through a shell, when it merges.
    itself = f"{sys.executable} -m tools.fuzzing.engine {name}"
    atheris.Setup([itself, *bounds, *arguments], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
