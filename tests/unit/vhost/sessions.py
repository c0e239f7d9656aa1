"""A session joined to its other role: every request goes through both, and the bytes between them."""

from __future__ import annotations

from collections.abc import Sequence

from vhostblk.errors import PeerError
from vhostblk.vhost.action import Action, CloseFds, CreateInflight, ReadConfig, StopVring
from vhostblk.vhost.frontend import Frontend
from vhostblk.vhost.message import Decoder, Message, Payload, ProtocolFeature
from vhostblk.vhost.session import PROTOCOL_FEATURES, Session
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.features import Feature

FEATURES = int(Feature.VIRTIO_F_VERSION_1 | Feature.VIRTIO_F_EVENT_IDX)
PROTOCOL_BIT = int(Feature.VHOST_USER_F_PROTOCOL_FEATURES)
CONFIG = bytes(range(96))


class SessionPair:
    """Front-end, session, and a caller that performs actions by noting them."""

    def __init__(
        self,
        *,
        negotiate: ProtocolFeature | None = PROTOCOL_FEATURES,
        strict: bool = True,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
    ) -> None:
        self.session = Session(
            device_features=FEATURES,
            num_queues=4,
            config_size=len(CONFIG),
            writable_config=range(32, 33),
            max_mem_slots=40,
            protocol_features=protocol_features,
        )
        self.frontend = Frontend(strict=strict)
        self.failure: PeerError | None = None
        """The next action that is not CloseFds fails with this."""
        self.base = 0
        """What StopVring answers."""
        self.sent: list[int] = []
        self.closed: list[int] = []
        self._next_fd = 1000
        if negotiate is not None:
            self.ask(self.frontend.get_protocol_features())
            self.tell(self.frontend.set_protocol_features(negotiate))

    def fd(self) -> int:
        """A number that has not been used as an fd yet."""
        self._next_fd += 1
        self.sent.append(self._next_fd)
        return self._next_fd

    def fds(self, count: int) -> tuple[int, ...]:
        """So many of them."""
        return tuple(self.fd() for _ in range(count))

    def tell(self, message: Message) -> list[Action]:
        """Send a message; give the actions, CloseFds left out. A due answer is taken."""
        actions, reply = self._exchange(message)
        if self.frontend.expects_reply:
            assert reply is not None
            self.frontend.receive(reply)
        else:
            assert reply is None
        return actions

    def ask(self, message: Message) -> Payload:
        """Send a message that is answered; give the answer."""
        _, reply = self._exchange(message)
        assert reply is not None
        return self.frontend.receive(reply)

    def deliver(self, message: Message) -> Message | None:
        """Send a message behind the front-end's back; give whatever comes."""
        return self._exchange(message)[1]

    def _exchange(self, message: Message) -> tuple[list[Action], Message | None]:
        (received,) = Decoder().feed(message.encode(), message.fds)
        result: int | bytes | None = None
        error = None
        seen: list[Action] = []
        for action in self.session.receive(received):
            if isinstance(action, CloseFds):
                self.closed += action.fds
                continue
            seen.append(action)
            if self.failure is not None:
                error, self.failure = self.failure, None
            elif isinstance(action, ReadConfig):
                result = CONFIG[action.offset : action.offset + action.size]
            elif isinstance(action, StopVring):
                result = self.base
            elif isinstance(action, CreateInflight):
                result = self._next_fd = self._next_fd + 1
        reply = self.session.complete(result, error=error)
        if reply is None:
            return seen, None
        (decoded,) = Decoder().feed(reply.encode(), reply.fds)
        return seen, decoded

    def describe(self, index: int = 0) -> None:
        """All that has to be known of a ring before it starts."""
        for message in (
            self.frontend.set_vring_num(index, 256),
            self.frontend.set_vring_base(index, 7),
            self.frontend.set_vring_addr(index, desc=0x10000, avail=0x20000, used=0x30000),
        ):
            assert self.tell(message) == []

    def start(self, index: int = 0) -> tuple[Sequence[Action], int]:
        """Describe and start a ring; give the actions and the kick fd."""
        self.describe(index)
        kick = self.fd()
        return self.tell(self.frontend.set_vring_fd(index, VringFd.KICK, kick)), kick

    def open_fds(self) -> list[int]:
        """What was sent and is not closed."""
        return sorted(set(self.sent) - set(self.closed))
