"""A qcow2 image whose file fails, at any request of a random workload, or which is damaged before it is opened.

After failures `qemu-img check` finds leaks at worst, and what a flush that succeeded has promised is there. Whatever is
in the image, nobody hangs and nothing but errors of the block layer comes out of it.

VHOSTBLK_FUZZ_SECONDS makes the damaging run for that long for each shape instead of a few images, with other seeds
each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.qcow2_images import (
    MIB,
    check,
    contents,
    create,
    no_worse_than_leaks,
    our_check,
    qemu_img,
    qemu_io,
    read,
    with_image,
)
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.drivers.qcow2.header import Header, Incompatible
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.flags import CheckMode, Req
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import align_down, align_up
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.plugin import ExpectedLog

FUZZ_SECONDS = float(os.environ.get("VHOSTBLK_FUZZ_SECONDS", "0"))
_SEED = time.time_ns() % 1_000_000_000 if FUZZ_SECONDS else 1
_IMAGES = 12
"""Damaged ones of each shape, unless they are to go on for some seconds."""
ALL_MODES = CheckMode.FIX_LEAKS | CheckMode.FIX_ERRORS
_LONGEST = 20.0  # seconds for one image
SIZE = 2 * MIB


class Faulty(FilterNode):
    """Fails some requests that change something."""

    driver_name = "faulty"
    luck: random.Random | None = None
    odds = 0.15

    def _maybe_fail(self) -> None:
        if self.luck is not None and self.luck.random() < self.odds:
            raise BlockError(self.luck.choice([errno.EIO, errno.ENOSPC]))

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        self._maybe_fail()
        await self.file.preadv(offset, iov)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        self._maybe_fail()
        await self.file.pwritev(offset, iov, flags)
        self._maybe_fail()

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        self._maybe_fail()
        await self.file.pwrite_zeroes(offset, length, flags)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        self._maybe_fail()
        await self.file.pdiscard(offset, length)

    async def driver_flush_to_disk(self) -> None:
        self._maybe_fail()


@asynccontextmanager
async def faulty_disk(image: Path, *words: str) -> AsyncIterator[tuple[Faulty, BlockBackend]]:
    """An image, with more options perhaps, whose file fails when it is told to."""
    graph = BlockGraph({**DRIVERS, "faulty": Faulty})
    file = f"file.driver=faulty,file.file.driver=file,file.file.filename={image}"
    node = await graph.add(",".join(["qcow2,node-name=d,discard=unmap", file, *words]))
    faulty = node.children["file"].node
    assert isinstance(faulty, Faulty)
    backend = BlockBackend(node, "the guest", writable=True)
    yield faulty, backend
    await backend.close()
    await graph.close_all()


def look_at(image: Path, raw: Path) -> None:
    """What QEMU says of an image that is in use; makes a copy of what the disk shows."""
    no_worse_than_leaks(image, "-U")
    qemu_img("convert", "-U", "-O", "raw", image, raw)


SHAPES = {
    "usual": "cluster_size=64k",
    "4 KiB clusters": "cluster_size=4k",
    "subclusters": "extended_l2=on",
    "tiny clusters": "cluster_size=512,refcount_bits=64",
}


class Guest:
    """Requests that may fail, or be given up, and what the disk may show then, sector by sector."""

    def __init__(self, backend: BlockBackend, content: bytes, rnd: random.Random) -> None:
        self._backend = backend
        self._rnd = rnd
        sectors = range(0, len(content), 512)
        self.may = [{content[at : at + 512]} for at in sectors]

    async def request(self) -> None:
        rnd, size = self._rnd, len(self.may) * 512
        length = rnd.choice([512, 4096, 65536, 150 * 1024])
        offset = rnd.randrange(0, size - length + 1) // 512 * 512
        kind = rnd.choice("wwwwzudfc")
        if kind == "c":
            unit = self._backend.node.cluster_size
            offset, length = align_down(offset, unit), align_up(length, unit)
        data, work = bytes(512), self._backend.flush()
        if kind == "w":
            data = bytes([rnd.randrange(1, 256)]) * 512
            work.close()
            work = self._backend.pwritev(offset, IoVec.of(data * (length // 512)))
        elif kind == "c":
            data = rnd.randbytes(100).ljust(512, b"\x05")
            work.close()
            memory = IoVec.of(data * (length // 512))
            work = self._backend.pwritev(offset, memory, int(Req.WRITE_COMPRESSED))
        elif kind == "d":
            work.close()
            work = self._backend.pdiscard(offset, length)
        elif kind in "zu":
            work.close()
            work = self._backend.pwrite_zeroes(offset, length, may_unmap=kind == "u")
        task = asyncio.get_running_loop().create_task(work)
        if rnd.random() < 0.2:
            for _ in range(rnd.randrange(12)):
                await asyncio.sleep(0)
            task.cancel()
        done = True
        try:
            await task
        except (BlockError, asyncio.CancelledError):
            done = False
        if kind == "f":
            return
        for at in range(offset // 512, (offset + length) // 512):
            if done and kind != "d":
                self.may[at] = {data}
            else:
                self.may[at] = self.may[at] | {data}

    def check(self, found: bytes) -> None:
        for number, allowed in enumerate(self.may):
            assert found[number * 512 : number * 512 + 512] in allowed, number


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["alone", "overlay", "snapshot"])
def test_failures_and_cancellation_lose_nothing_and_corrupt_nothing(
    tmp_path: Path, shape: str, how: str, expect_log: ExpectedLog
) -> None:
    expect_log.allow("close failed")
    image, words = tmp_path / "i.qcow2", ["-o", SHAPES[shape]]
    if how == "overlay":
        (tmp_path / "base").write_bytes(random.Random(2).randbytes(MIB))
        words += ["-b", "base", "-F", "raw"]
    create(image, SIZE, *words)
    if how == "snapshot":
        qemu_io(image, "write -P 200 100k 1M")
        qemu_img("snapshot", "-c", "s", image)
    before = contents(image, tmp_path)
    rnd = random.Random(len(shape) + len(how))

    async def run() -> Guest:
        async with faulty_disk(image) as (faulty, backend):
            guest = Guest(backend, before, rnd)
            for _ in range(5):
                faulty.luck = rnd
                for _ in range(12):
                    await guest.request()
                faulty.luck = None
                await backend.flush()
                # As if everything were killed now.
                look_at(image, tmp_path / "now")
                guest.check((tmp_path / "now").read_bytes())
                guest.check(await read(backend, 0, SIZE))
        return guest

    guest = asyncio.run(run())
    guest.check(contents(image, tmp_path))


def test_flush_that_could_not_write_tables_fails_until_it_can(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", SIZE)

    class Never(random.Random):
        def random(self) -> float:
            return 0.0

    async def run() -> None:
        async with faulty_disk(image) as (faulty, backend):
            await backend.pwritev(0, IoVec.of(b"\x07" * 65536))
            faulty.luck = Never(1)
            for _ in range(3):
                with pytest.raises(BlockError):
                    await backend.flush()
            faulty.luck = None
            await backend.flush()

    asyncio.run(run())
    qemu_io(image, "read -P 7 0 64k")


def damage(image: bytearray, rnd: random.Random) -> None:
    """Flip bits and put numbers into places where tables are, mostly."""
    header = Header.parse(bytes(image[:65536]))
    entry = int.from_bytes(image[header.l1_offset : header.l1_offset + 8]) & ((1 << 56) - 512)
    block = int.from_bytes(image[header.refcount_table_offset :][:8])
    places = [(0, 112), (header.l1_offset, 64), (header.refcount_table_offset, 64)]
    places += [(entry, 512), (entry, 512), (block, 128), (0, len(image))]
    for _ in range(rnd.choice([1, 1, 2, 5, 30])):
        start, length = rnd.choice(places)
        at = start + rnd.randrange(length)
        if at + 8 > len(image):
            continue
        if rnd.random() < 0.6:
            image[at] ^= 1 << rnd.randrange(8)
        else:
            value = rnd.choice([0, 1, 1 << 63, (1 << 64) - 1, rnd.getrandbits(64)])
            target = rnd.choice([header.l1_offset, header.refcount_table_offset, entry, block, 0])
            value = rnd.choice([value, target | 1 << 63, target, value & 0xFFFF0000])
            at = at // 8 * 8
            image[at : at + 8] = value.to_bytes(8)


async def use(image: Path, rnd: random.Random, read_only: bool) -> None:
    """Whatever comes of it, it is an error of the block layer, or none."""
    graph = BlockGraph(DRIVERS)
    words = f"qcow2,backing.driver=null-co,read-only={'on' if read_only else 'off'},discard=unmap"
    try:
        node = await graph.add(f"{words},file.driver=file,file.filename={image}")
    except (ConfigError, BlockError):
        await graph.close_all()
        return
    backend = BlockBackend(node, "the guest", writable=not read_only)
    size = min(node.length, SIZE)
    for _ in range(15):
        length = min(rnd.choice([512, 4096, 65536]), size)
        offset = rnd.randrange(0, size - length + 1) // 512 * 512 if size else 0
        kind = rnd.choice("r" if read_only else "wwczudfr")
        try:
            if kind == "r":
                await read(backend, offset, length)
            elif kind == "w":
                await backend.pwritev(offset, IoVec.of(b"\x09" * length))
            elif kind == "c":
                memory = IoVec.of(b"\x09" * min(node.cluster_size, size - size // 2))
                start = align_down(offset // 2, node.cluster_size)
                await backend.pwritev(start, memory, int(Req.WRITE_COMPRESSED))
            elif kind == "d":
                await backend.pdiscard(offset, length)
            elif kind == "f":
                await backend.flush()
            else:
                await backend.pwrite_zeroes(offset, length, may_unmap=kind == "u")
            await backend.extents(offset, length)
        except BlockError:
            pass
    await backend.close()
    await graph.close_all()


@pytest.mark.parametrize("shape", [*SHAPES, "compressed", "snapshot", "version 2"])
def test_damaged_images_give_errors_and_nothing_else(
    tmp_path: Path, shape: str, expect_log: ExpectedLog
) -> None:
    expect_log.allow("image is corrupt", "close failed", "features that nobody")
    image = tmp_path / "i.qcow2"
    room = _room()
    words = ["-o", {"version 2": "compat=0.10"}.get(shape, SHAPES.get(shape, "cluster_size=4k"))]
    create(image, SIZE, *words)
    qemu_io(image, "write -P 3 0 300k", "write -z 500k 64k", "write -P 4 1M 10k")
    if shape == "snapshot":
        qemu_img("snapshot", "-c", "s", image)
        qemu_io(image, "write -P 5 100k 100k")
    if shape == "compressed":
        qemu_img("convert", "-c", "-O", "qcow2", *words, image, tmp_path / "c")
        (tmp_path / "c").rename(image)
    good = image.read_bytes()
    start, number = time.monotonic(), 0
    while number < _IMAGES or time.monotonic() - start < FUZZ_SECONDS:
        seed = _SEED * 1000 + number
        rnd = random.Random(seed)
        number += 1
        bad = bytearray(good)
        damage(bad, rnd)
        for read_only in (True, False):
            image.write_bytes(bad)
            try:
                asyncio.run(asyncio.wait_for(use(image, rnd, read_only), _LONGEST))
            except BaseException as error:
                error.add_note(f"seed: {seed}, read-only: {read_only}")
                raise
            if read_only:
                assert image.read_bytes() == bytes(bad)
        check_and_repair(image, bytes(bad), rnd, seed)
    # What no image of this size may make us use.
    assert _room() - room < 256 << 20


def _room() -> int:
    """The most memory that this process has used so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def check_and_repair(image: Path, bad: bytes, rnd: random.Random, seed: int) -> None:
    """Neither a check nor a repair does anything but that; what a repair calls whole can be used."""
    image.write_bytes(bad)
    before = content_of(image)
    try:
        found = our_check(image)
        assert image.read_bytes() == bad
        fix = rnd.choice([CheckMode.FIX_LEAKS, CheckMode.FIX_ERRORS, ALL_MODES, ALL_MODES])
        repaired = our_check(image, int(fix))
        again = our_check(image)
        # Tables take less than the file has already, and the old counts; no hole of any size is made.
        assert image.stat().st_size < 2 * len(bad) + (1 << 20)
        if fix & CheckMode.FIX_ERRORS and not found.check_errors:
            assert again.corruptions <= found.corruptions
        if repaired.is_clean:
            assert again.is_clean, again.messages
        if before is not None and not repaired.check_errors:
            after = content_of(image)
            assert after is not None
            for at in range(0, len(before), 512):
                # A table that is said to be guest data may change; guest data may not.
                if len(set(before[at : at + 512])) == 1:
                    assert after[at : at + 512] == before[at : at + 512], at
    except ConfigError:
        assert image.read_bytes() == bad
    except BaseException as error:
        error.add_note(f"seed: {seed}, check")
        raise


