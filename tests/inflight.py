"""Devices that end before any of their stores, in Python and in C, over memory that stays: for tests of recovery.

What a killed process leaves behind are the stores it has made, in order. The engine's code is compiled with a hook
before each of them (tests/native/inflight); the readable rings are ended before any of their lines that stores.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Protocol

from tests.requirements import require
from vhostblk import native
from vhostblk.errors import GuestError, PeerError
from vhostblk.vhost import inflight_packed, inflight_split
from vhostblk.vhost.inflight_packed import InflightPacked
from vhostblk.vhost.inflight_split import InflightSplit
from vhostblk.virtio import packed, split
from vhostblk.virtio.driver import Buffer, DriverQueue, Used
from vhostblk.virtio.memory import FlatMemory
from vhostblk.virtio.packed import PackedVirtqueue
from vhostblk.virtio.split import SplitVirtqueue

__all__ = [
    "BASE",
    "Device",
    "Ended",
    "EngineDevice",
    "EngineLibrary",
    "PythonDevice",
    "RefusedError",
    "Rings",
]

BASE = 0x4000_0000
_BUILD = Path(__file__).parent / "native" / "inflight" / "build.sh"
_ENDED = -1000


class Ended(BaseException):
    """The device was killed. Not an `Exception`: no code of ours may handle it."""


class RefusedError(Exception):
    """The device does not start with what it finds."""


class PackedDriver:
    """The driver's half of a packed ring, as far as recovery needs it (VIRTIO 1.2 §2.8)."""

    visible_base = 0x8000_8000
    """Where the ring began: a front-end cannot see where it is."""
    desc_offset = 0
    _DESC = struct.Struct("<QIHH")
    _NEXT, _WRITE, _AVAIL, _USED = 1, 2, 1 << 7, 1 << 15

    def __init__(self, memory: memoryview, size: int) -> None:
        self._memory = memory
        self.size = size
        self.avail_offset, self.used_offset = 16 * size, 16 * size + 4
        self.free_descriptors = size
        self._ids = deque(range(size))
        self._chains: dict[int, int] = {}
        self._avail, self._avail_wrap = 0, True
        self._used, self._used_wrap = 0, True

    def add(self, readable: list[Buffer], writable: list[Buffer]) -> int:
        """Make a chain available, its first flags last."""
        buffers = [(b, 0) for b in readable] + [(b, self._WRITE) for b in writable]
        name = self._ids.popleft()
        slots: list[tuple[int, int]] = []
        for i, (buffer, flags) in enumerate(buffers):
            flags |= self._NEXT if i + 1 < len(buffers) else 0
            flags |= self._AVAIL if self._avail_wrap else self._USED
            slots.append((self._avail, flags))
            place = 16 * self._avail
            self._DESC.pack_into(
                self._memory, place, *buffer, name, flags if i else self._flags(place)
            )
            self._avail += 1
            if self._avail == self.size:
                self._avail, self._avail_wrap = 0, not self._avail_wrap
        first, flags = slots[0]
        struct.pack_into("<H", self._memory, 16 * first + 14, flags)
        self._chains[name] = len(buffers)
        self.free_descriptors -= len(buffers)
        return name

    def publish(self) -> None:
        """Nothing is left to be shown."""

    def reap(self) -> list[Used]:
        """Take back what was used."""
        reaped: list[Used] = []
        while True:
            _, length, name, flags = self._DESC.unpack_from(self._memory, 16 * self._used)
            wanted = (self._AVAIL | self._USED) if self._used_wrap else 0
            if flags & (self._AVAIL | self._USED) != wanted:
                return reaped
            count = self._chains.pop(
                name
            )  # a KeyError is a chain that came back twice, or never was
            self._ids.append(name)
            self.free_descriptors += count
            self._used += count
            if self._used >= self.size:
                self._used, self._used_wrap = self._used - self.size, not self._used_wrap
            reaped.append(Used(name, length, None))

    def _flags(self, place: int) -> int:
        return int.from_bytes(self._memory[place + 14 : place + 16], "little")


