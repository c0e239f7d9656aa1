"""New qcow2 images: the same that QEMU makes, byte by byte where the format leaves no choice (row B35)."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.qcow2_images import MIB, check, contents, qemu_img, used_by_qemu
from vhostblk.block.create import create, create_image
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.flags import Preallocation
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ConfigError, VhostBlkError
from vhostblk.testing.requirements import require

SHAPES = [
    "",
    "compat=0.10",
    "compat=1.1,lazy_refcounts=on",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=8k",
    "cluster_size=2M",
    "cluster_size=2M,refcount_bits=1,preallocation=metadata",
    "refcount_bits=1",
    "refcount_bits=2,preallocation=metadata",
    "refcount_bits=64,cluster_size=4k",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,preallocation=metadata",
    "extended_l2=on,preallocation=falloc",
    "compression_type=zstd",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full",
    "data_file=disk.data",
    "data_file=disk.data,preallocation=falloc",
    "data_file=disk.data,data_file_raw=on",
    "backing_file=base,backing_fmt=raw",
    "backing_file=base,backing_fmt=raw,cluster_size=512,compat=0.10",
    "backing_file=base,backing_fmt=raw,extended_l2=on,preallocation=metadata",
]
FACTS = ("virtual-size", "cluster-size", "format-specific", "dirty-flag", "backing-filename")


def make(name: Path | str, options: str, **arguments: Any) -> Any:
    """Make a qcow2 image."""

    async def scenario() -> Any:
        graph = BlockGraph()
        try:
            return await create_image(graph, str(name), "qcow2", options, **arguments)
        finally:
            await graph.close_all()

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("shape", "size"), [*((shape, 1000000) for shape in SHAPES), ("", 0), ("", 600 * MIB)]
)
def test_image_is_byte_by_byte_what_qemu_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, size: int
) -> None:
    require("qemu-img")
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "base").write_bytes(b"b" * MIB)
    monkeypatch.chdir(tmp_path / "theirs")
    words = ["-o", shape] if shape else []
    qemu_img("create", "-q", "-f", "qcow2", *words, "disk", size)
    monkeypatch.chdir(tmp_path / "ours")
    made = make("disk", shape, size=size)
    assert check(Path("disk")) == ""
    ours, theirs = (info(tmp_path / folder / "disk") for folder in ("ours", "theirs"))
    assert ours == theirs
    for name in {"disk", "disk.data"} & set(os.listdir(tmp_path / "theirs")):
        if "falloc" not in shape and "full" not in shape:
            assert same_bytes(tmp_path / "ours" / name, tmp_path / "theirs" / name), name
    if "falloc" in shape or "full" in shape:  # where QEMU puts tables is its own business
        assert contents(Path("disk"), tmp_path) == bytes(made.size)
        room = sum(os.stat(name).st_blocks * 512 for name in os.listdir() if name != "base")
        assert room >= size


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("shape", ["", ",cluster_size=2M", ",cluster_size=2M,extended_l2=on"])
def test_what_is_preallocated_has_as_much_room_as_in_qemus_image(
    tmp_path: Path, shape: str, mode: str
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    options = f"preallocation={mode}{shape}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, theirs, 20 * MIB)
    make(ours, options, size=20 * MIB)
    # A file system may need a block of its own to say where so many are.
    assert abs(ours.stat().st_blocks - theirs.stat().st_blocks) <= 16


def info(image: Path) -> dict[str, Any]:
    found = json.loads(qemu_img("info", "--output=json", image))
    return {name: found.get(name) for name in FACTS}


def same_bytes(one: Path, other: Path) -> bool:
    """Where a table ends, the rest of its cluster need not be in the file."""
    a, b = one.read_bytes(), other.read_bytes()
    return a.ljust(len(b), b"\0") == b.ljust(len(a), b"\0")


@pytest.mark.parametrize(
    "shape",
    [
        "cluster_size=512,preallocation=metadata",
        "cluster_size=512,refcount_bits=64,preallocation=falloc",
        "extended_l2=on,cluster_size=16k,preallocation=metadata,refcount_bits=32",
        "cluster_size=4k,preallocation=metadata,compat=0.10",
    ],
)
def test_image_with_many_tables_is_sound_and_as_large_as_qemu_says(
    tmp_path: Path, shape: str
) -> None:
    require("qemu-img")
    image, size = tmp_path / "disk", 40 * MIB + 3584
    make(image, shape, size=size)
    assert check(image) == ""
    words = ["-o", shape, "--output=json"]
    expected = json.loads(qemu_img("measure", "-O", "qcow2", *words, "--size", size))
    # The table of reference counts is as large as it has to be; QEMU counts it the same way.
    assert image.stat().st_size == expected["fully-allocated"]
    assert contents(image, tmp_path) == bytes(size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=1M,cluster_size=100k", "Cluster size must be a power of two between 512 and 2048k"),
        ("size=1M,cluster_size=4M", "Cluster size must be a power of two between 512 and 2048k"),
        ("size=1M,refcount_bits=3", "Refcount width must be a power of two"),
        ("size=1M,refcount_bits=128", "Refcount width must be a power of two"),
        ("size=1M,refcount_bits=8,compat=0.10", "Different refcount widths than 16 bits require"),
        ("size=1M,compat=0.9", "Parameter 'version' does not accept value '0.9'"),
        ("size=1M,lazy_refcounts=on,compat=0.10", "Lazy refcounts only supported with"),
        ("size=1M,extended_l2=on,compat=0.10", "Extended L2 entries are only supported with"),
        ("size=1M,extended_l2=on,cluster_size=8k", "at least 16384 bytes"),
        ("size=1M,compression_type=zstd,compat=0.10", "Non-zlib compression type is only"),
        ("size=1M,compression_type=lzo", "does not accept value 'lzo'"),
        ("size=1M,data_file_raw=on", "data-file-raw requires data-file"),
        ("size=1M,data_file=d,compat=0.10", "External data files are only supported with"),
        ("size=1M,backing_fmt=raw", "Backing format cannot be used without backing file"),
        ("size=1M,backing_file=base", "specified without backing format"),
        ("size=1M,backing_file=base,backing_fmt=raw,preallocation=full", "if extended_l2 is on"),
        (
            "size=1M,backing_file=base,backing_fmt=raw,data_file=d,data_file_raw=on",
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        ("size=1M,backing_file=none,backing_fmt=raw", "Could not open 'none'"),
        ("size=1M,backing_file=base,backing_fmt=rew", "Unknown driver 'rew'"),
        ("size=1M,backing_file=disk,backing_fmt=raw", "same filename as the backing file"),
        ("size=1M,encryption=on", "Parameter 'encrypt.key-secret' is required for cipher"),
        ("size=1M,encrypt.format=luks", "Parameter 'encrypt.key-secret' is required for cipher"),
        ("size=1M,encrypt.format=luks,encrypt.key-secret=s", "No secret with id 's'"),
        ("size=1M,encrypt.key-secret=s", "Parameter 'encrypt.format' is missing"),
        ("size=1M,preallocation=some", "does not accept value 'some'"),
        ("size=1M,color=red", "Invalid parameter 'color'"),
        ("cluster_size=64k", "Image creation needs a size parameter"),
        ("size=1P,cluster_size=512", "too large for file format 'qcow2' (try using a larger"),
        ("size=100T,preallocation=full,cluster_size=4k", "(try using a larger cluster size)"),
    ],
)
def test_options_that_make_no_sense_touch_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk").write_bytes(b"something dear")
    Path("base").write_bytes(bytes(MIB))
    with pytest.raises(ConfigError) as caught:
        make("disk", options)
    assert message in str(caught.value)
    assert Path("disk").read_bytes() == b"something dear"
    assert sorted(os.listdir()) == ["base", "disk"]


def test_names_that_are_too_long_for_the_first_cluster_are_refused(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    long = {"backing_file": "b" * 500, "backing_format": "raw", "check_backing": False}
    with pytest.raises(ConfigError, match="names are too long"):
        make(image, "cluster_size=512", size=MIB, **long)
    with pytest.raises(ConfigError, match="Backing file name too long"):
        make(image, "", size=MIB, **{**long, "backing_file": "b" * 1024})
    assert not image.exists()


def test_size_is_that_of_the_backing_file_if_nobody_says_it(tmp_path: Path) -> None:
    require("qemu-img")
    (tmp_path / "base").write_bytes(bytes(3 * MIB + 512))
    made = make(tmp_path / "disk", "", backing_file="base", backing_format="raw")
    assert made.size == 3 * MIB + 512
    assert info(tmp_path / "disk")["virtual-size"] == 3 * MIB + 512
    assert contents(tmp_path / "disk", tmp_path) == bytes(3 * MIB + 512)


def test_no_image_is_made_in_place_of_one_that_it_is_based_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever name, and however far below."""
    monkeypatch.chdir(tmp_path)
    Path("base").write_bytes(b"b" * MIB)
    make("middle", "", backing_file="base", backing_format="raw")
    os.symlink("middle", "link")
    before = Path("middle").read_bytes()
    for name, backing in (("./middle", "middle"), ("link", "middle"), ("base", "middle")):
        with pytest.raises(ConfigError, match="same filename as the backing file"):
            make(name, "", backing_file=backing, backing_format="qcow2")
    assert Path("middle").read_bytes() == before
    assert Path("base").read_bytes() == b"b" * MIB


