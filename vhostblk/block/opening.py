"""Opening a node: from options, from a name, with its children, step by step (block layer rows B04 and B05).

Theory of operation: driver, then the options every node has, then the driver's own, then whatever is left is an error;
only then is anything opened. Children are references to nodes or inline options; an inline child inherits its parent's
modes as defaults (`modes.py`). A name (`disk.img`, `nbd:...`, `json:{...}`) becomes options first; where nobody says
which format is inside, the content's beginning is looked at. Whatever fails leaves nothing behind.

Knows nothing about requests, except for reading that beginning.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vhostblk.block.edge import Edge
from vhostblk.block.filename import is_absolute, is_json, parse_json, protocol_prefix
from vhostblk.block.flags import OpenFlag
from vhostblk.block.introspection import directory, filename
from vhostblk.block.limits import MAX_LENGTH, SECTOR_SIZE
from vhostblk.block.modes import inherited_modes
from vhostblk.block.node import BlockNode
from vhostblk.block.options import NodeOptions, consume, leftover
from vhostblk.block.permissions import Perm
from vhostblk.block.probing import probed_format, protocol_by_name
from vhostblk.block.roles import Role, check_children
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph

log = logging.getLogger(__name__)

Parent = tuple[NodeOptions, Role]
# Of images that name one another. Each takes some frames of Python's stack while they open.
_MAX_DEPTH = 128
NO_FLAGS = OpenFlag(0)
_NO_BACKING = 'Use of "backing": "" is deprecated; use "backing": null instead'
_NO_CHILD = 'A block device must be specified for "{}"'


async def open_node(
    graph: BlockGraph,
    flat: dict[str, Any],
    where: str = "",
    *,
    parent: Parent | None = None,
    opened: Mapping[str, BlockNode] | None = None,
    probed: bool = False,
    by_name: bool = False,
    flags: OpenFlag = NO_FLAGS,
) -> BlockNode:
    """Open a node and its children.

    Args:
        flat: dotted options; consumed.
        where: prefix for names in messages (`file.`).
        parent: the options of the node it is an inline child of, and its role there.
        opened: children that are open already, by key.
        probed: the driver is a guess.
        by_name: as image tools write options: where inline children say no driver, their file name and content do.
        flags: CHECK: open it only to be checked (row B35.10); NO_BACKING: without what the image says it is backed by;
            NO_IO: only to be asked what it is like (row B41.6).

    Raises:
        ConfigError: one line; everything is as before.
    """
    name = flat.pop("driver", None)
    if name is None:
        raise ConfigError(f"Parameter '{where}driver' is missing")
    driver = graph.drivers.find(name, f"{where}driver")
    given, children = split_children(driver, flat)
    common, options = consume_options(driver, given, where, parent)
    read_only = common.read_only
    if common.auto_read_only and not graph.drivers.is_allowed(name, read_only=read_only):
        read_only = True
    graph.drivers.check_allowed(name, read_only=read_only)
    node = driver(graph.names.node_name(common.node_name), common, options)
    node.read_only = read_only
    node.inactive = not common.active
    node.given, node.is_spelled = given, by_name
    node.probed = probed
    node.for_check = bool(flags & OpenFlag.CHECK)
    node.without_backing = bool(flags & OpenFlag.NO_BACKING)
    node.without_io = bool(flags & OpenFlag.NO_IO)
    node.bounce = graph.bounce
    node.quiesced = graph.quiesced
    node.looks_only = graph.looks_only
    # The name is taken from here on: opening may wait.
    graph.enter(node)
    try:
        await node.open(Opening(graph, {**children, **(opened or {})}, where, by_name))
        check_children(node, complete=True)
        node.compute_limits()
        if node.length > MAX_LENGTH:
            raise ConfigError(f"Node '{node.node_name}' is too large: {node.length} bytes")
        assert node.length % SECTOR_SIZE == 0
    except BaseException:
        await graph.dissolve(node)
        raise
    graph.ready(node)
    return node


def split_children(
    driver: type[BlockNode], flat: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A node's own options, and those that name or describe its children (row B05.11)."""
    own: dict[str, Any] = {}
    children: dict[str, Any] = {}
    for name, value in flat.items():
        target = children if name.partition(".")[0] in driver.child_keys else own
        target[name] = value
    return own, children


