"""qcow2 images that QEMU's tools have made, read byte by byte, extent by extent, and through a daemon."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.qcow2_images import (
    MIB,
    SHAPES,
    contents,
    create,
    qemu_img,
    qemu_io,
    read,
    scribble,
    with_image,
)
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.flags import StatusFlag
from vhostblk.block.status import block_status
from vhostblk.client.client import Client
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.plugin import DaemonStarter, ExpectedLog


def assert_same(path: Path, expected: bytes, **options: Any) -> None:
    """All of it, then random pieces, from a cold and from a warm cache."""

    async def scenario(backend: BlockBackend) -> None:
        assert backend.node.length == len(expected)
        assert await read(backend, 0, len(expected)) == expected
        rnd = random.Random(1)
        for _ in range(100):
            length = rnd.randrange(1, 200_000) % len(expected)
            offset = rnd.randrange(0, len(expected) - length)
            assert await read(backend, offset, length) == expected[offset : offset + length]

    with_image(path, scenario, **{"read-only": True, **options})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [8 * MIB, 5 * MIB + 512])
def test_every_shape_of_image_reads_as_in_qemu(tmp_path: Path, shape: str, size: int) -> None:
    image = create(tmp_path / "i.qcow2", size, "-o", SHAPES[shape])
    scribble(image, size, seed=len(shape))
    assert_same(image, contents(image, tmp_path))


@pytest.mark.parametrize("shape", ["compression_type=zlib", "compression_type=zstd", "compat=0.10"])
@pytest.mark.parametrize("cluster", ["512", "64k", "2M"])
def test_compressed_clusters(tmp_path: Path, shape: str, cluster: str) -> None:
    if "zstd" in shape:
        pytest.importorskip("zstandard")
    plain = create(tmp_path / "p.qcow2", 5 * MIB, "-o", "cluster_size=512")
    scribble(plain, 5 * MIB, seed=7)
    image = tmp_path / "c.qcow2"
    options = f"{shape},cluster_size={cluster}"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", options, plain, image)
    # Some clusters are written again, uncompressed.
    qemu_io(image, "write -P 77 1M 100k", "write -P 78 4000k 512")
    assert_same(image, contents(image, tmp_path))


@pytest.mark.parametrize("raw", ["on", "off"])
def test_external_data_files(tmp_path: Path, raw: str) -> None:
    image = tmp_path / "i.qcow2"
    create(image, 8 * MIB, "-o", f"data_file={tmp_path / 'data'},data_file_raw={raw}")
    scribble(image, 8 * MIB, seed=3)
    assert_same(image, contents(image, tmp_path))


def test_external_data_file_is_found_from_the_working_directory_or_where_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # as for QEMU
    (tmp_path / "images").mkdir()
    image = create(tmp_path / "images" / "i.qcow2", MIB, "-o", "data_file=data")
    qemu_io(image, "write -P 9 0 1M")
    assert_same(image, b"\x09" * MIB)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="'data-file'"):
        assert_same(image, b"")
    options = {"data-file.driver": "file", "data-file.filename": str(tmp_path / "elsewhere")}
    assert_same(image, b"\x09" * MIB, **options)


@pytest.mark.parametrize("shape", ["", "extended_l2=on", "cluster_size=512"])
def test_chain_of_images_of_different_lengths(tmp_path: Path, shape: str) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(5).randbytes(3 * MIB + 1024))
    sizes = [5 * MIB, 2 * MIB, 6 * MIB, 4 * MIB]
    below, name_format = base, "raw"
    for number, size in enumerate(sizes):
        words = ["-o", shape] if shape else []
        layer = tmp_path / f"{number}.qcow2"
        # Each names the one below relative to itself.
        create(layer, size, "-b", below.name, "-F", name_format, *words)
        scribble(layer, size, seed=number, times=15)
        below, name_format = layer, "qcow2"
        assert_same(layer, contents(layer, tmp_path))


def test_backing_file_by_json_and_without_a_format(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", MIB)
    qemu_io(base, "write -P 3 0 1M")
    inline = {"driver": "qcow2", "file": {"driver": "file", "filename": str(base)}}
    image = create(tmp_path / "i.qcow2", MIB, "-b", "json:" + json.dumps(inline), "-F", "qcow2")
    assert_same(image, b"\x03" * MIB)
    header = Header.parse(image.read_bytes()[:65536])
    with image.open("r+b") as file:
        file.write(replace(header, backing_name=base.name, extensions=()).to_bytes())
    assert_same(image, b"\x03" * MIB)


def test_options_replace_or_remove_the_backing_file(tmp_path: Path) -> None:
    base, other = create(tmp_path / "base.qcow2", MIB), tmp_path / "other.raw"
    qemu_io(base, "write -P 3 0 1M")
    other.write_bytes(b"\x04" * MIB)
    image = create(tmp_path / "i.qcow2", MIB, "-b", base, "-F", "qcow2")
    assert_same(image, b"\x03" * MIB)
    assert_same(image, bytes(MIB), backing=None)
    options = {"driver": "raw", "file.driver": "file", "file.filename": str(other)}
    assert_same(image, b"\x04" * MIB, **{f"backing.{key}": value for key, value in options.items()})


def test_missing_backing_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", MIB)
    image = create(tmp_path / "i.qcow2", MIB, "-b", base, "-F", "qcow2")
    base.unlink()
    with pytest.raises(ConfigError, match=r"^Could not open backing file: .*base\.qcow2"):
        assert_same(image, b"")


def test_chain_of_a_hundred_images(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "raw", tmp_path / "0", MIB)
    for number in range(1, 101):
        form = "raw" if number == 1 else "qcow2"
        qemu_img(
            *("create", "-q", "-f", "qcow2", "-u", "-b", str(number - 1), "-F", form),
            *(tmp_path / str(number), MIB),
        )
        if number % 25 == 1:
            qemu_io(tmp_path / str(number), f"write -P {number} {number * 4096} 4096")
    assert_same(tmp_path / "100", contents(tmp_path / "100", tmp_path))


def test_image_that_is_its_own_backing_file_is_refused(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", MIB)
    qemu_img("rebase", "-u", "-b", image.name, "-F", "qcow2", image)
    with pytest.raises(ConfigError, match="chain of images is longer"):
        assert_same(image, b"")


def test_allocation_is_what_qemu_says(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", 4 * MIB, "-o", "cluster_size=4k")
    scribble(base, 4 * MIB, seed=11)
    image = create(tmp_path / "i.qcow2", 5 * MIB, "-b", base, "-F", "qcow2", "-o", "extended_l2=on")
    scribble(image, 5 * MIB, seed=12)
    said = json.loads(qemu_img("map", "--output=json", image))

    async def scenario(backend: BlockBackend) -> None:
        found = []
        for node, depth in ((backend.node, 0), (backend.node.backing, 1)):
            assert node is not None
            at = 0
            while at < node.length:
                status = await block_status(node, at, node.length - at)
                if status.flags & StatusFlag.ALLOCATED:
                    found.append((depth, at, status))
                at += status.length
        for entry in said:
            if not entry["present"]:
                continue
            start, end, depth = entry["start"], entry["start"] + entry["length"], entry["depth"]
            for at in range(start, end, 512):
                status = next(
                    status
                    for layer, begin, status in found
                    if layer == depth and begin <= at < begin + status.length
                )
                assert bool(status.flags & StatusFlag.ZERO) == entry["zero"]
                assert bool(status.flags & StatusFlag.DATA) == entry["data"]

    with_image(image, scenario, **{"read-only": True})


def test_wrong_table_entry_fails_what_needs_it_and_nothing_else(
    tmp_path: Path, expect_log: ExpectedLog
) -> None:
    expect_log.expect("image is corrupt: Cluster allocation offset 0x50200 unaligned")
    image = create(tmp_path / "i.qcow2", 4 * MIB)
    qemu_io(image, "write -P 1 0 4M")
    with image.open("r+b") as file:
        file.seek(0x40000 + 8 * 20)  # entry 20 of the first L2 table
        assert file.read(8)[0] == 0x80
        file.seek(-8, 1)
        file.write((1 << 63 | 0x50200).to_bytes(8))

    async def scenario(backend: BlockBackend) -> None:
        with pytest.raises(BlockError, match="unaligned"):
            await read(backend, 0, 4 * MIB)
        assert await read(backend, 0, 20 * 65536) == b"\x01" * (20 * 65536)
        assert await read(backend, 21 * 65536, 43 * 65536) == b"\x01" * (43 * 65536)

    with_image(image, scenario, **{"read-only": True})


def test_engine_serves_what_is_allocated_alone(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    base = create(tmp_path / "base.qcow2", 64 * MIB)
    qemu_io(base, "write -P 1 0 32M")
    image = create(tmp_path / "i.qcow2", 64 * MIB, "-b", base, "-F", "qcow2")
    qemu_io(image, "write -P 2 8M 8M", "write -z 20M 1M")
    expected = contents(image, tmp_path)
    sock = socket_directory / "s"
    file = f"file.driver=file,file.filename={image},file.read-only=on"
    daemon(
        *("storage-daemon", "--blockdev", f"qcow2,node-name=d,read-only=on,{file}"),
        *("--export", f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={sock}"),
        sockets=[sock],
    )
    with Client.connect(sock) as disk:
        for _ in range(2):
            for offset in range(0, 64 * MIB, MIB):
                assert disk.read(offset, 65536) == expected[offset : offset + 65536]
    done = subprocess.run(
        ["qemu-img", "check", image], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0