class Failing(FilterNode):
    """Fails a request when its turn comes; notes where writes went."""

    driver_name = "failing"
    left = 0
    wrote: list[int]

    async def _count(self) -> None:
        self.left -= 1
        if not self.left:
            raise BlockError(5)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        await self._count()
        await super().driver_pwritev(offset, length, iov, flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        await super().driver_pwrite_zeroes(offset, length, flags)

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        await self._count()
        await super().driver_truncate(length, preallocation)

    async def driver_flush_to_disk(self) -> None:
        await self._count()


@pytest.mark.parametrize("shape", ["", "preallocation=metadata,cluster-size=4096"])
def test_creation_that_fails_half_way_leaves_no_image_that_looks_right(
    tmp_path: Path, shape: str
) -> None:
    path = tmp_path / "disk"
    make(path, "", size=MIB)

    async def attempt(turn: int) -> bool:
        graph = BlockGraph({**DRIVERS, "failing": Failing})
        try:
            node = await graph.add(
                f"failing,node-name=f,file.driver=file,file.filename={tmp_path}/disk"
            )
            assert isinstance(node, Failing)
            node.left = turn
            try:
                await create(graph, f"qcow2,file=f,size=2097152,{shape}")
            except BlockError:
                return False
            return True
        finally:
            await graph.close_all()

    turn = 1
    while not asyncio.run(attempt(turn)):
        looks_right = path.read_bytes()[:4] == b"QFI\xfb"
        assert not looks_right or turn == 1  # nothing had happened
        turn += 1
    assert turn > 6
    require("qemu-img")
    assert check(path) == ""
    assert info(path)["virtual-size"] == 2 * MIB


def test_file_that_did_not_get_ready_is_gone_and_one_that_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_room(self: Any, length: int, preallocation: Preallocation) -> None:
        raise BlockError(28)

    monkeypatch.setattr("vhostblk.block.drivers.file.FileNode.driver_truncate", no_room)
    with pytest.raises(BlockError):
        make(tmp_path / "new", "data_file=" + str(tmp_path / "data"), size=MIB)
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").write_bytes(b"x")
    with pytest.raises(BlockError):
        make(tmp_path / "old", "", size=MIB)
    assert (tmp_path / "old").read_bytes() == b""


def test_image_that_somebody_uses_is_not_overwritten(tmp_path: Path) -> None:
    require("qemu-io")
    image = tmp_path / "disk"
    make(image, "", size=MIB)
    before = image.read_bytes()
    with used_by_qemu(image), pytest.raises(ConfigError, match="lock"):
        make(image, "", size=2 * MIB)
    assert image.read_bytes() == before


def test_image_in_nodes_with_options_as_programs_write_them(tmp_path: Path) -> None:
    """`blockdev-create`: the data that are in a raw data file already are what the disk shows."""
    require("qemu-img")
    data = os.urandom(MIB)
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "disk").write_bytes(b"old" * 100000)

    async def scenario() -> None:
        graph = BlockGraph()
        await graph.add(f"file,node-name=f,filename={tmp_path}/disk")
        await create(
            graph,
            {
                "driver": "qcow2",
                "file": "f",
                "data-file": {"driver": "file", "filename": f"{tmp_path}/data"},
                "data-file-raw": True,
                "version": "v3",
                "size": MIB,
                "cluster-size": 4096,
            },
        )
        await graph.close_all()

    asyncio.run(scenario())
    assert check(tmp_path / "disk") == ""
    assert contents(tmp_path / "disk", tmp_path) == data