def consume_options(
    driver: type[BlockNode], given: Mapping[str, Any], where: str, parent: Parent | None
) -> tuple[NodeOptions, Any]:
    """The typed options of a node, the common ones and the driver's.

    Raises:
        ConfigError: a bad value, or an option that nobody understands.
    """
    flat = dict(given)
    if parent is not None:
        flat.update(inherited_modes(*parent, given))
    common = consume(NodeOptions, flat, where)
    level = "filter" if driver.is_filter else "protocol" if driver.is_protocol else "format"
    node_name = common.node_name or ""
    leftover(flat, driver.driver_name, node_name, where, driver.options_type, level)
    return common, consume(driver.options_type, flat, where)


async def open_image(
    graph: BlockGraph, filename: str | None, flat: dict[str, Any], *, flags: OpenFlag = NO_FLAGS
) -> BlockNode:
    """Open what a file name stands for; options that are given as well come first (rows B05.4 to B05.7).

    Args:
        filename: None: the options say it all.
        flags: as for `open_node`.

    Raises:
        ConfigError: as `open_node`; ENOENT: no driver knows the protocol or the format.
    """
    if filename is None:
        return await _open_or_probe(graph, flat, flags=flags)
    if is_json(filename):
        given = {**parse_json(filename), **flat}
        return await _open_or_probe(graph, given, flags=flags)
    if "driver" in flat:
        driver = graph.drivers.find(flat["driver"])
        if driver.protocol_name is not None:
            own = driver.parse_filename(filename, graph.drivers)
            own = _below_formats(graph, flat, own, driver.child_keys)
            return await open_node(graph, _merge(flat, own), by_name=True, flags=flags)
    child = _child_by_name(graph, flat, filename)
    flat = _merge(flat, {f"file.{name}": value for name, value in child.items()})
    return await _open_or_probe(graph, flat, flags=flags)


async def _open_or_probe(
    graph: BlockGraph,
    flat: dict[str, Any],
    where: str = "",
    parent: Parent | None = None,
    *,
    flags: OpenFlag = NO_FLAGS,
) -> BlockNode:
    if "driver" in flat:
        return await open_node(graph, flat, where, parent=parent, by_name=True, flags=flags)
    return await _open_probed(graph, flat, where, parent, flags=flags)


async def open_named_by(
    graph: BlockGraph, parent: BlockNode, name: str, driver: str, more: Mapping[str, Any]
) -> BlockNode:
    """Open what an image would mean by a backing file of this name, without making it one.

    Args:
        driver: its format; empty: its content says which.
        more: further options.

    Raises:
        ConfigError: as `open_image`.
    """
    context = Opening(graph, {}, "", by_name=True)
    flat = {**context.options_by_image(parent, name, Role.COW), **more}
    if driver:
        flat["driver"] = driver
    return await _open_or_probe(graph, flat, "", (parent.common, Role.COW))


def _child_by_name(graph: BlockGraph, flat: Mapping[str, Any], filename: str) -> dict[str, Any]:
    """What a name says of the child `file`: it is for the first protocol that the options have below."""
    given = {
        name.removeprefix("file."): value
        for name, value in flat.items()
        if name.startswith("file.")
    }
    if "driver" not in given:
        return graph.drivers.options_of(filename)
    driver = graph.drivers.find(given["driver"], "file.driver")
    if driver.protocol_name is None:
        below = _child_by_name(graph, given, filename)
        return {f"file.{name}": value for name, value in below.items()}
    own = driver.parse_filename(filename, graph.drivers)
    return _below_formats(graph, given, own, driver.child_keys)


