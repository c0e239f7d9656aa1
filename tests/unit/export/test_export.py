"""What an export tells whoever manages the daemon, and when."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest

from tests.unit.block.fakes import ArrayNode
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm
from vhostblk.block.quiesce import drained
from vhostblk.errors import BlockError
from vhostblk.export.error_policy import Action, ErrorPolicy, IoStatus, OnError
from vhostblk.export.events import BlockIOError, ExportEvent, QueuesPaused, QueuesResumed
from vhostblk.export.export import Export
from vhostblk.export.options import ExportConfig
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.blk_request import BlkRequest


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


def failing(error: int) -> Callable[[str, int, int], None]:
    def fail(kind: str, offset: int, length: int) -> None:
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
        assert export.resume() == 2
        assert export.io_status is IoStatus.OK
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
