"""Names and options that open the same again, and QMP's dictionaries (row B41)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.requirements import require
from tests.unit.block.fakes import NoOptions, PassNode
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.filename import is_json
from vhostblk.block.graph import BlockGraph
from vhostblk.block.introspection import (
    block_graph,
    block_stats,
    directory,
    exact_filename,
    filename,
    full_options,
)
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, OpenContext
from vhostblk.block.node_info import named_nodes
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import Role
from vhostblk.errors import ConfigError


class Overlay(BlockNode):
    """A format with a backing file."""

    driver_name = "overlay"
    options_type = NoOptions
    child_keys = ("file", "backing")

    async def open(self, context: OpenContext) -> None:
        await context.open_child(self, "file", Role.IMAGE)
        await context.open_optional_child(self, "backing", Role.COW)
        self.length = 512

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        await self.children["file"].preadv(offset, iov)


class Quorum(BlockNode):
    """Any number of equal children."""

    driver_name = "quorum"
    options_type = NoOptions
    child_keys = ("a", "b")

    async def open(self, context: OpenContext) -> None:
        for key in self.child_keys:
            edge = await context.open_child(self, key, Role.DATA)
        self.length = edge.node.length

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        await self.children["b"].preadv(offset, iov)


ALL = {**DRIVERS, "pass": PassNode, "overlay": Overlay, "quorum": Quorum}


def with_graph(scenario: Callable[[BlockGraph], Awaitable[Any]]) -> None:
    async def run() -> None:
        graph = BlockGraph(ALL)
        await scenario(graph)
        await graph.close_all()

    asyncio.run(run())


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    with path.open("wb") as written:
        written.write(os.urandom(8192))
        written.flush()
        os.fsync(written.fileno())  # until then its allocated size may change
    return str(path)


def file(image: str, **options: Any) -> dict[str, Any]:
    return {"driver": "file", "filename": image, "read-only": True, **options}


async def content(node: BlockNode) -> bytes:
    backend = BlockBackend(node, "reader", writable=False, shared=Perm.ALL)
    data = bytearray(node.length)
    await backend.preadv(0, IoVec([memoryview(data)]))
    await backend.close()
    return bytes(data)


CASES: dict[str, tuple[Callable[[str], dict[str, Any]], bool]] = {
    # how to open it, and whether a plain name says it all
    "file": (lambda path: file(path), True),
    "file-with-modes": (lambda path: file(path, **{"cache.no-flush": "on", "aio": "threads"}), True),
    "raw": (lambda path: {"driver": "raw", "file": file(path)}, True),
    "window": (lambda path: {"driver": "raw", "offset": 512, "size": 1024, "file": file(path)}, False),
    "overlay": (lambda path: {"driver": "overlay", "file": file(path), "backing": file(path)}, False),
    "filtered": (lambda path: {"driver": "pass", "file": {"driver": "raw", "file": file(path)}}, False),
    "quorum": (lambda path: {"driver": "quorum", "a": file(path), "b": file(path)}, False),
    "null": (lambda path: {"driver": "null-co", "read-zeroes": "on", "size": 4096}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_node_is_called_opens_the_same_again(case: str, image: str) -> None:
    options, is_plain = CASES[case]

    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"read-only": True, "node-name": "n", **options(image)})
        assert is_json(filename(node)) is not is_plain
        again = await graph.open_image(filename(node), {"read-only": True})
        assert again.length == node.length
        assert await content(again) == await content(node)
        assert (again.driver_name == node.driver_name) or is_plain
        third = await graph.add({**full_options(node), "read-only": True})
        assert full_options(third) == full_options(node)
        assert await content(third) == await content(node)

    with_graph(scenario)


def test_name_with_a_colon_is_not_taken_for_a_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nbd:x").write_bytes(bytes(512))

    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "file", "filename": "nbd:x"})
        assert exact_filename(node) == "./nbd:x"
        assert (await graph.open_image(filename(node), {"read-only": True})).length == 512

    with_graph(scenario)


def test_name_of_an_empty_null_disk_and_none_for_memory() -> None:
    async def scenario(graph: BlockGraph) -> None:
        assert filename(await graph.add("null-co,latency-ns=0")) == "null-co://"
        assert filename(await graph.add("memory,size=1M")) == (
            'json:{"driver": "memory", "size": 1048576}'
        )

    with_graph(scenario)


def test_directory_is_where_the_file_is_or_there_is_none(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add(
            {"driver": "raw", "offset": 512, "file": file(image), "read-only": True}
        )
        assert directory(node) == os.path.dirname(image) + "/"
        with pytest.raises(ConfigError, match="Cannot generate a base directory for node 'm'"):
            directory(await graph.add("memory,node-name=m,size=4k"))

    with_graph(scenario)


def test_backing_chain_is_nested_unless_it_is_wanted_flat(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        await graph.add(
            {
                "driver": "pass",
                "node-name": "top",
                "read-only": True,
                "file": {"driver": "overlay", "file": file(image), "backing": file(image)},
            }
        )
        by_name = {entry["node-name"]: entry for entry in await named_nodes(graph)}
        assert len(by_name) == 4
        overlay = next(entry for entry in by_name.values() if entry["drv"] == "overlay")
        assert overlay["image"]["backing-image"]["filename"] == image
        assert overlay["backing_file"] == image
        assert (by_name["top"]["backing_file_depth"], overlay["backing_file_depth"]) == (1, 1)
        assert all(
            "backing-image" not in entry["image"] for entry in await named_nodes(graph, flat=True)
        )
        json.dumps(await named_nodes(graph))

    with_graph(scenario)


def test_graph_dump_has_every_edge_with_its_permissions() -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add("raw,node-name=r,file.driver=null-co,file.node-name=n")
        backend = BlockBackend(node, "export 'e'", writable=True)
        dump = block_graph(graph)
        names = {entry["id"]: (entry["type"], entry["name"]) for entry in dump["nodes"]}
        assert sorted(names.values()) == [
            ("block-backend", "export 'e'"),
            ("block-driver", "n"),
            ("block-driver", "r"),
        ]
        edges = {
            (names[edge["parent"]][1], edge["name"], names[edge["child"]][1]): edge
            for edge in dump["edges"]
        }
        assert set(edges) == {("r", "file", "n"), ("export 'e'", "root", "r")}
        root = edges["export 'e'", "root", "r"]
        assert root["perm"] == ["consistent-read", "write", "write-unchanged"]
        assert root["shared-perm"] == ["consistent-read", "write-unchanged"]
        await backend.close()

    with_graph(scenario)


@pytest.mark.parametrize(
    "options",
    [
        "driver=file,node-name=d,filename={image},cache.direct=off,cache.no-flush=on",
        "driver=file,node-name=d,filename={image},read-only=on,discard=unmap",
        "driver=raw,node-name=d,file.driver=file,file.filename={image},file.node-name=f",
        "driver=raw,node-name=d,offset=512,size=1024,file.driver=file,file.filename={image},file.node-name=f",
        "driver=raw,node-name=d,detect-zeroes=unmap,discard=unmap,file.driver=null-co,file.node-name=f",
        "driver=null-co,node-name=d,size=1048576",
        "driver=null-co,node-name=d,read-zeroes=on",
    ],
)
def test_answer_is_that_of_qemu(options: str, image: str) -> None:
    options = options.replace("{image}", image)
    theirs = ask_qemu(options, "query-named-block-nodes")

    async def scenario(graph: BlockGraph) -> None:
        await graph.add(options)
        ours = await named_nodes(graph)
        for entry in (*ours, *theirs):
            for holder, key in ((entry, "file"), (entry["image"], "filename")):
                if is_json(holder[key]):
                    holder[key] = json.loads(holder[key].removeprefix("json:"))
        assert ours == theirs

    with_graph(scenario)


def ask_qemu(options: str, command: str, **arguments: Any) -> Any:
    """What qemu-storage-daemon answers when it has opened a node."""
    require("qemu-storage-daemon")
    commands = [
        {"execute": "qmp_capabilities"},
        {"execute": command, "arguments": arguments},
        {"execute": "quit"},
    ]
    process = subprocess.run(
        ["qemu-storage-daemon", "--blockdev", options, "--chardev", "stdio,id=m", "--monitor", "m"],
        input="".join(json.dumps(command) + "\n" for command in commands),
        stdout=subprocess.PIPE,
        timeout=30,
        check=True,
        text=True,
    )
    return json.loads(process.stdout.splitlines()[2])["return"]


def without_specifics(stats: dict[str, Any]) -> dict[str, Any]:
    """Those that a driver has of its own are left out."""
    answer = {key: value for key, value in stats.items() if key != "driver-specific"}
    if "parent" in answer:
        answer["parent"] = without_specifics(answer["parent"])
    return answer


def test_statistics_of_nodes_are_those_of_qemu(image: str) -> None:
    options = (
        f"driver=raw,node-name=d,offset=512,file.driver=file,file.node-name=f,file.filename={image}"
    )
    theirs = [
        without_specifics(one)
        for one in ask_qemu(options, "query-blockstats", **{"query-nodes": True})
    ]

    async def scenario(graph: BlockGraph) -> None:
        await graph.add(options)
        names = [one["node-name"] for one in theirs]
        assert [block_stats(graph.find(name)) for name in names] == theirs
        user = BlockBackend(graph.find("d"), "the test", writable=True)
        await user.pwritev(1024, IoVec.of(bytes(512)))
        stats = block_stats(user.node)
        await user.close()
        assert stats["stats"]["wr_highest_offset"] == 1536
        assert stats["parent"]["stats"]["wr_highest_offset"] == 2048

    with_graph(scenario)
