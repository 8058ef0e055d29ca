"""Views: what is derived, what it costs, what it never believes, and when it goes."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedupstore import catalog, format as fmt, views
from dedupstore.check import check_store
from dedupstore.erofs import read_tree
from dedupstore.erofs.tree import Directory, RegularFile, Special
from dedupstore.erofs.writer import scan_directory, write_image
from dedupstore.errors import NotShareableError
from dedupstore.pooling import HOME_BYTES_MIN, HOMES_MAX, object_id
from dedupstore.store import Store
from dedupstore.views import View, ensure_view
from tests.conftest import noise, silent, text
from tests.programs import erofs_programs, require_program, require_root, unavailable

KERNEL, POOL = fmt.VIEW_KERNEL, fmt.VIEW_POOL
MIB = 1 << 20

Derive = Callable[[str, int], View]


@pytest.fixture
def derive(store: Store) -> Derive:
    """Ensure a view of an image by name."""

    def ensure(name: str, kind: int) -> View:
        return ensure_view(store, digest_of(store, name), kind, silent)

    return ensure


def digest_of(store: Store, name: str) -> bytes:
    return bytes.fromhex(store.image(name).digest)


def write_tree(tree: Path, changed: int = 0) -> Path:
    """About 3 MiB; `changed` is the content of one of its files, the others are always equal."""
    for number in range(6):
        path = tree / f"directory-{number % 2}" / f"file-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(number, 512 * 1024 + number * 1000))
    (tree / "small").write_bytes(text(1, 700))
    (tree / "same").write_bytes(text(1, 700))
    (tree / "empty").touch()
    (tree / "changed").write_bytes(text(changed, 50_000))
    (tree / "hard").hardlink_to(tree / "changed")
    (tree / "soft").symlink_to("small")
    with (tree / "sparse").open("wb") as file:
        file.truncate(MIB)
        file.seek(MIB // 2)
        file.write(text(2, 5000))
    for path in tree.rglob("*"):
        os.utime(path, ns=(0, 1_600_000_000_000_000_000), follow_symlinks=False)
    os.setxattr(tree / "small", "user.note", b"kept")
    return tree


def import_foreign(store: Store, tree: Path, name: str, *options: str) -> None:
    """Import a tree as an image that this project did not write."""
    require_program("mkfs.erofs")
    image = tree.with_name(f"{name}.erofs")
    command = ["mkfs.erofs", "--quiet", *(options or ("-Enoinline_data",)), str(image), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    store.import_path(image, name, silent)


@contextmanager
def opened_tree(store: Store, digest: bytes) -> Iterator[Directory]:
    """The tree of an image or view, whose contents can be read meanwhile."""
    manifest = store.open_digest(digest)
    try:
        with views._reading(store, manifest) as read_at:
            yield read_tree(read_at, manifest.size)
    finally:
        store.close_manifest(manifest)


def content(file: RegularFile) -> bytes:
    buffer = bytearray(file.size)
    with file.content.opened() as read_into:
        at = 0
        while at < file.size:
            at += read_into(at, memoryview(buffer)[at:])
    return bytes(buffer)


def listed(root: Directory) -> dict[str, object]:
    """Every entry by path with all that it is."""
    found: dict[str, object] = {}
    pending = [("", root)]
    while pending:
        at, directory = pending.pop()
        for name, node in directory.entries.items():
            path = f"{at}/{name.decode()}"
            found[path] = (type(node).__name__, node.attributes)
            if isinstance(node, Directory):
                pending.append((path, node))
            elif isinstance(node, RegularFile):
                found[path] = (node.attributes, content(node))
    return found


def image_bytes(store: Store, digest: bytes) -> bytes:
    manifest = store.open_digest(digest)
    try:
        with views._reading(store, manifest) as read_at:
            return read_at(0, manifest.size)
    finally:
        store.close_manifest(manifest)


# --- kernel views ---


def test_kernel_view_of_a_foreign_image_has_its_tree_and_true_fingerprints(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    tree = write_tree(tmp_path / "tree")
    import_foreign(store, tree, "image")
    view = derive("image", KERNEL)
    assert view.digest != digest_of(store, "image")
    raw = image_bytes(store, view.digest)
    for path in tree.rglob("*"):
        if path.is_file() and path.stat().st_size and not path.is_symlink():
            assert b"sha256:" + hashlib.sha256(path.read_bytes()).digest() in raw
    with (
        opened_tree(store, view.digest) as derived,
        opened_tree(store, digest_of(store, "image")) as original,
    ):
        assert listed(derived) == listed(original)


def test_image_built_here_is_its_own_kernel_view(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    store.import_path(write_tree(tmp_path / "tree"), "image", silent)
    before = store.stats()
    assert derive("image", KERNEL) == View(digest_of(store, "image"), store.image("image").size)
    assert store.stats() == before


def test_built_image_that_comes_back_from_outside_is_its_own_view_only_by_its_digest(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    """What counts is that the bytes are those that were built here, not who brings them."""
    tree = write_tree(tmp_path / "tree")
    store.import_path(tree, "image", silent)
    (tmp_path / "copy.erofs").write_bytes(image_bytes(store, digest_of(store, "image")))
    store.import_path(tmp_path / "copy.erofs", "copy", silent)
    assert digest_of(store, "copy") != digest_of(store, "image") or (
        derive("copy", KERNEL) == derive("image", KERNEL)
    )
    raw = image_bytes(store, derive("copy", KERNEL).digest)
    assert b"sha256:" + hashlib.sha256((tree / "changed").read_bytes()).digest() in raw


def test_claimed_fingerprint_is_replaced_by_the_content_s_own(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    """A crafted image says that its file is another one; the kernel would believe it."""
    victim = b"sha256:" + hashlib.sha256(b"victim's content").digest()
    image = crafted_image(tmp_path, victim)
    store.import_path(image, "crafted", silent)
    assert victim in image_bytes(store, digest_of(store, "crafted"))  # exported as it came
    raw = image_bytes(store, derive("crafted", KERNEL).digest)
    assert victim not in raw
    assert b"sha256:" + hashlib.sha256(b"crafted content").digest() in raw


def crafted_image(directory: Path, claimed: bytes) -> Path:
    """An image whose only file claims the fingerprint of another content."""
    tree = directory / "crafted"
    tree.mkdir()
    (tree / "file").write_bytes(b"crafted content")
    out = io.BytesIO()
    write_image(scan_directory(tree), out, fingerprints=True)
    own = b"sha256:" + hashlib.sha256(b"crafted content").digest()
    assert out.getvalue().count(own) == 1
    image = directory / "crafted.erofs"
    image.write_bytes(out.getvalue().replace(own, claimed))
    return image


@pytest.mark.parametrize("kind", [KERNEL, POOL])
@pytest.mark.parametrize("option", ["-x1", "-Enoinline_data", "--chunksize=4096"])
def test_fsck_accepts_views(
    store: Store, derive: Derive, tmp_path: Path, kind: int, option: str
) -> None:
    import_foreign(store, write_tree(tmp_path / "tree"), "image", option)
    view = tmp_path / "view.erofs"
    view.write_bytes(image_bytes(store, derive("image", kind).digest))
    for program in erofs_programs("fsck.erofs"):
        done = subprocess.run([program, view], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "<E>" not in done.stderr


@pytest.mark.parametrize("kind", [KERNEL, POOL])
def test_view_stores_no_content_again(
    store: Store, derive: Derive, tmp_path: Path, kind: int
) -> None:
    import_foreign(store, write_tree(tmp_path / "tree"), "image")
    before = store.stats()
    derive("image", kind)
    assert store.stats().unique_bytes - before.unique_bytes < 16 << 10  # its metadata
    assert store.stats().images == before.images


def test_view_of_an_image_with_inline_tails_stores_the_tails_alone(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    tree = write_tree(tmp_path / "tree")
    import_foreign(store, tree, "image", "-x1")
    before = store.stats()
    derive("image", POOL)
    tails = sum(1 for path in tree.rglob("*") if path.is_file()) * 4096
    assert store.stats().unique_bytes - before.unique_bytes < tails + (16 << 10)


def test_view_is_derived_once(store: Store, derive: Derive, tmp_path: Path) -> None:
    import_foreign(store, write_tree(tmp_path / "tree"), "image")
    store.clone("image", "clone")
    first = derive("image", POOL)
    done: list[int] = []
    digest = digest_of(store, "clone")
    assert ensure_view(store, digest, POOL, lambda new, _: done.append(new)) == first
    assert done == []


def test_derivation_reports_progress_up_to_the_whole(store: Store, tmp_path: Path) -> None:
    import_foreign(store, write_tree(tmp_path / "tree"), "image")
    for kind in (KERNEL, POOL):
        reports: list[tuple[int, int]] = []
        digest = digest_of(store, "image")
        ensure_view(store, digest, kind, lambda new, every: reports.append((new, every)))  # noqa: B023
        done, every = sum(new for new, _ in reports), reports[-1][1]
        assert 0.9 * every <= done <= 1.2 * every


# --- pool views ---


def redirects(root: Directory) -> dict[str, bytes]:
    """Where the files of a view's tree redirect to."""
    tree = root.entries[b"tree"]
    assert isinstance(tree, Directory)
    found = {}
    pending = [("", tree)]
    while pending:
        at, directory = pending.pop()
        for name, node in directory.entries.items():
            path = f"{at}/{name.decode()}"
            target = node.attributes.xattrs.get(b"trusted.overlay.redirect")
            if target is not None:
                assert node.attributes.xattrs[b"trusted.overlay.metacopy"] == b""
                found[path] = target
            if isinstance(node, Directory):
                pending.append((path, node))
    return found


