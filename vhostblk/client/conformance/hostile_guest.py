"""Attacks of a guest on its device: rings and chains that VIRTIO forbids.

VIRTIO 1.2 §2.7.5 and §2.7.6, the requirements on drivers. What a back-end does with the queue is its
own affair (the detail tells); it has to live, and to serve the next front-end.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

from vhostblk.client.conformance.check import Check
from vhostblk.client.conformance.guest import Guest, status_name
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.virtio.blk import HEADER, RequestType
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature
from vhostblk.virtio.split import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

__all__ = ["CHECKS"]

_NEXT, _WRITE, _INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
_SIZE = 64
_END = 2**64
# How long a reaction is waited for, seconds.
_PATIENCE = 0.25
_MEMORY = 8 << 20


class _Attack:
    """The first queue of a guest, used without any of the driver's care."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.driver = guest.driver()
        self.memory = guest.client.memory
        room = self.memory.allocate(64 << 10, alignment=4096)
        self.header = Buffer(room.gpa, HEADER.size)
        self.data = Buffer(room.gpa + 4096, 4096)
        self.status = Buffer(room.gpa + 8192, 1)
        self.table = Buffer(room.gpa + 16384, 4096)
        self.memory.write(self.header.gpa, HEADER.pack(RequestType.IN, 0, 0))
        self.memory.write(self.status.gpa, b"\xff")

    def direct(self, *descriptors: tuple[int, int, int, int]) -> None:
        """Fill the queue's table from its start."""
        for index, descriptor in enumerate(descriptors):
            self.driver.write_descriptor(index, *descriptor)

    def indirect(self, *descriptors: tuple[int, int, int, int], flags: int = _INDIRECT) -> None:
        """Fill a table of indirect descriptors, and the one that names it."""
        for index, descriptor in enumerate(descriptors):
            self.memory.write(self.table.gpa + 16 * index, DESC.pack(*descriptor))
        self.direct((self.table.gpa, 16 * len(descriptors), flags, 1))

    def offer(self, head: int = 0, count: int = 1) -> None:
        """Show the device a chain, and say that there are `count`."""
        position = self.driver.avail_idx
        self.driver.write_avail(position, head)
        self.driver.write_avail_idx(position + count)
        self.guest.queue().kick()

    def good(self) -> list[tuple[int, int, int, int]]:
        """A request as it should be."""
        return [
            (*self.header, _NEXT, 1),
            (*self.data, _NEXT | _WRITE, 2),
            (*self.status, _WRITE, 0),
        ]

    def reaction(self) -> str:
        """What the back-end does about it."""
        guest, fd = self.guest, self.guest.control.connection.fileno()
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(guest.queue().err_fd, select.POLLIN)
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            ready = {fd for fd, _ in poller.poll(2)}
            if fd in ready:
                return "ended the session"
            if guest.queue().err_fd in ready:
                os.eventfd_read(guest.queue().err_fd)
                return "declared the queue broken"
            if guest.used_idx() != self.driver.used_idx:
                status = self.memory.read(self.status)[0]
                return f"gave the chain back, status {status_name(status)}"
        return "ignored it"


_Deed = Callable[[_Attack], None]


def _buffer(gpa: int | None, length: int, flags: int = _WRITE) -> _Deed:
    """A request whose data is elsewhere."""

    def deed(a: _Attack) -> None:
        header, _, status = a.good()
        a.direct(header, (a.data.gpa if gpa is None else gpa, length, _NEXT | flags, 2), status)
        a.offer()

    return deed


def _header(gpa: int, length: int) -> _Deed:
    def deed(a: _Attack) -> None:
        a.direct((gpa, length, _NEXT, 1), (*a.status, _WRITE, 0))
        a.offer()

    return deed


def _status(gpa: int) -> _Deed:
    def deed(a: _Attack) -> None:
        header, data, _ = a.good()
        a.direct(header, data, (gpa, 1, _WRITE, 0))
        a.offer()

    return deed


def _over_the_end(a: _Attack) -> None:
    _buffer(a.memory.regions[-1].end - 8, 16)(a)


