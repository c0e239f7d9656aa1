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
from vhostblk.export.cache_mode import CacheMode
from vhostblk.export.data_path import DataPath
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.inflight import QueueInflight, TrackedMemory
from vhostblk.export.ownership import Ownership
from vhostblk.export.state_transfer import StateTransfer
from vhostblk.vhost import action
from vhostblk.vhost.connection import BackendChannel, Connection
from vhostblk.vhost.device_state import STATE_SIZE, DeviceState
from vhostblk.vhost.dirty_log import DirtyLog
from vhostblk.vhost.inflight_region import create_file
from vhostblk.vhost.mem_table import MemTable, Region
from vhostblk.vhost.message import FRONTEND_TABLE, ProtocolFeature
from vhostblk.vhost.session import MAX_MEM_SLOTS, PROTOCOL_FEATURES, Session
from vhostblk.virtio.blk import CONFIG_SIZE, WRITEBACK_OFFSET

LOG_LOST = "the front-end's log of dirty memory is too short, or was truncated"

# Marks in the log of dirty memory are atomic operations, which are the engine's.
_SERVED = PROTOCOL_FEATURES if native.available else PROTOCOL_FEATURES & ~ProtocolFeature.LOG_SHMFD

Log = logging.LoggerAdapter[logging.Logger]
Result = int | bytes | None


