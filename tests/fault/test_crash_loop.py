"""A short run of tools/crash_loop, and that its model and its twins see what they are to see."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.rig import StoreDirectory
from tests.programs import require_program
from tools.crashes import rounds, twins
from tools.crashes.corpus import Source, sha256
from tools.crashes.model import InvariantError, Model
from tools.crashes.observed import observe

SEED = 20261121
ROUNDS = 80


def test_commands_killed_anywhere_keep_every_promise(tmp_path: Path) -> None:
    require_program("mkfs.erofs", "nbdkit")
    loop = rounds.Loop(SEED, tmp_path, print, keep=tmp_path)
    loop.run(epoch=0, rounds=ROUNDS, seconds=300)
    # When a kill comes after its command has ended depends on how fast the machine is just now.
    assert loop.figures.kills_in_all > ROUNDS // 3
    assert loop.figures.kills_at_calls
    assert loop.figures.epochs == 2


def model_of(store: StoreDirectory) -> Model:
    """What conftest's filled store holds, each image its own source."""
    model = Model({})
    for name in store.names():
        image = store.path / name
        image.write_bytes(store.export(name))
        model.sources[name] = Source(name, image, sha256(image))
        model.names[name] = name
    return model


def test_model_sees_names_that_are_lost_and_images_that_differ(store_dir: StoreDirectory) -> None:
    model = model_of(store_dir)
    assert model.hold_against(observe(store_dir.path)) > 0
    store_dir.remove("ragged")
    with pytest.raises(InvariantError, match=r"lost: \['ragged'\]"):
        model.hold_against(observe(store_dir.path))
    store_dir.clone("base", "ragged")
    with pytest.raises(InvariantError, match="'ragged' differs"):
        model.hold_against(observe(store_dir.path))


def test_twin_without_a_chunk_that_the_store_has_is_noticed(
    store_dir: StoreDirectory, tmp_path: Path
) -> None:
    model = model_of(store_dir)
    del model.names["derived"]
    model.history = [("import", str(model.sources[n].path), n) for n in sorted(model.names)]
    with pytest.raises(InvariantError, match="chunks that an uncrashed twin has not"):
        twins.compare(store_dir.path, model, tmp_path)