def _below_formats(
    graph: BlockGraph, flat: Mapping[str, Any], own: dict[str, Any], keys: Iterable[str]
) -> dict[str, Any]:
    """What a name says of children, where the options say that a child is an image: of what that is in."""
    for key in keys:
        driver = flat.get(f"{key}.driver")
        if driver is None or graph.drivers.find(driver, f"{key}.driver").protocol_name is not None:
            continue
        own = {
            name.replace(f"{key}.", f"{key}.file.", 1)
            if name.startswith(f"{key}.")
            else name: value
            for name, value in own.items()
        }
    return own


def _merge(flat: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for name in more:
        if name in flat or ("file" in flat and name.startswith("file.")):
            raise ConfigError(f"Parameter '{name}' is given twice: as an option and by the name")
    return {**flat, **more}


async def _open_probed(
    graph: BlockGraph,
    flat: dict[str, Any],
    where: str,
    parent: Parent | None,
    *,
    flags: OpenFlag = NO_FLAGS,
) -> BlockNode:
    """Open `file` first and look what is inside (rows B04.10 and B04.11)."""
    given = {name: value for name, value in flat.items() if not name.startswith("file.")}
    inline = {
        name.removeprefix("file."): value
        for name, value in flat.items()
        if name.startswith("file.")
    }
    if not inline:
        if isinstance(given.get("file"), str):
            # Nobody but image tools asks, and those have no nodes to refer to.
            graph.find(given["file"])
        raise ConfigError("Must specify either driver or file")
    modes = {**given, **inherited_modes(*parent, given)} if parent is not None else dict(given)
    common = consume(NodeOptions, modes, where)
    if "driver" not in inline:
        inline["driver"] = protocol_by_name(graph.drivers, inline)
    child = await open_node(
        graph, inline, f"{where}file.", parent=(common, Role.IMAGE), by_name=True
    )
    try:
        given["driver"] = await probed_format(graph.drivers, child)
        return await open_node(
            *(graph, given, where),
            parent=parent,
            opened={"file": child},
            probed=True,
            by_name=True,
            flags=flags,
        )
    except BaseException:
        await graph.collect(child)
        raise


class Opening:
    """What a node sees of the graph while it opens (`node.OpenContext`)."""

    def __init__(
        self, graph: BlockGraph, children: dict[str, Any], where: str, by_name: bool
    ) -> None:
        self.bounce = graph.bounce
        self.host_io = graph.host_io
        self.find_node = graph.find
        self.throttle_group = graph.throttle_group
        self.drivers = graph.drivers
        self.secrets = graph.secrets
        self.serves_guests = graph.serves_guests
        self._graph = graph
        self._children = children
        self._where = where
        self._by_name = by_name

    async def open_child(self, parent: BlockNode, key: str, role: Role) -> Edge:
        """Open or find the child that the options give under `key` (row B05.11)."""
        edge = await self.open_optional_child(parent, key, role)
        if edge is None:
            name = f"{self._where}{key}"
            raise ConfigError(
                f"Parameter '{name}' is missing: a node name or '{key}.' options",
                qemu_text=_NO_CHILD.format(key),
            )
        return edge

    async def open_optional_child(self, parent: BlockNode, key: str, role: Role) -> Edge | None:
        """The same, where there may be none, or `null` says so."""
        node = await self._find_or_open(parent, key, role)
        return await self._attach(parent, node, key, role) if node is not None else None

    async def _attach(self, parent: BlockNode, node: BlockNode, key: str, role: Role) -> Edge:
        if node.read_only and parent.common.auto_read_only and not role & Role.COW:
            parent.read_only = True
        edge = Edge(parent, node, key, role, Perm.NONE, Perm.ALL)
        try:
            with GraphTransaction() as change:
                change.attach(edge)
                change.refresh(parent)
        except BaseException:
            await self._graph.collect(node)
            raise
        return edge

    async def open_implied(
        self, parent: BlockNode, key: str, role: Role, name: str, driver: str = ""
    ) -> Edge | None:
        """The child that the options give under `key`, or else the one that the image names (row B32.1)."""
        given = self._inline(key)
        if name:
            parent.implied[key] = self._implied_name(parent, name, role)
        # Where a data file is, the image says only if nobody else says anything about it.
        is_told = bool(given) and not role & Role.COW
        has_file = "file" in given or "file.filename" in given
        if not name or key in self._children or has_file or is_told:
            return await self.open_optional_child(parent, key, role)
        where = f"{self._where}{key}."
        if where.count(".") > _MAX_DEPTH:
            raise ConfigError(f"The chain of images is longer than {_MAX_DEPTH}", errno.ELOOP)
        try:
            implied = self.options_by_image(parent, name, role)
            if driver:
                implied["driver"] = driver
            node = await _open_or_probe(
                self._graph, {**implied, **given}, where, (parent.common, role)
            )
        except ConfigError as error:
            if role & Role.COW:
                raise error.within("Could not open backing file") from None
            raise ConfigError(
                f"Could not open '{key}': {error}", error.errno, qemu_text=error.qemu_text
            ) from None
        node.inherits_from, node.inherits_as = parent, role
        if not given and protocol_prefix(name) is not None:
            parent.implied[key] = filename(node)
        return await self._attach(parent, node, key, role)

    def _implied_name(self, parent: BlockNode, name: str, role: Role) -> str:
        """What `filename` will say of the child that an image names, unless that is more than a plain file."""
        if not role & Role.COW or protocol_prefix(name) is not None or is_absolute(name):
            return name
        try:
            return directory(parent) + name
        except ConfigError:
            return name

    def options_by_image(self, parent: BlockNode, name: str, role: Role) -> dict[str, Any]:
        """The options of a child that an image names: a backing file relative to where the image is, others not."""
        if not role & Role.COW:
            return self.drivers.options_of(name)
        if is_json(name):
            return parse_json(name)
        if protocol_prefix(name) is None and not is_absolute(name):
            name = directory(parent) + name
        # A backing file is an image again: what is named is what that is in.
        return {f"file.{option}": value for option, value in self.drivers.options_of(name).items()}

    async def _find_or_open(self, parent: BlockNode, key: str, role: Role) -> BlockNode | None:
        name = f"{self._where}{key}"
        if key in self._children:
            reference = self._children[key]
            if self._inline(key):
                raise ConfigError(
                    f"Parameters '{name}.*' used inconsistently",
                    qemu_text="Cannot reference an existing block device with additional options "
                    "or a new filename",
                )
            if reference == "" and role & Role.COW:
                log.warning("%s", _NO_BACKING, extra={"qemu_warns": _NO_BACKING})
                return None
            if reference is None:
                return None
            if isinstance(reference, BlockNode):
                reference.inherits_from, reference.inherits_as = parent, role
                return reference
            if not isinstance(reference, str):
                raise ConfigError(
                    f"Parameter '{name}' expects a node name, not '{reference}'",
                    qemu_text=_NO_CHILD.format(key),
                )
            return self._find(reference, role)
        flat = self._inline(key)
        if not flat:
            return None
        node = await self._open_inline(parent, flat, f"{name}.", role)
        node.inherits_from, node.inherits_as = parent, role
        return node

    def _find(self, name: str, role: Role) -> BlockNode:
        try:
            return self._graph.find(name)
        except ConfigError as error:
            raise (
                error.within("Could not open backing file") if role & Role.COW else error
            ) from None

    def _inline(self, key: str) -> dict[str, Any]:
        """The options under `key.`, flat."""
        prefix = f"{key}."
        return {
            option.removeprefix(prefix): value
            for option, value in self._children.items()
            if option.startswith(prefix)
        }

    async def _open_inline(
        self, parent: BlockNode, flat: dict[str, Any], where: str, role: Role
    ) -> BlockNode:
        modes = (parent.common, role)
        if self._by_name and "driver" not in flat:
            # Only what is behind an image may be of any format.
            if role & Role.COW:
                return await _open_probed(self._graph, flat, where, modes)
            flat["driver"] = protocol_by_name(self._graph.drivers, flat)
        return await open_node(self._graph, flat, where, parent=modes, by_name=self._by_name)
