"""How much room an image is going to need, before it is made (block layer row B31.6).

Each driver knows what its images take (`Driver.measure`). Knows nothing about formats.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vhostblk.block.creation import create_options, refuse_unknown
from vhostblk.block.image_options import ImageOptions, known_options
from vhostblk.block.length import Measurement
from vhostblk.block.limits import SECTOR_SIZE, align_up
from vhostblk.block.options import consume
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
    wanted = NewImageSize(drivers, driver)
    wanted.options.say(options or {})
    if size is not None:
        wanted.options.set("size", size)
    if source is None and "size" not in wanted.options:
        raise ConfigError("Either a size or an image to measure must be given")
    return await wanted.measure(source)


class NewImageSize:
    """What a new image takes, in steps: say `options`, then `measure`.

    Args:
        driver: of the new image.

    Attributes:
        options: what was said; those of files are known, and make no difference.

    Raises:
        ConfigError: ENOTSUP: there are no new images of this driver.
    """

    def __init__(self, drivers: DriverRegistry, driver: str) -> None:
        refuse_unknown(drivers, driver, "image creation")
        self._driver = drivers[driver]
        types = [create_options(self._driver, "Format driver")]
        types.append(create_options(drivers["file"], "Protocol driver"))
        self.options = ImageOptions(known_options(*types))

    async def measure(self, source: BlockNode | None = None) -> Measurement:
        """See `measure`; without a source, a size that was not said is 0.

        Raises:
            ConfigError, BlockError: as there.
        """
        driver = self._driver
        options_type = driver.measure_options_type()
        if options_type is None:
            raise ConfigError(
                f"Block driver '{driver.driver_name}' does not support size measurement",
                errno.ENOTSUP,
            )
        try:
            flat = self.options.values()
            size = source.length if source is not None else flat.get("size", 0)
            flat["size"] = align_up(size, SECTOR_SIZE)
            return await driver.measure(consume(options_type, flat), source)
        except ConfigError as error:
            if error.errno != errno.EFBIG:
                raise
            raise ConfigError(
                "The image size is too large (try using a larger cluster size)", errno.EFBIG
            ) from None
