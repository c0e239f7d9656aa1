"""All checks, in the order in which they run: the hostile ones last, since they may end the back-end."""

from __future__ import annotations

from vhostblk.client.conformance import (
    config,
    device,
    framing,
    hostile_front_end,
    hostile_guest,
    hostile_memory,
    inflight,
    memory,
    notifications,
    packed,
    queues,
    reconnect,
    requests,
    rings,
    session,
    states,
    writes,
)
from vhostblk.client.conformance.check import Check

__all__ = ["ALL_CHECKS"]

ALL_CHECKS: tuple[Check, ...] = (
    *session.CHECKS,
    *config.CHECKS,
    *requests.CHECKS,
    *writes.CHECKS,
    *framing.CHECKS,
    *rings.CHECKS,
    *packed.CHECKS,
    *notifications.CHECKS,
    *states.CHECKS,
    *device.CHECKS,
    *memory.CHECKS,
    *queues.CHECKS,
    *reconnect.CHECKS,
    *inflight.CHECKS,
    *hostile_guest.CHECKS,
    *hostile_front_end.CHECKS,
    *hostile_memory.CHECKS,
    *inflight.HOSTILE,
    *device.HOSTILE,
)
