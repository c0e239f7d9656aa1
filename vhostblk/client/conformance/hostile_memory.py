"""Attacks of a front-end on the memory that it shares: files that are none, sizes that lie, rings outside.

vhost-user, "Memory region description". What a back-end does with the session is its own affair (the
detail tells); it has to live, and to serve the next front-end.
"""

from __future__ import annotations

import os
import struct

from vhostblk.client.conformance.check import Check, check, collect
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.hostile_front_end import send_and_leave, wrong_fds
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.control import PROTOCOL_FEATURES
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.message import ProtocolFeature, Request
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.blk import HEADER, RequestType
from vhostblk.virtio.driver import Buffer

__all__ = ["CHECKS"]

_R = Request
_SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS
_MEMORY = "vhost-user, Memory region description"
_RINGS = "vhost-user, Front-end message types"
# Seconds for a back-end to answer a request into memory that is not there.
_PATIENCE = 0.5


def _mem(guest: Guest, fd: int, *, size: int, offset: int = 0) -> str:
    """Offer a region far from all others."""
    data = struct.pack("=QQQQQ", 0, 1 << 42, size, 1 << 50, offset)
    if guest.control.protocol_features & _SLOTS:
        return send_and_leave(guest, _R.ADD_MEM_REG, data, (fd,))
    table = struct.pack("=IIQQQQ", 1, 0, 1 << 42, size, 1 << 50, offset)
    return send_and_leave(guest, _R.SET_MEM_TABLE, table, (fd,))


@check("front-end.memory-not-a-file", "endures memory that is no file", _MEMORY, hostile=True)
def memory_not_a_file(rig: Rig) -> str:
    said = []
    fds = wrong_fds()
    try:
        for fd in fds:
            with rig.guest(queues=0) as guest:
                said.append(_mem(guest, fd, size=1 << 20))
    finally:
        for fd in fds:
            os.close(fd)
    return ", ".join(dict.fromkeys(said))


@check(
    "front-end.memory-size",
    "endures regions of no bytes, of 2^64-1 bytes, and of offsets that overflow",
    _MEMORY,
    hostile=True,
)
def memory_size(rig: Rig) -> str:
    said = []
    fd = os.memfd_create("conformance")
    try:
        os.truncate(fd, 1 << 20)
        for size, offset in ((0, 0), (2**64 - 1, 0), (4096, 2**64 - 4096), (1 << 20, 123)):
            with rig.guest(queues=0) as guest:
                said.append(_mem(guest, fd, size=size, offset=offset))
    finally:
        os.close(fd)
    return ", ".join(dict.fromkeys(said))


@check(
    "front-end.memory-shorter-than-said",
    "endures memory whose file is shorter than was said",
    _MEMORY,
    hostile=True,
)
def memory_shorter_than_said(rig: Rig) -> str:
    # A table: a slot added by itself is among the sizes above.
    protocol = PROTOCOL_FEATURES & ~_SLOTS
    with rig.guest(memory=lambda: SharedMemory([4 << 20]), protocol_features=protocol) as guest:
        client = guest.client
        region = client.memory.add_region(1 << 20)
        os.ftruncate(region.fd, 4096)
        try:
            guest.control.share(client.memory, one_by_one=False)
        except SessionError:
            client.abandon()
            return "ended the session"
        except PeerError:
            client.abandon()
            return "refused"
        return f"took it; a read there: {_read_into(guest, region.end - 8192)}"


@check(
    "front-end.memory-truncated",
    "endures memory that is truncated while it is used",
    _MEMORY,
    hostile=True,
)
def memory_truncated(rig: Rig) -> str:
    with rig.guest(memory=lambda: SharedMemory([4 << 20] * 2)) as guest:
        region = guest.client.memory.regions[1]
        region.truncate(4096)
        return _read_into(guest, region.end - 8192)


def _read_into(guest: Guest, gpa: int) -> str:
    """Let the device read into memory that we must not touch ourselves; leave."""
    memory, client = guest.client.memory, guest.client
    room = memory.allocate(64)
    memory.write(room.gpa, HEADER.pack(RequestType.IN, 0, 0))
    client.control.connection.timeout = _PATIENCE
    try:
        guest.chain([Buffer(room.gpa, 16)], [Buffer(gpa, 512), Buffer(room.gpa + 32, 1)])
        return f"answered, status {memory.read(Buffer(room.gpa + 32, 1))[0]}"
    except TimeoutError:
        return "not answered"
    except SessionError:
        return "ended the session"
    except PeerError:
        return "declared the queue broken"
    finally:
        client.abandon()


@check(
    "front-end.memory-of-a-live-ring-removed",
    "endures that the memory of a running ring is taken away",
    "vhost-user, VHOST_USER_REM_MEM_REG",
    hostile=True,
    protocol=_SLOTS,
)
def memory_of_a_live_ring_removed(rig: Rig) -> str:
    with rig.guest() as guest:
        guest.client.wait(guest.identify())
        for _ in range(16):
            guest.submit(RequestType.IN, 0, room=rig.block)
        try:
            guest.control.remove_region(guest.client.memory.regions[0])
        except SessionError:
            said = "ended the session"
        except PeerError:
            said = "refused"
        else:
            said = "removed"
            guest.queue().kick()
            guest.control.is_alive()
        guest.client.abandon()
        return said


@check(
    "front-end.ring-over-the-end",
    "endures a ring that crosses the end of memory",
    _RINGS,
    hostile=True,
)
def ring_over_the_end(rig: Rig) -> str:
    with rig.guest(queues=0) as guest:
        region = guest.client.memory.regions[-1]
        end = region.uva + region.size
        frontend = guest.control.frontend
        guest.client.make_queues(1, 64)
        queue = guest.queue()
        try:
            guest.ask(frontend.set_vring_num(0, 64))
            guest.ask(frontend.set_vring_base(0, 0))
            guest.ask(frontend.set_vring_addr(0, desc=end - 512, avail=end - 64, used=end - 16))
            guest.ask(frontend.set_vring_fd(0, VringFd.CALL, queue.call_fd))
            guest.ask(frontend.set_vring_fd(0, VringFd.KICK, queue.kick_fd))
            guest.ask(frontend.set_vring_enable(0, True))
            queue.kick()
            guest.control.is_alive()
            said = "took it"
        except SessionError:
            said = "ended the session"
        except PeerError:
            said = "refused"
        guest.client.abandon()
        return said


CHECKS: tuple[Check, ...] = collect(globals())
