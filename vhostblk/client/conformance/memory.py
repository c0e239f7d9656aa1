"""Checks of guest memory: how it is shared, how it comes and goes, buffers that lie in two regions.

vhost-user, "Memory region description", VHOST_USER_SET_MEM_TABLE, VHOST_USER_ADD_MEM_REG. The
guest's addresses, the front-end's, and offsets in files all differ from each other.
"""

from __future__ import annotations

from collections.abc import Callable

from vhostblk.client.conformance.check import Check, check, collect, expect
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.control import PROTOCOL_FEATURES
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.vhost.message import U64, ProtocolFeature, Request
from vhostblk.virtio.blk import HEADER, RequestType, Status
from vhostblk.virtio.driver import Buffer

__all__ = ["CHECKS"]

_SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS
_REPLY_ACK = ProtocolFeature.REPLY_ACK
_TABLE = "vhost-user, VHOST_USER_SET_MEM_TABLE"
_ADD = "vhost-user, VHOST_USER_ADD_MEM_REG"
_MIB = 1 << 20
_TABLE_REGIONS = 8
_MOST_SLOTS = 64


def _use(rig: Rig, guest: Guest, times: int = 24) -> None:
    """Read, with buffers wherever the memory's allocator puts them; write where that is allowed."""
    expected = guest.read(0, 8 * rig.block)
    for _ in range(times):
        expect(guest.read(0, 8 * rig.block) == expected, "other data was read")
    if rig.destructive and not rig.offer.is_read_only:
        data = rig.pattern(8 * rig.block)
        for i in range(8):
            guest.write(i * rig.block, data[i * rig.block : (i + 1) * rig.block])
        expect(guest.read(0, 8 * rig.block) == data, "other data than was written")


def _check_table(memory: Callable[[], SharedMemory]) -> Callable[[Rig], None]:
    def run(rig: Rig) -> None:
        with rig.guest(memory=memory, protocol_features=PROTOCOL_FEATURES & ~_SLOTS) as guest:
            _use(rig, guest)

    return run


_TABLE_CHECKS = tuple(
    Check(f"memory.{name}", title, _TABLE, _check_table(memory))
    for name, title, memory in (
        ("one-region", "a table of one region", lambda: SharedMemory([8 * _MIB])),
        (
            "eight-regions",
            "a table of eight regions",
            lambda: SharedMemory([2 * _MIB] * _TABLE_REGIONS, spread=True),
        ),
        (
            "regions-of-one-file",
            "regions that are parts of one file",
            lambda: SharedMemory([2 * _MIB] * 4, one_file=True, spread=True),
        ),
        (
            "posix-shared-memory",
            "regions in POSIX shared memory",
            lambda: SharedMemory([2 * _MIB] * 3, kind="posix", spread=True),
        ),
        (
            "small-regions",
            "regions of a few pages beside a large one",
            lambda: SharedMemory([8 * _MIB, 4096, 8192], spread=True),
        ),
    )
)


@check(
    "memory.buffer-in-two-regions",
    "a buffer may begin in one region and end in the next",
    "vhost-user, Memory region description",
)
def buffer_in_two_regions(rig: Rig) -> None:
    # Without a gap the guest's addresses go on where another file begins.
    with rig.guest(memory=lambda: SharedMemory([4 * _MIB] * 2, gap=0)) as guest:
        memory, length = guest.client.memory, 4 * rig.block
        expected = guest.read(0, length)
        border = memory.regions[1].gpa
        header, status = memory.allocate(HEADER.size), memory.allocate(1)
        memory.write(header.gpa, HEADER.pack(RequestType.IN, 0, 0))
        for before in (1, 511, 512, length - 1):
            data = Buffer(border - before, length)
            memory.write(data.gpa, b"\xa5" * length)
            memory.write(status.gpa, b"\xff")
            guest.chain([header], [data, status])
            expect(memory.read(status)[0] == Status.OK, f"status {memory.read(status)[0]}")
            expect(memory.read(data) == expected, f"{before} bytes before the border: other data")


@check(
    "memory.header-in-two-regions",
    "a request's header may lie in two regions",
    "vhost-user, Memory region description; VIRTIO 1.2 §2.7.4.1",
)
def header_in_two_regions(rig: Rig) -> None:
    with rig.guest(memory=lambda: SharedMemory([4 * _MIB] * 2, gap=0)) as guest:
        memory = guest.client.memory
        expected = guest.read(0, rig.block)
        header = Buffer(memory.regions[1].gpa - 9, HEADER.size)
        memory.write(header.gpa, HEADER.pack(RequestType.IN, 0, 0))
        room = memory.allocate(rig.block + 1)
        data, status = Buffer(room.gpa, rig.block), Buffer(room.gpa + rig.block, 1)
        memory.write(room.gpa, b"\xa5" * room.length)
        guest.chain([header], [data, status])
        expect(memory.read(status)[0] == Status.OK, f"status {memory.read(status)[0]}")
        expect(memory.read(data) == expected, "other data was read")


