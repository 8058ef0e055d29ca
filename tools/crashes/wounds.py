"""Damage for `check --repair` to mend while it is killed: to what is derived (index, totals), and
to chunks, which the repair takes out and the next import of their source stores anew."""

from __future__ import annotations

import random
from pathlib import Path

from dedupstore.frames import TOTALS_KEY
from dedupstore.store import Store
from tools.crashes import program
from tools.crashes.model import Model

_ENTRIES_LOST = 5


def wound(store: Path, seed: str, *, frame_share: float = 0.5) -> None:
    """Damage a store; in this share of the cases a frame, too."""
    program.in_fork(lambda: _wound(store, random.Random(seed), frame_share))


def _wound(path: Path, source: random.Random, frame_share: float) -> str:
    with Store(path) as store, store.env.write() as txn:
        env = store.env
        entries = [bytes(key) for key in txn.cursor(db=env.chunks).iternext(values=False)]
        for key in source.sample(entries, min(_ENTRIES_LOST, len(entries))):
            txn.delete(key, db=env.chunks)
        txn.delete(TOTALS_KEY, db=env.meta)
        frames = [bytes(key) for key in txn.cursor(db=env.frames).iternext(values=False)]
        if frames and source.random() < frame_share:
            key = source.choice(frames)
            record = bytearray(txn.get(key, db=env.frames))
            record[source.randrange(len(record))] ^= 1 << source.randrange(8)
            txn.put(key, bytes(record), db=env.frames)
        if env.remote is not None:
            placed = [bytes(k) for k in txn.cursor(db=env.remote.places).iternext(values=False)]
            for key in source.sample(placed, min(1, len(placed))):
                record = bytearray(txn.get(key, db=env.remote.places))
                for _ in range(source.choice((1, 3))):
                    record[source.randrange(len(record))] ^= 1 << source.randrange(8)
                txn.put(key, bytes(record), db=env.remote.places)
    return ""


def heal(store: Path, model: Model) -> None:
    """What a user does after a repair was killed: repair, and import again what lost chunks."""
    try:
        program.must(store, "check", "--repair")
    except program.CommandFailedError as error:
        if error.status != 1 or error.err:
            raise
    again = [
        words
        for key in sorted(set(model.names.values()))
        for words in (
            ("import", "--reread", str(model.sources[key].path), "healing"),
            ("rm", "healing"),
        )
    ]
    # gc: what was lost of images that are gone is not stored anew, and check tells of it until
    # then.
    for words in (*again, ("gc",)):
        program.must(store, *words)
        model.history.append(words)
