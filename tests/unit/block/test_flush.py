"""Flush, FUA and generations (row B19): what was promised is on the disk."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.unit.block.fakes import ArrayNode, CowNode, PassNode, put_above, run_now, turns
from vhostblk.block import clear, pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.flush import flush_all
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import BlockLimits
from vhostblk.block.node import BlockNode, PastWrites, Req
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import BlockError

FUA = int(Req.FUA)


def write(node: ArrayNode, offset: int, content: bytes, flags: int = 0) -> None:
    run_now(pipeline.pwritev(node.lane, offset, IoVec.of(content), flags))


def test_first_flush_after_open_reaches_the_disk() -> None:
    """Whoever served the file before us may have left writes in the page cache."""
    node = ArrayNode()
    run_now(pipeline.flush(node))
    assert node.asked.count("flush") == 1


def test_flush_is_skipped_only_when_nothing_was_written_since_the_last() -> None:
    node = ArrayNode()
    run_now(pipeline.flush(node))
    run_now(pipeline.flush(node))
    assert node.asked.count("flush") == 1
    for step in (
        pipeline.pwritev(node.lane, 0, IoVec.of(b"x")),
        clear.pwrite_zeroes(node, 0, 1),
        clear.pdiscard(node, 0, 1),
        pipeline.truncate(node, 1024),
    ):
        run_now(step)
        before = node.asked.count("flush")
        run_now(pipeline.flush(node))
        assert node.asked.count("flush") == before + 1


def test_every_emulated_fua_write_reaches_the_disk_also_the_first_after_a_flush() -> None:
    """QEMU looks at the generation before it grows, and so skips every other flush."""
    node = ArrayNode()
    for number in range(1, 5):
        write(node, 0, bytes([number]) * 512, FUA)
        assert node.durable[:512] == bytes([number]) * 512
    run_now(pipeline.flush(node))
    write(node, 0, b"last", FUA)
    assert node.durable[:4] == b"last"


def test_native_fua_is_passed_down_on_every_fragment_and_needs_no_flush() -> None:
    node = ArrayNode(limits=BlockLimits(min_mem_alignment=1, max_transfer=512), write_flags=FUA)
    write(node, 0, b"x" * 1024, FUA)
    assert node.asked.calls == [("write", 0, 512, FUA), ("write", 512, 512, FUA)]
    assert node.durable[:1024] == b"x" * 1024


def test_emulated_fua_flushes_once_after_the_last_fragment() -> None:
    node = ArrayNode(limits=BlockLimits(min_mem_alignment=1, max_transfer=512))
    write(node, 0, b"x" * 1024, FUA)
    assert [kind for kind, *_ in node.asked.calls] == ["write", "write", "flush-os", "flush"]


def test_failed_fua_write_is_not_flushed() -> None:
    node = ArrayNode()

    def fail(kind: str, offset: int, length: int) -> None:
        if kind == "write":
            raise BlockError(errno.EIO)

    node.fail = fail
    with pytest.raises(BlockError):
        write(node, 0, b"x", FUA)
    assert not node.asked.count("flush")


def test_failed_flush_is_tried_again() -> None:
    node = ArrayNode()

    def fail(kind: str, offset: int, length: int) -> None:
        if kind == "flush":
            raise BlockError(errno.EIO)

    node.fail = fail
    write(node, 0, b"x")
    with pytest.raises(BlockError):
        run_now(pipeline.flush(node))
    node.fail = None
    run_now(pipeline.flush(node))
    assert node.durable[:1] == b"x"


def test_concurrent_flushes_share_the_disks_work() -> None:
    """N writes and three flushes need at most two disk flushes."""

    async def scenario() -> None:
        node = ArrayNode()
        node.pause = lambda: turns(4)
        for offset in range(5):
            await pipeline.pwritev(node.lane, offset, IoVec.of(b"x"))
        await asyncio.wait_for(asyncio.gather(*(pipeline.flush(node) for _ in range(3))), 5)
        assert 1 <= node.asked.count("flush") <= 2
        assert node.durable[:5] == b"xxxxx"

    asyncio.run(scenario())


def test_write_that_completes_during_a_flush_is_the_next_flushs() -> None:
    async def scenario() -> None:
        node = ArrayNode()
        gate = asyncio.Event()

        async def pause() -> None:
            if node.asked.count("flush"):  # the disk is at it
                await gate.wait()

        node.pause = pause
        first = asyncio.create_task(pipeline.flush(node))
        await turns(2)
        assert node.asked.count("flush") == 1
        node.pause = None
        await pipeline.pwritev(node.lane, 0, IoVec.of(b"late"))
        second = asyncio.create_task(pipeline.flush(node))
        await turns(2)
        gate.set()
        await asyncio.wait_for(asyncio.gather(first, second), 5)
        assert node.durable[:4] == b"late"

    asyncio.run(scenario())


def test_cancelled_flush_in_the_queue_does_not_hold_up_the_others() -> None:
    async def scenario() -> None:
        node = ArrayNode()
        node.pause = lambda: turns(5)
        tasks = [asyncio.create_task(pipeline.flush(node)) for _ in range(4)]
        await turns(2)
        tasks[1].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert tasks[1].cancelled()
        assert not node.flush_active
        assert not node.flush_queue
        assert not node.in_flight

    asyncio.run(scenario())


def test_cancelling_the_one_whose_turn_it_is_passes_the_turn_on() -> None:
    async def scenario() -> None:
        node = ArrayNode()
        node.pause = lambda: turns(3)
        first = asyncio.create_task(pipeline.flush(node))
        await turns(1)
        second = asyncio.create_task(pipeline.flush(node))
        third = asyncio.create_task(pipeline.flush(node))
        await turns(1)
        await first
        # Its turn has been given to it, but it has not run yet.
        second.cancel()
        await asyncio.wait_for(third, 5)
        assert not node.in_flight

    asyncio.run(scenario())


def test_no_flush_skips_the_disk_but_not_the_operating_system_nor_the_children() -> None:
    node = ArrayNode(common=NodeOptions(cache_no_flush=True))
    write(node, 0, b"x", FUA)
    run_now(pipeline.flush(node))
    assert node.asked.count("flush") == 0
    assert node.asked.count("flush-os") == 2

    child = ArrayNode()
    above = put_above(child)
    above.no_flush = True
    run_now(pipeline.flush(above))
    assert child.asked.count("flush") == 1


def user_of(node: BlockNode, writes: list[PastWrites]) -> BlockBackend:
    """A user that has written through extents what is in the list, which is empty once he was asked."""
    user = BlockBackend(node, "the test", writable=True, shared=Perm.ALL)
    user.attach(take_writes=lambda _ranges: writes.pop() if writes else PastWrites())
    return user


def test_writes_past_the_pipeline_count_as_writes() -> None:
    """The engine's own writes: the next flush must not be skipped."""
    node = ArrayNode()
    above = put_above(node)
    engine: list[PastWrites] = []
    user_of(above, engine)
    run_now(pipeline.flush(above))
    run_now(pipeline.flush(above))
    assert node.asked.count("flush") == 1
    engine.append(PastWrites(1, 512))
    run_now(pipeline.flush(above))
    assert node.asked.count("flush") == 2
    run_now(pipeline.flush(above))
    assert node.asked.count("flush") == 2
    assert (above.write_log.highest, node.write_log.highest) == (512, 512)


