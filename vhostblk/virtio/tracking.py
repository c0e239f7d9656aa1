"""What a virtqueue tells of the chains it has in flight, to somebody who remembers them after its end.

A device that is killed owes its driver every chain that it has popped and not used. Whoever serves
the ring next has to know which: `Tracker` is told of each step, right before or behind the store
that makes it true, and says at the start of a ring what was left.

Knows nothing of where that is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

__all__ = ["Descriptor", "PackedResumption", "PackedTracker", "Resumption", "SplitTracker"]


class Resumption(NamedTuple):
    """Where a ring goes on."""

    next_avail: int
    """Free-running index of the next chain to pop."""
    heads: Sequence[int]
    """Chains popped before, and not used: to be served again, in this order, before all others."""


class SplitTracker(Protocol):
    """Remembers the chains of a split ring.

    Context: one thread at a time, as its queue.
    """

    def resume(self, size: int, used_idx: int, avail_idx: int, base: int) -> Resumption:
        """Begin to track, and say what is in flight.

        Args:
            size: entries of the ring.
            used_idx, avail_idx: as they are in the rings now.
            base: where the ring would be started if nothing were known.

        Raises:
            PeerError: what was remembered was not written for this ring.
        """
        ...

    def begin(self, head: int) -> None:
        """A chain was popped, and nothing was done with it yet."""
        ...

    def push(self, head: int) -> None:
        """A chain is in the used ring, and the used index does not count it yet."""
        ...

    def publish(self, used_idx: int) -> None:
        """The used index counts all that was pushed."""
        ...


class Descriptor(NamedTuple):
    """One of a packed ring."""

    id: int
    flags: int
    length: int
    address: int


class PackedResumption(NamedTuple):
    """Where a packed ring goes on."""

    used: tuple[int, bool] | None
    """Slot and wrap counter of the next used descriptor; None: nothing is known."""
    chains: Sequence[tuple[int, Sequence[Descriptor]]]
    """Chains popped before, and not used, with their entries, in the order in which they come again."""


class PackedTracker(Protocol):
    """Remembers the chains of a packed ring, whose used descriptors are shown one by one.

    Context: one thread at a time, as its queue.
    """

    def resume(
        self, size: int, used: tuple[int, bool], slot_flags: Sequence[int]
    ) -> PackedResumption:
        """Begin to track, and say what is in flight.

        Args:
            size: slots of the ring.
            used: slot and wrap counter where the next used descriptor would go.
            slot_flags: what the ring's descriptors have now.

        Raises:
            PeerError: what was remembered was not written for this ring.
        """
        ...

    def begin(self, descriptors: Sequence[Descriptor]) -> int:
        """A chain was popped, and nothing was done with it yet; gives its entry."""
        ...

    def push(self, entry: int, used: tuple[int, bool]) -> None:
        """The next store shows the driver that a chain is done; `used` is where the one behind it goes."""
        ...

    def publish(self, entry: int, used: tuple[int, bool]) -> None:
        """It was shown."""
        ...
