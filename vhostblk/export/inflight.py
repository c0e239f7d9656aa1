"""Where a front-end has requests in flight tracked, mapped and guarded against its truncation.

vhost-user, "Inflight I/O tracking". The mapping lives as long as the session, or until the next SET_INFLIGHT_FD; data
paths get the part of each queue when it starts, and let go of it when it stops.

Knows nothing about what is in it.
"""

from __future__ import annotations

from vhostblk import native
from vhostblk.errors import PeerError
from vhostblk.vhost.action import MapInflight
from vhostblk.vhost.device_note import NOTE_SIZE, DeviceNote
from vhostblk.vhost.inflight_region import InflightRegion

__all__ = ["QueueInflight", "TrackedMemory"]


class TrackedMemory:
    """The region of one session.

    Args:
        step: where it is.

    Raises:
        PeerError: it cannot be mapped.

    Context: the control loop. Owns: the mapping and its guard.
    """

    def __init__(self, step: MapInflight) -> None:
        self._region = InflightRegion(step.fd, step.offset, step.size, native.address_of)
        self._guard: native.Memory | None = None
        if native.available:
            try:
                self._guard = native.Memory([self._region])
            except OSError as exc:
                self._region.close()
                raise PeerError(str(exc.strerror)) from None

    @property
    def faulted(self) -> bool:
        """Whether the front-end has truncated it, and it was used since."""
        return self._guard is not None and self._guard.faulted

    def part(self, part: range) -> QueueInflight:
        """What a queue needs of it."""
        return QueueInflight(self, self._region.part(part))

    def note(self, offset: int) -> DeviceNote:
        """What the device before has left there, and this one does; close it before this object."""
        return DeviceNote(self._region.part(range(offset, offset + NOTE_SIZE)))

    def forget(self, versions: tuple[int, ...]) -> None:
        """Zero 16 bits at each of these offsets. Raises: PeerError: they are not there any more."""
        self._region.forget(versions)
        if self.faulted:
            raise PeerError("the in-flight region was truncated")

    def close(self) -> None:
        """Unmap it. Idempotent; no queue uses it any more."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        self._region.close()


class QueueInflight:
    """A queue's part of it."""

    def __init__(self, memory: TrackedMemory, view: memoryview) -> None:
        self._memory = memory
        self.view = view
        """Aligned to 8 bytes."""

    @property
    def faulted(self) -> bool:
        """See `TrackedMemory.faulted`."""
        return self._memory.faulted