def test_flush_that_comes_from_below_sees_writes_past_the_pipeline_too() -> None:
    """Whoever else uses the node at the bottom has to make durable what the engine wrote above."""
    node = ArrayNode()
    engine: list[PastWrites] = []
    user_of(put_above(node), engine)
    run_now(pipeline.flush(node))
    engine.append(PastWrites(1, 512))
    run_now(pipeline.flush(node))
    assert node.asked.count("flush") == 2


def test_writes_past_the_pipeline_still_count_when_the_writer_has_left() -> None:
    node = ArrayNode()
    engine: list[PastWrites] = []
    user = user_of(put_above(node), engine)
    run_now(pipeline.flush(node))
    engine.append(PastWrites(5, 512))
    user._edge.detach()
    run_now(pipeline.flush(node))
    assert node.asked.count("flush") == 2


def test_writes_past_the_pipeline_are_those_of_the_node_that_was_there() -> None:
    """Another node takes its place: that has been written by nobody."""
    old, new = ArrayNode(), ArrayNode()
    engine: list[PastWrites] = []
    user = user_of(old, engine)
    for node in (old, new):
        run_now(pipeline.flush(node))
    engine.append(PastWrites(1, 512))
    with GraphTransaction() as change:
        change.move(user._edge, new)
    assert (old.highest_offset(), new.highest_offset()) == (512, 0)
    for node in (old, new):
        run_now(pipeline.flush(node))
    assert (old.asked.count("flush"), new.asked.count("flush")) == (2, 1)


