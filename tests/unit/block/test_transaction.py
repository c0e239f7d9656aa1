"""Changes of the graph that happen as a whole or leave no trace (rows B08.8 and B09.4)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from tests.unit.block.fakes import ArrayNode, put_above
from vhostblk.block.edge import Edge
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import Role
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import ConfigError

FILTERED = Role.FILTERED | Role.PRIMARY


def snapshot(*nodes: BlockNode) -> list[Any]:
    """Everything about the graph around some nodes that a transaction may touch."""
    return [
        (
            node.quiesced,
            [(edge, edge.node, edge.perm, edge.shared) for edge in node.parents],
            [
                (name, edge, edge.node, edge.perm, edge.shared)
                for name, edge in node.children.items()
            ],
        )
        for node in nodes
    ]


def test_all_steps_are_undone_if_the_outcome_is_not_allowed() -> None:
    left, right = ArrayNode(), ArrayNode()
    top, other = put_above(left, "top"), put_above(right, "other")
    guard = Edge(put_above(ArrayNode(), "guard"), right, "spare", Role.DATA, Perm.NONE, Perm.NONE)
    mover = top.children["file"]
    mover.perm = Perm.NONE
    other.children["file"].detach()
    guard.attach()
    before = snapshot(left, right, top, other, guard.parent)  # type: ignore[arg-type]
    user = Edge(put_above(ArrayNode(), "user"), top, "x", Role.DATA, Perm.WRITE, Perm.ALL)
    change = GraphTransaction()
    change.attach(user)
    change.move(mover, right)
    with pytest.raises(ConfigError, match="node 'top' as 'file' cannot have permission 'write'"):
        change.commit()
    del before[2:4]
    assert snapshot(left, right, guard.parent) == before  # type: ignore[arg-type]
    assert mover.node is left
    assert not top.parents


def test_error_between_steps_undoes_those_before_it() -> None:
    node = ArrayNode()
    edge = put_above(node).children["file"]
    before = snapshot(node)
    with suppress(RuntimeError), GraphTransaction() as change:
        change.detach(edge)
        raise RuntimeError
    assert snapshot(node) == before


def test_cycle_is_refused_and_named() -> None:
    bottom = ArrayNode()
    middle = put_above(bottom, "middle")
    top = put_above(middle, "top")
    with (
        pytest.raises(
            ConfigError,
            match="Making 'top' the 'file' child of <pass node 'middle'> would create a cycle",
        ),
        GraphTransaction() as change,
    ):
        change.move(middle.children["file"], top)
    assert middle.children["file"].node is bottom
    with pytest.raises(ConfigError, match="would create a cycle"), GraphTransaction() as change:
        change.move(middle.children["file"], middle)


def test_node_reached_on_two_ways_is_checked_when_both_parents_are_known() -> None:
    """A writer above a diamond: the left way must not be measured against what the right way asked for before."""
    bottom = ArrayNode()
    left, right = put_above(bottom, "left"), put_above(bottom, "right")
    for node in (left, right):
        node.children["file"].perm = Perm.NONE
    user = put_above(ArrayNode(), "user")
    edges = [
        Edge(user, node, node.node_name, Role.DATA, Perm.WRITE, Perm.WRITE)
        for node in (left, right)
    ]
    for edge in edges:
        edge.attach()
    assert left.children["file"].shared == right.children["file"].shared == Perm.WRITE
    reads = Perm.CONSISTENT_READ
    with GraphTransaction() as change:
        for edge in edges:
            change.ask(edge, reads, reads)
    assert [(edge.perm, edge.shared) for edge in bottom.parents] == [(reads, reads)] * 2


def test_edge_that_moves_takes_part_in_its_new_childs_drains_and_leaves_those_of_the_old() -> None:
    calm, quiet = ArrayNode(), ArrayNode()
    top = put_above(calm, "top")
    above = put_above(top, "above")
    quiet.quiesce()
    quiet.quiesce()
    with GraphTransaction() as change:
        change.move(top.children["file"], quiet)
    assert top.quiesced == above.quiesced == 2
    quiet.unquiesce()
    assert top.quiesced == above.quiesced == 1
    with GraphTransaction() as change:
        change.move(top.children["file"], calm)
    assert top.quiesced == above.quiesced == 0
    quiet.unquiesce()
    calm.quiesce()
    change = GraphTransaction()
    change.move(top.children["file"], quiet)
    change.abort()
    assert top.quiesced == above.quiesced == 1
    calm.unquiesce()
    assert top.quiesced == above.quiesced == 0


def test_filter_put_between_two_drained_nodes_ends_with_all_of_them_awake() -> None:
    node = ArrayNode()
    top = put_above(node, "top")
    node.quiesce()
    inserted = put_above(ArrayNode(), "new")
    with GraphTransaction() as change:
        change.move(inserted.children["file"], node)
        change.move(top.children["file"], inserted)
    assert (node.quiesced, inserted.quiesced, top.quiesced) == (1, 1, 1)
    node.unquiesce()
    assert (node.quiesced, inserted.quiesced, top.quiesced) == (0, 0, 0)
