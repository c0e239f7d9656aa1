"""What an export tells whoever manages the daemon, and when."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest

from tests.unit.block.fakes import ArrayNode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.node import BlockNode, BlockSizes
from vhostblk.block.permissions import Perm
from vhostblk.block.quiesce import drained
from vhostblk.errors import BlockError, ConfigError
from vhostblk.export.error_policy import Action, ErrorPolicy, IoStatus, OnError
from vhostblk.export.events import (
    BlockIOError,
    ExportEvent,
    MediumInserted,
    MediumRemoved,
    QueuesPaused,
    QueuesResumed,
)
from vhostblk.export.export import Export
from vhostblk.export.options import ExportConfig
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.blk_request import BlkRequest, Segment


def with_export(
    policy: ErrorPolicy,
    scenario: Callable[[Export, ArrayNode, list[ExportEvent]], Awaitable[None]],
) -> None:
    """An export on a disk that fails, without a socket, on the Python data path."""

    async def everything() -> None:
        node, events = ArrayNode(65536), list[ExportEvent]()
        config = ExportConfig(id="e", node_name="array", writable=True, errors=policy)

        def seen(event: ExportEvent) -> None:
            # A query never shows less than events have told (row B39.3).
            if isinstance(event, BlockIOError) and event.action is Action.STOP:
                assert export.io_status is not IoStatus.OK
            events.append(event)

        export = await Export.open(config, node, [], on_event=seen)
        try:
            await scenario(export, node, events)
        finally:
            await export.close()

    asyncio.run(everything())


def write(export: Export) -> asyncio.Task[tuple[int, int]]:
    request = BlkRequest(head=0, status_byte=memoryview(bytearray(1)), type=RequestType.OUT)
    request.length, request.data = 512, [memoryview(bytearray(512))]
    return asyncio.create_task(export.device.execute(request))


def failing(error: int, what: str = "") -> Callable[[str, int, int], None]:
    def fail(kind: str, offset: int, length: int) -> None:
        if what in ("", kind):
            raise BlockError(error)

    return fail


def test_export_is_a_root_edge_with_the_permissions_it_needs_until_it_is_closed() -> None:
    """Row B08's proof."""
    nodes: list[ArrayNode] = []

    async def scenario(export: Export, node: ArrayNode, events: list[ExportEvent]) -> None:
        nodes.append(node)
        (edge,) = node.parents
        assert edge.parent is export.device.backend
        assert not isinstance(edge.parent, BlockNode)
        assert (edge.node, edge.describe()) == (node, "export 'e'")
        assert edge.perm == Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED
        assert edge.shared == Perm.ALL
        # It is drained with its node: requests wait, and nothing is lost.
        async with drained(node):
            task = write(export)
            await asyncio.sleep(0)
            assert (node.asked.calls, task.done()) == ([], False)
        assert (await task)[0] == 0
        assert node.asked.of("write") == [(0, 512)]

    with_export(ErrorPolicy(), scenario)
    assert not nodes[0].parents


def test_error_is_told_before_the_pause_and_the_status_is_set_before_both(
    expect_log: ExpectedLog,
) -> None:
    expect_log.expect("a write failed: No space left on device: its queues are paused")

    async def scenario(export: Export, node: ArrayNode, events: list[ExportEvent]) -> None:
        node.fail = failing(errno.ENOSPC)
        tasks = [write(export), write(export)]
        await asyncio.sleep(0)
        error = BlockIOError(
            "e", "array", "write", Action.STOP, nospace=True, reason="No space left on device"
        )
        assert events == [error, QueuesPaused("e"), error]
        assert export.io_status is IoStatus.NOSPACE
        node.fail = None
        assert (export.resume(), export.io_status) == (2, IoStatus.OK)
        assert [(await task)[0] for task in tasks] == [0, 0]
        assert events[3:] == [QueuesResumed("e")]
        assert [event.NAME for event in events[1:]] == [
            "QUEUE_PAUSED",
            "BLOCK_IO_ERROR",
            "QUEUE_RESUMED",
        ]

    with_export(ErrorPolicy(), scenario)


