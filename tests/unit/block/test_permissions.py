"""Who may use a node beside whom (row B09)."""

from __future__ import annotations

import itertools

import pytest

from tests.unit.block.fakes import ArrayNode, NoOptions, PassNode
from vhostblk.block.edge import Edge
from vhostblk.block.node import Role
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm, cumulative_permissions, perm_names
from vhostblk.errors import ConfigError

DATA = Role.DATA


class LockingNode(ArrayNode):
    """Remembers the two phases; refuses some permissions, as a file lock would."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[tuple[str, Perm, Perm]] = []
        self.refuse = Perm.NONE

    def check_perm(self, perm: Perm, shared: Perm) -> None:
        self.phases.append(("check", perm, shared))
        if perm & self.refuse:
            raise ConfigError("locked")

    def set_perm(self, perm: Perm, shared: Perm) -> None:
        self.phases.append(("set", perm, shared))

    def abort_perm(self) -> None:
        self.phases.append(("abort", Perm.NONE, Perm.NONE))


def use(node: ArrayNode, name: str, perm: Perm, shared: Perm) -> Edge:
    user = PassNode(name, NodeOptions(), NoOptions())
    edge = Edge(user, node, "file", DATA, perm, shared)
    edge.attach()
    return edge


bits = [Perm.NONE, Perm.CONSISTENT_READ, Perm.WRITE, Perm.RESIZE]


@pytest.mark.parametrize(("perm", "shared"), list(itertools.product(bits, bits)))
def test_second_user_is_refused_exactly_when_the_first_does_not_share(
    perm: Perm, shared: Perm
) -> None:
    node = ArrayNode()
    first = use(node, "first", Perm.NONE, shared)
    if perm & ~shared:
        with pytest.raises(ConfigError, match=r"node 'second' as 'file' cannot.*node 'first'"):
            use(node, "second", perm, Perm.ALL)
        assert node.parents == [first]
    else:
        use(node, "second", perm, Perm.ALL)
        assert cumulative_permissions(node) == (perm, shared)


def test_second_user_is_refused_too_if_it_does_not_share_what_the_first_uses() -> None:
    node = ArrayNode()
    use(node, "first", Perm.WRITE, Perm.ALL)
    with pytest.raises(
        ConfigError,
        match="node 'first' as 'file' cannot have permission 'write' on node 'array': "
        "node 'second' as 'file' does not share it",
    ):
        use(node, "second", Perm.NONE, Perm.CONSISTENT_READ)


def test_read_only_node_cannot_be_written() -> None:
    node = ArrayNode(common=NodeOptions(read_only=True))
    use(node, "reader", Perm.CONSISTENT_READ, Perm.ALL)
    with pytest.raises(ConfigError, match="Block node 'array' is read-only"):
        use(node, "writer", Perm.WRITE, Perm.ALL)


def test_change_is_checked_down_to_the_leaf_and_then_made() -> None:
    leaf = LockingNode()
    middle = PassNode("middle", NodeOptions(), NoOptions())
    middle.children["file"] = edge = Edge(
        middle, leaf, "file", Role.FILTERED | Role.PRIMARY, Perm.NONE, Perm.ALL
    )
    edge.attach()
    leaf.phases.clear()
    shared = Perm.CONSISTENT_READ
    top = PassNode("top", NodeOptions(), NoOptions())
    user = Edge(top, middle, "file", DATA, Perm.WRITE, shared)
    user.attach()
    assert leaf.phases == [("check", Perm.WRITE, shared), ("set", Perm.WRITE, shared)]
    assert (edge.perm, edge.shared) == (Perm.WRITE, shared)
    user.detach()
    assert leaf.phases[-1] == ("set", Perm.NONE, Perm.ALL)


def test_refusal_of_the_leaf_undoes_everything_above() -> None:
    leaf = LockingNode()
    leaf.refuse = Perm.WRITE
    middle = PassNode("middle", NodeOptions(), NoOptions())
    middle.children["file"] = edge = Edge(
        middle, leaf, "file", Role.FILTERED | Role.PRIMARY, Perm.NONE, Perm.ALL
    )
    edge.attach()
    top = PassNode("top", NodeOptions(), NoOptions())
    with pytest.raises(ConfigError, match="locked"):
        Edge(top, middle, "file", DATA, Perm.WRITE, Perm.ALL).attach()
    assert not middle.parents
    assert (edge.perm, edge.shared) == (Perm.NONE, Perm.ALL)
    assert leaf.phases[-1][0] == "abort"


def test_force_share_shares_with_the_world_but_not_with_users_of_the_node() -> None:
    node = ArrayNode(common=NodeOptions(read_only=True, force_share=True))
    use(node, "reader", Perm.CONSISTENT_READ, Perm.CONSISTENT_READ)
    assert cumulative_permissions(node) == (Perm.CONSISTENT_READ, Perm.ALL)


def test_names_are_qemus() -> None:
    assert perm_names(Perm.ALL) == "consistent read, write, write unchanged, resize"
    assert perm_names(Perm.NONE) == ""
