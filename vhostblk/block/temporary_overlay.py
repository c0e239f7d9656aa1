"""`snapshot=on`: an image is left as it is, and what is written goes to an overlay that nobody can keep (row B33).

Theory of operation: the image is opened read-only, without the name that the user has given. An empty qcow2 image of
the same size is made in a file that has lost its name before anything is in it, so that whatever becomes of this
process, nothing is left. The overlay is on top, and has the name, and the modes that are about requests. Its file is
in the page cache and is never flushed: what nobody keeps need not be durable.

Knows nothing about who opens images.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vhostblk.block import create, opening
from vhostblk.block.filename import temporary_file
from vhostblk.block.node import BlockNode
from vhostblk.block.options import to_boolean
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph

Open = Callable[[dict[str, Any]], Awaitable[BlockNode]]

# What users see of a node, and not what is below: that only reads.
_MOVED = ("node-name", "read-only", "discard", "detect-zeroes")


async def open_top(graph: BlockGraph, flat: dict[str, Any], open_image: Open) -> BlockNode:
    """Open a node that nobody is the parent of, with an overlay on top if `snapshot=on` is among its options.

    Args:
        flat: consumed.
        open_image: opens the node by the options that are left.

    Raises:
        ConfigError: as `open_image`; the overlay cannot be made: names its file.
    """
    if not to_boolean("snapshot", flat.pop("snapshot", False)):
        return await open_image(flat)
    options = {name: flat.pop(name) for name in _MOVED if name in flat}
    # What the overlay shows is the image's, so it waits with it until that is ours (row B40).
    options |= {name: flat[name] for name in ("active",) if name in flat}
    flat.update({"read-only": True, "auto-read-only": False})
    image = await open_image(flat)
    try:
        return await _overlay(graph, image, options)
    except BaseException:
        await graph.collect(image)
        raise


async def _overlay(graph: BlockGraph, image: BlockNode, options: dict[str, Any]) -> BlockNode:
    try:
        path = await asyncio.to_thread(temporary_file)
    except OSError as error:
        raise ConfigError(
            f"Could not create a temporary file: {error.strerror}", error.errno or 0
        ) from None
    fd = -1
    try:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.unlink(path)
        nameless = {"file.driver": "file", "file.filename": f"/proc/self/fd/{fd}"}
        await create.create(
            graph, {"driver": "qcow2", "size": image.length, **nameless}, locked=True
        )
        overlay = await opening.open_node(
            graph,
            {
                "driver": "qcow2",
                "cache.direct": False,
                "cache.no-flush": True,
                **options,
                **nameless,
                "backing": image.node_name,
            },
        )
    except (ConfigError, BlockError, OSError) as error:
        number = error.errno or 0
        raise ConfigError(f"Could not create temporary overlay '{path}': {error}", number) from None
    finally:
        if fd >= 0:
            os.close(fd)  # the node has its own
    _call(overlay.children["file"].node, path)
    return overlay


def _call(file: BlockNode, path: str) -> None:
    """The file is known by the name it had; the number of our descriptor may soon be another file's."""
    file.given["filename"] = path
    file.set_options(replace(file.options, filename=path))
