"""Invariant: any bytes with any fds lead to messages, PeerError or SessionError; every fd ends once.

"Ends once": it is closed through exactly one CloseFds, given away in one SetBackendChannel, or given
back by the decoder; and it is open whenever an action lends it. Never another exception, never more
than one message buffered, never an action on a vring that is not in the state the action is for.

One input is a byte string of chunks, each of which is one recvmsg::

    byte 0      bits 0-3: how many fds came along; bit 7: the actions that follow from it fail
    bytes 1-2   length, little-endian
    the rest    as many bytes of the stream

`corpus/vhost_message` holds what QEMU sent (see tests/data), a good message of every kind, and one
input per way to be refused; it is written by `python -m tests.fuzz.test_fuzz_vhost`.
VHOSTBLK_FUZZ_SECONDS makes the mutation of the corpus run for that long instead of a few thousand
inputs.
"""

from __future__ import annotations

import array
import asyncio
import ctypes
import json
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.record_vhost_user import FEATURES as RECORDED_FEATURES
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.action import (
    Action,
    AddRegion,
    CheckState,
    CloseFds,
    CreateInflight,
    EnableVring,
    LoadState,
    MapInflight,
    MapMemory,
    ReadConfig,
    RemoveRegion,
    ResetDevice,
    SaveState,
    SetBackendChannel,
    SetLogArea,
    SetLogFd,
    SetVringFd,
    SetVringLog,
    StartVring,
    StopVring,
    WriteConfig,
)
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.message import (
    FRONTEND_TABLE,
    HEADER_SIZE,
    MAX_PAYLOAD,
    U64,
    ConfigSpace,
    Decoder,
    DeviceStateTransfer,
    Empty,
    InflightDescription,
    LogArea,
    MemoryRegion,
    MemoryTable,
    Message,
    Payload,
    Raw,
    Request,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from vhostblk.vhost.session import PROTOCOL_FEATURES, Session
from vhostblk.vhost.transport import BackendChannel, Connection

HERE = Path(__file__).parent
CORPUS = HERE / "corpus" / "vhost_message"
TRANSCRIPTS = HERE.parent / "data"
FEATURES = int(RECORDED_FEATURES)
CONFIG_SIZE = 96
FAIL = 0x80
CAN_FAIL = (
    *(MapMemory, AddRegion, RemoveRegion, SetLogArea),
    *(StartVring, StopVring, ReadConfig, WriteConfig),
)
PAGE = 4096


# ---------------------------------------------------------------------- inputs


def chunk(data: bytes, fds: int = 0, *, fail: bool = False) -> bytes:
    """Encode one recvmsg."""
    return struct.pack("<BH", fds | (FAIL if fail else 0), len(data)) + data


def chunks(data: bytes) -> Iterator[tuple[bytes, int, bool]]:
    """Decode an input, whatever it is: bytes, number of fds, whether actions fail."""
    position = 0
    while position < len(data):
        first, length = struct.unpack("<BH", data[position : position + 3].ljust(3, b"\0"))
        position += 3
        yield data[position : position + length], first & 15, bool(first & FAIL)
        position += length


def new_session() -> Session:
    return Session(
        device_features=FEATURES,
        num_queues=3,
        config_size=CONFIG_SIZE,
        writable_config=range(32, 33),
        max_mem_slots=8,
    )


# ---------------------------------------------------------------------- the invariant, without I/O


class Checker:
    """Performs a session's actions on paper, and knows whose every fd is."""

    def __init__(self) -> None:
        self.session = new_session()
        self.open: set[int] = set()
        self.running: dict[int, bool] = {}
        self._next_fd = 100

    def new_fds(self, count: int) -> list[int]:
        fds = list(range(self._next_fd, self._next_fd + count))
        self._next_fd += count
        self.open.update(fds)
        return fds

    def end(self, fds: tuple[int, ...]) -> None:
        for fd in fds:
            self.open.remove(fd)

    def lent(self, *fds: int | None) -> None:
        for fd in fds:
            assert fd is None or fd in self.open

    def handle(self, message: Message, *, fail: bool) -> None:
        """Raises: SessionError."""
        result: int | bytes | None = None
        error = None
        for action in self.session.receive(message):
            if fail and isinstance(action, CAN_FAIL):
                error = PeerError("failed")
                continue
            answer = self.perform(action)
            result = answer if answer is not None else result
        reply = self.session.complete(result, error=error)
        assert self.running.keys() == {v.index for v in self.session.vrings if v.is_started}
        if reply is not None:
            assert reply.fds in ((), (99,))
            (decoded,) = Decoder().feed(reply.encode())
            assert (decoded.request, decoded.flags) == (message.request, 5)

    def perform(self, action: Action) -> int | bytes | None:
        match action:
            case CloseFds(fds):
                assert fds
                self.end(fds)
            case SetBackendChannel(fd):
                self.end((fd,))
            case MapMemory(regions, fds):
                assert 1 <= len(regions) == len(fds)
                self.lent(*fds)
            case AddRegion(_, fd):
                self.lent(fd)
            case StartVring(index, vring):
                assert index == vring.index
                assert index not in self.running
                assert vring.size & (vring.size - 1) == 0 < vring.size <= 32768
                self.lent(vring.kick_fd, vring.call_fd, vring.err_fd)
                self.running[index] = vring.enabled
            case StopVring(index):
                del self.running[index]
                return 0xFFFF
            case EnableVring(index, enabled):
                assert self.running[index] != enabled
                self.running[index] = enabled
            case SetVringFd(index, _, fd):
                assert index in self.running
                self.lent(fd)
            case SetVringLog(index, _):
                assert index in self.running
            case SetLogArea(_, _, fd) | SetLogFd(fd) | SaveState(fd):
                self.lent(fd)
            case MapInflight():
                self.lent(action.fd)
            case LoadState(fd):
                self.end((fd,))
            case CreateInflight():
                return 99  # not received: a file of ours
            case CheckState():
                return None
            case ResetDevice():
                self.running.clear()
            case ReadConfig(offset, size):
                assert 0 < size <= CONFIG_SIZE - offset
                return bytes(size)
            case WriteConfig(offset, written, migration):
                assert migration or (offset, len(written)) == (32, 1)
        return None


def run(data: bytes) -> str:
    """Serve one input to its end and check the invariant.

    Returns:
        "end", or why the session ended before.
    """
    checker, decoder, outcome = Checker(), Decoder(), "end"
    try:
        for stream, count, fail in chunks(data):
            for message in decoder.feed(stream, checker.new_fds(count)):
                checker.handle(message, fail=fail)
            assert len(decoder._buffer) <= HEADER_SIZE + MAX_PAYLOAD
    except SessionError as error:
        outcome = str(error)
    checker.end(decoder.close())
    for action in checker.session.close():
        checker.perform(action)
    assert not checker.running
    assert not checker.open
    return outcome


# ---------------------------------------------------------------------- the invariant, with sockets


def address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class LiveBackend:
    """Performs actions with real fds and real mappings; there is no data path."""

    def __init__(self) -> None:
        self.session = new_session()
        self.memory = MemTable(address_of, 8)
        self.channel: BackendChannel | None = None

    async def serve(self, sock: socket.socket) -> None:
        connection = Connection(sock)
        try:
            while (message := await connection.receive()) is not None:
                result: int | bytes | None = None
                error = None
                for action in self.session.receive(message):
                    try:
                        answer = self.perform(action)
                    except PeerError as caught:
                        error = error or caught
                    else:
                        result = answer if answer is not None else result
                reply = self.session.complete(result, error=error)
                if reply is not None:
                    await connection.send(reply)
        except SessionError:
            pass
        finally:
            connection.close()
            for action in self.session.close():
                self.perform(action)
            self.memory.close()
            if self.channel is not None:
                self.channel.close()

    def perform(self, action: Action) -> int | bytes | None:
        old = self.memory
        match action:
            case CloseFds(fds):
                for fd in fds:
                    os.close(fd)
            case MapMemory(regions, fds):
                self.memory = old.replaced(regions, fds)
                old.close()
            case AddRegion(region, fd):
                self.memory = old.added(region, fd)
                old.close()
            case RemoveRegion(region):
                self.memory = old.removed(region)
                old.close()
            case StartVring(_, vring):
                for lent in (vring.kick_fd, vring.call_fd, vring.err_fd):
                    if lent is not None:
                        os.fstat(lent)
            case StopVring():
                return 1
            case ReadConfig(_, size):
                return bytes(size)
            case LoadState(fd):
                os.close(fd)
            case SetBackendChannel(fd):
                channel = BackendChannel(fd)
                if self.channel is not None:
                    self.channel.close()
                self.channel = channel
        return None


def held() -> tuple[int, int]:
    """How many fds and how many mappings of the fuzzer's memory this process has."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("fuzz-memory")


def run_live(data: bytes, memory: int) -> None:
    """Serve one input over a socket, as fast as it goes, and check that nothing is left."""
    before = held()

    async def main() -> None:
        ours, theirs = socket.socketpair()
        serving = asyncio.create_task(LiveBackend().serve(ours))
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        drain = asyncio.create_task(_drain(theirs, loop))
        for stream, count, _ in chunks(data):
            fds = array.array("i", [memory] * count).tobytes()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if count else []
            try:
                theirs.sendmsg([stream], rights)
            except OSError:
                break  # the session is over, or the buffer full: the rest does not matter
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(10):
            await serving
            await drain
        theirs.close()

    asyncio.run(main())
    assert held() == before


async def _drain(sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
    try:
        while await loop.sock_recv(sock, 65536):
            pass
    except ConnectionResetError:
        pass


@pytest.fixture(scope="module")
def memory() -> Iterator[int]:
    fd = os.memfd_create("fuzz-memory")
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


# ---------------------------------------------------------------------- corpus

REGION = MemoryRegion(gpa=0, size=PAGE, uva=0x10000, mmap_offset=0)
GOOD: dict[type[Payload], Payload] = {
    Empty: Empty(),
    U64: U64(1 << 32),
    VringState: VringState(1, 1),
    VringAddress: VringAddress(1, 0, 0x10000, 0x10800, 0x10400, 0),
    VringFile: VringFile(1),
    MemoryTable: MemoryTable((REGION,)),
    SingleRegion: SingleRegion(REGION),
    LogArea: LogArea(PAGE, 0),
    InflightDescription: InflightDescription(PAGE, 0, 1, 8),
    DeviceStateTransfer: DeviceStateTransfer(1, 0),
    ConfigSpace: ConfigSpace(32, 1, 0, b"\1"),
}


def say(request: int, payload: Payload | None = None, fds: int = 0, flags: int = 9) -> bytes:
    return chunk(Message(request, flags, payload or Empty()).encode(), fds)


def start(index: int = 1) -> bytes:
    return (
        say(Request.SET_VRING_NUM, VringState(index, 8))
        + say(Request.SET_VRING_ADDR, VringAddress(index, 0, 0x10000, 0x10800, 0x10400, 0))
        + say(Request.SET_VRING_CALL, VringFile(index), 1)
        + say(Request.SET_VRING_KICK, VringFile(index), 1)
    )


HELLO = say(Request.SET_PROTOCOL_FEATURES, U64(int(PROTOCOL_FEATURES)))
STOP = say(Request.GET_VRING_BASE, VringState(1, 0))


def transcript(path: Path) -> bytes:
    """The front-end's half of a recorded conversation, one chunk per message."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return b"".join(
        chunk(bytes.fromhex(line["bytes"]), line["fds"])
        for line in lines
        if line["from"] == "front-end"
    )


