"""A guest without a VM: connect, negotiate, share memory, set up queues, read and write.

vhost-user and VIRTIO 1.2 §5.2, as the front-end and the driver. Everything blocks, and every wait
has a deadline. The order of the messages is QEMU's, because that is what back-ends are used to.

A client obeys the protocols as long as it is `strict`; otherwise it sends what it is told, and its
parts (`control`, `queues[n].driver`, `memory`) allow anything at any time.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Self

from vhostblk.client import waiter
from vhostblk.client.control import PROTOCOL_FEATURES, Control
from vhostblk.client.inflight import InflightFile
from vhostblk.client.manners import FEATURES, check_request
from vhostblk.client.queue import ClientQueue, Framing, Pending
from vhostblk.client.requests import Requests, segments
from vhostblk.client.shared_memory import SharedMemory, SharedRegion
from vhostblk.errors import PeerError, StateError
from vhostblk.vhost.message import BackendRequest, ProtocolFeature, Request
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.blk import (
    SECTOR,
    WRITEBACK_OFFSET,
    BlkConfig,
    RequestType,
)
from vhostblk.virtio.features import Feature

__all__ = ["CONFIG_BYTES", "FEATURES", "Client", "segments"]

CONFIG_BYTES = 60
"""The configuration space up to WRITE_ZEROES' fields: what every driver of today reads."""

_INDIRECT_ENTRIES = 128


