"""Who forbids which operations, and edges that stay (row B11)."""

from __future__ import annotations

import errno

import pytest

from tests.unit.block.fakes import ArrayNode, NoOptions, put_above
from vhostblk.block.edge import Edge
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import (
    OpBlockers,
    OpType,
    Reason,
    check_op,
    freeze_backing_chain,
    unfreeze_backing_chain,
)
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import Role
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import ConfigError


class Overlay(BlockNode):
    driver_name = "overlay"
    options_type = NoOptions


def overlay(name: str, backing: BlockNode) -> Overlay:
    node = Overlay(name, NodeOptions(), NoOptions())
    Edge(node, backing, "backing", Role.COW, Perm.NONE, Perm.ALL).attach()
    return node


def test_operation_types_are_numbered_as_in_the_documentation() -> None:
    assert [op.name for op in OpType] == [
        "BACKUP_SOURCE", "BACKUP_TARGET", "CHANGE", "COMMIT_SOURCE", "COMMIT_TARGET", "DATAPLANE",
        "DRIVE_DEL", "EJECT", "EXTERNAL_SNAPSHOT", "INTERNAL_SNAPSHOT", "INTERNAL_SNAPSHOT_DELETE",
        "MIRROR_SOURCE", "MIRROR_TARGET", "RESIZE", "STREAM", "REPLACE",
    ]  # fmt: skip
    assert list(OpType) == list(range(16))


@pytest.mark.parametrize("operation", list(OpType))
def test_every_operation_is_refused_with_ebusy_and_the_latest_reason_while_blocked(
    operation: OpType,
) -> None:
    node = ArrayNode()
    first, second = Reason("a mirror runs"), Reason("a backup runs")
    node.op_blockers.block(first)
    node.op_blockers.block(second, (operation,))
    with pytest.raises(ConfigError, match="Node 'array' is busy: a backup runs") as caught:
        check_op(node, operation)
    assert caught.value.errno == errno.EBUSY
    node.op_blockers.unblock(second)
    with pytest.raises(ConfigError, match="a mirror runs"):
        check_op(node, operation)
    node.op_blockers.unblock(first)
    check_op(node, operation)
    assert not node.op_blockers


def test_equal_text_is_not_the_same_reason() -> None:
    blockers = OpBlockers()
    blockers.block(Reason("busy"), (OpType.RESIZE,))
    blockers.unblock(Reason("busy"))
    assert blockers.reason(OpType.RESIZE) is not None


def test_backing_file_may_only_be_committed_into_while_its_overlay_uses_it() -> None:
    base, other = ArrayNode(), ArrayNode()
    edge = overlay("top", base).children["backing"]
    for operation in OpType:
        blocked = base.op_blockers.reason(operation) is not None
        assert blocked == (operation is not OpType.COMMIT_TARGET)
    with pytest.raises(ConfigError, match="it is used by node 'top' as 'backing'"):
        check_op(base, OpType.REPLACE)
    with GraphTransaction() as change:
        change.move(edge, other)
    assert not base.op_blockers
    assert other.op_blockers
    edge.detach()
    assert not other.op_blockers


def test_frozen_chain_keeps_its_edges_and_cannot_be_frozen_twice() -> None:
    base = ArrayNode()
    middle = overlay("middle", base)
    top = put_above(overlay("upper", middle), "filter")
    freeze_backing_chain(top, base)
    for node in (top, middle):
        for edge in tuple(node.children.values()):
            with pytest.raises(ConfigError, match="frozen") as caught:
                edge.detach()
            assert caught.value.errno == errno.EPERM
            assert edge in edge.node.parents
            with pytest.raises(ConfigError, match="frozen"), GraphTransaction() as change:
                change.move(edge, ArrayNode())
    with pytest.raises(ConfigError, match="frozen"):
        freeze_backing_chain(middle, base)
    unfreeze_backing_chain(top, base)
    freeze_backing_chain(middle, base)
    middle_edge = middle.children["backing"]
    unfreeze_backing_chain(middle, base)
    middle_edge.detach()


def test_part_of_a_frozen_chain_is_left_as_it_was_when_freezing_fails() -> None:
    base = ArrayNode()
    middle = overlay("middle", base)
    top = overlay("top", middle)
    freeze_backing_chain(middle, base)
    with pytest.raises(ConfigError, match="frozen"):
        freeze_backing_chain(top, base)
    assert not top.children["backing"].frozen


def test_base_that_is_not_below_is_refused() -> None:
    with pytest.raises(ConfigError, match="Node 'array' is not in the backing chain"):
        freeze_backing_chain(overlay("top", ArrayNode()), ArrayNode())