def _chain(*links: tuple[int, int]) -> _Deed:
    """Readable descriptors with these (flags, next)."""

    def deed(a: _Attack) -> None:
        a.direct(*((*a.header, flags, following) for flags, following in links))
        a.offer()

    return deed


def _loop_of_all(a: _Attack) -> None:
    a.direct(*((*a.header, _NEXT, (i + 1) % _SIZE) for i in range(_SIZE)))
    a.offer()


def _writable_loop(a: _Attack) -> None:
    a.direct((*a.header, _NEXT, 1), (*a.data, _NEXT | _WRITE, 1))
    a.offer()


def _order(a: _Attack) -> None:
    a.direct((*a.status, _NEXT | _WRITE, 1), (*a.header, 0, 0))
    a.offer()


def _no_status(a: _Attack) -> None:
    a.direct((*a.header, _NEXT, 1), (*a.data, 0, 0))
    a.offer()


def _short_header(a: _Attack) -> None:
    a.direct((a.header.gpa, 15, _NEXT, 1), (*a.status, _WRITE, 0))
    a.offer()


def _only_a_status(a: _Attack) -> None:
    a.direct((*a.status, _WRITE, 0))
    a.offer()


def _empty_status(a: _Attack) -> None:
    a.direct((*a.header, _NEXT, 1), (a.status.gpa, 0, _WRITE, 0))
    a.offer()


def _empty_descriptors(a: _Attack) -> None:
    a.direct((a.header.gpa, 0, _NEXT, 1), (a.data.gpa, 0, _NEXT | _WRITE, 2), (0, 0, _WRITE, 0))
    a.offer()


def _table(gpa: int | None, length: int, flags: int = _INDIRECT) -> _Deed:
    def deed(a: _Attack) -> None:
        a.indirect(*a.good())
        a.direct((a.table.gpa if gpa is None else gpa, length, flags, 1), *a.good())
        a.offer()

    return deed


def _nested(a: _Attack) -> None:
    a.indirect((a.table.gpa, 48, _INDIRECT, 0))
    a.offer()


def _in_table(*links: tuple[int, int]) -> _Deed:
    def deed(a: _Attack) -> None:
        a.indirect(*((*a.header, flags, following) for flags, following in links))
        a.offer()

    return deed


def _bad_buffer_in_table(a: _Attack) -> None:
    header, _, status = a.good()
    a.indirect(header, (_END - 4096, 4096, _NEXT | _WRITE, 2), status)
    a.offer()


def _same_chain_twice(a: _Attack) -> None:
    a.direct(*a.good())
    a.driver.write_avail(a.driver.avail_idx + 1, 0)
    a.offer(0, 2)


def _terabytes(a: _Attack) -> None:
    everything = (a.memory.regions[0].gpa, _MEMORY)
    data = [(*everything, _NEXT | _WRITE, i + 2) for i in range(_SIZE - 2)]
    a.direct((*a.header, _NEXT, 1), *data)
    a.driver.write_descriptor(_SIZE - 1, *a.status, _WRITE, 0)
    a.offer()


def _ring_as_data(a: _Attack) -> None:
    # The device writes over the very ring it works on.
    rings = (a.driver.gpa, 4096)
    header, _, status = a.good()
    a.direct(header, (*rings, _NEXT | _WRITE, 2), status)
    a.offer()


def _broken_then_kicked(a: _Attack) -> None:
    _chain((_NEXT, 65535))(a)
    for _ in range(50):
        a.guest.queue().kick()


