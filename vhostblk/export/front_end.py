"""One connected front-end: its session's actions, performed.

The session (sans-io) says what a message means; here it happens to the device, the data path and the guest memory.
Messages are handled one after the other, so replies keep their order however long an action takes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

from vhostblk import native
from vhostblk.errors import BlockError, GuestError, PeerError, SessionError
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.data_path import DataPath
from vhostblk.export.error_log import ErrorLog
from vhostblk.vhost import action
from vhostblk.vhost.connection import BackendChannel, Connection
from vhostblk.vhost.mem_table import MemTable, Region
from vhostblk.vhost.message import FRONTEND_TABLE
from vhostblk.vhost.session import MAX_MEM_SLOTS, Session
from vhostblk.virtio.blk import CONFIG_SIZE, WRITEBACK_OFFSET

Log = logging.LoggerAdapter[logging.Logger]
Result = int | bytes | None


class FrontEnd:
    """A connection from its first message to its end.

    Args:
        connection: becomes this object's.
        device, data_path: the export's; nobody else uses them meanwhile.
        activate: makes the image ours again if it was handed over; raises PeerError if that cannot be.
        offences: where messages that are refused, and whatever else a guest can do all day, are counted.

    Context: the control loop. Owns: the connection, the session, guest memory, the back-end channel.
    """

    def __init__(
        self,
        connection: Connection,
        device: BlkDevice,
        data_path: DataPath,
        num_queues: int,
        log: Log,
        offences: ErrorLog,
        activate: Callable[[], Awaitable[None]],
    ) -> None:
        self._connection = connection
        self._device = device
        self._path = data_path
        self._log = log
        self._offences = offences
        self._activate = activate
        self._session = Session(
            device_features=device.offered_features,
            num_queues=num_queues,
            config_size=CONFIG_SIZE,
            writable_config=range(WRITEBACK_OFFSET, WRITEBACK_OFFSET + 1),
        )
        self._memory = MemTable(native.address_of, MAX_MEM_SLOTS)
        self._channel: BackendChannel | None = None
        self._running: set[int] = set()  # queues
        self._leaving = False

    @property
    def is_leaving(self) -> bool:
        """Whether this is the end on either side, although the last requests may still be in flight."""
        return self._leaving or self._connection.has_hung_up()

    @property
    def is_running(self) -> bool:
        """Whether the guest uses its disk: queues are started."""
        return bool(self._running)

    async def run(self) -> None:
        """Serve until the front-end leaves, breaks the protocol, or `disconnect` is called.

        When this returns nothing of the session is left: queues are drained and stopped, memory is unmapped.
        """
        try:
            # What was agreed with the front-end before is nothing that this one has said. Without SET_FEATURES there is
            # no flush, so writes are durable.
            await self._perform(action.SetFeatures(0))
            while (message := await self._connection.receive()) is not None:
                await self._handle(message)
        except SessionError as exc:
            self._log.warning("the session ends: %s", exc)
        finally:
            await self._leave()

    def disconnect(self) -> None:
        """Take no more messages; `run` comes to its end, and hangs up once the queues are drained."""
        self._leaving = True
        self._connection.finish()

    def config_changed(self) -> None:
        """Tell the guest to look at the configuration space again, as soon as that is possible."""
        self._session.config_changed()
        self._send_pending()

    async def _handle(self, message: Any) -> None:
        result: Result = None
        error: PeerError | None = None
        steps = self._session.receive(message)
        for position, step in enumerate(steps):
            try:
                answer = await self._perform(step)
            except PeerError as exc:
                error = error or exc
            except BaseException:
                # A bug of ours ends the session; it must not cost the daemon the fds of the message, too.
                for rest in steps[position + 1 :]:
                    if isinstance(rest, action.CloseFds):
                        await self._perform(rest)
                raise
            else:
                result = answer if answer is not None else result
        refusal = error or self._session.refusal
        if refusal is not None:
            known = message.request in FRONTEND_TABLE
            name = message.name() if known else "a request that is not supported"
            self._offences.record(f"refused {name}", f": {refusal}")
        try:
            reply = self._session.complete(result, error=error)
        finally:
            # An exception that names the frame that names it would keep guest memory mapped until it is collected.
            error = refusal = None
        if reply is not None:
            await self._connection.send(reply)
        self._send_pending()

    def _send_pending(self) -> None:
        message = self._session.take_backend_message()
        if message is not None and self._channel is not None and not self._channel.send(message):
            self._log.warning("the front-end does not take messages: %s is lost", message.name())

    async def _leave(self) -> None:
        self._leaving = True
        for step in self._session.close():
            # After a bug of ours the session may believe that a queue runs which does not.
            if not isinstance(step, action.StopVring) or step.index in self._running:
                await self._perform(step)
        # Not before the queues are drained: from what the used ring says when we hang up, a front-end concludes what is
        # done. QEMU has the next back-end begin there, and a request that completed later would be done twice.
        self._connection.close()
        await self._use_memory(MemTable(native.address_of, MAX_MEM_SLOTS))
        if self._channel is not None:
            self._channel.close()

    # ------------------------------------------------------------------ actions

    async def _perform(self, step: action.Action) -> Result:
        return await self._ACTIONS[type(step)](self, step)

    async def _set_features(self, step: action.SetFeatures) -> None:
        self._device.set_features(step.features)
        await self._path.set_write_through(self._device.write_through)

    async def _map_memory(self, step: action.MapMemory) -> None:
        await self._use_memory(self._memory.replaced(step.regions, step.fds))

    async def _add_region(self, step: action.AddRegion) -> None:
        await self._use_memory(self._memory.added(step.region, step.fd))

    async def _remove_region(self, step: action.RemoveRegion) -> None:
        await self._use_memory(self._memory.removed(step.region))

    async def _use_memory(self, memory: MemTable) -> None:
        """Announce what is new (B13.3), move the data path over, then let go of what is old."""
        old = self._memory
        backend = self._device.backend
        for region in _beyond(memory, old):
            backend.register_buf(region.hva, region.size)
        try:
            with self._device.parking.closed():
                await self._path.set_memory(memory if memory.regions else None)
        except BaseException:
            self._forget_memory(memory, but=old)
            raise
        self._memory = memory
        self._forget_memory(old, but=memory)

    def _forget_memory(self, memory: MemTable, *, but: MemTable) -> None:
        for region in _beyond(memory, but):
            self._device.backend.unregister_buf(region.hva)
        memory.close()

    async def _start_vring(self, step: action.StartVring) -> None:
        self._running.add(step.index)  # first: from here on the image is in use
        try:
            await self._activate()
            await self._path.start_queue(step.vring, self._session.features)
        except BaseException:
            self._running.discard(step.index)
            raise
        self._log.debug("queue %d: started, size %d", step.index, step.vring.size)

    async def _stop_vring(self, step: action.StopVring) -> int:
        self._running.discard(step.index)
        with self._device.parking.closed():
            base = await self._path.stop_queue(step.index)
        self._log.debug("queue %d: stopped at %d", step.index, base)
        return base

    async def _enable_vring(self, step: action.EnableVring) -> None:
        await self._path.enable_queue(step.index, step.enabled)

    async def _set_vring_fd(self, step: action.SetVringFd) -> None:
        await self._path.set_queue_fd(step.index, step.which, step.fd)

    async def _read_config(self, step: action.ReadConfig) -> bytes:
        return self._device.config().read(step.offset, step.size)

    async def _write_config(self, step: action.WriteConfig) -> None:
        before = self._device.write_through
        try:
            self._device.write_config(step.offset, step.data)
        except GuestError as exc:
            raise PeerError(str(exc)) from None
        after = self._device.write_through
        if after != before:
            mode = "write through" if after else "write back"
            self._offences.record(f"the guest made its write cache {mode}", level=logging.INFO)
            await self._path.set_write_through(after)
            if after:
                await self._make_durable()

    async def _make_durable(self) -> None:
        """Everything that completed while the guest had a write cache is on the disk when this returns."""
        try:
            # Only ours: a guest that does this all day must not hold up the node's other users.
            await self._device.backend.settle()
            await self._device.backend.flush()
        except BlockError as exc:
            raise PeerError(f"the flush that ends write-back failed: {exc}") from None

    async def _set_backend_channel(self, step: action.SetBackendChannel) -> None:
        channel = BackendChannel(step.fd)
        if self._channel is not None:
            self._channel.close()
        self._channel = channel

    async def _reset_device(self, _step: action.ResetDevice) -> None:
        with self._device.parking.closed():
            for index in sorted(self._running):
                await self._path.stop_queue(index)
        self._running.clear()
        self._device.reset()
        await self._path.set_write_through(self._device.write_through)

    async def _close_fds(self, step: action.CloseFds) -> None:
        for fd in step.fds:
            os.close(fd)

    _ACTIONS: ClassVar[
        Mapping[type[action.Action], Callable[[FrontEnd, Any], Awaitable[Result]]]
    ] = {
        action.SetFeatures: _set_features,
        action.MapMemory: _map_memory,
        action.AddRegion: _add_region,
        action.RemoveRegion: _remove_region,
        action.StartVring: _start_vring,
        action.StopVring: _stop_vring,
        action.EnableVring: _enable_vring,
        action.SetVringFd: _set_vring_fd,
        action.ReadConfig: _read_config,
        action.WriteConfig: _write_config,
        action.SetBackendChannel: _set_backend_channel,
        action.ResetDevice: _reset_device,
        action.CloseFds: _close_fds,
    }


def _beyond(memory: MemTable, other: MemTable) -> list[Region]:
    """The regions that the other table does not have."""
    held = set(other.regions)
    return [region for region in memory.regions if region not in held]