@pytest.mark.parametrize(
    ("policy", "action"), [(OnError.REPORT, Action.REPORT), (OnError.IGNORE, Action.IGNORE)]
)
def test_errors_that_stop_nothing_are_told_too_without_a_status(
    policy: OnError, action: Action, expect_log: ExpectedLog
) -> None:
    expect_log.expect("failed: Input/output error")

    async def scenario(export: Export, node: ArrayNode, events: list[ExportEvent]) -> None:
        node.fail = failing(errno.EIO)
        assert (await write(export))[0] == (0 if action is Action.IGNORE else 1)
        assert events == [
            BlockIOError("e", "array", "write", action, nospace=None, reason="Input/output error")
        ]
        assert export.io_status is IoStatus.OK
        assert export.resume() == 0
        node.fail = None

    with_export(ErrorPolicy(OnError.REPORT, policy), scenario)


# ---------------------------------------------------------------- another disk (row B38)


def test_what_waits_to_be_tried_again_was_meant_for_the_old_disk_and_is_reported(
    expect_log: ExpectedLog,
) -> None:
    expect_log.expect("its queues are paused")

    async def scenario(export: Export, node: ArrayNode, events: list[ExportEvent]) -> None:
        node.fail = failing(errno.EIO, "write")
        task = write(export)
        await asyncio.sleep(0)
        new = ArrayNode(65536)
        await export.medium.change(BlockGraph(), new)
        assert (await task)[0] == 1
        assert not new.asked.calls
        assert events[-2:] == [MediumRemoved("e", "array"), MediumInserted("e", "array")]
        assert (await write(export))[0] == 0
        assert new.asked.count("write") == 1

    with_export(ErrorPolicy(werror=OnError.STOP), scenario)


def test_segments_of_one_request_are_not_done_on_two_disks(expect_log: ExpectedLog) -> None:
    expect_log.expect("write_zeroes failed: No medium found")

    async def scenario(export: Export, node: ArrayNode, events: list[ExportEvent]) -> None:
        gate = asyncio.Event()
        zero = node.driver_pwrite_zeroes

        async def wait(offset: int, length: int, flags: int) -> None:
            await gate.wait()
            await zero(offset, length, flags)

        node.driver_pwrite_zeroes = wait  # type: ignore[method-assign]
        request = BlkRequest(0, memoryview(bytearray(1)), RequestType.WRITE_ZEROES)
        request.segments = [Segment(offset, 4096, False) for offset in (0, 8192)]
        task = asyncio.create_task(export.device.execute(request))
        await asyncio.sleep(0)
        new = ArrayNode(65536)
        change = asyncio.create_task(export.medium.change(BlockGraph(), new))
        while not export.device.backend.quiesced:  # noqa: ASYNC110
            await asyncio.sleep(0)
        gate.set()
        await change
        assert (await task)[0] == 1
        assert node.asked.of("zero") == [(0, 4096)]
        assert not new.asked.calls

    with_export(ErrorPolicy(), scenario)


def test_disk_with_larger_blocks_than_the_guest_was_told_is_refused() -> None:
    async def scenario(export: Export, node: ArrayNode, events: list[ExportEvent]) -> None:
        new = ArrayNode(65536)
        new.block_sizes = BlockSizes(logical=4096)
        with pytest.raises(ConfigError, match="blocks of 4096 bytes"):
            await export.medium.change(BlockGraph(), new)
        assert export.device.backend.node is node

    with_export(ErrorPolicy(), scenario)


def test_disk_that_cannot_be_flushed_is_ejected_by_force_only(expect_log: ExpectedLog) -> None:
    expect_log.expect("flush of its former disk failed: Input/output error")

    async def scenario(export: Export, node: ArrayNode, events: list[ExportEvent]) -> None:
        await write(export)
        node.fail = failing(errno.EIO)
        with pytest.raises(ConfigError, match="Error flushing node 'array': Input/output error"):
            await export.medium.remove(BlockGraph())
        assert export.medium.is_inserted
        await export.medium.remove(BlockGraph(), force=True)
        assert not export.medium.is_inserted
        assert export.device.capacity == 0

    with_export(ErrorPolicy(), scenario)
