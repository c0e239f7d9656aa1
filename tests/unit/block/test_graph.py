"""Opening, naming, finding and closing nodes (rows B05 to B07)."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.block.fakes import ArrayNode, NoOptions, PassNode
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.graph import BlockGraph
from vhostblk.block.limits import BlockLimits
from vhostblk.block.node import BlockNode, OpenContext
from vhostblk.block.options import NodeOptions
from vhostblk.errors import BlockError, ConfigError, StateError


def with_graph(scenario: Callable[[BlockGraph], Awaitable[Any]]) -> None:
    """Run with a graph, close it, and see that no fd is left."""

    async def run() -> None:
        before = set(os.listdir("/proc/self/fd"))
        graph = BlockGraph()
        await scenario(graph)
        await graph.close_all()
        assert not graph.nodes
        assert set(os.listdir("/proc/self/fd")) == before

    asyncio.run(run())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk,0.img"
    path.write_bytes(bytes(65536))
    return path


def test_the_same_disk_in_keyval_dotted_and_nested_form(image: Path) -> None:
    async def scenario(graph: BlockGraph) -> None:
        escaped = str(image).replace(",", ",,")
        forms: list[str | dict[str, Any]] = [
            f"driver=raw,node-name=n0,file.driver=file,file.filename={escaped},offset=512",
            f"raw,node-name=n1,offset=0x200,file.driver=file,file.filename={escaped}",
            '{"driver": "raw", "node-name": "n2", "offset": 512,'
            f' "file": {{"driver": "file", "filename": "{image}"}}}}',
            {
                "driver": "raw",
                "node-name": "n3",
                "offset": 512,
                "file.driver": "file",
                "file": {"filename": str(image)},
            },
        ]
        for number, options in enumerate(forms):
            node = await graph.add(options)
            assert graph.find(f"n{number}") is node
            assert node.length == 65536 - 512

    with_graph(scenario)


def test_child_by_reference_stays_when_its_user_goes(image: Path) -> None:
    async def scenario(graph: BlockGraph) -> None:
        child = await graph.add({"driver": "file", "node-name": "disk0", "filename": str(image)})
        parent = await graph.add("driver=raw,node-name=r,file=disk0")
        assert parent.children["file"].node is child
        with pytest.raises(ConfigError, match="Node 'disk0' is in use: node 'r' as 'file'"):
            await graph.remove("disk0")
        await graph.remove("r")
        assert list(graph.nodes) == ["disk0"]
        await graph.remove("disk0")

    with_graph(scenario)


def test_inline_child_goes_with_its_last_user(image: Path) -> None:
    async def scenario(graph: BlockGraph) -> None:
        await graph.add(
            {
                "driver": "raw",
                "node-name": "r",
                "file": {"driver": "file", "node-name": "f", "filename": str(image)},
            }
        )
        await graph.add("driver=raw,node-name=other,file=f")
        await graph.remove("r")
        assert sorted(graph.nodes) == ["f", "other"]
        await graph.remove("other")
        assert not graph.nodes

    with_graph(scenario)


def test_inline_child_inherits_modes_and_always_obeys_discards(image: Path) -> None:
    async def scenario(graph: BlockGraph) -> None:
        options = {
            "driver": "raw",
            "read-only": True,
            "force-share": True,
            "cache": {"direct": False, "no-flush": True},
            "file": {"driver": "file", "node-name": "f", "filename": str(image)},
        }
        await graph.add(options)
        child = graph.find("f")
        assert child.read_only
        assert child.force_share
        assert child.no_flush
        assert child.unmap
        await graph.add(
            {
                "driver": "raw",
                "node-name": "r2",
                "cache.no-flush": "on",
                "file.driver": "null-co",
                "file.node-name": "g",
                "file.cache.no-flush": "off",
                "file.discard": "ignore",
            }
        )
        assert not graph.find("g").no_flush
        assert not graph.find("g").unmap

    with_graph(scenario)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("node-name=x", "Parameter 'driver' is missing"),
        ("driver=nope", "Unknown driver 'nope' for 'driver'"),
        ('{"driver": 5}', "Unknown driver '5'"),
        ("null-co,node-name=", "Invalid node-name: ''"),
        ("null-co,node-name=1a", "Invalid node-name: '1a'"),
        ("null-co,node-name=" + "a" * 32, "Invalid node-name"),
        ("null-co,node-name=taken", "Duplicate nodes with node-name='taken'"),
        ("null-co,node-name=x,bogus=1,more=2", "'null-co' (node 'x') does not support the option 'bogus'"),
        ("null-co,size=big", "Parameter 'size' expects a size"),
        ("null-co,file=taken", "does not support the option 'file'"),
        ("raw", "Parameter 'file' is missing"),
        ("raw,file=nobody", "Cannot find node 'nobody'"),
        ('{"driver": "null-co", "bogus": []}', "'null-co' does not support the option 'bogus'"),
        ('{"driver": "raw", "file": []}', "Parameter 'file' expects a node name, not '[]'"),
        ('{"driver": "raw", "file": 5}', "Parameter 'file' expects a node name, not '5'"),
        ("raw,file.size=1M", "Parameter 'file.driver' is missing"),
        ("raw,file.driver=nope", "Unknown driver 'nope' for 'file.driver'"),
        ("raw,file.driver=null-co,file.bogus=1", "does not support the option 'file.bogus'"),
        ("raw,file.driver=null-co,file.size=x", "Parameter 'file.size' expects a size"),
        ("raw,file=taken,file.driver=null-co", "'file.*' used inconsistently"),
        ("file", "Parameter 'filename' is missing"),
        ("file,filename=/nonexistent/x", "Could not open '/nonexistent/x': No such file or directory"),
        ("raw,file.driver=null-co,file.size=1M,offset=2M", "Parameter 'offset': 2097152 is greater"),
        ("raw,file.driver=null-co,file.size=1M,offset=512,size=1M", "Parameter 'size': the sum"),
        ("raw,file.driver=null-co,file.size=1M,size=1000", "1000 is not a multiple of 512"),
        ("null-co,size=9223372036854775295", "is too large"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_clear_line_and_leave_nothing(options: str, message: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        await graph.add("null-co,node-name=taken")
        with pytest.raises(ConfigError) as caught:
            await graph.add(options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert list(graph.nodes) == ["taken"]
        assert not graph.find("taken").parents

    with_graph(scenario)


def test_nodes_without_a_name_get_one_that_nobody_can_choose() -> None:
    async def scenario(graph: BlockGraph) -> None:
        first, second = await graph.add("null-co"), await graph.add("null-co")
        assert first.node_name != second.node_name
        assert first.node_name.startswith("#block")
        with pytest.raises(ConfigError, match="Invalid node-name"):
            await graph.add({"driver": "null-co", "node-name": "#block1"})

    with_graph(scenario)


def test_name_of_a_node_that_failed_to_open_is_free_again(image: Path) -> None:
    async def scenario(graph: BlockGraph) -> None:
        with pytest.raises(ConfigError):
            await graph.add("file,node-name=d,filename=/nonexistent/x")
        await graph.add({"driver": "file", "node-name": "d", "filename": str(image)})

    with_graph(scenario)


def test_close_all_names_who_still_holds_a_node_and_closes_the_rest() -> None:
    async def scenario(graph: BlockGraph) -> None:
        await graph.add("null-co,node-name=free")
        backend = BlockBackend(
            await graph.add("null-co,node-name=held"), "export 'x'", writable=True
        )
        with pytest.raises(StateError, match="Node 'held' is in use: export 'x'"):
            await graph.close_all()
        assert list(graph.nodes) == ["held"]
        await backend.close()

    with_graph(scenario)


@pytest.mark.warns("node 'bad': flush at close failed: .*EIO")
def test_failed_flush_at_close_is_logged_and_the_node_is_closed() -> None:
    class FailingNode(ArrayNode):
        driver_name = "failing"

        def __init__(self, name: str, common: NodeOptions, options: NoOptions) -> None:
            super().__init__(common=common)
            self.node_name = name

        def refresh_limits(self) -> None:
            self.limits.min_mem_alignment = 1

        async def driver_flush_to_disk(self) -> None:
            raise BlockError(errno.EIO)

    async def scenario() -> None:
        graph = BlockGraph({"failing": FailingNode})
        await graph.add("failing,node-name=bad")
        await graph.close_all()
        assert not graph.nodes

    asyncio.run(scenario())


def test_limits_come_from_the_children_and_then_from_the_driver() -> None:
    class Leaf(ArrayNode):
        driver_name = "leaf"

        def __init__(self, name: str, common: NodeOptions, options: NoOptions) -> None:
            super().__init__(common=common)
            self.node_name = name

        def refresh_limits(self) -> None:
            self.limits = BlockLimits(
                request_alignment=4096, max_transfer=65536, min_mem_alignment=512, max_iov=7
            )

    async def scenario() -> None:
        graph = BlockGraph({"leaf": Leaf, "pass": PassNode})
        node = await graph.add("pass,node-name=top,file.driver=leaf")
        assert node.limits == BlockLimits(
            request_alignment=1,
            max_transfer=65536,
            min_mem_alignment=512,
            opt_mem_alignment=4096,
            max_iov=7,
        )
        await graph.close_all()

    asyncio.run(scenario())


def test_registry_is_keyed_by_the_drivers_own_names() -> None:
    assert all(name == driver.driver_name for name, driver in DRIVERS.items())
    assert {"file", "host_device", "memory", "null-co", "raw", "throttle"} <= set(DRIVERS)


def test_opening_again_while_the_first_is_still_opening_sees_the_name_taken() -> None:
    class Slow(BlockNode):
        driver_name = "slow"
        options_type = NoOptions

        async def open(self, context: OpenContext) -> None:
            await asyncio.sleep(0)
            self.length = 512

    async def scenario() -> None:
        graph = BlockGraph({"slow": Slow})
        results = await asyncio.gather(
            graph.add("slow,node-name=a"), graph.add("slow,node-name=a"), return_exceptions=True
        )
        assert isinstance(results[0], Slow)
        assert isinstance(results[1], ConfigError)
        assert graph.find("a") is results[0]
        await graph.close_all()

    asyncio.run(scenario())
