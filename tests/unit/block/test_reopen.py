"""Changing the options of open nodes, all or nothing (row B34)."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.disks import read
from tests.unit.block.fakes import NoOptions, PassNode, turns
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import ExtentFlag, OpenContext, Req
from vhostblk.block.permissions import Perm
from vhostblk.block.reopen import Reopen, acquire_write, reopen
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import BlockError, ConfigError

KIB = 1024


class Reluctant(PassNode):
    """Remembers what it was told; may refuse."""

    driver_name = "reluctant"

    def __init__(self, name: str, common: Any, options: NoOptions) -> None:
        super().__init__(name, common, options)
        self.refuses = False
        self.told: list[str] = []

    async def reopen_prepare(self, reopen: Reopen) -> None:
        self.told.append("prepare")
        if self.refuses:
            raise ConfigError("not now")

    def reopen_commit(self, reopen: Reopen) -> None:
        self.told.append("commit")

    async def reopen_abort(self, reopen: Reopen) -> None:
        self.told.append("abort")


ALL = {**DRIVERS, "pass": PassNode, "reluctant": Reluctant}


def with_graph(scenario: Callable[[BlockGraph], Awaitable[Any]]) -> None:
    async def run() -> None:
        before = set(os.listdir("/proc/self/fd"))
        graph = BlockGraph(ALL)
        await scenario(graph)
        await graph.close_all()
        assert set(os.listdir("/proc/self/fd")) == before

    asyncio.run(run())


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * KIB))
    return str(path)


def picture(graph: BlockGraph) -> list[Any]:
    return [
        (
            node, node.common, node.options, node.given, node.read_only, node.unmap, node.no_flush,
            node.limits, node.length, node.quiesced, dict(node.children), node.detect_zeroes,
            [(edge, edge.node, edge.perm, edge.shared, edge.role) for edge in node.parents],
        )
        for node in graph.nodes.values()
    ]  # fmt: skip


async def write(backend: BlockBackend, offset: int, data: bytes) -> None:
    await backend.pwritev(offset, IoVec([memoryview(data)]))


def test_modes_of_a_chain_change_together_because_inline_children_inherit(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add(
            {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": image}}
        )
        file = node.children["file"].node
        await reopen(graph, {node: {"read-only": True, "cache": {"no-flush": "on"}}})
        assert (node.read_only, file.read_only) == (True, True)
        assert (node.no_flush, file.no_flush) == (True, True)
        await reopen(graph, {node: {"read-only": False}})
        assert (node.read_only, file.read_only) == (False, False)
        assert file.no_flush
        await reopen(graph, {node: {"file.cache.no-flush": "off"}})
        assert (node.no_flush, file.no_flush) == (True, False)
        await reopen(graph, {node: {}}, keep_options=False)
        assert (node.no_flush, file.no_flush) == (False, False)

    with_graph(scenario)


def test_referenced_child_is_not_touched(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        file = await graph.add({"driver": "file", "node-name": "f", "filename": image})
        node = await graph.add("raw,node-name=r,file=f")
        await reopen(graph, {node: {"read-only": "on"}})
        assert (node.read_only, file.read_only) == (True, False)
        with pytest.raises(ConfigError, match="Cannot change the option 'read-only' of 'f' thro"):
            await reopen(graph, {node: {"file.read-only": "on"}})
        await reopen(graph, {node: {"read-only": "off"}, file: {"cache.no-flush": True}})
        assert file.no_flush

    with_graph(scenario)


def test_same_file_is_opened_again_even_if_its_name_stands_for_another(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "file", "node-name": "f", "filename": image})
        backend = BlockBackend(node, "guest", writable=False, shared=Perm.ALL)
        os.rename(image, image + ".old")
        os.symlink("/dev/zero", image)
        before = (await backend.extents(0, 512))[0].fd
        await reopen(graph, {node: {"read-only": True}})
        [extent] = await backend.extents(0, 512)
        assert extent.fd != before
        assert not extent.flags & ExtentFlag.WRITE
        assert await read(backend, 0, 5) == bytes(5)
        await backend.close()

    with_graph(scenario)


def test_direct_io_comes_and_goes_with_its_alignment(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "raw", "file": {"driver": "file", "filename": image}})
        file = node.children["file"].node
        backend = BlockBackend(node, "guest", writable=True)
        await write(backend, 100, b"buffered")
        try:
            await reopen(graph, {node: {"cache.direct": "on"}})
        except ConfigError as error:
            pytest.skip(f"no O_DIRECT here: {error}")
        assert file.limits.request_alignment > 1
        assert node.limits.min_mem_alignment == file.limits.min_mem_alignment > 1
        await write(backend, 200, b"direct")
        await reopen(graph, {node: {"cache.direct": "off"}})
        assert file.limits.request_alignment == 1
        assert await read(backend, 100, 8) == b"buffered"
        assert await read(backend, 200, 6) == b"direct"
        await backend.close()

    with_graph(scenario)


def test_window_moves_with_its_role_and_its_length() -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add("raw,node-name=r,file.driver=memory,file.size=64k")
        sizes: list[int] = []
        backend = BlockBackend(node, "guest", writable=True)
        backend.attach(resized=sizes.append)
        await write(backend, 4096, b"here")
        await reopen(graph, {node: {"offset": 4096, "size": "8k"}})
        assert await read(backend, 0, 4) == b"here"
        assert (await backend.extents(0, 512))[0].host_offset == 4096
        await reopen(graph, {node: {"offset": 0}}, keep_options=False)
        assert sizes == [8 * KIB, 64 * KIB]
        with pytest.raises(ConfigError, match="Parameter 'offset': 131072 is greater"):
            await reopen(graph, {node: {"offset": "128k"}})
        assert await read(backend, 4096, 4) == b"here"
        await backend.close()

    with_graph(scenario)


def test_child_is_replaced_and_the_inline_one_before_it_closed() -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add("raw,node-name=r,file.driver=memory,file.size=64k,file.node-name=a")
        await graph.add("memory,node-name=b,size=128k")
        backend = BlockBackend(node, "guest", writable=True)
        await reopen(graph, {node: {"file": "b"}})
        assert sorted(graph.nodes) == ["b", "r"]
        assert backend.length == 128 * KIB
        with pytest.raises(ConfigError, match="would create a cycle"):
            await reopen(graph, {node: {"file": "r"}})
        with pytest.raises(ConfigError, match="Cannot find node 'nobody'"):
            await reopen(graph, {node: {"file": "nobody"}})
        await backend.close()

    with_graph(scenario)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filename": "/dev/null"}, "Cannot change the option 'filename' from"),
        ({"driver": "memory"}, "Cannot change the option 'driver'"),
        ({"node-name": "g"}, "Cannot change the option 'node-name'"),
        ({"locking": "off"}, "Cannot change the option 'locking' from 'auto' to 'off'"),
        ({"bogus": 1}, "Cannot change the option 'bogus'"),
        ({"read-only": "maybe"}, "Parameter 'read-only' expects"),
        ({"read-only": "on"}, "Block node 'f' is read-only"),
    ],
)
def test_option_that_may_not_change_is_named_and_nothing_has_changed(
    image: str, options: dict[str, Any], message: str
) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "file", "node-name": "f", "filename": image})
        backend = BlockBackend(node, "guest", writable=True)
        before, fds = picture(graph), os.listdir("/proc/self/fd")
        with pytest.raises(ConfigError) as caught:
            await reopen(graph, {node: options})
        assert message in str(caught.value)
        assert picture(graph) == before
        assert os.listdir("/proc/self/fd") == fds
        await write(backend, 0, b"still works")
        await backend.close()

    with_graph(scenario)


def test_child_is_another_node_or_has_other_options_but_not_both(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        inline = {"driver": "file", "node-name": "f", "filename": image}
        node = await graph.add({"driver": "raw", "file": inline})
        before = picture(graph)
        with pytest.raises(ConfigError, match=r"'file\.discard'"):
            await reopen(graph, {node: {"file": "f", "file.discard": "ignore"}})
        assert picture(graph) == before

    with_graph(scenario)


def test_saying_what_is_already_so_is_no_change(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "file", "node-name": "f", "filename": image})
        await reopen(graph, {node: {"driver": "file", "node-name": "f", "filename": image}})

    with_graph(scenario)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_failure_at_each_prepare_leaves_everything_as_before(failing: int) -> None:
    async def scenario(graph: BlockGraph) -> None:
        chain: dict[str, Any] = {"driver": "memory", "size": "64k", "node-name": "m"}
        for number in range(3):
            chain = {"driver": "reluctant", "node-name": f"n{number}", "file": chain}
        top = await graph.add(chain)
        nodes = [
            node for number in range(3) if isinstance(node := graph.find(f"n{number}"), Reluctant)
        ]
        assert len(nodes) == 3
        backend = BlockBackend(top, "guest", writable=True, write_cache=False)
        if failing < 3:
            nodes[failing].refuses = True
        before = picture(graph)
        change = {top: {"cache.no-flush": "on", "discard": "unmap"}}
        if failing < 3:
            with pytest.raises(ConfigError, match="not now"):
                await reopen(graph, change)
            assert picture(graph) == before
            end = "abort"
        else:
            await reopen(graph, change)
            assert all(node.no_flush for node in nodes)
            end = "commit"
        for number, node in enumerate(nodes):
            told = ["prepare"] * (number <= failing) + [end] * (number < failing)
            assert node.told == told
        assert not backend.write_cache  # the device's, whatever happens to the nodes (row B34)
        await backend.close()

    with_graph(scenario)


def test_flush_that_fails_stops_the_reopen() -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add("pass,node-name=p,file.driver=memory,file.size=4k")

        async def fail() -> None:
            raise BlockError(errno.ENOSPC)

        before = picture(graph)
        node.driver_flush_to_os = fail  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match="Error flushing node 'p'") as caught:
            await reopen(graph, {node: {"read-only": "on"}})
        assert caught.value.errno == errno.ENOSPC
        assert picture(graph) == before
        del node.driver_flush_to_os

    with_graph(scenario)


def test_several_nodes_change_together_or_not_at_all(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        one = await graph.add("memory,node-name=one,size=4k")
        two = await graph.add({"driver": "file", "node-name": "two", "filename": image})
        writer = BlockBackend(two, "guest", writable=True)
        before = picture(graph)
        with pytest.raises(ConfigError, match="Block node 'two' is read-only"):
            await reopen(graph, {one: {"read-only": "on"}, two: {"read-only": "on"}})
        assert picture(graph) == before
        await writer.close()
        await reopen(graph, {one: {"read-only": "on"}, two: {"read-only": "on"}})
        assert one.read_only
        assert two.read_only

    with_graph(scenario)


def test_locks_stay_while_the_fd_changes_and_keep_strangers_out(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        stranger = BlockGraph()
        node = await graph.add({"driver": "file", "node-name": "f", "filename": image})
        writer = BlockBackend(node, "guest", writable=True)
        other = await stranger.add({"driver": "file", "node-name": "g", "filename": image})
        for direct in ("on", "off"):
            try:
                await reopen(graph, {node: {"cache.direct": direct}})
            except ConfigError as error:
                pytest.skip(f"no O_DIRECT here: {error}")
            with pytest.raises(ConfigError, match="is another process using the image"):
                BlockBackend(other, "stranger", writable=True)
        await writer.close()
        BlockBackend(other, "stranger", writable=True)._edge.detach()
        await stranger.close_all()

    with_graph(scenario)


def test_who_comes_while_the_old_fd_is_closed_keeps_what_it_was_given(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        stranger = BlockGraph()
        file = {"driver": "file", "node-name": "f", "filename": image, "locking": "on"}
        node = await graph.add({**file, "read-only": True})
        other = await stranger.add({**file, "node-name": "g"})
        came: list[BlockBackend] = []
        done = node.reopen_done

        async def come(reopen: Reopen) -> None:
            came.append(BlockBackend(node, "guest", writable=True))
            await done(reopen)

        node.reopen_done = come  # type: ignore[method-assign]
        await reopen(graph, {node: {"read-only": False}})
        with pytest.raises(ConfigError, match="is another process using the image"):
            BlockBackend(other, "stranger", writable=True)
        await came[0].pwritev(0, IoVec.of(b"x"))
        await came[0].close()
        await stranger.close_all()

    with_graph(scenario)


def test_reopen_that_is_cancelled_when_all_is_decided_is_made(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        file = {"driver": "file", "filename": image, "node-name": "f"}
        top = await graph.add(
            {"driver": "raw", "node-name": "top", "file": file, "read-only": True}
        )
        node = graph.find("f")
        closing, closed = asyncio.Event(), asyncio.Event()
        done = node.reopen_done

        async def slow(reopen: Reopen) -> None:
            closing.set()
            await closed.wait()
            await done(reopen)

        node.reopen_done = slow  # type: ignore[method-assign]
        task = asyncio.create_task(reopen(graph, {top: {"read-only": False}}))
        await closing.wait()
        task.cancel()
        await turns(3)
        assert not task.done()
        closed.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not top.read_only
        assert not node.read_only
        user = BlockBackend(top, "guest", writable=True)
        await user.pwritev(0, IoVec.of(b"x"))
        await user.close()

    with_graph(scenario)


def test_nobody_comes_between_the_look_at_the_permissions_and_the_change(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who attached there would be left with permissions that nobody has looked at."""
    happened: list[str] = []
    check, commit = GraphTransaction.check, GraphTransaction.commit

    def watched_check(change: GraphTransaction) -> None:
        check(change)
        happened.append("checked")
        asyncio.get_running_loop().call_soon(happened.append, "somebody else")

    def watched_commit(change: GraphTransaction, *, checked: bool = False) -> None:
        commit(change, checked=checked)
        happened.append("made")

    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "file", "node-name": "f", "filename": image})
        backend = BlockBackend(node, "guest", writable=False, shared=Perm.ALL)
        monkeypatch.setattr(GraphTransaction, "check", watched_check)
        monkeypatch.setattr(GraphTransaction, "commit", watched_commit)
        happened.clear()
        await reopen(graph, {node: {"read-only": True}})
        monkeypatch.undo()
        assert happened[:3] == ["checked", "made", "somebody else"]
        await backend.close()

    with_graph(scenario)


