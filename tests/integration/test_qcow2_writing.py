"""qcow2 images written here, against a byte model, `qemu-img check` and what QEMU reads in them."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from tests.qcow2_images import (
    MIB,
    SHAPES,
    check,
    contents,
    create,
    export,
    no_worse_than_leaks,
    qemu_img,
    qemu_io,
    read,
    scribble,
    with_image,
)
from vhostblk.block.activation import activate, inactivate
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.drivers.qcow2.header import Header, Incompatible
from vhostblk.block.flags import Req
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import align_down, align_up
from vhostblk.block.reopen import reopen
from vhostblk.client.client import Client
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.plugin import DaemonStarter, ExpectedLog


class Guest:
    """Random requests, several at a time, never two to the same bytes; and what the disk must show."""

    def __init__(self, backend: BlockBackend, content: bytes, seed: int) -> None:
        self.backend = backend
        self.model = bytearray(content)
        can_compress = "data-file" not in backend.node.children
        self._kinds = "wwwwzudfrc" if can_compress else "wwwwzudfr"
        self._rnd = random.Random(seed)
        self._busy: list[tuple[int, int]] = []

    async def run(self, requests: int, depth: int) -> None:
        """Make so many."""
        lanes = [self._lane(requests // depth) for _ in range(depth)]
        await asyncio.gather(*lanes)
        size = len(self.model)
        assert await read(self.backend, 0, size) == self.model

    async def _lane(self, requests: int) -> None:
        for _ in range(requests):
            kind = self._rnd.choice(self._kinds)
            offset, length = self._somewhere(whole=kind == "c")
            place = (offset, offset + length)
            if any(start < place[1] and place[0] < end for start, end in self._busy):
                await asyncio.sleep(0)
                continue
            self._busy.append(place)
            try:
                await self._request(kind, offset, length)
            finally:
                self._busy.remove(place)

    def _somewhere(self, whole: bool) -> tuple[int, int]:
        """A range; or one of whole clusters."""
        rnd, size = self._rnd, len(self.model)
        length = min(rnd.choice([1, 512, 4096, 65536, 100_000, 300 * 1024]), size // 4)
        offset = rnd.randrange(0, size - length + 1)
        if rnd.random() < 0.6:
            offset = offset // 65536 * 65536
        if whole:
            unit = self.backend.node.cluster_size
            offset, length = align_down(offset, unit), align_up(length, unit)
        return offset, min(length, size - offset)

    async def _request(self, kind: str, offset: int, length: int) -> None:
        rnd, backend, end = self._rnd, self.backend, offset + length
        if kind in "wc":
            data = bytes([rnd.randrange(1, 256)]) * length
            if kind == "c" and rnd.random() < 0.5:
                # Some clusters do not get smaller.
                data = rnd.randbytes(length // 3).ljust(length, b"\x05")
            flags = int(Req.WRITE_COMPRESSED) if kind == "c" else 0
            await backend.pwritev(offset, IoVec.of(data), flags)
            self.model[offset:end] = data
        elif kind in "zu":
            await backend.pwrite_zeroes(offset, length, may_unmap=kind == "u")
            self.model[offset:end] = bytes(length)
        elif kind == "d":
            await backend.pdiscard(offset, length)
            found = await read(backend, offset, length)
            before = self.model[offset:end]
            assert all(new in (0, old) for new, old in zip(found, before, strict=True))
            self.model[offset:end] = found
        elif kind == "f":
            await backend.flush()
        else:
            assert await read(backend, offset, length) == self.model[offset:end]


def assert_written(
    image: Path, folder: Path, content: bytes, seed: int, requests: int = 120
) -> None:
    """Random requests; then QEMU finds nothing wrong, and reads what was written."""
    guests = []

    async def scenario(backend: BlockBackend) -> None:
        guests.append(Guest(backend, content, seed))
        await guests[0].run(requests, depth=4)

    with_image(image, scenario, discard="unmap")
    assert check(image) == ""
    assert contents(image, folder) == bytes(guests[0].model)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backing", [False, True], ids=["alone", "overlay"])
def test_every_shape_of_image_is_written_as_qemu_reads_it(
    tmp_path: Path, shape: str, backing: bool
) -> None:
    size = 3 * MIB + 512 if "=512" in SHAPES[shape] else 12 * MIB + 512
    if backing and "preallocation=" in SHAPES[shape]:
        pytest.skip("QEMU does not make such images")
    content = b""
    words: list[object] = ["-o", SHAPES[shape]]
    if backing:
        content = random.Random(3).randbytes(size * 2 // 3 // 512 * 512)
        (tmp_path / "base").write_bytes(content)
        words += ["-b", "base", "-F", "raw"]
    image = create(tmp_path / "i.qcow2", size, *words)
    assert_written(image, tmp_path, content.ljust(size, b"\0"), seed=len(shape))


@pytest.mark.parametrize("shape", ["", "extended_l2=on", "cluster_size=4k", "compat=0.10"])
@pytest.mark.parametrize("how", ["compressed", "snapshot"])
def test_clusters_that_others_share_or_that_are_compressed_are_copied(
    tmp_path: Path, shape: str, how: str
) -> None:
    size = 8 * MIB
    image, words = tmp_path / "i.qcow2", ["-o", shape] if shape else []
    plain = create(tmp_path / "p.qcow2" if how == "compressed" else image, size, *words)
    scribble(plain, size, seed=5)
    kept = b""
    if how == "compressed":
        qemu_img("convert", "-c", "-O", "qcow2", *words, plain, image)
    else:
        qemu_img("snapshot", "-c", "before", image)
        kept = contents(image, tmp_path)
        qemu_io(image, "write -P 8 1M 3M")
    assert_written(image, tmp_path, contents(image, tmp_path), seed=6)
    if kept:
        qemu_img("snapshot", "-a", "before", image)
        assert contents(image, tmp_path) == kept
        assert check(image) == ""


@pytest.mark.parametrize("shape", ["", ",data_file_raw=on", ",extended_l2=on", ",cluster_size=4k"])
def test_external_data_file_is_written(tmp_path: Path, shape: str) -> None:
    size = 8 * MIB
    image = create(tmp_path / "i.qcow2", size, "-o", f"data_file={tmp_path / 'data'}{shape}")
    assert_written(image, tmp_path, bytes(size), seed=8)


def test_tables_are_written_when_the_caches_are_full(tmp_path: Path) -> None:
    size = 3 * MIB
    image = create(tmp_path / "i.qcow2", size, "-o", "cluster_size=512")
    guests = []

    async def scenario(backend: BlockBackend) -> None:
        guests.append(Guest(backend, bytes(size), seed=9))
        await guests[0].run(200, depth=4)

    options = {"l2-cache-size": 1024, "l2-cache-entry-size": 512, "refcount-cache-size": 1024}
    with_image(image, scenario, **options)
    assert check(image) == ""
    assert contents(image, tmp_path) == bytes(guests[0].model)


def test_reference_count_table_grows(tmp_path: Path) -> None:
    """64 counts in a block, 64 blocks in the table's cluster: 2 MiB of file."""
    size = 8 * MIB
    image = create(tmp_path / "i.qcow2", size, "-o", "cluster_size=512,refcount_bits=64")
    data = random.Random(1).randbytes(6 * MIB)

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(MIB, IoVec.of(data))

    with_image(image, scenario)
    assert check(image) == ""
    assert contents(image, tmp_path)[MIB : 7 * MIB] == data


