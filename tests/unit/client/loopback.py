"""A client whose back-end is a few lines of Python in the same thread: no socket, no process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from vhostblk.client.client import FEATURES, Client
from vhostblk.client.queue import ClientQueue, Pending
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.virtio.blk import BlkConfig, RequestType, Status
from vhostblk.virtio.blk_request import BlkRequest, parse
from vhostblk.virtio.chain import copy_to, total
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature
from vhostblk.virtio.split import SplitVirtqueue

__all__ = ["Loopback"]


class _Memory:
    """Shared memory as a device sees it; rings are at guest physical addresses here."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory

    def view(self, gpa: int, length: int) -> list[memoryview]:
        return self._memory.views(Buffer(gpa, length))

    def ring(self, address: int, length: int) -> memoryview:
        (view,) = self.view(address, length)
        return view


class Loopback:
    """Queues of a client and a device with a RAM disk that serves them when asked.

    Args:
        capacity: bytes of the disk.
        serve: called for each request before it is executed; may change disk and request.
    """

    def __init__(
        self,
        capacity: int = 1 << 20,
        *,
        queues: int = 1,
        queue_size: int = 16,
        memory: SharedMemory | None = None,
        event_idx: bool = True,
        serve: Callable[[Loopback, BlkRequest], None] | None = None,
    ) -> None:
        self.disk = bytearray(capacity)
        self.memory = memory or SharedMemory([4 << 20])
        self._serve = serve
        self.queues = [
            ClientQueue(index, self.memory, queue_size, event_idx=event_idx, indirect_entries=16)
            for index in range(queues)
        ]
        device_memory = _Memory(self.memory)
        self.devices = [
            SplitVirtqueue(
                device_memory,
                queue_size,
                queue.driver.gpa + queue.driver.desc_offset,
                queue.driver.gpa + queue.driver.avail_offset,
                queue.driver.gpa + queue.driver.used_offset,
                event_idx=event_idx,
                indirect=True,
            )
            for queue in self.queues
        ]
        self.config = BlkConfig(capacity=capacity // 512, max_discard_seg=4, max_write_zeroes_seg=4)

    def close(self) -> None:
        # Views of the rings, and those that closures and tracebacks still hold.
        self.devices.clear()
        for queue in self.queues:
            queue.close()
        self.memory.close()

    def as_client(self) -> Client:
        """Give what of a `Client` a workload uses."""
        client = SimpleNamespace(
            queues=self.queues,
            config=self.config,
            capacity=len(self.disk),
            control=SimpleNamespace(features=int(FEATURES & ~Feature.VIRTIO_BLK_F_RO)),
            submit=self.submit,
            wait=self.wait,
            wait_any=lambda: self.wait([]),
        )
        return cast(Client, client)

    def submit(self, kind: int, offset: int, *, queue: int = 0, **kwargs: Any) -> Pending:
        pending = self.queues[queue].submit(kind, offset // 512, **kwargs)
        self.queues[queue].driver.publish()
        return pending

    def wait(self, pending: list[Pending]) -> list[Pending]:
        """Serve everything there is, each batch in reverse order."""
        finished = []
        for device, queue in zip(self.devices, self.queues, strict=True):
            requests = []
            while (chain := device.pop()) is not None:
                requests.append(parse(chain, capacity=len(self.disk), max_segments=4))
            for request in reversed(requests):
                device.push(request.head, self.execute(request))
            finished += queue.reap()
        assert all(p.is_done for p in pending)
        return finished

    def execute(self, request: BlkRequest) -> int:
        """Do what a request asks; gives the used length."""
        if self._serve is not None:
            self._serve(self, request)
        if request.status is not None:
            return request.complete(request.status)
        written = 0
        start, end = request.offset, request.offset + request.length
        if request.type == RequestType.IN:
            written = copy_to(request.data, bytes(self.disk[start:end]))
        elif request.type == RequestType.GET_ID:
            written = copy_to(request.data, b"loopback".ljust(20, b"\0"))
        elif request.type == RequestType.OUT:
            assert total(request.data) == request.length
            self.disk[start:end] = b"".join(request.data)
        for segment in request.segments:
            self.disk[segment.offset : segment.offset + segment.length] = bytes(segment.length)
        return request.complete(Status.OK, written)
