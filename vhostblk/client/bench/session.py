"""A guest for the generator: connected, negotiated, memory shared, rings started.

Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import socket
import struct
from types import TracebackType
from typing import Self

from vhostblk.client.bench.options import BenchOptions
from vhostblk.client.client import FEATURES, Client
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.errors import ConfigError
from vhostblk.native.load import (
    LoadOp,
    LoadOptions,
    LoadRing,
    address_of,
    slots_size,
)
from vhostblk.virtio.blk import SECTOR
from vhostblk.virtio.driver import DriverQueue
from vhostblk.virtio.features import Feature
from vhostblk.virtio.packed_driver import PackedDriverQueue

__all__ = ["BenchSession", "load_options"]

_UCRED = struct.Struct("=iII")
_PAGE = 4096
_INDIRECT_ENTRIES = 128
_NEEDED = {
    LoadOp.FLUSH: Feature.VIRTIO_BLK_F_FLUSH,
    LoadOp.DISCARD: Feature.VIRTIO_BLK_F_DISCARD,
    LoadOp.WRITE_ZEROES: Feature.VIRTIO_BLK_F_WRITE_ZEROES,
}


class BenchSession:
    """A connection that a generator can be let loose on.

    Args:
        path: the back-end's socket.
        options: checked.

    Raises:
        ConfigError: the back-end does not have what the options ask for.
        OSError, PeerError, SessionError, TimeoutError: see `Client.connect`.

    Context: one thread. Owns: the client.
    """

    def __init__(self, path: str, options: BenchOptions) -> None:
        self.path = path
        self.options = options
        features = FEATURES
        if not options.indirect:
            features &= ~Feature.VIRTIO_F_INDIRECT_DESC
        if not options.event_idx:
            features &= ~Feature.VIRTIO_F_EVENT_IDX
        if options.packed:
            features |= Feature.VIRTIO_F_RING_PACKED
        # Sizes do not depend on the disk's.
        shape = load_options(options, 0, options.block_max)
        self._slots = -(-slots_size(shape) // _PAGE) * _PAGE
        ring = DriverQueue.area_size(options.ring_size, _INDIRECT_ENTRIES)
        each = self._slots + -(-ring // _PAGE) * _PAGE
        # Neither regions nor eventfds are made before somebody listens.
        sock = _dial(path, options.timeout)
        self._is_used = False
        self.pid = options.pid or _peer_pid(sock)
        """The back-end's process, 0 if it is not known."""
        memory = SharedMemory([each * options.queues])
        self.client = Client.connect(
            sock,
            queues=options.queues,
            queue_size=options.ring_size,
            features=features,
            memory=memory,
            timeout=options.timeout,
        )
        try:
            self.load_options = self._fit()
            self.rings = [self._ring(index) for index in range(options.queues)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.client.abandon()
        self.close()

    def close(self) -> None:
        """Stop the rings and disconnect. Idempotent."""
        self.client.close()

    @property
    def connection(self) -> int:
        """Fd on which nothing comes but the end."""
        return self.client.control.connection.fileno()

    def renew_rings(self) -> None:
        """Make packed rings new again, which have nothing in flight: a generator begins at their start."""
        for index, queue in enumerate(self.client.queues):
            if isinstance(queue.driver, PackedDriverQueue) and self._is_used:
                self.client.stop_queue(index)
                queue.driver.set_place(0)
                self.client.start_queue(index)
        self._is_used = True

    def _fit(self) -> LoadOptions:
        """Choose the range, and refuse what the disk cannot do."""
        options, client = self.options, self.client
        features, config = client.control.features, client.config
        if options.indirect and not features & Feature.VIRTIO_F_INDIRECT_DESC:
            raise ConfigError("the back-end has no indirect descriptors: --direct")
        if options.packed and not features & Feature.VIRTIO_F_RING_PACKED:
            raise ConfigError("the back-end has no packed rings")
        for op, feature in _NEEDED.items():
            wanted = options.pattern.has(op) or (op == LoadOp.FLUSH and options.flush_every)
            if wanted and not features & feature:
                raise ConfigError(f"the back-end does not offer {feature.name}")
        writes = any(
            options.pattern.has(op) for op in LoadOp if op not in (LoadOp.READ, LoadOp.FLUSH)
        )
        if writes and features & Feature.VIRTIO_BLK_F_RO:
            raise ConfigError(f"pattern '{options.pattern.name}': the disk is read-only")
        if features & Feature.VIRTIO_BLK_F_SEG_MAX and config.seg_max < options.segments:
            raise ConfigError(f"segments {options.segments}: the back-end takes {config.seg_max}")
        for op, most in (
            (LoadOp.DISCARD, config.max_discard_sectors),
            (LoadOp.WRITE_ZEROES, config.max_write_zeroes_sectors),
        ):
            if options.pattern.has(op) and options.block_max > most * SECTOR:
                raise ConfigError(f"block-size: the back-end takes {most * SECTOR} for a {op.name}")
        room = client.capacity - options.offset
        size = (options.size or max(room, 0)) // options.block_min * options.block_min
        if size > room:
            raise ConfigError(
                f"offset {options.offset}, size {options.size}: the disk has {client.capacity} bytes"
            )
        if size < options.block_max:
            raise ConfigError(f"block-size {options.block_max}: larger than the range of {size}")
        return load_options(options, options.offset, size)

    def _ring(self, index: int) -> LoadRing:
        client = self.client
        queue = client.queues[index]
        driver = queue.driver
        region = client.memory.regions[0]
        base = address_of(region.view)
        at = base + driver.gpa - region.gpa
        slots = client.memory.allocate(self._slots, alignment=_PAGE, contiguous=True)
        start = slots.gpa - region.gpa
        # Touched now, and not all the same: zeroes and duplicates are cheap for some.
        noise = os.urandom(1 << 16)
        for offset in range(start, start + slots.length, len(noise)):
            end = min(offset + len(noise), start + slots.length)
            region.view[offset:end] = noise[: end - offset]
        return LoadRing(
            desc=at + driver.desc_offset,
            avail=at + driver.avail_offset,
            used=at + driver.used_offset,
            size=driver.size,
            kick_fd=queue.kick_fd,
            call_fd=queue.call_fd,
            slots=base + start,
            slots_gpa=slots.gpa,
        )


def load_options(options: BenchOptions, offset: int, size: int) -> LoadOptions:
    """Translate options for a range that the disk has."""
    return LoadOptions(
        offset=offset,
        size=size,
        block_min=options.block_min,
        block_max=options.block_max,
        weights=options.pattern.weights,
        random=options.pattern.random,
        once=options.once,
        flush_every=options.flush_every,
        unmap=options.unmap,
        segments=options.segments,
        depth=options.depth,
        batch=options.batch,
        indirect=options.indirect,
        event_idx=options.event_idx,
        packed=options.packed,
        sleep=options.sleep,
        threads=options.threads,
        rate=options.rate,
        requests=options.requests,
        seed=options.seed,
    )


def _dial(path: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except OSError as error:
        sock.close()
        if error.filename is None and error.errno:
            error.filename = path
        raise
    return sock


def _peer_pid(sock: socket.socket) -> int:
    """The process that listens; it may be somebody else's child, or in a namespace we do not see."""
    pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return max(int(pid), 0)
