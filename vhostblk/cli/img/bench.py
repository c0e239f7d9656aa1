"""`bench`: the same request over and over, several at a time, and how long that takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.modes import CACHE_MODES, CacheMode
from vhostblk.cli.img.arguments import Arguments, ImgError, flag, valued
from vhostblk.cli.img.numbers import INT_MAX, integer, size
from vhostblk.cli.img.session import Session, errno_text
from vhostblk.cli.img.table import Command
from vhostblk.errors import BlockError, ConfigError

_AIO = ("threads", "native", "io_uring")


def _number(what: str, most: int = INT_MAX) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = integer(text)
        except ValueError:
            value = -1
        if not 0 <= value <= most:
            raise ImgError(f"Invalid {what} specified")
        return value

    return read


def _size(what: str) -> Callable[[str], int]:
    return lambda text: size(what, text, 0, INT_MAX)


def _cache(text: str) -> CacheMode:
    if text not in CACHE_MODES:
        raise ImgError("Invalid cache mode")
    return CACHE_MODES[text]


def _aio(text: str) -> str:
    if text not in _AIO:
        raise ImgError(f"Invalid aio option: {text}")
    return text


@lean_dataclass(slots=True)
class Bench(Arguments):
    """Its options."""

    count: int = valued("c", read=_number("request count"), default=75000)
    depth: int = valued("d", read=_number("queue depth"), default=64)
    format: str | None = valued("f")
    flush_interval: int = valued("", "flush-interval", _number("flush interval"), 0)
    native_aio: bool = flag("n")
    aio: str | None = valued("i", read=_aio)
    offset: int = valued("o", read=lambda text: size("offset", text), default=0)
    pattern: int = valued("", "pattern", _number("pattern byte", 0xFF), 0)
    no_drain: bool = flag("", "no-drain")
    image_opts: bool = flag("", "image-opts")
    quiet: bool = flag("q")
    request: int = valued("s", read=_size("buffer size"), default=4096)
    step: int = valued("S", read=_size("step_size"), default=0)
    cache: CacheMode = valued("t", read=_cache, default=CACHE_MODES["writeback"])
    write: bool = flag("w")
    force_share: bool = flag("U", "force-share")

    def check(self) -> None:
        """See `Arguments.check`."""
        self.check_one_image()
        if self.flush_interval and not self.write:
            raise ImgError("--flush-interval is only available in write tests")
        if self.flush_interval and self.flush_interval < self.depth:
            raise ImgError("Flush interval can't be smaller than depth")


async def run(session: Session, args: Bench) -> int:
    """Say what is done, do it, say how long it took."""
    backend = await _open(session, args)
    bench = _Bench(backend, args)
    session.out(
        f"Sending {args.count} {'write' if args.write else 'read'} requests, {args.request} bytes each, "
        f"{args.depth} in parallel (starting at offset {args.offset}, step size {bench.step})"
    )
    if args.flush_interval:
        session.out(f"Sending flush every {args.flush_interval} requests")
    begin = time.monotonic()
    await bench.run()
    session.out(f"Run completed in {time.monotonic() - begin:.3f} seconds.")
    return 0


async def _open(session: Session, args: Bench) -> BlockBackend:
    native = args.native_aio or args.aio == "native"
    if args.aio is not None and not native:
        session.graph = BlockGraph(aio=args.aio)
    backend = await session.open(
        args.words[0],
        args.format,
        image_opts=args.image_opts,
        writable=args.write,
        cache=args.cache,
        force_share=args.force_share,
    )
    if native:
        from vhostblk.cli.io.session import check_direct

        try:
            check_direct(backend.node)
        except ConfigError as error:
            raise ImgError(f"Could not open '{args.words[0]}': {error}") from None
    return backend


class _Bench:
    """As many workers as there may be requests in flight.

    Whenever the requests that remain are a multiple of the interval there is a flush: when all that were begun are
    over, or, without drain, beside them.
    """

    def __init__(self, backend: BlockBackend, args: Bench) -> None:
        self.step = args.step or args.request
        self._backend = backend
        self._args = args
        self._remaining = args.count
        self._offset = args.offset
        self._in_flight = 0
        self._flushed: asyncio.Future[None] | None = None
        self._iov = IoVec.of(bytearray([args.pattern]) * args.request)

    async def run(self) -> None:
        """All of it."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._args.depth, self._args.count)):
                    group.create_task(self._work(group))
        except* ImgError as failed:
            raise failed.exceptions[0] from None

    async def _work(self, group: asyncio.TaskGroup) -> None:
        interval, drain = self._args.flush_interval, not self._args.no_drain
        while self._remaining:
            self._remaining -= 1
            self._in_flight += 1
            await self._request()
            self._in_flight -= 1
            if not interval or self._remaining % interval:
                continue
            if not drain:
                group.create_task(self._flush("Failed flush request"))
            elif self._in_flight:
                if self._flushed is None:
                    self._flushed = asyncio.get_running_loop().create_future()
                await asyncio.shield(self._flushed)
            else:
                await self._flush("Failed request")
                flushed, self._flushed = self._flushed, None
                if flushed is not None:
                    flushed.set_result(None)

    async def _request(self) -> None:
        offset = self._offset
        if self._backend.length:
            self._offset = (offset + self.step) % self._backend.length
        try:
            if self._args.write:
                await self._backend.begin_pwritev(offset, self._iov)
            else:
                await self._backend.begin_preadv(offset, self._iov)
        except BlockError as error:
            raise ImgError(f"Failed request: {errno_text(error)}") from None

    async def _flush(self, what: str) -> None:
        try:
            await self._backend.flush()
        except BlockError as error:
            raise ImgError(f"{what}: {errno_text(error)}") from None


COMMAND = Command(Bench, run)
