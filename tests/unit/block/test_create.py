"""Making images: files by name, nodes, and drivers that cannot (row B35)."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.disks import REFUSALS
from vhostblk.block.create import create, create_image
from vhostblk.block.creation import create_options
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.graph import BlockGraph
from vhostblk.block.options import describe_options
from vhostblk.errors import ConfigError

MIB = 1 << 20


def with_graph(scenario: Callable[[BlockGraph], Awaitable[Any]]) -> None:
    async def run() -> None:
        graph = BlockGraph()
        try:
            await scenario(graph)
            assert not graph.nodes
        finally:
            await graph.close_all()

    asyncio.run(run())


def make(*words: Any, **arguments: Any) -> None:
    with_graph(lambda graph: create_image(graph, *words, **arguments))


@pytest.mark.parametrize("driver", ["raw", "file"])
@pytest.mark.parametrize(("preallocation", "least"), [("off", 0), ("falloc", MIB), ("full", MIB)])
def test_file_has_the_size_and_the_room_it_was_told_to_have(
    tmp_path: Path, driver: str, preallocation: str, least: int
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old" * MIB)
    make(str(path), driver, f"preallocation={preallocation},nocow=on", size=MIB)
    assert path.read_bytes() == bytes(MIB)
    assert least <= path.stat().st_blocks * 512 <= least + 65536
    assert path.stat().st_mode & 0o7777 == 0o666 & ~0o022 & path.stat().st_mode


def test_sizes_by_name_are_rounded_up_to_sectors(tmp_path: Path) -> None:
    make(str(tmp_path / "disk"), "raw", size=1000)
    assert (tmp_path / "disk").stat().st_size == 1024


def test_file_by_its_options(tmp_path: Path) -> None:
    """As `blockdev-create` has it."""
    path = str(tmp_path / "disk")

    async def scenario(graph: BlockGraph) -> None:
        await create(graph, {"driver": "file", "filename": path, "size": 1000})
        assert os.stat(path).st_size == 1000
        with pytest.raises(ConfigError, match="Parameter 'colour' is unexpected"):
            await create(graph, {"driver": "file", "filename": path, "colour": "red"})
        with pytest.raises(ConfigError, match="Driver 'null-co' does not support image creation"):
            await create(graph, {"driver": "null-co", "size": MIB})
        with pytest.raises(ConfigError, match="Parameter 'file' is missing"):
            await create(graph, {"driver": "raw", "size": MIB})
        with pytest.raises(ConfigError, match="Cannot find node 'nobody'"):
            await create(graph, {"driver": "raw", "file": "nobody", "size": MIB})

    with_graph(scenario)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (("disk", "raw"), "", "Image creation needs a size parameter"),
        (("disk", "raw"), "size=1M,cluster_size=64k", "Invalid parameter 'cluster_size'"),
        (("disk", "raw"), "backing_file=x", "Invalid parameter 'backing_file'"),
        (("disk", "raw"), "backing_fmt=x", "Invalid parameter 'backing_fmt'"),
        (
            ("disk", "raw"),
            "size=1M,preallocation=metadata",
            "Unsupported preallocation mode: metadata",
        ),
        (("disk", "raw"), "size=big", "Parameter 'size' expects a non-negative number"),
        (("json:{}", "raw"), "size=1M", "Unknown protocol 'json'"),
        (("null-co://", "raw"), "size=1M", "Protocol driver 'null-co' does not support image"),
        (("ftp://disk", "raw"), "size=1M", "Unknown protocol 'ftp'"),
        (("disk", "null-co"), "size=1M", "Format driver 'null-co' does not support image"),
    ],
)
def test_what_cannot_be_made_is_refused_before_there_is_a_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, str],
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        make(*words, options)
    assert message in str(caught.value)
    assert os.listdir() == []


def test_size_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The image size must be specified only once"):
        make(str(tmp_path / "disk"), "raw", "size=1M", size=MIB)


def test_names_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.symlink("nothing", tmp_path / "link")
    for name, message in (
        ("fifo", "it is no regular file"),
        ("link", "No such file or directory"),
        ("no/disk", "No such file or directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(str(tmp_path / name), "raw", size=MIB)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link"]


def test_file_without_room_is_not_made(tmp_path: Path) -> None:
    """No file system has as much."""
    with pytest.raises(REFUSALS) as caught:
        make(str(tmp_path / "disk"), "file", "preallocation=falloc,size=4E")
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert os.listdir(tmp_path) == []


def test_node_that_somebody_uses_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * MIB)

    async def scenario(graph: BlockGraph) -> None:
        await graph.add(f"raw,node-name=r,file.driver=file,file.filename={path},file.node-name=f")
        with pytest.raises(ConfigError):
            await create(graph, "raw,file=f,size=2M")
        with pytest.raises(ConfigError, match="lock"):
            await create_image(graph, str(path), "raw", size=2 * MIB)
        await graph.remove("r")

    async def writer(graph: BlockGraph) -> None:
        from vhostblk.block.backend import BlockBackend

        node = await graph.add(f"file,node-name=f,filename={path}")
        user = BlockBackend(node, "a user", writable=True)
        with pytest.raises(ConfigError):
            await create(graph, "raw,file=f,size=2M")
        with pytest.raises(ConfigError, match="lock"):
            await create_image(graph, str(path), "raw", size=2 * MIB)
        await user.close()
        await graph.remove("f")

    with_graph(writer)
    assert path.read_bytes() == b"x" * MIB


def test_every_driver_that_makes_images_says_how() -> None:
    """Names are those of `-o`: no dashes."""
    makers = [driver for driver in DRIVERS.values() if driver.create_options_type() is not None]
    assert {driver.driver_name for driver in makers} == {
        "file",
        "host_device",
        "luks",
        "nbd",
        "qcow2",
        "raw",
    }
    for driver in makers:
        rows = describe_options(create_options(driver, "Driver"))
        assert all(about for _, _, about in rows)
        if driver.driver_name != "luks":
            assert all("-" not in name for name, _, _ in rows if not name.startswith("encrypt."))
        assert any(name == "size" for name, _, _ in rows)
