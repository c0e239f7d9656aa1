"""The readable rings and the engine's come to the same end with the same memory.

Inputs are the fuzzer's, hostile ones for the most part. What a broken ring has done before it broke,
and why it broke, must be equal: used elements, status bytes, reason. Where writing a status changes
the rings themselves the outcome depends on how far the device has read ahead, and only has to be one.
"""

from __future__ import annotations

import random
import select
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest

from tests.fuzz import test_fuzz_packed_ring, test_fuzz_split_ring
from tests.fuzz.test_fuzz_packed_ring import PACKED, parameters
from tests.fuzz.test_fuzz_split_ring import AVAIL, BASE, DATA, MEMORY, USED
from vhostblk import native
from vhostblk.errors import GuestError
from vhostblk.native import Message, MessageType
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.blk_request import BlkRequest, parse
from vhostblk.virtio.chain import Broken
from vhostblk.virtio.memory import FlatMemory
from vhostblk.virtio.packed import PackedVirtqueue
from vhostblk.virtio.split import SplitVirtqueue
from vhostblk.virtio.virtqueue import Virtqueue

CAPACITY = 1 << 20
SEGMENTS = 4
SERIAL = b"twenty bytes or less"


@dataclass(frozen=True)
class Setup:
    """How an input wants its queue."""

    size: int
    event_idx: bool
    indirect: bool
    packed: bool
    base: int
    image: bytes

    @classmethod
    def of(cls, data: bytes) -> Setup:
        exponent, flags, base = struct.unpack("<BBH", data[:4].ljust(4, b"\0"))
        image = data[4 : 4 + MEMORY].ljust(MEMORY, b"\0")
        size, packed = 1 << exponent % 8, bool(flags & PACKED)
        if packed:
            size, flags, base = parameters(data)
        return cls(size, bool(flags & 1), bool(flags & 2), packed, base, image)


@dataclass(frozen=True)
class Outcome:
    """What is left when a device is done with the memory."""

    broken: Broken | None
    base: int
    used: tuple[tuple[int, int], ...] | bytes
    data: bytes

    @classmethod
    def of(cls, setup: Setup, memory: bytearray, broken: int | None, base: int) -> Outcome:
        reason = None if broken is None else Broken(broken)
        data = bytes(memory[DATA:])
        if setup.packed:
            return cls(reason, base, bytes(memory[: 16 * setup.size]), data)
        (before,) = struct.unpack_from("<H", setup.image, USED + 2)
        (after,) = struct.unpack_from("<H", memory, USED + 2)
        used = [
            struct.unpack_from("<II", memory, USED + 4 + 8 * (i % setup.size))
            for i in range(before, before + (after - before & 0xFFFF))
        ]
        return cls(reason, base, tuple(sorted(used)), data)


# ---------------------------------------------------------------- in Python


def in_python(setup: Setup, *, ahead: bool) -> Outcome:
    """Serve a disk that takes and gives nothing, one chain after the other or all at once."""
    memory = bytearray(setup.image)
    make: Callable[..., Virtqueue] = PackedVirtqueue if setup.packed else SplitVirtqueue
    queue = make(
        FlatMemory(BASE, memory),
        setup.size,
        BASE,
        BASE + AVAIL,
        BASE + USED,
        base=setup.base,
        event_idx=setup.event_idx,
        indirect=setup.indirect,
    )
    waiting: list[BlkRequest] = []
    while True:
        try:
            chain = queue.pop()
            if chain is None:
                break
            waiting.append(parse(chain, capacity=CAPACITY, max_segments=SEGMENTS))
        except GuestError as error:
            queue.break_queue(error)
            break
        if not ahead:
            complete(queue, waiting)
    complete(queue, waiting)
    return Outcome.of(setup, memory, queue.broken, queue.base)


def complete(queue: Virtqueue, requests: list[BlkRequest]) -> None:
    for request in requests:
        written = request.length if request.type == RequestType.IN else 0
        if request.type == RequestType.GET_ID:
            written = min(request.length, len(SERIAL))
            done = 0
            for view in request.data:
                part = SERIAL[done : min(done + len(view), written)]
                view[: len(part)] = part
                done += len(part)
        status = Status.OK if request.status is None else request.status
        queue.push(request.head, request.complete(status, written))
    requests.clear()


# ---------------------------------------------------------------- in C


@dataclass(frozen=True)
class Region:
    gpa: int
    uva: int
    size: int
    hva: int


