"""Making images: in nodes, and by name; nothing is left behind that only looks like one (row B35).

A driver that can make images states the options once (`Driver.create_options_type`), in the spelling of `qemu-img
create -o`; programs may write dashes (`blockdev-create`). There are two ways in: `create` makes an image in nodes,
`create_image` in files that it makes itself, by name, with the checks that people want, in the order and the words of
`qemu-img create`; `NewImage` is the same in steps, for tools that show what they are about to do.

What is made how is in `creation.py`. Knows nothing about formats.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from vhostblk.block import opening
from vhostblk.block.creation import Creation, Driver, NewFile, create_options, refuse_unknown
from vhostblk.block.filename import backing_name
from vhostblk.block.flags import OpenFlag
from vhostblk.block.foreign_formats import QEMU_DRIVERS
from vhostblk.block.image_options import ImageOptions, describe, known_options
from vhostblk.block.keyval import flatten, parse_options
from vhostblk.block.limits import MAX_LENGTH, SECTOR_SIZE, align_up
from vhostblk.block.node import BlockNode
from vhostblk.block.options import consume_all, option_names
from vhostblk.block.registry import DriverRegistry
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph

_SAME_FILE = "Error: Trying to create an image with the same filename as the backing file"


class BackingFormatError(ConfigError):
    """Nobody said which format the backing file has.

    Attributes:
        found: the one that its content looks like, if it was looked at.
    """

    def __init__(self, found: str = "") -> None:
        detected = f" (detected format: {found})" if found else ""
        what = "Backing file specified without backing format"
        super().__init__(f"{what}{detected}", qemu_text=what)
        self.found = found


async def create(
    graph: BlockGraph, options: Mapping[str, Any] | str, *, locked: bool = False
) -> None:
    """Make an image in nodes, whatever they have now (`blockdev-create`).

    Args:
        options: `driver`, its create options, and its children: names of nodes, or how to open them.
        locked: the caller is inside `graph.changing()`.

    Raises:
        ConfigError: one line; ENOTSUP: the driver cannot.
        BlockError: a child's errno.
    """
    if isinstance(options, str):
        options = parse_options(options, "driver")
    flat = flatten(options)
    driver = graph.drivers.find(flat.pop("driver", None))
    options_type = create_options(driver, "Driver")
    graph.drivers.check_allowed(driver.driver_name, read_only=False)
    keys = driver.create_child_keys
    children = {name: flat.pop(name) for name in tuple(flat) if name.partition(".")[0] in keys}
    aliases = driver.create_aliases
    flat = {aliases.get(name, _spelled(name)): value for name, value in flat.items()}
    parsed = consume_all(options_type, flat)
    async with Creation(graph, f"{driver.driver_name} image", children, locked=locked) as creation:
        await driver.create(creation, parsed)


async def create_image(
    graph: BlockGraph,
    filename: str,
    driver: str,
    options: Mapping[str, Any] | str | None = None,
    *,
    size: int | None = None,
    backing_file: str | None = None,
    backing_format: str | None = None,
    check_backing: bool = True,
    locked: bool = False,
) -> Any:
    """Make an image of this name, and the files that it needs (`qemu-img create`).

    Args:
        options: those of the format and of the protocol, as `-o` takes them.
        size: bytes; absent: that of the backing file. Rounded up to whole sectors.
        backing_file: relative to where the image will be.
        check_backing: the backing file must be there.
        locked: the caller is inside `graph.changing()`.

    Returns: the create options of the format, all of them.

    Raises:
        ConfigError: one line; a file that was there before is as it was, if the options are wrong or if somebody
            uses it.
        BlockError: a child's errno; there is no image then.
    """
    image = NewImage(graph, filename, driver)
    image.say(options or {}, size=size, backing_file=backing_file, backing_format=backing_format)
    await image.prepare(check_backing=check_backing, locked=locked)
    return await image.create(locked=locked)


def help_on_options(drivers: DriverRegistry, driver: str, filename: str | None) -> str:
    """Which options a new image can have, in lines (`-o help`).

    Args:
        filename: of the image; with it come the options of the protocol.

    Raises:
        ConfigError: there are no such images.
    """
    types = _option_types(drivers, driver, filename)
    text = describe(known_options(*types).values())
    if filename is not None:
        return f"Supported options:\n{text}"
    return (
        f"Supported {driver} options:\n{text}"
        "\nThe protocol level may support further options.\n"
        "Specify the target filename to include those options.\n"
    )


def _option_types(
    drivers: DriverRegistry, driver: str, filename: str | None, *, protocol_first: bool = False
) -> list[type[Any]]:
    """Of a format, and of the protocol of a file.

    Args:
        protocol_first: look for the file's protocol before it is known whether the format can make images.
    """
    refuse_unknown(drivers, driver, "image creation")
    if protocol_first and filename is not None:
        drivers.protocol_of(filename)
    types = [create_options(drivers[driver], "Format driver")]
    if filename is not None:
        types.append(create_options(drivers.protocol_of(filename), "Protocol driver"))
    return types


class NewImage:
    """An image that is to be made by name: `say` what it is to be like, `prepare`, `create`.

    Args:
        driver: of the format.

    Attributes:
        options: what was said; after `prepare` with what follows from that.

    Raises:
        ConfigError: there are no such images.
    """

    def __init__(self, graph: BlockGraph, filename: str, driver: str) -> None:
        types = _option_types(graph.drivers, driver, filename, protocol_first=True)
        self._graph = graph
        self._filename = filename
        self._driver = graph.drivers[driver]
        self._options_type = types[0]
        graph.drivers.check_allowed(driver, read_only=False)
        self.options = ImageOptions(known_options(*types))
        self._own = option_names(self._options_type)

    def say(
        self,
        options: Mapping[str, Any] | str,
        *,
        size: int | None = None,
        backing_file: str | None = None,
        backing_format: str | None = None,
    ) -> None:
        """Take options, as `create_image` has them.

        Raises:
            ConfigError: one is wrong, or there is none of this kind.
        """
        said = self.options
        said.say(options)
        if size is not None:
            if "size" in said:
                raise ConfigError("The image size must be specified only once")
            said.set("size", size)
        name = self._driver.driver_name
        for option, value, what in (
            ("backing_file", backing_file, "Backing file"),
            ("backing_fmt", backing_format, "Backing file format"),
        ):
            if value is None:
                continue
            if option not in said.known:
                raise ConfigError(f"{what} not supported for file format '{name}'")
            said.set(option, value)
        if said.get("backing_file") == self._filename:
            raise ConfigError(_SAME_FILE)
        if said.get("backing_file") == "":
            raise ConfigError("Expected backing file name, got empty string")

    async def prepare(self, *, check_backing: bool = True, locked: bool = False) -> None:
        """Find the size, for which the backing file may have to be looked at.

        Raises:
            ConfigError: the backing file cannot be opened, or nobody said which format it has; there is no size.
        """
        said = self.options
        backing, driver = said.get("backing_file"), said.get("backing_fmt")
        if backing is not None and check_backing:
            length = await self._look_at_backing(backing, driver, locked=locked)
            if "size" not in said:
                said.set("size", length)
        elif backing is not None and driver is None:
            raise BackingFormatError
        if "size" not in said:
            raise ConfigError("Image creation needs a size parameter")

    async def create(self, *, locked: bool = False) -> Any:
        """Check everything, then make the files, then the image; as `create_image`."""
        driver = self._driver
        try:
            flat = self.options.values()
            flat["size"] = align_up(flat["size"], SECTOR_SIZE)
            if flat["size"] > MAX_LENGTH:
                raise self._too_large()
            self._check_backing_format(flat.get("backing_fmt"))
            children = self._children(flat)
            async with Creation(
                self._graph, f"'{self._filename}'", children, locked=locked
            ) as creation:
                parsed = consume_all(self._options_type, flat)
                await driver.create(creation, parsed)
        except (ConfigError, BlockError) as error:
            if error.errno == errno.EFBIG:
                raise self._too_large() from None
            raise
        return parsed

    def _check_backing_format(self, name: str | None) -> None:
        if name is not None and name not in self._graph.drivers and name not in QEMU_DRIVERS:
            raise ConfigError(f"Parameter 'backing-fmt' does not accept value '{name}'")

    def _children(self, flat: dict[str, Any]) -> dict[str, Any]:
        """Take what is for the files."""
        driver = self._driver
        if driver.is_protocol:
            flat.update(self._protocol_options(self._filename, driver))
            return {}
        children = {"file": self._new_file(self._filename)}
        for key in driver.create_child_keys:
            name = flat.pop(_spelled(key), None)
            if name is not None:
                children[key] = self._new_file(name)
        for name in tuple(flat):
            if name not in self._own:
                self._pass_on(name, flat.pop(name), children)
        return children

    def _new_file(self, filename: Any) -> NewFile:
        protocol = self._graph.drivers.protocol_of(filename)
        create_options(protocol, "Driver")
        own = self._protocol_options(filename, protocol)
        return NewFile(protocol, {"driver": protocol.driver_name, **own}, own)

    def _protocol_options(self, filename: str, protocol: Driver) -> dict[str, Any]:
        return protocol.parse_filename(filename, self._graph.drivers)

    def _pass_on(self, name: str, value: Any, children: dict[str, NewFile]) -> None:
        """An option that the format does not have is for the files that have it."""
        for child in children.values():
            known = option_names(create_options(child.protocol, "Protocol driver"))
            if name in known and name not in child.own:
                child.create = {**child.create, name: value}

    async def _look_at_backing(self, name: str, driver: str | None, *, locked: bool) -> int:
        """Its length.

        Raises:
            ConfigError: it cannot be opened; or nobody said which format it has.
        """
        given = {"driver": driver} if driver is not None else {}
        full = backing_name(self._filename, name)
        async with nullcontext() if locked else self._graph.changing():
            try:
                node = await opening.open_image(
                    self._graph,
                    full,
                    {**given, "read-only": True, "force-share": True},
                    flags=OpenFlag.NO_IO,
                )
            except ConfigError as error:
                text = f"{error.qemu_text}\nCould not open backing image."
                raise ConfigError(str(error), error.errno, qemu_text=text) from None
            found, length = node.driver_name, node.length
            is_below = any(_is_same_file(name, self._filename) for name in _files_of(node))
            await self._graph.collect(node)
        if is_below:
            raise ConfigError(_SAME_FILE)
        if driver is None:
            raise BackingFormatError(found)
        return length

    def _too_large(self) -> ConfigError:
        hint = " (try using a larger cluster size)" if "cluster_size" in self._own else ""
        name = self._driver.driver_name
        return ConfigError(
            f"The image size is too large for file format '{name}'{hint}", errno.EFBIG
        )


def _files_of(node: BlockNode) -> Iterator[str]:
    """Names of the files of a node and of all below."""
    if node.is_protocol and (name := node.exact_filename()):
        yield name
    for edge in node.children.values():
        yield from _files_of(edge.node)


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _spelled(name: str) -> str:
    """As people write it: programs write dashes."""
    return name.replace("-", "_")
