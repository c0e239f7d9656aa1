"""Which children a node may have (row B08)."""

from __future__ import annotations

import itertools

import pytest

from tests.unit.block.fakes import ArrayNode, NoOptions, PassNode
from vhostblk.block.edge import Edge
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import (
    Role,
    check_children,
    check_role,
    default_child_permissions,
    filtered_child,
    primary_child,
)
from vhostblk.errors import StateError

F, C, D, M, P = Role.FILTERED, Role.COW, Role.DATA, Role.METADATA, Role.PRIMARY
LEGAL = {D, M, D | M, F, C, D | P, M | P, D | M | P, F | P}


class Format(ArrayNode):
    driver_name = "format"


def child(parent: ArrayNode | PassNode, name: str, role: Role) -> Edge:
    return Edge(parent, ArrayNode(), name, role, Perm.NONE, Perm.ALL)


@pytest.mark.parametrize("bits", list(itertools.product((False, True), repeat=5)))
def test_role_validator_accepts_exactly_the_legal_combinations_of_one_edge(
    bits: tuple[bool, ...],
) -> None:
    role = Role(0)
    for wanted, bit in zip(bits, (D, M, F, C, P), strict=True):
        role |= bit if wanted else Role(0)
    edge = child(Format(), "file", role)
    if role in LEGAL:
        check_role(edge)
    else:
        with pytest.raises(StateError, match="impossible role"):
            check_role(edge)


@pytest.mark.parametrize("role", [F | P, C, D | P])
def test_second_filtered_cow_or_primary_child_is_refused_and_nothing_changes(role: Role) -> None:
    node = Format()
    child(node, "one", role).attach()
    second = child(node, "two", role)
    with pytest.raises(StateError, match="more than one child"):
        second.attach()
    assert list(node.children) == ["one"]
    assert not second.node.parents


def test_any_number_of_data_and_metadata_children() -> None:
    node = Format()
    for number in range(4):
        child(node, f"d{number}", D).attach()
        child(node, f"m{number}", M).attach()
    check_children(node, complete=True)


@pytest.mark.parametrize("role", [F, C, D | P, M | P])
def test_filter_has_no_child_that_looks_like_another_main_child(role: Role) -> None:
    node = PassNode("f", NodeOptions(), NoOptions())
    with pytest.raises(StateError, match="a filter has no child with"):
        child(node, "file", role).attach()


def test_filter_needs_its_filtered_child_and_may_have_targets_beside_it() -> None:
    node = PassNode("f", NodeOptions(), NoOptions())
    child(node, "target", D).attach()
    with pytest.raises(StateError, match="a filter needs a filtered child"):
        check_children(node, complete=True)
    edge = child(node, "file", F | P)
    edge.attach()
    check_children(node, complete=True)
    assert filtered_child(node) is primary_child(node) is edge


def test_attach_and_detach_keep_the_lists_of_both_ends() -> None:
    node = Format()
    edge = child(node, "file", D | P)
    edge.attach()
    assert node.children == {"file": edge}
    assert edge.node.parents == [edge]
    edge.detach()
    assert not node.children
    assert not edge.node.parents


READ, WRITE, UNCHANGED, RESIZE = (
    Perm.CONSISTENT_READ,
    Perm.WRITE,
    Perm.WRITE_UNCHANGED,
    Perm.RESIZE,
)


@pytest.mark.parametrize(
    ("role", "perm", "shared", "writable", "expected"),
    [
        (F | P, READ | WRITE, READ, True, (READ | WRITE, READ)),
        (C, READ | WRITE, READ, True, (READ, READ | UNCHANGED)),
        (C, WRITE, Perm.ALL, True, (Perm.NONE, Perm.ALL)),
        (Role.IMAGE, Perm.NONE, Perm.ALL, True, (READ | WRITE | RESIZE, READ | UNCHANGED)),
        (Role.IMAGE, READ, Perm.ALL, False, (READ, READ | UNCHANGED)),
        (D, READ | WRITE, Perm.ALL, True, (READ | WRITE | RESIZE, Perm.ALL & ~RESIZE)),
        (D, READ, Perm.ALL, True, (READ, Perm.ALL & ~RESIZE)),
    ],
)
def test_what_a_node_needs_of_a_child_of_each_role(
    role: Role, perm: Perm, shared: Perm, writable: bool, expected: tuple[Perm, Perm]
) -> None:
    assert default_child_permissions(role, perm, shared, writable=writable) == expected


def test_inactive_node_lets_the_images_new_owner_write() -> None:
    for role in (C, Role.IMAGE, D):
        _, shared = default_child_permissions(role, READ, READ, writable=False, inactive=True)
        assert shared & WRITE
        assert shared & RESIZE
