"""Opening nodes from options and names; what fails leaves nothing (rows B04, B05 and B07)."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.disks import REFUSALS
from tests.unit.block.fakes import ArrayNode, NoOptions, PassNode
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, ExtentFlag, OpenContext
from vhostblk.block.op_blockers import OpType, Reason
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm
from vhostblk.block.registry import DriverRegistry
from vhostblk.block.roles import Role
from vhostblk.errors import BlockError, ConfigError


class MagicNode(BlockNode):
    """A format whose images begin with MAGIC."""

    driver_name = "magic"
    options_type = NoOptions
    child_keys = ("file",)

    @classmethod
    def probe(cls, header: bytes, filename: str) -> int:
        return 100 if header.startswith(b"MAGIC") else 0

    async def open(self, context: OpenContext) -> None:
        await context.open_child(self, "file", Role.IMAGE)
        self.length = 512


class BadNode(ArrayNode):
    """Opens and fails; or cannot be read."""

    driver_name = "bad"

    def __init__(self, name: str, common: NodeOptions, options: NoOptions) -> None:
        super().__init__(common=common)
        self.node_name = name

    def refresh_limits(self) -> None:
        self.limits.min_mem_alignment = 1

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        raise BlockError(errno.EIO)


class LateNode(PassNode):
    """Fails when its child is open already."""

    driver_name = "late"

    async def open(self, context: OpenContext) -> None:
        await super().open(context)
        raise BlockError(errno.ENOSPC, "too late")


ALL = {**DRIVERS, "magic": MagicNode, "bad": BadNode, "late": LateNode, "pass": PassNode}


def with_graph(scenario: Callable[[BlockGraph], Awaitable[Any]], drivers: Any = ALL) -> None:
    """Run with a graph, close it, and see that no fd is left."""

    async def run() -> None:
        before = set(os.listdir("/proc/self/fd"))
        graph = BlockGraph(drivers)
        await scenario(graph)
        await graph.close_all()
        assert not graph.nodes
        assert set(os.listdir("/proc/self/fd")) == before

    asyncio.run(run())


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(65536))
    return str(path)


@pytest.mark.parametrize(
    ("options", "expected", "message"),
    [
        ({"driver": "nope"}, errno.ENOENT, "Unknown driver 'nope'"),
        ({"driver": "raw", "file": "nobody"}, errno.ENODEV, "Cannot find node 'nobody'"),
        ({"driver": "raw", "file": "", "file.driver": "null-co"}, errno.EINVAL, "inconsistently"),
        ({"node-name": "n"}, errno.EINVAL, "Parameter 'driver' is missing"),
        ({"driver": "file"}, errno.EINVAL, "Parameter 'filename' is missing"),
        ({"driver": "raw"}, errno.EINVAL, "Parameter 'file' is missing"),
        ({"driver": "raw", "file": None}, errno.EINVAL, "Parameter 'file' is missing"),
        ({"driver": "null-co", "read-only": "perhaps"}, errno.EINVAL, "'read-only' expects"),
        ({"driver": "null-co", "node-name": "kept"}, errno.EINVAL, "Duplicate nodes"),
        ({"driver": "null-co", "node-name": "device"}, errno.EINVAL, "conflicting with a device"),
        ({"driver": "memory", "size": 512}, errno.ENOTSUP, "not whitelisted"),
        ({"driver": "pass", "file": "kept"}, errno.ENOTSUP, "only be used for read-only"),
        ({"driver": "file", "filename": "/nonexistent/x"}, errno.ENOENT, "No such file"),
        ({"driver": "raw", "file": {"driver": "file", "filename": "/"}}, errno.EISDIR, "directory"),
        ({"driver": "null-co", "size": (1 << 63) - 513}, errno.EINVAL, "is too large"),
        (
            {"driver": "null-co", "first": 1, "second": 2},
            errno.EINVAL,
            "Block protocol 'null-co' does not support the option 'first'",
        ),
        (
            {"driver": "raw", "node-name": "r", "file": "kept", "bogus": 1},
            errno.EINVAL,
            "Block format 'raw' (node 'r') does not support the option 'bogus'",
        ),
        ({"driver": "late", "file": {"driver": "null-co"}}, errno.ENOSPC, "too late"),
    ],
)  # fmt: skip
def test_each_failing_step_of_opening_has_its_errno_and_leaves_no_node_and_no_fd(
    options: dict[str, Any], expected: int, message: str
) -> None:
    async def scenario(graph: BlockGraph) -> None:
        kept = await graph.add("null-co,node-name=kept")
        backend = BlockBackend(kept, "device", writable=False)
        graph.names.add_device("device", backend)
        with pytest.raises(REFUSALS) as caught:
            await graph.add(options)
        assert caught.value.errno == expected
        assert message in str(caught.value)
        assert list(graph.nodes) == ["kept"]
        assert kept.references == len(kept.parents) == 1
        await backend.close()
        graph.names.remove_device("device")

    rules = DriverRegistry(ALL, read_write=["file", "raw", "null-co", "late"], read_only=["pass"])
    with_graph(scenario, rules)


def test_driver_that_may_only_read_is_opened_read_only_where_that_is_agreed() -> None:
    async def scenario(graph: BlockGraph) -> None:
        assert (await graph.add("null-co,auto-read-only=on")).read_only
        assert (await graph.add("null-co,read-only=on")).read_only

    with_graph(scenario, DriverRegistry(DRIVERS, read_only=["null-co"]))


# ---------------------------------------------------------------------- names


def test_path_is_probed_and_guessed_raw(image: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.open_image(image, {"read-only": True})
        assert (node.driver_name, node.probed) == ("raw", True)
        assert node.children["file"].node.driver_name == "file"
        assert node.children["file"].node.inherits_from is node

    with_graph(scenario)


def test_path_with_content_of_another_format_and_an_explicit_driver(image: str) -> None:
    Path(image).write_bytes(b"MAGIC".ljust(4096))

    async def scenario(graph: BlockGraph) -> None:
        node = await graph.open_image(image)
        assert (node.driver_name, node.probed) == ("magic", True)
        await graph.remove(node.node_name)
        raw = await graph.open_image(image, {"driver": "raw", "node-name": "r"})
        assert (raw.driver_name, raw.probed) == ("raw", False)
        await graph.remove("r")
        protocol = await graph.open_image(image, {"driver": "file"})
        assert protocol.driver_name == "file"

    with_graph(scenario)


def test_empty_file_opens_raw_without_being_read(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()

    async def scenario(graph: BlockGraph) -> None:
        assert (await graph.open_image(str(empty), {"read-only": True})).driver_name == "raw"

    with_graph(scenario)


def test_json_name_has_less_to_say_than_options(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        name = f'json:{{"driver": "raw", "offset": 512, "file": {{"driver": "file", "filename": "{image}"}}}}'
        assert (await graph.open_image(name)).length == 65536 - 512
        assert (await graph.open_image(name, {"offset": 1024, "read-only": True})).length == 64512

    with_graph(scenario)


def chain(node: BlockNode) -> list[str]:
    """The drivers from a node down."""
    below = [name for edge in node.children.values() for name in chain(edge.node)]
    return [node.driver_name, *below]


@pytest.mark.parametrize(
    ("options", "drivers"),
    [
        ({"file.filename": "IMAGE"}, ["raw", "file"]),
        ({"driver": "raw", "file.filename": "IMAGE"}, ["raw", "file"]),
        (
            {"driver": "raw", "file.driver": "blkdebug", "file.image.filename": "IMAGE"},
            ["raw", "blkdebug", "file"],
        ),
        ({"driver": "blkdebug", "image.filename": "IMAGE"}, ["blkdebug", "file"]),
        ({"driver": "pass", "file.filename": "IMAGE"}, ["pass", "file"]),
    ],
)
def test_options_of_an_image_tool_need_no_driver_where_a_name_or_the_content_says_it(
    image: str, options: dict[str, str], drivers: list[str]
) -> None:
    async def scenario(graph: BlockGraph) -> None:
        given = {name: value.replace("IMAGE", image) for name, value in options.items()}
        assert chain(await graph.open_image(None, {**given, "read-only": True})) == drivers
        with pytest.raises(ConfigError, match="driver' is missing"):
            await graph.add(given)

    with_graph(scenario)


@pytest.mark.parametrize(
    "options", [{"filename": "x"}, {"driver": "blkdebug", "image.file.filename": "x"}]
)
def test_name_where_content_has_to_say_the_format_is_refused(options: dict[str, str]) -> None:
    async def scenario(graph: BlockGraph) -> None:
        with pytest.raises(ConfigError, match="Must specify either driver or file"):
            await graph.open_image(None, options)
        assert not graph.nodes

    with_graph(scenario)


def test_name_of_blkdebug_has_the_name_of_its_image_in_it(image: str, tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text('[inject-error]\nevent = "read_aio"\nerrno = "28"\n')

    async def scenario(graph: BlockGraph) -> None:
        node = await graph.open_image(f"blkdebug::{image}", {"driver": "raw"})
        assert chain(node) == ["raw", "blkdebug", "file"]
        node = await graph.open_image(
            f"blkdebug:{rules}:blkdebug::{image}", {"driver": "raw", "read-only": True}
        )
        assert chain(node) == ["raw", "blkdebug", "blkdebug", "file"]
        user = BlockBackend(node, "reader", writable=False)
        with pytest.raises(BlockError) as caught:
            await user.preadv(0, IoVec([memoryview(bytearray(512))]))
        assert caught.value.errno == errno.ENOSPC
        await user.close()

    with_graph(scenario)


@pytest.mark.parametrize(
    ("name", "options", "code", "message"),
    [
        ("blkdebug:x", {}, errno.EINVAL, "requires both config file and image path"),
        ("gopher://x", {}, errno.ENOENT, "Unknown protocol 'gopher'"),
        ("json:{", {}, errno.EINVAL, "Could not parse the JSON options"),
        ("json:[]", {}, errno.EINVAL, "Invalid JSON object given"),
        ("json:{}", {}, errno.EINVAL, "Must specify either driver or file"),
        ("a", {"driver": "file", "filename": "b"}, errno.EINVAL, "'filename' is given twice"),
        ("a", {"driver": "raw", "file": "n"}, errno.EINVAL, "'file.driver' is given twice"),
        ("null-co://x", {}, errno.EINVAL, "The only allowed filename for this driver"),
        ("/nonexistent/x", {}, errno.ENOENT, "Could not open '/nonexistent/x'"),
        ('json:{"file": {"driver": "bad"}}', {}, errno.EIO, "Could not read image"),
        ('json:{"file": {"driver": "null-co"}}', {}, errno.ENOENT, "Could not determine"),
    ],
)
def test_name_that_cannot_be_opened_says_why(
    name: str, options: dict[str, Any], code: int, message: str
) -> None:
    drivers = dict(ALL)
    if "determine" in message:
        del drivers["raw"]

    async def scenario(graph: BlockGraph) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            await graph.open_image(name, options)
        assert caught.value.errno == code
        assert not graph.nodes

    with_graph(scenario, drivers)


@pytest.mark.warns("nobody said which format")
def test_guest_cannot_make_a_guessed_raw_image_look_like_another_format(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.open_image(image)
        backend = BlockBackend(node, "guest", writable=True)
        with pytest.raises(BlockError) as caught:
            await backend.pwritev(0, IoVec([memoryview(b"MAGIC")]))
        assert caught.value.errno == errno.EPERM
        with pytest.raises(BlockError):
            await backend.pwritev(0, IoVec([memoryview(b"MAGIC".ljust(8192))]))
        await backend.pwritev(0, IoVec([memoryview(b"harmless")]))
        await backend.pwritev(512, IoVec([memoryview(b"MAGIC")]))
        [first, rest] = await backend.extents(0, 4096)
        assert (first.offset, first.length) == (0, 512)
        assert not first.flags & ExtentFlag.WRITE
        assert (rest.offset, rest.end) == (512, 65536)
        assert rest.flags & ExtentFlag.WRITE
        await backend.close()

    with_graph(scenario)
    assert Path(image).read_bytes()[:520] == b"harmless".ljust(512, b"\0") + b"MAGIC".ljust(
        8, b"\0"
    )


# ---------------------------------------------------------------------- identity and life (row B07)


def test_node_and_device_names_are_one_namespace() -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add("null-co,node-name=n")
        other = await graph.add("null-co,node-name=m")
        backend = BlockBackend(node, "device 'd'", writable=False)
        with pytest.raises(ConfigError, match="Device name 'n' conflicts with an existing node"):
            graph.names.add_device("n", backend)
        graph.names.add_device("d", backend)
        with pytest.raises(ConfigError, match="Device with id 'd' already exists"):
            graph.names.add_device("d", backend)
        assert graph.names.lookup("d", "m") is node
        assert graph.names.lookup(None, "m") is other
        assert graph.names.lookup("x", "m") is other
        with pytest.raises(ConfigError, match="Cannot find device='x' nor node-name=''") as caught:
            graph.names.lookup("x", None)
        assert caught.value.errno == errno.ENODEV
        graph.names.remove_device("d")
        await backend.close()

    with_graph(scenario)


def test_four_layers_leave_nothing_when_they_go_in_any_order(image: str) -> None:
    layers: dict[str, Any] = {"driver": "file", "filename": image, "node-name": "l0"}
    for number in (1, 2, 3):
        layers = {"driver": "raw", "node-name": f"l{number}", "file": layers}

    async def scenario(graph: BlockGraph) -> None:
        await graph.add(layers)
        held = graph.find("l1")
        graph.hold(held)
        await graph.remove("l3")
        assert sorted(graph.nodes) == ["l0", "l1"]
        assert held.references == 1
        with pytest.raises(ConfigError, match="Node 'l1' is in use"):
            await graph.remove("l1")
        await graph.release(held)
        assert not graph.nodes

    with_graph(scenario)


def test_inline_child_whose_last_user_is_a_root_goes_with_it() -> None:
    async def scenario(graph: BlockGraph) -> None:
        await graph.add("raw,node-name=r,file.driver=null-co,file.node-name=f")
        backend = BlockBackend(graph.find("f"), "job", writable=False, shared=Perm.ALL)
        await graph.remove("r")
        assert list(graph.nodes) == ["f"]
        await backend.close()
        assert not graph.nodes

    with_graph(scenario)


def test_node_that_is_blocked_or_held_is_not_removed() -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add("null-co,node-name=n")
        reason = Reason("a job runs")
        node.op_blockers.block(reason, (OpType.DRIVE_DEL,))
        with pytest.raises(ConfigError, match="Node 'n' is busy: a job runs") as caught:
            await graph.remove("n")
        assert caught.value.errno == errno.EBUSY
        node.op_blockers.unblock(reason)
        graph.hold(node)
        with pytest.raises(ConfigError, match="Node 'n' is in use"):
            await graph.remove("n")
        await graph.release(node)
        assert graph.is_owned(node)
        await graph.remove("n")
        assert not graph.nodes

    with_graph(scenario)


def test_closing_flushes_then_closes_the_driver_and_only_then_lets_the_children_go() -> None:
    trace: list[str] = []

    class Traced(PassNode):
        driver_name = "traced"

        async def driver_flush_to_os(self) -> None:
            trace.append(f"{self.node_name} flush, {len(self.children)} child")

        async def close(self) -> None:
            trace.append(f"{self.node_name} close, {len(self.children)} child")

    async def scenario(graph: BlockGraph) -> None:
        await graph.add(
            "traced,node-name=a,file.driver=traced,file.node-name=b,file.file.driver=null-co"
        )
        trace.clear()
        await graph.close_all()
        assert trace == [
            "a flush, 1 child",
            "b flush, 1 child",
            "a close, 1 child",
            "b flush, 1 child",
            "b close, 1 child",
        ]

    with_graph(scenario, {**DRIVERS, "traced": Traced})
