"""The power goes, at any moment of a random workload on a qcow2 image.

Every write and flush that reaches the image's file is recorded. A state after a crash has all that was written before
the last flush, and of what came later any subset, sectors of it torn. In each state `qemu-img check` finds leaks at
worst, and what a completed flush has promised is there; so are internal snapshots, whole or not at all.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
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
    with_image,
)
from vhostblk.block.amend import amend
from vhostblk.block.backend import BlockBackend
from vhostblk.block.dirty_bitmap import add_bitmap, find_bitmap, remove_bitmap
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.drivers.qcow2.header import Header, Incompatible
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.flags import Preallocation, Req
from vhostblk.block.graph import BlockGraph
from vhostblk.block.internal_snapshot import create_snapshot, delete_snapshot, go_to_snapshot
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import align_down, align_up
from vhostblk.block.opening import open_image
from vhostblk.block.permissions import Perm

STATES = int(os.environ.get("VHOSTBLK_CRASH_STATES", "25"))
"""Of each workload."""
SECTOR = 512
FLUSH = None
Entry = tuple[int, bytes] | int | None
"""A write, a length of the file, or a flush."""
Recording = list[Entry]


class Recorder(FilterNode):
    """Writes down what reaches the file."""

    driver_name = "recorder"
    log: Recording

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        self.log.append((offset, iov.tobytes()))
        await self.file.pwritev(offset, iov, flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        self.log.append((offset, bytes(length)))
        await self.file.pwrite_zeroes(offset, length, flags)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        self.log.append((offset, bytes(length)))
        await self.file.pdiscard(offset, length)

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        self.log.append(length)
        await self.file.truncate(length, preallocation)

    async def driver_flush_to_disk(self) -> None:
        # Whatever has completed is on the disk when this returns; what is in flight, nobody knows.
        self.log.append(FLUSH)


class Promise:
    """What the disk shows since a flush that has completed, but for what was touched later.

    Attributes: at: entries of the log when the flush completed. touched: when (entries of the log), and where.
    """

    def __init__(self, at: int, content: bytes) -> None:
        self.at = at
        self.content = content
        self.touched: list[tuple[int, int, int]] = []


@dataclass(frozen=True)
class SnapshotsChange:
    """From entry `start` of the log on there may be these, from `done` on there are: what each one shows."""

    start: int
    done: int
    after: dict[str, bytes]


AMENDS = (
    "compat=0.10,refcount_bits=16,lazy_refcounts=off",
    "compat=1.1",
    "compat=1.1,lazy_refcounts=on",
    "compat=1.1,refcount_bits=1",
    "compat=1.1,refcount_bits=64,lazy_refcounts=off",
    "compat=1.1,refcount_bits=8",
)


class Workload:
    """One guest request after the other, with flushes between.

    Args: kinds: of requests; some come more often.
    """

    sessions = 1
    """How often the image is opened."""

    def __init__(self, image: Path, content: bytes, seed: int, kinds: str) -> None:
        self.before = image.read_bytes()
        self.log: Recording = []
        self.promises = [Promise(0, content)]
        self._model = bytearray(content)
        self._rnd = random.Random(seed)
        self._kinds = kinds
        self.snapshots = [SnapshotsChange(0, 0, {})]
        for _ in range(self.sessions):
            asyncio.run(self._run(image))

    async def _run(self, image: Path) -> None:
        # What opening writes counts, too.
        recorder = type("RecorderOfThis", (Recorder,), {"log": self.log})
        graph = BlockGraph({**DRIVERS, "recorder": recorder})
        file = f"file.driver=recorder,file.file.driver=file,file.file.filename={image}"
        node = await graph.add(f"qcow2,node-name=d,discard=unmap,{file}")
        backend = BlockBackend(node, "the guest", writable=True, resize=True, shared=Perm.ALL)
        self._graph, self._node = graph, node
        for _ in range(60 // self.sessions):
            await self._request(backend)
        await backend.close()
        await graph.close_all()

    async def _request(self, backend: BlockBackend) -> None:
        rnd = self._rnd
        length = rnd.choice([SECTOR, 4096, 65536, 150 * 1024])
        offset = rnd.randrange(0, len(self._model) - length + 1) // SECTOR * SECTOR
        kind = rnd.choice(self._kinds)
        if kind == "r":
            await self._resize(backend)
            return
        if kind == "a":
            await amend(self._graph, self._node, rnd.choice(AMENDS))
            return
        if kind in "SDGBR":
            await self._change(kind)
            return
        if kind == "c":
            unit = backend.node.cluster_size
            offset, length = align_down(offset, unit), align_up(length, unit)
        end = offset + length
        if kind == "f":
            # What had completed when it began is what it promises.
            content = bytes(self._model)
            await backend.flush()
            self.promises.append(Promise(len(self.log), content))
            return
        for promise in self.promises:
            promise.touched.append((len(self.log), offset, end))
        if kind in "wc":
            flags = int(Req.WRITE_COMPRESSED) if kind == "c" else 0
            data = rnd.randbytes(length // 4 * (kind == "c"))
            data = data.ljust(length, bytes([rnd.randrange(1, 256)]))
            if kind == "w" and rnd.random() < 0.5:
                # As the engine does; some that it has prepared it never writes.
                elsewhere = rnd.randrange(len(self._model) - SECTOR)
                await backend.prepare_writes([(offset, end), (elsewhere, elsewhere + SECTOR)])
            await backend.pwritev(offset, IoVec.of(data), flags)
            self._model[offset:end] = data
        elif kind == "d":
            await backend.pdiscard(offset, length)
            buffer = bytearray(length)
            await backend.preadv(offset, IoVec.of(buffer))
            self._model[offset:end] = buffer
        else:
            await backend.pwrite_zeroes(offset, length, may_unmap=kind == "u")
            self._model[offset:end] = bytes(length)

    async def _change(self, kind: str) -> None:
        await self._change_snapshots(kind)

    async def _change_snapshots(self, kind: str) -> None:
        """Make one, delete one, or go back to one."""
        start, there = len(self.log), dict(self.snapshots[-1].after)
        name = self._rnd.choice([*there, ""])
        if kind == "S" and len(there) < 3:
            name = f"snapshot {len(self.snapshots)}"
            await create_snapshot(self._graph, self._node, name)
            there[name] = bytes(self._model)
        elif kind == "D" and name:
            await delete_snapshot(self._graph, self._node, name=name)
            del there[name]
        elif kind == "G" and name:
            for promise in self.promises:
                promise.touched.append((start, 0, len(self._model)))
            await go_to_snapshot(self._graph, self._node, name)
            self._model[:] = there[name]
        else:
            return
        self.promises.append(Promise(len(self.log), bytes(self._model)))
        self.snapshots.append(SnapshotsChange(start, len(self.log), there))

    def check_snapshots(self, end: int, image: Path, folder: Path) -> None:
        """There are those before or those after what was being done, and each shows what it should."""
        found = json.loads(qemu_img("info", "--output=json", image)).get("snapshots", [])
        names = {one["name"] for one in found}
        last = max(n for n, change in enumerate(self.snapshots) if change.done <= end)
        allowed = [
            c.after for c in self.snapshots[last : last + 2] if c.done <= end or c.start < end
        ]
        assert names in [set(after) for after in allowed]
        for name in names:
            qemu_img("convert", "-l", f"snapshot.name={name}", "-O", "raw", image, folder / "shown")
            assert (folder / "shown").read_bytes() == allowed[-1].get(name, allowed[0].get(name))

    async def _resize(self, backend: BlockBackend) -> None:
        old, new = len(self._model), self._rnd.randrange(MIB // 2, 3 * MIB) // SECTOR * SECTOR
        for promise in self.promises:
            promise.touched.append((len(self.log), min(old, new), max(old, new)))
        mode = self._rnd.choice(list(Preallocation)) if new > old else Preallocation.OFF
        await backend.truncate(new, mode)
        del self._model[new:]
        self._model.extend(bytes(new - len(self._model)))

    def state(self, end: int, rnd: random.Random) -> bytes:
        """The file, if the power goes after so many entries of the log."""
        flushes = [at for at in range(end) if self.log[at] is FLUSH]
        safe = flushes[-1] if flushes else 0
        file = bytearray(self.before)
        for at, entry in enumerate(self.log[:end]):
            if isinstance(entry, int):
                if at < safe or rnd.random() < 0.5:
                    del file[entry:]
                    file.extend(bytes(entry - len(file)))
            elif entry is not None:
                for offset, data in self._survives(entry, at < safe, rnd):
                    if len(file) < offset + len(data):
                        file.extend(bytes(offset + len(data) - len(file)))
                    file[offset : offset + len(data)] = data
        return bytes(file)

    def _survives(
        self, entry: tuple[int, bytes], is_safe: bool, rnd: random.Random
    ) -> Iterator[tuple[int, bytes]]:
        offset, data = entry
        luck = rnd.random()
        if is_safe or luck < 0.4:
            yield entry
        elif luck < 0.6:
            for at in range(0, len(data), SECTOR):
                if rnd.random() < 0.5:
                    yield offset + at, data[at : at + SECTOR]

    def check(self, end: int, found: bytes) -> None:
        """The last promise that was made before is kept."""
        promise = [promise for promise in self.promises if promise.at <= end][-1]
        mask = bytearray(b"\1" * len(promise.content))
        for when, start, stop in promise.touched:
            if when <= end:
                stop = min(stop, len(mask))
                mask[start:stop] = bytes(max(stop - start, 0))
        for at in range(0, len(mask), SECTOR):
            if mask[at]:
                assert found[at : at + SECTOR] == promise.content[at : at + SECTOR], at


class BitmapWorkload(Workload):
    """The image is opened and closed, and bitmaps come and go."""

    sessions = 4

    async def _change(self, kind: str) -> None:
        there = [bitmap for bitmap in self._node.bitmaps if bitmap.name != "all"]
        if kind == "B" and len(there) < 4:
            name = f"bitmap {len(self.log)} {self._rnd.random()}"
            await add_bitmap(self._graph, self._node, name, 512, persistent=True)
        elif kind == "R" and there:
            await remove_bitmap(self._graph, self._rnd.choice(there))

    def check_bitmap(self, end: int, image: Path) -> None:
        """A bitmap that may be believed has all that was ever written."""
        written = {
            at
            for when, start, stop in self.promises[0].touched
            if when < end
            for at in range(start // 4096, (stop - 1) // 4096 + 1)
        }
        found, is_right = asyncio.run(_granules(image, "all"))
        assert not is_right or found >= written
        if end == len(self.log):
            assert is_right
            assert found == written


async def _granules(image: Path, name: str) -> tuple[set[int], bool]:
    graph = BlockGraph(DRIVERS)
    try:
        node = await open_image(graph, str(image), {"read-only": True})
        bitmap = find_bitmap(node, name)
        return {
            at // bitmap.granularity
            for start, length in bitmap.ranges()
            for at in range(start, start + length, bitmap.granularity)
        }, not bitmap.inconsistent
    finally:
        await graph.close_all()


SHAPES = {
    "usual": [],
    "small clusters": ["-o", "cluster_size=4k"],
    "subclusters": ["-o", "extended_l2=on"],
    "tiny clusters": ["-o", "cluster_size=512,refcount_bits=64"],
    "lazy": ["-o", "lazy_refcounts=on,cluster_size=4k"],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["alone", "overlay", "snapshot", "snapshots come and go"])
def test_no_crash_corrupts_an_image_or_loses_what_was_flushed(
    tmp_path: Path, shape: str, how: str
) -> None:
    image = tmp_path / "i.qcow2"
    words: list[object] = list(SHAPES[shape])
    if how == "overlay":
        (tmp_path / "base").write_bytes(random.Random(2).randbytes(MIB))
        words += ["-b", "base", "-F", "raw"]
    create(image, 2 * MIB, *words)
    if how == "snapshot":
        qemu_io(image, "write -P 200 100k 1M")
        qemu_img("snapshot", "-c", "s", image)
    seed = len(shape) + len(how)
    kinds = "wwwczdfSSDDG" if how == "snapshots come and go" else "wwwwzudffcc"
    workload = Workload(image, contents(image, tmp_path), seed, kinds)
    look_at_states(workload, image, seed, snapshots=how == "snapshots come and go")


@pytest.mark.parametrize("shape", ["small clusters", "subclusters", "version 2"])
def test_no_crash_while_a_disk_grows_or_shrinks_corrupts_it(tmp_path: Path, shape: str) -> None:
    image = tmp_path / "i.qcow2"
    words = SHAPES.get(shape) or ["-o", "compat=0.10,cluster_size=4k"]
    if shape == "subclusters":
        (tmp_path / "base").write_bytes(random.Random(2).randbytes(MIB))
        words = [*words, "-b", "base", "-F", "raw"]
    create(image, 2 * MIB, *words)
    kinds = "wwwwwuddfrrr"
    look_at_states(Workload(image, contents(image, tmp_path), len(shape), kinds), image, 3)


@pytest.mark.parametrize("how", ["alone", "overlay"])
def test_no_crash_while_an_image_is_amended_corrupts_it(tmp_path: Path, how: str) -> None:
    image = tmp_path / "i.qcow2"
    words: list[object] = ["-o", "cluster_size=4k"]
    if how == "overlay":
        (tmp_path / "base").write_bytes(random.Random(2).randbytes(MIB))
        words += ["-b", "base", "-F", "raw"]
    create(image, 2 * MIB, *words)
    look_at_states(Workload(image, contents(image, tmp_path), 7, "wwwwzudfaaa"), image, 4)


def look_at_states(workload: Workload, image: Path, seed: int, *, snapshots: bool = False) -> None:
    """Random moments; and the end."""
    rnd = random.Random(seed)
    ends = [rnd.randrange(len(workload.log) + 1) for _ in range(STATES)]
    for end in [*ends, len(workload.log)]:
        image.write_bytes(workload.state(end, rnd))
        if not is_dirty(image):
            no_worse_than_leaks(image)
        workload.check(end, contents(image, image.parent))
        if snapshots:
            workload.check_snapshots(end, image, image.parent)
        if is_dirty(image):
            # Whoever opens it for writing repairs it first.
            with_image(image, nothing)
            assert check(image) == ""
            workload.check(end, contents(image, image.parent))


def is_dirty(image: Path) -> bool:
    """Whether the header says that reference counts are wrong."""
    header = Header.parse(image.read_bytes()[:4096])
    return bool(header.incompatible & Incompatible.DIRTY)


async def nothing(backend: BlockBackend) -> None:
    """Open and close it."""


def test_lazy_image_is_marked_while_counts_are_put_off_and_not_after_it_was_closed(
    tmp_path: Path,
) -> None:
    image = create(tmp_path / "i.qcow2", 2 * MIB, "-o", "lazy_refcounts=on")
    workload = Workload(image, bytes(2 * MIB), 5, "wwwwzudff")
    end = len(workload.log)
    ends = range(0, end + 1, 3)
    dirty = []
    for at in [*ends, end]:
        image.write_bytes(workload.state(at, random.Random(at)))
        dirty.append(is_dirty(image))
    assert any(dirty)
    assert not dirty[0]
    assert not dirty[-1]
    assert check(image) == ""
    # From the first to the last time nothing but the end clears it.
    first = dirty.index(True)
    assert all(dirty[first:-4])


@pytest.mark.parametrize("how", ["opened", "repaired", "opened by QEMU"])
def test_image_that_was_killed_while_counts_were_put_off_is_repaired(
    tmp_path: Path, how: str
) -> None:
    image = create(tmp_path / "i.qcow2", 2 * MIB, "-o", "lazy_refcounts=on")
    if how == "opened by QEMU":
        workload = Workload(image, bytes(2 * MIB), 6, "wwwwzudff")
        flushes = [at for at, entry in enumerate(workload.log) if entry is FLUSH]
        image.write_bytes(workload.state(flushes[len(flushes) // 2], random.Random(1)))
        before = contents(image, tmp_path)
        assert is_dirty(image)
        qemu_io(image, "read 0 512")
        # For writing, that is.
        qemu_io(image, "write -P 1 0 512")
        before = b"\1" * 512 + before[512:]
    else:
        subprocess.run(
            ["qemu-io", "-c", "write -P 9 64k 500k", "-c", "flush", "-c", "sigraise 9", image],
            check=False,
            capture_output=True,
            timeout=60,
        )
        before = contents(image, tmp_path)
        assert is_dirty(image)
        assert before[65536] == 9
        if how == "opened":
            with_image(image, nothing)
        else:
            found = our_check(image, 3)
            assert found.is_clean
            assert found.corruptions_fixed
    assert not is_dirty(image)
    assert check(image) == ""
    assert contents(image, tmp_path) == before


@pytest.mark.parametrize("shape", ["usual", "small clusters", "tiny clusters"])
@pytest.mark.parametrize("how", ["alone", "overlay"])
def test_no_crash_makes_a_bitmap_that_is_wrong_look_right(
    tmp_path: Path, shape: str, how: str
) -> None:
    image = tmp_path / "i.qcow2"
    words: list[object] = list(SHAPES[shape])
    if how == "overlay":
        # A long name: the header does not fit into a sector.
        base = tmp_path / ("b" * 100)
        base.write_bytes(random.Random(2).randbytes(MIB))
        words += ["-b", base.name, "-F", "raw"]
    create(image, 2 * MIB, *words)
    qemu_img("bitmap", "--add", "-g", "4k", image, "all")
    workload = BitmapWorkload(image, contents(image, tmp_path), len(shape), "wwwzBRf")
    rnd = random.Random(len(shape))
    ends = [rnd.randrange(len(workload.log) + 1) for _ in range(STATES)]
    for end in [*ends, len(workload.log)]:
        image.write_bytes(workload.state(end, rnd))
        no_worse_than_leaks(image)
        workload.check(end, contents(image, tmp_path))
        workload.check_bitmap(end, image)
