"""Modes of a node: cache, discard, read-only; their short names, and what children inherit (block layer row B06).

Inheritance gives defaults only: what a child's options say explicitly wins. It works on options, not on flags (row
C7); `open_flags` shows the outcome as the flags that QEMU's documentation speaks of.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vhostblk.block.flags import OpenFlag
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.node import Role
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.node import BlockNode
    from vhostblk.block.options import NodeOptions

_TRUE = (True, "on", "yes", "true", "y")


@lean_dataclass(frozen=True, slots=True)
class CacheMode:
    """What a cache mode's name stands for.

    Attributes: direct, no_flush: `cache.direct` and `cache.no-flush` of the node. writethrough: the device has no
        write cache (row C3: a property of the export, not of the node).
    """

    direct: bool
    no_flush: bool
    writethrough: bool

    @property
    def options(self) -> dict[str, Any]:
        """The part that is the node's."""
        return {"cache.direct": self.direct, "cache.no-flush": self.no_flush}


CACHE_MODES: Mapping[str, CacheMode] = MappingProxyType(
    {
        "none": CacheMode(direct=True, no_flush=False, writethrough=False),
        "off": CacheMode(direct=True, no_flush=False, writethrough=False),
        "directsync": CacheMode(direct=True, no_flush=False, writethrough=True),
        "writeback": CacheMode(direct=False, no_flush=False, writethrough=False),
        "unsafe": CacheMode(direct=False, no_flush=True, writethrough=False),
        "writethrough": CacheMode(direct=False, no_flush=False, writethrough=True),
    }
)

_DISCARD_MODES: Mapping[str, OpenFlag] = MappingProxyType(
    {
        "ignore": OpenFlag(0),
        "off": OpenFlag(0),
        "unmap": OpenFlag.UNMAP,
        "on": OpenFlag.UNMAP,
    }
)
_AIO_MODES: Mapping[str, OpenFlag] = MappingProxyType(
    {
        "threads": OpenFlag(0),
        "native": OpenFlag.NATIVE_AIO,
        "io_uring": OpenFlag.IO_URING,
    }
)


def parse_cache_mode(name: str, what: str = "cache") -> CacheMode:
    """The meaning of `-t none` and the like (row B06.1).

    Args:
        what: how the message calls it.

    Raises:
        ConfigError: there is no such mode.
    """
    if name not in CACHE_MODES:
        raise ConfigError(f"Invalid {what} option: {name}")
    return CACHE_MODES[name]


def parse_discard_mode(name: str) -> OpenFlag:
    """UNMAP or nothing, for `discard=unmap` and the like (row B06.2).

    Raises:
        ConfigError: there is no such mode.
    """
    return _look_up(_DISCARD_MODES, name, "discard")


def parse_aio_mode(name: str) -> OpenFlag:
    """What `aio=io_uring` and the like ask for (row B06.3); nothing is a pool of threads.

    Raises:
        ConfigError: there is no such mode.
    """
    return _look_up(_AIO_MODES, name, "aio")


def _look_up(modes: Mapping[str, OpenFlag], name: str, what: str) -> OpenFlag:
    if name not in modes:
        raise ConfigError(f"Invalid {what} option: {name}")
    return modes[name]


def inherited_modes(parent: NodeOptions, role: Role, own: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a child has from its parent, where it does not say otherwise (rows B06.5 to B06.7).

    Args:
        role: of the child.
        own: what the child's options say themselves.
    """
    modes: dict[str, Any] = {
        "cache.direct": parent.cache_direct,
        "cache.no-flush": parent.cache_no_flush,
        # The parent decides what to discard; whatever is below obeys.
        "discard": "unmap",
        "force-share": parent.force_share,
        "active": parent.active,
    }
    if role & Role.COW:
        # Overlays are written, not what is under them.
        modes.update({"read-only": True, "auto-read-only": False})
    else:
        modes.update({"read-only": parent.read_only, "auto-read-only": parent.auto_read_only})
    if own.get("read-only", modes["read-only"]) not in _TRUE:
        del modes["force-share"]
    return {name: value for name, value in modes.items() if name not in own}


def open_flags(node: BlockNode) -> OpenFlag:
    """How a node is open now."""
    flags = OpenFlag(0)
    common = node.common
    for applies, flag in (
        (not node.read_only, OpenFlag.RDWR),
        (not node.read_only or common.auto_read_only, OpenFlag.ALLOW_RDWR),
        (common.auto_read_only, OpenFlag.AUTO_RDONLY),
        (common.cache_direct, OpenFlag.NOCACHE),
        (node.no_flush, OpenFlag.NO_FLUSH),
        (node.unmap, OpenFlag.UNMAP),
        (node.inactive, OpenFlag.INACTIVE),
        (node.is_protocol, OpenFlag.PROTOCOL),
        (getattr(node.options, "aio", None) == "io_uring", OpenFlag.IO_URING),
    ):
        if applies:
            flags |= flag
    return flags
