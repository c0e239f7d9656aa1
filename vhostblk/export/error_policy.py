"""What becomes of a guest's request that the disk has failed: QEMU's rerror and werror (block layer row B39).

A policy for reads and one for everything else say what an errno leads to. *report*: the guest is told. *ignore*: the
guest is told that all is well. *stop*: the request is parked, and the export's queues are paused, until somebody has
mended what is wrong and resumes; then it is tried again, and its guest never knows (parking.py). *enospc* stops if
there is no room, and reports everything else.

Sans-io. Knows neither rings nor what a request does.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass


class OnError(enum.Enum):
    """A policy, as QEMU spells it."""

    AUTO = "auto"  # reads report, writes stop for want of room
    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"


class Action(enum.Enum):
    """What happens to one request (QEMU's BlockErrorAction)."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


class IoStatus(enum.Enum):
    """Why the queues are paused (QEMU's BlockDeviceIoStatus)."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


# Nothing that anybody could mend: there is no disk, or the guest's memory has gone.
_NOT_THE_DISKS = frozenset((errno.ENOMEDIUM, errno.EFAULT))


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """Args:
    rerror: for reads.
    werror: for everything else.
    """

    rerror: OnError = OnError.AUTO
    werror: OnError = OnError.AUTO

    def of(self, *, is_read: bool) -> OnError:
        """The policy of a direction; never `AUTO`."""
        chosen = self.rerror if is_read else self.werror
        if chosen is OnError.AUTO:
            return OnError.REPORT if is_read else OnError.ENOSPC
        return chosen

    def action(self, error: int, *, is_read: bool) -> Action:
        """What to do about a request that failed.

        Args:
            error: positive errno.
        """
        policy = self.of(is_read=is_read)
        if error in _NOT_THE_DISKS:
            return Action.REPORT
        if policy is OnError.ENOSPC:
            return Action.STOP if error == errno.ENOSPC else Action.REPORT
        return Action(policy.value)

    @property
    def has_status(self) -> bool:
        """Whether there is an I/O status: something can stop the queues (row B39.5)."""
        return OnError.STOP in (self.of(is_read=True), self.of(is_read=False)) or (
            self.of(is_read=False) is OnError.ENOSPC
        )
