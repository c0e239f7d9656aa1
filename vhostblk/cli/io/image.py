"""open, close, reopen: which image the other commands are about, and how it is open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vhostblk.block.keyval import parse_flat
from vhostblk.block.modes import CACHE_MODES, CacheMode, parse_cache_mode, parse_discard_mode
from vhostblk.block.reopen import reopen as reopen_nodes
from vhostblk.cli.io.command import (
    Arguments,
    RefusedError,
    flag,
    operands,
    valued,
)
from vhostblk.cli.io.session import Modes, Session
from vhostblk.errors import ConfigError

_CACHE_OPTIONS = ("cache.direct", "cache.no-flush")


def discard_mode(word: str) -> str:
    """`-d`.

    Raises:
        ConfigError: there is no such mode.
    """
    return "unmap" if parse_discard_mode(word) else "ignore"


def aio_mode(word: str) -> str:
    """`-i`.

    Raises:
        RefusedError: there is no such mode.
    """
    if word not in ("threads", "native", "io_uring"):
        raise RefusedError(f"Invalid aio option: {word}")
    return word


def image_options(text: str) -> dict[str, str]:
    """`-o`, and an image that is given as options.

    Raises:
        RefusedError: it is no list of options.
    """
    try:
        return parse_flat(text)
    except ConfigError as error:
        raise RefusedError(error.qemu_text) from None


@dataclass
class Open(Arguments):
    """`open`."""

    copy_on_read: bool = flag("C")
    discard: str | None = valued("d", discard_mode)
    aio: str | None = valued("i", aio_mode)
    native_aio: bool = flag("k")
    no_cache: bool = flag("n")
    options: dict[str, str] | None = valued("o", image_options)
    read_only: bool = flag("r")
    snapshot: bool = flag("s")
    cache: CacheMode | None = valued("t", parse_cache_mode)
    force_share: bool = flag("U")
    names: tuple[str, ...] = operands(0, 1)


def modes_of(args: Any) -> Modes:
    """What the options of `open`, or those of the command line, which are the same, ask for."""
    cache = args.cache or CACHE_MODES["none" if args.no_cache else "writethrough"]
    return Modes(
        read_only=args.read_only,
        cache=cache,
        discard=args.discard or "unmap",
        aio="native" if args.native_aio else args.aio,
        force_share=args.force_share,
        copy_on_read=args.copy_on_read,
        snapshot=args.snapshot,
    )


async def open_(session: Session, args: Open) -> None:
    """Open an image."""
    name = args.names[0] if args.names else None
    await session.open(name, args.options or {}, modes_of(args))


async def close(session: Session, args: Arguments) -> None:
    """Close it."""
    await session.close()


def _one_way(found: Reopen) -> None:
    if found.read_only or found.writable:
        raise RefusedError("Only one -r/-w option may be given")


@dataclass
class Reopen(Arguments):
    """`reopen`."""

    cache: CacheMode | None = valued("c", parse_cache_mode)
    options: dict[str, str] | None = valued("o", image_options)
    read_only: bool = flag("r", refuse=_one_way)
    writable: bool = flag("w", refuse=_one_way)
    none: tuple[str, ...] = operands(0, 0)


async def reopen(session: Session, args: Reopen) -> None:
    """Change options of the image while it is open."""
    image = session.opened
    options: dict[str, Any] = dict(args.options or {})
    read_only = args.read_only or (image.node.read_only and not args.writable)
    if "read-only" not in options:
        options["read-only"] = read_only
    elif args.read_only or args.writable:
        raise RefusedError("Cannot set both -r/-w and 'read-only'")
    cache = args.cache or image.cache
    if not any(name in options for name in _CACHE_OPTIONS):
        options.update(cache.options)
    elif args.cache is not None:
        raise RefusedError("Cannot set both -c and the cache options")
    try:
        if read_only and image.backend.writable:
            await image.backend.ask(writable=False)
            image.resizes = False
        await reopen_nodes(image.graph, {image.node: options})
    except ConfigError as error:
        raise RefusedError(error.qemu_text) from None
    image.cache = cache
    image.backend.write_cache = not cache.writethrough
