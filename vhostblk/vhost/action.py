"""What a session asks its caller to do: one frozen dataclass per action.

`session` says in which order, and what becomes of the file descriptors: all are lent, and closed
by a later `CloseFds`, but for the one in `SetBackendChannel`, which is given away.
"""

from __future__ import annotations

from dataclasses import dataclass

from vhostblk.vhost.payload import MemoryRegion
from vhostblk.vhost.vring import VringFd, VringSnapshot

__all__ = [
    "Action",
    "AddRegion",
    "CheckState",
    "CloseFds",
    "CreateInflight",
    "EnableVring",
    "ForgetInflight",
    "LoadState",
    "MapInflight",
    "MapMemory",
    "ReadConfig",
    "RemoveRegion",
    "ResetDevice",
    "SaveState",
    "SetBackendChannel",
    "SetFeatures",
    "SetLogArea",
    "SetLogFd",
    "SetLogging",
    "SetVringFd",
    "SetVringLog",
    "StartVring",
    "StopVring",
    "WriteConfig",
]


class Action:
    """What the caller has to do because of a message; `complete` reports the last result."""


@dataclass(frozen=True)
class SetFeatures(Action):
    """The driver's features are settled: VIRTIO's only, without vhost-user's own bit 30."""

    features: int


@dataclass(frozen=True)
class MapMemory(Action):
    """Replace all guest memory; `fds[i]` belongs to `regions[i]`."""

    regions: tuple[MemoryRegion, ...]
    fds: tuple[int, ...]


@dataclass(frozen=True)
class AddRegion(Action):
    """Add one region of guest memory."""

    region: MemoryRegion
    fd: int


@dataclass(frozen=True)
class RemoveRegion(Action):
    """Remove the region with this gpa, uva and size; the offset means nothing."""

    region: MemoryRegion


@dataclass(frozen=True)
class SetLogArea(Action):
    """Mark in this log from now on; done when nobody marks in the one before."""

    size: int
    offset: int
    fd: int


@dataclass(frozen=True)
class SetLogFd(Action):
    """Signal this eventfd when pages were marked; None: no more. Done when the old one is out of use."""

    fd: int | None


@dataclass(frozen=True)
class SetLogging(Action):
    """Whether what is written to buffers is marked; done when everybody who writes does so."""

    enabled: bool


@dataclass(frozen=True)
class SetVringLog(Action):
    """Where in the log a started ring's used ring is; None: it is not marked. Done when that is so."""

    index: int
    gpa: int | None


@dataclass(frozen=True)
class CreateInflight(Action):
    """The result is the fd of a new file of so many zero bytes; it is sent, and then to be closed."""

    size: int


@dataclass(frozen=True)
class MapInflight(Action):
    """Track requests in flight here, `size` bytes at `offset` of the file, and nowhere else.

    `note` is where in these bytes a `DeviceNote` is, if there is room for one: what it says is so from now on.
    """

    offset: int
    size: int
    fd: int
    note: int | None = None


@dataclass(frozen=True)
class ForgetInflight(Action):
    """Zero the 16 bits at each of these offsets of the region: nothing is in flight any more."""

    versions: tuple[int, ...]


@dataclass(frozen=True)
class StartVring(Action):
    """Start serving a ring, popping only if `vring.enabled`. Fails if it lies outside memory."""

    index: int
    vring: VringSnapshot


@dataclass(frozen=True)
class StopVring(Action):
    """Complete what is in flight and stop. The result is where the ring is to be started again.

    With `suspend`, requests that are tracked need not be completed: they stay in flight in their region, and are
    not begun, or waited for where that cannot be undone.
    """

    index: int
    suspend: bool = False


@dataclass(frozen=True)
class EnableVring(Action):
    """Begin, or cease, to pop from a started ring."""

    index: int
    enabled: bool


@dataclass(frozen=True)
class SetVringFd(Action):
    """Exchange an fd of a started ring. Done when the old one is out of use."""

    index: int
    which: VringFd
    fd: int | None


@dataclass(frozen=True)
class ReadConfig(Action):
    """The result is `size` bytes of the configuration space."""

    offset: int
    size: int


@dataclass(frozen=True)
class WriteConfig(Action):
    """Change the configuration space.

    From the driver, only writable bytes get this far; with `migration`, any: accept those that are
    writable or do not change, refuse the others.
    """

    offset: int
    data: bytes
    migration: bool


@dataclass(frozen=True)
class SetBackendChannel(Action):
    """Take this socket, for good, for messages of the back-end; an older one is to be closed."""

    fd: int


@dataclass(frozen=True)
class ResetDevice(Action):
    """Stop all rings and bring the device back to its initial state; memory stays mapped."""


@dataclass(frozen=True)
class SaveState(Action):
    """Write what the next back-end has to know to this fd; no ring is started."""

    fd: int


@dataclass(frozen=True)
class LoadState(Action):
    """Take this fd, for good, and read what the back-end before has said, up to its end."""

    fd: int


@dataclass(frozen=True)
class CheckState(Action):
    """Done when the state that was saved, or loaded, last is whole and in force."""


@dataclass(frozen=True)
class CloseFds(Action):
    """Close these: nothing uses them any more."""

    fds: tuple[int, ...]
