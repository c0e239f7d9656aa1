"""One request on one node: validation, padding, splitting, bouncing, bookkeeping (rows B14 to B16)."""

from __future__ import annotations

import asyncio
import errno
import mmap
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.unit.block.fakes import ArrayNode, put_above, run_now, turns
from vhostblk.block import clear, pipeline
from vhostblk.block.iov import IoVec, address_of
from vhostblk.block.limits import MAX_BOUNCING, MAX_LENGTH, MAX_REQUEST, BlockLimits
from vhostblk.block.no_medium import NoMediumNode
from vhostblk.block.node import Req
from vhostblk.block.options import NodeOptions
from vhostblk.errors import BlockError

FOUR_K = BlockLimits(request_alignment=4096, min_mem_alignment=1)


def read(node: ArrayNode, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xee" * length)
    run_now(pipeline.preadv(node.lane, offset, IoVec.of(buffer)))
    return bytes(buffer)


def write(node: ArrayNode, offset: int, content: bytes, flags: int = 0) -> None:
    run_now(pipeline.pwritev(node.lane, offset, IoVec.of(content), flags))


def idle(node: ArrayNode) -> bool:
    return not node.in_flight and not node.tracker.requests and not node.tracker.serialising


# ---------------------------------------------------------------- validation


def test_aligned_request_is_one_driver_call_and_never_suspends() -> None:
    node = ArrayNode()
    write(node, 512, b"x" * 512)
    assert read(node, 512, 512) == b"x" * 512
    assert node.asked.calls == [("write", 512, 512, 0), ("read", 512, 512, 0)]
    assert idle(node)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_request_whose_driver_waits_is_in_sight_of_drains_and_of_others_until_it_ends(
    kind: str,
) -> None:
    node = ArrayNode()

    async def scenario() -> None:
        go_on = asyncio.Event()
        node.pause = go_on.wait
        request = pipeline.preadv if kind == "read" else pipeline.pwritev
        task = asyncio.create_task(request(node.lane, 0, IoVec.of(bytearray(b"x" * 512))))
        await turns(2)
        assert node.in_flight == 1
        assert [(r.offset, r.length) for r in node.tracker.requests] == [(0, 512)]
        behind = asyncio.create_task(
            pipeline.pwritev(node.lane, 256, IoVec.of(b"y" * 512), int(Req.SERIALISING))
        )
        drain = asyncio.create_task(node.drained_begin())
        await turns(5)
        assert node.asked.count("write") == (kind == "write")
        assert not drain.done()
        go_on.set()
        await asyncio.gather(task, behind, drain)
        node.drained_end()

    asyncio.run(scenario())
    assert node.data[256:768] == b"y" * 512
    assert node.write_log.highest == 768
    assert node.write_log.generation == (2 if kind == "write" else 1)
    assert idle(node)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_request_cancelled_while_its_driver_waits_leaves_nothing_behind(kind: str) -> None:
    node = ArrayNode()

    async def scenario() -> None:
        node.pause = asyncio.Event().wait
        request = pipeline.preadv if kind == "read" else pipeline.pwritev
        task = asyncio.create_task(request(node.lane, 0, IoVec.of(bytearray(512))))
        await turns(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert node.write_log.generation == (kind == "write")  # it may have happened
    assert idle(node)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (-512, 512), (MAX_LENGTH, 1)])
def test_impossible_range_is_eio_and_reaches_nobody(offset: int, length: int) -> None:
    node = ArrayNode()
    for coro in (
        pipeline.preadv(node.lane, offset, IoVec.of(bytearray(length))),
        pipeline.pwritev(node.lane, offset, IoVec.of(bytes(length))),
        clear.pwrite_zeroes(node, offset, length),
        clear.pdiscard(node, offset, length),
    ):
        with pytest.raises(BlockError) as caught:
            run_now(coro)
        assert caught.value.errno == errno.EIO
    assert not node.asked.calls
    assert idle(node)