def corpus() -> dict[str, bytes]:
    """Every input by name."""
    inputs = {
        path.stem: transcript(path) for path in sorted(TRANSCRIPTS.glob("vhost_user_*.jsonl"))
    }
    inputs["every_request"] = HELLO + b"".join(
        say(row.request, GOOD[row.payload], row.fds[1])
        for row in FRONTEND_TABLE.values()
        if row.request not in (Request.SET_FEATURES, Request.SET_PROTOCOL_FEATURES)
    )
    header = struct.Struct("=III")
    inputs |= {
        "start_stop_start": HELLO + start() + STOP + start() + STOP,
        "exchange_fds": HELLO + start() + say(13, VringFile(1), 1) + say(12, VringFile(1), 1),
        "poll": HELLO + start() + say(12, VringFile(1, has_fd=False)),
        "enable": HELLO + start() + say(18, VringState(1, 1)) + say(18, VringState(1, 0)),
        "enabled_by_features": start() + say(2, U64(0), flags=1),
        "reset_owner": HELLO + say(18, VringState(1, 1)) + start() + say(4),
        "reset_device": HELLO + start() + say(34) + start(),
        "change_started": HELLO + start() + say(8, VringState(1, 4)),
        "start_fails": HELLO + start()[:-23] + chunk(start()[-20:], 1, fail=True) + start(),
        "unknown": HELLO + say(4711, Raw(b"?" * 100), 15),
        "unknown_unasked": HELLO + say(4711, Raw(b"?" * 100), 15, flags=1),
        "reply": say(1, U64(0), 1, flags=5),
        "version": chunk(header.pack(1, 2, 0), 1),
        "too_long": chunk(header.pack(5, 1, 8 * MAX_PAYLOAD) + bytes(MAX_PAYLOAD + 9), 8),
        "longest": HELLO + say(999, Raw(bytes(MAX_PAYLOAD)), 1),
        "cut_short": HELLO + chunk(header.pack(5, 9, 264) + bytes(100), 8),
        "fds_inside": HELLO + chunk(header.pack(5, 9, 264), 1) + chunk(bytes(264), 1),
        "bytewise": b"".join(chunk(bytes([b])) for b in HELLO[3:] + start()[3:23]),
        "several_at_once": chunk(HELLO[3:] + say(3)[3:] + say(17)[3:], 1),
        "mem_table_four_billion": HELLO + say(5, Raw(b"\xff\xff\xff\xff" + bytes(36)), 1),
        "mem_table_fds": HELLO + say(5, MemoryTable((REGION,) * 3), 2),
        "mem_slots": HELLO
        + say(37, SingleRegion(REGION), 1) * 2
        + say(38, SingleRegion(REGION), 1),
        "log": HELLO
        + say(6, LogArea(PAGE, PAGE), 1)
        + say(7, fds=1) * 2
        + start()
        + say(2, U64(FEATURES | 1 << 26 | 1 << 30)) * 2
        + say(9, VringAddress(1, 1, 0x10000, 0x10800, 0x10400, 0x800))
        + say(6, LogArea(1, 0), 1)
        + say(6, LogArea(1 << 63, 1 << 63), 1),
        "config": HELLO
        + say(24, ConfigSpace(90, 60, 0, bytes(60)))
        + say(25, ConfigSpace(0, 9, 1, bytes(9))),
        "channel_twice": HELLO + say(21, fds=1) * 2,
    }
    return inputs


