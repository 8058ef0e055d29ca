"""mount.dedupstore: from what mount(8) and /etc/fstab give to the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dedupstore.cli.mounthelper import translate


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["base", "/mnt"], ["mount", "--", "base", "/mnt"]),
        (["base", "/mnt", "-o", "rw"], ["mount", "--", "base", "/mnt"]),
        (["base", "/mnt", "-n", "-v", "-o", "ro,noauto,x-systemd.requires=a,nofail"], None),
        (["-t", "dedupstore", "base", "/mnt", "-s", "-o", "ro,unknown=1"], None),
        (
            ["base", "/mnt", "-o", "ro,store=/srv/a,share=none"],
            ["--store", "/srv/a", "mount", "--share=none", "--", "base", "/mnt"],
        ),
        (
            ["ext", "/mnt", "-o", "type=ext4", "-o", r"store=/a\,b"],
            ["--store", "/a,b", "mount", "--type=ext4", "--", "ext", "/mnt"],
        ),
        (
            ["base", "/mnt", "-o", "nodev,nosuid"],
            ["mount", "--option=nodev", "--option=nosuid", "--", "base", "/mnt"],
        ),
        (
            ["base", "/mnt", "-o", "store=/s,pull=far"],
            ["--store", "/s", "mount", "--pull=far", "--", "base", "/mnt"],
        ),
        (["base", "/mnt", "-f"], []),
    ],
)
def test_options_become_those_of_the_command(
    arguments: list[str], expected: list[str] | None
) -> None:
    assert translate(arguments) == (
        expected or (["mount", "--", "base", "/mnt"], [])[expected == []]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs an image and a directory"),
        (["base"], "needs an image and a directory"),
        (["base", "/mnt", "-o", "sync"], "unknown option 'sync'"),
        (["base", "/mnt", "-o", "store"], "unknown option 'store'"),
        (["base", "/mnt", "-x"], "option -x not recognized"),
        (["base", "/mnt", "-N", "7"], "another namespace"),
    ],
)
def test_wrong_invocations_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate(arguments)
    program = Path(sys.executable).with_name("mount.dedupstore")
    result = subprocess.run([program, *arguments], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("mount.dedupstore: ")
    assert result.stderr.count("\n") == 1
