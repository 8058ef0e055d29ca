"""mount.dedupstore: what mount(8) runs for file systems of type dedupstore, and so /etc/fstab.

    mount -t dedupstore -o store=/srv/images base /mnt
    base  /mnt  dedupstore  store=/srv/images,nofail  0  0

Translates mount(8)'s way of calling helpers into the command `mount`; owns nothing else.
"""

from __future__ import annotations

import getopt
import sys

# Options of ours: each becomes one of the command line.
_OWN = ("store", "share", "type", "pull")
_RESTRICTIONS = ("nosuid", "nodev", "noexec")
# What mount(8) and systemd put into options for themselves, or what holds for every mount here:
# images are read-only, as they would be on a read-only medium, whatever is asked for.
_IGNORED = ("defaults", "ro", "rw", "auto", "noauto", "nofail", "_netdev", "user", "nouser")
_IGNORED_PREFIXES = ("x-", "X-", "comment=")


def translate(arguments: list[str]) -> list[str]:
    """The arguments of `dedupstore` for those of mount(8): SPEC DIR [-sfnv] [-N NS] [-o OPTIONS]
    [-t TYPE]; empty when nothing is to be done. Raises ValueError with what is wrong."""
    try:
        switches, (name, directory) = getopt.gnu_getopt(arguments, "sfnvN:o:t:")
    except getopt.GetoptError as error:
        raise ValueError(str(error)) from None
    except ValueError:
        raise ValueError("needs an image and a directory") from None
    given = {switch: value for switch, value in switches if switch != "-o"}
    if "-N" in given:
        raise ValueError("mounting in another namespace is not supported")
    lists = [value for switch, value in switches if switch == "-o"]
    own, restrictions = _parse(lists, sloppy="-s" in given)
    if "-f" in given:
        return []
    command = ["--store", own.pop("store")] if "store" in own else []
    command.append("mount")
    for key, value in own.items():
        command.append(f"--{key}={value}")
    command += [f"--option={name}" for name in restrictions]
    return [*command, "--", name, directory]


def _parse(lists: list[str], *, sloppy: bool) -> tuple[dict[str, str], list[str]]:
    """Our options among comma-separated ones, those with values and the restrictions; a backslash
    keeps a comma."""
    found: dict[str, str] = {}
    restrictions = []
    for option in filter(None, ",".join(lists).replace("\\,", "\0").split(",")):
        key, has_value, value = option.replace("\0", ",").partition("=")
        if key in _OWN and has_value:
            found[key] = value
        elif option in _RESTRICTIONS:
            restrictions.append(option)
        elif not (sloppy or option in _IGNORED or option.startswith(_IGNORED_PREFIXES)):
            known = ", ".join((*_OWN, *_RESTRICTIONS))
            raise ValueError(f"unknown option {option!r} (known: {known})")
    return found, restrictions


def main() -> None:
    """Entry point of the `mount.dedupstore` program."""
    from dedupstore.cli.main import main as dedupstore  # noqa: PLC0415 - usage needs none of it

    try:
        command = translate(sys.argv[1:])
    except ValueError as error:
        print(f"mount.dedupstore: {error}", file=sys.stderr)
        sys.exit(1)  # mount(8): incorrect invocation
    if command:
        dedupstore(command)