def seeds() -> list[Path]:
    return sorted(CORPUS.iterdir())


@pytest.mark.parametrize("path", seeds(), ids=lambda path: path.name)
def test_corpus_keeps_the_invariant(path: Path, memory: int) -> None:
    data = path.read_bytes()
    run(data)
    run_live(data, memory)


def test_corpus_is_what_this_module_writes() -> None:
    assert {path.name: path.read_bytes() for path in seeds()} == corpus()


@pytest.mark.parametrize(
    "path", sorted(TRANSCRIPTS.glob("vhost_user_*.jsonl")), ids=lambda path: path.stem
)
def test_what_qemu_said_is_served_to_the_end(path: Path) -> None:
    assert run(transcript(path)) == "end"


# ---------------------------------------------------------------------- random inputs

payloads = st.one_of(
    st.builds(
        U64, st.integers(0, 2**64 - 1) | st.sampled_from([0, FEATURES, int(PROTOCOL_FEATURES)])
    ),
    st.builds(
        VringState, st.integers(0, 3), st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 8])
    ),
    st.builds(
        VringAddress,
        st.integers(0, 3),
        st.integers(0, 1),
        *[st.integers(0, 2**60 - 1).map(lambda n: n * 16)] * 3,
        st.just(0),
    ),
    st.builds(VringFile, st.integers(0, 3), st.booleans()),
    st.builds(
        MemoryTable,
        st.lists(st.builds(MemoryRegion, *[st.integers(0, 2**64 - 1)] * 4), max_size=8).map(tuple),
    ),
    st.builds(SingleRegion, st.builds(MemoryRegion, *[st.integers(0, 2**64 - 1)] * 4)),
    st.builds(
        lambda offset, flags, data: ConfigSpace(offset, len(data), flags, data),
        st.integers(0, 100),
        st.integers(0, 2),
        st.binary(max_size=70),
    ),
    st.builds(Raw, st.binary(max_size=50)),
    st.just(Empty()),
)
requests = st.sampled_from(sorted(FRONTEND_TABLE)) | st.integers(0, 50)
encoded = st.builds(
    lambda request, payload, flags, fds, fail: chunk(
        Message(request, flags, payload).encode(), fds, fail=fail
    ),
    requests,
    payloads,
    st.sampled_from([9, 9, 9, 1, 5]),
    st.sampled_from([0, 0, 1, 1, 2, 8]),
    st.sampled_from([False] * 7 + [True]),
)


