"""Runs the dedupstore commands that it is sent as JSON lists, one a line, each in a fork of its
own: what the program does, without its start-up time. Answers with [status, stdout, stderr]."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback

from dedupstore.cli import main


def run(arguments: list[str], out: int, err: int) -> None:
    """Be the program; does not return."""
    status: object = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        main(arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 70)


def serve() -> None:
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                run(json.loads(line), out.fileno(), err.fileno())
            _, status = os.waitpid(child, 0)
            printed = []
            for file in (out, err):
                file.seek(0)
                printed.append(file.read().decode())
            print(json.dumps([os.waitstatus_to_exitcode(status), *printed]), flush=True)


if __name__ == "__main__":
    serve()
