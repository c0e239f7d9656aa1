"""Random requests on nodes with odd limits, against a plain byte array: contents, durability, concurrency."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedule import HUNT
from tests.unit.block.fakes import ArrayNode, PassNode, put_above, turns
from vhostblk.block import clear, pipeline
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import BlockLimits
from vhostblk.block.node import Req

SIZE = 4 * 1024
FUA = int(Req.FUA)


@st.composite
def limits(draw: st.DrawFn) -> BlockLimits:
    """Every limit that a driver may state, small enough to matter."""
    align = draw(st.sampled_from([1, 2, 64, 512, 1024]))

    def optional(unit: int) -> int:
        return unit * draw(st.integers(0, 7))

    zero_unit, discard_unit = optional(align), optional(align)
    memory = draw(st.sampled_from([1, 1, 4, 512]))
    return BlockLimits(
        request_alignment=align,
        max_transfer=draw(st.integers(0, 3)) * align + draw(st.integers(0, align - 1))
        if draw(st.booleans())
        else optional(align),
        pwrite_zeroes_alignment=zero_unit,
        max_pwrite_zeroes=optional(max(zero_unit, align)),
        pdiscard_alignment=discard_unit,
        max_pdiscard=optional(max(discard_unit, align)),
        min_mem_alignment=memory,
        max_iov=draw(st.integers(1, 4)),
    )


def valid(limits: BlockLimits) -> bool:
    return not limits.max_transfer or limits.max_transfer >= limits.request_alignment


def cut(content: bytes, at: list[int], shift: int) -> IoVec:
    """The content as a vector: in mapped memory, shifted against the page, cut at the given places."""
    memory = memoryview(mmap.mmap(-1, len(content) + shift + 1))
    memory[shift : shift + len(content)] = content
    places = sorted({0, len(content), *(place % (len(content) + 1) for place in at)})
    return IoVec([memory[shift + a : shift + b] for a, b in pairwise(places)])


@dataclass(frozen=True)
class Step:
    """One request of a script."""

    kind: str
    offset: int
    length: int
    flags: int
    value: int
    cuts: tuple[int, ...]
    shift: int


steps = st.builds(
    Step,
    kind=st.sampled_from(["read", "write", "write", "zero", "discard", "flush"]),
    offset=st.integers(0, SIZE - 1),
    length=st.integers(0, SIZE),
    flags=st.sampled_from([0, 0, FUA, int(Req.MAY_UNMAP), int(Req.SERIALISING)]),
    value=st.integers(1, 255),
    cuts=st.lists(st.integers(0, SIZE), max_size=5).map(tuple),
    shift=st.sampled_from([0, 0, 1, 4]),
)


def pattern(value: int, length: int) -> bytes:
    return (bytes((value + position) % 255 + 1 for position in range(255)) * 17)[:length]


@settings(max_examples=150 * HUNT)
@given(
    limits().filter(valid),
    st.lists(steps, max_size=12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_script_on_any_limits_behaves_like_a_byte_array(
    own: BlockLimits, script: list[Step], fua: bool, zeroes: bool, filtered: bool
) -> None:
    node = ArrayNode(SIZE, own, write_flags=FUA * fua, zeroes=zeroes)
    top = put_above(node) if filtered else node
    model = bytearray(SIZE)

    async def scenario() -> None:
        for step in script:
            start = step.offset
            end = min(step.offset + step.length, SIZE)
            if step.kind == "read":
                iov = cut(b"\xee" * (end - start), list(step.cuts), step.shift)
                await pipeline.preadv(top.lane, start, iov)
                assert iov.tobytes() == model[start:end]
            elif step.kind == "write":
                content = pattern(step.value, end - start)
                flags = step.flags & ~int(Req.MAY_UNMAP)
                iov = cut(content, list(step.cuts), step.shift)
                await pipeline.pwritev(top.lane, start, iov, flags)
                model[start:end] = content
                if flags & FUA:
                    assert node.durable[start:end] == content
            elif step.kind == "zero":
                await clear.pwrite_zeroes(top, start, end - start, step.flags)
                model[start:end] = bytes(end - start)
                if step.flags & FUA:
                    assert not any(node.durable[start:end])
            elif step.kind == "discard":
                await clear.pdiscard(top, start, end - start)
                # What a discarded range holds is nobody's business; all around it must be as it was.
                model[start:end] = node.data[start:end]
            else:
                await pipeline.flush(top)
                assert node.durable == node.data
            assert node.data[:SIZE] == model
        assert top.length == node.length == SIZE
        assert not node.in_flight
        assert not top.in_flight
        assert not node.tracker.requests

    asyncio.run(scenario())


@dataclass(frozen=True)
class Concurrent:
    """One of several requests that run side by side."""

    kind: str
    offset: int
    length: int
    start_after: int
    serialising: bool


concurrent = st.builds(
    Concurrent,
    kind=st.sampled_from(["write", "write", "write", "zero", "read"]),
    offset=st.integers(0, 300),
    length=st.integers(1, 200),
    start_after=st.integers(0, 6),
    serialising=st.booleans(),
)


@settings(max_examples=150 * HUNT)
@given(
    st.lists(concurrent, min_size=2, max_size=8),
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
    st.sampled_from([1, 32, 64, 128]),
)
def test_overlapping_unaligned_writes_lose_nobodys_bytes(
    requests: list[Concurrent], pauses: list[int], align: int
) -> None:
    """Each byte ends as one of those who wrote it left it, and who wrote alone is not undone by a neighbour."""
    node = ArrayNode(512, BlockLimits(request_alignment=align, min_mem_alignment=1))
    node.data[:] = b"\xff" * 512
    schedule: Iterator[int] = iter(pauses * 100)

    async def pause() -> None:
        await turns(next(schedule))

    node.pause = pause

    async def one(number: int, request: Concurrent) -> None:
        await turns(request.start_after)
        flags = int(Req.SERIALISING) if request.serialising else 0
        if request.kind == "write":
            content = bytes([number + 1]) * request.length
            await pipeline.pwritev(node.lane, request.offset, IoVec.of(content), flags)
        elif request.kind == "zero":
            await clear.pwrite_zeroes(node, request.offset, request.length, flags)
        else:
            await pipeline.preadv(node.lane, request.offset, IoVec.of(bytearray(request.length)))

    async def scenario() -> None:
        everything = asyncio.gather(*(one(n, request) for n, request in enumerate(requests)))
        await asyncio.wait_for(everything, 20)

    asyncio.run(scenario())
    for position in range(512):
        allowed = {
            number + 1 if request.kind == "write" else 0
            for number, request in enumerate(requests)
            if request.kind != "read"
            and request.offset <= position < request.offset + request.length
        }
        assert node.data[position] in (allowed or {0xFF}), position
    assert not node.in_flight
    assert not node.tracker.serialising


class Engine:
    """Stands in for the native engine: writes whole blocks through extents, and gives them back when asked."""

    def __init__(self, node: ArrayNode, above: PassNode) -> None:
        self.node = node
        self.busy: set[tuple[int, int]] = set()
        self.idle = asyncio.Condition()
        above.child_revoke = self.child_revoke  # type: ignore[method-assign]

    async def child_revoke(self, edge: Edge, offset: int, length: int) -> None:
        while any(a < offset + length and offset < b for a, b in self.busy):
            await turns(1)

    async def write(self, offset: int, content: bytes, delay: int) -> bool:
        """Write without asking, if the block layer says one may; False: it does not."""
        end = offset + len(content)
        if not self.node.mappable(offset, len(content)):
            return False
        self.busy.add((offset, end))
        await turns(delay)
        self.node.data[offset:end] = content
        self.busy.discard((offset, end))
        return True


@settings(max_examples=100 * HUNT)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 500), st.integers(1, 100)), min_size=1, max_size=6),
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
)
def test_engine_and_read_modify_write_do_not_undo_each_other(
    engine_writes: list[tuple[int, int]],
    pipeline_writes: list[tuple[int, int]],
    pauses: list[int],
) -> None:
    async def scenario() -> None:
        node = ArrayNode(1024, BlockLimits(request_alignment=128, min_mem_alignment=1))
        node.data[:] = b"\xff" * 1024
        above = put_above(node)
        engine = Engine(node, above)
        schedule = iter(pauses * 100)

        async def pause() -> None:
            await turns(next(schedule))

        node.pause = pause
        written: list[tuple[int, int, int]] = []

        async def by_engine() -> None:
            for number, (block, delay) in enumerate(engine_writes):
                value = 100 + number
                # Half a block, as the rules for extents would allow with an alignment of 64.
                offset = block * 128
                if await engine.write(offset, bytes([value]) * 64, delay):
                    written.append((offset, offset + 64, value))
                await turns(1)

        async def by_pipeline() -> None:
            for number, (offset, length) in enumerate(pipeline_writes):
                content = bytes([number + 1]) * length
                await pipeline.pwritev(node.lane, offset, IoVec.of(content))
                written.append((offset, offset + length, number + 1))

        await asyncio.wait_for(asyncio.gather(by_engine(), by_pipeline()), 20)
        for position in range(1024):
            allowed = {value for start, end, value in written if start <= position < end}
            assert node.data[position] in (allowed or {0xFF}), position

    asyncio.run(scenario())
