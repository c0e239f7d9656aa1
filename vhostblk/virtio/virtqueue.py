"""What the device's halves of all virtqueues share, whatever the format of the ring is.

VIRTIO 1.2 §2.6. `split` and `packed` have the formats. A broken queue yields
nothing more: broken is sticky, a restart makes a new object.

Knows nothing of where a ring's indices are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, Protocol

from vhostblk.errors import GuestError
from vhostblk.virtio.chain import Broken, DescriptorChain
from vhostblk.virtio.memory import Fence, GuestMemory

__all__ = ["INDIRECT_ENTRIES_MIN", "QUEUE_SIZE_MAX", "BaseVirtqueue", "Virtqueue"]

QUEUE_SIZE_MAX = 32768
INDIRECT_ENTRIES_MIN = 128 + 2
"""Indirect tables may have this many entries however small the queue is."""

Mark = Callable[[memoryview], None]
"""Takes a piece of guest memory that was written."""

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4


class Virtqueue(Protocol):
    """One virtqueue, seen by the device. Context: one thread at a time."""

    broken: Broken | None
    """Why this queue yields nothing any more."""
    mark: Mark | None
    """Told of what has been written to the ring."""

    @property
    def size(self) -> int:
        """Entries of the ring."""
        ...

    @property
    def in_flight(self) -> int:
        """Chains popped and not yet pushed, also by who had the ring before."""
        ...

    @property
    def replays(self) -> int:
        """Chains that who had the ring before has left in flight, and `pop` will give first."""
        ...

    @property
    def base(self) -> int:
        """Where the ring can be started again: what GET_VRING_BASE asks for."""
        ...

    def pop(self) -> DescriptorChain | None:
        """Take the next chain the driver made available.

        Returns:
            The chain, or None when there is none, or the queue is broken.

        Raises:
            GuestError: the driver broke a rule: `reason` is set, the queue is broken from now on.
        """
        ...

    def push(self, head: int, written: int) -> None:
        """Give a chain back to the driver.

        Works on a broken queue too: what was popped before is still owed.

        Args:
            head: `DescriptorChain.head`.
            written: bytes written, counted from the start of the writable part.
        """
        ...

    def needs_notification(self) -> bool:
        """Say whether what was pushed since the last call asks for a used buffer notification.

        Call it once per batch.
        """
        ...

    def enable_notification(self) -> bool:
        """Ask the driver to kick for the next chain it adds.

        Returns:
            Whether there is work already: the driver may have added it without a kick.
        """
        ...

    def disable_notification(self) -> None:
        """Tell the driver that kicks are not needed; it may kick nevertheless."""
        ...

    def mark_ring(self) -> None:
        """Tell `mark` of all of the ring that devices write."""
        ...

    def break_queue(self, error: GuestError) -> None:
        """Declare the queue broken by what somebody else found in a chain of it."""
        ...


class BaseVirtqueue:
    """What the formats have in common.

    Args:
        memory: where buffers are looked up.
        size: entries.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
    """

    __slots__ = (
        "_event_idx",
        "_fence",
        "_has_notified",
        "_in_flight",
        "_indirect",
        "_indirect_max",
        "_memory",
        "_size",
        "broken",
        "mark",
    )

    def __init__(self, memory: GuestMemory, size: int, event_idx: bool, indirect: bool) -> None:
        self._memory = memory
        self._size = size
        self._event_idx = event_idx
        self._indirect = indirect
        self._indirect_max = max(size, INDIRECT_ENTRIES_MIN)
        self._fence = Fence()
        self._in_flight = 0
        self._has_notified = False
        self.broken: Broken | None = None
        self.mark: Mark | None = None

    @property
    def size(self) -> int:
        """See `Virtqueue.size`."""
        return self._size

    @property
    def in_flight(self) -> int:
        """See `Virtqueue.in_flight`."""
        return self._in_flight

    @property
    def replays(self) -> int:
        """See `Virtqueue.replays`."""
        return 0

    def break_queue(self, error: GuestError) -> None:
        """See `Virtqueue.break_queue`."""
        if self.broken is None:
            self.broken = Broken(error.reason or Broken.ADDRESS)

    def _indirect_table(self, head: int, address: int, length: int, flags: int) -> bytes:
        """Check and copy a table of indirect descriptors."""
        # VIRTIO 1.2 §2.7.5.3.1, §2.8.19: only if negotiated, never with NEXT. WRITE is ignored.
        if not self._indirect or flags & DESC_F_NEXT:
            self._break(Broken.INDIRECT, f"chain {head}: indirect, with flags {flags:#x}")
        if not length or length % 16 or length // 16 > self._indirect_max:
            self._break(Broken.INDIRECT, f"chain {head}: an indirect table of {length} bytes")
        try:
            return b"".join(self._memory.view(address, length))
        except GuestError as error:
            self._break(Broken.ADDRESS, f"chain {head}: indirect table: {error}")

    def _break(self, reason: Broken, message: str) -> NoReturn:
        self.broken = reason
        raise GuestError(message, reason)
