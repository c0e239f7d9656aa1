"""Changing what an image is like, after it was made (block layer row B35.8).

A driver that can states the options once (`Driver.amend_options_type`), in the spelling of `qemu-img amend -o`; what is
not said stays as it is. Nobody else uses the node meanwhile. Knows nothing about formats.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vhostblk.block.creation import refuse_unknown
from vhostblk.block.image_options import ImageOptions, describe, known_options
from vhostblk.block.op_blockers import OpType, check_op
from vhostblk.block.operation import Operation
from vhostblk.block.options import consume_all
from vhostblk.block.permissions import Perm
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph
    from vhostblk.block.node import BlockNode
    from vhostblk.block.registry import DriverRegistry

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is to do, in units of the driver's choice, which may change."""


async def amend(
    graph: BlockGraph,
    node: BlockNode,
    options: Mapping[str, Any] | str,
    progress: Progress | None = None,
    *,
    force: bool = False,
) -> None:
    """Change an image.

    Args:
        options: as `qemu-img amend -o` takes them.
        force: also what may make the content unreadable for ever.

    Raises:
        ConfigError: one line; ENOTSUP: the driver cannot, or not that; EBUSY: somebody uses the node.
        BlockError: EACCES: the node is read-only; or a child's errno: what was changed so far stays so.
    """
    driver = type(node)
    said = ImageOptions(known_options(amend_options(driver)))
    try:
        said.say(options)
    except ConfigError as error:
        if _are_for_new_images(driver, options):
            hint = "This option is only supported for image creation"
            raise ConfigError(
                f"{error} ({hint})", error.errno, qemu_text=f"{error.qemu_text}\n{hint}"
            ) from None
        raise
    parsed = consume_all(amend_options(driver), said.values())
    if node.read_only:
        raise BlockError(errno.EACCES, f"{node.node_name}: node is read-only")
    check_op(node, OpType.RESIZE)
    perm = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
    async with graph.changing():
        user = Operation(node, f"amending '{node.node_name}'", perm, Perm.ALL)
    try:
        async with user.alone():
            await node.driver_amend(parsed, progress or (lambda done, total: None), force=force)
    finally:
        await user.finish()


def amend_options(driver: type[BlockNode]) -> type[Any]:
    """The options for changes of images of a driver.

    Raises:
        ConfigError: ENOTSUP: it cannot change any.
    """
    options_type = driver.amend_options_type()
    if options_type is None:
        raise ConfigError(
            f"Format driver '{driver.driver_name}' does not support option amendment", errno.ENOTSUP
        )
    return options_type


def help_on_amending(drivers: DriverRegistry, driver: str) -> str:
    """What can be changed, in lines (`-o help`).

    Raises:
        ConfigError: there is no such format, or it cannot change anything.
    """
    refuse_unknown(drivers, driver, "option amendment")
    known = known_options(amend_options(drivers[driver]))
    return f"Amend options for '{driver}':\n{describe(known.values())}"


def _are_for_new_images(driver: type[BlockNode], options: Mapping[str, Any] | str) -> bool:
    types = [kind for kind in (driver.amend_options_type(), driver.create_options_type()) if kind]
    try:
        ImageOptions(known_options(*types)).say(options)
    except ConfigError:
        return False
    return True
