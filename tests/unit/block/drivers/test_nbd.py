"""The node of an NBD export, with a server in the same loop: what it asks for, and servers that leave, lie and hang."""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.disks import read
from tests.nbd_server import ABLE, Seen, Server, chunk, honest, simple
from tests.unit.block.drivers.nbd_disks import SECONDS, connections, reads_again, run
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers.nbd import NbdNode
from vhostblk.block.drivers.nbd_address import parse_filename
from vhostblk.block.drivers.nbd_link import MAX_IN_FLIGHT
from vhostblk.block.drivers.nbd_wire import Command, CommandFlag, ExportFlag, ReplyType
from vhostblk.block.flags import StatusFlag
from vhostblk.block.graph import BlockGraph
from vhostblk.block.introspection import directory
from vhostblk.block.iov import IoVec
from vhostblk.block.node import Req
from vhostblk.block.status import block_status
from vhostblk.errors import BlockError, ConfigError

FUA = int(Req.FUA)


@pytest.fixture
def path() -> Iterator[Path]:
    """A socket; names of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="vb-nbd-") as folder:
        yield Path(folder) / "s"


def commands(server: Server) -> list[tuple[int, int, int, int]]:
    """(command, flags, offset, length) of all requests so far, which are forgotten."""
    seen = [(one.command, one.flags, one.offset, one.length) for one in server.requests]
    server.requests.clear()
    return seen


def test_every_operation_is_one_request_with_its_flags(path: Path) -> None:
    server = Server()

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(1000, IoVec.of(b"ab", b"c"))
        assert await read(backend, 999, 5) == b"\0abc\0"
        assert commands(server) == [(Command.WRITE, 0, 1000, 3), (Command.READ, 0, 999, 5)]
        await backend.pwritev(512, IoVec.of(bytes(512)), FUA)
        await backend.pwrite_zeroes(4096, 4096, False, FUA)
        await backend.pwrite_zeroes(4096, 4096, True)
        await backend.pwrite_zeroes(4096, 4096, True, int(Req.NO_FALLBACK))
        await backend.pdiscard(8192, 4096)
        await backend.flush()
        assert commands(server) == [
            (Command.WRITE, CommandFlag.FUA, 512, 512),
            (Command.WRITE_ZEROES, CommandFlag.FUA | CommandFlag.NO_HOLE, 4096, 4096),
            (Command.WRITE_ZEROES, 0, 4096, 4096),
            (Command.WRITE_ZEROES, CommandFlag.FAST_ZERO, 4096, 4096),
            (Command.TRIM, 0, 8192, 4096),
            (Command.FLUSH, 0, 0, 0),
        ]
        status = await block_status(backend.node, 4096, 4096)
        assert status.flags & (StatusFlag.ZERO | StatusFlag.DATA) == StatusFlag.ZERO
        assert commands(server) == [(Command.BLOCK_STATUS, CommandFlag.REQ_ONE, 4096, 4096)]

    run(server, path, scenario)
    assert server.requests[-1].command == Command.DISC


@pytest.mark.parametrize("style", ["go", "export-name", "newstyle", "old"])
@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_servers_of_all_ages_keep_what_is_written(style: str, structured: bool, path: Path) -> None:
    server = Server(style=style, structured=structured, flags=int(ExportFlag.HAS_FLAGS))

    async def scenario(backend: BlockBackend) -> None:
        content = bytes(range(256)) * 1024
        await backend.pwritev(512, IoVec.of(content))
        await backend.pwrite_zeroes(1024, 512, True, FUA)
        await backend.pdiscard(4096, 4096)
        await backend.flush()
        expected = content[:512] + bytes(512) + content[1024:]
        assert await read(backend, 512, len(content)) == expected
        assert not {Command.WRITE_ZEROES, Command.TRIM, Command.FLUSH} & {
            one.command for one in server.requests
        }

    run(server, path, scenario)


def test_end_that_is_no_sector_reads_as_zeroes_and_takes_only_those(path: Path) -> None:
    server = Server(size=1000)

    async def scenario(backend: BlockBackend) -> None:
        assert backend.length == 1024
        await backend.pwritev(512, IoVec.of(b"x" * 488 + bytes(24)))
        assert await read(backend, 990, 34) == b"x" * 10 + bytes(24)
        assert await read(backend, 1001, 20) == bytes(20)
        with pytest.raises(BlockError) as caught:
            await backend.pwritev(1000, IoVec.of(b"x"))
        assert caught.value.errno == errno.ENOSPC
        await backend.pwrite_zeroes(512, 512, True)
        assert server.content == bytearray(1000)
        assert (await block_status(backend.node, 0, 1024)).length == 1000
        end = await block_status(backend.node, 1000, 24)
        assert end.flags & StatusFlag.ZERO

    run(server, path, scenario)


def test_limits_are_the_servers(path: Path) -> None:
    server = Server(blocks=(4096, 8192, 16384), size=64 << 10)

    async def scenario(backend: BlockBackend) -> None:
        assert backend.node.limits.request_alignment == 4096
        await backend.pwritev(1, IoVec.of(b"y" * 40_000))
        assert server.content == bytearray(b"\0" + b"y" * 40_000 + bytes((64 << 10) - 40_001))
        writes = [one for one in server.requests if one.command == Command.WRITE]
        assert {one.length for one in writes} <= {4096, 8192, 12288, 16384}
        assert not any(one.offset % 4096 for one in server.requests)

    run(server, path, scenario)


def test_hole_that_is_not_zero_is_no_zero(path: Path) -> None:
    async def says_hole(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        payload = struct.pack(">III", 7, seen.length, 1)
        if seen.command == Command.BLOCK_STATUS:
            writer.write(chunk(seen.handle, ReplyType.BLOCK_STATUS, payload))
        else:
            await honest(server, seen, writer)

    async def scenario(backend: BlockBackend) -> None:
        status = await block_status(backend.node, 0, 4096)
        assert not status.flags & (StatusFlag.ZERO | StatusFlag.DATA | StatusFlag.ALLOCATED)

    run(Server(answer=says_hole), path, scenario)


def test_requests_in_flight_are_few_and_answered_in_any_order(path: Path) -> None:
    waiting: list[tuple[Seen, asyncio.StreamWriter]] = []
    most = 0

    async def last_first(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        nonlocal most
        if seen.command != Command.READ:
            await honest(server, seen, writer)
            return
        waiting.append((seen, writer))
        most = max(most, len(waiting))
        if len(waiting) == MAX_IN_FLIGHT:
            for one, there in reversed(waiting):
                await honest(server, one, there)
            waiting.clear()

    server = Server(answer=last_first)
    server.content[:] = bytes(number // 512 % 251 for number in range(server.size))

    async def scenario(backend: BlockBackend) -> None:
        many = await asyncio.gather(
            *(read(backend, number * 512, 512) for number in range(4 * MAX_IN_FLIGHT))
        )
        assert many == [bytes([number % 251]) * 512 for number in range(4 * MAX_IN_FLIGHT)]

    run(server, path, scenario)
    assert most == MAX_IN_FLIGHT


def test_large_transfers_both_ways_at_once(path: Path) -> None:
    server = Server(size=16 << 20)

    async def scenario(backend: BlockBackend) -> None:
        content = bytes(range(251)) * ((8 << 20) // 251)
        await asyncio.gather(backend.pwritev(0, IoVec.of(content)), read(backend, 8 << 20, 8 << 20))
        assert await read(backend, 0, len(content)) == content

    run(server, path, scenario)


def test_error_of_the_server_is_that_of_the_request_and_nothing_more(path: Path) -> None:
    async def refuses_writes(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.command == Command.WRITE:
            writer.write(simple(seen.handle, errno.ENOSPC))
        else:
            await honest(server, seen, writer)

    async def scenario(backend: BlockBackend) -> None:
        for _ in range(2):
            with pytest.raises(BlockError) as caught:
                await backend.pwritev(0, IoVec.of(bytes(512)))
            assert caught.value.errno == errno.ENOSPC
            assert await read(backend, 0, 512) == bytes(512)

    run(Server(answer=refuses_writes), path, scenario)


async def _garbage(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def _other_handle(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(simple(seen.handle + 1000))


async def _half(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
    payload = struct.pack(">Q", seen.offset) + bytes(seen.length // 2)
    writer.write(chunk(seen.handle, ReplyType.OFFSET_DATA, payload))


async def _too_much(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
    payload = struct.pack(">Q", seen.offset) + bytes(seen.length + 1)
    writer.write(chunk(seen.handle, ReplyType.OFFSET_DATA, payload))


@pytest.mark.parametrize("lie", [_garbage, _other_handle, _half, _too_much])
@pytest.mark.warns("the NBD server .*; it is not used any more")
def test_liar_fails_all_requests_for_good(lie: Any, path: Path) -> None:
    async def lies(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        if len(server.requests) == 3:
            await lie(server, seen, writer)

    server = Server(answer=lies)

    async def scenario(backend: BlockBackend) -> None:
        many = await asyncio.gather(
            *(read(backend, number * 512, 512) for number in range(2 * MAX_IN_FLIGHT)),
            return_exceptions=True,
        )
        assert {one.errno for one in many if isinstance(one, BlockError)} == {errno.EIO}
        assert len(many) == 2 * MAX_IN_FLIGHT
        with pytest.raises(BlockError, match="the NBD server"):
            await read(backend, 0, 512)
        assert server.connections == 1

    run(server, path, scenario, {"reconnect-delay": 3600, "read-only": True})


@pytest.mark.warns("replied to a request before it had all of it", "flush at close failed")
def test_reply_before_all_was_sent_is_a_lie(path: Path) -> None:
    async def scenario(backend: BlockBackend) -> None:
        with pytest.raises(BlockError) as caught:
            await backend.pwritev(0, IoVec.of(bytes(16 << 20)))
        assert caught.value.errno == errno.EIO

    run(Server(size=16 << 20, hasty=True), path, scenario)


def test_memory_of_requests_that_are_over_is_nobodys(path: Path) -> None:
    server = Server()

    async def scenario(backend: BlockBackend) -> None:
        memory = mmap.mmap(-1, 65536)
        await backend.preadv(0, IoVec.of(memory))
        await backend.pwritev(0, IoVec.of(memory))
        await backend.flush()
        server.hang_up()
        with pytest.raises(BlockError):
            await backend.preadv(0, IoVec.of(memory))
        gc.collect()  # what was raised has frames, and those have views
        memory.close()

    run(server, path, scenario)


def test_server_that_leaves_fails_what_is_in_flight_and_comes_back(path: Path) -> None:
    async def leaves(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        if server.connections == 1:
            if len(server.requests) == 3:
                server.hang_up()
        else:
            await honest(server, seen, writer)

    server = Server(answer=leaves)

    async def scenario(backend: BlockBackend) -> None:
        many = await asyncio.gather(
            *(read(backend, number * 512, 512) for number in range(3)), return_exceptions=True
        )
        assert [one.errno for one in many if isinstance(one, BlockError)] == 3 * [errno.EIO]
        await reads_again(backend)

    run(server, path, scenario)


def test_requests_wait_for_a_server_that_comes_back(path: Path) -> None:
    async def leaves(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        if server.connections > 1:
            await honest(server, seen, writer)
        elif len(server.requests) == 3:
            server.hang_up()

    server = Server(answer=leaves)

    async def scenario(backend: BlockBackend) -> None:
        await asyncio.gather(
            *(backend.pwritev(number * 512, IoVec.of(b"z" * 512)) for number in range(5))
        )
        assert server.content[: 6 * 512] == b"z" * 5 * 512 + bytes(512)

    run(server, path, scenario, {"reconnect-delay": 3600})


@pytest.mark.parametrize("other", [{"size": 1 << 19}, {"flags": int(ABLE | ExportFlag.READ_ONLY)}])
def test_another_server_in_its_place_is_left_alone(other: dict[str, Any], path: Path) -> None:
    looked = asyncio.Event()

    async def scenario(backend: BlockBackend) -> None:
        first.hang_up()
        for name, value in other.items():
            setattr(first, name, value)
        waits = asyncio.ensure_future(read(backend, 0, 512))
        await connections(first, 3)
        assert not waits.done()
        backend.node.cancel_in_flight()
        with pytest.raises(BlockError) as caught:
            await waits
        assert caught.value.errno == errno.EIO
        assert {one.command for one in first.requests} <= {Command.DISC}
        looked.set()

    first = Server()
    run(first, path, scenario, {"reconnect-delay": 3600, "read-only": True})
    assert looked.is_set()


def test_closing_does_not_wait_for_a_server_that_is_gone(path: Path) -> None:
    server = Server()

    async def scenario(backend: BlockBackend) -> None:
        server.size = 512
        server.hang_up()
        await connections(server, 2)

    run(server, path, scenario, {"reconnect-delay": 3600, "read-only": True})


def test_patience_ends(path: Path) -> None:
    server = Server()

    async def scenario(backend: BlockBackend) -> None:
        server.size = 512
        server.hang_up()
        await connections(server, 2)
        for _ in range(2):
            with pytest.raises(BlockError) as caught:
                await read(backend, 0, 512)
            assert caught.value.errno == errno.EIO

    run(server, path, scenario, {"reconnect-delay": 1, "read-only": True})


def test_server_that_answers_while_a_request_is_being_cancelled_writes_no_memory_later(
    path: Path,
) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        began.set()
        await go_on.wait()
        await honest(server, seen, writer)

    async def scenario(backend: BlockBackend) -> None:
        task = asyncio.ensure_future(read(backend, 0, 512))
        await began.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(Server(answer=slowly), path, scenario)


def test_opening_waits_for_a_server_if_it_may(path: Path) -> None:
    async def everything() -> None:
        graph = BlockGraph()
        text = f"nbd,server.type=unix,server.path={path}"
        with pytest.raises(ConfigError, match=r"Failed to connect to '.*': No such file"):
            await graph.add(text)
        waits = asyncio.ensure_future(graph.add(f"{text},open-timeout=3600"))
        await asyncio.sleep(0)
        async with asyncio.timeout(SECONDS), Server().serving(path):
            node = await waits
            assert node.length == 1 << 20
            await graph.close_all()

    asyncio.run(everything())


def test_opening_that_is_cancelled_leaves_nothing(path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        await reader.read()
        writer.close()

    came = asyncio.Event()

    async def everything() -> None:
        graph = BlockGraph()
        async with asyncio.timeout(SECONDS), await asyncio.start_unix_server(silent, path):
            waits = asyncio.ensure_future(graph.add(f"nbd,path={path}"))
            await came.wait()
            waits.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waits
        assert not graph.nodes
        await graph.close_all()

    asyncio.run(everything())


def test_read_only_export_opens_read_only(path: Path) -> None:
    server = Server(flags=int(ABLE | ExportFlag.READ_ONLY))

    async def scenario(backend: BlockBackend) -> None:
        assert backend.node.read_only
        assert await read(backend, 0, 512) == bytes(512)

    with pytest.raises(ConfigError, match="NBD export is read-only"):
        run(server, path, scenario)
    run(server, path, scenario, {"auto-read-only": True})
    run(server, path, scenario, {"read-only": True})


def test_length_cannot_be_changed(path: Path) -> None:
    async def scenario(backend: BlockBackend) -> None:
        with pytest.raises(BlockError, match="Cannot resize NBD nodes") as caught:
            await backend.node.driver_truncate(512, None)  # type: ignore[arg-type]
        assert caught.value.errno == errno.ENOTSUP

    run(Server(), path, scenario)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nbd:unix:/a/b", {"server.type": "unix", "server.path": "/a/b"}),
        (
            "nbd:unix:/a:exportname=x:y",
            {"server.type": "unix", "server.path": "/a", "export": "x:y"},
        ),
        ("nbd:h:1", {"server.type": "inet", "server.host": "h", "server.port": "1"}),
        ("nbd:[::1]:1", {"server.type": "inet", "server.host": "::1", "server.port": "1"}),
        ("nbd:", {}),
        (
            "nbd+unix:///x?socket=/a%20b",
            {"server.type": "unix", "server.path": "/a b", "export": "x"},
        ),
        ("nbd+unix://?socket=s", {"server.type": "unix", "server.path": "s"}),
        (
            "nbd://Host/x/y",
            {
                "server.type": "inet",
                "server.host": "Host",
                "server.port": "10809",
                "export": "x/y",
            },
        ),
        ("nbd+tcp://[::1]:7", {"server.type": "inet", "server.host": "::1", "server.port": "7"}),
    ],
)
def test_file_name_stands_for_options(name: str, options: dict[str, str]) -> None:
    assert parse_filename(name) == options


@pytest.mark.parametrize(
    "name",
    [
        *("nbd:x", "nbd:[::1", "nbd:h:1,to=2", "nbd://", "nbd://h?x=y", "nbd://h:port"),
        "nbd+unix:///x",
        "nbd+unix://h/x?socket=s",
        "nbd+unix:///x?path=s",
        "nbd+unix:///x?socket=s&a=b",
    ],
)
def test_other_file_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        parse_filename(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "NBD server address missing"),
        ("port=1", "NBD server address missing"),
        ("server.path=x", "'server.type' is missing"),
        ("server.type=unix", "'server.path' is missing"),
        ("server.type=inet,server.host=x", "'server.port' is missing"),
        ("server.type=unix,server.path=x,server.host=y", "'server.host' is unexpected"),
        ("server.type=inet,server.path=x", "'server.path' is unexpected"),
        ("server.type=vsock", "does not accept value 'vsock'"),
        ("path=x,host=y", "path and host may not be used at the same time"),
        ("path=x,port=1", "port may not be used without host"),
        ("path=x,server.type=unix", "Cannot use 'server' and path/host/port at the same time"),
        (f"path={'x' * 108}", "is too long"),
        (f"path=x,export={'x' * 4097}", "export name too long"),
        (f"path=x,x-dirty-bitmap={'x' * 4097}", "x-dirty-bitmap query too long"),
        ("path=x,tls-creds=tls0", "'tls-creds': TLS is not supported"),
        ("path=x,tls-hostname=h", "'tls-hostname': TLS is not supported"),
    ],
)
def test_wrong_options_are_refused(options: str, message: str) -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        with pytest.raises(ConfigError, match=message):
            await graph.add(f"nbd,{options}" if options else "nbd")
        await graph.close_all()

    asyncio.run(scenario())


def test_text_that_cannot_be_bytes_is_refused() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        for name in ("path", "export"):
            flat = {"driver": "nbd", "path": "x", name: "a\ud800"}
            with pytest.raises(ConfigError, match=f"'{name}' expects text"):
                await graph.add(flat)
        await graph.close_all()

    asyncio.run(scenario())


def test_name_that_is_no_utf8_is_told_as_it_came(path: Path) -> None:
    async def scenario(backend: BlockBackend) -> None:
        assert await read(backend, 0, 4) == bytes(4)

    run(Server(), path, scenario, {"export": "a\udcff"})


def test_no_file_descriptor_left_is_a_server_that_cannot_be_reached(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EMFILE, "")

    async def scenario() -> None:
        graph = BlockGraph()
        monkeypatch.setattr("vhostblk.block.drivers.nbd_address.socket.socket", refuse)
        with pytest.raises(ConfigError, match=r"Failed to connect to '.*': Too many open files"):
            await graph.add(f"nbd,path={path}")
        monkeypatch.undo()
        await graph.close_all()

    asyncio.run(scenario())


def test_exact_filename_opens_the_same(path: Path) -> None:
    async def scenario(backend: BlockBackend) -> None:
        node = backend.node
        assert isinstance(node, NbdNode)
        assert node.exact_filename() == f"nbd+unix:///x?socket={path}"
        assert parse_filename(node.exact_filename())["export"] == "x"
        with pytest.raises(ConfigError, match="Cannot generate a base directory for NBD nodes"):
            directory(node)

    run(Server(), path, scenario, {"export": "x"})


@pytest.mark.parametrize("context", ["qemu:dirty-bitmap:b0"])
def test_context_that_the_server_lacks_is_refused(context: str, path: Path) -> None:
    async def scenario(backend: BlockBackend) -> None:
        raise AssertionError

    with pytest.raises(ConfigError, match=f"requested x-dirty-bitmap {context} not found"):
        run(Server(context=None), path, scenario, {"x-dirty-bitmap": context})
