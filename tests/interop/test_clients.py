"""Standard NBD clients against the plugin: what they see equals the source image."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest

from dedupstore.mounts import handshake
from tests.interop.corpus import BLOCK, RAGGED_DATA, RAGGED_SIZE, Images
from tests.interop.rig import PATIENCE_SECONDS, Servers, StoreDirectory, run
from tests.programs import require_program

READ_AT = """\
h = connect()
for request in arguments:
    offset, length = map(int, request.split(":"))
    print(bytes(h.pread(length, offset)).hex())
h.shutdown()
"""

OPEN = """\
try:
    connect()
except nbd.Error as error:
    print(error.errnum)
"""

ENOENT = 2


def test_nbdinfo_list_names_every_image(server: Servers) -> None:
    listed = json.loads(run("nbdinfo", "--list", "--json", server().uri()))
    names = [export["export-name"] for export in listed["exports"]]
    assert names == ["base", "clone", "derived", "ragged"]


def test_export_has_the_image_s_size_and_is_read_only(server: Servers, images: Images) -> None:
    export = json.loads(run("nbdinfo", "--json", server().uri("base")))["exports"][0]
    assert export["export-size"] == images.base.stat().st_size
    assert export["is_read_only"]


def test_export_offers_multi_conn_and_cache(server: Servers) -> None:
    export = json.loads(run("nbdinfo", "--json", server().uri("base")))["exports"][0]
    assert export["can_multi_conn"]
    assert export["can_cache"]
    assert not export["is_rotational"]


def test_export_tells_block_sizes_that_allow_single_bytes(server: Servers) -> None:
    export = json.loads(run("nbdinfo", "--json", server().uri("base")))["exports"][0]
    sizes = [export[f"block_size_{kind}"] for kind in ("minimum", "preferred", "maximum")]
    assert sizes == [1, BLOCK, 32 << 20]


def test_export_description_has_the_image_s_digest(
    server: Servers, store_dir: StoreDirectory
) -> None:
    export = json.loads(run("nbdinfo", "--json", server().uri("base")))["exports"][0]
    digest = json.loads(store_dir.do("info", "base", "--json"))["digest"]
    assert digest in export["description"]


@pytest.mark.parametrize("name", ["base", "derived", "ragged"])
def test_nbdcopy_of_a_whole_image_equals_its_source(
    server: Servers, images: Images, name: str
) -> None:
    assert server().read(name) == getattr(images, name).read_bytes()


def test_qemu_img_finds_export_and_source_identical(server: Servers, images: Images) -> None:
    require_program("qemu-img")
    options = ("-f", "raw", "-F", "raw")
    printed = run("qemu-img", "compare", *options, images.base, server().uri("base"))
    assert printed.strip() == "Images are identical."


def test_qemu_img_converts_an_image_with_holes(
    server: Servers, images: Images, tmp_path: Path
) -> None:
    require_program("qemu-img")
    target = tmp_path / "converted"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", server().uri("ragged"), target)
    assert target.read_bytes()[:RAGGED_SIZE] == images.ragged.read_bytes()


def test_fio_reads_at_random_without_an_error(server: Servers, tmp_path: Path) -> None:
    require_program("fio")
    printed = run(
        "fio",
        "--name=random",
        "--ioengine=nbd",
        f"--uri={server().uri('base')}",
        "--rw=randread",
        "--bs=4k",
        "--iodepth=16",
        "--number_ios=4000",
        "--output-format=json",
        f"--aux-path={tmp_path}",
    )
    job = json.loads(printed[printed.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["read"]["total_ios"] > 0


def test_empty_export_name_is_the_first_image_parameter(server: Servers, images: Images) -> None:
    assert server("image=ragged", "image=base").read() == images.ragged.read_bytes()


def test_empty_export_name_is_the_first_match_of_a_glob(server: Servers, images: Images) -> None:
    assert server("image=d*", "image=base").read() == images.derived.read_bytes()


def test_empty_export_name_never_falls_back_to_another_image_parameter(
    server: Servers, store_dir: StoreDirectory
) -> None:
    running = server("image=ragged", "image=base")
    store_dir.remove("ragged")
    running.expect_log("no image named 'ragged'")
    assert int(running.client(OPEN)) == ENOENT
    store_dir.gc()


def test_glob_serves_what_it_matches_and_nothing_else(server: Servers) -> None:
    listed = json.loads(run("nbdinfo", "--list", "--json", server("image=*e*d").uri()))
    assert [export["export-name"] for export in listed["exports"]] == ["derived", "ragged"]


def test_image_that_no_parameter_names_is_refused(server: Servers) -> None:
    running = server("image=base")
    running.expect_log("open: error: no image named 'derived'")
    assert int(running.client(OPEN, "derived")) == ENOENT


def test_unknown_export_name_gives_enoent_and_one_line_of_log(server: Servers) -> None:
    running = server()
    running.expect_log("open: error: no image named 'nowhere'")
    assert int(running.client(OPEN, "nowhere")) == ENOENT
    assert len(running.log()) == 1


def test_glob_as_export_name_is_no_image(server: Servers) -> None:
    running = server("image=b*")
    running.expect_log("open: error: no image named 'b\\*'")
    assert int(running.client(OPEN, "b*")) == ENOENT


def test_store_without_images_lists_none(server: Servers, empty_store_dir: StoreDirectory) -> None:
    running = server(store=empty_store_dir.path)
    running.expect_log("no image named '\\*'")
    result = subprocess.run(
        ["nbdinfo", "--list", "--json", running.uri()], capture_output=True, check=False, text=True
    )
    assert "base" not in result.stdout
    assert int(running.client(OPEN)) == ENOENT


def test_image_of_no_bytes_is_served(
    server: Servers, store_dir: StoreDirectory, tmp_path: Path
) -> None:
    (tmp_path / "nothing").write_bytes(b"")
    store_dir.import_file(tmp_path / "nothing", "nothing")
    assert server().read("nothing") == b""


def test_image_name_of_several_parts_beyond_ascii_is_served(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    store_dir.clone("base", "größe/β 1")
    assert server("image=größe/β 1").read() == images.base.read_bytes()


BOUNDARIES = (
    0,
    BLOCK,
    *(edge for region in RAGGED_DATA for edge in region),
    300 * BLOCK + (128 << 10),  # between chunks
    1 << 20,
    RAGGED_SIZE - RAGGED_SIZE % BLOCK,
    RAGGED_SIZE - RAGGED_SIZE % 512,
)


def test_unaligned_reads_around_every_kind_of_boundary(server: Servers, images: Images) -> None:
    source = images.ragged.read_bytes()
    requests = [
        (offset, length)
        for edge in sorted(set(BOUNDARIES))
        for offset in (edge - 4097, edge - 1, edge, edge + 1)
        for length in (1, 2, 511, 4096, 4099, 200_001)
        if offset >= 0 and offset + length <= RAGGED_SIZE
    ]
    printed = server().client(READ_AT, "ragged", *(f"{a}:{b}" for a, b in requests))
    for (offset, length), found in zip(requests, printed.split(), strict=True):
        assert bytes.fromhex(found) == source[offset : offset + length], (offset, length)


@pytest.mark.parametrize("length", [1, 1236, 1237, 1238, 4096 + 1237, 100_000])
def test_read_that_ends_with_the_last_byte_of_a_ragged_image(
    server: Servers, images: Images, length: int
) -> None:
    source = images.ragged.read_bytes()
    printed = server().client(READ_AT, "ragged", f"{RAGGED_SIZE - length}:{length}")
    assert bytes.fromhex(printed) == source[-length:]


def test_extents_report_holes_exactly_where_the_source_has_them(server: Servers) -> None:
    found = json.loads(run("nbdinfo", "--map", "--json", server().uri("ragged")))
    data = [
        (extent["offset"], extent["offset"] + extent["length"])
        for extent in found
        if extent["type"] == 0
    ]
    assert data == list(RAGGED_DATA)
    assert all(extent["type"] in {0, 3} for extent in found)
    assert sum(extent["length"] for extent in found) == RAGGED_SIZE


def test_extents_of_an_image_without_holes_are_one_piece_of_data(
    server: Servers, store_dir: StoreDirectory, tmp_path: Path
) -> None:
    (tmp_path / "full").write_bytes(b"\x01" * (5 << 20))
    store_dir.import_file(tmp_path / "full", "full")
    found = json.loads(run("nbdinfo", "--map", "--json", server().uri("full")))
    assert [(extent["length"], extent["type"]) for extent in found] == [(5 << 20, 0)]


# --- connections for the kernel ---


def test_connection_is_handed_over_where_the_first_request_goes(
    server: Servers, images: Images
) -> None:
    running = server()
    found = handshake.open_export(running.socket, "base", PATIENCE_SECONDS)
    request = struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 4096, 512)  # read 512 bytes at 4096
    with found.socket as connection, connection.makefile("rb") as stream:
        connection.sendall(request)
        assert stream.read(16) == struct.pack(">IIQ", 0x67446698, 0, 7)
        assert stream.read(512) == images.base.read_bytes()[4096:4608]
    assert found.size == images.base.stat().st_size
    assert found.flags & 0x103 == 0x103  # has flags, is read-only, allows several connections
    with pytest.raises(OSError, match="export 'none' is not served"):
        handshake.open_export(running.socket, "none", PATIENCE_SECONDS)
    running.expect_log("no image named 'none'")
