"""Feature bits of VIRTIO and of its block device, and their names.

VIRTIO 1.2 §6 (reserved feature bits) and §5.2.3 (block device). A constant is a mask, not a bit
number: features are always handled as one 64-bit integer. Whether a feature is offered is decided
elsewhere; a bit that is named here may well be one that nobody offers.
"""

from __future__ import annotations

import enum

__all__ = ["Feature", "feature_names"]


class Feature(enum.IntFlag):
    """Masks of single feature bits; the member's name is the one in the specification."""

    # VIRTIO 1.2 §5.2.3, block device
    VIRTIO_BLK_F_SIZE_MAX = 1 << 1
    VIRTIO_BLK_F_SEG_MAX = 1 << 2
    VIRTIO_BLK_F_GEOMETRY = 1 << 4
    VIRTIO_BLK_F_RO = 1 << 5
    VIRTIO_BLK_F_BLK_SIZE = 1 << 6
    VIRTIO_BLK_F_FLUSH = 1 << 9
    VIRTIO_BLK_F_TOPOLOGY = 1 << 10
    VIRTIO_BLK_F_CONFIG_WCE = 1 << 11
    VIRTIO_BLK_F_MQ = 1 << 12
    VIRTIO_BLK_F_DISCARD = 1 << 13
    VIRTIO_BLK_F_WRITE_ZEROES = 1 << 14
    VIRTIO_BLK_F_LIFETIME = 1 << 15
    VIRTIO_BLK_F_SECURE_ERASE = 1 << 16
    VIRTIO_BLK_F_ZONED = 1 << 17  # since VIRTIO 1.3

    # VIRTIO 1.2 §6.3, legacy
    VIRTIO_F_NOTIFY_ON_EMPTY = 1 << 24
    VIRTIO_F_ANY_LAYOUT = 1 << 27

    # Not VIRTIO's: vhost-user and the vhost of Linux say with it that what the device writes is logged.
    VHOST_F_LOG_ALL = 1 << 26

    # VIRTIO 1.2 §6, the ring and the device in general
    VIRTIO_F_INDIRECT_DESC = 1 << 28
    VIRTIO_F_EVENT_IDX = 1 << 29
    # Not VIRTIO's: vhost-user uses this legacy bit to say that protocol features may be negotiated.
    VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
    VIRTIO_F_VERSION_1 = 1 << 32
    VIRTIO_F_ACCESS_PLATFORM = 1 << 33
    VIRTIO_F_RING_PACKED = 1 << 34
    VIRTIO_F_IN_ORDER = 1 << 35
    VIRTIO_F_ORDER_PLATFORM = 1 << 36
    VIRTIO_F_SR_IOV = 1 << 37
    VIRTIO_F_NOTIFICATION_DATA = 1 << 38
    VIRTIO_F_NOTIF_CONFIG_DATA = 1 << 39
    VIRTIO_F_RING_RESET = 1 << 40


def feature_names(bits: int) -> str:
    """Name the features in `bits` for a log line, lowest bit first.

    Args:
        bits: any 64-bit feature word; unknown bits are shown as `bit N`.

    Returns:
        Names without their `VIRTIO_F_`/`VIRTIO_BLK_F_` prefix, comma-separated; `none` for 0.
    """
    names = []
    for bit in range(bits.bit_length()):
        mask = 1 << bit
        if not bits & mask:
            continue
        try:
            name = Feature(mask).name or ""
        except ValueError:
            name = ""
        names.append(_short(name) if name else f"bit {bit}")
    return ", ".join(names) or "none"


def _short(name: str) -> str:
    return name.partition("_F_")[2]
