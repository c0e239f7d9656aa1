"""What a qcow2 node does about damage: who finds some says so in the image; who is asked looks for it, and repairs it.

The looking is in `survey.py`, the repairing in `repair.py`. Knows nothing about requests.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Coroutine
from typing import Any

from vhostblk.block.check import CheckResult
from vhostblk.block.drivers.qcow2 import repair
from vhostblk.block.drivers.qcow2.header import Header, Incompatible
from vhostblk.block.drivers.qcow2.metadata import Metadata
from vhostblk.block.edge import Edge
from vhostblk.block.flags import CheckMode
from vhostblk.block.node import BlockNode
from vhostblk.errors import BlockError, ConfigError, ImageError

log = logging.getLogger(__name__)


class CheckNode(BlockNode):
    """The part of a qcow2 node that knows of damage.

    Attributes: _is_corrupt: some was found since the image was opened; nobody writes any more.
    """

    _header: Header
    _file: Edge
    _metadata: Metadata
    _is_corrupt = False

    async def _load_header(self) -> Header:
        raise NotImplementedError

    @property
    def _is_written(self) -> bool:
        """Whether tables are kept for writing."""
        return not self.read_only and not self.inactive and not self.for_check

    async def _corrupt(self, error: ImageError) -> BlockError:
        """What a request fails with that has found damage; from now on nobody writes, and the image says so."""
        if not self._is_corrupt:
            self._is_corrupt = True
            says = f"qcow2: Image is corrupt: {error}; further non-fatal corruption events"
            if self._is_written:
                says = f"qcow2: Marking image as corrupt: {error}; further corruption events"
            log.warning(
                *("node '%s': image is corrupt: %s", self.node_name, error),
                extra={"qemu_says": f"{says} will be suppressed"},
            )
            if self._is_written:
                await self._metadata.mark_corrupt()
        return BlockError(errno.EIO, f"{self.node_name}: image is corrupt: {error}")

    def _check_whole(self) -> None:
        """Nobody writes to an image that is damaged, or was opened to find that out."""
        if self._is_corrupt:
            raise BlockError(errno.EIO, f"{self.node_name}: image is corrupt")
        if self.for_check:
            raise BlockError(errno.EPERM, f"{self.node_name}: opened only to be checked")

    async def _store(self, work: Coroutine[Any, Any, None]) -> None:
        """Write tables, unless that finds damage."""
        try:
            await work
        except ImageError as error:
            raise await self._corrupt(error) from None

    async def _repair_dirty(self) -> None:
        """Repair what somebody has left who had put off reference counts, before it is written."""
        if self._is_written and self._header.incompatible & Incompatible.DIRTY:
            result = await _repair_dirty(self._file, self._header)
            log.info(
                "node '%s': image was not closed properly: %s",
                *(self.node_name, result.summary()),
                extra={"qemu_says": "\n".join(result.messages)} if result.messages else None,
            )
            self._header = await self._load_header()

    async def driver_check(self, fix: CheckMode, result: CheckResult) -> None:
        """The image as it is in the file; after a repair it is read anew."""
        if fix and not self.for_check:
            self._check_whole()
        if self._is_written and not self.inactive and not self._is_corrupt:
            await self._store(self._metadata.finish())
            await self._file.flush()
        try:
            if fix and not self.read_only:
                await self._metadata.clear_unknown_features()
            await repair.check_image(self._file, await self._load_header(), fix, result)
            if fix:
                await self.driver_activate()
        except ConfigError as error:
            raise BlockError(errno.EIO, str(error)) from None


async def _repair_dirty(file: Edge, header: Header) -> CheckResult:
    """Repair an image that was not closed by somebody who puts off reference counts.

    Raises:
        ConfigError: it cannot be.
    """
    result = CheckResult()
    await repair.check_image(file, header, CheckMode.FIX_LEAKS | CheckMode.FIX_ERRORS, result)
    if not result.is_clean:
        left = [message for message in result.messages if message.startswith("ERROR")]
        why = left[-1].removeprefix("ERROR ") if left else "leaks"
        raise ConfigError(f"Could not repair dirty image: {why}", errno.EIO)
    return result
