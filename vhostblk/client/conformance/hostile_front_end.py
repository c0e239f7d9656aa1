"""Attacks of a front-end: messages and fds that vhost-user forbids, crowds, and sessions without a plan.

vhost-user, "Communication", "Front-end message types". What a back-end does with the session is its
own affair (the detail tells); it has to live, and to serve the next front-end.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable

from vhostblk.client.client import Client
from vhostblk.client.conformance.check import Check, check, collect
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.message import FRONTEND_TABLE, Request
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.blk import RequestType

__all__ = ["CHECKS", "send_and_leave", "wrong_fds"]

_VERSION, _REPLY, _NEED_REPLY = 1, 4, 8
_R = Request
_MESSAGES = "vhost-user, Communication"
_RINGS = "vhost-user, Front-end message types"
# Seconds for a back-end to hang up, or to answer what needs no answer.
_PATIENCE = 0.25
_MANY = 2**32 - 1


def _header(request: int, size: int, flags: int = _VERSION) -> bytes:
    return struct.pack("=III", request, flags, size)


def _until_hung_up(sock: socket.socket) -> str:
    """Read whatever comes until the end, or until nothing comes any more."""
    sock.settimeout(_PATIENCE)
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return "waited for more"
    except OSError:
        pass
    return "ended the session"


# ---------------------------------------------------------------- bytes that are no messages

_STREAMS: tuple[tuple[str, str, bytes], ...] = (
    ("half-a-header", "half a header", _header(_R.GET_FEATURES, 0)[:6]),
    ("no-payload", "a header without its payload", _header(_R.SET_FEATURES, 8)),
    ("version-0", "version 0", _header(_R.GET_FEATURES, 0, 0)),
    ("version-3", "version 3", _header(_R.GET_FEATURES, 0, 3)),
    ("a-reply", "a reply", _header(_R.GET_FEATURES, 8, _VERSION | _REPLY) + bytes(8)),
    ("short-payload", "a payload that is too short", _header(_R.SET_FEATURES, 4) + bytes(4)),
    ("long-payload", "a payload that is too long", _header(_R.SET_FEATURES, 400) + bytes(400)),
    ("4-gib-announced", "a payload of 4 GiB", _header(_R.SET_FEATURES, _MANY) + bytes(64)),
    ("zeroes", "4096 zeroes", bytes(4096)),
    ("random-bytes", "4096 random bytes", random.Random(1).randbytes(4096)),
)


def _stream(data: bytes) -> Callable[[Rig], str]:
    def run(rig: Rig) -> str:
        with rig.dial() as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return _until_hung_up(sock)

    return run


# ---------------------------------------------------------------- values that are none


def _u(index: int, value: int) -> bytes:
    return struct.pack("=II", index, value)


def _u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def _address(index: int, desc: int, avail: int, used: int) -> bytes:
    return struct.pack("=IIQQQQ", index, 0, desc, used, avail, 0)


_VALUES: tuple[tuple[str, str, Request, bytes], ...] = (
    ("size-0", "a ring of 0 entries", _R.SET_VRING_NUM, _u(0, 0)),
    ("size-3", "a ring of 3 entries", _R.SET_VRING_NUM, _u(0, 3)),
    ("size-4-gib", "a ring of 2^32-1 entries", _R.SET_VRING_NUM, _u(0, _MANY)),
    ("size-of-no-ring", "the size of ring 2^32-1", _R.SET_VRING_NUM, _u(_MANY, 64)),
    ("base-65536", "a base of 65536", _R.SET_VRING_BASE, _u(0, 65536)),
    ("base-of-no-ring", "the base of ring 4096", _R.SET_VRING_BASE, _u(4096, 0)),
    ("stop-no-ring", "GET_VRING_BASE of ring 4096", _R.GET_VRING_BASE, _u(4096, 0)),
    ("enable-no-ring", "SET_VRING_ENABLE of ring 4096", _R.SET_VRING_ENABLE, _u(4096, 1)),
    ("enable-2", "SET_VRING_ENABLE with 2", _R.SET_VRING_ENABLE, _u(0, 2)),
    ("address-misaligned", "misaligned rings", _R.SET_VRING_ADDR, _address(0, 8, 1, 2)),
    ("address-of-no-ring", "addresses of ring 4096", _R.SET_VRING_ADDR, _address(4096, 0, 0, 0)),
    ("address-outside", "rings outside memory", _R.SET_VRING_ADDR,
     _address(0, 1 << 60, 1 << 61, 1 << 62)),
    ("kick-of-no-ring", "the kick of ring 255", _R.SET_VRING_KICK, _u64(0x1FF)),
    ("kick-without-fd", "SET_VRING_KICK without its fd", _R.SET_VRING_KICK, _u64(0)),
    ("call-without-fd", "SET_VRING_CALL without its fd", _R.SET_VRING_CALL, _u64(0)),
    ("slot-without-fd", "ADD_MEM_REG without its fd", _R.ADD_MEM_REG,
     struct.pack("=QQQQQ", 0, 1 << 40, 4096, 1 << 50, 0)),
    ("unknown-slot", "REM_MEM_REG of a region that never was", _R.REM_MEM_REG,
     struct.pack("=QQQQQ", 0, 1 << 40, 4096, 1 << 50, 0)),
    ("table-without-fds", "SET_MEM_TABLE without fds", _R.SET_MEM_TABLE,
     struct.pack("=IIQQQQ", 1, 0, 1 << 40, 4096, 1 << 50, 0)),
    ("table-of-4-gi", "SET_MEM_TABLE of 2^32-1 regions", _R.SET_MEM_TABLE,
     struct.pack("=II", _MANY, 0) + bytes(32)),
    ("table-of-none", "SET_MEM_TABLE of no regions", _R.SET_MEM_TABLE, struct.pack("=II", 0, 0)),
    ("channel-without-fd", "SET_BACKEND_REQ_FD without its fd", _R.SET_BACKEND_REQ_FD, b""),
    ("config-outside", "GET_CONFIG at 2^32-1", _R.GET_CONFIG,
     struct.pack("=III", _MANY, 8, 0) + bytes(8)),
    ("config-long", "SET_CONFIG that says 2^32-1 bytes and has 8", _R.SET_CONFIG,
     struct.pack("=III", 0, _MANY, 0) + bytes(8)),
)  # fmt: skip


def _value(request: Request, data: bytes) -> Callable[[Rig], str]:
    def run(rig: Rig) -> str:
        with rig.guest(queues=0) as guest:
            guest.client.make_queues(1, 64)
            return send_and_leave(guest, request, data)

    return run


def send_and_leave(guest: Guest, request: Request, data: bytes, fds: tuple[int, ...] = ()) -> str:
    """Send one message, and look at what comes back; leave without another word."""
    control = guest.control
    control.connection.timeout = _PATIENCE
    try:
        control.send_raw(request, data, fds, flags=_VERSION | _NEED_REPLY)
        answer = control.receive().payload.pack()
    except TimeoutError:
        return "did not answer"
    except (SessionError, OSError):
        return "ended the session"
    finally:
        guest.client.abandon()
    if request in (_R.GET_VRING_BASE, _R.GET_CONFIG):
        return "answered" if answer else "refused"
    return "took it" if answer == bytes(8) else "refused"


_ROWS: tuple[Check, ...] = (
    *(
        Check(f"front-end.{name}", f"endures {title}", _MESSAGES, _stream(data), hostile=True)
        for name, title, data in _STREAMS
    ),
    *(
        Check(f"front-end.{name}", f"endures {title}", _RINGS, _value(request, data), hostile=True)
        for name, title, request, data in _VALUES
    ),
)


# ---------------------------------------------------------------- fds that are none


def wrong_fds() -> list[int]:
    """Fds that are open, and of the wrong kind for everything; the caller's to close."""
    pipe = os.pipe()
    return [
        os.open("/dev/null", os.O_RDWR),
        os.open("/", os.O_RDONLY),
        *pipe,
        os.memfd_create("conformance"),
        socket.socket(socket.AF_UNIX).detach(),
    ]


