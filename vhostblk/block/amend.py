"""Changing what an image is like, after it was made (block layer row B35.8).

A driver that can states the options once (`Driver.amend_options_type`), in the spelling of `qemu-img amend -o`; what is
not said stays as it is. Nobody else uses the node meanwhile. Knows nothing about formats.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vhostblk.block.keyval import flatten, parse_flat
from vhostblk.block.op_blockers import OpType, check_op
from vhostblk.block.operation import Operation
from vhostblk.block.options import consume_all, option_names
from vhostblk.block.permissions import Perm
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph
    from vhostblk.block.node import BlockNode

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is to do, in units of the driver's choice, which may change."""


async def amend(
    graph: BlockGraph,
    node: BlockNode,
    options: Mapping[str, Any] | str,
    progress: Progress | None = None,
) -> None:
    """Change an image.

    Args:
        options: as `qemu-img amend -o` takes them.

    Raises:
        ConfigError: one line; ENOTSUP: the driver cannot, or not that; EBUSY: somebody uses the node.
        BlockError: EACCES: the node is read-only; or a child's errno: what was changed so far stays so.
    """
    flat = parse_flat(options) if isinstance(options, str) else flatten(options)
    flat = {name.replace("-", "_"): value for name, value in flat.items()}
    driver = type(node)
    if driver.amend_options_type is None:
        raise ConfigError(
            f"Format driver '{driver.driver_name}' does not support option amendment", errno.ENOTSUP
        )
    known = option_names(driver.amend_options_type)
    makes = driver.create_options_type
    for name in flat:
        if name not in known and makes is not None and name in option_names(makes):
            raise ConfigError(
                f"Parameter '{name}' is only supported for image creation", errno.ENOTSUP
            )
    parsed = consume_all(driver.amend_options_type, flat)
    if node.read_only:
        raise BlockError(errno.EACCES, f"{node.node_name}: node is read-only")
    check_op(node, OpType.RESIZE)
    perm = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
    async with graph.changing():
        user = Operation(node, f"amending '{node.node_name}'", perm, Perm.ALL)
    try:
        async with user.alone():
            await node.driver_amend(parsed, progress or (lambda done, total: None))
    finally:
        await user.finish()