@settings(max_examples=200)
@given(st.lists(encoded | st.just(start()) | st.just(STOP), max_size=30).map(b"".join))
def test_messages_in_any_order_keep_the_invariant(data: bytes) -> None:
    run(data)
    run(HELLO + data)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_keep_the_invariant(data: bytes) -> None:
    run(data)
    run(HELLO + data)


def mutate(rng: random.Random, inputs: list[bytes]) -> bytes:
    """Splice two inputs, then damage a few bytes, mostly by small numbers and edges."""
    left, right = rng.choice(inputs), rng.choice(inputs)
    data = bytearray(left[: rng.randrange(len(left) + 1)] + right[rng.randrange(len(right)) :])
    for _ in range(rng.choice([0, 1, 1, 2, 4, 8])):
        if data:
            value = rng.choice([rng.randrange(256), 0, 1, 0x7F, 0x80, 0xFF])
            data[rng.randrange(len(data))] = value
    return bytes(data)


def test_mutated_corpus_keeps_the_invariant() -> None:
    inputs = [path.read_bytes() for path in seeds()]
    seconds = float(os.environ.get("VHOSTBLK_FUZZ_SECONDS", "0"))
    end = time.monotonic() + seconds
    seed = random.randrange(2**32) if seconds else 2
    rng = random.Random(seed)
    rounds = 0
    while rounds < 2000 or time.monotonic() < end:
        rounds += 1
        data = mutate(rng, inputs)
        try:
            run(data)
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {data.hex()}") from error


def test_mutated_corpus_over_sockets_leaves_nothing_behind(memory: int) -> None:
    inputs = [path.read_bytes() for path in seeds()]
    rng = random.Random(3)
    for _ in range(200):
        data = mutate(rng, inputs)
        try:
            run_live(data, memory)
        except Exception as error:
            raise AssertionError(f"input {data.hex()}") from error


if __name__ == "__main__":
    CORPUS.mkdir(parents=True, exist_ok=True)
    for stale in seeds():
        stale.unlink()
    for name, content in corpus().items():
        (CORPUS / name).write_bytes(content)