_ATTACKS: tuple[tuple[str, str, _Deed], ...] = (
    ("head-outside", "a head just outside the table", lambda a: a.offer(_SIZE)),
    ("head-far-outside", "head 65535", lambda a: a.offer(65535)),
    ("index-ahead", "avail.idx ahead of the ring", lambda a: a.offer(0, _SIZE + 1)),
    ("index-back", "avail.idx goes back", lambda a: a.offer(0, -1)),
    ("index-half-round", "avail.idx half way round", lambda a: a.offer(0, 32768)),
    ("loop-of-one", "a descriptor that names itself", _chain((_NEXT, 0))),
    ("loop-of-two", "two descriptors that name each other", _chain((_NEXT, 1), (_NEXT, 0))),
    ("loop-of-all", "a loop through the whole table", _loop_of_all),
    ("loop-writable", "a loop of writable descriptors", _writable_loop),
    ("next-outside", "next just outside the table", _chain((_NEXT, _SIZE))),
    ("next-far-outside", "next 65535", _chain((_NEXT, 65535))),
    ("buffer-at-0", "a buffer at address 0", _buffer(0, 512)),
    ("buffer-at-the-end", "a buffer at the end of the address space", _buffer(_END - 1, 1)),
    ("buffer-wraps", "a buffer that wraps round the address space", _buffer(_END - 4096, 8192)),
    ("buffer-of-4-gib", "a buffer of 4 GiB", _buffer(None, 2**32 - 1)),
    ("buffer-over-the-end", "a buffer over the end of memory", _over_the_end),
    ("header-outside", "a header outside memory", _header(1 << 60, 16)),
    ("status-outside", "a status outside memory", _status(1 << 60)),
    ("order", "readable after writable descriptors", _order),
    ("no-status", "no status byte", _no_status),
    ("empty-status", "a status of no bytes", _empty_status),
    ("empty-descriptors", "descriptors of no bytes", _empty_descriptors),
    ("short-header", "a header of 15 bytes", _short_header),
    ("only-a-status", "a chain without a header", _only_a_status),
    ("table-empty", "an indirect table of no bytes", _table(None, 0)),
    ("table-odd", "an indirect table of 47 bytes", _table(None, 47)),
    ("table-too-long", "an indirect table of 4 GiB", _table(None, 2**32 - 16)),
    ("table-outside", "an indirect table outside memory", _table(1 << 60, 48)),
    ("table-wraps", "an indirect table that wraps", _table(_END - 16, 48)),
    ("table-with-next", "an indirect descriptor with NEXT", _table(None, 48, _INDIRECT | _NEXT)),
    ("table-in-a-table", "an indirect table in an indirect table", _nested),
    ("table-loop", "a loop in an indirect table", _in_table((_NEXT, 1), (_NEXT, 0))),
    ("table-next-outside", "next outside an indirect table", _in_table((_NEXT, 2), (0, 0))),
    ("table-bad-buffer", "a buffer outside memory in an indirect table", _bad_buffer_in_table),
    ("same-chain-twice", "the same chain offered twice", _same_chain_twice),
    ("terabytes", "one request for all of memory, again and again", _terabytes),
    ("ring-as-data", "data that is read into the ring itself", _ring_as_data),
    ("kicks-after-all", "kicks on a queue that is broken", _broken_then_kicked),
)


def _attack(deed: _Deed, without: int = 0) -> Callable[[Rig], str]:
    def run(rig: Rig) -> str:
        memory = lambda: SharedMemory([_MEMORY])  # noqa: E731
        with rig.guest(queue_size=_SIZE, memory=memory, without=without) as guest:
            attack = _Attack(guest)
            deed(attack)
            said = attack.reaction()
            guest.client.abandon()
            return said

    return run


def _good_table(a: _Attack) -> None:
    a.indirect(*a.good())
    a.offer()


CHECKS: tuple[Check, ...] = (
    *(
        Check(
            f"guest.{name}",
            f"endures {title}",
            "VIRTIO 1.2 §2.7.5.3.1" if name.startswith("table") else "VIRTIO 1.2 §2.7.5, §2.7.6",
            _attack(deed),
            hostile=True,
            features=Feature.VIRTIO_F_INDIRECT_DESC if name.startswith("table") else 0,
        )
        for name, title, deed in _ATTACKS
    ),
    Check(
        "guest.table-not-negotiated",
        "endures an indirect table that was not negotiated",
        "VIRTIO 1.2 §2.7.5.3.1",
        _attack(_good_table, Feature.VIRTIO_F_INDIRECT_DESC),
        hostile=True,
    ),
)
