"""Several hosts on one object store, and several servers on one host.

Hosts are network namespaces (`hosts`). SeaweedFS takes what is pushed; nginx in front of it, as a
CDN would be, serves what is pulled, and tells which host asked for which bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.places import Place, list_places
from dedupstore.remote.streams import GAP_BYTES
from dedupstore.store import Store
from tests.conftest import noise, text
from tests.interop.corpus import Images
from tests.interop.hosts import Host, Network, at_once
from tests.interop.rig import (
    Server,
    Servers,
    StoreDirectory,
    mounts_below,
    read_metrics,
    require_nbdkit,
    wait_until,
)
from tests.programs import require_program
from tools.ondemand import servers
from tools.ondemand.link import Link


@dataclass(slots=True)
class Shop:
    """The object store: how hosts that push reach it, how those that pull do, and nginx's log."""

    network: Network
    s3: servers.Served
    url: str
    log: Path

    def pusher(self, name: str) -> Host:
        host = self.network.host(name, self.s3.environment)
        host.remote("s3://images/fleet")
        return host

    def puller(self, name: str) -> Host:
        host = self.network.host(name, {})
        host.remote(f"{self.url}/fleet")
        return host

    def frames_asked(self, host: Host) -> Counter[Place]:
        """How often a host has asked for each frame that it knows, according to nginx."""
        known = {(place.pack.hex(), place.offset): place for place in places_of(host.path).values()}
        asked: Counter[Place] = Counter()
        for line in self.log.read_text().splitlines():
            address, _, path, status, asked_for = line.split()
            pack, position = path.rpartition("/")[2], asked_for.removeprefix("bytes=")
            first, _, last = position.partition("-")
            if address != host.network.address or status != "206" or "/packs/" not in path:
                continue
            at = int(first)
            while at <= int(last) and (place := known.get((pack, at))) is not None:
                asked[place] += 1
                at += place.length
        return asked


def places_of(store: Path) -> dict[int, Place]:
    """Where each frame of a store is that came, or will come, from a remote."""
    with Store(store) as opened, opened.env.read() as txn:
        found = list(list_places(txn, opened.env.open_remote()))
    return {frame: record.places[0] for frame, record in found}  # type: ignore[union-attr]


def distant_of(store: Path) -> set[Place]:
    """Where the frames are whose bytes are not here."""
    places = places_of(store)
    with Store(store) as opened, opened.env.read() as txn:
        return {
            places[fmt.decode_frame_key(key)]
            for key, record in txn.cursor(db=opened.env.frames)
            if fmt.is_distant(record)
        }


def assert_each_once(places: set[Place], *metrics: dict[str, int]) -> int:
    """The servers of one host have fetched each of these frames once; the bytes of their requests.
    Where a pack is read in order, a short stretch that is here already may come along, to make
    one request of two: it is not fetched, and bounded."""
    assert all(one["dedup_remote_errors_total"] == 0 for one in metrics)
    assert sum(one["dedup_remote_frames_total"] for one in metrics) == len(places)
    fetched = sum(one["dedup_remote_bytes_total"] for one in metrics)
    requests = sum(one["dedup_remote_requests_total"] for one in metrics)
    assert 0 <= fetched - total(places) <= GAP_BYTES * requests
    return fetched


def total(places: set[Place]) -> int:
    return sum(place.length for place in places)


def asked_bytes(asked: Counter[Place]) -> int:
    return sum(place.length * times for place, times in asked.items())


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    require_nbdkit()
    require_program("nginx")
    network = Network()
    log = tmp_path / "requests"
    everywhere = "0.0.0.0"
    try:
        with (
            network.shop.inside(),
            servers.seaweedfs(tmp_path / "weed", bind=everywhere) as s3,
            servers.nginx(s3.plain, tmp_path / "nginx", bind=everywhere, requests=log) as web,
        ):
            address = network.shop.address
            yield Shop(network, s3.at(address), web.at(address).url, log)
    finally:
        network.close()


def mount_and_compare(host: Host, name: str, directory: Path, tree: Path) -> None:
    """Mount an image by the command, and compare every file."""
    directory.mkdir()
    host.do("mount", name, directory)
    for path in tree.rglob("*"):
        if path.is_file():
            assert (directory / path.relative_to(tree)).read_bytes() == path.read_bytes(), path


def unmount(host: Host, directory: Path) -> dict[str, int]:
    """Unmount; the metrics of the mount's server, which ends with it."""
    run = Path(host.environment["DEDUPSTORE_RUN"])
    (socket,) = run.glob("*/metrics.sock")
    metrics = read_metrics(socket)
    host.do("umount", directory)
    assert mounts_below(host.path.parent) == []
    return metrics


