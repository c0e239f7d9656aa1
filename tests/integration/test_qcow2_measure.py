"""What an image is going to take, and where it has zeroes, as QEMU says (rows B31.6 and B21.9)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.qcow2_images import MIB, create, qemu_img, qemu_io, scribble
from vhostblk.block.create import create_image
from vhostblk.block.flags import StatusFlag
from vhostblk.block.graph import BlockGraph
from vhostblk.block.length import Measurement
from vhostblk.block.measure import measure
from vhostblk.block.status import block_status
from vhostblk.errors import ConfigError

OPTIONS = [
    "",
    "cluster_size=512",
    "cluster_size=2M",
    "compat=0.10",
    "extended_l2=on,refcount_bits=1",
    "preallocation=metadata",
    "preallocation=full",
    "backing_file=x,backing_fmt=raw",
]


def ours(
    driver: str, options: str, size: int | None = None, source: Path | None = None
) -> Measurement:
    async def scenario() -> Measurement:
        graph = BlockGraph()
        try:
            node = None
            if source is not None:
                node = await graph.open_image(str(source), {"read-only": True})
            return await measure(graph.drivers, driver, options, size=size, source=node)
        finally:
            await graph.close_all()

    return asyncio.run(scenario())


def theirs(driver: str, options: str, *words: Any) -> Measurement:
    more = ["-o", options] if options else []
    said = qemu_img("measure", "-O", driver, *more, "--output=json", *words)
    found = json.loads(said)
    return Measurement(found["required"], found["fully-allocated"], found.get("bitmaps"))


@pytest.mark.parametrize("options", OPTIONS)
def test_new_image_takes_what_qemu_says(tmp_path: Path, options: str) -> None:
    for size in (0, 512, 3 * MIB + 512, 77 << 30):
        expected = theirs("qcow2", options, "--size", size)
        assert ours("qcow2", options, size) == expected, size


@pytest.mark.parametrize("options", OPTIONS)
def test_copy_of_an_image_takes_what_qemu_says(tmp_path: Path, options: str) -> None:
    (tmp_path / "base").write_bytes(b"b" * MIB)
    source = create(tmp_path / "source", 8 * MIB, "-b", "base", "-F", "raw")
    scribble(source, 8 * MIB, 4)
    qemu_img("bitmap", "--add", source, "one")
    qemu_img("bitmap", "--add", "-g", "512", source, "another one")
    assert ours("qcow2", options, source=source) == theirs("qcow2", options, source)


def test_raw_images(tmp_path: Path) -> None:
    source = create(tmp_path / "source", 8 * MIB)
    raw = tmp_path / "raw"
    raw.write_bytes(b"x" * 70000 + bytes(MIB - 70000 + 512))
    assert ours("raw", "", source=source) == theirs("raw", "", source)
    assert ours("raw", "", 1000) == theirs("raw", "", "--size", 1000)
    assert ours("qcow2", "", source=raw) == theirs("qcow2", "", "-f", "raw", raw)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="Either a size or an image"):
        ours("qcow2", "")
    with pytest.raises(ConfigError, match=r"too large \(try using a larger cluster size\)"):
        ours("qcow2", "cluster_size=512", 1 << 50)
    with pytest.raises(ConfigError, match="'null-co' does not support image creation"):
        ours("null-co", "", MIB)
    with pytest.raises(ConfigError, match="Unknown file format 'no-format'"):
        ours("no-format", "", MIB)


def test_image_that_was_made_is_no_larger_than_was_measured(tmp_path: Path) -> None:
    async def scenario(path: Path, options: str) -> None:
        graph = BlockGraph()
        try:
            await create_image(graph, str(path), "qcow2", options, size=77 * MIB)
        finally:
            await graph.close_all()

    for options in OPTIONS[:6]:
        asyncio.run(scenario(tmp_path / "disk", options))
        assert (tmp_path / "disk").stat().st_size <= ours("qcow2", options, 77 * MIB).required + (
            77 * MIB if "preallocation" in options else 0
        )


@pytest.mark.parametrize(
    "options", ["preallocation=metadata", "cluster_size=4k,preallocation=metadata", ""]
)
def test_preallocated_clusters_that_were_never_written_read_as_zeroes_and_say_so(
    tmp_path: Path, options: str
) -> None:
    image = create(tmp_path / "disk", 8 * MIB, *(["-o", options] if options else []))
    qemu_io(image, "write -P 1 1M 1M", "write -P 1 5M 64k")

    async def scenario() -> list[tuple[int, int, bool]]:
        graph = BlockGraph()
        found: list[tuple[int, int, bool]] = []
        try:
            node = await graph.open_image(str(image), {"read-only": True})
            at = 0
            while at < node.length:
                status = await block_status(node, at, node.length - at)
                is_zero = bool(status.flags & StatusFlag.ZERO)
                if found and found[-1][2] == is_zero:
                    found[-1] = (found[-1][0], found[-1][1] + status.length, is_zero)
                else:
                    found.append((at, status.length, is_zero))
                at += status.length
        finally:
            await graph.close_all()
        return found

    expected: list[tuple[int, int, bool]] = []
    for part in json.loads(qemu_img("map", "--output=json", image)):
        if expected and expected[-1][2] == part["zero"]:
            expected[-1] = (expected[-1][0], expected[-1][1] + part["length"], part["zero"])
        else:
            expected.append((part["start"], part["length"], part["zero"]))
    assert asyncio.run(scenario()) == expected
