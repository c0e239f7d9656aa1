"""Messages over real sockets: fds arrive once, nothing waits for ever, nothing is left behind."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from tests.unit.vhost.resources import nothing_left
from vhostblk.errors import SessionError
from vhostblk.vhost.connection import BackendChannel, BlockingConnection, Connection
from vhostblk.vhost.message import (
    U64,
    BackendRequest,
    Message,
    Raw,
    Request,
    VringFile,
    VringState,
)

KICK = Message(Request.SET_VRING_KICK, 1, VringFile(0))
DEADLINE = 10.0

Sockets = tuple[socket.socket, socket.socket]


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    with nothing_left():
        ours, theirs = socket.socketpair()
        yield ours, theirs
        ours.close()
        theirs.close()


def talk(sock: socket.socket, scenario: Callable[[Connection], Awaitable[None]]) -> None:
    """Run a scenario with a connection on the socket, which is closed afterwards."""

    async def limited() -> None:
        connection = Connection(sock)
        try:
            async with asyncio.timeout(DEADLINE):
                await scenario(connection)
        finally:
            connection.close()

    asyncio.run(limited())


async def fill(connection: Connection, message: Message) -> tuple[int, asyncio.Task[None]]:
    """Send until the peer would have to read: how many went, and the one that waits."""
    sent = 0
    while True:
        sending = asyncio.create_task(connection.send(message))
        await asyncio.sleep(0)
        if not sending.done():
            return sent, sending
        sent += 1


def send_with_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())
    sock.sendmsg([data], [rights])


def test_messages_arrive_one_by_one_and_then_the_end(sockets: Sockets) -> None:
    ours, theirs = sockets
    messages = [Message(Request.SET_OWNER), Message(Request.SET_VRING_NUM, 9, VringState(0, 8))]
    theirs.sendall(b"".join(m.encode() for m in messages))
    theirs.shutdown(socket.SHUT_WR)

    async def main(connection: Connection) -> None:
        assert [await connection.receive() for _ in range(3)] == [*messages, None]

    talk(ours, main)


def test_peer_that_talks_without_a_pause_holds_nobody_up(sockets: Sockets) -> None:
    ours, theirs = sockets
    count = 100
    theirs.sendall(Message(Request.GET_FEATURES, 1).encode() * count)

    async def main(connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(count):
            others_turn = asyncio.Event()
            loop.call_soon(others_turn.set)
            assert await connection.receive() is not None
            assert others_turn.is_set()

    talk(ours, main)


def test_fds_arrive_close_on_exec_with_their_message_and_no_other(sockets: Sockets) -> None:
    ours, theirs = sockets
    reader, writer = os.pipe()
    theirs.sendall(Message(Request.SET_OWNER).encode())
    send_with_fds(theirs, KICK.encode(), [writer])
    theirs.sendall(Message(Request.SET_OWNER).encode())
    os.close(writer)

    async def main(connection: Connection) -> None:
        first, second, third = [await connection.receive() for _ in range(3)]
        assert first == third == Message(Request.SET_OWNER)
        assert second is not None
        (fd,) = second.fds
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.write(fd, b"x")
        os.close(fd)

    talk(ours, main)
    assert os.read(reader, 2) == b"x"
    os.close(reader)


def test_message_that_comes_a_byte_at_a_time_is_waited_for(sockets: Sockets) -> None:
    ours, theirs = sockets
    data = Message(Request.SET_FEATURES, 1, U64(3)).encode()

    async def main(connection: Connection) -> None:
        receiving = asyncio.create_task(connection.receive())
        for position in range(len(data)):
            assert not receiving.done()
            theirs.sendall(data[position : position + 1])
            await asyncio.sleep(0)
        assert await receiving == Message(Request.SET_FEATURES, 1, U64(3))

    talk(ours, main)


@pytest.mark.parametrize("length", [1, 11, 12, 19])
def test_end_inside_a_message_is_an_error_and_closes_its_fds(sockets: Sockets, length: int) -> None:
    ours, theirs = sockets
    send_with_fds(theirs, KICK.encode()[:length], [0, 1])
    theirs.close()

    async def main(connection: Connection) -> None:
        with pytest.raises(SessionError, match="inside a message"):
            await connection.receive()

    talk(ours, main)


def test_fds_inside_a_message_are_an_error_and_closed(sockets: Sockets) -> None:
    ours, theirs = sockets
    theirs.sendall(KICK.encode()[:12])
    send_with_fds(theirs, KICK.encode()[12:], [0, 1, 2])
    theirs.close()

    async def main(connection: Connection) -> None:
        with pytest.raises(SessionError, match="middle of a message"):
            await connection.receive()

    talk(ours, main)


def test_as_many_fds_as_the_kernel_passes_arrive(sockets: Sockets) -> None:
    ours, theirs = sockets
    send_with_fds(theirs, KICK.encode(), [0] * 253)

    async def main(connection: Connection) -> None:
        message = await connection.receive()
        assert message is not None
        assert len(message.fds) == 253
        for fd in message.fds:
            os.close(fd)

    talk(ours, main)


def test_fds_lost_to_the_limit_end_the_session_and_the_others_are_closed(sockets: Sockets) -> None:
    ours, theirs = sockets
    send_with_fds(theirs, KICK.encode(), [0] * 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main(connection: Connection) -> None:
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 10, hard))
        try:
            with pytest.raises(SessionError, match="lost"):
                await connection.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    talk(ours, main)


def test_close_ends_a_receive_that_waits(sockets: Sockets) -> None:
    async def main(connection: Connection) -> None:
        receiving = asyncio.create_task(connection.receive())
        await asyncio.sleep(0)
        connection.close()
        connection.close()
        assert await receiving is None
        assert await connection.receive() is None

    talk(sockets[0], main)


def test_finish_ends_a_receive_that_waits_and_the_peer_does_not_notice(sockets: Sockets) -> None:
    ours, theirs = sockets

    async def main(connection: Connection) -> None:
        receiving = asyncio.create_task(connection.receive())
        await asyncio.sleep(0)
        connection.finish()
        assert await receiving is None
        theirs.sendall(Message(Request.SET_OWNER).encode())
        assert await connection.receive() is None
        # Replies can still be sent, and there is no end of the stream.
        await connection.send(Message(Request.GET_FEATURES, 5, U64(1)))
        assert theirs.recv(4096) == Message(Request.GET_FEATURES, 5, U64(1)).encode()
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)

    talk(ours, main)


def test_finish_ends_a_send_that_waits(sockets: Sockets) -> None:
    ours, _ = sockets

    async def main(connection: Connection) -> None:
        _, sending = await fill(connection, Message(77, 5, Raw(bytes(4096))))
        connection.finish()
        with pytest.raises(SessionError, match="nobody reads"):
            await sending

    talk(ours, main)


def test_cancelled_receive_can_be_repeated(sockets: Sockets) -> None:
    ours, theirs = sockets

    async def main(connection: Connection) -> None:
        receiving = asyncio.create_task(connection.receive())
        await asyncio.sleep(0)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        theirs.sendall(Message(Request.SET_OWNER).encode())
        assert await connection.receive() == Message(Request.SET_OWNER)

    talk(ours, main)


def test_send_waits_for_a_peer_that_does_not_read_and_loses_nothing(sockets: Sockets) -> None:
    ours, theirs = sockets
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    message = Message(77, 5, Raw(bytes(range(256)) * 16))

    async def main(connection: Connection) -> None:
        sent, sending = await fill(connection, message)
        peer = Connection(theirs)
        for _ in range(sent + 1):
            assert await peer.receive() == message
        await sending
        connection.close()
        assert await peer.receive() is None
        peer.close()

    talk(ours, main)


def test_close_ends_a_send_that_waits(sockets: Sockets) -> None:
    ours, _ = sockets

    async def main(connection: Connection) -> None:
        _, sending = await fill(connection, Message(77, 5, Raw(bytes(4096))))
        connection.close()
        with pytest.raises(SessionError, match="closed"):
            await sending

    talk(ours, main)


def test_send_to_a_peer_that_is_gone_is_an_error(sockets: Sockets) -> None:
    ours, theirs = sockets

    async def main(connection: Connection) -> None:
        assert not connection.has_hung_up()
        theirs.close()
        assert connection.has_hung_up()
        with pytest.raises(SessionError, match="cannot send GET_FEATURES"):
            await connection.send(Message(Request.GET_FEATURES, 5, U64(1)))
        connection.close()
        assert connection.has_hung_up()

    talk(ours, main)


def test_receive_after_a_reset_is_the_end(sockets: Sockets) -> None:
    ours, theirs = sockets
    ours.sendall(b"unread")
    theirs.close()  # with data unread: Linux reports a reset

    async def main(connection: Connection) -> None:
        assert await connection.receive() is None

    talk(ours, main)


def test_blocking_connections_talk_to_each_other_with_fds(sockets: Sockets) -> None:
    left, right = (BlockingConnection(sock, timeout=DEADLINE) for sock in sockets)
    left.send(Message(Request.SET_VRING_CALL, 1, VringFile(3), (0,)))
    message = right.receive()
    assert message is not None
    assert message.payload == VringFile(3)
    for fd in message.fds:
        os.close(fd)
    left.send_bytes(b"")
    left.close()
    assert right.receive() is None
    right.close()


def test_blocking_receive_has_a_deadline_and_keeps_what_came(sockets: Sockets) -> None:
    ours, theirs = sockets
    connection = BlockingConnection(ours, timeout=0.01)
    data = Message(Request.SET_FEATURES, 1, U64(1)).encode()
    theirs.sendall(data[:15])
    with pytest.raises(TimeoutError):
        connection.receive()
    theirs.sendall(data[15:])
    connection.timeout = DEADLINE
    assert connection.receive() == Message(Request.SET_FEATURES, 1, U64(1))


def test_blocking_send_has_a_deadline(sockets: Sockets) -> None:
    connection = BlockingConnection(sockets[0], timeout=0.01)
    with pytest.raises(TimeoutError):
        connection.send_bytes(bytes(1 << 26))


def test_blocking_send_to_a_peer_that_is_gone_is_an_error(sockets: Sockets) -> None:
    connection = BlockingConnection(sockets[0])
    sockets[1].close()
    with pytest.raises(SessionError, match="cannot send"):
        connection.send_bytes(b"x")


def test_back_end_channel_neither_waits_nor_changes_the_front_end_s_flags(
    sockets: Sockets,
) -> None:
    ours, theirs = sockets
    channel = BackendChannel(os.dup(ours.fileno()))
    message = Message(BackendRequest.CONFIG_CHANGE_MSG)
    sent = 0
    while channel.send(message):
        sent += 1
    assert sent > 0
    assert not fcntl.fcntl(ours.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
    data = theirs.recv(12 * sent, socket.MSG_WAITALL)
    assert data == message.encode() * sent
    theirs.close()
    assert not channel.send(message)
    channel.close()
    channel.close()


def test_back_end_channel_must_be_a_unix_stream_socket() -> None:
    with nothing_left():
        reader, writer = os.pipe()
        os.close(writer)
        with pytest.raises(SessionError, match="not a socket"):
            BackendChannel(reader)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
            pytest.raises(SessionError, match="not a Unix stream"),
        ):
            BackendChannel(os.dup(datagram.fileno()))


# ---------------------------------------------------------------- time-outs


def test_silence_between_messages_is_legal_and_half_a_message_is_not(sockets: Sockets) -> None:
    ours, theirs = sockets
    also_ours, also_theirs = socket.socketpair()

    async def main(connection: Connection) -> None:
        connection.message_timeout = 0.01
        receiving = asyncio.create_task(connection.receive())
        await asyncio.sleep(0)
        half = Connection(also_ours)
        half.message_timeout = 0.01
        also_theirs.send(Message(Request.SET_OWNER).encode()[:5])
        with pytest.raises(SessionError, match=r"a message is not whole after 0\.01 s"):
            await half.receive()
        half.close()
        assert not receiving.done(), "it has been silent for longer"
        theirs.send(Message(Request.SET_OWNER).encode())
        assert await receiving == Message(Request.SET_OWNER)

    talk(ours, main)
    also_theirs.close()


def test_message_that_drips_has_no_longer_than_others(sockets: Sockets) -> None:
    ours, theirs = sockets
    data = memoryview(Message(Request.GET_CONFIG, 9, Raw(bytes(4000))).encode())

    async def main(connection: Connection) -> None:
        connection.message_timeout = 0.02
        loop = asyncio.get_running_loop()
        sent = 0
        dripping: asyncio.Handle

        def drip() -> None:
            nonlocal sent, dripping
            theirs.send(data[sent : sent + 1])
            sent += 1
            dripping = loop.call_later(0.001, drip)

        dripping = loop.call_soon(drip)
        with pytest.raises(SessionError, match="not whole"):
            await connection.receive()
        dripping.cancel()
        assert 0 < sent < len(data)

    talk(ours, main)


def test_what_has_come_counts_although_nobody_looked_in_time(sockets: Sockets) -> None:
    """After a stop of this process the time is over, and the rest of the message is there."""
    ours, theirs = sockets
    data = Message(Request.SET_VRING_NUM, 9, VringState(0, 8)).encode()

    async def main(connection: Connection) -> None:
        connection.message_timeout = 0.01
        theirs.send(data[:14])
        receiving = asyncio.create_task(connection.receive())
        await asyncio.sleep(0)
        theirs.send(data[14:])
        until = time.monotonic() + 0.03
        while time.monotonic() < until:
            pass  # the loop does not run
        message = await receiving
        assert message is not None
        assert message.request == Request.SET_VRING_NUM

    talk(ours, main)


def test_answer_that_nobody_reads_ends_the_session_when_its_time_is_over(sockets: Sockets) -> None:
    ours, _theirs = sockets

    async def main(connection: Connection) -> None:
        connection.message_timeout = 0.01
        _, sending = await fill(connection, Message(Request.GET_FEATURES, 5, U64(1)))
        with pytest.raises(SessionError, match=r"GET_FEATURES: nobody has read for 0\.01 s"):
            await sending

    talk(ours, main)


def test_first_message_is_waited_for_and_given_later(sockets: Sockets) -> None:
    ours, theirs = sockets
    message = Message(Request.SET_OWNER)

    async def main(connection: Connection) -> None:
        waiting = asyncio.create_task(connection.first_message(60))
        theirs.send(message.encode() * 2)
        assert await waiting
        assert [await connection.receive() for _ in range(2)] == [message, message]

    talk(ours, main)


@pytest.mark.parametrize("beginning", [0, 5])
def test_first_message_has_a_deadline_and_a_connection_may_end_without_one(
    sockets: Sockets, beginning: int
) -> None:
    ours, theirs = sockets
    theirs.send(Message(Request.SET_OWNER).encode()[:beginning])

    async def main(connection: Connection) -> None:
        with pytest.raises(SessionError, match=r"0\.01 s"):
            await connection.first_message(0.01)
        if not beginning:
            theirs.shutdown(socket.SHUT_WR)
            assert not await connection.first_message(60)

    talk(ours, main)


@pytest.mark.parametrize("end", ["close", "finish"])
def test_first_message_that_nobody_asks_for_is_closed_with_its_fds(
    sockets: Sockets, end: str
) -> None:
    ours, theirs = sockets
    read_end, write_end = os.pipe()
    send_with_fds(theirs, KICK.encode(), [write_end])
    os.close(write_end)

    async def main(connection: Connection) -> None:
        assert await connection.first_message(60)
        if end == "close":
            connection.close()
        else:
            connection.finish()
            assert await connection.receive() is None

    talk(ours, main)
    assert os.read(read_end, 1) == b""  # nobody can write to it any more
    os.close(read_end)