@check("front-end.wrong-kick-fds", "endures kick fds of every wrong kind", _RINGS, hostile=True)
def wrong_kick_fds(rig: Rig) -> str:
    return _wrong(rig, VringFd.KICK)


@check("front-end.wrong-call-fds", "endures call fds of every wrong kind", _RINGS, hostile=True)
def wrong_call_fds(rig: Rig) -> str:
    return _wrong(rig, VringFd.CALL)


def _wrong(rig: Rig, which: VringFd) -> str:
    said = []
    fds = wrong_fds()
    try:
        for fd in fds:
            with rig.guest() as guest:
                try:
                    guest.ask(guest.control.frontend.set_vring_fd(0, which, fd))
                    guest.submit(RequestType.GET_ID, room=20)
                    said.append("taken")
                except SessionError:
                    said.append("ended the session")
                except PeerError:
                    said.append("refused")
                guest.client.abandon()
    finally:
        for fd in fds:
            os.close(fd)
    return ", ".join(dict.fromkeys(said))


@check(
    "front-end.saturated-call-fd",
    "endures a call fd that blocks and cannot be written",
    "vhost-user, VHOST_USER_SET_VRING_CALL",
    hostile=True,
)
def saturated_call_fd(rig: Rig) -> str:
    full = os.eventfd(0, os.EFD_CLOEXEC)  # blocking
    os.eventfd_write(full, 2**64 - 2)
    try:
        with rig.guest() as guest:
            guest.ask(guest.control.frontend.set_vring_fd(0, VringFd.CALL, full))
            pending = guest.identify(3)
            said = "served" if guest.is_done_soon(pending) else "not served"
            guest.client.abandon()
    except (PeerError, TimeoutError, OSError):
        said = "refused"
    finally:
        os.close(full)
    return said


