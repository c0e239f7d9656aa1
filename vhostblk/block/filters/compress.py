"""`compress`: whatever is written to the image below is compressed, if that makes it smaller (block layer row B16.11).

Requests are whole clusters, because nothing else compresses: the pipeline completes them by reading what is around.
"""

from __future__ import annotations

import errno

from vhostblk.block.driver import OpenContext
from vhostblk.block.eager import Request
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.flags import Req
from vhostblk.block.iov import IoVec
from vhostblk.errors import ConfigError

_WRITE_COMPRESSED = int(Req.WRITE_COMPRESSED)


class CompressNode(FilterNode):
    """Writes with WRITE_COMPRESSED."""

    driver_name = "compress"

    async def open(self, context: OpenContext) -> None:
        """Open the child.

        Raises:
            ConfigError: nothing can be compressed there.
        """
        await super().open(context)
        child = self.file.node
        if not child.supported_write_flags & _WRITE_COMPRESSED:
            raise ConfigError(
                f"Compression is not supported for underlying format: {child.driver_name}",
                errno.ENOTSUP,
            )

    def refresh_limits(self) -> None:
        """Whole clusters."""
        facts = self.file.node.info()
        if facts is not None and facts.cluster_size:
            self.limits.request_alignment = facts.cluster_size

    def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> Request:
        """Compressed."""
        return self.file.pwritev(offset, iov, flags | _WRITE_COMPRESSED)
