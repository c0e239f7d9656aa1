"""Which features the driver uses, and what it must not ask a disk for: strict clients refuse to.

VIRTIO 1.2 §5.2.6.1.

Knows nothing of queues.
"""

from __future__ import annotations

from vhostblk.errors import StateError
from vhostblk.virtio.blk import SECTOR, RequestType
from vhostblk.virtio.features import Feature

__all__ = ["FEATURES", "check_request"]

FEATURES = (
    Feature.VHOST_USER_F_PROTOCOL_FEATURES
    | Feature.VIRTIO_F_VERSION_1
    | Feature.VIRTIO_F_EVENT_IDX
    | Feature.VIRTIO_F_INDIRECT_DESC
    | Feature.VIRTIO_BLK_F_SIZE_MAX
    | Feature.VIRTIO_BLK_F_SEG_MAX
    | Feature.VIRTIO_BLK_F_RO
    | Feature.VIRTIO_BLK_F_BLK_SIZE
    | Feature.VIRTIO_BLK_F_FLUSH
    | Feature.VIRTIO_BLK_F_TOPOLOGY
    | Feature.VIRTIO_BLK_F_CONFIG_WCE
    | Feature.VIRTIO_BLK_F_MQ
    | Feature.VIRTIO_BLK_F_DISCARD
    | Feature.VIRTIO_BLK_F_WRITE_ZEROES
)
"""What this driver makes use of."""

_NEEDED: dict[int, int] = {
    RequestType.IN: 0,
    RequestType.OUT: 0,
    RequestType.GET_ID: 0,
    RequestType.FLUSH: Feature.VIRTIO_BLK_F_FLUSH,
    RequestType.DISCARD: Feature.VIRTIO_BLK_F_DISCARD,
    RequestType.WRITE_ZEROES: Feature.VIRTIO_BLK_F_WRITE_ZEROES,
}


def check_request(kind: int, offset: int, length: int, *, features: int, capacity: int) -> None:
    """Refuse what breaks a MUST NOT.

    Args:
        offset, length: bytes.
        features: those negotiated.
        capacity: bytes of the disk; 0: not known.

    Raises:
        StateError: it does.
    """
    needed = _NEEDED.get(kind)
    if needed is None or needed & ~features:
        raise StateError(f"request type {kind} is not one of the features negotiated")
    if kind in (RequestType.IN, RequestType.OUT):
        if offset % SECTOR or length % SECTOR:
            raise StateError(f"[{offset}, +{length}) is not made of sectors")
        if capacity and offset + length > capacity:
            raise StateError(f"[{offset}, +{length}) is beyond {capacity}")
