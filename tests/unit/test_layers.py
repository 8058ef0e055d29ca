"""The layers of the package, read from its imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A module may import from the layers before its own; never from its own, nor from a later one.
LAYERS = (
    ("errors", "constants", "imported", "memory", "holes", "durability"),
    (
        "format",
        "erofs",
        "chunker",
        "pages",
        "location",
        "programs",
        "archives",
        "syscalls",
        "opening",
        "listening",
        "traces",
    ),
    ("env", "slabs"),
    ("values",),
    ("places",),
    ("frames", "catalog", "leases"),
    (
        "cache",
        "creation",
        "manifest",
        "sources",
        "building",
        "pooling",
        "origins",
        "outline",
        "quarantine",
        "wishes",
    ),
    ("reader", "recording", "staging", "trees"),
    ("ingest", "gc", "compaction"),
    ("imports", "remote"),
    ("store",),
    ("check", "control", "export", "server", "views"),
    ("mounts",),
    ("cli",),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

PACKAGE_FILES = sorted((ROOT / "dedupstore").rglob("*.py"))
PLUGIN_FILES = sorted((ROOT / "nbdplugin").rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _unit(path: Path) -> str:
    """The module or subpackage directly below the package that a file belongs to."""
    return path.relative_to(ROOT / "dedupstore").parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, at its top or anywhere inside."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _attributes(path: Path) -> set[str]:
    """Every `a.b` in a file, and every `b` of `from a import b`."""
    tree = ast.parse(path.read_bytes())
    found = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    return found | set(_imports(path))


def _calls(path: Path) -> set[str]:
    tree = ast.parse(path.read_bytes())
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {call.id for call in calls if isinstance(call, ast.Name)}


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=_name)
def test_imports_point_only_to_lower_layers(path: Path) -> None:
    if path.parent.name == "dedupstore" and path.name == "__init__.py":
        assert not [name for name in _imports(path) if name.startswith("dedupstore")]
        return
    own = _unit(path)
    assert own in LEVEL, f"{own} has no layer: give it one in LAYERS"
    for name in _imports(path):
        package, _, rest = name.partition(".")
        imported = rest.split(".")[0]
        if package != "dedupstore" or imported in (own, "__version__"):
            continue
        assert imported in LEVEL, f"{imported} has no layer: give it one in LAYERS"
        assert LEVEL[imported] < LEVEL[own], f"{own} imports {imported}, which is not below it"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=_name)
def test_package_knows_neither_plugin_nor_tools_nor_tests(path: Path) -> None:
    packages = {name.partition(".")[0] for name in _imports(path)}
    assert not packages & {"nbdplugin", "nbdkit", "tools", "tests"}


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=_name)
def test_plugin_stands_above_the_package_and_beside_the_command_line(path: Path) -> None:
    names = set(_imports(path))
    assert not {name.partition(".")[0] for name in names} & {"tools", "tests"}
    assert not [name for name in names if name.startswith(("dedupstore.cli", "dedupstore.mounts"))]


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=_name)
def test_only_command_line_and_plugin_read_the_environment(path: Path) -> None:
    if _unit(path) != "cli":
        assert not _attributes(path) & {"os.environ", "os.environb", "os.getenv", "os.getenvb"}


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=_name)
def test_only_command_line_prints(path: Path) -> None:
    if _unit(path) == "cli":
        return
    assert "print" not in _calls(path)
    allowed = {"sys.stdout"} if _unit(path) == "export" else set()  # an image, not a message
    names = _attributes(path) & {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
    assert names <= allowed
    packages = {name.partition(".")[0] for name in _imports(path)}
    assert not packages & {"click", "tqdm", "logging", "warnings"}


@pytest.mark.parametrize("path", PACKAGE_FILES + PLUGIN_FILES, ids=_name)
def test_only_env_opens_lmdb(path: Path) -> None:
    assert path.name == "env.py" or not _attributes(path) & {"lmdb.open", "lmdb.Environment"}


def test_every_layer_named_here_but_the_mounts_exists() -> None:
    units = {_unit(path) for path in PACKAGE_FILES}
    assert set(LEVEL) - units <= {"mounts"}
