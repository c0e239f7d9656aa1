"""Backing chains for tests, beside a model of each layer: bytes, and which of them the layer has itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.qcow2_images import create, qemu_io
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.graph import BlockGraph
from vhostblk.block.node import BlockNode

Scenario = Callable[[BlockGraph, BlockNode], Awaitable[None]]


def with_chain(
    name: Path | str, scenario: Scenario, *drivers: type[BlockNode], **options: object
) -> None:
    """Open an image by name, run, close everything.

    Args:
        drivers: that there are besides the usual ones.
    """

    async def everything() -> None:
        graph = BlockGraph({**DRIVERS, **{driver.driver_name: driver for driver in drivers}})
        try:
            node = await graph.open_image(str(name), options)
            await scenario(graph, node)
        finally:
            await graph.close_all()

    asyncio.run(everything())


@dataclass
class Layer:
    """What one image shows if nothing is below, and where it has something."""

    name: str
    size: int
    shape: str = ""
    """What `qemu-img create -o` makes differently; `raw` is no qcow2 image."""
    data: bytearray = field(default_factory=bytearray)
    has: set[int] = field(default_factory=set)
    """Sectors."""

    def __post_init__(self) -> None:
        self.data = bytearray(self.size)
        if self.shape == "raw":
            self.has = set(range(self.size // 512))

    @property
    def driver(self) -> str:
        """Of the image."""
        return "raw" if self.shape == "raw" else "qcow2"

    def write(self, offset: int, data: bytes) -> None:
        """What a guest writes."""
        self.data[offset : offset + len(data)] = data
        self.has.update(range(offset // 512, (offset + len(data)) // 512))


def shown(layers: list[Layer]) -> bytes:
    """What the first of these layers shows, on top of the others."""
    top, *below = layers
    under = shown(below)[: top.size].ljust(top.size, b"\0") if below else bytes(top.size)
    content = bytearray(under)
    for sector in top.has:
        content[sector * 512 : sector * 512 + 512] = top.data[sector * 512 : sector * 512 + 512]
    return bytes(content)


def make(folder: Path, layers: list[Layer], rnd: random.Random) -> None:
    """Images for the layers, the first on top, with something in each."""
    for number in range(len(layers) - 1, -1, -1):
        layer = layers[number]
        path = folder / layer.name
        below = layers[number + 1] if number + 1 < len(layers) else None
        if layer.driver == "raw":
            layer.data[:] = rnd.randbytes(layer.size)
            path.write_bytes(layer.data)
            continue
        words: list[object] = ["-o", layer.shape] if layer.shape else []
        if below is not None:
            words += ["-b", below.name, "-F", below.driver]
        create(path, layer.size, *words)
        commands = []
        for _ in range(rnd.randrange(6)):
            offset = rnd.randrange(layer.size // 512)
            length = min(rnd.choice([1, 9, 130]), layer.size // 512 - offset)
            pattern = rnd.randrange(256)
            layer.write(offset * 512, bytes([pattern]) * (length * 512))
            kind = f"write -P {pattern}" if pattern else "write -z"
            commands.append(f"{kind} {offset * 512} {length * 512}")
        if commands:
            qemu_io(path, *commands)
