"""Names of nodes and devices: one namespace, so that "device or node name" is unambiguous (block layer row B07)."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.backend import BlockBackend
    from vhostblk.block.node import BlockNode

# Row B07.1.
_NODE_NAME = r"[A-Za-z][A-Za-z0-9\-._]{0,30}\Z"
_FIRST_GENERATED = 101


class Names:
    """Who is called what.

    Attributes:
        nodes: by name, in the order in which they were opened.
        devices: roots that users address by a name of their own. An export's id is none of them: as in QEMU it may be
            the same as its node's name.

    Context: the control loop.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, BlockNode] = {}
        self.devices: dict[str, BlockBackend] = {}
        self._next = _FIRST_GENERATED

    def node_name(self, wanted: str | None) -> str:
        """A name for a new node; generated if nobody wants one, so that no user can have chosen it.

        Raises:
            ConfigError: it is no name, or taken.
        """
        if wanted is None:
            name = f"#block{self._next}"
            self._next += 1
            return name
        if not re.match(_NODE_NAME, wanted):
            raise ConfigError(
                f"Invalid node-name: '{wanted}' (a letter, then letters, digits, '-', '.' or '_', "
                "31 characters at most)",
                qemu_text=f"Invalid node-name: '{wanted}'",
            )
        if wanted in self.devices:
            raise ConfigError(f"node-name={wanted} is conflicting with a device id")
        if wanted in self.nodes:
            raise ConfigError(f"Duplicate nodes with node-name='{wanted}'")
        return wanted

    def add_device(self, name: str, backend: BlockBackend) -> None:
        """Let a root be found by a name.

        Raises:
            ConfigError: it is taken, by a device or a node.
        """
        if name in self.devices:
            raise ConfigError(f"Device with id '{name}' already exists")
        if name in self.nodes:
            raise ConfigError(f"Device name '{name}' conflicts with an existing node name")
        self.devices[name] = backend

    def remove_device(self, name: str) -> None:
        """Free the name; nothing happens if nobody has it."""
        self.devices.pop(name, None)

    def lookup(self, device: str | None, node_name: str | None) -> BlockNode:
        """The node of a device or, if there is no such device, the node of a name (row B07.3).

        Raises:
            ConfigError: ENODEV; neither exists.
        """
        if device is not None and device in self.devices:
            return self.devices[device].node
        if node_name is not None and node_name in self.nodes:
            return self.nodes[node_name]
        raise ConfigError(
            f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'", errno.ENODEV
        )
