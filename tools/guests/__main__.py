"""Command line of the guests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.guests import cache
from tools.guests.content import checkout_files
from tools.guests.guest import MEMORY_MIB, Guest, GuestError, HostSocket
from tools.guests.sharing import PROJECT


def main() -> int:
    """Boot, run one command or a shell, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/guest",
        description="Boots a Debian kernel under qemu and runs a command in it, or a shell.",
        epilog="Exit status: the command's; 125 if there is no guest or it died.",
    )
    parser.add_argument(
        "--kernel", choices=cache.SUITES, default=cache.SUITES[0], help="the suite that it is from"
    )
    parser.add_argument("--memory", type=int, default=MEMORY_MIB, metavar="MIB")
    parser.add_argument(
        "--socket",
        type=_socket,
        action="append",
        default=[],
        metavar="GUEST=HOST",
        help="a unix socket in the guest that leads to one here, or to 127.0.0.1 if HOST is a port",
    )
    parser.add_argument("--fetch", action="store_true", help="only fetch what is not cached")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    options = parser.parse_args()
    try:
        if options.fetch:
            cache.programs(fetch=True)
            for suite in cache.SUITES:
                print(f"{suite}: {cache.kernel(suite, fetch=True).release}")
            return 0
        return _run(options)
    except (GuestError, cache.UnavailableError) as error:
        print(f"tools/guest: {error}", file=sys.stderr)
        return 125
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    with Guest(
        options.kernel,
        memory_mib=options.memory,
        files=checkout_files(*PROJECT),
        sockets=dict(options.socket),
        terminal=not options.command,
        fetch=True,
    ) as guest:
        if not options.command:
            return guest.interact(["cttyhack", "sh"])
        result = guest.run(options.command, timeout=None)
        for stream, text in ((sys.stdout, result.stdout), (sys.stderr, result.stderr)):
            stream.buffer.write(text.encode(errors="surrogateescape"))
            stream.flush()
        return result.returncode


def _socket(text: str) -> tuple[str, HostSocket]:
    guest, equals, host = text.partition("=")
    if not (guest.startswith("/") and equals and host):
        raise argparse.ArgumentTypeError(f"not GUEST=HOST: {text}")
    return guest, ("127.0.0.1", int(host)) if host.isdigit() else Path(host)


if __name__ == "__main__":
    sys.exit(main())