@pytest.mark.parametrize("start", [0, 2 * 65536, 2 * 65536 + 2048])
@pytest.mark.parametrize("command", ["write -zu", "write -z", "discard"])
def test_last_cluster_is_cleared_as_a_whole_where_the_disk_has_a_part_of_it(
    tmp_path: Path, command: str, start: int
) -> None:
    size = 2 * 65536 + 52 * 1024
    options = "cluster_size=64k,extended_l2=on"
    images = []
    for name in ("theirs", "ours"):
        image = create(tmp_path / name, size, "-o", options)
        qemu_io(image, f"write -P 1 0 {size}")
        images.append(image)
    theirs, ours = images
    qemu_io(theirs, "reopen -o discard=unmap", f"{command} {start} {size - start}")

    async def scenario(backend: BlockBackend) -> None:
        if command == "discard":
            await backend.pdiscard(start, size - start)
        else:
            await backend.pwrite_zeroes(start, size - start, may_unmap=command == "write -zu")

    with_image(ours, scenario, discard="unmap")
    shown = [qemu_img("map", "--output=json", image) for image in (theirs, ours)]
    assert shown[0] == shown[1]
    assert check(ours) == ""


def test_what_is_discarded_goes_back_to_the_host_and_is_used_again(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", 64 * MIB)

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(b"\x01" * (16 * MIB)))
        await backend.flush()
        full = image.stat().st_blocks
        await backend.pdiscard(0, 16 * MIB)
        await backend.flush()
        assert image.stat().st_blocks * 512 < full * 512 - 15 * MIB
        length = image.stat().st_size
        await backend.pwritev(32 * MIB, IoVec.of(b"\x02" * (16 * MIB)))
        assert image.stat().st_size < length + MIB

    with_image(image, scenario, discard="unmap")
    assert check(image) == ""


