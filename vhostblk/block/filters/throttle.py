"""`throttle`: requests wait for their share of a throttle group's budget (block layer row B30)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vhostblk.block.driver import OpenContext
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.iov import IoVec
from vhostblk.block.options import STRING, option
from vhostblk.block.reopen import Reopen
from vhostblk.block.throttle_group import READ, WRITE, Member, ThrottleGroup


@dataclass(frozen=True, slots=True)
class ThrottleOptions:
    """QEMU's options for throttle, besides `file`."""

    throttle_group: str = option(
        STRING,
        about="id of the throttle-group object",
        mutable=True,
        missing="Please specify a throttle group",
        strong=True,
    )


class ThrottleNode(FilterNode):
    """Flushes are not throttled; zero-writes and discards count as writes."""

    driver_name = "throttle"
    options_type = ThrottleOptions
    options: ThrottleOptions
    _find_group: Callable[[str], ThrottleGroup]
    _group: ThrottleGroup
    _member: Member | None = None

    async def open(self, context: OpenContext) -> None:
        """Join the group.

        Raises:
            ConfigError: there is no such group.
        """
        self._find_group = context.throttle_group
        group = self._find_group(self.options.throttle_group)
        await super().open(context)
        self._join(group)

    def _join(self, group: ThrottleGroup) -> None:
        self._group, self._member = group, group.join()
        if self.quiesced:
            self.driver_drain_begin()

    async def reopen_prepare(self, reopen: Reopen) -> None:
        """Look for the new group.

        Raises:
            ConfigError: there is none.
        """
        self._find_group(reopen.options.throttle_group)

    def reopen_commit(self, reopen: Reopen) -> None:
        """Go over to the new group; nobody waits here for the old one's budget, as the node is drained."""
        group = self._find_group(reopen.options.throttle_group)
        if group is not self._group and self._member is not None:
            self._group.leave(self._member)
            self._join(group)

    async def close(self) -> None:
        """Leave the group."""
        if self._member is not None:
            self._group.leave(self._member)
            self._member = None

    async def _admit(self, way: int, length: int) -> None:
        assert self._member is not None
        await self._group.admit(self._member, way, length)

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """When there is room."""
        await self._admit(READ, length)
        await super().driver_preadv(offset, length, iov)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """When there is room."""
        await self._admit(WRITE, length)
        await super().driver_pwritev(offset, length, iov, flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """When there is room."""
        await self._admit(WRITE, length)
        await super().driver_pwrite_zeroes(offset, length, flags)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        """When there is room."""
        await self._admit(WRITE, length)
        await super().driver_pdiscard(offset, length)

    def driver_drain_begin(self) -> None:
        """Nothing is held back while drained (row B26.12)."""
        if self._member is not None:
            self._group.release(self._member)

    def driver_drain_end(self) -> None:
        """Hold back again."""
        if self._member is not None:
            self._group.limit(self._member)