def content_of(image: Path) -> bytes | None:
    """What the disk shows to us; None: that cannot be said."""
    found: list[bytes] = []

    async def look(backend: BlockBackend) -> None:
        found.append(await read(backend, 0, min(backend.length, SIZE)))

    options = {"driver": "qcow2", "read-only": True, "backing.driver": "null-co"}
    try:
        with_image(image, look, **options)
    except (ConfigError, BlockError):
        return None
    return found[0]


@pytest.mark.parametrize("target", ["L1", "reference counts"])
def test_cluster_that_is_said_to_be_where_a_table_is_is_not_written(
    tmp_path: Path, target: str, expect_log: ExpectedLog
) -> None:
    expect_log.expect("image is corrupt: Preventing invalid write")
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_io(image, "write 0 64k")
    data = bytearray(image.read_bytes())
    header = Header.parse(bytes(data[:65536]))
    place = {"L1": header.l1_offset, "reference counts": 0x20000}[target]
    table = int.from_bytes(data[header.l1_offset :][:8]) & ((1 << 56) - 512)
    data[table : table + 8] = (place | 1 << 63).to_bytes(8)
    image.write_bytes(data)

    async def run() -> None:
        graph = BlockGraph(DRIVERS)
        node = await graph.add(f"qcow2,discard=unmap,file.driver=file,file.filename={image}")
        backend = BlockBackend(node, "the guest", writable=True)
        with pytest.raises(BlockError, match="corrupt"):
            await backend.pwritev(0, IoVec.of(bytes(4096)))
        with pytest.raises(BlockError):
            await backend.pdiscard(0, 65536)
        await backend.close()
        await graph.close_all()

    asyncio.run(run())
    after = image.read_bytes()
    assert after[place : place + 65536] == bytes(data[place : place + 65536])
    assert Header.parse(after[:65536]).incompatible & Incompatible.CORRUPT


