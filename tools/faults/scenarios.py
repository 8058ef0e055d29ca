"""Every command that writes, and some that read, each with a store that gives it something to do,
and what must be there once it is done."""

from __future__ import annotations

import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from dedupstore.pages import verify_pages
from tools.crashes import far, program, wounds
from tools.crashes.corpus import Source
from tools.crashes.model import Effect

_PAGE = struct.Struct("<QHH")
_PAGE_BYTES = 4096
_TREE_PAGES = {1, 2}
_HELD = ("erofs2", "tree0", "raw")
_GARBAGE = "erofs3"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command. It runs on a copy of the directory `state`, whose "store" holds `held` (name ->
    key of its source). `effect` as in `crashes.model`; `target` is the file that it writes, with
    its key. With `wounded`, the store need be sound only once the command has succeeded."""

    name: str
    words: tuple[str, ...]
    state: Path
    held: dict[str, str]
    effect: Effect
    stdin: Path | None = None
    target: tuple[str, str] | None = None
    wounded: bool = False

    @property
    def creates(self) -> bool:
        """Whether it makes the store."""
        return self.words == ("init",)

    @property
    def once(self) -> bool:
        """Whether it cannot succeed a second time."""
        return bool(self.effect) or self.creates

    def after(self) -> dict[str, str]:
        """What the store holds once the command is done."""
        names = {name: key for name, key in self.held.items() if name not in self.effect}
        return names | {name: key for name, key in self.effect.items() if key is not None}


def build(sources: dict[str, Source], states: Path, run: Path) -> list[Scenario]:
    """Make the stores in `states`; the commands are for copies at `run`."""
    states.mkdir()
    nothing, images, wounded, pages = (states / n for n in ("none", "images", "chunks", "pages"))
    nothing.mkdir()
    held = {key: key for key in _HELD}
    _fill(images / "store", sources)
    for hurt, damage in ((wounded, _damage_records), (pages, _damage_page)):
        shutil.copytree(images, hurt)
        # A rebuild gives every image a name that it finds.
        program.must(hurt / "store", "gc")
        shutil.copytree(images / "store", hurt / "other")
        damage(hurt / "store")
    remote = _remote(states, run, images, sources)
    other = str(run / "other")

    def path(key: str) -> str:
        return str(sources[key].path)

    def on_images(name: str, *words: str, effect: Effect | None = None) -> Scenario:
        return Scenario(name, words, images, held, effect or {})

    def mending(name: str, state: Path, *origins: str) -> Scenario:
        words = [word for origin in origins for word in ("--from", origin)]
        return Scenario(name, ("check", "--repair", *words), state, held, {}, wounded=True)

    def with_remote(name: str, *words: str, effect: Effect | None = None) -> Scenario:
        return Scenario(name, words, remote, {**held, "lazy": _GARBAGE}, effect or {})

    new: Effect = {"new": "erofs4"}
    pulling = ("pull", far.NAME, "erofs4", "--as", "new")
    return [
        Scenario("init", ("init",), nothing, {}, {}),
        on_images("import file", "import", path("erofs4"), "new", effect=new),
        on_images("import directory", "import", path("tree1"), "new", effect={"new": "tree1"}),
        on_images("import archive", "import", path("targz1"), "new", effect={"new": "targz1"}),
        Scenario(
            "import stream",
            ("import", "-", "new"),
            images,
            held,
            new,
            stdin=sources["erofs4"].path,
        ),
        on_images("import again", "import", path("raw"), "new", effect={"new": "raw"}),
        on_images("clone", "clone", "raw", "new", effect={"new": "raw"}),
        on_images("rename", "rename", "raw", "new", effect={"raw": None, "new": "raw"}),
        on_images("rm", "rm", "raw", "tree0", effect={"raw": None, "tree0": None}),
        on_images("gc", "gc"),
        on_images("gc --compact", "gc", "--compact"),
        on_images("check", "check"),
        on_images("view", "mount", "--dry-run", "--share", "pool", "erofs2", "/mnt"),
        on_images("ls", "ls"),
        on_images("stats", "stats"),
        Scenario(
            "export",
            ("export", "tree0", str(run / "out")),
            images,
            held,
            {},
            target=("out", "tree0"),
        ),
        with_remote("pull", *pulling, effect=new),
        with_remote("pull --lazy", *pulling, "--lazy", effect=new),
        with_remote("push", "push", far.NAME, "raw", "tree0"),
        with_remote("evict", "evict", "0"),
        mending("repair from a store", wounded, other),
        mending("repair from files", wounded, *(path(key) for key in ("erofs2", "raw")), other),
        mending("repair of pages", pages, other),
    ]


def _fill(store: Path, sources: dict[str, Source]) -> None:
    """Images, and garbage for gc, some of it in frames that images need."""
    program.must(store, "init")
    for key in (_HELD[0], _GARBAGE, *_HELD[1:]):
        program.must(store, "import", str(sources[key].path), key)
    program.must(store, "rm", _GARBAGE)


def _remote(states: Path, run: Path, images: Path, sources: dict[str, Source]) -> Path:
    """The images, a lazy one, and the remote that it is in: made where they will be used, since a
    store knows where its remote is. Some of the contents have come, and may go again."""
    shutil.copytree(images, run)
    url = far.build(run, {key: sources[key] for key in (_GARBAGE, "erofs4", "erofs2")})
    shutil.rmtree(run / "origin")
    far.know(run / "store", url)
    program.must(run / "store", "pull", far.NAME, "erofs2", "--as", "gone")
    program.must(run / "store", "pull", far.NAME, _GARBAGE, "--as", "lazy", "--lazy")
    program.must(run / "store", "push", far.NAME, "erofs2")
    program.must(run / "store", "rm", "gone")
    state = states / "remote"
    run.rename(state)
    return state


def _damage_records(store: Path) -> None:
    wounds.wound(store, "1", frame_share=1.0)


def _damage_page(store: Path) -> None:
    """Flip a bit in a page of the frames' tree, so that it is found to be damaged."""
    path = store / "data.mdb"
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // _PAGE_BYTES):
        number, _, flags = _PAGE.unpack_from(data, page * _PAGE_BYTES)
        if number == page and flags in _TREE_PAGES:
            data[page * _PAGE_BYTES + 16] ^= 0x80
            path.write_bytes(data)
            findings = verify_pages(path).findings
            if findings and findings[0].database == "frames":
                return
            data[page * _PAGE_BYTES + 16] ^= 0x80
    raise RuntimeError("no page to damage")