@pytest.mark.parametrize("backing", [0, 3 * MIB, 9 * MIB])
def test_image_grows_and_what_is_new_reads_as_zeroes(tmp_path: Path, backing: int) -> None:
    words: list[object] = ["-o", "cluster_size=4k"]
    if backing:
        (tmp_path / "base").write_bytes(b"\x05" * backing)
        words += ["-b", "base", "-F", "raw"]
    image = create(tmp_path / "i.qcow2", 2 * MIB + 512, *words)

    async def scenario(backend: BlockBackend) -> None:
        # The L1 table needs more clusters than it has.
        await backend.truncate(6 << 30)
        assert backend.node.length == 6 << 30
        await backend.pwritev((6 << 30) - 5, IoVec.of(b"at it"))
        old = b"\x05" if backing else b"\0"
        assert await read(backend, 0, 4 * MIB) == (old * (2 * MIB + 512)).ljust(4 * MIB, b"\0")

    with_image(image, scenario)
    assert check(image) == ""
    assert "6 GiB" in qemu_img("info", image)
    qemu_io(image, "read -P 0 3M 8M")


def marked(image: Path, **fields: int) -> None:
    """Change an image's header."""
    header = Header.parse(image.read_bytes()[:65536])
    values = {name: getattr(header, name) | bits for name, bits in fields.items()}
    with image.open("r+b") as file:
        file.write(type(header)(**{**_fields(header), **values}).to_bytes())


def _fields(header: Header) -> dict[str, object]:
    return {name: getattr(header, name) for name in header.__dataclass_fields__}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"incompatible": Incompatible.CORRUPT}, "corrupt"),
    ],
)
def test_image_that_writing_would_damage_is_only_read(
    tmp_path: Path, fields: dict[str, int], why: str
) -> None:
    image = create(tmp_path / "i.qcow2", MIB)
    marked(image, **fields)
    before = image.read_bytes()

    async def scenario(backend: BlockBackend) -> None:
        assert await read(backend, 0, 512) == bytes(512)

    with pytest.raises(ConfigError, match=why):
        with_image(image, scenario)
    with_image(image, scenario, **{"read-only": True})
    assert image.read_bytes() == before


def test_dirty_image_is_repaired_where_it_is_opened_for_writing_and_not_reopened(
    tmp_path: Path,
) -> None:
    image = create(tmp_path / "i.qcow2", MIB)
    marked(image, incompatible=Incompatible.DIRTY)
    before = image.read_bytes()

    async def scenario() -> None:
        graph = BlockGraph(DRIVERS)
        node = await graph.open_image(str(image), {"read-only": True})
        with pytest.raises(ConfigError, match="not closed properly"):
            await reopen(graph, {node: {"read-only": False}})
        assert node.read_only
        await graph.close_all()

    asyncio.run(scenario())
    assert image.read_bytes() == before

    async def nothing(backend: BlockBackend) -> None:
        header = Header.parse(image.read_bytes()[:65536])
        assert not header.incompatible & Incompatible.DIRTY

    with_image(image, nothing)
    assert check(image) == ""


