"""Damage under a running server: only what is damaged fails, and once it is mended the same server
serves it to the same clients."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.store import Store
from tests.interop.corpus import BLOCK, Images
from tests.interop.rig import DEDUPSTORE, PATIENCE_SECONDS, Server, Servers, StoreDirectory

pytestmark = pytest.mark.damaged

# For each line it gets: reads the image block by block, and says which blocks fail with EIO, and
# what the others hold.
READ_AGAIN = """\
import json
h = connect()
for line in sys.stdin:
    failed, digests = [], {}
    for at in range(0, h.get_size(), 4096):
        try:
            block = h.pread(min(4096, h.get_size() - at), at)
            digests[at] = hashlib.sha256(block).hexdigest()[:16]
        except nbd.Error as error:
            assert error.errnum == 5, error
            failed.append(at)
    print(json.dumps([failed, digests]), flush=True)
h.shutdown()
"""


class Client:
    """A client that keeps its export open."""

    def __init__(self, server: Server, name: str, image: Path) -> None:
        self._image = image
        self._process = server.start_client(READ_AGAIN, name)

    def ask(self) -> None:
        """Have it read the whole image."""
        assert self._process.stdin is not None
        self._process.stdin.write("read\n")
        self._process.stdin.flush()

    def failed(self) -> list[int]:
        """The offsets of the blocks that failed; the others held what the image holds."""
        assert self._process.stdout is not None
        failed, digests = json.loads(self._process.stdout.readline())
        data = self._image.read_bytes()
        for at, digest in digests.items():
            block = data[int(at) : int(at) + BLOCK]
            assert hashlib.sha256(block).hexdigest()[:16] == digest
        return list(failed)

    def read(self) -> list[int]:
        """Read the whole image: the offsets of the blocks that failed."""
        self.ask()
        return self.failed()

    def leave(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


def hurt_frames(store: StoreDirectory) -> list[int]:
    """Flip one bit in the last bytes of every third frame of base; return the blocks of base that
    lie in one of those."""
    hurt: set[int] = set()
    with Store(store.path) as opened:
        manifest = opened.open_manifest("base")
        frames = sorted({ref >> 16 for ref in manifest.refs if ref})[::3]
        for i, ref in enumerate(manifest.refs):
            if ref >> 16 in frames:
                start, end = manifest.starts[i], manifest.starts[i + 1]
                hurt.update(range(start - start % BLOCK, end, BLOCK))
        opened.close_manifest(manifest)
        with opened.env.write() as txn:
            for frame in frames:
                record = bytearray(txn.get(fmt.frame_key(frame), db=opened.env.frames))
                record[-5] ^= 4
                txn.put(fmt.frame_key(frame), bytes(record), db=opened.env.frames)
    return sorted(hurt)


@pytest.mark.parametrize("source", ["store", "file"])
def test_reads_fail_where_the_damage_is_and_heal_in_the_same_server_and_clients(
    server: Servers, store_dir: StoreDirectory, images: Images, tmp_path: Path, source: str
) -> None:
    if source == "store":
        other = StoreDirectory(tmp_path / "other")
        other.create()
        other.import_file(images.derived, "derived")
        other.import_file(images.base, "base")
    hurt = hurt_frames(store_dir)
    running = server("cache=1M")
    base, clone = (Client(running, name, images.base) for name in ("base", "clone"))
    derived = Client(running, "derived", images.derived)
    running.expect_log("is damaged: ")
    assert base.read() == hurt
    assert clone.read() == hurt
    lost = derived.read()  # it shares some of the damaged frames
    assert lost

    # A repair that finds nothing elsewhere brings back what the damaged frames still hold.
    assert store_dir.cli("check", "--repair").returncode == 1
    left = base.read()
    assert set(left) < set(hurt)
    assert clone.read() == left
    assert set(derived.read()) < set(lost)

    # While they read, the rest is mended.
    given = tmp_path / "other" if source == "store" else images.base
    repairing = subprocess.Popen(
        [DEDUPSTORE, "--store", store_dir.path, "check", "--repair", "--from", given],
        stdout=subprocess.PIPE,
    )
    while repairing.poll() is None:
        for client in (base, clone, derived):
            client.ask()
        assert set(base.failed()) <= set(left)
        assert set(clone.failed()) <= set(left)
        assert set(derived.failed()) <= set(lost)
    repairing.communicate(timeout=PATIENCE_SECONDS)
    assert repairing.returncode == 0
    for client in (base, clone, derived):
        assert client.read() == []
    store_dir.gc()
    for client in (base, clone, derived):
        assert client.read() == []
        client.leave()
    running.stop()
    store_dir.check()
