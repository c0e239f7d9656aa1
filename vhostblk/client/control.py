"""The control side of a guest without a VM: vhost-user requests that wait for their answer.

vhost-user, "Communication". `Control` joins the sans-io `Frontend` and a blocking connection, and
holds the other end of the back-end's own channel.

Knows nothing of rings and requests of a disk.
"""

from __future__ import annotations

import os
import socket

from vhostblk.client.inflight import InflightFile
from vhostblk.client.shared_memory import SharedMemory, SharedRegion
from vhostblk.errors import PeerError, SessionError, StateError
from vhostblk.vhost.frontend import Frontend
from vhostblk.vhost.message import (
    BACKEND_TABLE,
    U64,
    ConfigSpace,
    Empty,
    InflightDescription,
    Message,
    Payload,
    ProtocolFeature,
    Request,
    VringState,
)
from vhostblk.vhost.transport import BlockingConnection
from vhostblk.virtio.features import Feature

__all__ = ["PROTOCOL_FEATURES", "Control"]

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.GET_VRING_BASE_INFLIGHT
    | ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN
)
"""What this front-end makes use of."""


class Control:
    """A session as its front-end, one request at a time.

    Args:
        target: path of a listening socket, or a connected one, which becomes this object's.
        timeout: seconds for every wait.
        strict: refuse to send what the protocol forbids.

    Raises:
        OSError: nobody listens there.

    Context: one thread. Owns: the connection and this end of the back-end's channel.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | socket.socket,
        *,
        timeout: float = 10.0,
        strict: bool = True,
    ) -> None:
        if isinstance(target, socket.socket):
            self.connection = BlockingConnection(target, timeout=timeout)
        else:
            self.connection = BlockingConnection.connect(os.fspath(target), timeout=timeout)
        self.frontend = Frontend(strict=strict)
        self.features = 0
        """What SET_FEATURES was sent with."""
        self._channel: BlockingConnection | None = None

    @property
    def protocol_features(self) -> ProtocolFeature:
        """What is negotiated."""
        return self.frontend.protocol_features

    def close(self) -> None:
        """Leave without a word. Idempotent."""
        self.connection.close()
        if self._channel is not None:
            self._channel.close()

    # ---------------------------------------------------------------- any request

    def ask(self, message: Message) -> Payload:
        """Send a request that `frontend` built, and wait for the answer if one is due.

        Returns:
            The answer's payload; `U64(0)` for an acknowledgement; `Empty` where none is due.

        Raises:
            PeerError: the back-end refused the request.
            SessionError: it broke the protocol or closed the connection.
            TimeoutError: it did not answer.
        """
        self.connection.send(message)
        if not self.frontend.expects_reply:
            return Empty()
        return self.frontend.receive(self.receive())

    def receive(self) -> Message:
        """Wait for the next message, whatever it is.

        Raises:
            SessionError: the back-end closed the connection.
            TimeoutError: nothing came.
        """
        message = self.connection.receive()
        if message is None:
            raise SessionError("the back-end closed the connection")
        return message

    def send_raw(
        self, request: int, data: bytes = b"", fds: tuple[int, ...] = (), *, flags: int = 1
    ) -> None:
        """Send any message; `receive` or `is_alive` tell what the back-end makes of it."""
        self.connection.send(self.frontend.raw(request, flags, data, fds))

    def is_alive(self) -> bool:
        """Ask a harmless question and see whether it is answered."""
        try:
            self.ask(self.frontend.get_features())
        except (SessionError, TimeoutError):
            return False
        return True

    # ---------------------------------------------------------------- negotiation

    def negotiate_protocol(self, wanted: ProtocolFeature = PROTOCOL_FEATURES) -> int:
        """Become the owner and agree on protocol features.

        Args:
            wanted: those that are not offered are left out.

        Returns:
            The virtio features that are offered.
        """
        self.ask(self.frontend.get_features())
        offered = self.frontend.features_offered
        if offered & Feature.VHOST_USER_F_PROTOCOL_FEATURES:
            self.ask(self.frontend.get_protocol_features())
            agreed = self.frontend.protocol_offered & wanted
            self.ask(self.frontend.set_protocol_features(agreed))
        self.ask(self.frontend.request(Request.SET_OWNER))
        return offered

    def set_features(self, features: int) -> None:
        """Tell the back-end which virtio features are used."""
        self.ask(self.frontend.set_features(features))
        self.features = features

    def queue_count(self) -> int:
        """Number of queues the back-end can serve; 1 where it cannot be asked."""
        if not self.protocol_features & ProtocolFeature.MQ:
            return 1
        payload = self.ask(self.frontend.request(Request.GET_QUEUE_NUM))
        assert isinstance(payload, U64)
        return payload.value

    # ---------------------------------------------------------------- memory

    def share(self, memory: SharedMemory, *, one_by_one: bool | None = None) -> None:
        """Give the back-end all of `memory`.

        Args:
            one_by_one: by ADD_MEM_REG instead of SET_MEM_TABLE; None: where that is negotiated.
        """
        if one_by_one is None:
            one_by_one = bool(self.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS)
        if one_by_one:
            for region in memory.regions:
                self.add_region(region)
            return
        self.ask(
            self.frontend.set_mem_table(
                [region.description for region in memory.regions],
                [region.fd for region in memory.regions],
            )
        )

    def add_region(self, region: SharedRegion) -> None:
        """Give the back-end one more region."""
        self.ask(self.frontend.add_mem_reg(region.description, region.fd))

    def remove_region(self, region: SharedRegion) -> None:
        """Take a region away from the back-end."""
        self.ask(self.frontend.rem_mem_reg(region.description))

    # ---------------------------------------------------------------- configuration

    def get_config(self, offset: int, length: int) -> bytes:
        """Read the device's configuration space."""
        payload = self.ask(self.frontend.get_config(offset, length))
        assert isinstance(payload, ConfigSpace)
        return payload.data

    def set_config(self, offset: int, data: bytes) -> None:
        """Write the device's configuration space."""
        self.ask(self.frontend.set_config(offset, data))

    def open_channel(self) -> None:
        """Give the back-end a channel of its own (SET_BACKEND_REQ_FD); a former one is closed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        channel = BlockingConnection(ours, BACKEND_TABLE, timeout=self.connection.timeout)
        try:
            self.ask(self.frontend.set_backend_req_fd(theirs.fileno()))
        except BaseException:
            channel.close()
            raise
        finally:
            theirs.close()
        if self._channel is not None:
            self._channel.close()
        self._channel = channel

    def next_backend_message(self, timeout: float | None = None) -> Message:
        """Wait for a message of the back-end on its own channel.

        Raises:
            StateError: there is no channel.
            SessionError: the back-end closed it.
            TimeoutError: nothing came.
        """
        if self._channel is None:
            raise StateError("the back-end has no channel of its own")
        self._channel.timeout = self.connection.timeout if timeout is None else timeout
        message = self._channel.receive()
        if message is None:
            raise SessionError("the back-end closed its channel")
        return message

    # ---------------------------------------------------------------- the device as a whole

    def status(self) -> int:
        """Read the device status."""
        payload = self.ask(self.frontend.get_status())
        assert isinstance(payload, U64)
        return payload.value

    def save_device_state(self) -> bytes:
        """Ask for what the next back-end has to know. Raises: PeerError: it is refused."""
        reading, writing = os.pipe()
        try:
            try:
                self._transfer(writing, load=False)
            finally:
                os.close(writing)
            with open(reading, "rb", closefd=False) as pipe:
                state = pipe.read()
        finally:
            os.close(reading)
        self.check_device_state()
        return state

    def load_device_state(self, state: bytes) -> None:
        """Tell what the back-end before has said. Raises: PeerError: it is refused."""
        file = os.memfd_create("state")
        try:
            os.pwrite(file, state, 0)
            self._transfer(file, load=True)
        finally:
            os.close(file)
        self.check_device_state()

    def _transfer(self, fd: int, *, load: bool) -> None:
        payload = self.ask(self.frontend.set_device_state_fd(fd, load=load))
        assert isinstance(payload, U64)
        if payload.value != 0x100:  # success, and no fd of the back-end's own
            raise PeerError(f"SET_DEVICE_STATE_FD was answered by {payload.value:#x}")

    def check_device_state(self) -> None:
        """Ask whether the transfer was complete. Raises: PeerError: it was not."""
        payload = self.ask(self.frontend.check_device_state())
        assert isinstance(payload, U64)
        if payload.value:
            raise PeerError("CHECK_DEVICE_STATE: something is wrong")

    # ---------------------------------------------------------------- rings

    def create_inflight(self, num_queues: int, queue_size: int) -> InflightFile | None:
        """Have the back-end make a file to track requests in; None: it does not want to.

        Args:
            queue_size: entries of the largest ring.
        """
        self.connection.send(self.frontend.get_inflight_fd(num_queues, queue_size))
        reply = self.receive()
        try:
            description = self.frontend.receive(reply)
            assert isinstance(description, InflightDescription)
            if bool(reply.fds) != bool(description.mmap_size):
                raise SessionError(f"{description}: {len(reply.fds)} fds")
        except BaseException:
            for fd in reply.fds:
                os.close(fd)
            raise
        return InflightFile(reply.fds[0], description) if reply.fds else None

    def share_inflight(self, file: InflightFile) -> None:
        """Have the back-end track requests there, and finish what it finds in flight."""
        self.ask(self.frontend.set_inflight_fd(file.description, file.fd))

    def vring_base(self, index: int, *, skip_drain: bool = False) -> int:
        """Stop a ring and learn where it stopped: GET_VRING_BASE, or GET_VRING_BASE_SKIP_DRAIN."""
        payload = self.ask(self.frontend.get_vring_base(index, skip_drain=skip_drain))
        assert isinstance(payload, VringState)
        return payload.num