def test_reopened_image_is_written(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", MIB)

    async def scenario() -> None:
        graph = BlockGraph(DRIVERS)
        file = {"driver": "file", "filename": str(image), "node-name": "f"}
        node = await graph.add({"driver": "qcow2", "read-only": True, "file": file})
        assert node.read_only
        await reopen(graph, {node: {"read-only": False}})
        assert not node.read_only
        backend = BlockBackend(node, "the test", writable=True)
        await backend.pwritev(0, IoVec.of(b"\x07" * MIB))
        await backend.close()
        await reopen(graph, {node: {"read-only": True}})
        assert node.read_only
        await graph.close_all()

    asyncio.run(scenario())
    assert check(image) == ""
    assert contents(image, tmp_path) == b"\x07" * MIB


def test_image_changes_hands(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", MIB)

    async def scenario() -> None:
        graph = BlockGraph(DRIVERS)
        node = await graph.add(f"qcow2,file.driver=file,file.filename={image}")
        backend = BlockBackend(node, "the test", writable=True)
        await backend.pwritev(0, IoVec.of(b"\x01" * 100_000))
        await inactivate(graph)
        assert check(image) == ""
        qemu_io(image, "read -P 1 0 100000", "write -P 2 50000 500000")
        await activate(graph)
        assert await read(backend, 0, 200_000) == (b"\x01" * 50_000).ljust(200_000, b"\x02")
        await backend.pwritev(800_000, IoVec.of(b"\x03" * 1000))
        await backend.close()
        await graph.close_all()

    asyncio.run(scenario())
    assert check(image) == ""
    qemu_io(image, "read -P 2 100000 400000", "read -P 3 800000 1000")


def test_bits_of_unknown_features_are_cleared_by_who_writes(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", MIB)
    marked(image, autoclear=1 << 20)

    async def scenario(backend: BlockBackend) -> None:
        pass

    with_image(image, scenario, **{"read-only": True})
    assert Header.parse(image.read_bytes()[:65536]).autoclear == 1 << 20
    with_image(image, scenario)
    assert Header.parse(image.read_bytes()[:65536]).autoclear == 0


def test_free_clusters_that_are_tables_mark_the_image_corrupt_and_nothing_is_overwritten(
    tmp_path: Path, expect_log: ExpectedLog
) -> None:
    expect_log.expect("image is corrupt: Preventing invalid allocation at offset 0x30000")
    image = create(tmp_path / "i.qcow2", MIB)
    with image.open("r+b") as file:
        file.seek(0x20000 + 2 * 3)  # the count of cluster 3, where the L1 table is
        assert file.read(2) == b"\0\1"
        file.seek(-2, 1)
        file.write(b"\0\0")
    before = image.read_bytes()

    async def scenario(backend: BlockBackend) -> None:
        for _ in range(2):
            with pytest.raises(BlockError) as caught:
                await backend.pwritev(0, IoVec.of(bytes(512)))
            assert caught.value.errno == errno.EIO

    with_image(image, scenario)
    assert Header.parse(image.read_bytes()[:65536]).incompatible & Incompatible.CORRUPT
    assert image.read_bytes()[0x30000:0x40000] == before[0x30000:0x40000]


def test_guest_writes_go_past_python_once_clusters_are_allocated(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    base = create(tmp_path / "base.qcow2", 64 * MIB)
    qemu_io(base, "write -P 1 0 32M")
    before = base.read_bytes()
    image = create(tmp_path / "i.qcow2", 64 * MIB, "-b", base, "-F", "qcow2")
    sock = socket_directory / "s"
    process = export(daemon, image, sock)
    model = bytearray((b"\x01" * (32 * MIB)).ljust(64 * MIB, b"\0"))
    rnd = random.Random(4)
    with Client.connect(sock) as disk:
        for number in range(400):
            offset = rnd.randrange(0, 64 * MIB, 4096)
            data = bytes([number % 255 + 1]) * min(rnd.choice([4096, 65536]), 64 * MIB - offset)
            disk.write(offset, data)
            model[offset : offset + len(data)] = data
            if number % 50 == 0:
                disk.flush()
                disk.discard((offset // 65536 * 65536, 65536))
                start = offset // 65536 * 65536
                model[start : start + 65536] = disk.read(start, 65536)
                assert model[start : start + 65536] == bytes(65536)
        for offset in range(0, 64 * MIB, MIB):
            assert disk.read(offset, MIB) == model[offset : offset + MIB]
    assert process.stop() == 0
    assert check(image) == ""
    assert contents(image, tmp_path) == bytes(model)
    assert base.read_bytes() == before


def test_completed_flush_survives_a_kill(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    image = create(tmp_path / "i.qcow2", 64 * MIB)
    rnd = random.Random(4)
    promised: dict[int, int] = {}
    for turn in range(5):
        sock = socket_directory / f"s{turn}"
        process = export(daemon, image, sock)
        with Client.connect(sock) as disk:
            for offset, value in promised.items():
                assert disk.read(offset, 4096) in (bytes([value]) * 4096,)
            for _ in range(40):
                offset = rnd.randrange(0, 64 * MIB, 4096)
                promised[offset] = value = rnd.randrange(1, 256)
                disk.write(offset, bytes([value]) * 4096)
            disk.flush()
            for _ in range(20):  # not promised
                offset = rnd.randrange(0, 64 * MIB, 4096)
                disk.write(offset, bytes(4096))
                promised.pop(offset, None)
            process.kill()
        no_worse_than_leaks(image)