@check("front-end.many-fds", "endures fds that do not belong to a message", _MESSAGES, hostile=True)
def many_fds(rig: Rig) -> str:
    fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(64)]
    said = []
    try:
        for request in (_R.GET_FEATURES, _R.SET_FEATURES, _R.SET_VRING_NUM, _R.SET_VRING_CALL):
            with rig.dial() as sock:
                data = _header(request, 8, _VERSION | _NEED_REPLY) + bytes(8)
                socket.send_fds(sock, [data], fds)
                sock.shutdown(socket.SHUT_WR)
                said.append(_until_hung_up(sock))
    finally:
        for fd in fds:
            os.close(fd)
    return ", ".join(dict.fromkeys(said))


# ---------------------------------------------------------------- crowds


@check(
    "front-end.crowd", "endures 50 connections at once that say nothing", _MESSAGES, hostile=True
)
def crowd(rig: Rig) -> str:
    crowd = []
    try:
        for _ in range(50):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            sock.setblocking(False)
            crowd.append(sock)
            try:
                sock.connect(rig.path)
            except BlockingIOError:
                break
        return f"{len(crowd)} connected"
    finally:
        for sock in crowd:
            sock.close()


@check(
    "front-end.never-reads",
    "endures a front-end that asks and asks, and never reads the answers",
    _MESSAGES,
    hostile=True,
)
def never_reads(rig: Rig) -> str:
    data = _header(_R.GET_FEATURES, 0) * 500
    sent = 0
    with rig.dial() as sock:
        sock.settimeout(_PATIENCE)
        try:
            while sent < 4 << 20:
                sent += sock.send(data)
        except OSError:
            pass
    return f"{sent // 12} questions"


@check(
    "front-end.random-sessions",
    "endures 40 random sessions of plausible messages",
    _MESSAGES,
    hostile=True,
)
def random_sessions(rig: Rig) -> None:
    chance = random.Random(2)
    requests = [*FRONTEND_TABLE, 6, 7, 31, 32, 35, 39, 40]
    small = (0, 1, 2, 7, 64, 255, 256, 2**16, _MANY)
    for _ in range(40):
        fd = os.memfd_create("conformance")
        os.truncate(fd, 1 << 16)
        with rig.dial() as sock:
            try:
                for _ in range(chance.randrange(1, 20)):
                    words = [
                        chance.choice(small) for _ in range(chance.choice((0, 1, 2, 2, 2, 10)))
                    ]
                    data = struct.pack(f"={len(words)}I", *words)
                    flags = _VERSION | chance.choice((0, _NEED_REPLY))
                    message = _header(chance.choice(requests), len(data), flags) + data
                    fds = [fd] * chance.choice((0, 0, 1, 1, 2, 8))
                    socket.send_fds(sock, [message], fds)
            except OSError:
                pass
        os.close(fd)


@check(
    "front-end.no-features-at-all",
    "endures rings that are started before anything was negotiated",
    "vhost-user, Ring states",
    hostile=True,
)
def no_features_at_all(rig: Rig) -> str:
    control = rig.control()
    memory = SharedMemory([4 << 20])
    client = Client(control, memory, strict=False)
    try:
        client.make_queues(1, 64)
        client.start_queue(0)
        client.queues[0].kick()
        said = "took it" if control.is_alive() else "ended the session"
    except (PeerError, TimeoutError):
        said = "refused"
    finally:
        client.abandon()
        client.close()
    return said


CHECKS: tuple[Check, ...] = (*_ROWS, *collect(globals()))