def test_read_that_finds_damage_marks_a_writable_image_and_ends_all_writes(
    tmp_path: Path, expect_log: ExpectedLog
) -> None:
    """As in QEMU, which also ends all reads."""
    expect_log.expect("image is corrupt")
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_io(image, "write -P 5 0 64k", "write -P 6 1M 64k")
    data = bytearray(image.read_bytes())
    header = Header.parse(bytes(data[:65536]))
    table = int.from_bytes(data[header.l1_offset :][:8]) & ((1 << 56) - 512)
    data[table + 6] |= 2  # not aligned any more
    image.write_bytes(data)

    async def use_it(backend: BlockBackend) -> None:
        with pytest.raises(BlockError, match="corrupt"):
            await read(backend, 0, 4096)
        assert await read(backend, MIB, 4096) == b"\6" * 4096
        if not backend.node.read_only:
            for offset in (MIB, MIB // 2):
                with pytest.raises(BlockError, match="corrupt"):
                    await backend.pwritev(offset, IoVec.of(bytes(4096)))

    with_image(image, use_it, **{"read-only": True})
    assert image.read_bytes() == bytes(data)
    with_image(image, use_it)
    after = image.read_bytes()
    assert Header.parse(after[:65536]).incompatible & Incompatible.CORRUPT
    assert after[len(after) // 2 :] == bytes(data[len(after) // 2 :])
    with pytest.raises(ConfigError, match="corrupt"):
        with_image(image, use_it)


def test_cluster_that_is_given_up_but_was_counted_as_free_marks_the_image(
    tmp_path: Path, expect_log: ExpectedLog
) -> None:
    expect_log.expect("was in use, but its reference count is 0")
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_io(image, "write -P 5 0 128k", "write -P 6 1M 64k")
    data = bytearray(image.read_bytes())
    cluster = len(data) // 65536 - 3
    data[0x20000 + 2 * cluster : 0x20002 + 2 * cluster] = bytes(2)
    image.write_bytes(data)

    async def discard(backend: BlockBackend) -> None:
        await backend.pdiscard(0, 65536)
        with pytest.raises(BlockError, match="corrupt"):
            await backend.flush()
        with pytest.raises(BlockError, match="corrupt"):
            await backend.pwritev(MIB // 2, IoVec.of(bytes(65536)))

    with_image(image, discard, discard="unmap")
    assert Header.parse(image.read_bytes()[:65536]).incompatible & Incompatible.CORRUPT
    assert our_check(image, int(ALL_MODES)).is_clean
    assert check(image) == ""


def test_clusters_that_cannot_be_settled_at_once_are_free_in_the_end(tmp_path: Path) -> None:
    """What counts them cannot be read for a while, after the tables were written."""
    image = create(tmp_path / "i.qcow2", 8 * MIB, "-o", "cluster_size=512,refcount_bits=64")
    qemu_io(image, "write -P 5 0 4M")

    async def run() -> None:
        async with faulty_disk(image, "refcount-cache-size=2048") as (faulty, backend):
            rnd = random.Random(3)
            for number in range(8):
                await backend.pdiscard(number * 512 * 1024, 512 * 1024)
                faulty.luck = rnd
                with contextlib.suppress(BlockError):
                    await backend.flush()
                faulty.luck = None
                no_worse_than_leaks(image, "-U")

    asyncio.run(run())
    assert check(image) == ""


def test_table_of_reference_counts_that_grows_while_requests_fail_loses_nothing(
    tmp_path: Path, expect_log: ExpectedLog
) -> None:
    """Of 512 bytes, so one of its clusters is for 2 MiB of the file."""
    expect_log.allow("close failed")
    size = 12 * MIB
    image = create(tmp_path / "i.qcow2", size, "-o", "cluster_size=512,refcount_bits=64")
    qemu_io(image, "write -P 5 0 1900k")
    content = contents(image, tmp_path)

    async def run() -> Guest:
        async with faulty_disk(image) as (faulty, backend):
            rnd = random.Random(7)
            guest = Guest(backend, content, rnd)
            faulty.odds = 0.02
            for _ in range(3):
                faulty.luck = rnd
                for _ in range(60):
                    await guest.request()
                faulty.luck = None
                await backend.flush()
                no_worse_than_leaks(image, "-U")
            guest.check(await read(backend, 0, size))
        return guest

    before = Header.parse(image.read_bytes()[:512]).refcount_table_clusters
    guest = asyncio.run(run())
    assert Header.parse(image.read_bytes()[:512]).refcount_table_clusters > before
    guest.check(contents(image, tmp_path))


@pytest.mark.parametrize(
    ("words", "is_protected"),
    [
        ({}, False),
        ({"overlap-check": "cached"}, False),
        ({"overlap-check": "all"}, True),
        ({"overlap-check.template": "all"}, True),
        ({"overlap-check.template": "all", "overlap-check.inactive-l2": False}, False),
        ({"overlap-check.template": "none", "overlap-check.inactive-l2": True}, True),
    ],
)
def test_table_of_a_snapshot_that_is_counted_as_free_is_protected_on_demand(
    tmp_path: Path, words: dict[str, object], is_protected: bool, expect_log: ExpectedLog
) -> None:
    expect_log.allow("Preventing invalid allocation")
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_io(image, "write -P 5 0 64k")
    qemu_img("snapshot", "-c", "s", image)
    qemu_io(image, "write -P 6 0 64k")
    data = bytearray(image.read_bytes())
    header = Header.parse(bytes(data[:65536]))
    l1 = int.from_bytes(data[header.snapshots_offset :][:8])
    table = int.from_bytes(data[l1 : l1 + 8]) & (1 << 56) - 512
    data[0x20000 + table // 65536 * 2 : 0x20002 + table // 65536 * 2] = bytes(2)
    image.write_bytes(data)

    async def write(backend: BlockBackend) -> None:
        # One by one: several would be placed together, where there is room for all.
        async def write_all() -> None:
            for at in range(6):
                await backend.pwritev(MIB + at * 65536, IoVec.of(b"\7" * 65536))

        if is_protected:
            with pytest.raises(BlockError, match="corrupt"):
                await write_all()
        else:
            await write_all()

    with_image(image, write, **words)
    is_whole = image.read_bytes()[table : table + 65536] == bytes(data[table : table + 65536])
    assert is_whole is is_protected


def test_overlap_checks_that_nobody_knows_or_that_contradict_are_refused(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", SIZE)

    async def nothing(backend: BlockBackend) -> None:
        pass

    for words in (
        {"overlap-check": "some"},
        {"overlap-check.tables": True},
        {"overlap-check": "all", "overlap-check.template": "none"},
        {"overlap-check.active-l1": "maybe"},
    ):
        with pytest.raises(ConfigError, match="overlap-check"):
            with_image(image, nothing, **words)
