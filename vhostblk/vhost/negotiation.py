"""What the two ends have agreed on: VIRTIO features and vhost-user's own.

vhost-user, "Protocol features"; SET_FEATURES, SET_PROTOCOL_FEATURES. Bit 30 of the VIRTIO features
is vhost-user's: it offers the second negotiation, and says, once acknowledged, that rings begin
disabled. It is added to the offer here, and hidden from the device. So is bit 26 where the log of
dirty memory (LOG_SHMFD) is served: it says whether what is written is logged, and changes at any time.

Knows nothing about what a feature means.
"""

from __future__ import annotations

from vhostblk.errors import PeerError
from vhostblk.vhost.message import Gate, ProtocolFeature, Row
from vhostblk.virtio.features import Feature, feature_names

__all__ = ["PROTOCOL_FEATURES", "Negotiation"]

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.GET_VRING_BASE_INFLIGHT
    | ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN
)
"""What this package can serve."""

_PROTOCOL_BIT = int(Feature.VHOST_USER_F_PROTOCOL_FEATURES)
_LOG_ALL = int(Feature.VHOST_F_LOG_ALL)
# QEMU passes on whatever the guest has acknowledged, and for this bit it never asks the back-end:
# guests that use the legacy interface may set it. It promises nothing that any framing does not.
_HARMLESS_FEATURES = int(Feature.VIRTIO_F_ANY_LAYOUT)


class Negotiation:
    """The offers and what was taken of them.

    Args:
        features: VIRTIO features on offer, without bit 30.
        protocol_features: a subset of `PROTOCOL_FEATURES`.

    Raises:
        ValueError: `protocol_features` is more than is served.

    Context: the session.
    """

    def __init__(self, features: int, protocol_features: ProtocolFeature) -> None:
        if protocol_features & ~PROTOCOL_FEATURES:
            raise ValueError(f"protocol features {protocol_features!r} are not all served")
        serves_log = ProtocolFeature.LOG_SHMFD in protocol_features
        self.offered = features | _PROTOCOL_BIT | (_LOG_ALL if serves_log else 0)
        """What GET_FEATURES answers."""
        self.protocol_offered = protocol_features
        """What GET_PROTOCOL_FEATURES answers."""
        self.protocol = ProtocolFeature.NONE
        """Protocol features in force."""
        self.has_protocol_bit = False
        """Whether the front-end has acknowledged bit 30."""
        self.logs = False
        """Whether it has acknowledged bit 26 last."""
        self.features = 0
        """VIRTIO features acknowledged, without bits 30 and 26."""

    def set_features(self, features: int, *, is_running: bool) -> None:
        """Acknowledge VIRTIO features.

        Args:
            is_running: a vring is started, so they must not change.

        Raises:
            PeerError: some were not offered, or they change at the wrong time.
        """
        unknown = features & ~(self.offered | _HARMLESS_FEATURES)
        if unknown:
            raise PeerError(f"SET_FEATURES: not offered: {feature_names(unknown)}")
        virtio = features & self.offered & ~_PROTOCOL_BIT & ~_LOG_ALL
        if is_running and virtio != self.features:
            raise PeerError("SET_FEATURES: other features while a vring is started")
        self.features = virtio
        self.has_protocol_bit = bool(features & _PROTOCOL_BIT)
        self.logs = bool(features & _LOG_ALL)

    def set_protocol(self, features: int) -> None:
        """Agree on protocol features. Raises: PeerError: some were not offered."""
        unknown = features & ~int(self.protocol_offered)
        if unknown:
            raise PeerError(f"SET_PROTOCOL_FEATURES: not offered: {unknown:#x}")
        self.protocol = ProtocolFeature(features)

    def has(self, features: ProtocolFeature) -> bool:
        """Whether all of these are in force."""
        return self.protocol & features == features

    @property
    def is_packed(self) -> bool:
        """Whether rings have the packed format."""
        return bool(self.features & Feature.VIRTIO_F_RING_PACKED)

    def check(self, row: Row) -> None:
        """Raises: PeerError: the row's protocol feature does not permit its request yet."""
        available = self.protocol if row.gate is Gate.NEGOTIATED else self.protocol_offered
        if row.feature & ~available:
            raise PeerError(
                f"{row.request.name}: {row.feature.name} is not {row.gate.name.lower()}"
            )

    def reset(self) -> None:
        """Forget the VIRTIO features: the device is reset, the connection is not."""
        self.features = 0
        self.logs = False
