"""Whatever instruction a device is killed at, whoever serves its ring next completes each chain once, and in order.

vhost-user, "Inflight I/O tracking". A script of what driver and device do is run once to the end, and then again for
each of the device's stores, up to that one: see tests.inflight. The memory is given to another device, which may be
killed, too, and a last one. The oracle needs nothing of the region: a chain that was made available and is not in the
used ring is in flight, or waits; so the next device has to pop just these, in the order in which they were made
available. The driver notices a chain that comes back twice, or that it never gave.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.inflight import (
    Device,
    Ended,
    EngineDevice,
    EngineLibrary,
    PythonDevice,
    RefusedError,
    Rings,
)
from tests.schedule import HUNT
from vhostblk.errors import GuestError
from vhostblk.vhost.inflight import VERSION_OFFSET, part_size
from vhostblk.virtio.driver import Buffer, DriverQueue, Used
from vhostblk.virtio.split import IDX

Start = Callable[[Rings, int], Device]
EndsBefore = Callable[[int], AbstractContextManager[Callable[[], int]]]
Step = tuple[str, int]

SIZE = 8
FOREVER = 1 << 30


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> EngineLibrary:
    return EngineLibrary(tmp_path_factory.mktemp("inflight"))


class Kind:
    """One implementation of a device."""

    def __init__(self, start: Start, ends_before: EndsBefore, *, packed: bool = False) -> None:
        self.start = start
        self.ends_before = ends_before
        self.packed = packed

    def rings(self, *, start: int = 0) -> Rings:
        """New ones."""
        part = part_size(SIZE, packed=self.packed)
        return Rings(SIZE, part, start=start, packed=self.packed)


@pytest.fixture(params=["python", "python, packed", "engine", "engine, packed"])
def any_kind(request: pytest.FixtureRequest) -> Kind:
    packed = request.param.endswith("packed")
    if request.param.startswith("python"):
        return Kind(PythonDevice, PythonDevice.ends_before, packed=packed)
    library: EngineLibrary = request.getfixturevalue("library")
    return Kind(lambda r, base: EngineDevice(library, r, base), library.ends_before, packed=packed)


@pytest.fixture(params=["python", "engine"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "python":
        return Kind(PythonDevice, PythonDevice.ends_before)
    library: EngineLibrary = request.getfixturevalue("library")
    return Kind(lambda rings, base: EngineDevice(library, rings, base), library.ends_before)


class Guest:
    """A driver that makes chains available, and remembers in which order."""

    def __init__(self, rings: Rings) -> None:
        self.rings = rings
        self.waiting: list[int] = []
        """Heads available and not yet seen used, oldest first."""
        self._added = 0

    def add(self, count: int) -> None:
        """Make so many chains of two descriptors available, as far as there is room."""
        driver = self.rings.driver
        gpa = 0x4000_0000
        for _ in range(min(count, driver.free_descriptors // 3)):
            readable = [Buffer(gpa, 16)] * (1 + self._added % 2)
            self._added += 1
            self.waiting.append(driver.add(readable, [Buffer(gpa, 1)]))
        driver.publish()

    def reap(self) -> list[Used]:
        """Take back what was used; `DriverQueue` refuses what it does not know."""
        used = self.rings.driver.reap()
        for chain in used:
            self.waiting.remove(chain.head)
        return used


def script(seed: int) -> list[Step]:
    """What happens, with more popped than used, and batches of all lengths."""
    rnd = random.Random(seed)
    steps: list[Step] = []
    for _ in range(rnd.randrange(3, 12)):
        steps.append(("add", rnd.randrange(1, 4)))
        steps.append(("pop", rnd.randrange(0, 5)))
        steps += [("push", rnd.randrange(8)) for _ in range(rnd.randrange(0, 4))]
        if rnd.random() < 0.7:
            steps.append(("publish", 0))
        if rnd.random() < 0.5:
            steps.append(("reap", 0))
    return steps


def perform(steps: Iterator[Step], device: Device, guest: Guest, popped: list[int]) -> None:
    """Go on with a script, on this device, until the script or the device ends."""
    for action, argument in steps:
        if action == "add":
            guest.add(argument)
        elif action == "reap":
            guest.reap()
        elif action == "publish":
            device.publish()
        elif action == "push" and popped:
            device.push(popped.pop(argument % len(popped)))
        elif action == "pop":
            for _ in range(argument):
                head = device.pop()
                if head is None:
                    break
                popped.append(head)


def used_idx(rings: Rings) -> int:
    """What a front-end can say of where a dead device was."""
    return rings.driver.visible_base


def finish(kind: Kind, rings: Rings, guest: Guest) -> None:
    """A device that is not killed serves the rest, and ends orderly; the next one finds nothing."""
    guest.reap()
    expected = list(guest.waiting)
    device = kind.start(rings, used_idx(rings))
    popped = []
    while (head := device.pop()) is not None:
        popped.append(head)
    assert popped == expected
    for head in reversed(popped):
        device.push(head)
    device.publish()
    guest.reap()
    assert guest.waiting == []
    del device
    following = kind.start(rings, used_idx(rings))
    assert following.replays == 0
    assert following.pop() is None


def live(kind: Kind, rings: Rings, guest: Guest, steps: list[Step], ends: list[int]) -> int:
    """Devices serve the script, each up to a store of its own; gives what was left to the last."""
    rest = iter(steps)
    left = 0
    for end in ends:
        with kind.ends_before(end) as stores_left:
            try:
                guest.reap()
                waiting = list(guest.waiting)
                device = kind.start(rings, used_idx(rings))
                popped: list[int] = []
                for _ in range(device.replays):
                    head = device.pop()
                    assert head is not None
                    popped.append(head)
                assert popped == waiting[: len(popped)]
                perform(rest, device, guest, popped)
            except Ended:
                pass
            left = stores_left()
    finish(kind, rings, guest)
    return left


@pytest.mark.parametrize("seed", range(5 * HUNT))
def test_device_killed_before_any_of_its_stores_loses_nothing(any_kind: Kind, seed: int) -> None:
    rnd = random.Random(seed)
    steps = script(seed)
    start = rnd.choice([0, 1, 65533, 40000])

    def life(ends: list[int]) -> int:
        rings = any_kind.rings(start=start)
        return live(any_kind, rings, Guest(rings), steps, ends)

    stores = FOREVER - life([FOREVER])
    assert stores > 10
    for store in range(1, stores + 2):
        life([store])
        life([store, rnd.randrange(1, stores)])
        life([store, rnd.randrange(1, 30), rnd.randrange(1, 30), rnd.randrange(1, stores)])


def test_device_killed_before_the_first_chain_was_done_serves_it_again(any_kind: Kind) -> None:
    # SPDK takes a region in which nothing was completed yet for one that was never used.
    rings = any_kind.rings()
    guest = Guest(rings)
    guest.add(2)
    device = any_kind.start(rings, used_idx(rings))
    assert [device.pop(), device.pop()] == guest.waiting
    del device
    device = any_kind.start(rings, used_idx(rings))
    assert device.replays == 2
    assert [device.pop(), device.pop(), device.pop()] == [*guest.waiting, None]


def test_what_a_front_end_believes_of_the_base_does_not_matter(kind: Kind) -> None:
    # QEMU says the used index, others what the driver has made available.
    for base in (0, 2, 3, 999):
        rings = Rings(SIZE, part_size(SIZE, packed=False))
        guest = Guest(rings)
        guest.add(2)
        device = kind.start(rings, 0)
        device.push(device.pop() or 0)
        device.publish()
        assert device.pop() is not None
        guest.add(1)
        device = kind.start(rings, base)
        guest.reap()
        assert device.replays == 1
        assert [device.pop(), device.pop()] == guest.waiting


def test_region_of_a_ring_that_began_anew_is_taken_if_nothing_is_in_flight(kind: Kind) -> None:
    # A driver resets its device, and the front-end says nothing of it.
    rings = Rings(SIZE, part_size(SIZE, packed=False), start=100)
    guest = Guest(rings)
    guest.add(1)
    finish(kind, rings, guest)
    fresh = Rings(SIZE, part_size(SIZE, packed=False))
    fresh.part[:] = rings.part
    guest = Guest(fresh)
    guest.add(2)
    finish(kind, fresh, guest)


def test_region_of_a_device_that_was_reset_is_not_believed(kind: Kind) -> None:
    rings = Rings(SIZE, part_size(SIZE, packed=False))
    guest = Guest(rings)
    guest.add(2)
    device = kind.start(rings, 0)
    assert device.pop() is not None
    rings.part[VERSION_OFFSET : VERSION_OFFSET + 2] = bytes(2)
    assert kind.start(rings, 0).replays == 0


def test_region_for_longer_rings_than_this_one_is_taken(kind: Kind) -> None:
    rings = Rings(SIZE, part_size(256, packed=False))
    guest = Guest(rings)
    guest.add(2)
    device = kind.start(rings, 0)
    assert device.pop() is not None
    rings.part[10:12] = (256).to_bytes(
        2, "little"
    )  # as libvhost-user does it: for all of the region
    finish(kind, rings, guest)


def entry(head: int) -> int:
    """Where an entry is."""
    return 16 + 16 * head


HOSTILE: dict[str, tuple[int, bytes]] = {
    "another version": (8, b"\2\0"),
    "features that nobody knows": (0, b"\1"),
    "fewer descriptors than the ring": (10, b"\4\0"),
    "more descriptors than there is room for": (10, b"\xff\xff"),
    "a flag that is neither 0 nor 1": (entry(3), b"\2"),
    "more in flight than the driver has made available": (entry(5), b"\1"),
    "a used index far away": (14, b"\0\x40"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_region_that_makes_no_sense_is_refused_and_left_alone(kind: Kind, name: str) -> None:
    rings = Rings(SIZE, part_size(SIZE, packed=False))
    guest = Guest(rings)
    guest.add(1)
    device = kind.start(rings, 0)
    assert device.pop() is not None
    offset, data = HOSTILE[name]
    rings.part[offset : offset + len(data)] = data
    before = bytes(rings.part)
    with pytest.raises(RefusedError):
        kind.start(rings, 0)
    assert bytes(rings.part) == before


@pytest.mark.parametrize("kinds", [("python", "engine")])
def test_both_implementations_make_the_same_of_any_region(
    library: EngineLibrary, kinds: tuple[str, str]
) -> None:
    for seed in range(300 * HUNT):
        rnd = random.Random(seed)
        image = bytearray(part_size(SIZE, packed=False))
        for head in range(SIZE):
            image[entry(head)] = rnd.choice([0, 0, 1, 1, 1, rnd.randrange(256)])
            image[entry(head) + 6] = rnd.choice([rnd.randrange(SIZE), rnd.randrange(256)])
            image[entry(head) + 8 : entry(head) + 16] = rnd.randbytes(rnd.choice([1, 8])).ljust(8)
        image[8:16] = bytes([1, 0, SIZE, 0, rnd.randrange(SIZE + 1), 0, rnd.randrange(12), 0])
        used, available = rnd.randrange(12), rnd.randrange(24)
        outcomes = [
            outcome(start, bytes(image), used, available)
            for start in (PythonDevice, lambda r, b: EngineDevice(library, r, b))
        ]
        assert outcomes[0] == outcomes[1], seed


def outcome(start: Start, image: bytes, used: int, available: int) -> object:
    """What a device makes of a region, and leaves of it."""
    rings = Rings(SIZE, len(image))
    rings.part[:] = image
    guest = Guest(rings)
    guest.add(SIZE)
    assert isinstance(rings.driver, DriverQueue)
    rings.driver.write_avail_idx(available)
    rings.memory[rings.driver.used_offset : rings.driver.used_offset + 4].cast("H")[IDX] = used
    try:
        device = start(rings, 0)
    except RefusedError:
        assert bytes(rings.part) == image
        return None
    popped: list[int] = []
    try:
        while len(popped) <= SIZE and (head := device.pop()) is not None:
            popped.append(head)
    except GuestError as error:
        return device.replays, popped, error.reason
    assert len(popped) <= SIZE
    for head in popped[:2]:
        device.push(head)
        device.publish()
    return device.replays, popped, bytes(rings.part)


def test_any_region_of_a_packed_ring_is_refused_or_bounded_work(library: EngineLibrary) -> None:
    """Where it is taken, no more is in flight than the ring has slots, and all of it can be given back."""
    taken = 0
    for seed in range(400 * HUNT):
        rnd = random.Random(seed)
        rings = Rings(SIZE, part_size(SIZE, packed=True), packed=True)
        guest = Guest(rings)
        guest.add(3)
        device = EngineDevice(library, rings, used_idx(rings))
        popped = [device.pop() for _ in range(rnd.randrange(4))]
        if popped and popped[0] is not None:
            device.push(popped[0])
            device.publish()
        for _ in range(rnd.randrange(4)):
            place = rnd.choice([rnd.randrange(len(rings.part)), *range(10, 22), 34, 36, 38])
            rings.part[place] = rnd.choice([0, 1, 2, 7, 8, rnd.randrange(256)])
        before = bytes(rings.part)
        try:
            device = EngineDevice(library, rings, used_idx(rings))
        except RefusedError:
            assert bytes(rings.part) == before
            continue
        taken += 1
        heads: list[int] = []
        try:
            while len(heads) <= SIZE and (head := device.pop()) is not None:
                heads.append(head)
        except GuestError:
            pass
        assert len(heads) <= SIZE
        for head in set(heads):
            device.push(head)
        device.publish()
    assert taken > 40