class Engine:
    """One engine thread with one disk, for one queue after the other."""

    def __init__(self) -> None:
        self.thread = native.EngineThread("contract")
        self.disk = native.Disk(disk_id=1, capacity=CAPACITY, max_segments=SEGMENTS, serial=SERIAL)
        self.stats = native.QueueStats()
        self.broken: int | None = None
        self.asked = 0
        """Requests of this run that the engine did not serve by itself, so they may end later."""
        flags = native.ExtentFlag.NULL | native.ExtentFlag.READ | native.ExtentFlag.WRITE
        extents = native.extents([(0, CAPACITY, 0, -1, flags, 1, 1)])
        self.ask(MessageType.DISK_ATTACH)
        self.ask(MessageType.FLUSH_SET, result=native.FLUSH_NOTHING)
        self.ask(MessageType.MAP, pointer=extents.pointer, count=extents.count)

    def close(self) -> None:
        self.ask(MessageType.DISK_DETACH)
        self.thread.close()
        self.disk.close()

    def ask(
        self, kind: MessageType, *, pointer: int = 0, count: int = 0, result: int = 0
    ) -> Message:
        """Send a command; serve what comes until it is acknowledged."""
        disk = self.disk.pointer
        command = native.packed((kind, 0, 1, 77, disk, 0, 0, pointer, count, result, 0))
        assert self.thread.send([command]) == 1
        poller = select.poll()
        poller.register(self.thread.fd, select.POLLIN)
        answer = None
        while True:
            for message in self.thread.receive():
                if message[0] == MessageType.ACK:
                    answer = message
                else:
                    self.take(message)
            if answer is not None:
                assert answer[9] == 0, f"{kind.name}: {answer[9]}"
                return answer
            assert poller.poll(10_000), f"{kind.name} is not acknowledged"

    def take(self, message: Message) -> None:
        if message[0] == MessageType.QUEUE_BROKEN:
            self.broken = message[9]
        elif message[0] == MessageType.REQUEST:
            self.asked += 1
            self.thread.send([native.packed_completion(message[3], 0, 0)])

    def run(self, setup: Setup) -> Outcome:
        memory = bytearray(setup.image)
        snapshot = native.Memory([Region(BASE, BASE, MEMORY, native.address_of(memory))])
        self.broken = None
        self.asked = 0
        self.ask(MessageType.MEMORY_SET, pointer=snapshot.pointer)
        config = native.queue_config(
            disk=self.disk,
            stats=self.stats,
            desc_uva=BASE,
            avail_uva=BASE + AVAIL,
            used_uva=BASE + USED,
            size=setup.size,
            index=0,
            base=setup.base,
            event_idx=setup.event_idx,
            indirect=setup.indirect,
            packed=setup.packed,
        )
        self.ask(MessageType.QUEUE_START, pointer=config.pointer)
        # A ring is looked at when it starts; the stop drains what was found.
        stopped = self.ask(MessageType.QUEUE_STOP)
        self.ask(MessageType.MEMORY_SET)
        snapshot.close()
        return Outcome.of(setup, memory, self.broken, stopped[10])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    if not native.available:
        pytest.skip("the C engine is not built")
    running = Engine()
    yield running
    running.close()


def test_both_have_the_same_names_for_the_reasons() -> None:
    assert {b.name: b.value for b in native.Broken} == {b.name: b.value for b in Broken}


def compare(engine: Engine, data: bytes) -> Outcome | None:
    """Serve an input twice; None: it has more than one right outcome."""
    setup = Setup.of(data)
    expected = in_python(setup, ahead=True)
    outcome = engine.run(setup)
    if in_python(setup, ahead=False) != expected:
        return None
    if setup.packed and engine.asked:
        return None  # where in the ring a used descriptor goes depends on which request ends first
    assert outcome == expected, f"input: {data.rstrip(bytes(1)).hex()}"
    return outcome


FORMATS = {"split": test_fuzz_split_ring, "packed": test_fuzz_packed_ring}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(data, id=f"{kind}-{name}")
        for kind, module in FORMATS.items()
        for name, data, _ in module.seeds()
    ],
)
def test_corpus_ends_alike(engine: Engine, data: bytes) -> None:
    compare(engine, data)


@pytest.mark.parametrize("module", FORMATS.values(), ids=FORMATS)
def test_mutations_end_alike(engine: Engine, module: ModuleType) -> None:
    chance = random.Random(21)
    inputs = [data for _, data, _ in module.seeds()]
    compared = set()
    for _ in range(1000):
        outcome = compare(engine, module.mutated(chance, chance.choice(inputs)))
        if outcome is not None:
            compared.add(outcome.broken)
    assert len(compared) >= (8 if module is test_fuzz_split_ring else 6)
