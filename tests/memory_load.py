"""Loads for guest memory that changes: regions that come and go under requests, and requests whose data is anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vhostblk.client.client import Client
from vhostblk.client.memory_copy import MemoryCopy
from vhostblk.client.shared_memory import SharedRegion
from vhostblk.client.workload import Workload
from vhostblk.virtio.blk import HEADER, RequestType
from vhostblk.virtio.driver import Buffer

__all__ = ["ChangingMemory", "Distant", "DistantLoad"]

_SLOT = 32  # header and status
_UNWRITTEN = 0xFF


class ChangingMemory(Workload):
    """A workload during which regions come and go, as a guest's kernel has them: it empties one before it lets it go.

    Args:
        client: its memory is `spread`; the first region stays.
        most: regions at a time, besides the first.
        every: requests between two changes, on average.
        unit, units: a region has up to so many units of so many bytes.
        copy: goes along, and may come upon what is in flight.
    """

    def __init__(
        self,
        client: Client,
        *,
        most: int = 4,
        every: int = 8,
        unit: int = 4096,
        units: int = 64,
        copy: MemoryCopy | None = None,
        **options: Any,
    ) -> None:
        super().__init__(client, **options)
        self._most = most
        self._every = every
        self._size = unit, units
        self._copy = copy
        self._leaving: list[SharedRegion] = []
        self.changes = 0

    def _start(self) -> None:
        if not self._random.randrange(self._every):
            self._change()
        super()._start()

    def _change(self) -> None:
        client = self.client
        memory = client.memory
        idle = [region for region in self._leaving if memory.is_idle(region)]
        staying = [r for r in memory.regions[1:] if r not in self._leaving]
        if idle:
            self._leaving.remove(idle[0])
            client.remove_memory(idle[0])
            self.changes += 1
        elif len(memory.regions) <= self._most and self._random.random() < 0.6:
            unit, units = self._size
            region = memory.add_region(unit * self._random.randint(1, units))
            if self._copy is not None:
                self._copy.follow()
            client.control.add_region(region)
            self.changes += 1
        elif staying:
            region = self._random.choice(staying)
            memory.retire(region)
            self._leaving.append(region)

    def leave(self) -> None:
        """Remove all regions but the first."""
        for region in self.client.memory.regions[1:]:
            self.client.remove_memory(region)


@dataclass(eq=False)
class Distant:
    """A request on its way, or finished."""

    slot: Buffer
    data: Sequence[Buffer]
    status: int = _UNWRITTEN


class DistantLoad:
    """Requests whose data is anywhere, in memory or not; header and status are where the ring is.

    Args:
        client: connected; whoever uses `submit` does not use its queue 0 otherwise.
        slots: requests in flight.
    """

    def __init__(self, client: Client, slots: int = 16) -> None:
        self._client = client
        self._queue = client.queues[0]
        area = client.memory.allocate(slots * _SLOT, contiguous=True)
        self._slots = [Buffer(area.gpa + i * _SLOT, _SLOT) for i in range(slots)]
        self.flying: list[Distant] = []

    @property
    def has_room(self) -> bool:
        """Whether one more request may be in flight."""
        return bool(self._slots)

    def submit(
        self, kind: int, offset: int, data: Sequence[Buffer], *, notify: bool = True
    ) -> Distant:
        """Start a request that reads into this memory, or writes from it."""
        slot = self._slots.pop()
        status = Buffer(slot.gpa + HEADER.size, 1)
        self._client.memory.write(slot.gpa, HEADER.pack(kind, 0, offset // 512))
        self._client.memory.write(status.gpa, bytes([_UNWRITTEN]))
        request = Distant(slot, data)
        readable, writable = [Buffer(slot.gpa, HEADER.size)], [status]
        if kind == RequestType.OUT:
            readable += data
        else:
            writable = [*data, status]
        self._queue.driver.add(readable, writable, token=request)
        self.flying.append(request)
        if notify:
            self._queue.notify()
        return request

    def poll(self) -> list[Distant]:
        """Take what has finished."""
        self._queue.reap()
        done: list[Distant] = []
        for used in self._queue.foreign:
            request = used.token
            assert isinstance(request, Distant)
            request.status = self._client.memory.read(Buffer(request.slot.gpa + HEADER.size, 1))[0]
            assert request.status != _UNWRITTEN
            self.flying.remove(request)
            self._slots.append(request.slot)
            done.append(request)
        self._queue.foreign.clear()
        return done

    def finish(self, taken: Callable[[Distant], None] = lambda _: None) -> None:
        """Wait for all that is in flight."""
        while self.flying:
            before = len(self.flying)
            self._client.wait_until(lambda: bool(self._queue.foreign))
            for request in self.poll():
                taken(request)
            assert len(self.flying) < before