def test_image_in_something_that_has_one_length_shows_nothing_of_what_was_there(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        try:
            await graph.add(f"raw,node-name=f,size=4M,file.driver=file,file.filename={tmp_path}/d")
            await create(graph, "qcow2,file=f,size=2M,cluster-size=4k,preallocation=metadata")
            with pytest.raises(ConfigError, match="is too small: 4194304 bytes, not "):
                await create(graph, "qcow2,file=f,size=8M,preallocation=metadata")
            await create(graph, "qcow2,file=f,size=2M,cluster-size=4k,preallocation=metadata")
        finally:
            await graph.close_all()

    (tmp_path / "d").write_bytes(b"x" * 5 * MIB)
    asyncio.run(scenario())
    require("qemu-img")
    assert check(tmp_path / "d") == ""
    assert contents(tmp_path / "d", tmp_path) == bytes(2 * MIB)


def test_error_is_one_of_ours(tmp_path: Path) -> None:
    for name, driver, message in (
        ("nowhere/disk", "qcow2", "Could not create '.*': No such file or directory"),
        (".", "qcow2", "Could not create '.*': Is a directory"),
        ("disk", "no-format", "Unknown file format 'no-format'"),
        ("disk", "throttle", "Format driver 'throttle' does not support image creation"),
    ):

        async def attempt(name: str = name, driver: str = driver) -> None:
            graph = BlockGraph()
            try:
                await create_image(graph, str(tmp_path / name), driver, "size=1M")
            finally:
                await graph.close_all()

        with pytest.raises(VhostBlkError, match=message):
            asyncio.run(attempt())
