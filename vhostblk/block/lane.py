"""What a request asks of its node: whether there is anything to do for it but to hand it to the driver.

Block layer rows B14 to B16. An object of its own, because every request asks for all of it: CPython remembers at each
place in the code where the class that it saw there last has an attribute, and in the path of requests classes of nodes
take turns. Knows nothing about requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vhostblk.block.limits import BlockLimits
from vhostblk.block.tracking import RequestTracker
from vhostblk.block.write_log import WriteLog

if TYPE_CHECKING:
    from vhostblk.block.node import BlockNode


class Lane:
    """The way through one node.

    Attributes:
        node: whose it is.
        length: of the node, bytes.
        limits: what its driver takes at once.
        tracker: other requests may be in the way.
        may_write: nobody here forbids writes, or wants to see them.
        log: who has to know of writes.

    Context: the control loop.
    """

    __slots__ = ("length", "limits", "log", "may_write", "node", "tracker")

    def __init__(self, node: BlockNode) -> None:
        self.node = node
        self.length = 0
        self.limits = BlockLimits()
        self.tracker = RequestTracker()
        self.log = WriteLog()
        self.may_write = False


class Decides:
    """An attribute of a node that decides whether writes may pass: `Lane.may_write` follows it at once."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, node: Any, owner: type) -> Any:
        return getattr(node, self._name)

    def __set__(self, node: Any, value: Any) -> None:
        setattr(node, self._name, value)
        node.review_writes()