class Failing(PassNode):
    """Cannot give its caches to the one below."""

    async def driver_flush_to_os(self) -> None:
        raise BlockError(errno.EDQUOT)


def test_layer_that_cannot_write_its_caches_fails_the_flush_and_nobody_below_is_asked() -> None:
    leaf = ArrayNode()
    with pytest.raises(BlockError) as error:
        run_now(pipeline.flush(put_above(leaf, kind=Failing)))
    assert error.value.errno == errno.EDQUOT
    assert leaf.asked.count("flush") == 0


def failing_flush(node: ArrayNode) -> None:
    def fail(kind: str, offset: int, length: int) -> None:
        if kind == "flush":
            raise BlockError(errno.EDQUOT)

    node.fail = fail


def test_failure_of_a_flush_below_is_one_of_the_flush_above() -> None:
    leaf = ArrayNode()
    top = put_above(leaf)
    failing_flush(leaf)
    run_now(pipeline.pwritev(top.lane, 0, IoVec.of(b"x")))
    for _ in range(2):
        with pytest.raises(BlockError) as error:
            run_now(pipeline.flush(top))
        assert error.value.errno == errno.EDQUOT
    leaf.fail = None
    run_now(pipeline.flush(top))
    assert leaf.durable[:1] == b"x"


@pytest.mark.parametrize("kind", ["write", "zeroes", "unaligned"])
def test_durable_write_whose_flush_fails_has_failed(kind: str) -> None:
    node = ArrayNode(limits=BlockLimits(request_alignment=512, min_mem_alignment=1))
    failing_flush(node)
    requests: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "write": lambda: pipeline.pwritev(node.lane, 0, IoVec.of(bytes(512)), FUA),
        "unaligned": lambda: pipeline.pwritev(node.lane, 7, IoVec.of(b"x"), FUA),
        "zeroes": lambda: clear.pwrite_zeroes(node, 0, 512, FUA),
    }
    with pytest.raises(BlockError) as error:
        run_now(requests[kind]())
    assert error.value.errno == errno.EDQUOT


def test_what_a_layer_only_reads_is_not_flushed_with_it() -> None:
    base = ArrayNode()
    top = CowNode(base, 8192)
    run_now(pipeline.pwritev(base.lane, 0, IoVec.of(b"x")))
    run_now(pipeline.flush(top))
    assert top.asked.count("flush") == 1
    assert base.asked.count("flush") == 0


class Responsible(PassNode):
    """Flushes whatever is below by itself."""

    async def driver_flush_all(self) -> bool:
        return True


def test_driver_that_is_responsible_for_all_beneath_is_the_only_one_asked() -> None:
    leaf = ArrayNode()
    run_now(pipeline.flush(put_above(leaf, kind=Responsible)))
    assert leaf.asked.calls == []


def test_all_nodes_are_flushed_whatever_fails_and_the_first_error_is_told() -> None:
    nodes = [ArrayNode(), ArrayNode(), ArrayNode()]
    for node, error in zip(nodes[:2], (errno.EDQUOT, errno.EIO), strict=True):

        def fail(kind: str, offset: int, length: int, error: int = error) -> None:
            raise BlockError(error)

        node.fail = fail
    with pytest.raises(BlockError) as caught:
        run_now(flush_all(list(nodes)))
    assert caught.value.errno == errno.EDQUOT
    assert [node.asked.count("flush") for node in nodes] == [0, 0, 1]
