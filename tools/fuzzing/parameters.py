"""What comes from command lines: plugin parameters, image names, sources, mount(8)'s arguments.

An input is KIND, a byte, and arguments, separated by zero bytes as a kernel would. Promises: a
DedupError of one line (ValueError for mount(8)'s, whose caller prints it), or what is accepted is
what it says: an image name that no shell, path or glob misreads; no parameter of dedupstore's but
those asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from dedupstore import catalog
from dedupstore.cli import mounthelper
from dedupstore.errors import DedupError
from tools.fuzzing.messages import check_message

BYTES_MAX = 2048
_NAME, _DEFAULT, _CONFIG, _MOUNT = range(4)
_SIZE_BYTES_MAX = (1 << 63) - 1


def _parse_size(text: str) -> int:
    """What nbdkit_parse_size takes of what the plugin passes on."""
    suffix = "bkmgtpe".find(text[-1].lower())
    digits = text if text[-1].isdigit() else text[:-1]
    size = int(digits) << max(suffix, 0) * 10 if suffix >= 0 else int(digits) * 512
    if size > _SIZE_BYTES_MAX:
        raise ValueError(text)
    return size


@cache
def _plugin() -> Any:
    """The plugin's callbacks, without the server that calls them."""
    nbdkit: Any = ModuleType("nbdkit")
    nbdkit.parse_size = _parse_size
    sys.modules["nbdkit"] = nbdkit
    from nbdplugin import dedup  # noqa: PLC0415 - needs the module above

    return dedup


def run(data: bytes) -> None:
    if not data:
        return
    arguments = [os.fsdecode(part) for part in data[1:].split(b"\0")]
    try:
        (_name, _default, _config, _mount)[data[0] % 4](arguments)
    except DedupError as error:
        check_message(error)


def _name(arguments: list[str]) -> None:
    name = arguments[0]
    key = catalog.encode_name(name)
    assert catalog.decode_name(key) == name
    assert 0 < len(key) <= 255
    assert name.isprintable() or " " in name or not name.isascii()
    assert not set(name) & set("*?[]\\\0\n\r\t")
    inside = Path("/store") / name
    assert Path(os.path.normpath(inside)) == inside
    assert inside.is_relative_to("/store")
    assert inside != Path("/store")


def _default(arguments: list[str]) -> None:
    name = catalog.default_name(Path(arguments[0]))
    assert name
    assert "/" not in name


def _config(arguments: list[str]) -> None:
    plugin = _plugin()
    plugin._config.images.clear()
    key, *values = arguments
    for value in values or [""]:
        plugin.config(key, value)
    config = plugin._config
    assert config.store.is_absolute()
    assert config.metrics is None or config.metrics.is_absolute()
    assert 0 <= config.cache_bytes <= _SIZE_BYTES_MAX
    assert config.images == (values or [""] if key == "image" else [])


def _mount(arguments: list[str]) -> None:
    try:
        command = mounthelper.translate(arguments)
    except ValueError as error:
        assert "\n" not in f"{error!r}"  # noqa: PT017
        return
    if command:
        assert command[-3] == "--"  # whatever name and directory are, they are no options
        options = command[command.index("mount") + 1 : -3]
        allowed = ("--share=", "--type=", "--option=")
        assert all(option.startswith(allowed) for option in options), options


def seeds() -> Mapping[str, bytes]:
    return {
        "name": b"\x00web/1",
        "name-parent": b"\x00web/../../etc",
        "name-controls": b"\x00a\x1b[2J",
        "name-bytes": b"\x00\xff\xfe",
        "default": b"\x01/images/base.tar.gz",
        "default-hidden": b"\x01.erofs",
        "cache": b"\x02cache\x00512M",
        "cache-large": b"\x02cache\x00999999999999999E",
        "image": b"\x02image\x00base\x00web/*",
        "store": b"\x02store\x00~/images",
        "store-user": b"\x02store\x00~nobody-of-that-name/images",
        "metrics": b"\x02metrics\x00m.sock",
        "mount": b"\x03base\x00/mnt\x00-o\x00ro,nodev,store=/srv/a\\,b,share=none",
        "mount-sloppy": b"\x03-s\x00-t\x00dedupstore\x00--\x00--help\x00-x\x00-o\x00what",
    }
