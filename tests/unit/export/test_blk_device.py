"""The device in front of a disk: what it offers, what it tells, what requests do. VIRTIO 1.2 §5.2."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from tests.unit.block.fakes import EASY, ArrayNode, run_now
from vhostblk.block.backend import BlockBackend
from vhostblk.block.limits import BlockLimits
from vhostblk.block.node import BlockSizes, Req
from vhostblk.block.options import NodeOptions
from vhostblk.errors import BlockError, ConfigError, GuestError
from vhostblk.export.blk_device import SEG_MAX, BlkDevice
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.error_policy import Action, ErrorPolicy, OnError
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.virtio.blk import CONFIG_SIZE, WRITEBACK_OFFSET, BlkConfig, RequestType, Status
from vhostblk.virtio.blk_request import BlkRequest, Segment
from vhostblk.virtio.features import Feature

OK, IOERR, UNSUPP = int(Status.OK), int(Status.IOERR), int(Status.UNSUPP)
ALL = int(
    Feature.VIRTIO_BLK_F_FLUSH
    | Feature.VIRTIO_BLK_F_CONFIG_WCE
    | Feature.VIRTIO_BLK_F_DISCARD
    | Feature.VIRTIO_BLK_F_WRITE_ZEROES
)
KIB = 1024


def make(
    node: ArrayNode | None = None,
    *,
    writable: bool = True,
    write_cache: bool = True,
    **options: Any,
) -> BlkDevice:
    """A device on a disk, with the features of today's drivers."""
    node = node or ArrayNode(64 * KIB)
    backend = BlockBackend(node, "the test", writable=writable, write_cache=write_cache)
    words: dict[str, Any] = {
        "serial": "s",
        "num_queues": 4,
        "max_segments": 32,
        "logical_block_size": None,
    }
    log = logging.LoggerAdapter(logging.getLogger("vhostblk.test"), {})
    device = BlkDevice(backend, errors=ErrorLog(log), **(words | options))
    device.set_features(ALL & device.offered_features)
    return device


def array_of(device: BlkDevice) -> ArrayNode:
    node = device.backend.node
    assert isinstance(node, ArrayNode)
    return node


def request(
    kind: RequestType,
    offset: int = 0,
    data: Sequence[memoryview] = (),
    segments: Sequence[Segment] = (),
) -> BlkRequest:
    made = BlkRequest(head=0, status_byte=memoryview(bytearray(1)), type=kind)
    made.offset, made.length, made.data = offset, sum(map(len, data)), data
    made.segments = segments
    return made


def execute(device: BlkDevice, *what: Any, **more: Any) -> tuple[int, int]:
    return run_now(device.execute(request(*what, **more)))


def view(content: bytes | int) -> memoryview:
    return memoryview(bytearray(content))


# ---------------------------------------------------------------- what it offers


def test_writable_disk_that_can_discard_offers_everything() -> None:
    device = make()
    offered = Feature(device.offered_features)
    for feature in (
        Feature.VIRTIO_F_VERSION_1,
        Feature.VIRTIO_F_EVENT_IDX,
        Feature.VIRTIO_F_INDIRECT_DESC,
        Feature.VIRTIO_F_RING_PACKED,
        Feature.VIRTIO_BLK_F_SEG_MAX,
        Feature.VIRTIO_BLK_F_BLK_SIZE,
        Feature.VIRTIO_BLK_F_TOPOLOGY,
        Feature.VIRTIO_BLK_F_FLUSH,
        Feature.VIRTIO_BLK_F_CONFIG_WCE,
        Feature.VIRTIO_BLK_F_MQ,
        Feature.VIRTIO_BLK_F_DISCARD,
        Feature.VIRTIO_BLK_F_WRITE_ZEROES,
    ):
        assert offered & feature, feature
    assert not offered & Feature.VIRTIO_BLK_F_RO


@pytest.mark.parametrize("writable", [True, False])
def test_what_has_no_meaning_is_never_offered(writable: bool) -> None:
    offered = Feature(make(writable=writable).offered_features)
    assert not offered & Feature.VIRTIO_BLK_F_SIZE_MAX  # size_max stays 0: no limit to name
    known = sum(Feature)
    assert not int(offered) & ~known


def test_read_only_disk_offers_nothing_that_writes() -> None:
    device = make(writable=False)
    offered = Feature(device.offered_features)
    assert offered & Feature.VIRTIO_BLK_F_RO
    assert not offered & (Feature.VIRTIO_BLK_F_DISCARD | Feature.VIRTIO_BLK_F_WRITE_ZEROES)
    config = device.config()
    assert (config.max_discard_sectors, config.max_discard_seg) == (0, 0)
    assert (config.max_write_zeroes_sectors, config.max_write_zeroes_seg) == (0, 0)


