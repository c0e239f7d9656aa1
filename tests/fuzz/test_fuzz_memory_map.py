"""Invariant: whatever happens to a memory map while requests run, each of them is right, or fails and touches nothing.

One may fail if some map since it was made lacked a byte of it, and succeed if some had all. Impossible maps are refused
and change nothing; the log of dirty memory, if there is one, has the pages of every read that was done.

A map is a set of ranges of pages. Pages that have the same address are always the same memory, so the model is: which
pages there are. Rings, headers and status bytes are in a region that is there all the time, in SET_MEM_TABLE, too.
Reads are compared with the disk, whose contents never change: a write writes what is there.
VHOSTBLK_FUZZ_SECONDS makes all cases together run for about that long.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from dataclasses import dataclass
from types import TracebackType

import pytest

from tests.daemons import BOTH_PATHS, SERIAL, Disks
from tests.memory_load import Distant, DistantLoad
from tests.schedule import HUNT
from vhostblk.client.client import FEATURES, Client
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.errors import PeerError
from vhostblk.vhost.message import MemoryRegion
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature

PAGE = 4096
PAGES = 64
GPA = 1 << 40
UVA = 0x5A << 40
SHIFT = 3 * PAGE  # where the first page is in the file
DISK = 1 << 20
STEPS = 500 * HUNT
SECONDS = float(os.environ.get("VHOSTBLK_FUZZ_SECONDS", "0")) / 12

Range = tuple[int, int]
"""First page, and how many."""


@dataclass
class Expectation:
    """What may become of a request."""

    kind: int
    offset: int
    start: int
    """Bytes behind GPA, as are ..."""
    length: int
    pages: frozenset[int]
    may_fail: bool
    may_succeed: bool


class Model:
    """A front-end, the map it has given, and requests in flight."""

    def __init__(self, client: Client, seed: int) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.map: set[Range] = set()
        self.load = DistantLoad(client)
        self.flying: dict[Distant, Expectation] = {}
        self.outcomes: dict[str, int] = {}
        self.file = os.memfd_create("map")
        os.ftruncate(self.file, SHIFT + PAGES * PAGE)
        self.memory = mmap.mmap(self.file, SHIFT + PAGES * PAGE)
        self.disk = bytes(self.random.randbytes(DISK))
        client.write(0, self.disk)
        self.log: mmap.mmap | None = None
        self.dirty: set[int] = set()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.memory.close()
        if self.log is not None:
            self.log.close()
        os.close(self.file)

    def log_writes(self) -> None:
        """Have the pages that the back-end writes marked."""
        size = (GPA // PAGE + PAGES) // 8
        file = os.memfd_create("log")
        os.ftruncate(file, size)
        control = self.client.control
        control.ask(control.frontend.set_log_base(size, 0, file))
        control.set_features(control.features | Feature.VHOST_F_LOG_ALL)
        self.log = mmap.mmap(file, size)
        os.close(file)

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    # ---------------------------------------------------------------- the map

    def region(self, pages: Range) -> MemoryRegion:
        start = pages[0] * PAGE
        return MemoryRegion(GPA + start, pages[1] * PAGE, UVA + start, SHIFT + start)

    def mapped(self) -> set[int]:
        return {page for first, count in self.map for page in range(first, first + count)}

    def use(self, ranges: set[Range]) -> None:
        """Whatever is in flight was made before, or after, this."""
        self.map = ranges
        there = self.mapped()
        for expected in self.flying.values():
            if expected.pages <= there:
                expected.may_succeed = True
            else:
                expected.may_fail = True

    def some(self) -> Range:
        first = self.random.randrange(PAGES)
        return first, self.random.randint(1, min(12, PAGES - first))

    def clashes(self, new: Range, ranges: set[Range]) -> bool:
        return any(new[0] < a + n and a < new[0] + new[1] for a, n in ranges)

    def add(self) -> None:
        new = self.some()
        message = self.client.control.frontend.add_mem_reg(self.region(new), self.file)
        if self.clashes(new, self.map):
            self.refused(message)
        else:
            self.client.control.ask(message)
            self.use(self.map | {new})
            self.count("added")

    def remove(self) -> None:
        gone = self.random.choice([*self.map, self.some()])
        message = self.client.control.frontend.rem_mem_reg(self.region(gone))
        if gone not in self.map:
            self.refused(message)
        else:
            self.client.control.ask(message)
            self.use(self.map - {gone})
            self.count("removed")

    def replace(self) -> None:
        """SET_MEM_TABLE: some of what was there, and some that was not."""
        ranges = {pages for pages in self.map if self.random.random() < 0.6}
        for _ in range(self.random.randrange(4)):
            if not self.clashes(new := self.some(), ranges):
                ranges.add(new)
        ranges = set(self.random.sample(sorted(ranges), min(len(ranges), 7)))
        (home,) = self.client.memory.regions
        regions = [self.region(pages) for pages in ranges] + [home.description]
        files = [self.file] * len(ranges) + [home.fd]
        self.client.control.ask(self.client.control.frontend.set_mem_table(regions, files))
        self.use(ranges)
        self.count("replaced")

    def lie(self) -> None:
        """A region that cannot be."""
        good = self.region(self.some())
        top = 2**64 - PAGE
        bad = self.random.choice(
            [
                MemoryRegion(good.gpa, 0, good.uva, good.mmap_offset),
                MemoryRegion(top, 2 * PAGE, good.uva, 0),
                MemoryRegion(1 << 50, 2 * PAGE, top, 0),
                MemoryRegion(1 << 50, PAGE, good.uva, SHIFT + PAGES * PAGE),
                MemoryRegion(1 << 50, 1 << 40, good.uva, 0),
                MemoryRegion(1 << 50, PAGE, good.uva, top),
                MemoryRegion(self.client.memory.regions[0].gpa, PAGE, good.uva, 0),
            ]
        )
        frontend = self.client.control.frontend
        if self.random.random() < 0.5:
            self.refused(frontend.add_mem_reg(bad, self.file))
        else:
            (home,) = self.client.memory.regions
            table = [home.description, bad, self.region((0, 1))]
            self.refused(frontend.set_mem_table(table, [home.fd, self.file, self.file]))

    def refused(self, message: object) -> None:
        with pytest.raises(PeerError):
            self.client.control.ask(message)  # type: ignore[arg-type]
        self.count("refused")

    # ---------------------------------------------------------------- requests

    def submit(self) -> None:
        length = 512 * self.random.randint(1, 40)
        start = self.random.randrange(PAGES * PAGE - length)
        if self.random.random() < 0.7:
            start &= -512
        pages = frozenset(range(start // PAGE, (start + length - 1) // PAGE + 1))
        taken = {page for expected in self.flying.values() for page in expected.pages}
        if pages & taken or not self.load.has_room:
            self.take()
            return
        kind = self.random.choice((RequestType.IN, RequestType.OUT))
        offset = 512 * self.random.randrange((DISK - length) // 512)
        self.view(
            start, length, b"#" * length if kind == RequestType.IN else self.on(offset, length)
        )
        there = pages <= self.mapped()
        cut = self.random.randrange(length + 1)
        data = [Buffer(GPA + start, cut), Buffer(GPA + start + cut, length - cut)]
        request = self.load.submit(kind, offset, [piece for piece in data if piece.length])
        self.flying[request] = Expectation(kind, offset, start, length, pages, not there, there)

    def view(self, start: int, length: int, write: bytes = b"") -> bytes:
        at = slice(SHIFT + start, SHIFT + start + length)
        if write:
            self.memory[at] = write
        return self.memory[at]

    def on(self, offset: int, length: int) -> bytes:
        return self.disk[offset : offset + length]

    def take(self) -> None:
        for request in self.load.poll():
            self.check(request)

    def check(self, request: Distant) -> None:
        expected = self.flying.pop(request)
        found = self.view(expected.start, expected.length)
        on_disk = self.on(expected.offset, expected.length)
        if request.status == Status.OK:
            assert expected.may_succeed, expected
            assert found == on_disk, expected
            self.dirty |= expected.pages if expected.kind == RequestType.IN else set()
        else:
            assert request.status == Status.IOERR
            assert expected.may_fail, expected
            poison = b"#" * expected.length
            assert found == (poison if expected.kind == RequestType.IN else on_disk), expected
        self.count("read" if expected.kind == RequestType.IN else "written")
        self.count("done" if request.status == Status.OK else "failed")

    def step(self) -> None:
        deed = self.random.choices(
            [self.submit, self.take, self.add, self.remove, self.replace, self.lie],
            [60, 6, 14, 8, 2, 4],
        )[0]
        deed()

    def finish(self) -> None:
        self.load.finish(self.check)
        assert not self.flying
        if self.log is not None:
            marks = int.from_bytes(self.log[GPA // PAGE // 8 :], "little")
            assert all(marks >> page & 1 for page in self.dirty)
        assert self.client.read(0, DISK) == self.disk
        assert self.client.get_id() == SERIAL
        with pytest.raises(BlockingIOError):
            os.eventfd_read(self.client.queues[0].err_fd)


@BOTH_PATHS
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize(
    ("export", "logged"),
    [("disk", False), ("direct", True), ("pinned", False)],
    ids=["disk", "direct-logged", "pinned"],
)
def test_any_order_of_changes_keeps_the_invariant(
    disks: Disks, export: str, logged: bool, packed: bool
) -> None:
    features = FEATURES & ~Feature.VIRTIO_F_INDIRECT_DESC
    features |= Feature.VIRTIO_F_RING_PACKED if packed else 0
    seed = random.randrange(2**32) if SECONDS or HUNT > 1 else 1
    print(f"seed {seed}")
    disks.max_lines = 2 * STEPS + 60  # refusals are told of once for each kind and session
    memory = SharedMemory([8 << 20])
    with (
        disks.connect(export, features=features, memory=memory, strict=False) as client,
        Model(client, seed) as model,
    ):
        if logged:
            model.log_writes()
        steps, deadline = 0, time.monotonic() + SECONDS
        while steps < STEPS or time.monotonic() < deadline:
            model.step()
            steps += 1
        model.finish()
        print(model.outcomes)
        assert min(model.outcomes[name] for name in ("added", "removed", "replaced", "refused")) > 3
        assert min(model.outcomes[name] for name in ("done", "failed", "read", "written")) > 10
