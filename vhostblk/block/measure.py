"""How much room an image is going to need, before it is made (block layer row B31.6).

Each driver knows what its images take (`Driver.measure`). Knows nothing about formats.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vhostblk.block.keyval import flatten, parse_flat
from vhostblk.block.length import Measurement
from vhostblk.block.limits import SECTOR_SIZE, align_up
from vhostblk.block.options import consume_all, to_size
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.node import BlockNode
    from vhostblk.block.registry import DriverRegistry


async def measure(
    drivers: DriverRegistry,
    driver: str,
    options: Mapping[str, Any] | str | None = None,
    *,
    size: int | None = None,
    source: BlockNode | None = None,
) -> Measurement:
    """What a new image takes (`qemu-img measure`).

    Args:
        driver: of the new image.
        options: that it would be made with, as `-o` takes them.
        size: of its disk, in bytes. source: a node whose content it is going to have. One of them.

    Raises:
        ConfigError: one line; ENOTSUP: the driver cannot tell.
        BlockError: the source cannot be looked at.
    """
    flat: dict[str, Any]
    flat = {**(parse_flat(options) if isinstance(options, str) else flatten(options or {}))}
    flat = {name.replace("-", "_"): value for name, value in flat.items()}
    if driver not in drivers:
        raise ConfigError(f"Unknown file format '{driver}'", errno.ENOENT)
    options_type = drivers[driver].create_options_type
    if options_type is None:
        raise ConfigError(
            f"Block driver '{driver}' does not support size measurement", errno.ENOTSUP
        )
    for key in drivers[driver].create_child_keys:
        flat.pop(key.replace("-", "_"), None)
    if size is not None:
        flat.setdefault("size", size)
    if source is not None:
        flat["size"] = source.length
    elif "size" not in flat:
        raise ConfigError("Either a size or an image to measure must be given")
    flat["size"] = align_up(to_size("size", flat["size"]), SECTOR_SIZE)
    try:
        return await drivers[driver].measure(consume_all(options_type, flat), source)
    except ConfigError as error:
        if error.errno != errno.EFBIG:
            raise
        raise ConfigError(
            "The image size is too large (try using a larger cluster size)", errno.EFBIG
        ) from None