def objects(root: Directory) -> dict[bytes, bytes]:
    """The objects of a view, path to content."""
    data = root.entries[b"data"]
    assert isinstance(data, Directory)
    return {
        b"/%s/%s" % (folder, name): content(node)
        for folder, directory in data.entries.items()
        if isinstance(directory, Directory)
        for name, node in directory.entries.items()
        if isinstance(node, RegularFile)
    }


def test_files_of_a_pool_view_redirect_to_their_contents(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    tree = write_tree(tmp_path / "tree")
    import_foreign(store, tree, "image")
    with opened_tree(store, derive("image", POOL).digest) as view:
        found, contents = redirects(view), objects(view)
        for path, target in found.items():
            assert contents[target] == (tree / path[1:]).read_bytes()
        assert "/empty" not in found
        assert found["/small"] == found["/same"]
        assert found["/changed"] == found["/hard"]
        files = {p for p in tree.rglob("*") if p.is_file() and not p.is_symlink()}
        assert {tree / path[1:] for path in found} == files - {tree / "empty"}
        root = view.entries[b"tree"]
        assert isinstance(root, Directory)
        whiteout = root.entries[object_id(digest_of(store, "image"))]
        assert isinstance(whiteout, Special)
        assert (whiteout.kind, whiteout.major, whiteout.minor) == (stat.S_IFCHR, 0, 0)
        changed = root.entries[b"changed"]
        assert isinstance(changed, RegularFile)
        assert changed is root.entries[b"hard"]
        assert (changed.size, changed.extents) == (50_000, ())


def test_second_image_takes_what_the_first_has_from_it(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    import_foreign(store, write_tree(tmp_path / "one"), "one")
    tree = write_tree(tmp_path / "two", changed=7)
    import_foreign(store, tree, "two")
    first, second = derive("one", POOL), derive("two", POOL)
    assert (first.homes, second.homes) == ((), ((first.digest, first.size),))
    with opened_tree(store, first.digest) as home, opened_tree(store, second.digest) as view:
        own, theirs = objects(view), objects(home)
        assert list(own.values()) == [(tree / "changed").read_bytes()]
        for path, target in redirects(view).items():
            assert {**theirs, **own}[target] == (tree / path[1:]).read_bytes()


def test_third_image_takes_each_content_from_the_oldest_that_has_it(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    big = noise(99, HOME_BYTES_MIN)
    for number, name in enumerate(("one", "two", "three")):
        tree = write_tree(tmp_path / name, changed=number)
        if number:
            (tree / "big").write_bytes(big)
        import_foreign(store, tree, name)
    one, two, three = (derive(name, POOL) for name in ("one", "two", "three"))
    assert [home for home, _ in three.homes] == [one.digest, two.digest]
    with opened_tree(store, three.digest) as view:
        prefix = b"/" + object_id(digest_of(store, "two"))
        taken = [path for path, target in redirects(view).items() if target.startswith(prefix)]
        assert taken == ["/big"]


def test_homes_are_few_and_worth_it(store: Store, derive: Derive, tmp_path: Path) -> None:
    parts = HOMES_MAX + 2
    for number in range(parts):
        tree = tmp_path / f"part-{number}"
        tree.mkdir()
        size = HOME_BYTES_MIN if number else HOME_BYTES_MIN - 1  # the first is not worth it
        (tree / "part").write_bytes(noise(number, size + number * 4096 * bool(number)))
        store.import_path(tree, f"part-{number}", silent)
        derive(f"part-{number}", POOL)
    whole = tmp_path / "whole"
    whole.mkdir()
    for number in range(parts):
        (whole / f"{number}").write_bytes((tmp_path / f"part-{number}" / "part").read_bytes())
    store.import_path(whole, "whole", silent)
    view = derive("whole", POOL)
    expected = [derive(f"part-{number}", POOL).digest for number in range(2, parts)]
    assert [home for home, _ in view.homes] == expected
    with opened_tree(store, view.digest) as root:
        assert len(objects(root)) == 2


# --- what has no view ---


def overlay_attribute(tree: Path) -> None:
    os.setxattr(tree / "directory-0", "trusted.overlay.opaque", b"y")


def whiteout(tree: Path) -> None:
    os.mknod(tree / "gone", stat.S_IFCHR, os.makedev(0, 0))


@pytest.mark.parametrize("spoil", [overlay_attribute, whiteout])
def test_tree_that_an_overlay_would_change_has_no_pool_view(
    store: Store, derive: Derive, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    require_root()
    tree = write_tree(tmp_path / "tree")
    spoil(tree)
    store.import_path(tree, "image", silent)
    with pytest.raises(NotShareableError, match=r"^'.*' (is|has) .* of overlayfs$"):
        derive("image", POOL)
    derive("image", KERNEL)


@pytest.mark.parametrize("kind", [KERNEL, POOL])
def test_compressed_image_has_no_view(
    store: Store, derive: Derive, tmp_path: Path, kind: int
) -> None:
    tree = write_tree(tmp_path / "tree")
    import_foreign(store, tree, "image", "-zlz4")
    with pytest.raises(NotShareableError, match="compressed file contents"):
        derive("image", kind)


def test_raw_image_has_no_view(store: Store, derive: Derive, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(noise(1, MIB))
    store.import_path(tmp_path / "raw", "raw", silent)
    with pytest.raises(NotShareableError, match="no EROFS magic"):
        derive("raw", POOL)


# --- their life ---


def recorded(store: Store) -> set[tuple[bytes, int]]:
    with store.env.read() as txn:
        return {(image, kind) for image, kind, _ in catalog.list_views(txn, store.env)}


def test_views_go_with_the_last_name_of_their_image(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    import_foreign(store, write_tree(tmp_path / "tree"), "image")
    store.clone("image", "clone")
    for kind in (KERNEL, POOL):
        derive("image", kind)
    store.remove(["image"])
    store.collect_garbage()
    assert len(recorded(store)) == 2
    store.remove(["clone"])
    store.collect_garbage()
    assert recorded(store) == set()
    assert store.stats().chunks == 0


def test_removed_image_is_reclaimed_though_others_shared_its_objects(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", write_tree(tmp_path / "two")
    write_tree(one)
    (one / "own").write_bytes(noise(77, MIB))
    import_foreign(store, one, "one")
    import_foreign(store, two, "two")
    derive("one", POOL)
    assert derive("two", POOL).homes
    store.remove(["one"])
    store.collect_garbage()
    assert recorded(store) == set()
    assert store.stats().unique_bytes < 5 * MIB  # 4 MiB without the own file
    assert derive("two", POOL).homes == ()


def test_view_in_use_stays_until_it_is_closed(store: Store, derive: Derive, tmp_path: Path) -> None:
    import_foreign(store, write_tree(tmp_path / "tree"), "image")
    view = derive("image", POOL)
    raw = image_bytes(store, view.digest)
    manifest = store.open_digest(view.digest)
    store.remove(["image"])
    store.collect_garbage()
    assert recorded(store) == set()
    assert image_bytes(store, view.digest) == raw
    store.close_manifest(manifest)
    store.collect_garbage()
    assert store.stats().chunks == 0


def test_home_that_gc_forgets_meanwhile_is_not_relied_on(
    store: Store, derive: Derive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        import_foreign(store, write_tree(tmp_path / name, changed=len(name)), name)
    derive("one", POOL)
    candidates = views._Derivation._candidates
    calls = []

    def overtaken(self: views._Derivation) -> object:
        found = candidates(self)
        calls.append(len(found))
        if len(calls) == 1:
            store.remove(["one"])
            store.collect_garbage()
        return found

    monkeypatch.setattr(views._Derivation, "_candidates", overtaken)
    (tmp_path / "two" / "directory-0").rename(tmp_path / "two" / "renamed")
    import_foreign(store, tmp_path / "two", "three")
    assert derive("three", POOL).homes == ()
    assert calls == [1, 0]


def test_damaged_view_record_is_found_forgotten_and_derived_anew(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    import_foreign(store, write_tree(tmp_path / "tree"), "image")
    view = derive("image", POOL)
    key = fmt.view_key(digest_of(store, "image"), POOL)
    with store.env.write() as txn:
        record = bytearray(txn.get(key, db=store.env.meta) or b"")
        record[20] ^= 3  # two bits: of one the checksum would tell which
        txn.put(key, bytes(record), db=store.env.meta)
    path = store.path
    store.close()
    (finding,) = check_store(path).findings
    assert (finding.what, finding.mended) == ("views", False)
    assert check_store(path, repair=True).intact
    with Store(path) as again:
        assert recorded(again) == set()
        digest = digest_of(again, "image")
        assert ensure_view(again, digest, POOL, silent).digest == view.digest


def test_first_view_marks_the_store_and_an_unmarked_store_has_none(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    """A store of the release before views: nothing in it, and nothing wrong with that."""

    def features() -> int:
        with store.env.read() as txn:
            record = txn.get(fmt.SUPERBLOCK_KEY, db=store.env.meta)
            assert record is not None
            return fmt.decode_superblock(record).features_compat

    import_foreign(store, write_tree(tmp_path / "tree"), "image")
    assert (features(), recorded(store)) == (0, set())
    derive("image", KERNEL)
    assert features() == fmt.FEATURE_COMPAT_VIEWS


def test_view_whose_manifest_an_older_release_reclaimed_is_derived_anew(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    import_foreign(store, write_tree(tmp_path / "tree"), "image")
    view = derive("image", POOL)
    with store.env.write() as txn:  # what its gc does: it sees no name
        txn.delete(view.digest, db=store.env.manifests)
    store.collect_garbage()
    assert derive("image", POOL) == view


def test_images_of_several_mkfs_share_one_pool(
    store: Store, derive: Derive, tmp_path: Path
) -> None:
    """Equal contents are one object however an image lays them out."""
    tree = write_tree(tmp_path / "tree")
    programs = erofs_programs("mkfs.erofs")
    if len(programs) < 2:
        unavailable("one mkfs.erofs only")
    options = ("-x1", "--chunksize=4096")
    for number, (program, option) in enumerate(zip(programs[:2], options, strict=True)):
        image = tmp_path / f"{number}.erofs"
        subprocess.run([program, "--quiet", option, image, tree], check=True, capture_output=True)
        store.import_path(image, f"{number}", silent)
        derive(f"{number}", POOL)
    view = derive("1", POOL)
    with opened_tree(store, view.digest) as root:
        assert objects(root) == {}
