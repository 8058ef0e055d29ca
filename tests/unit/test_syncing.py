"""`sync`: what it takes to have on one side what the other has, and that no more is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dedupstore.cli.main import _run
from dedupstore.cli.syncing import Plan, plan
from dedupstore.remote.configuration import add_remote, find_remote
from dedupstore.store import Store
from tests.conftest import noise, read_image
from tests.lazy import make_remote, push
from tests.remotes import image_bytes

OLD, NEW, OTHER = noise(1, 200_000), noise(2, 150_000), noise(3, 100_000)
THERE = {"app/1": OLD, "app/2": NEW, "base": OTHER}

Sync = Callable[..., str]


@pytest.mark.parametrize(
    ("source", "target", "patterns", "delete", "wanted"),
    [
        ({"a": "1"}, {}, (), False, Plan(["a"], [])),
        ({"a": "1"}, {"a": "1"}, (), True, Plan([], [])),
        ({"a": "1"}, {"a": "2", "b": "3"}, (), False, Plan(["a"], [])),
        ({"a": "1"}, {"a": "2", "b": "3"}, (), True, Plan(["a"], ["b"])),
        ({"b": "1", "a": "1", "c": "1"}, {"x": "1"}, ("[ab]",), True, Plan(["a", "b"], [])),
        ({}, {"x1": "1", "x2": "1", "y": "1"}, ("x*", "x1"), True, Plan([], ["x1", "x2"])),
        ({"A": "1", "a": "1"}, {}, ("A",), True, Plan(["A"], [])),
    ],
)
def test_plan_is_what_differs_within_the_patterns(
    source: dict[str, str],
    target: dict[str, str],
    patterns: tuple[str, ...],
    delete: bool,
    wanted: Plan,
) -> None:
    assert plan(source, target, patterns, delete=delete) == wanted


@pytest.fixture
def far(tmp_path: Path) -> Path:
    return make_remote(tmp_path, THERE)


@pytest.fixture
def here(store: Store, far: Path, add: Callable[[str, bytes], object]) -> Path:
    """A store that has one of the remote's images, another one under a name of the remote's, and
    one of its own; closed."""
    add_remote(store.env, "far", [str(far)])
    for name, data in {"base": OTHER, "app/1": NEW, "mine": noise(4, 50_000)}.items():
        add(name, data)
    store.close()
    return store.path


@pytest.fixture
def sync(here: Path, capfd: pytest.CaptureFixture[str]) -> Sync:
    def run(*arguments: str, status: int = 0) -> str:
        capfd.readouterr()
        assert _run(["--store", str(here), "sync", *arguments]) == status
        captured = capfd.readouterr()
        if status == 0:
            assert captured.err == ""
            return captured.out
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def images(path: Path) -> dict[str, bytes]:
    with Store(path) as store:
        return {name: read_image(store, name) for name in store.names()}


def remote_images(path: Path) -> dict[str, bytes]:
    with Store(path) as store:
        found, _ = find_remote(store.env, "far")
        return {root.name: image_bytes(found, root.name) for root in found.roots()}


def test_sync_pulls_what_is_new_or_has_changed_and_leaves_the_rest(sync: Sync, here: Path) -> None:
    lines = sync("far").splitlines()
    assert [line.split(":")[0] for line in lines] == ["pulled app/1", "pulled app/2"]
    assert images(here) == {**THERE, "mine": noise(4, 50_000)}
    assert sync("far") == ""
    assert remote_images(here) == THERE


def test_sync_with_delete_leaves_what_the_remote_has(sync: Sync, here: Path) -> None:
    assert sync("far", "--delete").splitlines()[-1] == "removed mine"
    assert images(here) == THERE


def test_sync_touches_nothing_outside_its_patterns(sync: Sync, here: Path) -> None:
    before = images(here)
    found = json.loads(sync("far", "app/*", "m*", "--delete", "--dry-run", "--json"))
    assert found == {"transferred": ["app/1", "app/2"], "removed": ["mine"], "dry_run": True}
    sync("far", "*/2", "--delete")
    assert images(here) == {**before, "app/2": NEW}


def test_dry_run_says_what_would_be_done_and_does_nothing(sync: Sync, here: Path) -> None:
    before, there = images(here), remote_images(here)
    assert sync("far", "--delete", "--dry-run").splitlines() == [
        "would pull app/1",
        "would pull app/2",
        "would remove mine",
    ]
    assert sync("far", "--push", "--delete", "--dry-run").splitlines() == [
        "would push app/1",
        "would push mine",
        "would remove app/2",
    ]
    assert (images(here), remote_images(here)) == (before, there)


def test_lazy_sync_brings_no_contents(sync: Sync, here: Path) -> None:
    sync("far", "--lazy")
    with Store(here) as store:
        assert store.missing_bytes("app/1") == len(OLD)
        assert store.missing_bytes("app/2") == 0  # which was here under another name
        assert store.missing_bytes("base") == 0
    assert images(here)["app/1"] == OLD


def test_sync_pushes_the_other_way(sync: Sync, here: Path) -> None:
    lines = sync("far", "--push").splitlines()
    assert [line.split(":")[0] for line in lines] == ["pushed app/1", "pushed mine"]
    assert remote_images(here) == {**THERE, **images(here)}
    assert sync("far", "--push", "--delete") == "removed app/2 from far\n"
    assert remote_images(here) == images(here)
    assert sync("far", "--push", "--delete") == ""


def test_sync_refuses_what_it_cannot_do_in_one_line(sync: Sync) -> None:
    assert "--push, --lazy" in sync("far", "--push", "--lazy", status=2)
    assert "nowhere" in sync("nowhere", status=1)


def test_names_that_changed_over_are_whole_after_gc(sync: Sync, here: Path) -> None:
    sync("far", "--delete")
    with Store(here) as store:
        store.collect_garbage()
    assert images(here) == THERE


def test_remote_with_frames_that_are_only_there_is_not_forgotten(
    here: Path, sync: Sync, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sync("far", "--lazy")
    remove = ["--store", str(here), "remote", "rm", "far"]
    assert _run(remove) == 1
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert "frames whose bytes are only there" in line
    assert "dedupstore prefetch" in line
    # With a second remote that has them, it can go; and then the second one cannot.
    second = tmp_path / "second"
    with Store(here) as store:
        add_remote(store.env, "second", [str(second)])
        for name in store.names():
            push(store, name, "second")
    with Store(here) as store:
        # What was fetched for the push is here now: drop it, that it is only in the remotes.
        store.evict(0, lambda *_: None)
        missing = store.missing_bytes("app/1")
    assert missing == len(OLD)
    assert _run(remove) == 0
    assert _run([*remove[:-1], "second"]) == 1
    assert "only there" in capfd.readouterr().err
    assert images(here)["app/1"] == OLD
