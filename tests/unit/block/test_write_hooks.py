"""What sees writes before they happen, and what is kept of them (rows B16.12, B17.17 to B17.21, B24)."""

from __future__ import annotations

import asyncio
import errno

import pytest

from tests.unit.block.fakes import ArrayNode, CowNode, put_above, run_now, turns
from vhostblk.block import clear, pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.dirty_map import DirtyMap, record
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import BlockLimits
from vhostblk.block.node import ExtentFlag, HostExtent, Req
from vhostblk.block.options import NodeOptions
from vhostblk.block.tracking import TrackedRequest
from vhostblk.block.write_threshold import WriteThreshold
from vhostblk.errors import BlockError


class MappedNode(ArrayNode):
    """All of it is a file, for whoever asks."""

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        return HostExtent(0, self.length, 7, 0, ExtentFlag.READ | ExtentFlag.WRITE)


def write(node: ArrayNode, offset: int, content: bytes, flags: int = 0) -> None:
    run_now(pipeline.pwritev(node.lane, offset, IoVec.of(content), flags))


def test_hooks_see_every_write_zero_write_and_discard_before_it_happens() -> None:
    node = ArrayNode()
    seen: list[tuple[str, int, int, int]] = []

    async def hook(request: TrackedRequest) -> None:
        seen.append((request.kind.value, request.offset, request.length, len(node.asked.calls)))

    run_now(node.add_before_write(hook))
    write(node, 10, b"data")
    run_now(clear.pwrite_zeroes(node, 100, 50))
    run_now(clear.pdiscard(node, 200, 70))
    assert seen == [("write", 10, 4, 0), ("write", 100, 50, 1), ("discard", 200, 70, 2)]
    node.remove_before_write(hook)
    write(node, 0, b"x")
    assert len(seen) == 3


def test_a_veto_fails_the_request_and_still_counts_as_a_write() -> None:
    node = ArrayNode()

    async def veto(request: TrackedRequest) -> None:
        raise BlockError(errno.EAGAIN)

    run_now(node.add_before_write(veto))
    for request in (
        pipeline.pwritev(node.lane, 4096, IoVec.of(b"x")),
        clear.pwrite_zeroes(node, 0, 512),
        clear.pdiscard(node, 0, 512),
    ):
        before = node.write_log.generation
        with pytest.raises(BlockError) as caught:
            run_now(request)
        assert caught.value.errno == errno.EAGAIN
        assert node.write_log.generation > before
    assert not node.asked.calls
    assert node.write_log.highest == 4097
    assert not node.in_flight


def test_error_on_the_second_fragment_counts_as_a_write_but_does_not_make_the_node_longer() -> None:
    node = ArrayNode(1024, BlockLimits(min_mem_alignment=1, max_transfer=512))

    def fail(kind: str, offset: int, length: int) -> None:
        if offset == 1536:
            raise BlockError(errno.EIO)

    node.fail = fail
    dirty = DirtyMap(4096, 512)
    run_now(record(node, dirty))
    with pytest.raises(BlockError):
        write(node, 1024, b"x" * 1024)
    assert (node.write_log.generation, node.write_log.highest, node.length) == (1, 2048, 1024)
    assert dirty.take() == [(1024, 1024)]
    node.fail = None
    write(node, 1024, b"x" * 600)
    assert node.length == 2048


def test_hooks_take_back_the_right_to_write_past_them() -> None:
    node = MappedNode()
    user = BlockBackend(node, "user", writable=True)
    revoked: list[tuple[int, int]] = []

    async def revoke(offset: int, length: int) -> None:
        revoked.append((offset, length))

    async def hook(request: TrackedRequest) -> None:
        pass

    user.attach(revoke=revoke)
    assert [extent.flags for extent in run_now(user.extents(0, 1))] == [
        ExtentFlag.READ | ExtentFlag.WRITE
    ]
    run_now(node.add_before_write(hook))
    assert revoked == [(0, node.length)]
    assert [extent.flags for extent in run_now(user.extents(0, 1))] == [ExtentFlag.READ]
    node.remove_before_write(hook)
    assert run_now(user.extents(0, 1))[0].flags & ExtentFlag.WRITE


