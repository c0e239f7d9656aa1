"""A daemon with one fault: `python -m tests.integration.faulty_daemon FAULT storage-daemon …`.

The faults are those that back-ends have had: each changes one thing in the Python data path, in the device or in the
session. What `vhostblk check` has to say about each is in test_check.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from vhostblk.block.backend import BlockBackend
from vhostblk.cli.main import main
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.python_path import PythonDataPath
from vhostblk.vhost.device_status import DeviceStatus
from vhostblk.vhost.message import Request
from vhostblk.vhost.session import Session
from vhostblk.virtio.blk import BlkConfig, RequestType, Status
from vhostblk.virtio.blk_request import BlkRequest
from vhostblk.virtio.packed import PackedVirtqueue
from vhostblk.virtio.split import AVAIL_F_NO_INTERRUPT, SplitVirtqueue

_ONE_SECTOR = 512


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


def used_length_too_long() -> None:
    _wrap(BlkRequest, "complete", lambda real, *args: real(*args) + 100)


def used_length_forgotten() -> None:
    _wrap(BlkRequest, "complete", lambda real, *args: real(*args) * 0)


def calls_lost() -> None:
    counted = iter(range(1 << 62))
    _wrap(
        SplitVirtqueue,
        "needs_notification",
        lambda real, ring: real(ring) and next(counted) % 7 != 6,
    )


def calls_never_suppressed() -> None:
    _wrap(SplitVirtqueue, "needs_notification", lambda real, ring: real(ring) or True)


def flag_honoured_with_event_idx() -> None:
    def needs(real: Callable[..., bool], ring: Any) -> bool:
        return real(ring) and not ring._avail[0] & AVAIL_F_NO_INTERRUPT

    _wrap(SplitVirtqueue, "needs_notification", needs)


def kicks_not_asked_for() -> None:
    # It goes to sleep with avail_event, or the flag, where it was when it was busy.
    def sleep(real: Callable[..., bool], ring: Any) -> bool:
        return bool(ring._avail[1] != ring.next_avail)

    _wrap(SplitVirtqueue, "enable_notification", sleep)


def one_status_for_all_failures() -> None:
    _wrap(
        BlkRequest, "complete", lambda real, r, status, *n: real(r, min(status, Status.IOERR), *n)
    )


def last_sector_refused() -> None:
    capacity = BlkDevice.capacity
    BlkDevice.capacity = property(  # type: ignore[method-assign, assignment]
        lambda device: capacity.fget(device) + _ONE_SECTOR  # type: ignore[attr-defined]
    )


def writes_displaced() -> None:
    def write(real: Callable[..., Any], disk: BlockBackend, offset: int, *args: Any) -> Any:
        return real(disk, offset + _ONE_SECTOR * bool(offset), *args)

    _wrap(BlockBackend, "begin_pwritev", write)


def zeroes_not_written() -> None:
    async def do_nothing(device: BlkDevice, request: BlkRequest) -> tuple[int, int]:
        return int(Status.OK), 0

    BlkDevice._HANDLERS = {**BlkDevice._HANDLERS, RequestType.WRITE_ZEROES: do_nothing}


def base_one_too_far() -> None:
    async def stop(real: Callable[..., Any], *args: Any, **options: Any) -> int:
        return int(await real(*args, **options)) + 1

    _wrap(PythonDataPath, "stop_queue", stop)


def disabled_rings_served() -> None:
    async def enable(real: object, path: PythonDataPath, index: int, enabled: bool) -> None:
        path._queues[index].enable(True)

    _wrap(PythonDataPath, "enable_queue", enable)


def cache_mode_ignored() -> None:
    _wrap(BlkDevice, "write_config", lambda real, device, offset, contents: None)


def config_offset_ignored() -> None:
    _wrap(BlkConfig, "read", lambda real, config, offset, length: config.to_bytes()[:length])


def dies_of_a_ring_of_3() -> None:
    def receive(real: Callable[..., Any], session: Session, message: Any) -> Any:
        if message.request == Request.SET_VRING_NUM and message.payload.num == 3:
            os._exit(1)
        return real(session, message)

    _wrap(Session, "receive", receive)


def status_forgotten() -> None:
    _wrap(DeviceStatus, "write", lambda _real, _status, _value: None)


def packed_wrap_counter_forgotten() -> None:
    real = PackedVirtqueue.base
    assert isinstance(real, property)
    assert real.fget is not None
    base = real.fget
    setattr(PackedVirtqueue, "base", property(lambda ring: base(ring) & ~0x8000))  # noqa: B010


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        used_length_too_long,
        used_length_forgotten,
        calls_lost,
        calls_never_suppressed,
        flag_honoured_with_event_idx,
        kicks_not_asked_for,
        one_status_for_all_failures,
        last_sector_refused,
        writes_displaced,
        zeroes_not_written,
        base_one_too_far,
        disabled_rings_served,
        cache_mode_ignored,
        config_offset_ignored,
        status_forgotten,
        packed_wrap_counter_forgotten,
        dies_of_a_ring_of_3,
    )
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
