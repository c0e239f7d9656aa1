"""An NBD server in the test's own process and loop, that serves from memory, honestly or not."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from vhostblk.block.drivers.nbd_handshake import (
    ANSWER_MAGIC,
    INIT_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
)
from vhostblk.block.drivers.nbd_wire import (
    CHUNK,
    REQUEST,
    SIMPLE,
    SIMPLE_MAGIC,
    STRUCTURED_MAGIC,
    Command,
    ExportFlag,
    ReplyType,
)

ABLE = (
    ExportFlag.HAS_FLAGS
    | ExportFlag.SEND_FLUSH
    | ExportFlag.SEND_FUA
    | ExportFlag.SEND_TRIM
    | ExportFlag.SEND_WRITE_ZEROES
    | ExportFlag.SEND_FAST_ZERO
)
GO, STRUCTURED, CONTEXT, EXPORT_NAME = 7, 8, 10, 1
ERR_UNSUP = (1 << 31) + 1


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    flags: int
    command: int
    handle: int
    offset: int
    length: int
    content: bytes = b""


Answer = Callable[["Server", Seen, asyncio.StreamWriter], Awaitable[None]]


def simple(handle: int, error: int = 0, content: bytes = b"") -> bytes:
    """A simple reply."""
    return SIMPLE.pack(SIMPLE_MAGIC, error, handle) + content


def chunk(handle: int, kind: int, payload: bytes = b"", *, done: bool = True) -> bytes:
    """A structured one."""
    return CHUNK.pack(STRUCTURED_MAGIC, done, kind, handle, len(payload)) + payload


def option_answer(option: int, kind: int, payload: bytes = b"") -> bytes:
    """An answer in the handshake."""
    return struct.pack(">QIII", ANSWER_MAGIC, option, kind, len(payload)) + payload


@dataclass
class Server:
    """What it has and can do; `answer` is called for every request.

    Attributes: style: "go", "export-name" (no NBD_OPT_GO), "newstyle" (not the fixed one), "old".
        blocks: minimum, preferred and maximum; none: not said. hasty: answers a write without having read it.
    """

    size: int = 1 << 20
    flags: int = int(ABLE)
    style: str = "go"
    structured: bool = True
    context: int | None = 7
    blocks: tuple[int, int, int] | None = (1, 4096, 32 << 20)
    hasty: bool = False
    answer: Answer | None = None
    content: bytearray = field(default_factory=bytearray)
    requests: list[Seen] = field(default_factory=list)
    connections: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.content = self.content or bytearray(self.size)

    @contextlib.asynccontextmanager
    async def serving(self, path: Path) -> AsyncIterator[None]:
        """Listen there."""
        tasks: set[asyncio.Task[None]] = set()

        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            self.connections += 1
            self.writers.append(writer)
            try:
                await self._serve(reader, writer)
            except (EOFError, OSError, asyncio.CancelledError):
                pass
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
                tasks.discard(task)

        server = await asyncio.start_unix_server(client, path)
        try:
            yield
        finally:
            server.close()
            if tasks:  # whoever has said goodbye is heard
                await asyncio.wait(tasks, timeout=1)
            self.hang_up()
            for task in tuple(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            path.unlink(missing_ok=True)  # noqa: ASYNC240 - that waits for nobody

    def hang_up(self) -> None:
        """Leave all clients."""
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not await self._shake_hands(reader, writer):
            return
        while True:
            _, flags, command, handle, offset, length = REQUEST.unpack(
                await reader.readexactly(REQUEST.size)
            )
            if command == Command.WRITE and self.hasty:
                writer.write(simple(handle))
                await asyncio.Event().wait()
            content = await reader.readexactly(length) if command == Command.WRITE else b""
            seen = Seen(flags, command, handle, offset, length, content)
            self.requests.append(seen)
            if command == Command.DISC:
                return
            await (self.answer or honest)(self, seen, writer)
            await writer.drain()

    async def _shake_hands(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        export = struct.pack(">QH", self.size, self.flags)
        writer.write(struct.pack(">Q", INIT_MAGIC))
        if self.style == "old":
            writer.write(struct.pack(">QQI", OLDSTYLE_MAGIC, self.size, self.flags) + bytes(124))
            return True
        writer.write(struct.pack(">QH", OPTION_MAGIC, 0 if self.style == "newstyle" else 3))
        await reader.readexactly(4)
        while True:
            _, option, length = struct.unpack(">QII", await reader.readexactly(16))
            await reader.readexactly(length)
            if option == EXPORT_NAME:
                writer.write(export + (bytes(124) if self.style == "newstyle" else b""))
                return True
            if option == GO and self.style == "go":
                writer.write(option_answer(GO, 3, b"\0\0" + export))
                if self.blocks is not None:
                    sizes = struct.pack(">HIII", 3, *self.blocks)
                    writer.write(option_answer(GO, 3, sizes))
                writer.write(option_answer(GO, 1))
                return True
            if option == STRUCTURED and self.structured:
                writer.write(option_answer(STRUCTURED, 1))
            elif option == CONTEXT and self.context is not None:
                found = self.context.to_bytes(4, "big") + b"base:allocation"
                writer.write(option_answer(CONTEXT, 4, found) + option_answer(CONTEXT, 1))
            else:
                writer.write(option_answer(option, ERR_UNSUP, b"no such thing"))
            await writer.drain()


async def honest(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Do what is asked."""
    end = seen.offset + seen.length
    reply = simple(seen.handle)
    if seen.command == Command.READ:
        content = bytes(server.content[seen.offset : end])
        if server.structured and server.style != "newstyle" and server.style != "old":
            payload = struct.pack(">Q", seen.offset) + content
            reply = chunk(seen.handle, ReplyType.OFFSET_DATA, payload)
        else:
            reply += content
    elif seen.command == Command.WRITE:
        server.content[seen.offset : end] = seen.content
    elif seen.command in (Command.TRIM, Command.WRITE_ZEROES):
        server.content[seen.offset : end] = bytes(seen.length)
    elif seen.command == Command.BLOCK_STATUS:
        is_zero = not any(server.content[seen.offset : end])
        payload = struct.pack(">III", server.context or 0, seen.length, 3 if is_zero else 0)
        reply = chunk(seen.handle, ReplyType.BLOCK_STATUS, payload)
    writer.write(reply)