class Rings:
    """Memory that outlives devices: a driver's ring, and its part of an in-flight region."""

    def __init__(self, size: int, part: int, *, start: int = 0, packed: bool = False) -> None:
        self.size = size
        self.memory = memoryview(bytearray(-(-DriverQueue.area_size(size) // 4096) * 4096 + 4096))
        self.part = memoryview(bytearray(part))
        self.driver: DriverQueue | PackedDriver
        if packed:
            self.driver = PackedDriver(self.memory, size)
        else:
            self.driver = DriverQueue(self.memory, BASE, size)
            self.driver.set_indices(start)


class Device(Protocol):
    """One life of a device. What it was in the middle of is lost with it."""

    replays: int

    def pop(self) -> int | None:
        """The next chain's head."""
        ...

    def push(self, head: int) -> None:
        """Give it back."""
        ...

    def publish(self) -> None:
        """Show the driver what was given back."""
        ...


# ---------------------------------------------------------------- in Python


def _storing_lines(path: str) -> frozenset[int]:
    """Lines that change memory which others see: an element is assigned, or something is packed into it."""
    lines = Path(path).read_text().splitlines()
    return frozenset(
        number for number, line in enumerate(lines, 1) if re.search(r"\] = |pack_into\(", line)
    )


class PythonDevice:
    """The readable ring; it publishes each chain at once."""

    _STORES: ClassVar[dict[str, frozenset[int]]] = {
        str(module.__file__): _storing_lines(str(module.__file__))
        for module in (split, inflight_split, packed, inflight_packed)
    }

    def __init__(self, rings: Rings, base: int) -> None:
        driver, memory, size = rings.driver, FlatMemory(BASE, rings.memory), rings.size
        offsets = (driver.desc_offset, driver.avail_offset, driver.used_offset)
        areas = [BASE + offset for offset in offsets]
        self._ring: SplitVirtqueue | PackedVirtqueue
        try:
            if isinstance(driver, PackedDriver):
                self._ring = PackedVirtqueue(
                    memory, size, *areas, base=base, tracker=InflightPacked(rings.part)
                )
            else:
                self._ring = SplitVirtqueue(
                    memory, size, *areas, base=base, tracker=InflightSplit(rings.part)
                )
        except (GuestError, PeerError) as error:
            raise RefusedError(str(error)) from None
        self.replays = self._ring.replays

    def pop(self) -> int | None:
        """See `Device`."""
        chain = self._ring.pop()
        return None if chain is None else chain.head

    def push(self, head: int) -> None:
        """See `Device`."""
        self._ring.push(head, 1)

    def publish(self) -> None:
        """See `Device`."""

    @property
    def base(self) -> int:
        """Where it would be started again."""
        return self._ring.base

    @classmethod
    @contextmanager
    def ends_before(cls, store: int) -> Iterator[Callable[[], int]]:
        """Inside, devices end before so many lines that store; gives how many are left."""
        left = store

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if event == "line" and frame.f_lineno in cls._STORES[frame.f_code.co_filename]:
                left -= 1
                if not left:
                    sys.settrace(before)
                    raise Ended
            return on_line

        def on_call(frame: FrameType, event: str, argument: Any) -> Any:
            return on_line if frame.f_code.co_filename in cls._STORES else None

        before = sys.gettrace()
        sys.settrace(on_call)
        try:
            yield lambda: left
        finally:
            sys.settrace(before)


# ---------------------------------------------------------------- in C


class _Region(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("gpa", "uva", "size", "hva"))


class EngineLibrary:
    """The compiled model.

    Args:
        folder: where to compile it.
    """

    def __init__(self, folder: Path) -> None:
        output = folder / "model.so"
        environment = {**os.environ, "CC": require("gcc", group="compiler")}
        subprocess.run([_BUILD, output, "-Werror"], env=environment, check=True, timeout=100)
        self.calls = ctypes.CDLL(str(output))
        self.calls.model_config_size.restype = ctypes.c_uint64
        self.calls.model_stores_left.restype = ctypes.c_uint64
        u64 = ctypes.c_uint64
        self.calls.model_fill_config.argtypes = [
            ctypes.c_void_p, u64, u64, u64, *[ctypes.c_uint32] * 3, u64, u64,
        ]  # fmt: skip
        self.calls.model_end_before.argtypes = [u64]
        for name in ("pop", "push", "publish", "destroy", "base"):
            getattr(self.calls, f"model_{name}").argtypes = {
                "pop": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
                "push": [ctypes.c_void_p, *[ctypes.c_uint16] * 3, ctypes.c_uint32],
            }.get(name, [ctypes.c_void_p])

    @contextmanager
    def ends_before(self, store: int) -> Iterator[Callable[[], int]]:
        """Inside, devices end before so many stores; gives how many are left."""
        self.calls.model_end_before(store)
        try:
            yield lambda: int(self.calls.model_stores_left())
        finally:
            self.calls.model_end_before(0)


class EngineDevice:
    """The engine's ring."""

    def __init__(self, library: EngineLibrary, rings: Rings, base: int) -> None:
        self._calls = calls = library.calls
        self._rings = rings
        self._model = ctypes.c_void_p()
        self._names: dict[int, tuple[int, int]] = {}
        driver = rings.driver
        config = ctypes.create_string_buffer(calls.model_config_size())
        calls.model_fill_config(
            config,
            BASE + driver.desc_offset,
            BASE + driver.avail_offset,
            BASE + driver.used_offset,
            rings.size,
            base,
            int(isinstance(driver, PackedDriver)),
            native.address_of(rings.part),
            len(rings.part),
        )
        region = _Region(BASE, BASE, len(rings.memory), native.address_of(rings.memory))
        replays = ctypes.c_uint32()
        result = calls.model_create(
            ctypes.byref(region), config, ctypes.byref(self._model), ctypes.byref(replays)
        )
        if result == _ENDED:
            raise Ended
        if result:
            raise RefusedError(os.strerror(-result))
        self.replays = replays.value

    def __del__(self) -> None:
        if self._model:
            self._calls.model_destroy(self._model)

    @property
    def base(self) -> int:
        """Where it would be started again."""
        return int(self._calls.model_base(self._model))

    def pop(self) -> int | None:
        """See `Device`."""
        slots, entry = ctypes.c_uint16(), ctypes.c_uint16()
        head = self._calls.model_pop(self._model, ctypes.byref(slots), ctypes.byref(entry))
        if head == _ENDED:
            raise Ended
        if head < -1:
            raise GuestError("broken", -head - 100)
        self._names[head] = slots.value, entry.value
        return int(head) if head >= 0 else None

    def push(self, head: int) -> None:
        """See `Device`."""
        if self._calls.model_push(self._model, head, *self._names.pop(head), 1):
            raise Ended

    def publish(self) -> None:
        """See `Device`."""
        if self._calls.model_publish(self._model):
            raise Ended
