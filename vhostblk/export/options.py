"""The options of an export, in QEMU's words.

Sans-io: what the options name (a node, an iothread, a socket) is looked up elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vhostblk.block.keyval import flatten
from vhostblk.block.options import (
    BOOLEAN,
    IDENTIFIER,
    INTEGER,
    SIZE,
    STRING,
    choice,
    consume,
    describe_options,
    option,
)
from vhostblk.block.seconds import SECONDS
from vhostblk.errors import ConfigError
from vhostblk.export import vq_mapping
from vhostblk.export.error_policy import ErrorPolicy, OnError
from vhostblk.export.socket_options import (
    GROUP,
    GROUPS,
    MODE,
    OWNER,
    USERS,
    peer_rule,
    socket_access,
)
from vhostblk.vhost.access import PeerRule, SocketAccess
from vhostblk.vhost.session import MAX_QUEUES

# QEMU asks for one queue per vCPU unless told otherwise.
DEFAULT_QUEUES = 64
DEFAULT_SERIAL = "vhostblk"
# Segments of one DISCARD or WRITE_ZEROES request. qemu-storage-daemon takes one, and QEMU's tests hold whoever takes
# its options to that.
DEFAULT_SEGMENTS = 32
QEMU_SEGMENTS = 1
# Seconds. Silence costs nobody anything before the first message, and nobody is slow in the middle of one; so they are
# generous. A guest that is paused, or in a debugger, is between two messages, where there is no limit.
DEFAULT_HANDSHAKE_TIMEOUT = 60
DEFAULT_MESSAGE_TIMEOUT = 60
# The same, of a disk: after that it is worth a line in the log.
DEFAULT_STALL_WARNING = 30
# What the engine can hold without allocating.
_MAX_SEGMENTS = 64
_POLICY = ErrorPolicy()
_AS_IT_COMES = SocketAccess()
ERROR_POLICIES = tuple(policy.value for policy in OnError)


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """What an export is told.

    Attributes:
        socket_path, fd: one of them says where to listen: a path, or an inherited listening socket.
        io_threads: names of iothread objects; without any, `own_threads` threads of its own.
        queue_threads: for each queue, which of the threads serves it; empty: they take turns.
        max_segments: of one DISCARD or WRITE_ZEROES request.
        logical_block_size: bytes; None: the disk's own.
        pin_memory: with O_DIRECT, keep guest memory pinned. Only for guests that never give memory back.
        errors: what becomes of requests that the disk fails.
        fixed_iothread: it is not to be moved to other threads.
        socket_access: mode and owner of the socket file.
        peers: who is served of those that can connect; None: everybody.
        allow_inactive: the image is ours only while queues run, so that another daemon can have it in between.
        handshake_timeout: seconds until a connection that has not said anything is hung up on; 0: never.
        stall_warning: seconds after which the log says that the disk does not answer; 0: never.
        message_timeout: seconds that a message may take once it has begun, and an answer until it is read; 0: for ever.
    """

    id: str
    node_name: str
    socket_path: str | None = None
    fd: int | None = None
    writable: bool = False
    write_cache: bool = True
    serial: str = DEFAULT_SERIAL
    num_queues: int = DEFAULT_QUEUES
    max_segments: int = DEFAULT_SEGMENTS
    logical_block_size: int | None = None
    pin_memory: bool = False
    errors: ErrorPolicy = _POLICY
    io_threads: tuple[str, ...] = ()
    queue_threads: tuple[int, ...] = ()
    own_threads: int = 1
    fixed_iothread: bool = False
    allow_inactive: bool = False
    socket_access: SocketAccess = _AS_IT_COMES
    peers: PeerRule | None = None
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT
    message_timeout: float = DEFAULT_MESSAGE_TIMEOUT
    stall_warning: float = DEFAULT_STALL_WARNING

    def __post_init__(self) -> None:
        if not 1 <= self.num_queues <= MAX_QUEUES:
            raise ConfigError(f"num-queues={self.num_queues}: must be 1 to {MAX_QUEUES}")
        if not 1 <= self.max_segments <= _MAX_SEGMENTS:
            raise ConfigError(f"max-segments={self.max_segments}: must be 1 to {_MAX_SEGMENTS}")
        if self.own_threads < 1:
            raise ConfigError(f"iothreads={self.own_threads}: at least 1")
        size = self.logical_block_size
        if size is not None and (size < 512 or size > 65536 or size & (size - 1)):
            raise ConfigError(
                f"logical-block-size={size}: must be a power of two from 512 to 65536"
            )


@dataclass(frozen=True, slots=True)
class _Options:
    """`--export`, as qemu-storage-daemon spells it; `serial`, `rerror` and `werror` as QEMU's devices do;
    `max-segments`, `pin-memory`, the time-outs and who may connect are ours."""

    type: str = option(choice("vhost-user-blk"), about="the protocol")
    id: str = option(IDENTIFIER, about="name of the export")
    node_name: str = option(STRING, about="the block node that is served")
    addr_type: str = option(choice("unix", "fd"), about="how to listen", name="addr.type")
    addr_path: str | None = option(STRING, None, about="path of the socket", name="addr.path")
    addr_str: str | None = option(STRING, None, about="number of the inherited fd", name="addr.str")
    addr_mode: int | None = option(
        MODE, None, about="permissions of the socket file, in octal digits", name="addr.mode"
    )
    addr_owner: tuple[int, int | None] | None = option(
        OWNER, None, about="whose it is: USER or USER:GROUP", name="addr.owner"
    )
    addr_group: int | None = option(GROUP, None, about="its group", name="addr.group")
    allow_user: tuple[int, ...] = option(USERS, (), about="serve nobody else who connects but ...")
    allow_group: tuple[int, ...] = option(GROUPS, (), about="... these users, and these groups")
    writable: bool = option(BOOLEAN, False, about="whether the guest may write")
    writethrough: bool = option(BOOLEAN, False, about="make every write durable")
    iothread: str | None = option(STRING, None, about="the iothread object that serves the queues")
    iothread_vq_mapping: tuple[vq_mapping.VqMapping, ...] | None = option(
        vq_mapping.MAPPING, None, about="several iothread objects, and which queues each serves"
    )
    fixed_iothread: bool = option(BOOLEAN, False, about="never move it to other threads")
    allow_inactive: bool = option(
        BOOLEAN, False, about="have the image only while queues run (migration)"
    )
    logical_block_size: int | None = option(SIZE, None, about="what the guest is told, bytes")
    num_queues: int = option(INTEGER, DEFAULT_QUEUES, about="most queues a guest may use")
    max_segments: int = option(
        INTEGER, QEMU_SEGMENTS, about="segments of one discard or write-zeroes request"
    )
    pin_memory: bool = option(
        BOOLEAN, False, about="pin guest memory for O_DIRECT; never with ballooning"
    )
    serial: str = option(STRING, DEFAULT_SERIAL, about="at most 20 bytes")
    rerror: str = option(
        choice(*ERROR_POLICIES), "auto", about="what to do when the disk fails a read; auto: report"
    )
    werror: str = option(
        choice(*ERROR_POLICIES),
        "auto",
        about="what to do when the disk fails a write, flush, discard or zero-write; auto: enospc",
    )
    handshake_timeout: float = option(
        SECONDS,
        DEFAULT_HANDSHAKE_TIMEOUT,
        about="hang up on a connection whose first message is not there after that; 0: never",
    )
    message_timeout: float = option(
        SECONDS,
        DEFAULT_MESSAGE_TIMEOUT,
        about="hang up on a front-end that is in the middle of a message, or does not read an answer, for that long; "
        "0: never",
    )
    stall_warning: float = option(
        SECONDS,
        DEFAULT_STALL_WARNING,
        about="say in the log that the disk does not answer when a request takes that long; 0: never",
    )


def describe_export() -> list[tuple[str, str, str]]:
    """The options of an export; see `describe_options`."""
    return describe_options(_Options)


def parse_export(options: Mapping[str, Any]) -> ExportConfig:
    """Understand an `--export`.

    Args:
        options: nested, as parsed.

    Raises:
        ConfigError: names the option.
    """
    flat = flatten(options)
    vq_mapping.unflatten(flat)
    parsed = consume(_Options, flat)
    for name in flat:
        raise ConfigError(f"Parameter '{name}' is unexpected")
    fd = _listening_fd(parsed)
    io_threads, queue_threads = vq_mapping.assign(
        parsed.iothread_vq_mapping or (), parsed.num_queues
    )
    if parsed.iothread is not None:
        if io_threads:
            raise ConfigError(
                f"iothread and {vq_mapping.NAME} properties cannot be set at the same time"
            )
        io_threads = (parsed.iothread,)
    return ExportConfig(
        id=parsed.id,
        node_name=parsed.node_name,
        socket_path=parsed.addr_path if parsed.addr_type == "unix" else None,
        fd=fd,
        writable=parsed.writable,
        write_cache=not parsed.writethrough,
        serial=parsed.serial,
        num_queues=parsed.num_queues,
        max_segments=parsed.max_segments,
        logical_block_size=parsed.logical_block_size,
        pin_memory=parsed.pin_memory,
        errors=ErrorPolicy(OnError(parsed.rerror), OnError(parsed.werror)),
        io_threads=io_threads,
        queue_threads=queue_threads,
        fixed_iothread=parsed.fixed_iothread,
        allow_inactive=parsed.allow_inactive,
        socket_access=socket_access(parsed.addr_mode, parsed.addr_owner, parsed.addr_group),
        peers=peer_rule(parsed.allow_user, parsed.allow_group),
        handshake_timeout=parsed.handshake_timeout,
        message_timeout=parsed.message_timeout,
        stall_warning=parsed.stall_warning,
    )


def _listening_fd(parsed: _Options) -> int | None:
    """The fd to listen on, or None for a path; both with the options that belong to them, and no others."""
    others: dict[str, Any] = {"addr.str": parsed.addr_str}
    if parsed.addr_type == "fd":
        # A socket that is passed is as whoever opened it has made it.
        others = {
            "addr.path": parsed.addr_path,
            "addr.mode": parsed.addr_mode,
            "addr.owner": parsed.addr_owner,
            "addr.group": parsed.addr_group,
        }
    for name, value in others.items():
        if value is not None:
            raise ConfigError(f"Parameter '{name}' is unexpected with addr.type={parsed.addr_type}")
    if parsed.addr_type == "unix":
        if parsed.addr_path is None:
            raise ConfigError("Parameter 'addr.path' is missing")
        return None
    if parsed.addr_str is None:
        raise ConfigError("Parameter 'addr.str' is missing")
    if not (parsed.addr_str.isascii() and parsed.addr_str.isdigit()) or len(parsed.addr_str) > 9:
        raise ConfigError(f"addr.str={parsed.addr_str}: must be the number of an open fd")
    return int(parsed.addr_str)