@pytest.mark.parametrize(
    "node",
    [
        ArrayNode(64 * KIB, discards=False),
        ArrayNode(64 * KIB, common=NodeOptions(discard="ignore")),
    ],
    ids=["cannot", "must not"],
)
def test_disk_without_discard_offers_none(node: ArrayNode) -> None:
    device = make(node)
    assert not device.offered_features & Feature.VIRTIO_BLK_F_DISCARD
    assert device.config().max_discard_seg == 0
    assert device.config().write_zeroes_may_unmap == 0
    segment = Segment(0, 4096, False)
    outcome = execute(device, RequestType.DISCARD, segments=[segment])
    assert outcome == (UNSUPP, 0)


# ---------------------------------------------------------------- what it tells


def sized(sizes: BlockSizes, limits: BlockLimits = EASY) -> ArrayNode:
    node = ArrayNode(1 << 20, limits)
    node.block_sizes = sizes
    return node


@pytest.mark.parametrize(
    ("sizes", "logical", "expected"),
    [
        # blk_size, physical_block_exp, min_io_size, opt_io_size
        (BlockSizes(512, 512, 512, 0), None, (512, 0, 1, 0)),
        (BlockSizes(512, 4096, 4096, 65536), None, (512, 3, 8, 128)),
        (BlockSizes(4096, 4096, 4096, 0), None, (4096, 0, 1, 0)),
        (BlockSizes(512, 4096, 4096, 0), 4096, (4096, 0, 1, 0)),
        (BlockSizes(512, 4096, 4096, 0), 65536, (65536, 0, 1, 0)),
        (BlockSizes(512, 4096, 0, 0), None, (512, 3, 1, 0)),
        (BlockSizes(512, 4096, 64 << 20, 128 << 20), None, (512, 3, 0, 262144)),
        (BlockSizes(512, 512, 512, 0xFFFFFE00), None, (512, 0, 1, 0xFFFFFE00 // 512)),
    ],
)
def test_topology_is_the_disks_own(
    sizes: BlockSizes, logical: int | None, expected: tuple[int, int, int, int]
) -> None:
    config = make(sized(sizes), logical_block_size=logical).config()
    seen = (config.blk_size, config.physical_block_exp, config.min_io_size, config.opt_io_size)
    assert seen == expected
    assert BlkConfig.from_bytes(config.to_bytes()) == config


def test_logical_blocks_smaller_than_the_disks_are_refused() -> None:
    with pytest.raises(ConfigError, match="logical-block-size=512: the disk's own is 4096"):
        make(sized(BlockSizes(4096, 4096, 4096, 0)), logical_block_size=512)


def test_serial_has_twenty_bytes_at_most() -> None:
    make(serial="x" * 20)
    for serial in ("x" * 21, "é" * 11):
        with pytest.raises(ConfigError, match="at most 20 bytes"):
            make(serial=serial)


def test_limits_are_the_graphs_own() -> None:
    limits = BlockLimits(
        request_alignment=1,
        min_mem_alignment=1,
        max_pdiscard=1 << 20,
        pdiscard_alignment=64 * KIB,
        max_pwrite_zeroes=2 << 20,
    )
    config = make(sized(BlockSizes(512, 4096, 4096, 0), limits)).config()
    assert config.max_discard_sectors == 2048
    assert config.discard_sector_alignment == 128
    assert config.max_write_zeroes_sectors == 4096
    assert (config.max_discard_seg, config.max_write_zeroes_seg) == (32, 32)
    assert config.write_zeroes_may_unmap == 1
    assert (config.seg_max, config.num_queues) == (SEG_MAX, 4)


def test_disk_without_limits_still_tells_some() -> None:
    config = make().config()
    assert config.max_discard_sectors == config.max_write_zeroes_sectors == 4194303
    assert config.discard_sector_alignment >= 1


def test_capacity_follows_the_disk() -> None:
    device = make()
    assert device.config().capacity == 128
    array_of(device).data.extend(bytes(512))
    run_now(array_of(device).refresh_length())
    assert device.config().capacity == 129


# ---------------------------------------------------------------- the write cache


@pytest.mark.parametrize("write_cache", [True, False])
def test_writeback_starts_as_the_disk_is_and_comes_back_with_a_reset(write_cache: bool) -> None:
    device = make(write_cache=write_cache)
    assert device.config().writeback == write_cache
    assert device.write_through is not write_cache
    device.write_config(WRITEBACK_OFFSET, bytes([not write_cache]))
    assert device.config().writeback == (not write_cache)
    assert device.backend.write_cache is not write_cache
    device.set_features(ALL & device.offered_features)  # the next front-end's
    assert device.config().writeback == (not write_cache)
    device.reset()
    assert device.config().writeback == write_cache
    assert device.write_through  # nothing is negotiated
    device.set_features(ALL)
    assert device.write_through is not write_cache


def test_a_driver_that_cannot_flush_is_told_of_no_cache() -> None:
    """VIRTIO 1.2 §5.2.5.2: CONFIG_WCE without FLUSH finds `writeback` at 0."""
    device = make()
    device.set_features(ALL & ~Feature.VIRTIO_BLK_F_FLUSH)
    assert device.config().writeback == 0
    assert device.write_through
    device.set_features(ALL)
    assert device.config().writeback == 1


def test_writes_are_durable_without_flush_or_cache() -> None:
    node = ArrayNode(64 * KIB, write_flags=int(Req.FUA))
    device = make(node)

    def is_durable(content: bytes) -> bool:
        assert execute(device, RequestType.OUT, 0, [view(content)]) == (OK, 0)
        assert node.data[:512] == content
        return node.durable[:512] == content

    assert not is_durable(b"a" * 512)
    device.set_features(ALL & ~Feature.VIRTIO_BLK_F_FLUSH)
    assert is_durable(b"b" * 512)
    device.set_features(ALL)
    assert not is_durable(b"c" * 512)
    device.write_config(WRITEBACK_OFFSET, b"\0")
    assert is_durable(b"d" * 512)
    device.write_config(WRITEBACK_OFFSET, b"\1")
    assert not is_durable(b"e" * 512)
    assert execute(device, RequestType.FLUSH) == (OK, 0)
    assert node.durable[:512] == b"e" * 512


@pytest.mark.parametrize(
    ("offset", "contents"),
    [
        (0, b"\1" * 8),  # capacity
        (WRITEBACK_OFFSET, b"\2"),
        (WRITEBACK_OFFSET - 1, b"\1\1"),
        (CONFIG_SIZE, b"\0"),
        (CONFIG_SIZE - 1, b"\0\0"),
        (-1, b"\0"),
    ],
)
def test_only_writeback_can_be_written(offset: int, contents: bytes) -> None:
    device = make()
    before = device.config()
    with pytest.raises(GuestError):
        device.write_config(offset, contents)
    assert device.config() == before


# ---------------------------------------------------------------- requests


def test_read_and_write_scatter_and_gather() -> None:
    device = make()
    pieces = [view(b"a" * 100), view(b"b" * 412), view(b"c" * 512)]
    assert execute(device, RequestType.OUT, 512, pieces) == (OK, 0)
    read = [view(1), view(1023)]
    assert execute(device, RequestType.IN, 512, read) == (OK, 1024)
    assert b"".join(map(bytes, read)) == b"a" * 100 + b"b" * 412 + b"c" * 512


@pytest.mark.parametrize("room", [1, 8, 19, 20, 21, 100])
def test_get_id_gives_what_there_is_room_for(room: int) -> None:
    device = make(serial="vhost-disk")
    answer = view(b"\xff" * room)
    status, written = execute(device, RequestType.GET_ID, 0, [answer])
    assert (status, written) == (OK, min(room, 20))
    assert bytes(answer) == (b"vhost-disk".ljust(20, b"\0") + b"\xff" * 80)[:room]


def test_segments_are_done_one_by_one() -> None:
    node = ArrayNode(64 * KIB)
    device = make(node)
    node.data[:] = b"d" * len(node.data)
    segments = [Segment(0, 512, False), Segment(4096, 1024, True), Segment(8192, 512, False)]
    assert execute(device, RequestType.WRITE_ZEROES, segments=segments) == (OK, 0)
    assert node.asked.of("zero") == [(0, 512), (4096, 1024), (8192, 512)]
    flags = [flags for kind, *_, flags in node.asked.calls if kind == "zero"]
    assert [bool(flag & Req.MAY_UNMAP) for flag in flags] == [False, True, False]
    assert node.data[4096:5120] == bytes(1024)
    assert node.data[512:4096] == b"d" * (4096 - 512)
    assert execute(device, RequestType.DISCARD, segments=segments) == (OK, 0)
    assert node.asked.of("discard") == [(0, 512), (4096, 1024), (8192, 512)]


def test_a_failing_segment_ends_the_request(expect_log: ExpectedLog) -> None:
    expect_log.expect("write_zeroes failed: Input/output error")
    node = ArrayNode(64 * KIB)

    def fail(kind: str, offset: int, length: int) -> None:
        if offset == 4096:
            raise BlockError(errno.EIO)

    node.fail = fail
    segments = [Segment(offset, 512, False) for offset in (0, 4096, 8192)]
    assert execute(make(node), RequestType.WRITE_ZEROES, segments=segments) == (IOERR, 0)
    assert [offset for offset, _ in node.asked.of("zero")] == [0, 4096]


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ((RequestType.IN, 0, [view(512)]), "read"),
        ((RequestType.OUT, 0, [view(512)]), "write"),
        ((RequestType.FLUSH,), "flush"),
        ((RequestType.DISCARD, 0, (), [Segment(0, 512, False)]), "discard"),
        ((RequestType.WRITE_ZEROES, 0, (), [Segment(0, 512, False)]), "write_zeroes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_failure_of_the_disk_is_ioerr_and_one_line(
    what: tuple[Any, ...], name: str, expect_log: ExpectedLog
) -> None:
    expect_log.expect(rf"\b{name} failed: Input/output error \(EIO\) at offset 0")
    node = ArrayNode(64 * KIB)
    device = make(node)
    execute(device, RequestType.OUT, 0, [view(512)])  # so that there is something to flush

    def fail(kind: str, offset: int, length: int) -> None:
        raise BlockError(errno.EIO)

    node.fail = fail
    for _ in range(5):
        assert execute(device, *what) == (IOERR, 0)
    assert len(expect_log.messages) == 1
    node.fail = None
    assert execute(device, *what)[0] == OK


def test_the_field_has_an_effect_only_with_its_feature() -> None:
    """VIRTIO 1.2 §5.2.5; but it may be set before the features are known (vhost-user), so it is kept."""
    device = make()
    device.set_features(Feature.VIRTIO_BLK_F_FLUSH)
    device.write_config(WRITEBACK_OFFSET, b"\0")
    assert not device.write_through
    assert device.backend.write_cache
    device.set_features(Feature.VIRTIO_BLK_F_FLUSH | Feature.VIRTIO_BLK_F_CONFIG_WCE)
    assert device.write_through
    assert not device.backend.write_cache
    through = make(write_cache=False)
    through.set_features(Feature.VIRTIO_BLK_F_FLUSH)
    through.write_config(WRITEBACK_OFFSET, b"\1")
    assert through.write_through


def test_request_that_breaks_the_rules_is_one_line(expect_log: ExpectedLog) -> None:
    expect_log.expect(
        r"write failed: Invalid argument \(EINVAL\) at offset 4096, 512 bytes",
        r"a request without a header failed: Invalid argument \(EINVAL\)",
    )
    device = make()
    for made in (request(RequestType.OUT, 4096, [view(512)]), request(-1)):  # type: ignore[arg-type]
        made.status = Status.IOERR
        for _ in range(3):
            assert run_now(device.execute(made)) == (IOERR, 0)
    assert len(expect_log.messages) == 2


def test_refused_request_never_reaches_the_disk() -> None:
    device = make()
    refused = request(RequestType.OUT, 0, [view(512)])
    refused.status = Status.UNSUPP
    assert run_now(device.execute(refused)) == (UNSUPP, 0)
    assert array_of(device).asked.calls == []


def test_discard_that_was_not_negotiated_is_not_supported() -> None:
    device = make()
    device.set_features(ALL & ~Feature.VIRTIO_BLK_F_DISCARD)
    assert execute(device, RequestType.DISCARD, segments=[Segment(0, 512, False)]) == (UNSUPP, 0)
    assert array_of(device).asked.calls == []


def test_bug_of_a_driver_costs_the_request(expect_log: ExpectedLog) -> None:
    expect_log.expect("a bug: request IN failed")
    node = ArrayNode(64 * KIB)
    device = make(node)

    def fail(kind: str, offset: int, length: int) -> None:
        raise ZeroDivisionError

    node.fail = fail
    assert execute(device, RequestType.IN, 0, [view(512)]) == (IOERR, 0)
    node.fail = None
    assert execute(device, RequestType.IN, 0, [view(512)]) == (OK, 512)


# ---------------------------------------------------------------- rerror, werror (row B39), cancelling (row B25)

STOP = ErrorPolicy(OnError.STOP, OnError.STOP)
EVERYTHING: dict[str, tuple[Any, ...]] = {
    "read": (RequestType.IN, 512, [view(512)]),
    "write": (RequestType.OUT, 512, [view(512)]),
    "flush": (RequestType.FLUSH,),
    "discard": (RequestType.DISCARD, 0, (), [Segment(512, 512, False)]),
    "write-zeroes": (RequestType.WRITE_ZEROES, 0, (), [Segment(512, 512, False)]),
}
each_kind = pytest.mark.parametrize("what", EVERYTHING.values(), ids=EVERYTHING)


class FailingNode(ArrayNode):
    """Fails with this error, until it has none; takes a turn of the loop for everything."""

    error = errno.EIO

    def __init__(self) -> None:
        super().__init__(64 * KIB)
        self.pause = self._wait
        self.fail = self._fail

    async def _wait(self) -> None:
        await asyncio.sleep(0)

    def _fail(self, kind: str, offset: int, length: int) -> None:
        if self.error:
            raise BlockError(self.error)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not happen")


@each_kind
def test_parked_request_is_tried_again_and_its_guest_never_knows(what: tuple[Any, ...]) -> None:
    async def everything() -> None:
        node = FailingNode()
        device = make(node, policy=STOP)
        paused: list[bool] = []
        device.parking.paused = paused.append
        told: list[tuple[bool, Action, int]] = []
        device.on_io_error = lambda *what: told.append(what)
        task = asyncio.create_task(device.execute(request(*what)))

        def has_paused(times: int) -> bool:
            return len(paused) == 2 * times - 1

        for times in (1, 2):
            await until(partial(has_paused, times))
            assert not task.done()
            is_read = what[0] == RequestType.IN
            assert told == [(is_read, Action.STOP, errno.EIO)] * times
            # A drain must not wait for people.
            await device.backend.drain()
            if times == 2:
                node.error = 0
            device.parking.resume()
        assert (await task)[0] == OK
        assert paused == [True, False] * 2
        await device.backend.close()

    asyncio.run(everything())


def test_ignored_error_is_a_success_for_the_guest(expect_log: ExpectedLog) -> None:
    expect_log.expect(r"write \(ignored\) failed: ", r"read \(ignored\) failed: ")

    async def everything() -> None:
        device = make(FailingNode(), policy=ErrorPolicy(OnError.IGNORE, OnError.IGNORE))
        assert await device.execute(request(*EVERYTHING["write"])) == (OK, 0)
        # Of data that was not read none is vouched for.
        assert await device.execute(request(*EVERYTHING["read"])) == (OK, 0)

    asyncio.run(everything())


def test_request_behind_the_end_of_a_disk_that_shrank_is_reported(expect_log: ExpectedLog) -> None:
    expect_log.expect("read failed: ")

    async def everything() -> None:
        node = FailingNode()
        device = make(node, policy=STOP)
        pending = asyncio.create_task(device.execute(request(*EVERYTHING["read"])))
        await until(lambda: device.parking.is_paused)
        node.set_length(512)
        device.parking.resume()
        assert (await pending)[0] == IOERR

    asyncio.run(everything())


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_error_of_somebody_else_is_not_tried_before_the_policy_has_seen_it(
    error: int, expect_log: ExpectedLog
) -> None:
    async def everything() -> None:
        node = FailingNode()
        node.error = 0
        device = make(node)
        task = asyncio.create_task(device.execute(request(*EVERYTHING["write"]), error))
        await asyncio.sleep(0)
        assert not node.asked.calls
        if error == errno.ENOSPC:
            device.parking.resume()
            assert await task == (OK, 0)
            assert node.asked.count("write") == 1
        else:
            assert await task == (IOERR, 0)
            assert not node.asked.calls

    if error == errno.EIO:
        expect_log.expect("write failed: ")
    asyncio.run(everything())


@each_kind
@pytest.mark.parametrize("where", ["in the driver", "parked", "held by a drain"])
def test_cancelled_request_is_answered_once_and_leaves_nothing(
    what: tuple[Any, ...], where: str, expect_log: ExpectedLog
) -> None:
    expect_log.expect("Operation canceled")

    async def everything() -> None:
        node = FailingNode()
        device = make(node, policy=STOP)
        if where == "held by a drain":
            await node.drained_begin()
        task = asyncio.create_task(device.execute(request(*what)))
        await asyncio.sleep(0)
        if where == "parked":
            await until(lambda: device.parking.is_paused)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert device.cancelled(request(*what)) == (IOERR, 0)
        if where == "held by a drain":
            node.drained_end()
        assert not device.parking.is_paused
        assert device.backend.in_flight == node.in_flight == 0
        node.error = 0
        assert await device.execute(request(*what)) == (
            OK,
            512 if what[0] == RequestType.IN else 0,
        )
        await device.backend.close()

    asyncio.run(everything())
