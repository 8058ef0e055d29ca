"""The command line: help, documents, exit statuses, and one line for every failure."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from blake3 import blake3

from dedupstore import __version__, format as fmt
from dedupstore.check import check_store
from dedupstore.cli.main import _run, cli
from dedupstore.constants import CDC_BYTES_MIN
from dedupstore.env import DATA_FILE
from dedupstore.store import Store
from tests.conftest import blocks, flip_record, keys_of, noise

ROOT = Path(__file__).resolve().parents[2]
_CONTEXT = click.Context(cli)
COMMANDS = [(name, cli.get_command(_CONTEXT, name)) for name in cli.list_commands(_CONTEXT)]
# Commands of groups, too: "remote add".
COMMANDS += [
    (f"{name} {below}", command)
    for name, group in COMMANDS
    if isinstance(group, click.Group)
    for below, command in group.commands.items()
]
EACH_COMMAND = pytest.mark.parametrize(
    ("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS]
)
PROMISED = {
    *("init", "import", "clone", "rename", "rm", "ls", "info", "export", "diff", "gc", "check"),
    *("stats", "serve", "mount", "umount", "attach", "detach", "push", "remote"),
    *("remote add", "remote ls", "remote rm", "remote images", "remote delete", "remote gc"),
}
READING = ("ls", "info", "diff", "check", "stats", "remote ls", "remote images")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with images `a` and `b`, closed."""
    store_path = tmp_path / "store"
    Store.create(store_path).close()
    for name, data in (("a", noise(1, 100_000)), ("b", noise(2, CDC_BYTES_MIN) + bytes(8192))):
        (tmp_path / f"{name}.img").write_bytes(data)
        assert _run(["--store", str(store_path), "import", str(tmp_path / name) + ".img"]) == 0
    return store_path


