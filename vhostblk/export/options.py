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
    option,
)
from vhostblk.errors import ConfigError
from vhostblk.export import vq_mapping
from vhostblk.export.error_policy import ErrorPolicy, OnError
from vhostblk.vhost.session import MAX_QUEUES

# QEMU asks for one queue per vCPU unless told otherwise.
DEFAULT_QUEUES = 64
DEFAULT_SERIAL = "vhostblk"
# Segments of one DISCARD or WRITE_ZEROES request. qemu-storage-daemon takes one, and QEMU's tests hold whoever takes
# its options to that.
DEFAULT_SEGMENTS = 32
QEMU_SEGMENTS = 1
# What the engine can hold without allocating.
_MAX_SEGMENTS = 64
_POLICY = ErrorPolicy()
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
    `max-segments` and `pin-memory` are ours."""

    type: str = option(choice("vhost-user-blk"), about="the protocol")
    id: str = option(IDENTIFIER, about="name of the export")
    node_name: str = option(STRING, about="the block node that is served")
    addr_type: str = option(choice("unix", "fd"), about="how to listen", name="addr.type")
    addr_path: str | None = option(STRING, None, about="path of the socket", name="addr.path")
    addr_str: str | None = option(STRING, None, about="number of the inherited fd", name="addr.str")
    writable: bool = option(BOOLEAN, False, about="whether the guest may write")
    writethrough: bool = option(BOOLEAN, False, about="make every write durable")
    iothread: str | None = option(STRING, None, about="the iothread object that serves the queues")
    iothread_vq_mapping: tuple[vq_mapping.VqMapping, ...] | None = option(
        vq_mapping.MAPPING, None, about="several iothread objects, and which queues each serves"
    )
    fixed_iothread: bool = option(BOOLEAN, False, about="never move it to other threads")
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
    wrong = ("addr.str", parsed.addr_str)
    if parsed.addr_type == "fd":
        wrong = ("addr.path", parsed.addr_path)
    if wrong[1] is not None:
        raise ConfigError(f"Parameter '{wrong[0]}' is unexpected with addr.type={parsed.addr_type}")
    fd = None
    if parsed.addr_type == "unix":
        if parsed.addr_path is None:
            raise ConfigError("Parameter 'addr.path' is missing")
    elif parsed.addr_str is None:
        raise ConfigError("Parameter 'addr.str' is missing")
    elif not (parsed.addr_str.isascii() and parsed.addr_str.isdigit()) or len(parsed.addr_str) > 9:
        raise ConfigError(f"addr.str={parsed.addr_str}: must be the number of an open fd")
    else:
        fd = int(parsed.addr_str)
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
    )