def test_write_threshold_tells_exactly_once() -> None:
    node = ArrayNode()
    told: list[tuple[int, int]] = []
    threshold = WriteThreshold(node, lambda exceeded, offset: told.append((exceeded, offset)))
    run_now(threshold.set(4096))
    write(node, 0, b"x" * 4096)
    assert not told
    assert threshold.offset == 4096
    write(node, 4000, b"x" * 200)
    write(node, 8000, b"x" * 200)
    assert told == [(104, 4096)]
    assert threshold.offset == 0
    assert not node.before_write
    run_now(threshold.set(10))
    run_now(threshold.set(0))
    write(node, 8000, b"x")
    assert len(told) == 1


def test_writes_that_pass_the_threshold_together_all_succeed_and_one_tells() -> None:
    async def scenario() -> None:
        node = ArrayNode()
        told: list[tuple[int, int]] = []
        threshold = WriteThreshold(node, lambda exceeded, offset: told.append((exceeded, offset)))
        door = asyncio.Event()

        async def keep_waiting(request: TrackedRequest) -> None:
            await door.wait()

        await node.add_before_write(keep_waiting)
        await threshold.set(100)
        ends = 4096, 8192
        writes = [
            asyncio.create_task(pipeline.pwritev(node.lane, end - 50, IoVec.of(b"x" * 50)))
            for end in ends
        ]
        await asyncio.sleep(0)
        door.set()
        await asyncio.gather(*writes)
        assert told == [(ends[0] - 100, 100)]
        assert node.before_write == [keep_waiting]

    asyncio.run(scenario())


# ---------------------------------------------------------------- detect-zeroes


@pytest.mark.parametrize(
    ("mode", "zero_flags"), [("on", 0), ("unmap", int(Req.MAY_UNMAP)), ("off", None)]
)
def test_detected_zeroes_become_zero_writes(mode: str, zero_flags: int | None) -> None:
    node = MappedNode(common=NodeOptions(discard="unmap", detect_zeroes=mode))
    write(node, 0, b"\xff" * 4096)
    node.asked.calls.clear()
    run_now(pipeline.pwritev(node.lane, 0, IoVec.of(bytes(1024), bytes(1000))))
    expected = ("write", 0, 2024, 0) if zero_flags is None else ("zero", 0, 2024, zero_flags)
    assert node.asked.calls == [expected]
    assert node.data[:4096] == bytes(2024) + b"\xff" * 2072
    for content in (b"x" + bytes(99), bytes(99) + b"x", bytes(70000) + b"x" + bytes(9)):
        write(node, 100, content)
        assert node.asked.calls[-1][0] == "write"
    # Writes that nobody looks at could not be detected.
    extent = run_now(pipeline.host_extent(node, 0, 1))
    assert extent is not None
    assert bool(extent.flags & ExtentFlag.WRITE) == (mode == "off")


def test_detected_zeroes_of_a_compressed_write_are_not_compressed() -> None:
    compressed = int(Req.WRITE_COMPRESSED)
    for zeroes in (True, False):
        node = ArrayNode(
            zeroes=zeroes, write_flags=compressed, common=NodeOptions(detect_zeroes="on")
        )
        write(node, 0, bytes(1024), compressed)
        assert node.asked.calls[0] == ("zero", 0, 1024, 0)
        assert node.asked.calls[1:] == ([] if zeroes else [("write", 0, 1024, 0)])


def test_detected_zeroes_are_data_where_the_driver_cannot_zero() -> None:
    node = ArrayNode(zeroes=False, common=NodeOptions(detect_zeroes="on"))
    write(node, 0, b"\xff" * 4096)
    write(node, 0, bytes(1024), int(Req.FUA))
    assert node.data[:4096] == bytes(1024) + b"\xff" * 3072
    assert node.durable[:1024] == bytes(1024)
    assert node.asked.count("flush") == 1


# ---------------------------------------------------------------- make-zero


