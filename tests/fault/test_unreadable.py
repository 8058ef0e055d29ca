"""Files that may not be read or written, that are not there, or that are in the way."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.interop.corpus import Images
from tests.interop.rig import DEDUPSTORE, PLUGIN, StoreDirectory, refusal, require_nbdkit
from tests.programs import require_program, require_root

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def as_nobody(*command: str | Path) -> tuple[int, str]:
    """Run a program as an ordinary user; return its status and what it said on standard error."""
    require_root()
    require_program("setpriv")
    if subprocess.run([*NOBODY, "test", "-x", DEDUPSTORE], check=False).returncode:
        pytest.skip("the checkout is not open to other users")
    result = subprocess.run(
        [*NOBODY, *command], capture_output=True, check=False, text=True, cwd="/"
    )
    return result.returncode, result.stderr


@pytest.fixture
def open_path(tmp_path: Path) -> Path:
    """A directory that everybody may enter and write to."""
    for directory in (tmp_path, *tmp_path.parents[:2]):
        if directory.name.startswith(("pytest", "test")):
            directory.chmod(0o755)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    return shared


@pytest.mark.parametrize("command", [["ls"], ["check"], ["gc"], ["clone", "base", "new"]])
def test_store_of_another_user_is_refused(
    store_dir: StoreDirectory, open_path: Path, command: list[str]
) -> None:
    line = refusal(*as_nobody(DEDUPSTORE, "--store", store_dir.path, *command))
    assert "Permission denied" in line


def test_store_of_another_user_is_not_served(store_dir: StoreDirectory, open_path: Path) -> None:
    require_nbdkit()
    nbdkit = ("nbdkit", "-f", "-U-", "python", PLUGIN, f"store={store_dir.path}", "--run", "true")
    assert "Permission denied" in refusal(*as_nobody(*nbdkit))


def test_init_where_one_may_not_write_is_refused(open_path: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o755)
    line = refusal(*as_nobody(DEDUPSTORE, "--store", tmp_path / "closed" / "store", "init"))
    assert "Permission denied" in line


def test_unreadable_source_is_refused(open_path: Path) -> None:
    assert as_nobody(DEDUPSTORE, "--store", open_path / "store", "init") == (0, "")
    (open_path / "secret").write_bytes(b"secret")
    (open_path / "secret").chmod(0o600)
    refused = as_nobody(DEDUPSTORE, "--store", open_path / "store", "import", open_path / "secret")
    assert refusal(*refused) == f"dedupstore: {open_path}/secret: Permission denied"


def test_source_in_a_directory_one_may_not_enter_is_refused(open_path: Path) -> None:
    assert as_nobody(DEDUPSTORE, "--store", open_path / "store", "init") == (0, "")
    (open_path / "closed").mkdir(mode=0o700)
    source = open_path / "closed" / "image"
    source.write_bytes(b"image")
    refused = as_nobody(DEDUPSTORE, "--store", open_path / "store", "import", source)
    assert "Permission denied" in refusal(*refused)


@pytest.mark.parametrize("where", ["", "below"])
def test_directory_that_cannot_be_listed_is_refused(open_path: Path, where: str) -> None:
    require_program("mkfs.erofs")
    assert as_nobody(DEDUPSTORE, "--store", open_path / "store", "init") == (0, "")
    (open_path / "tree" / "below").mkdir(parents=True)
    (open_path / "tree" / where).chmod(0o700)
    refused = as_nobody(DEDUPSTORE, "--store", open_path / "store", "import", open_path / "tree")
    assert "Permission denied" in refusal(*refused)


def test_export_to_where_one_may_not_write_is_refused(open_path: Path, tmp_path: Path) -> None:
    assert as_nobody(DEDUPSTORE, "--store", open_path / "store", "init") == (0, "")
    (open_path / "image").write_bytes(b"image")
    nobody = (DEDUPSTORE, "--store", open_path / "store")
    assert as_nobody(*nobody, "import", open_path / "image") == (0, "")
    (tmp_path / "closed").mkdir(mode=0o755)
    target = tmp_path / "closed" / "out"
    line = refusal(*as_nobody(*nobody, "export", "image", target))
    assert line == f"dedupstore: {target}: Permission denied"


def test_missing_source_is_refused(empty_store_dir: StoreDirectory, tmp_path: Path) -> None:
    line = empty_store_dir.refuse("import", tmp_path / "nowhere")
    assert line == f"dedupstore: {tmp_path}/nowhere: No such file or directory"


def test_pipe_as_source_is_refused(empty_store_dir: StoreDirectory, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert f"{tmp_path}/pipe" in empty_store_dir.refuse("import", tmp_path / "pipe")


def test_character_device_as_source_is_refused(empty_store_dir: StoreDirectory) -> None:
    assert "/dev/zero" in empty_store_dir.refuse("import", "/dev/zero", "zero")


def test_export_into_a_missing_directory_is_refused(
    store_dir: StoreDirectory, tmp_path: Path
) -> None:
    line = store_dir.refuse("export", "base", tmp_path / "no" / "out")
    assert line == f"dedupstore: {tmp_path}/no/out: No such file or directory"


def test_export_onto_a_directory_is_refused(store_dir: StoreDirectory, tmp_path: Path) -> None:
    assert f"{tmp_path}" in store_dir.refuse("export", "base", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_second_init_is_refused_and_changes_nothing(
    store_dir: StoreDirectory, images: Images
) -> None:
    line = store_dir.refuse("init")
    assert line == f"dedupstore: {store_dir.path}: already holds a store"
    assert store_dir.export("base") == images.base.read_bytes()


def test_init_in_a_directory_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "not empty" in StoreDirectory(tmp_path).refuse("init")


def test_init_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "is a file" in StoreDirectory(tmp_path / "file").refuse("init")


def test_name_that_is_taken_is_refused_before_the_source_is_read(
    store_dir: StoreDirectory, tmp_path: Path
) -> None:
    assert "'base' exists already" in store_dir.refuse("import", tmp_path / "nowhere", "base")
