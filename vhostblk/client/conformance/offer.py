"""What a back-end offers before anything is used: features, queues, memory slots, configuration.

vhost-user, "Communication"; VIRTIO 1.2 §5.2.3 and §5.2.4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vhostblk.client.client import CONFIG_BYTES
from vhostblk.client.control import PROTOCOL_FEATURES, Control
from vhostblk.errors import PeerError
from vhostblk.vhost.message import U64, ProtocolFeature, Request
from vhostblk.virtio.blk import SECTOR, BlkConfig
from vhostblk.virtio.features import Feature, feature_names

__all__ = ["Offer", "protocol_feature_names", "read_offer"]

_F = Feature
# Fields of the configuration space that mean something only with a feature (VIRTIO 1.2 §5.2.4).
_FIELDS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (_F.VIRTIO_BLK_F_SIZE_MAX, ("size_max",)),
    (_F.VIRTIO_BLK_F_SEG_MAX, ("seg_max",)),
    (_F.VIRTIO_BLK_F_GEOMETRY, ("cylinders", "heads", "sectors")),
    (_F.VIRTIO_BLK_F_BLK_SIZE, ("blk_size",)),
    (
        _F.VIRTIO_BLK_F_TOPOLOGY,
        ("physical_block_exp", "alignment_offset", "min_io_size", "opt_io_size"),
    ),
    (_F.VIRTIO_BLK_F_CONFIG_WCE, ("writeback",)),
    (_F.VIRTIO_BLK_F_MQ, ("num_queues",)),
    (
        _F.VIRTIO_BLK_F_DISCARD,
        ("max_discard_sectors", "max_discard_seg", "discard_sector_alignment"),
    ),
    (
        _F.VIRTIO_BLK_F_WRITE_ZEROES,
        ("max_write_zeroes_sectors", "max_write_zeroes_seg", "write_zeroes_may_unmap"),
    ),
)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a back-end says about itself."""

    features: int
    """Virtio features."""
    protocol_features: ProtocolFeature = ProtocolFeature.NONE
    queues: int = 1
    """Queues; 1 where it cannot be asked."""
    max_mem_slots: int | None = None
    """Memory regions; None where it cannot be asked."""
    config: BlkConfig = dataclasses.field(default_factory=BlkConfig)
    """The configuration space as far as every driver reads it."""
    problems: tuple[str, ...] = ()
    """Questions that it refused, did not answer in time, or answered wrongly."""
    is_whole: bool = True
    """False: it did not answer in time, so there may be more than this."""

    @property
    def is_read_only(self) -> bool:
        """Whether it says that the disk cannot be written."""
        return bool(self.features & Feature.VIRTIO_BLK_F_RO)

    @property
    def capacity(self) -> int:
        """Bytes of the disk."""
        return self.config.capacity * SECTOR

    @property
    def block(self) -> int:
        """Bytes of the smallest request that every back-end has to serve."""
        if self.features & Feature.VIRTIO_BLK_F_BLK_SIZE:
            return max(self.config.blk_size, SECTOR)
        return SECTOR

    def fields(self) -> dict[str, int]:
        """Give the fields of the configuration space that mean something here."""
        names = ["capacity"]
        for feature, those in _FIELDS:
            if self.features & feature:
                names += those
        return {name: getattr(self.config, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Give it as what `json` writes."""
        return {
            "features": feature_names(self.features).split(", "),
            "features_bits": hex(self.features),
            "protocol_features": protocol_feature_names(self.protocol_features).split(", "),
            "protocol_features_bits": hex(self.protocol_features),
            "queues": self.queues,
            "max_mem_slots": self.max_mem_slots,
            "config": self.fields(),
            "problems": list(self.problems),
        }


def protocol_feature_names(features: ProtocolFeature) -> str:
    """Name protocol features, lowest bit first; `none` if there are none."""
    names = []
    for bit in range(int(features).bit_length()):
        if features & 1 << bit:
            try:
                names.append(ProtocolFeature(1 << bit).name or f"bit {bit}")
            except ValueError:
                names.append(f"bit {bit}")
    return ", ".join(names) or "none"


def read_offer(path: str, *, timeout: float) -> Offer:
    """Ask a back-end for all it offers.

    Args:
        path: of its socket.
        timeout: seconds for each answer.

    Raises:
        OSError: nobody listens there.
        PeerError, TimeoutError: it does not even answer GET_FEATURES.
    """
    control = Control(path, timeout=timeout, strict=False)
    try:
        control.ask(control.frontend.get_features())
        offer = Offer(control.frontend.features_offered)
        problems: list[str] = []
        try:
            offer = _ask_all(control, offer, problems)
        except (PeerError, TimeoutError) as error:
            problems.append(str(error))
            offer = dataclasses.replace(offer, is_whole=not isinstance(error, TimeoutError))
        return dataclasses.replace(offer, problems=tuple(problems))
    finally:
        control.close()


def _ask_all(control: Control, offer: Offer, problems: list[str]) -> Offer:
    """Ask what the features allow to be asked; a question that is refused does not keep from the next one."""
    control.negotiate_protocol(PROTOCOL_FEATURES)
    protocol = control.frontend.protocol_offered
    offer = dataclasses.replace(offer, protocol_features=protocol)
    if protocol & ProtocolFeature.CONFIG:
        try:
            data = control.get_config(0, CONFIG_BYTES)
            offer = dataclasses.replace(offer, config=BlkConfig.from_bytes(data))
        except PeerError as error:
            problems.append(str(error))
    else:
        problems.append("the configuration space cannot be read: no CONFIG")
    if protocol & ProtocolFeature.MQ:
        offer = dataclasses.replace(offer, queues=control.queue_count())
    if protocol & ProtocolFeature.CONFIGURE_MEM_SLOTS:
        answer = control.ask(control.frontend.request(Request.GET_MAX_MEM_SLOTS))
        assert isinstance(answer, U64)
        offer = dataclasses.replace(offer, max_mem_slots=answer.value)
    return offer
