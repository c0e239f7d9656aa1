"""qcow2, cut up by structure: `header`, `entries` (what L2 tables say), `tables` (reading and keeping them),
`compressed`, and the driver in `node`."""

from __future__ import annotations

from vhostblk.block.drivers.qcow2.node import Qcow2Node

__all__ = ["Qcow2Node"]