class Client(Requests):
    """One disk, used through a vhost-user socket.

    Make one with `connect`; use it in a `with` statement, or call `close`.

    Args:
        control: a session on which nothing has been said yet; becomes this object's.
        memory: becomes this object's.

    Context: one thread. Owns: control, memory, queues.
    """

    def __init__(self, control: Control, memory: SharedMemory, *, strict: bool = True) -> None:
        self.control = control
        self.memory = memory
        self.strict = strict
        self.queues: list[ClientQueue] = []
        self.config = BlkConfig()
        """The configuration space as it was read last."""
        self.offered = 0
        """Features the device offers."""
        self.inflight: InflightFile | None = None
        """Where the back-end tracks requests in flight; it outlives the back-end."""
        self._started: set[int] = set()
        self._logs_rings = False
        self._interrupted: set[int] = set()  # they were started when the connection was lost,
        # or stopped with requests in flight

    @classmethod
    def connect(
        cls,
        target: str | os.PathLike[str] | socket.socket,
        *,
        queues: int = 1,
        queue_size: int = 128,
        features: int = FEATURES,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
        memory: SharedMemory | None = None,
        memory_one_by_one: bool | None = None,
        alignment: int = 4096,
        timeout: float = 10.0,
        strict: bool = True,
    ) -> Self:
        """Connect to a back-end and set everything up, ready for requests.

        Args:
            target: path of a listening socket, or a connected socket.
            queues: how many to use.
            queue_size: entries of each; a power of two, unless the rings are packed.
            features, protocol_features: what to use of what is offered.
            memory: guest memory, owned by the client from now on; None: 32 MiB in one memfd.
            memory_one_by_one: ADD_MEM_REG (True) or SET_MEM_TABLE (False); None: as negotiated.
            alignment: of the data of requests, in the guest's address space.
            timeout: seconds for every wait.
            strict: refuse to do what the protocols forbid.

        Raises:
            OSError: nobody listens there.
            PeerError, SessionError, TimeoutError: the back-end did not play along.
            StateError: it does not have that many queues.
        """
        memory = memory or SharedMemory([32 << 20])
        try:
            control = Control(target, timeout=timeout, strict=strict)
        except BaseException:
            memory.close()
            raise
        client = cls(control, memory, strict=strict)
        try:
            client._negotiate(features, protocol_features)
            client.control.share(memory, one_by_one=memory_one_by_one)
            client.make_queues(queues, queue_size, alignment=alignment)
            for index in range(queues):
                client.start_queue(index)
        except BaseException:
            client.abandon()
            client.close()
            raise
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abandon()
        self.close()

    def close(self) -> None:
        """Stop the queues, disconnect and give everything back, whatever the back-end does. Idempotent.

        Raises:
            BufferError: somebody still holds a view of the memory.
        """
        for index in sorted(self._started):
            try:
                self.stop_queue(index)
            except (PeerError, TimeoutError, StateError):
                break
        self.abandon()
        for queue in self.queues:
            queue.close()
        self._forget_inflight()
        self.memory.close()

    def abandon(self) -> None:
        """Vanish: close the connection whatever is in flight. Memory and rings stay as they are."""
        self._interrupted |= self._started
        self._started.clear()
        self.control.close()

    def reconnect(self, target: str | os.PathLike[str] | socket.socket) -> None:
        """Go on with another back-end, or with the same one again, as a VMM does.

        It gets the same memory, and the same rings with whatever is in flight in them. Nothing is
        submitted again here: what was in flight when the back-end vanished is its business, and
        ends as any other request. The base of a ring is what its used index says, as in QEMU, which
        cannot know better either.

        Args:
            target: path of a listening socket, or a connected socket.

        Raises:
            OSError: nobody listens there (yet); try again.
            StateError: the back-end lacks a feature that the driver uses.
            PeerError, SessionError, TimeoutError: the back-end did not play along.
        """
        self.abandon()
        before = self.control
        self.control = Control(target, timeout=before.connection.timeout, strict=self.strict)
        try:
            self._go_on(before)
        except BaseException:
            # The next try needs what was agreed on, and this back-end may have got no further.
            self.abandon()
            self.control = before
            raise

    def _go_on(self, before: Control) -> None:
        self._negotiate(before.features, before.protocol_features)
        if lost := before.features & ~self.control.features:
            raise StateError(f"the back-end does not offer features in use: {lost:#x}")
        self.control.share(self.memory)
        if self.inflight is not None:
            self.control.share_inflight(self.inflight)
        for index in sorted(self._interrupted):
            queue = self.queues[index]
            self.start_queue(index, queue.driver.visible_base, call=not queue.is_polled)

    # ---------------------------------------------------------------- set-up, also step by step

    def _negotiate(self, features: int, protocol_features: ProtocolFeature) -> None:
        control = self.control
        self.offered = control.negotiate_protocol(protocol_features)
        if control.protocol_features & ProtocolFeature.CONFIG:
            self.read_config()
        if control.protocol_features & ProtocolFeature.BACKEND_REQ:
            control.open_channel()
        control.set_features(features & self.offered)

    def make_queues(self, count: int, size: int, *, alignment: int = 4096) -> None:
        """Replace the queues by `count` new ones, not started, and the file that tracks requests.

        Raises:
            StateError: some are started, or the back-end has fewer.
        """
        if self._started:
            raise StateError("queues are started")
        if self.strict and count > (available := self.control.queue_count()):
            raise StateError(f"{count} queues wanted, the back-end has {available}")
        for queue in self.queues:
            queue.close()
        self.queues = [
            ClientQueue(
                index,
                self.memory,
                size,
                event_idx=bool(self.control.features & Feature.VIRTIO_F_EVENT_IDX),
                indirect_entries=_INDIRECT_ENTRIES if self._has_indirect else 0,
                packed=bool(self.control.features & Feature.VIRTIO_F_RING_PACKED),
                alignment=alignment,
            )
            for index in range(count)
        ]
        self._interrupted.clear()
        self._forget_inflight()
        if self.control.protocol_features & ProtocolFeature.INFLIGHT_SHMFD:
            self.inflight = self.control.create_inflight(count, size)
            if self.inflight is not None:
                self.control.share_inflight(self.inflight)

    def _forget_inflight(self) -> None:
        if self.inflight is not None:
            self.inflight.close()
            self.inflight = None

    @property
    def _has_indirect(self) -> bool:
        return bool(self.control.features & Feature.VIRTIO_F_INDIRECT_DESC)

    def start_queue(
        self, index: int, base: int | None = None, *, kick: bool = True, call: bool = True
    ) -> None:
        """Tell the back-end everything about a ring, and start it.

        Args:
            index: the queue's number.
            base: next available index, or its equivalent of a packed ring; None: where the driver is.
            kick: False: give no kick fd, the back-end has to poll.
            call: False: give no call fd, `wait` polls.
        """
        queue, control = self.queues[index], self.control
        driver = queue.driver
        frontend = control.frontend
        control.ask(frontend.set_vring_num(index, driver.size))
        control.ask(frontend.set_vring_base(index, driver.base if base is None else base))
        self._tell_addresses(index)
        control.ask(frontend.set_vring_fd(index, VringFd.ERR, queue.err_fd))
        control.ask(frontend.set_vring_fd(index, VringFd.CALL, queue.call_fd if call else None))
        control.ask(frontend.set_vring_fd(index, VringFd.KICK, queue.kick_fd if kick else None))
        if control.features & Feature.VHOST_USER_F_PROTOCOL_FEATURES:
            control.ask(frontend.set_vring_enable(index, True))
        queue.is_polled = not call
        self._started.add(index)
        self._interrupted.discard(index)

    def _tell_addresses(self, index: int) -> None:
        driver = self.queues[index].driver
        desc, avail, used = (
            self.memory.uva(driver.gpa + offset)
            for offset in (driver.desc_offset, driver.avail_offset, driver.used_offset)
        )
        log = driver.gpa + driver.used_offset if self._logs_rings else None
        message = self.control.frontend.set_vring_addr(
            index, desc=desc, avail=avail, used=used, log=log
        )
        self.control.ask(message)

    def log_rings(self, enabled: bool) -> None:
        """Whether the back-end marks what it writes to rings in the log of dirty memory; see `memory_copy`."""
        self._logs_rings = enabled
        for index in sorted(self._started):
            self._tell_addresses(index)

    def stop_queue(self, index: int, *, skip_drain: bool = False) -> int:
        """Stop a ring; what was in flight is finished afterwards.

        Args:
            skip_drain: it need not be, and is when the ring is started again: there, or elsewhere
                by `reconnect`.

        Returns:
            Its next available index.
        """
        base = self.control.vring_base(index, skip_drain=skip_drain)
        self._started.discard(index)
        if skip_drain:
            self._interrupted.add(index)
        return base

    def reset_device(self) -> None:
        """Send RESET_DEVICE and the features anew; `make_queues` and `start_queue` must follow."""
        self.control.ask(self.control.frontend.request(Request.RESET_DEVICE))
        self._started.clear()
        self.control.set_features(self.control.features)

    def add_memory(self, size: int) -> SharedRegion:
        """Give the guest, and the back-end, one more region."""
        region = self.memory.add_region(size)
        self.control.add_region(region)
        return region

    def remove_memory(self, region: SharedRegion) -> None:
        """Take a region away from the back-end and from the guest."""
        self.control.remove_region(region)
        self.memory.remove_region(region)

    # ---------------------------------------------------------------- configuration space

    @property
    def capacity(self) -> int:
        """Bytes of the disk, as they were read last."""
        return self.config.capacity * SECTOR

    def read_config(self) -> BlkConfig:
        """Read the configuration space anew."""
        self.config = BlkConfig.from_bytes(self.control.get_config(0, CONFIG_BYTES))
        return self.config

    def set_writeback(self, enabled: bool) -> None:
        """Choose the cache mode (VIRTIO_BLK_F_CONFIG_WCE)."""
        self.control.set_config(WRITEBACK_OFFSET, bytes([enabled]))

    def wait_config_change(self, timeout: float | None = None) -> BlkConfig:
        """Wait until the back-end says that the configuration changed, and read it.

        Raises:
            TimeoutError: it did not say so.
        """
        message = self.control.next_backend_message(timeout)
        if message.request != BackendRequest.CONFIG_CHANGE_MSG:
            raise PeerError(f"the back-end sent {message.name(BackendRequest)}")
        return self.read_config()

    def run(
        self, queue: int, kind: RequestType, offset: int = 0, *, out: bytes = b"", room: int = 0
    ) -> bytes:
        """See `Requests.run`."""
        pending = self.submit(kind, offset, out=out, room=room, queue=queue)
        self.wait([pending])
        return pending.result()

    # ---------------------------------------------------------------- requests in flight

    def submit(
        self,
        kind: int,
        offset: int = 0,
        *,
        out: bytes = b"",
        room: int = 0,
        queue: int = 0,
        framing: Framing | None = None,
        indirect: bool | None = None,
        notify: bool = True,
    ) -> Pending:
        """Start a request.

        Args:
            kind: a `RequestType`; any number if not strict.
            offset: bytes; a multiple of 512.
            out: what the device reads: data, or segments.
            room: how much the device may write.
            queue: which one.
            framing, indirect: see `ClientQueue.submit`.
            notify: False: the device does not see it before the queue's next `notify`.

        Raises:
            StateError: no room in ring or memory, or what a strict client does not do.
        """
        if self.strict:
            length = len(out) if kind == RequestType.OUT else room
            features = self.control.features
            check_request(kind, offset, length, features=features, capacity=self.capacity)
        pending = self.queues[queue].submit(
            kind, offset // SECTOR, out=out, room=room, framing=framing, indirect=indirect
        )
        if notify:
            self.queues[queue].notify()
        return pending

    def wait(self, pending: Collection[Pending], timeout: float | None = None) -> list[Pending]:
        """Wait until all of `pending` are finished, successfully or not.

        Returns:
            Everything that finished meanwhile, also what was not waited for.

        Raises:
            TimeoutError: they are not finished in time.
            SessionError: the back-end is gone.
            PeerError: it declared a queue broken, or broke the ring's rules.
        """
        return self.wait_until(lambda: all(p.is_done for p in pending), timeout)

    def wait_any(self, timeout: float | None = None) -> list[Pending]:
        """Wait until at least one request finishes; as `wait`."""
        before = sum(queue.driver.in_flight for queue in self.queues)
        return self.wait_until(
            lambda: sum(queue.driver.in_flight for queue in self.queues) < before, timeout
        )

    def wait_until(
        self, condition: Callable[[], bool], timeout: float | None = None
    ) -> list[Pending]:
        """Take what finishes until `condition` holds; as `wait`."""
        connection = self.control.connection.fileno()
        return waiter.wait_until(condition, self.queues, connection, self._seconds(timeout))

    def poll(self) -> list[Pending]:
        """Take what has finished, without waiting."""
        return waiter.poll(self.queues)

    def wait_broken(self, queue: int = 0, timeout: float | None = None) -> None:
        """Wait until the back-end declares a queue broken through its error fd.

        Raises:
            TimeoutError: it did not.
        """
        waiter.wait_broken(self.queues[queue], self._seconds(timeout))

    def _seconds(self, timeout: float | None) -> float:
        return self.control.connection.timeout if timeout is None else timeout
