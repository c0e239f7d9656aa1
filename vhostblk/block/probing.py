"""Which driver a node has where nobody says it (rows B04.10 and B05.5): by its name, or by how its content begins."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from vhostblk.block import pipeline
from vhostblk.block.foreign_formats import foreign_format
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode
from vhostblk.block.registry import PROBE_SIZE, DriverRegistry
from vhostblk.errors import BlockError, ConfigError


def protocol_by_name(drivers: DriverRegistry, flat: Mapping[str, Any]) -> str:
    """The protocol driver for options that have a file name only; a prefix of that means nothing (row B05.5).

    Raises:
        ConfigError: there is no name, or no driver for it.
    """
    name = flat.get("filename")
    if not isinstance(name, str):
        raise ConfigError("Must specify either driver or file")
    return drivers.protocol_of(name, allow_prefix=False).driver_name


async def probed_format(drivers: DriverRegistry, child: BlockNode) -> str:
    """The format that the content of an open node has (row B04.10).

    Raises:
        ConfigError: it cannot be read, or no driver knows it.
    """
    if not child.length:
        return "raw"
    header = bytearray(min(PROBE_SIZE, child.length))
    try:
        await pipeline.preadv(child.lane, 0, IoVec([memoryview(header)]))
    except BlockError as error:
        raise ConfigError(
            f"Could not read image for determining its format: {error.strerror}", error.errno or 0
        ) from None
    name = str(child.given.get("filename", ""))
    driver = drivers.probe(header, name)
    if driver is None:
        if kind := foreign_format(bytes(header), name):
            raise ConfigError(
                f"Image is in {kind} format, which is not supported; qemu-img converts it, "
                "and driver=raw takes its bytes as they are",
                errno.ENOTSUP,
            )
        raise ConfigError(
            "Could not determine image format: no driver knows it",
            errno.ENOENT,
            qemu_text="Could not determine image format: No compatible driver found",
        )
    return driver.driver_name