def test_file_that_could_not_be_written_can_be_once_its_mode_allows_it(image: str) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everything")

    async def scenario(graph: BlockGraph) -> None:
        os.chmod(image, 0o400)
        node = await graph.add(
            {"driver": "file", "node-name": "f", "filename": image, "auto-read-only": True}
        )
        assert node.read_only
        await reopen(graph, {node: {}})
        assert node.read_only
        os.chmod(image, 0o600)
        await reopen(graph, {node: {}})
        assert not node.read_only

    with_graph(scenario)


class NotYet:
    """A file that may not be opened for writing, whoever asks, until it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuses = True
        self._open = os.open
        monkeypatch.setattr(os, "open", self)

    def __call__(self, path: Any, flags: int, *rest: Any) -> int:
        if self.refuses and flags & os.O_ACCMODE == os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return self._open(path, flags, *rest)


@pytest.mark.parametrize("inline", [True, False])
def test_auto_read_only_node_becomes_writable_when_its_first_writer_comes(
    image: str, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = {"auto-read-only": True}

    async def scenario(graph: BlockGraph) -> None:
        lock = NotYet(monkeypatch)
        file: Any = {"driver": "file", "node-name": "f", "filename": image, **mode}
        if not inline:
            await graph.add(file)
            file = "f"
        raw = {"driver": "raw", "file": file, **mode}
        node = await graph.add({"driver": "pass", "node-name": "p", "file": raw, **mode})
        assert all(below.read_only for below in graph.nodes.values())
        reader = BlockBackend(node, "reader", writable=False, shared=Perm.ALL)
        await acquire_write(graph, node)
        with pytest.raises(ConfigError, match="is read-only"):
            BlockBackend(node, "writer", writable=True, shared=Perm.ALL)
        lock.refuses = False
        await acquire_write(graph, node)
        assert not any(below.read_only for below in graph.nodes.values())
        writer = BlockBackend(node, "writer", writable=True, shared=Perm.ALL)
        await write(writer, 0, b"x")
        assert await read(reader, 0, 1) == b"x"
        await writer.close()
        await reader.close()

    with_graph(scenario)


class NeverWritable(PassNode):
    """As a format that can only be read: `reopen_prepare` says so."""

    driver_name = "never"

    async def open(self, context: OpenContext) -> None:
        await super().open(context)
        self.read_only = True

    async def reopen_prepare(self, reopen: Reopen) -> None:
        reopen.read_only = True


def test_writer_does_not_make_writable_what_cannot_be(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        graph.drivers.register(NeverWritable)
        file = {"driver": "file", "filename": image}
        node = await graph.add({"driver": "never", "file": file, "auto-read-only": True})
        await acquire_write(graph, node)
        assert node.read_only
        with pytest.raises(ConfigError, match="is read-only"):
            BlockBackend(node, "writer", writable=True)

    with_graph(scenario)


def test_node_that_was_asked_to_be_read_only_stays_so_whoever_comes(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        options = {"driver": "file", "filename": image, "auto-read-only": True, "read-only": True}
        node = await graph.add(options)
        await acquire_write(graph, node)
        assert node.read_only

    with_graph(scenario)


def test_detection_of_zeroes_can_be_switched_while_the_disk_is_used(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "file", "filename": image, "discard": "unmap"})
        user = BlockBackend(node, "user", writable=True)
        seen: list[tuple[int, int]] = []
        zero = node.driver_pwrite_zeroes

        def spy(offset: int, length: int, flags: int) -> Any:
            seen.append((offset, flags))
            return zero(offset, length, flags)

        node.driver_pwrite_zeroes = spy  # type: ignore[method-assign]

        async def may_write_alone() -> bool:
            return any(extent.flags & ExtentFlag.WRITE for extent in await user.extents(0, 4096))

        assert await may_write_alone()
        for mode, flags in (("on", 0), ("unmap", int(Req.MAY_UNMAP)), ("off", None)):
            await reopen(graph, {node: {"detect-zeroes": mode}})
            assert await may_write_alone() == (mode == "off")
            await write(user, 4096, b"x" * 4096)
            await write(user, 4096, bytes(4096))
            assert [found for _, found in seen] == ([] if flags is None else [flags])
            seen.clear()
            assert await read(user, 4096, 4096) == bytes(4096)
        with pytest.raises(ConfigError, match="can only be used with 'discard=unmap'"):
            await reopen(graph, {node: {"detect-zeroes": "unmap", "discard": "ignore"}})
        await user.close()

    with_graph(scenario)


def test_read_only_and_back_under_load_loses_no_byte(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add(
            {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": image}}
        )
        choice = random.Random(3)
        model = bytearray(64 * KIB)
        backend = BlockBackend(node, "reader", writable=False, shared=Perm.ALL)
        ended, reads = False, 0

        async def reader() -> None:
            nonlocal reads
            while not ended:
                assert await read(backend, 0, len(model)) == model
                reads += 1
                await asyncio.sleep(0)  # the page cache answers at once

        task = asyncio.create_task(reader())
        for _ in range(40):
            await reopen(graph, {node: {"read-only": "off"}})
            writer = BlockBackend(node, "writer", writable=True, shared=Perm.ALL)
            offset, data = choice.randrange(63 * KIB), choice.randbytes(700)
            backend.child_drained_begin(backend._edge)
            await backend.child_drained_poll(backend._edge)
            await write(writer, offset, data)
            model[offset : offset + 700] = data
            backend.child_drained_end(backend._edge)
            await writer.close()
            await reopen(graph, {node: {"read-only": "on"}})
            with pytest.raises(ConfigError, match="is read-only"):
                BlockBackend(node, "writer", writable=True, shared=Perm.ALL)
            await asyncio.sleep(0)
        ended = True
        await task
        assert reads > 10
        await backend.close()

    with_graph(scenario)