def test_negative_length_is_refused() -> None:
    for request in (clear.pwrite_zeroes, clear.pdiscard):
        with pytest.raises(BlockError) as caught:
            run_now(request(ArrayNode(), 0, -1))
        assert caught.value.errno == errno.EIO


def test_request_above_the_maximum_is_eio() -> None:
    page = memoryview(mmap.mmap(-1, 1 << 20))
    iov = IoVec([page] * (MAX_REQUEST // len(page) + 1))
    node = ArrayNode()
    with pytest.raises(BlockError) as caught:
        run_now(pipeline.preadv(node.lane, 0, iov))
    assert caught.value.errno == errno.EIO


def test_read_only_node_refuses_every_change_with_eperm_and_flushes_as_nothing() -> None:
    node = ArrayNode(common=NodeOptions(read_only=True))
    for coro in (
        pipeline.pwritev(node.lane, 0, IoVec.of(b"x")),
        clear.pwrite_zeroes(node, 0, 512),
        clear.pdiscard(node, 0, 512),
    ):
        with pytest.raises(BlockError) as caught:
            run_now(coro)
        assert caught.value.errno == errno.EPERM
    run_now(pipeline.flush(node))
    assert not node.asked.calls


def test_empty_requests_succeed_and_leave_the_driver_alone() -> None:
    node = ArrayNode(limits=FOUR_K)
    write(node, 5, b"")
    assert read(node, 5, 0) == b""
    run_now(clear.pwrite_zeroes(node, 5, 0))
    run_now(clear.pdiscard(node, 5, 0))
    assert not node.asked.calls
    assert idle(node)


# ---------------------------------------------------------------- reads


def test_unaligned_read_reaches_the_driver_as_whole_blocks() -> None:
    node = ArrayNode(16384, FOUR_K)
    node.data[:] = bytes(range(256)) * 64
    assert read(node, 4090, 10) == bytes(node.data[4090:4100])
    assert node.asked.calls == [("read", 0, 8192, 0)]


@pytest.mark.parametrize("offset", [0, 1, 511, 512, 1000, 1023, 1024, 1536, 2000, 5000])
@pytest.mark.parametrize("length", [1, 511, 512, 513, 1024, 3000])
def test_what_lies_behind_the_end_reads_as_zeroes(offset: int, length: int) -> None:
    limits = BlockLimits(request_alignment=1024, min_mem_alignment=1)
    node = ArrayNode(1536, limits)
    node.data[:1536] = b"\xab" * 1536
    node.length = 1536
    expected = (b"\xab" * 1536 + bytes(16384))[offset : offset + length]
    assert read(node, offset, length) == expected


def test_every_alignment_of_a_read_near_the_end_gives_its_bytes() -> None:
    align, end = 16, 512
    node = ArrayNode(end, BlockLimits(request_alignment=align, min_mem_alignment=1))
    node.data[:end] = bytes(1 + position % 251 for position in range(end))
    shown = bytes(node.data[:end]) + bytes(4 * align)
    for offset in range(end - 2 * align, end + align + 1):
        for length in range(2 * align + 1):
            assert read(node, offset, length) == shown[offset : offset + length]


def test_large_read_is_cut_to_max_transfer() -> None:
    limits = BlockLimits(request_alignment=512, min_mem_alignment=1, max_transfer=1500)
    node = ArrayNode(limits=limits)
    read(node, 0, 3000)
    assert node.asked.of("read") == [(0, 1024), (1024, 1024), (2048, 1024)]


def test_first_error_ends_a_cut_read() -> None:
    node = ArrayNode(limits=BlockLimits(min_mem_alignment=1, max_transfer=512))

    def fail(kind: str, offset: int, length: int) -> None:
        if offset == 512:
            raise BlockError(errno.ENODATA)

    node.fail = fail
    with pytest.raises(BlockError) as caught:
        read(node, 0, 2048)
    assert caught.value.errno == errno.ENODATA
    assert node.asked.of("read") == [(0, 512), (512, 512)]
    assert idle(node)


def test_memory_the_driver_cannot_take_is_bounced_both_ways() -> None:
    limits = BlockLimits(request_alignment=512, min_mem_alignment=512)
    node = ArrayNode(limits=limits)  # asserts the alignment of every vector
    memory = memoryview(mmap.mmap(-1, 8192))
    odd = memory[3 : 3 + 1024]
    odd[:] = b"ab" * 512
    run_now(pipeline.pwritev(node.lane, 0, IoVec([odd])))
    odd[:] = bytes(1024)
    run_now(pipeline.preadv(node.lane, 0, IoVec([odd])))
    assert bytes(odd) == b"ab" * 512
    assert memory[3 + 1024] == 0


COMPRESSED = int(Req.WRITE_COMPRESSED)


def test_compressed_write_is_neither_cut_nor_bounced() -> None:
    limits = BlockLimits(max_transfer=4096, min_mem_alignment=512, opt_mem_alignment=512, max_iov=1)
    seen: list[tuple[int, int, int]] = []

    class Compressing(ArrayNode):
        async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
            seen.append((offset, length, flags))
            assert iov.tobytes() == b"ab" * 5000 + b"c" * 6384

    node = Compressing(limits=limits, write_flags=COMPRESSED)
    memory = IoVec.of(b"ab" * 5000, b"c" * 6384)
    run_now(pipeline.pwritev(node.lane, 8192, memory, COMPRESSED | int(Req.FUA)))
    assert seen == [(8192, 16384, COMPRESSED)]
    assert node.asked.count("flush") == 1
    assert idle(node)


@pytest.mark.parametrize("length", [0, 512, 16384])
def test_who_cannot_compress_says_so_rather_than_write_plainly(length: int) -> None:
    node = ArrayNode()
    with pytest.raises(BlockError) as caught:
        write(node, 0, b"x" * length, COMPRESSED)
    assert caught.value.errno == errno.ENOTSUP
    assert not node.asked.calls
    assert idle(node)


def test_compressed_write_without_a_medium_misses_the_medium() -> None:
    with pytest.raises(BlockError) as caught:
        run_now(pipeline.pwritev(NoMediumNode().lane, 0, IoVec.of(b"x" * 512), COMPRESSED))
    assert caught.value.errno == errno.ENOMEDIUM


@pytest.mark.parametrize(
    ("case", "arrives"),
    [("whole", True), ("cut", True), ("padded", False), ("bounced", False), ("zeroes", False)],
)
def test_memory_counts_as_registered_only_where_the_driver_gets_the_users_own(
    case: str, arrives: bool
) -> None:
    """Row B13.4: scratch blocks, bounce buffers and pages of zeroes were never announced."""
    limits = BlockLimits(
        request_alignment=512,
        min_mem_alignment=512 if case == "bounced" else 1,
        max_transfer=1024 if case == "cut" else 0,
    )
    modes = NodeOptions(discard="unmap", detect_zeroes="on" if case == "zeroes" else "off")
    node = ArrayNode(limits=limits, write_flags=int(Req.REGISTERED_BUF), common=modes, zeroes=False)
    memory = memoryview(bytearray((0 if case == "zeroes" else 7).to_bytes(1, "big") * 8192))
    skip = -address_of(memory) % 512 + (1 if case == "bounced" else 0)
    offset = 100 if case == "padded" else 0
    run_now(
        pipeline.pwritev(
            node.lane, offset, IoVec([memory[skip : skip + 4096]]), int(Req.REGISTERED_BUF)
        )
    )
    flags = {flags for kind, _, _, flags in node.asked.calls if kind == "write"}
    assert flags == {int(Req.REGISTERED_BUF) if arrives else 0}


def test_memory_of_a_zero_write_is_nobodys() -> None:
    node = ArrayNode(write_flags=int(Req.REGISTERED_BUF), zeroes=False)
    run_now(clear.pwrite_zeroes(node, 0, 4096, int(Req.REGISTERED_BUF)))
    assert node.asked.calls[-1] == ("write", 0, 4096, 0)


def test_vector_with_too_many_elements_is_coalesced() -> None:
    node = ArrayNode(limits=BlockLimits(min_mem_alignment=1, max_iov=4))
    run_now(pipeline.pwritev(node.lane, 10, IoVec.of(*[bytes([n]) for n in range(50)])))
    buffers = [bytearray(1) for _ in range(50)]
    run_now(pipeline.preadv(node.lane, 10, IoVec.of(*buffers)))
    assert b"".join(buffers) == bytes(range(50))


def test_bounce_buffers_are_bounded() -> None:
    limits = BlockLimits(request_alignment=512, min_mem_alignment=512)
    node = ArrayNode(4 << 20, limits)
    memory = memoryview(mmap.mmap(-1, (3 << 20) + 4096))
    run_now(pipeline.pwritev(node.lane, 0, IoVec([memory[1 : 1 + (3 << 20)]])))
    assert node.asked.of("write") == [(n << 20, 1 << 20) for n in range(3)]


def test_so_many_requests_hold_bounce_buffers_at_once_and_the_others_wait() -> None:
    """A guest may have thousands of requests in flight, and choose where their memory begins."""
    limits = BlockLimits(request_alignment=512, min_mem_alignment=512)
    node = ArrayNode(limits=limits)
    memory = memoryview(mmap.mmap(-1, 8192))
    count = 3 * MAX_BOUNCING + 1

    async def everything() -> None:
        gate = asyncio.Event()

        async def pause() -> None:
            await gate.wait()

        node.pause = pause
        requests = [
            asyncio.create_task(pipeline.preadv(node.lane, 0, IoVec([memory[1 : 1 + 512]])))
            if n % 2
            else asyncio.create_task(
                pipeline.pwritev(node.lane, 512, IoVec([memory[1025 : 1025 + 512]]))
            )
            for n in range(count)
        ]
        aligned = asyncio.create_task(
            pipeline.preadv(node.lane, 0, IoVec([memory[4096 : 4096 + 512]]))
        )
        await turns(10)
        assert len(node.asked.calls) == MAX_BOUNCING + 1  # who needs none does not wait
        gate.set()
        await asyncio.gather(*requests, aligned)
        assert len(node.asked.calls) == count + 1

    asyncio.run(everything())
    assert idle(node)


# ---------------------------------------------------------------- read-modify-write


def test_write_inside_one_block_reads_it_once() -> None:
    node = ArrayNode(16384, FOUR_K)
    node.data[:] = b"\x11" * 16384
    write(node, 5000, b"new")
    assert node.asked.calls == [("read", 4096, 4096, 0), ("write", 4096, 4096, 0)]
    assert node.data == b"\x11" * 5000 + b"new" + b"\x11" * (16384 - 5003)


def test_write_over_both_edges_reads_first_and_last_block_only() -> None:
    node = ArrayNode(32768, FOUR_K)
    node.data[:] = b"\x11" * 32768
    write(node, 4000, b"n" * 9000)
    assert node.asked.of("read") == [(0, 4096), (12288, 4096)]
    assert node.asked.of("write") == [(0, 16384)]
    assert node.data == b"\x11" * 4000 + b"n" * 9000 + b"\x11" * (32768 - 13000)


def test_failed_read_of_a_block_means_nothing_is_written() -> None:
    node = ArrayNode(16384, FOUR_K)

    def fail(kind: str, offset: int, length: int) -> None:
        if kind == "read":
            raise BlockError(errno.EIO)

    node.fail = fail
    with pytest.raises(BlockError):
        write(node, 5000, b"new")
    assert not node.asked.count("write")
    assert idle(node)


def test_unaligned_write_takes_back_extents_before_it_reads() -> None:
    node = ArrayNode(16384, FOUR_K)
    above = put_above(node)
    order: list[object] = []

    class User:
        async def child_revoke(self, edge: object, offset: int, length: int) -> None:
            order.append((offset, length))
            assert not node.mappable(5000, 1)
            assert not node.mappable(4096, 1)
            assert node.mappable(0, 4096)
            assert node.mappable(8192, 4096)

    above.child_revoke = User().child_revoke  # type: ignore[method-assign]
    node.fail = lambda kind, offset, length: order.append(kind)
    write(node, 5000, b"new")
    assert order == [(4096, 4096), "read", "write"]
    assert node.mappable(5000, 1)


def test_aligned_write_takes_nothing_back_unless_it_serialises() -> None:
    node = ArrayNode(16384, FOUR_K)
    above = put_above(node)
    revoked: list[tuple[int, int]] = []

    async def child_revoke(edge: object, offset: int, length: int) -> None:
        revoked.append((offset, length))

    above.child_revoke = child_revoke  # type: ignore[method-assign]
    write(node, 4096, bytes(4096))
    assert not revoked
    write(node, 4096, bytes(4096), Req.SERIALISING)
    assert revoked == [(4096, 4096)]


def test_no_wait_fails_with_ebusy_when_something_is_in_the_way() -> None:
    async def scenario() -> None:
        node = ArrayNode(16384, FOUR_K)
        node.pause = lambda: turns(3)
        first = asyncio.create_task(pipeline.pwritev(node.lane, 0, IoVec.of(bytes(4096))))
        await turns(1)
        with pytest.raises(BlockError) as caught:
            await pipeline.pwritev(
                node.lane, 0, IoVec.of(bytes(4096)), Req.SERIALISING | Req.NO_WAIT
            )
        assert caught.value.errno == errno.EBUSY
        await first
        assert idle(node)

    asyncio.run(scenario())


def test_padding_behind_the_end_is_cut_off_again() -> None:
    node = ArrayNode(4096 + 512, FOUR_K)
    cut: list[int] = []

    async def driver_cut_padding(end: int) -> None:
        cut.append(end)

    node.driver_cut_padding = driver_cut_padding  # type: ignore[method-assign]
    write(node, 4096, b"x" * 512)
    assert cut == [4608]
    assert node.length == 4608
    write(node, 10, b"x")
    assert cut == [4608]


# ---------------------------------------------------------------- bookkeeping


def test_failure_in_the_second_fragment_counts_as_a_write_but_does_not_extend_the_node() -> None:
    node = ArrayNode(1024, BlockLimits(min_mem_alignment=1, max_transfer=512))

    def fail(kind: str, offset: int, length: int) -> None:
        if offset == 1024:
            raise BlockError(errno.ENOSPC)

    node.fail = fail
    before = node.write_log.generation
    with pytest.raises(BlockError):
        write(node, 512, b"x" * 1024)
    assert node.write_log.generation > before
    assert node.length == 1024
    assert node.data[512:1024] == b"x" * 512


def test_successful_write_past_the_end_extends_the_node_and_tells_its_parents() -> None:
    node = ArrayNode(1024)
    above = put_above(node)
    write(node, 1000, b"x" * 100)
    assert node.length == above.length == 1536


def test_truncate_shrinks_grows_and_reports() -> None:
    node = ArrayNode(4096)
    node.data[:] = b"x" * 4096
    above = put_above(node)
    revoked: list[tuple[int, int]] = []

    async def child_revoke(edge: object, offset: int, length: int) -> None:
        revoked.append((offset, length))

    above.child_revoke = child_revoke  # type: ignore[method-assign]
    run_now(pipeline.truncate(node, 1024))
    assert revoked == [(1024, 3072)]
    run_now(pipeline.truncate(node, 2048))
    assert node.length == above.length == 2048
    assert read(node, 0, 2048) == b"x" * 1024 + bytes(1024)


@pytest.mark.parametrize(("length", "error"), [(-1, errno.EINVAL), (MAX_LENGTH + 1, errno.EFBIG)])
def test_truncate_refuses_impossible_lengths(length: int, error: int) -> None:
    with pytest.raises(BlockError) as caught:
        run_now(pipeline.truncate(ArrayNode(), length))
    assert caught.value.errno == error


def test_truncate_of_a_read_only_node_is_eacces() -> None:
    with pytest.raises(BlockError) as caught:
        run_now(pipeline.truncate(ArrayNode(common=NodeOptions(read_only=True)), 0))
    assert caught.value.errno == errno.EACCES


def test_drain_waits_for_what_is_in_flight_below_too() -> None:
    async def scenario() -> None:
        node = ArrayNode()
        above = put_above(node)
        gate = asyncio.Event()

        async def pause() -> None:
            await gate.wait()

        node.pause = pause
        request = asyncio.create_task(pipeline.pwritev(node.lane, 0, IoVec.of(b"x")))
        drained = asyncio.create_task(above.drained_begin())
        await turns(5)
        assert not drained.done()
        assert not above.mappable(0, 1)
        gate.set()
        await drained
        assert request.done()
        above.drained_end()
        assert above.mappable(0, 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["read", "write", "zero", "discard"])
def test_aligned_request_waits_for_a_read_modify_write_of_its_block(kind: str) -> None:
    async def scenario() -> None:
        node = ArrayNode(16384, FOUR_K)
        gate = asyncio.Event()

        async def pause() -> None:
            await gate.wait()

        node.pause = pause
        first = asyncio.create_task(pipeline.pwritev(node.lane, 5000, IoVec.of(b"new")))
        await turns(2)
        requests = {
            "read": pipeline.preadv(node.lane, 4096, IoVec.of(bytearray(4096))),
            "write": pipeline.pwritev(node.lane, 4096, IoVec.of(bytes(4096))),
            "zero": clear.pwrite_zeroes(node, 4096, 4096),
            "discard": clear.pdiscard(node, 4096, 4096),
        }
        second = asyncio.create_task(requests.pop(kind))
        for unused in requests.values():
            unused.close()
        await turns(5)
        assert node.asked.calls == [("read", 4096, 4096, 0)]
        # Elsewhere nobody waits.
        node.pause = None
        await pipeline.preadv(node.lane, 8192, IoVec.of(bytearray(4096)))
        gate.set()
        await asyncio.gather(first, second)
        assert [call[:2] for call in node.asked.calls[2:]] == [("write", 4096), (kind, 4096)]

    asyncio.run(scenario())


def test_events_of_writes_and_of_the_reads_that_complete_them() -> None:
    heard: list[str] = []

    class Listening(ArrayNode):
        has_debug_events = True

        async def driver_debug_event(self, event: str) -> None:
            heard.append(event.removeprefix("pwritev_"))

    def events(request: Coroutine[Any, Any, None]) -> list[str]:
        heard.clear()
        run_now(request)
        return list(heard)

    node = Listening(limits=FOUR_K)
    data = IoVec.of(bytes(200))
    both = ["rmw_head", "rmw_tail", "rmw_after_head", "rmw_after_tail", "pwritev", "done"]
    assert events(pipeline.pwritev(node.lane, 4000, data)) == both
    apart = ["rmw_head", "rmw_after_head", "rmw_tail", "rmw_after_tail", "pwritev", "done"]
    assert events(pipeline.pwritev(node.lane, 100, IoVec.of(bytes(8192)))) == apart
    tail = ["rmw_tail", "rmw_after_tail", "pwritev", "done"]
    assert events(pipeline.pwritev(node.lane, 0, IoVec.of(b"x"))) == tail
    assert events(clear.pwrite_zeroes(node, 0, 4096)) == ["zero", "done"]
    node.detect_zeroes = "on"
    assert events(pipeline.pwritev(node.lane, 0, IoVec.of(bytes(4096)))) == ["zero", "done"]