@pytest.fixture
def run(path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """`run(argument, ...)` runs a command on the store: (exit status, output, errors)."""
    capfd.readouterr()

    def run_command(*arguments: str) -> tuple[int, str, str]:
        status = _run(["--store", str(path), *arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run_command


def document(result: tuple[int, str, str], status: int = 0) -> Any:
    assert result[0] == status, result
    assert result[2] == ""
    return json.loads(result[1])


def assert_one_line(result: tuple[int, str, str], status: int = 1) -> str:
    code, out, err = result
    assert code == status
    assert out == ""
    assert err.startswith("dedupstore: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err


# --- help and documents ---


def test_every_promised_command_exists() -> None:
    assert {name for name, _ in COMMANDS} >= PROMISED


@EACH_COMMAND
def test_every_command_has_help(
    name: str, command: click.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{command.name} {parameter.opts}"
    assert _run([*name.split(), "--help"]) == 0
    assert "Usage: dedupstore" in capsys.readouterr().out


@EACH_COMMAND
def test_readme_mentions_every_command_and_option(name: str, command: click.Command) -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"`{name}" in readme or f"dedupstore {name}" in readme
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            missing = [option for option in parameter.opts if option not in readme]
            assert not missing, f"README.md does not mention {command.name} {missing}"


def test_readme_mentions_the_global_options() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "--store" in readme
    assert "DEDUPSTORE" in readme


@pytest.mark.parametrize("name", READING)
def test_every_reading_command_takes_json(name: str) -> None:
    options = [option for p in dict(COMMANDS)[name].params for option in p.opts]
    assert "--json" in options


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


# --- what commands do ---


def test_init_creates_a_store_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--store", str(tmp_path / "new"), "init"]
    assert _run(arguments) == 0
    Store(tmp_path / "new").close()
    capfd.readouterr()
    status = _run(arguments)
    assert "already holds a store" in assert_one_line((status, *capfd.readouterr()))


def test_ls_lists_the_images(run: Run) -> None:
    status, out, err = run("ls")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", "a", "b"]
    images = document(run("ls", "--json"))["images"]
    assert [image["name"] for image in images] == ["a", "b"]


def test_ls_of_an_empty_store_prints_nothing(run: Run) -> None:
    run("rm", "a", "b")
    assert run("ls") == (0, "", "")
    assert document(run("ls", "--json")) == {"images": []}


def test_info_has_the_contracts_keys(run: Run) -> None:
    info = document(run("info", "b", "--json"))
    assert set(info) >= {"name", "size", "digest", "chunks", "unique_bytes"}
    assert (info["name"], info["size"]) == ("b", CDC_BYTES_MIN + 8192)
    assert (info["chunks"], info["unique_bytes"]) == (1, CDC_BYTES_MIN)
    assert len(bytes.fromhex(info["digest"])) == 32
    assert info["digest"] in run("info", "b")[1]


def test_stats_has_the_contracts_keys(run: Run) -> None:
    stats = document(run("stats", "--json"))
    assert set(stats) >= {
        *("images", "logical_bytes", "unique_bytes", "stored_bytes", "file_bytes", "chunks"),
        *("dedup_ratio", "compression_ratio"),
    }
    assert stats["images"] == 2
    assert stats["logical_bytes"] == 100_000 + CDC_BYTES_MIN + 8192
    assert stats["file_length"] >= stats["file_bytes"] > 0
    assert run("stats")[0] == 0


def test_import_prints_what_it_did(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "c.img").write_bytes(noise(1, 100_000))
    imported = document(run("import", str(tmp_path / "c.img"), "--json"))
    assert (imported["name"], imported["size"], imported["new_bytes"]) == ("c", 100_000, 0)
    status, out, _ = run("import", str(tmp_path / "c.img"), "d")
    assert (status, out.startswith("imported d: ")) == (0, True)
    assert document(run("info", "d", "--json"))["digest"] == imported["digest"]


def test_import_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(noise(1, 100_000))))
    imported = document(run("import", "-", "piped", "--json"))
    assert imported["digest"] == document(run("info", "a", "--json"))["digest"]


def test_clone_rename_rm(run: Run) -> None:
    assert run("clone", "a", "c") == (0, "", "")
    assert run("rename", "c", "d") == (0, "", "")
    assert run("rm", "a", "b") == (0, "", "")
    assert [image["name"] for image in document(run("ls", "--json"))["images"]] == ["d"]


def test_export_to_a_file(run: Run, tmp_path: Path) -> None:
    assert run("export", "a", str(tmp_path / "out.img")) == (0, "", "")
    assert (tmp_path / "out.img").read_bytes() == noise(1, 100_000)


def test_export_to_standard_output(path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    capfdbinary.readouterr()
    assert _run(["--store", str(path), "export", "a", "-"]) == 0
    assert capfdbinary.readouterr().out == noise(1, 100_000)


def test_diff(run: Run) -> None:
    found = document(run("diff", "a", "b", "--json"))
    assert (found["shared_bytes"], found["only_b_bytes"]) == (0, CDC_BYTES_MIN)
    assert "identical" in run("diff", "a", "a")[1]


def test_gc_reclaims_and_dry_run_only_says_so(run: Run) -> None:
    run("rm", "a")
    promised = document(run("gc", "--dry-run", "--json"))
    assert promised["dry_run"]
    assert promised["chunks"] > 0
    assert "would reclaim" in run("gc", "--dry-run")[1]
    assert document(run("gc", "--json"))["chunks"] == promised["chunks"]
    assert "reclaimed 0 B" in run("gc")[1]


def test_gc_compact_says_what_it_gave_back(run: Run) -> None:
    run("rm", "a")
    before = document(run("stats", "--json"))["file_bytes"]
    collected = document(run("gc", "--compact", "--json"))
    assert collected["chunks"] > 0
    given_back = collected["compacted"]["bytes"]
    assert given_back > 100_000
    assert document(run("stats", "--json"))["file_bytes"] == before - given_back
    assert document(run("gc", "--json"))["compacted"] is None
    assert "back to the file system" in run("gc", "--compact")[1]


def test_gc_on_a_file_system_without_holes_collects_then_fails_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("dedupstore.compaction.punch", refuse)
    run("rm", "a")
    status, out, err = run("gc", "--compact")
    assert out.startswith("reclaimed ")
    assert "cannot punch holes" in assert_one_line((status, "", err))
    status, out, err = run("gc", "--compact", "--json")
    assert json.loads(out)["compacted"] is None
    assert_one_line((status, "", err))
    assert "reclaimed 0 B" in run("gc")[1]


def test_check_of_a_sound_store(run: Run) -> None:
    found = document(run("check", "--json"))
    assert (found["intact"], found["findings"], found["images"]) == (True, [], 2)
    status, out, err = run("check")
    assert (status, err) == (0, "")
    assert "intact" in out


def test_check_of_a_damaged_store_names_image_offset_and_chunk_and_fails(
    run: Run, path: Path
) -> None:
    with Store(path) as store:
        first = keys_of(store, "frames")[0]
        flip_record(store, "frames", first, -1)
    frame = fmt.decode_frame_key(first)
    status, out, err = run("check")
    assert (status, err) == (1, "")
    assert f"image 'a' offset 0: chunk {frame}.0: " in out
    found = document(run("check", "--json"), status=1)
    assert not found["intact"]
    assert (found["findings"][0]["image"], found["findings"][0]["offset"]) == ("a", 0)


def test_check_repair_mends_and_succeeds(run: Run, path: Path) -> None:
    with Store(path) as store:
        flip_record(store, "chunks", keys_of(store, "chunks")[0], 3)
    assert run("check")[0] == 1
    status, out, _ = run("check", "--repair")
    assert status == 0
    assert "(mended)" in out
    assert run("check")[0] == 0


# --- remotes ---


@pytest.fixture
def run_remote(run: Run, tmp_path: Path) -> Run:
    """As `run`, on a store that knows a remote `r` in a directory."""
    status, out, err = run("remote", "add", "r", str(tmp_path / "remote"))
    assert (status, err) == (0, "")
    assert str(tmp_path / "remote") in out
    return run


def test_push_sends_images_and_says_what_was_new(run_remote: Run) -> None:
    status, out, err = run_remote("push", "r", "a", "b")
    assert (status, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == ["pushed a", "pushed b"]
    assert run_remote("push", "r", "a") == (0, "a: is there already\n", "")
    run_remote("clone", "a", "c")
    (pushed,) = document(run_remote("push", "r", "c", "c", "--json"))["images"]
    assert (pushed["name"], pushed["new_bytes"], pushed["size"]) == ("c", 0, 100_000)
    assert pushed["sent_bytes"] > 0


def test_push_replaces_only_on_request(run_remote: Run) -> None:
    run_remote("push", "r", "a")
    run_remote("rm", "a")
    run_remote("clone", "b", "a")
    assert "--replace" in assert_one_line(run_remote("push", "r", "a"))
    assert run_remote("push", "r", "a", "--replace")[0] == 0


def test_remotes_and_what_is_in_them_are_listed(run_remote: Run, tmp_path: Path) -> None:
    run_remote("push", "r", "b")
    (known,) = document(run_remote("remote", "ls", "--json"))["remotes"]
    assert (known["name"], known["urls"]) == ("r", [str(tmp_path / "remote")])
    assert run_remote("remote", "ls")[1].split() == ["NAME", "URL", "r", known["urls"][0]]
    (image,) = document(run_remote("remote", "images", "r", "--json"))["images"]
    assert image["digest"] == document(run_remote("info", "b", "--json"))["digest"]
    assert (image["name"], image["size"]) == ("b", CDC_BYTES_MIN + 8192)
    assert run_remote("remote", "images", "r")[1].splitlines()[1].split()[0] == "b"


def test_deleted_images_are_collected(run_remote: Run) -> None:
    run_remote("push", "r", "a", "b")
    assert run_remote("remote", "delete", "r", "a") == (0, "", "")
    assert "'a'" in assert_one_line(run_remote("remote", "delete", "r", "a"))
    gc = ("remote", "gc", "r", "--json")
    assert document(run_remote(*gc))["young"] == 2
    assert document(run_remote(*gc, "--grace", "0s", "--force", "--dry-run"))["condemned"] == 2
    assert document(run_remote(*gc, "--grace", "0s", "--force"))["condemned"] == 2
    assert document(run_remote(*gc, "--grace", "0s", "--force"))["deleted"] == 2
    assert "deleted 0 B" in run_remote("remote", "gc", "r")[1]
    assert "--force" in assert_one_line(run_remote("remote", "gc", "r", "--grace", "9m"), 2)
    assert run_remote("remote", "gc", "r", "--grace", "day")[0] == 2


def test_a_remote_is_forgotten(run_remote: Run, tmp_path: Path) -> None:
    assert run_remote("remote", "rm", "r") == (0, "", "")
    assert run_remote("remote", "ls") == (0, "", "")
    assert (tmp_path / "remote" / "dedupstore.json").exists()
    for arguments in (("remote", "rm", "r"), ("push", "r", "a"), ("remote", "images", "r")):
        assert "no remote named 'r'" in assert_one_line(run_remote(*arguments))


# --- failures ---


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("info", "nothing"), "'nothing'"),
        (("clone", "nothing", "c"), "'nothing'"),
        (("clone", "a", "b"), "'b' exists"),
        (("rename", "a", "b"), "'b' exists"),
        (("rm", "a", "nothing"), "'nothing'"),
        (("diff", "a", "nothing"), "'nothing'"),
        (("export", "nothing", "x"), "'nothing'"),
        (("export", "a", "/nowhere/x"), "/nowhere/x"),
        (("import", "/no/such/file"), "/no/such/file"),
        (("import", "/no/such\nfile", "n"), "such"),
        (("import", "/" + "x" * 300, "n"), "too long"),
        (("import", "/dev/null", "n"), "/dev/null"),
        (("init",), "already"),
        (("push", "nowhere", "a"), "'nowhere'"),
        (("push", "nowhere", "nothing"), "'nothing'"),
        (("remote", "add", "r", "/dev/null/x"), "/dev/null/x"),
    ],
    ids=lambda part: " ".join(part)[:40] if isinstance(part, tuple) else "",
)
def test_failures_are_one_line_and_status_1(
    run: Run, arguments: tuple[str, ...], says: str
) -> None:
    assert says in assert_one_line(run(*arguments))


@pytest.mark.parametrize("name", ["clone", "rename"])
def test_bad_names_are_wrong_usage(run: Run, name: str) -> None:
    assert "'x*'" in assert_one_line(run(name, "a", "x*"), 2)


def test_import_from_standard_input_needs_a_name(run: Run) -> None:
    assert "name" in assert_one_line(run("import", "-"), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("info",),
        ("info", "a", "b"),
        ("ls", "--nonsense"),
        ("rm",),
        (),
        ("gc", "--dry-run", "--compact"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert "Usage: dedupstore" in err
    assert out == ""


@pytest.mark.parametrize("command", ["ls", "stats", "gc", "check", "serve"])
def test_missing_store_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    status = _run(["--store", str(tmp_path / "none"), command])
    assert "dedupstore init" in assert_one_line((status, *capfd.readouterr()))
    assert not (tmp_path / "none").exists()


def test_newer_store_is_one_line(run: Run, path: Path) -> None:
    with Store(path) as store, store.env.write() as txn:
        newer = fmt.Superblock(bytes(16), 0, version=99)
        txn.put(fmt.SUPERBLOCK_KEY, fmt.encode_superblock(newer), db=store.env.meta)
    for command in ("ls", "check", "gc"):
        assert "99" in assert_one_line(run(command))


def test_truncated_store_is_one_line(run: Run, path: Path) -> None:
    os.truncate(path / DATA_FILE, 5000)
    assert DATA_FILE in assert_one_line(run("ls"))


def test_damaged_image_is_one_line_and_leaves_no_file(run: Run, path: Path, tmp_path: Path) -> None:
    with Store(path) as store:
        flip_record(store, "frames", keys_of(store, "frames")[0], -1)
    line = assert_one_line(run("export", "a", str(tmp_path / "out")))
    assert "'a'" in line
    assert not (tmp_path / "out").exists()


def test_silent_off_a_terminal(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.img").write_bytes(noise(3, 100_000))
    assert run("import", str(tmp_path / "c.img"))[2] == ""
    assert run("export", "c", str(tmp_path / "out"))[1:] == ("", "")
    assert run("check")[2] == ""


# --- the program itself ---


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", "from dedupstore.cli import main; main()", *arguments],
        cwd=options.pop("cwd", ROOT),
        capture_output=True,
        check=False,
        **options,
    )


def test_program_takes_the_store_from_the_environment(path: Path) -> None:
    done = program("export", "a", "-", env={**os.environ, "DEDUPSTORE": str(path)})
    assert done.returncode == 0
    assert blake3(done.stdout).digest() == blake3(noise(1, 100_000)).digest()
    assert done.stderr == b""


def test_program_passes_the_exit_status_on(tmp_path: Path) -> None:
    assert program("--store", str(tmp_path / "none"), "ls").returncode == 1
    assert program("nonsense").returncode == 2
    assert program("--help").returncode == 0


GUARD = """
import mmap, os, signal, sys, tempfile
from dedupstore.cli.guard import run_guarded

def killed():
    os.kill(os.getpid(), int(sys.argv[2]))

def truncated_map():
    with tempfile.TemporaryFile() as file:
        file.truncate(8192)
        view = mmap.mmap(file.fileno(), 8192, access=mmap.ACCESS_READ)
        file.truncate(0)
        return view[4096]

sys.exit(run_guarded(globals()[sys.argv[1]]))
"""


def guarded(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", GUARD, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT])
def test_guard_turns_a_crash_into_one_line(number: signal.Signals) -> None:
    done = guarded("killed", str(int(number)))
    line = assert_one_line((done.returncode, done.stdout, done.stderr))
    assert number.name in line
    assert "dedupstore check" in line


def test_guard_turns_a_truncated_map_into_one_line() -> None:
    done = guarded("truncated_map")
    assert "SIGBUS" in assert_one_line((done.returncode, done.stdout, done.stderr))


def test_guard_dies_of_the_signal_that_killed_its_child() -> None:
    assert guarded("killed", str(int(signal.SIGKILL))).returncode == -signal.SIGKILL


def test_store_is_sound_after_the_commands_of_a_day(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "c.img").write_bytes(noise(1, 50_000) + blocks(0, 5, 0))
    for arguments in (
        ("import", str(tmp_path / "c.img")),
        ("clone", "c", "d"),
        ("rm", "a", "c"),
        ("gc",),
        ("rename", "d", "a"),
        ("rm", "b"),
        ("gc",),
        ("export", "a", str(tmp_path / "out")),
    ):
        assert run(*arguments)[0] == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "c.img").read_bytes()
    assert check_store(path).findings == ()


# --- repair from elsewhere ---


def test_check_repairs_from_a_store_and_from_a_file(run: Run, path: Path, tmp_path: Path) -> None:
    def damage() -> None:
        with Store(path) as store:
            manifest = store.open_manifest("a")
            store.close_manifest(manifest)
            flip_record(store, "frames", fmt.frame_key(manifest.refs[0] >> 16), -1)

    Store.create(tmp_path / "other").close()
    assert _run(["--store", str(tmp_path / "other"), "import", str(tmp_path / "a.img")]) == 0
    for source in ("other", "a.img"):
        damage()
        status, out, _ = run("check", "--repair")
        assert status == 1
        assert "to go on: " in out
        result = document(run("check", "--repair", "--from", str(tmp_path / source), "--json"))
        assert result["intact"]
        assert [finding["mended"] for finding in result["findings"]] == [True]
        assert run("check")[0] == 0
    damage()
    lines = run("check", "--repair", "--from", str(tmp_path / "a.img"))[1].splitlines()
    assert lines[0].startswith("image 'a' offset ")
    assert lines[0].endswith(" (mended)")
    assert lines[-1].endswith("1 findings, all mended")
    assert len(lines) == 2


def test_from_without_repair_and_what_is_no_source_are_one_line(run: Run, tmp_path: Path) -> None:
    assert "--repair" in assert_one_line(run("check", "--from", str(tmp_path)), 2)
    (tmp_path / "empty").mkdir()
    assert_one_line(run("check", "--repair", "--from", str(tmp_path / "empty")))
    assert_one_line(run("check", "--repair", "--from", str(tmp_path / "absent")))
