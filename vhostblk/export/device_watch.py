"""Block devices of the host that grow, shrink or go away are noticed, and their exports follow.

Theory of operation: a uevent says which device to look at. Each node on it asks the kernel for the size
(`refresh_length`), which tells the nodes above, the exports, and their guests. A device that has grown has room again:
exports above it whose requests wait for that (`werror=enospc`) try again, as they do at a SIGHUP.

Listening begins with the first node that is on a device, because most daemons have none. Where nobody can listen (the
package pyroute2 is not there, or the kernel refuses) all of that happens at a SIGHUP only.

Knows nothing about netlink, nor how a guest is told.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

from vhostblk.block.graph import BlockGraph
from vhostblk.block.node import BlockNode
from vhostblk.block.uevents import Uevents
from vhostblk.errors import BlockError
from vhostblk.export.again import Again
from vhostblk.export.export import Export

log = logging.getLogger(__name__)


class DeviceWatch:
    """Of one daemon.

    Args:
        graph: whose nodes.
        exports: of these nodes; may change.

    Context: the control loop.
    Owns: the uevents, and looks that are under way.
    """

    def __init__(self, graph: BlockGraph, exports: Mapping[str, Export]) -> None:
        self._graph = graph
        self._exports = exports
        self._uevents: Uevents | None = None
        self._is_open = True
        self._is_started = False
        self._looks: dict[BlockNode, Again] = {}
        self._lengths: dict[BlockNode, int] = {}  # at the last look

    def nodes_came(self) -> None:
        """Listen from now on if one of them is on a device; before `start` nothing is done about what is heard."""
        if not self._is_open or self._uevents is not None or not self._on_devices():
            return
        try:
            self._uevents = Uevents(self._changed)
        except ImportError:
            self._is_open = False
            log.debug(
                "the Python package 'pyroute2' is not installed (pip install vhostblk[uevents]): "
                "devices that change are looked at when SIGHUP comes"
            )
        except OSError as error:
            self._is_open = False
            log.info(
                "uevents cannot be heard: %s: devices that change are looked at when SIGHUP comes",
                error.strerror,
            )
        else:
            log.debug("listening to uevents")
            self._changed(None)

    def start(self) -> None:
        """Look at devices from now on, and at all of them once: they may have changed since they were opened."""
        self._is_started = True
        self._changed(None)

    async def close(self) -> None:
        """Look no more."""
        self._is_open = False
        if self._uevents is not None:
            self._uevents.close()
        for look in self._looks.values():
            await look.cancel()

    def _on_devices(self) -> list[BlockNode]:
        return [node for node in self._graph.nodes.values() if node.device_number is not None]

    def _changed(self, number: int | None) -> None:
        if not self._is_started or self._uevents is None:
            return
        nodes = self._on_devices()
        self._looks = {node: look for node, look in self._looks.items() if look.is_running}
        self._lengths = {node: self._lengths.get(node, node.length) for node in nodes}
        for node in nodes:
            if number is None or node.device_number == number:
                if node not in self._looks:
                    self._looks[node] = Again(partial(self._look, node))
                self._looks[node].ask()

    async def _look(self, node: BlockNode) -> None:
        if self._graph.nodes.get(node.node_name) is not node:
            return
        self._graph.hold(node)  # its file stays open
        try:
            await node.refresh_length()
        except BlockError as error:
            log.warning("node '%s': cannot tell its size: %s", node.node_name, error)
        finally:
            await self._graph.release(node)
        # Others look, too, and may have seen it first.
        before, self._lengths[node] = self._lengths.get(node, node.length), node.length
        if node.length > before:
            for export in tuple(self._exports.values()):
                export.has_room(node)