@check(
    "memory.table-replaced",
    "SET_MEM_TABLE may come again while rings run",
    _TABLE,
    protocol=_REPLY_ACK,
)
def table_replaced(rig: Rig) -> None:
    protocol = PROTOCOL_FEATURES & ~_SLOTS
    with rig.guest(memory=lambda: SharedMemory([4 * _MIB]), protocol_features=protocol) as guest:
        memory, client = guest.client.memory, guest.client
        expected = guest.read(0, rig.block)
        for _ in range(3):
            memory.add_region(2 * _MIB)
            client.control.share(memory, one_by_one=False)
            expect(guest.read(0, rig.block) == expected, "other data was read")
        region = memory.regions[-1]
        data, status = Buffer(region.gpa, rig.block), Buffer(region.end - 1, 1)
        header = memory.allocate(HEADER.size)
        memory.write(header.gpa, HEADER.pack(RequestType.IN, 0, 0))
        memory.write(status.gpa, b"\xff")
        guest.chain([header], [data, status])
        expect(memory.read(status)[0] == Status.OK, "a buffer in the new region was not served")
        expect(memory.read(data) == expected, "other data was read into the new region")
        for region in memory.regions[1:]:
            memory.remove_region(region)
        client.control.share(memory, one_by_one=False)
        expect(guest.read(0, rig.block) == expected, "other data was read")


@check(
    "memory.max-slots",
    "GET_MAX_MEM_SLOTS says how many regions there may be",
    "vhost-user, VHOST_USER_GET_MAX_MEM_SLOTS",
    protocol=_SLOTS,
)
def max_slots(rig: Rig) -> str:
    control = rig.control()
    try:
        control.negotiate_protocol()
        answer = control.ask(control.frontend.request(Request.GET_MAX_MEM_SLOTS))
        assert isinstance(answer, U64)
        expect(answer.value == rig.offer.max_mem_slots, f"{answer.value} the second time")
        expect(answer.value > 0, "no slots at all")
    finally:
        control.close()
    return f"{answer.value} slots"


@check(
    "memory.slots-filled",
    "as many regions as there are slots can be added, used, and removed",
    _ADD,
    protocol=_SLOTS | _REPLY_ACK,
)
def slots_filled(rig: Rig) -> str:
    most = min(rig.offer.max_mem_slots or 0, _MOST_SLOTS)
    with rig.guest(memory=lambda: SharedMemory([4 * _MIB], spread=True)) as guest:
        client = guest.client
        regions = [client.add_memory(64 << 10) for _ in range(most - 1)]
        _use(rig, guest, times=2 * most)
        for region in regions:
            client.remove_memory(region)
        guest.read(0, rig.block)
    return f"{most} of {rig.offer.max_mem_slots}"


@check(
    "memory.added-while-running",
    "regions can be added and removed while requests are in flight",
    _ADD,
    protocol=_SLOTS | _REPLY_ACK,
)
def added_while_running(rig: Rig) -> None:
    with rig.guest(memory=lambda: SharedMemory([8 * _MIB])) as guest:
        expected = guest.read(0, rig.block)
        for _ in range(10):
            pending = [guest.submit(RequestType.IN, 0, room=rig.block) for _ in range(24)]
            region = guest.client.add_memory(1 * _MIB)
            guest.client.wait(pending)
            pending = [guest.submit(RequestType.IN, 0, room=rig.block) for _ in range(24)]
            guest.client.remove_memory(region)
            guest.client.wait(pending)
            for one in pending:
                guest.expect_status(one, Status.OK)
                expect(one.content == expected, "other data was read")


@check(
    "memory.slot-added-twice",
    "a region that was removed can be added again",
    "vhost-user, VHOST_USER_REM_MEM_REG",
    protocol=_SLOTS | _REPLY_ACK,
)
def slot_added_twice(rig: Rig) -> None:
    with rig.guest(memory=lambda: SharedMemory([4 * _MIB])) as guest:
        region = guest.client.add_memory(1 * _MIB)
        for _ in range(5):
            guest.control.remove_region(region)
            guest.control.add_region(region)
        memory = guest.client.memory
        data, status = Buffer(region.gpa, rig.block), Buffer(region.gpa + 8192, 1)
        header = memory.allocate(HEADER.size)
        memory.write(header.gpa, HEADER.pack(RequestType.IN, 0, 0))
        memory.write(status.gpa, b"\xff")
        guest.chain([header], [data, status])
        expect(memory.read(status)[0] == Status.OK, "a buffer in the region was not served")


CHECKS: tuple[Check, ...] = (*_TABLE_CHECKS, *collect(globals()))
