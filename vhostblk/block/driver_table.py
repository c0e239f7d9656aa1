"""Where drivers are, and what can be known of them before they are imported: programs that make one request start fast.

Knows nothing about what drivers do.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vhostblk.block.node import BlockNode


class DriverPlace(NamedTuple):
    """One driver; `tests/unit/block/test_driver_table.py` holds this to what the driver says itself."""

    module: str
    node: str
    """The name of the class."""
    protocol: str | None = None
    """Its `protocol_name`."""
    more_protocols: tuple[str, ...] = ()
    """Its `more_protocol_names`."""
    devices: bool = False
    """Whether it recognises devices by their names."""
    signatures: tuple[tuple[int, bytes], ...] = ()
    """What it recognises its format by: at least one of these bytes is at its offset. None: not by its content."""

    def load(self) -> type[BlockNode]:
        """The driver itself."""
        driver: type[BlockNode] = getattr(importlib.import_module(self.module), self.node)
        return driver

    def may_begin(self, header: bytes) -> bool:
        """Whether content that begins like this may be in its format."""
        return any(header.startswith(text, at) for at, text in self.signatures)


class DriverTable(Mapping[str, "type[BlockNode]"]):
    """Name to node class, imported when it is looked up.

    Args:
        places: in the order in which they are searched.
    """

    def __init__(self, places: Mapping[str, DriverPlace]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> type[BlockNode]:
        return self.places[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places
