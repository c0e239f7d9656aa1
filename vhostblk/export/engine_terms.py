"""Vrings in the engine's terms, and the engine's refusals in ours."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterable

from vhostblk import native
from vhostblk.export.inflight import QueueInflight
from vhostblk.native import Message
from vhostblk.vhost.vring import VringSnapshot
from vhostblk.virtio.features import Feature


def queue_config(
    vring: VringSnapshot,
    features: int,
    disk: native.Disk,
    stats: native.QueueStats,
    inflight: QueueInflight | None,
    *,
    enabled: bool,
) -> native.QueueConfig:
    """What VB_QUEUE_START is told.

    Args:
        features: what the driver acknowledged.
        stats: where the queue is counted.
        inflight: where its requests are tracked.
        enabled: whether it takes requests, which is not the front-end's to decide alone.
    """
    return native.queue_config(
        disk=disk,
        stats=stats,
        desc_uva=vring.desc,
        avail_uva=vring.avail,
        used_uva=vring.used,
        size=vring.size,
        index=vring.index,
        base=vring.base,
        enabled=enabled,
        event_idx=bool(features & Feature.VIRTIO_F_EVENT_IDX),
        indirect=bool(features & Feature.VIRTIO_F_INDIRECT_DESC),
        packed=bool(features & Feature.VIRTIO_F_RING_PACKED),
        kick_fd=fd_or_none(vring.kick_fd),
        call_fd=fd_or_none(vring.call_fd),
        err_fd=fd_or_none(vring.err_fd),
        inflight=None if inflight is None else inflight.view,
        log_gpa=vring.log_gpa,
    )


def fd_or_none(fd: int | None) -> int:
    """A number for the engine, which knows -1 for none."""
    return -1 if fd is None else fd


def insist(answer: Message) -> Message:
    """The answer to a command that only a bug of ours can make fail."""
    if answer[9] < 0:
        code = errno.errorcode.get(-answer[9], answer[9])
        raise RuntimeError(f"the engine refused a command: {code}")
    return answer


async def answered(commands: Iterable[asyncio.Future[Message]]) -> None:
    """Await commands that only a bug of ours can make fail."""
    for answer in await asyncio.gather(*commands):
        insist(answer)


# What VB_QUEUE_START may be refused for by the front-end's fault, and by the machine's.
_WHY_NOT_STARTED = {
    errno.EFAULT: "its rings are not in the memory that was shared",
    errno.EINVAL: "its size or its base is impossible",
    errno.EBADMSG: "its in-flight region was not written for this ring",
    errno.EPERM: "nobody can wait for such a kick fd",
    errno.EEXIST: "another queue has the same kick fd",
    errno.ENOMEM: "out of memory",
    errno.ENOSPC: "too many queues",
}


def why_not_started(error: int) -> str:
    """For people; a positive errno."""
    return _WHY_NOT_STARTED.get(error, os.strerror(error))