class FrontEnd:
    """A connection from its first message to its end.

    Args:
        connection: becomes this object's.
        device, data_path: the export's; nobody else uses them meanwhile.
        ownership: makes the image ours when queues start, if it is not, and maybe gives it up when none run.
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
        ownership: Ownership,
    ) -> None:
        self._connection = connection
        self._device = device
        self._path = data_path
        self._log = log
        self._offences = offences
        self._ownership = ownership
        self._session = Session(
            device_features=device.offered_features,
            num_queues=num_queues,
            config_size=CONFIG_SIZE,
            writable_config=range(WRITEBACK_OFFSET, WRITEBACK_OFFSET + 1),
            protocol_features=_SERVED,
        )
        self._memory = MemTable(native.address_of, MAX_MEM_SLOTS)
        self._inflight: TrackedMemory | None = None
        self._dirty_log: DirtyLog | None = None
        self._logs_data = False
        self._dirty_log_fd: int | None = None
        self._channel: BackendChannel | None = None
        self._transfer = StateTransfer(STATE_SIZE)
        self._mode = CacheMode(device, data_path, offences)
        self._running: set[int] = set()  # queues
        self._leaving = False
        self._is_handling = False  # a message, to which it may want a reply before anything else

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
                self._is_handling = True
                await self._handle(message)
                self._is_handling = False
                self._send_pending()
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
        if not self._is_handling:
            self._send_pending()

    def queue_broken(self, index: int) -> None:
        """A queue is idle until it is stopped: the device status says so."""
        self._session.vring_broke(index)

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
        if self._dirty_log is not None and self._dirty_log.lost:
            # The last chance to say so: a queue that has stopped was the last thing before the guest runs elsewhere.
            if isinstance(result, int) and isinstance(steps[-1], action.CreateInflight):
                os.close(result)  # it goes with no reply
            raise SessionError(LOG_LOST)
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
            try:
                await self._connection.send(reply)
            finally:
                for fd in reply.fds:
                    os.close(fd)

    def _send_pending(self) -> None:
        message = self._session.take_backend_message()
        if message is not None and self._channel is not None and not self._channel.send(message):
            lost = f": {message.name()} is lost"
            self._offences.record("the front-end does not take messages", lost)

    async def _leave(self) -> None:
        self._leaving = True
        for step in self._session.close():
            # After a bug of ours the session may believe that a queue runs which does not.
            if not isinstance(step, action.StopVring) or step.index in self._running:
                await self._perform(step)
        # Not before the queues are drained: from what the used ring says when we hang up, a front-end concludes what is
        # done. QEMU has the next back-end begin there, and a request that completed later would be done twice.
        self._connection.close()
        self._transfer.close()
        await self._use_log(None)
        await self._use_memory(MemTable(native.address_of, MAX_MEM_SLOTS))
        if self._inflight is not None:
            await self._mode.use_note(None)
            self._inflight.close()
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
        if self._transfer.is_incomplete:
            raise PeerError(f"vring {step.index}: device state was sent, and not checked yet")
        self._running.add(step.index)  # first: from here on the image is in use
        try:
            await self._ownership.before_queues()
            inflight = self._part(step.vring.inflight)
            replays = await self._path.start_queue(step.vring, self._session.features, inflight)
        except BaseException:
            self._running.discard(step.index)
            await self._release_if_idle()
            raise
        self._log.debug("queue %d: started, size %d", step.index, step.vring.size)
        if replays:
            self._log.info(
                "queue %d: %d requests were in flight, and are served again", step.index, replays
            )

    def _part(self, part: range | None) -> QueueInflight | None:
        if part is None:
            return None
        if self._inflight is None:
            raise PeerError("the in-flight region could not be mapped")
        return self._inflight.part(part)

    async def _stop_vring(self, step: action.StopVring) -> int:
        self._running.discard(step.index)
        base = await self._path.stop_queue(step.index, suspend=step.suspend)
        self._session.vring_stopped(step.index, base)
        await self._release_if_idle()
        self._log.debug("queue %d: stopped at %d", step.index, base)
        return base

    async def _enable_vring(self, step: action.EnableVring) -> None:
        await self._path.enable_queue(step.index, step.enabled)

    async def _set_vring_fd(self, step: action.SetVringFd) -> None:
        await self._path.set_queue_fd(step.index, step.which, step.fd)

    async def _set_log_area(self, step: action.SetLogArea) -> None:
        await self._use_log(DirtyLog(step.size, step.offset, step.fd))

    async def _set_log_fd(self, step: action.SetLogFd) -> None:
        self._dirty_log_fd = step.fd
        await self._tell_log(self._dirty_log)

    async def _set_logging(self, step: action.SetLogging) -> None:
        self._logs_data = step.enabled
        await self._tell_log(self._dirty_log)

    async def _use_log(self, log: DirtyLog | None) -> None:
        """Move the data path over, then let go of what is old."""
        await self._tell_log(log)
        old, self._dirty_log = self._dirty_log, log
        if old is not None:
            old.close()

    async def _tell_log(self, log: DirtyLog | None) -> None:
        await self._path.set_log(log, data=self._logs_data, fd=self._dirty_log_fd)

    async def _set_vring_log(self, step: action.SetVringLog) -> None:
        await self._path.set_queue_log(step.index, step.gpa)

    async def _read_config(self, step: action.ReadConfig) -> bytes:
        return self._device.config().read(step.offset, step.size)

    async def _write_config(self, step: action.WriteConfig) -> None:
        try:
            await self._mode.change(lambda: self._device.write_config(step.offset, step.data))
        except GuestError as exc:
            raise PeerError(str(exc)) from None

    async def _save_state(self, step: action.SaveState) -> None:
        self._transfer.save(step.fd, self._mode.state().pack())

    async def _load_state(self, step: action.LoadState) -> None:
        self._transfer.load(step.fd)

    async def _check_state(self, _step: action.CheckState) -> None:
        data = await self._transfer.check()
        if data is not None:
            await self._take_over(DeviceState.unpack(data))

    async def _take_over(self, state: DeviceState) -> None:
        device = self._device
        if state.capacity > device.capacity:
            raise PeerError(
                f"device state: of a disk of {state.capacity} bytes; this one has {device.capacity}"
            )
        if await self._mode.take_over(state):
            self._session.config_changed()

    async def _set_backend_channel(self, step: action.SetBackendChannel) -> None:
        channel = BackendChannel(step.fd)
        if self._channel is not None:
            self._channel.close()
        self._channel = channel

    async def _reset_device(self, _step: action.ResetDevice) -> None:
        for index in sorted(self._running):
            await self._path.stop_queue(index)
        self._running.clear()
        self._device.reset()
        self._mode.remember()
        await self._path.set_write_through(self._device.write_through)
        await self._release_if_idle()

    async def _release_if_idle(self) -> None:
        if not self._running:
            await self._ownership.after_queues()

    async def _create_inflight(self, step: action.CreateInflight) -> int:
        return create_file(step.size)

    async def _map_inflight(self, step: action.MapInflight) -> None:
        await self._mode.use_note(None)
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None
        self._inflight = TrackedMemory(step)
        try:
            await self._device.backend.be_outlived()
        except BlockError as exc:
            raise PeerError(f"what is not in the image yet cannot be written: {exc}") from None
        if step.note is not None and await self._mode.use_note(self._inflight.note(step.note)):
            self._session.config_changed()

    async def _forget_inflight(self, step: action.ForgetInflight) -> None:
        if self._inflight is not None:
            self._inflight.forget(step.versions)

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
        action.SetVringLog: _set_vring_log,
        action.SetLogArea: _set_log_area,
        action.SetLogFd: _set_log_fd,
        action.SetLogging: _set_logging,
        action.ReadConfig: _read_config,
        action.WriteConfig: _write_config,
        action.SaveState: _save_state,
        action.LoadState: _load_state,
        action.CheckState: _check_state,
        action.SetBackendChannel: _set_backend_channel,
        action.ResetDevice: _reset_device,
        action.CreateInflight: _create_inflight,
        action.MapInflight: _map_inflight,
        action.ForgetInflight: _forget_inflight,
        action.CloseFds: _close_fds,
    }


def _beyond(memory: MemTable, other: MemTable) -> list[Region]:
    """The regions that the other table does not have."""
    held = set(other.regions)
    return [region for region in memory.regions if region not in held]