def test_make_zero_leaves_alone_what_is_zero_already() -> None:
    node = CowNode(None, 8192, 512)
    write(node, 1024, b"x" * 512)
    write(node, 4096, b"y" * 1024)
    node.asked.calls.clear()
    run_now(clear.make_zero(node, int(Req.MAY_UNMAP)))
    assert node.asked.of("zero") == [(1024, 512), (4096, 1024)]
    assert not any(node.data)
    run_now(clear.make_zero(ArrayNode(0)))


def test_make_zero_tells_where_it_failed() -> None:
    node = ArrayNode(8192)

    def fail(kind: str, offset: int, length: int) -> None:
        raise BlockError(errno.EIO)

    node.fail = fail
    with pytest.raises(BlockError, match="at 0:"):
        run_now(clear.make_zero(node))


# ---------------------------------------------------------------- copy on read


def read(node: ArrayNode, offset: int, length: int, flags: int = int(Req.COPY_ON_READ)) -> bytes:
    buffer = bytearray(b"\xee" * length)
    run_now(pipeline.preadv(node.lane, offset, IoVec.of(buffer), flags))
    return bytes(buffer)


def two_layers(size: int = 8192, **rest: object) -> tuple[CowNode, ArrayNode]:
    base = ArrayNode(size)
    base.data[:] = bytes(range(1, 256)) * (size // 255) + b"z" * (size % 255)
    return CowNode(base, size, 512, **rest), base


def test_what_was_read_once_is_there_when_the_base_has_gone() -> None:
    top, base = two_layers()
    content = bytes(base.data)
    assert read(top, 700, 900) == content[700:1600]
    assert top.allocated == {1, 2, 3}
    top.children.pop("backing").detach()
    assert read(top, 512, 1536, 0) == content[512:2048]
    assert read(top, 2048, 512, 0) == bytes(512)


def test_what_is_allocated_is_not_copied_again_and_zeroes_are_zero_writes() -> None:
    top, base = two_layers()
    base.data[1024:2048] = bytes(1024)
    write(top, 0, b"n" * 512)
    top.asked.calls.clear()
    assert read(top, 0, 2048) == b"n" * 512 + base.data[512:2048]
    assert top.asked.of("write") == [(512, 1536)]
    top.asked.calls.clear()
    read(top, 0, 2048)
    assert not top.asked.of("write")
    base.data[2048:3072] = bytes(1024)
    read(top, 2048, 1024)
    assert top.asked.of("zero") == [(2048, 1024)]


def test_prefetch_populates_without_a_reader() -> None:
    top, base = two_layers()
    run_now(pipeline.prefetch(top, 0, 8192))
    assert len(top.allocated) == 16
    assert top.data == base.data


def test_failed_population_fails_the_read_and_a_read_only_node_refuses_it() -> None:
    top, _ = two_layers()

    def fail(kind: str, offset: int, length: int) -> None:
        if kind == "write":
            raise BlockError(errno.ENOSPC)

    top.fail = fail
    with pytest.raises(BlockError) as caught:
        read(top, 0, 512)
    assert caught.value.errno == errno.ENOSPC
    assert not top.in_flight
    assert not top.tracker.serialising


def test_write_during_population_of_its_cluster_is_never_lost() -> None:
    """At every point of the read where it can be overtaken."""

    async def scenario(delay: int) -> None:
        top, base = two_layers(common=NodeOptions(discard="unmap"))
        top.pause = base.pause = lambda: turns(2)
        buffer = bytearray(512)
        reading = asyncio.create_task(
            pipeline.preadv(top.lane, 0, IoVec.of(buffer), int(Req.COPY_ON_READ))
        )
        await turns(delay)
        await pipeline.pwritev(top.lane, 100, IoVec.of(b"guest"))
        await asyncio.wait_for(reading, 5)
        after = bytearray(512)
        await pipeline.preadv(top.lane, 0, IoVec.of(after))
        assert after[100:105] == b"guest"
        assert after[:100] == base.data[:100]
        assert after[105:] == base.data[105:512]

    for delay in range(14):
        asyncio.run(scenario(delay))


def test_no_extent_is_given_out_over_a_filter_that_leaves_it_out() -> None:
    node = MappedNode()
    above = put_above(node)
    assert run_now(pipeline.host_extent(above, 0, 512)) is None
