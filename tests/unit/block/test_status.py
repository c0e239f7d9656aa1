"""Block status and allocation (row B21): what a layer has, and what a chain of layers amounts to."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedule import HUNT
from tests.unit.block.fakes import EASY, ArrayNode, CowNode, put_above, run_now
from vhostblk.block.backend import BlockBackend
from vhostblk.block.flags import StatusFlag
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import BlockLimits
from vhostblk.block.node import BlockNode
from vhostblk.block.status import (
    BlockStatus,
    StatusRuns,
    block_status,
    has_zero_init,
    is_allocated,
    is_allocated_above,
    status_above,
    statuses_above,
)
from vhostblk.errors import BlockError

DATA, ZERO, VALID = StatusFlag.DATA, StatusFlag.ZERO, StatusFlag.OFFSET_VALID
ALLOCATED, EOF, RAW = StatusFlag.ALLOCATED, StatusFlag.EOF, StatusFlag.RAW
NONE = StatusFlag(0)


class SaysNode(ArrayNode):
    """Answers what the test wants."""

    says = BlockStatus(DATA, 4096)
    child_keys: ClassVar[tuple[str, ...]] = ("backing",)

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        assert not offset % self.limits.request_alignment
        assert not length % self.limits.request_alignment
        return self.says


def test_nobody_knows_what_is_read_where_a_driver_without_backing_nodes_has_nothing() -> None:
    node = SaysNode(8192)
    node.child_keys = ()  # type: ignore[misc]
    for says in (NONE, VALID):
        node.says = BlockStatus(says, 4096)
        assert run_now(block_status(node, 0, 4096)).flags == says


def test_a_driver_that_says_nothing_has_data_everywhere_at_the_same_place() -> None:
    node = ArrayNode(4096)
    status = run_now(block_status(node, 512, 1024))
    assert status == BlockStatus(DATA | VALID | ALLOCATED, 1024, node, 512)
    assert run_now(block_status(node, 512, 9999)).flags & EOF
    assert run_now(block_status(node, 512, 9999)).length == 3584


def test_behind_the_end_is_the_end_and_nothing_is_nothing() -> None:
    assert run_now(block_status(ArrayNode(4096), 4096, 512)) == BlockStatus(EOF, 0)
    assert run_now(block_status(ArrayNode(4096), 0, 0)) == BlockStatus(NONE, 0)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (DATA | ZERO | VALID, DATA | ZERO | VALID | ALLOCATED),
        (DATA | VALID, DATA | VALID | ALLOCATED),
        (ZERO | VALID, ZERO | VALID | ALLOCATED),
        (VALID, VALID | ZERO),
        (DATA | ZERO, DATA | ZERO | ALLOCATED),
        (DATA, DATA | ALLOCATED),
        (ZERO, ZERO | ALLOCATED),
        (NONE, ZERO),
    ],
)
def test_every_answer_of_the_truth_table_without_a_backing_node(
    says: StatusFlag, expected: StatusFlag
) -> None:
    node = SaysNode(8192)
    node.says = BlockStatus(says, 4096)
    assert run_now(block_status(node, 0, 4096)).flags == expected


def test_unallocated_above_a_backing_node_is_not_zero_unless_that_is_shorter() -> None:
    node = CowNode(ArrayNode(1024), 4096)
    assert run_now(block_status(node, 0, 512)).flags == NONE
    assert run_now(block_status(node, 1024, 512)).flags == ZERO


def test_an_answer_for_whole_blocks_is_cut_to_what_was_asked() -> None:
    node = SaysNode(8192, BlockLimits(request_alignment=1024, min_mem_alignment=1))
    node.says = BlockStatus(DATA | VALID, 2048, None, 4096)
    status = run_now(block_status(node, 100, 1000))
    assert (status.length, status.map, status.file) == (1000, 4196, node)


def test_a_raw_answer_is_the_childs_and_a_filter_gives_one() -> None:
    leaf = SaysNode(8192)
    leaf.says = BlockStatus(ZERO | VALID, 512, None, 0)
    status = run_now(block_status(put_above(leaf), 0, 4096))
    assert status == BlockStatus(ZERO | VALID | ALLOCATED, 512, leaf, 0)
    # What the child does not have itself is not allocated because a filter is above.
    empty = CowNode(None, 8192)
    assert run_now(is_allocated(put_above(empty), 0, 512)) == (False, 512)


def test_zeroes_of_the_file_show_through_a_format_that_asks_for_it() -> None:
    leaf, node = SaysNode(4096), SaysNode(8192)
    leaf.says = BlockStatus(ZERO | VALID, 512)
    node.says = BlockStatus(DATA | VALID | StatusFlag.RECURSE, 1024, leaf, 0)
    status = run_now(block_status(node, 0, 1024))
    assert (status.flags, status.length) == (DATA | VALID | ZERO | ALLOCATED, 512)
    assert not run_now(block_status(node, 0, 1024, precise=False)).flags & ZERO
    # Behind the end of the file, and where it fails to answer.
    node.says = BlockStatus(DATA | VALID | StatusFlag.RECURSE, 1024, leaf, 4096)
    assert run_now(block_status(node, 0, 1024)).flags & ZERO

    class Failing(SaysNode):
        async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
            raise BlockError(errno.EIO)

    node.says = BlockStatus(DATA | VALID | StatusFlag.RECURSE, 1024, Failing(4096), 0)
    assert run_now(block_status(node, 0, 1024)).flags == DATA | VALID | ALLOCATED
    with pytest.raises(BlockError):
        run_now(block_status(Failing(4096), 0, 512))


ALIGN = 512


class AlignedNode(ArrayNode):
    """Answers in whole blocks, as drivers do: as much of a run as it likes."""

    def __init__(self, blocks: list[bool], most: int) -> None:
        limits = BlockLimits(request_alignment=ALIGN, min_mem_alignment=1)
        super().__init__(len(blocks) * ALIGN, limits)
        self.blocks, self.most = blocks, most

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        assert not (offset | length) % ALIGN
        assert length
        assert offset + length <= self.length
        first = offset // ALIGN
        end = first
        while end < (offset + length) // ALIGN and self.blocks[end] == self.blocks[first]:
            end += 1
        count = min(end - first, self.most) * ALIGN
        flags = DATA | VALID if self.blocks[first] else ZERO
        return BlockStatus(flags, count, map=offset)


@settings(max_examples=300 * HUNT)
@given(
    st.lists(st.booleans(), min_size=1, max_size=12),
    st.integers(1, 12),
    st.integers(0, 13 * ALIGN),
    st.integers(0, 13 * ALIGN),
)
def test_any_range_of_a_driver_that_answers_in_blocks_is_answered_exactly(
    blocks: list[bool], most: int, offset: int, length: int
) -> None:
    """Row B21's proof: whatever the alignment of the question, every byte has its own block's answer."""
    node = AlignedNode(blocks, most)
    end = min(offset + length, node.length)
    while offset < end:
        status = run_now(block_status(node, offset, end - offset))
        assert 0 < status.length <= end - offset
        for position in range(offset, offset + status.length):
            assert bool(status.flags & DATA) == blocks[position // ALIGN]
        if status.flags & VALID:
            assert (status.file, status.map) == (node, offset)
        assert bool(status.flags & EOF) == (offset + status.length == node.length)
        offset += status.length


def test_driver_that_answers_for_part_of_a_block_has_a_bug() -> None:
    node = SaysNode(4096, BlockLimits(request_alignment=ALIGN, min_mem_alignment=1))
    for wrong in (0, 100, ALIGN + 1):
        node.says = BlockStatus(DATA, wrong)
        with pytest.raises(AssertionError):
            run_now(block_status(node, 0, 2048))


CLUSTER = 64
layers = st.lists(st.tuples(st.integers(1, 8), st.sets(st.integers(0, 8))), min_size=3, max_size=3)


def chain(shape: list[tuple[int, set[int]]]) -> list[CowNode]:
    """Top first."""
    nodes: list[CowNode] = []
    below: BlockNode | None = None
    for number, (clusters, written) in enumerate(reversed(shape)):
        node = CowNode(below, clusters * CLUSTER, CLUSTER, limits=EASY)
        node.data[:] = bytes([number + 1]) * len(node.data)
        node.allocated = {cluster for cluster in written if cluster < clusters}
        nodes.insert(0, node)
        below = node
    return nodes


@settings(max_examples=300 * HUNT)
@given(layers, st.integers(0, 8 * CLUSTER), st.integers(0, 8 * CLUSTER))
def test_three_layers_of_different_lengths_agree_with_a_byte_model(
    shape: list[tuple[int, set[int]]], offset: int, length: int
) -> None:
    agree_with_the_model(shape, offset, length)


def test_every_three_layers_of_up_to_two_clusters_agree_with_a_byte_model() -> None:
    written = [set[int](), {0}, {1}, {0, 1}]
    each = [
        (clusters, has) for clusters in (1, 2) for has in written if clusters > max(has, default=0)
    ]
    for shape in itertools.product(each, repeat=3):
        for offset in (0, CLUSTER // 2, CLUSTER, 2 * CLUSTER - 1):
            agree_with_the_model(list(shape), offset, 2 * CLUSTER)


def agree_with_the_model(shape: list[tuple[int, set[int]]], offset: int, length: int) -> None:
    nodes = chain(shape)
    top = nodes[0]

    def owner(position: int) -> int | None:
        """Which layer has the byte; a layer that is too short ends the search: zeroes."""
        for number, node in enumerate(nodes):
            if position >= node.length:
                return None
            if position // CLUSTER in node.allocated:
                return number
        return None

    status = run_now(status_above(top, None, offset, length))
    if offset >= top.length:
        assert status.length == 0
        assert status.flags & EOF
        return
    if not length:
        assert status.length == 0
        return
    assert 0 < status.length <= min(length, top.length - offset)
    assert bool(status.flags & EOF) == (offset + status.length == top.length)
    for position in range(offset, offset + status.length):
        if status.flags & ZERO:
            assert owner(position) is None
        else:
            assert status.flags & DATA
            assert owner(position) is not None
    # The same for "above the base": somebody has it, or nobody.
    for base in (nodes[1], nodes[2], None):
        above = nodes[: nodes.index(base)] if base in nodes else nodes
        found, run = run_now(is_allocated_above(top, base, offset, length))
        assert 0 < run <= length
        for position in range(offset, min(offset + run, top.length)):
            has = any(
                position < node.length and position // CLUSTER in node.allocated for node in above
            )
            if not found:
                assert not has
        if found:
            assert any(
                offset < node.length and offset // CLUSTER in node.allocated for node in above
            )


class ManyNode(CowNode):
    """Says what so many runs are at once, and remembers from where on it was asked."""

    most = 100

    def __init__(self, backing: BlockNode | None, size: int) -> None:
        super().__init__(backing, size, CLUSTER, limits=EASY)
        self.places: list[int] = []

    async def driver_block_statuses(self, offset: int, length: int) -> StatusRuns:
        self.places.append(offset)
        runs: list[tuple[int, int, int]] = []
        at = offset
        while at < offset + length and len(runs) < self.most:
            found = await self.driver_block_status(at, offset + length - at, True)
            runs.append((int(found.flags), found.length, at))
            at += found.length
        return StatusRuns(runs, self)


def chain_of_many(shape: list[tuple[int, set[int]]], most: int) -> list[ManyNode]:
    """Top first."""
    nodes: list[ManyNode] = []
    for clusters, written in reversed(shape):
        node = ManyNode(nodes[0] if nodes else None, clusters * CLUSTER)
        node.allocated = {cluster for cluster in written if cluster < clusters}
        node.most = most
        nodes.insert(0, node)
    return nodes


@settings(max_examples=300 * HUNT)
@given(layers, st.integers(1, 5), st.integers(0, 8 * CLUSTER - 1), st.integers(1, 8 * CLUSTER))
def test_many_statuses_of_three_layers_are_those_of_one_after_the_other(
    shape: list[tuple[int, set[int]]], most: int, offset: int, length: int
) -> None:
    nodes = chain_of_many(shape, most)
    top = nodes[0]
    offset = min(offset, top.length - 1)
    length = min(length, top.length - offset)
    for base in (nodes[1], nodes[2], None):
        for node in nodes:
            node.places.clear()
        found = run_now(statuses_above(top, base, offset, length))
        asked = [list(node.places) for node in nodes]
        position = offset
        for flags, count in found:
            alone = run_now(status_above(top, base, position, offset + length - position))
            assert (flags ^ alone.flags) & ~EOF == 0
            assert 0 < count <= alone.length
            position += count
            assert bool(flags & EOF) == (position == top.length)
        assert position <= offset + length
        # What nobody sees is nobody's business.
        for number, places in enumerate(asked):
            for place in places:
                assert not any(place // CLUSTER in node.allocated for node in nodes[:number])


def test_each_layer_is_asked_once_for_all_that_it_shows() -> None:
    # Where the one has nothing, the other has, in turns; the last two clusters are the first layer's.
    nodes = chain_of_many([(8, {0, 2, 4, 6, 7}), (8, {1, 5}), (8, {1, 3, 6})], 100)
    found = run_now(statuses_above(nodes[0], None, 0, 8 * CLUSTER))
    assert sum(count for _, count in found) == 8 * CLUSTER
    assert [node.places for node in nodes] == [[0], [CLUSTER], [3 * CLUSTER]]


def test_zero_init_is_never_promised_above_a_backing_node() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        memory = await graph.add("raw,node-name=m,file.driver=memory,file.size=1M")
        assert has_zero_init(memory)
        assert not has_zero_init(CowNode(memory, 4096))
        assert not has_zero_init(ArrayNode())
        memory.parents[0].detach()
        await graph.close_all()

    asyncio.run(scenario())


def test_holes_of_a_file_are_zeroes_and_its_data_is_data(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 20)
        os.pwrite(file.fileno(), b"x" * 65536, 262144)

    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add(
            {"driver": "raw", "offset": 65536, "file": {"driver": "file", "filename": str(path)}}
        )
        seen: list[tuple[int, bool]] = []
        at = 0
        while at < node.length:
            status = await block_status(node, at, node.length - at)
            seen.append((at, bool(status.flags & ZERO)))
            assert status.file is node.children["file"].node
            assert status.map == at + 65536
            at += status.length
        assert seen == [(0, True), (196608, False), (262144, True)]
        assert (await block_status(node, 0, 4096, precise=False)).flags & DATA
        user = BlockBackend(node, "user", writable=True)
        await user.pwritev(300_000, IoVec.of(b"y"))
        assert not (await block_status(node, 299_520, 512)).flags & ZERO
        await user.close()
        await graph.close_all()

    asyncio.run(scenario())