def test_hosts_push_and_pull_at_once_and_each_fetches_each_frame_once(
    shop: Shop, images: Images, tmp_path: Path
) -> None:
    left, right, mounting, serving = (
        make(name)
        for make, name in (
            (shop.pusher, "left"),
            (shop.pusher, "right"),
            (shop.puller, "mounting"),
            (shop.puller, "serving"),
        )
    )
    sources = {"base": images.base, "derived": images.derived, "same": images.ragged}
    sources["other"] = tmp_path / "other"
    sources["other"].write_bytes(noise(5, 1_000_000) + text(6, 500_000) + noise(7, 777))
    for host, names in ((left, ("base", "derived", "same")), (right, ("other", "same"))):
        for name in names:
            host.do("import", sources[name], name)
    left.do("push", "far", "base")

    def read(server: Server, name: str) -> None:
        assert server.read(name) == sources[name].read_bytes(), name

    sent: dict[str, int] = {}

    def push(host: Host, *names: str) -> None:
        for pushed in json.loads(host.do("push", "--json", "far", *names))["images"]:
            sent[pushed["name"]] = max(sent.get(pushed["name"], 0), pushed["sent_bytes"])

    mnt = mounting.path.with_name("mnt")
    running = {host.path: host.serve() for host in (mounting, serving)}
    for host in (mounting, serving):
        host.do("pull", "--lazy", "far", "base")
    # Two that push what is different and what is the same, while two others read: one by a mount
    # and a server, which are two processes on one store, one by two clients of one server.
    at_once(
        partial(push, left, "derived", "same"),
        partial(push, right, "same", "other"),
        partial(mount_and_compare, mounting, "base", mnt, images.base_tree),
        partial(read, running[mounting.path], "base"),
        partial(running[serving.path].client, "connect(); read_all(connect())", "base"),
        partial(read, running[serving.path], "base"),
    )
    # Only now: a server that ends gives up what it has under way.
    seen = unmount(mounting, mnt)
    for host in (mounting, serving):
        base = set(places_of(host.path).values())
        assert distant_of(host.path) == set()
        asked = shop.frames_asked(host)
        assert set(asked) == base
        ours = [running[host.path].metrics(), *([seen] if host is mounting else [])]
        assert assert_each_once(base, *ours) == asked_bytes(asked)
        before = len(shop.log.read_text())
        host.do("clone", "base", "clone")
        assert running[host.path].read("clone") == images.base.read_bytes()
        assert len(shop.log.read_text()) == before

    # Everything that was pushed meanwhile: only what is new of it comes, by two hosts at once.
    for host in (mounting, serving):
        host.do("pull", "--lazy", "far", "derived", "other", "same")
    new = {host.path: distant_of(host.path) for host in (mounting, serving)}
    at_once(
        *(
            partial(read, running[host.path], name)
            for host in (mounting, serving)
            for name in ("derived", "other", "same")
        )
    )
    for host in (mounting, serving):
        everything = set(places_of(host.path).values())
        asked = shop.frames_asked(host)
        assert set(asked) == everything
        ours = [running[host.path].metrics(), *([seen] if host is mounting else [])]
        assert assert_each_once(everything, *ours) == asked_bytes(asked)
        # Of the derived image only what was pushed of it, which is what base has not.
        assert 0 < total(new[host.path]) <= sum(sent.values())
    assert sent["derived"] < images.derived.stat().st_size / 4
    for host in (left, right, mounting, serving):
        host.stop_servers()
        host.check()


# --- several servers on one host ---


def lazy_store(directory: Path, source: Path, url: str, remote: Path) -> StoreDirectory:
    """A store with lazy image `base`, which is in a remote whose files are at `remote`."""
    origin = StoreDirectory(directory / "origin")
    origin.create()
    origin.do("import", source, "base")
    origin.do("remote", "add", "far", str(remote))
    origin.do("push", "far", "base")
    store = StoreDirectory(directory / "store")
    store.create()
    store.do("remote", "add", "far", url)
    store.do("pull", "--lazy", "far", "base")
    return store


@dataclass(slots=True)
class LazyRig:
    """A store with lazy image `base`, whose remote is behind a link, and the servers on it."""

    store: StoreDirectory
    serve: Servers
    link: Link
    data: bytes

    def frames(self) -> int:
        return len(places_of(self.store.path))


@pytest.fixture
def lazy(tmp_path: Path) -> Iterator[LazyRig]:
    require_nbdkit()
    require_program("nginx")
    source, root = tmp_path / "source", tmp_path / "root"
    data = noise(9, 4_000_000) + text(10, 1_000_000)
    source.write_bytes(data)
    root.mkdir()
    with servers.nginx(root, tmp_path / "nginx") as web, Link(web.port) as link:
        url = f"{web.through(link.port).url}/far"
        store = lazy_store(tmp_path, source, url, root / "far")
        serve = Servers(store.path)
        try:
            yield LazyRig(store, serve, link, data)
            serve.close()
            store.check()
        finally:
            for server in serve._servers:
                server.process.kill()


def assert_reads(server: Server, data: bytes) -> None:
    assert server.read("base") == data


@pytest.mark.parametrize("count", [2, 4])
def test_servers_on_one_store_fetch_each_frame_once_together(lazy: LazyRig, count: int) -> None:
    lazy.link.shape(rtt=0.01)  # that they are under way at the same time
    running = [lazy.serve(metrics=True) for _ in range(count)]

    at_once(*(partial(assert_reads, server, lazy.data) for server in running))
    places = places_of(lazy.store.path)
    metrics = [server.metrics() for server in running]
    assert_each_once(set(places.values()), *metrics)
    assert sum(one["dedup_remote_stored_total"] for one in metrics) == len(places)


def test_server_killed_while_it_fetches_loses_nothing_and_another_goes_on(lazy: LazyRig) -> None:
    lazy.link.shape(rtt=0.005, rate=2e6)
    killed, other = lazy.serve(metrics=True), lazy.serve(metrics=True)
    reading = killed.start_client("read_all(connect())", "base")
    wait_until(lambda: killed.metrics()["dedup_remote_stored_total"] >= 3)
    killed.process.kill()
    killed.process.wait()
    reading.communicate()
    lazy.serve._servers.remove(killed)
    here = lazy.frames() - len(distant_of(lazy.store.path))
    assert 3 <= here < lazy.frames()
    lazy.link.shape()
    fresh = lazy.serve(metrics=True)
    at_once(partial(assert_reads, other, lazy.data), partial(assert_reads, fresh, lazy.data))
    assert distant_of(lazy.store.path) == set()
    fetched = [server.metrics()["dedup_remote_frames_total"] for server in (other, fresh)]
    assert sum(fetched) == lazy.frames() - here
