"""Making images: what a driver is given for it, and how nothing is left behind that only looks like one (row B35).

A driver that can make images states the options once (`Driver.create_options_type`), in the spelling of `qemu-img
create -o`; programs may write dashes (`blockdev-create`). There are two ways in: `create` makes an image in nodes,
`create_image` in files that it makes itself, by name, with the checks that people want.

Files are made when the driver asks for them, which is after it has looked at its options; a file that was not there
before is gone again if anything fails. Who overwrites a file needs the locks first.

Knows nothing about formats.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vhostblk.block import opening
from vhostblk.block.backend import BlockBackend
from vhostblk.block.filename import backing_name, is_json
from vhostblk.block.keyval import flatten, parse_flat, parse_options
from vhostblk.block.limits import SECTOR_SIZE, align_up
from vhostblk.block.node import BlockNode
from vhostblk.block.options import consume_all, option_names, to_size
from vhostblk.block.permissions import Perm
from vhostblk.block.registry import DriverRegistry
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph
    from vhostblk.block.host_io import HostIO

Driver = type[BlockNode]

_SAME_FILE = "Trying to create an image with the same filename as the backing file"


@dataclasses.dataclass(slots=True)
class _NewFile:
    """A file that is made when it is needed."""

    protocol: Driver
    own: dict[str, Any]  # the options that open it, flat
    create: dict[str, Any]


class Creation:
    """What a driver may ask for while it makes an image; `async with`.

    Args:
        children: as in the options of a node: names or nodes, or flat options under `key.`; or files to be made.
        locked: the caller is inside `graph.changing()`.

    Context: the control loop.
    Owns: its use of the nodes, until the end.
    """

    def __init__(
        self, graph: BlockGraph, name: str, children: Mapping[str, Any], *, locked: bool = False
    ) -> None:
        self.name = name
        self.drivers: DriverRegistry = graph.drivers
        self._graph = graph
        self._children = children
        self._locked = locked
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Creation:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    def host_io(self) -> HostIO:
        """File I/O, for drivers that make files."""
        return self._graph.host_io(None)

    def on_failure(self, undo: Callable[[], Awaitable[object]]) -> None:
        """Call `undo` if the image does not get ready, after all nodes that were used later are closed."""

        async def leave(
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None:
            if kind is not None:
                await undo()

        self._stack.push_async_exit(leave)

    def has_child(self, key: str) -> bool:
        """Whether the options name or describe this child."""
        return any(name.partition(".")[0] == key for name in self._children)

    async def child(self, key: str) -> BlockBackend:
        """The use of a child that may be written and resized, and is nobody else's meanwhile.

        Raises:
            ConfigError: there is none; it cannot be made or opened; somebody uses it.
        """
        if not self.has_child(key):
            raise ConfigError(f"Parameter '{key}' is missing: a node name or '{key}.' options")
        new = self._children.get(key)
        if isinstance(new, _NewFile):
            options_type = new.protocol.create_options_type
            assert options_type is not None
            await new.protocol.create(self, consume_all(options_type, {**new.create}))
        node = await self._stack.enter_async_context(self._using(key))
        # Who reads meanwhile sees no image.
        backend = BlockBackend(
            node, f"creation of {self.name}", writable=True, resize=True, shared=Perm.NONE
        )
        self._stack.push_async_callback(backend.close)
        return backend

    async def emptied(self, child: BlockBackend) -> bool:
        """Cut a child to nothing; False: it has the length it has, and its content.

        Raises:
            BlockError: the child's errno.
        """
        try:
            await child.truncate(0)
        except BlockError as error:
            if error.errno != errno.ENOTSUP:
                raise
            return False
        return True

    @asynccontextmanager
    async def _using(self, key: str) -> AsyncIterator[BlockNode]:
        async with self.changing():
            node = await self._open(key)
            self._graph.hold(node)
        try:
            yield node
        finally:
            async with self.changing():
                await self._graph.release(node)

    async def _open(self, key: str) -> BlockNode:
        value = self._children.get(key)
        if isinstance(value, _NewFile):
            return await opening.open_node(self._graph, {**value.own})
        if isinstance(value, str):
            return self._graph.find(value)
        if value is not None:
            raise ConfigError(f"Parameter '{key}' expects a node name, not '{value}'")
        prefix = f"{key}."
        inline = {
            name.removeprefix(prefix): value
            for name, value in self._children.items()
            if name.startswith(prefix)
        }
        return await opening.open_node(self._graph, inline, prefix)

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """As `graph.changing`, if the caller is not inside that anyway."""
        if self._locked:
            yield
            return
        async with self._graph.changing():
            yield


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
    options_type = _options_type(driver, "Driver")
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
    flat = parse_flat(options) if isinstance(options, str) else flatten(options or {})
    flat = {_spelled(name): value for name, value in flat.items()}
    extra: dict[str, Any] = {
        "size": size,
        "backing_file": backing_file,
        "backing_fmt": backing_format,
    }
    for name, value in extra.items():
        if value is not None and flat.setdefault(name, value) is not value:
            raise ConfigError(f"Parameter '{name}' is given twice")
    image = _Image(graph, filename, driver, flat)
    return await image.create(check_backing=check_backing, locked=locked)


class _Image:
    """An image that is to be made by name."""

    def __init__(self, graph: BlockGraph, filename: str, driver: str, flat: dict[str, Any]) -> None:
        if driver not in graph.drivers:
            raise ConfigError(f"Unknown file format '{driver}'", errno.ENOENT)
        self._graph = graph
        self._filename = filename
        self._driver = graph.drivers[driver]
        self._options_type = _options_type(self._driver, "Format driver")
        graph.drivers.check_allowed(driver, read_only=False)
        self._flat = flat
        self._own = option_names(self._options_type)

    async def create(self, *, check_backing: bool, locked: bool) -> Any:
        """Check everything, then make the files, then the image."""
        flat, driver = self._flat, self._driver
        self._check_backing_options()
        if driver.is_protocol:
            children: dict[str, Any] = {}
            flat = {**self._protocol_options(self._filename, driver), **flat}
        else:
            children = {"file": self._new_file(self._filename)}
            for key in driver.create_child_keys:
                name = flat.pop(_spelled(key), None)
                if name is not None:
                    children[key] = self._new_file(name)
            for name in tuple(flat):
                if name not in self._own:
                    self._pass_on(name, flat.pop(name), children)
        async with Creation(
            self._graph, f"'{self._filename}'", children, locked=locked
        ) as creation:
            await self._find_size(creation, check_backing)
            try:
                parsed = consume_all(self._options_type, {**flat})
                await driver.create(creation, parsed)
            except (ConfigError, BlockError) as error:
                if error.errno == errno.EFBIG:
                    raise self._too_large() from None
                raise
        return parsed

    def _check_backing_options(self) -> None:
        name = self._driver.driver_name
        for option, what in (
            ("backing_file", "Backing file"),
            ("backing_fmt", "Backing format"),
        ):
            if option in self._flat and option not in self._own:
                raise ConfigError(f"{what} not supported for file format '{name}'")
        backing, driver = self._flat.get("backing_file"), self._flat.get("backing_fmt")
        if driver is not None and driver not in self._graph.drivers:
            raise ConfigError(f"Unknown backing file format '{driver}'", errno.ENOENT)
        if backing is not None and backing == self._filename:
            raise ConfigError(_SAME_FILE)

    def _new_file(self, filename: Any) -> _NewFile:
        if not isinstance(filename, str) or not filename or is_json(filename):
            raise ConfigError(f"Cannot create a file of the name '{filename}'")
        protocol = self._graph.drivers.protocol_of(filename)
        _options_type(protocol, "Protocol driver")
        own = self._protocol_options(filename, protocol)
        return _NewFile(protocol, {"driver": protocol.driver_name, **own}, own)

    def _protocol_options(self, filename: str, protocol: Driver) -> dict[str, Any]:
        return protocol.parse_filename(filename, self._graph.drivers)

    def _pass_on(self, name: str, value: Any, children: dict[str, _NewFile]) -> None:
        """An option that the format does not have is for the files."""
        known = [
            child
            for child in children.values()
            if name in option_names(_options_type(child.protocol, "Protocol driver"))
            and name not in child.own
        ]
        if not known:
            raise ConfigError(f"Parameter '{name}' is unexpected")
        for child in known:
            child.create = {**child.create, name: value}

    async def _find_size(self, creation: Creation, check_backing: bool) -> None:
        """Look at the backing file; round the size."""
        flat = self._flat
        backing = flat.get("backing_file")
        if backing is not None and (check_backing or "size" not in flat):
            length = await self._look_at_backing(creation, backing, flat.get("backing_fmt"))
            flat.setdefault("size", length)
        if backing is not None and flat.get("backing_fmt") is None:
            raise ConfigError("Backing file specified without backing format")
        if "size" not in flat:
            raise ConfigError("Image creation needs a size parameter")
        flat["size"] = align_up(to_size("size", flat["size"]), SECTOR_SIZE)

    async def _look_at_backing(self, creation: Creation, name: str, driver: str | None) -> int:
        """Its length.

        Raises:
            ConfigError: it cannot be opened; or nobody said which format it has.
        """
        given = {"driver": driver} if driver is not None else {}
        full = backing_name(self._filename, name)
        async with creation.changing():
            try:
                node = await opening.open_image(
                    self._graph, full, {**given, "read-only": True, "auto-read-only": True}
                )
            except ConfigError as error:
                raise ConfigError(f"Could not open backing image: {error}", error.errno) from None
            found, length = node.driver_name, node.length
            is_below = any(_is_same_file(name, self._filename) for name in _files_of(node))
            await self._graph.collect(node)
        if is_below:
            raise ConfigError(_SAME_FILE)
        if driver is None:
            raise ConfigError(
                f"Backing file specified without backing format (detected format: {found})"
            )
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


def _options_type(driver: Driver, what: str) -> type[Any]:
    if driver.create_options_type is None:
        raise ConfigError(
            f"{what} '{driver.driver_name}' does not support image creation", errno.ENOTSUP
        )
    return driver.create_options_type


def _spelled(name: str) -> str:
    """As people write it: programs write dashes."""
    return name.replace("-", "_")
