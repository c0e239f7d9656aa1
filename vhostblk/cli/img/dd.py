"""`dd`: copy part of an image into a new one, block by block, with dd(1)'s operands."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vhostblk.block.backend import BlockBackend
from vhostblk.block.create import NewImage
from vhostblk.block.iov import IoVec
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.cli.img.arguments import ImageArguments, ImgError, flag, valued
from vhostblk.cli.img.numbers import INT64_MAX, INT_MAX, size
from vhostblk.cli.img.session import Session, errno_text, reason
from vhostblk.cli.img.table import Command
from vhostblk.errors import BlockError, ConfigError

_BLOCK_SIZE = 512
_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"bs": (1, INT_MAX), "count": (0, INT64_MAX), "skip": (0, INT64_MAX)}
)
_NAMES = ("if", "of")
# Whatever the size of the blocks: it makes no difference to the target.
_AT_ONCE = 2 << 20


@lean_dataclass(slots=True)
class Dd(ImageArguments):
    """Its options; the operands are in `sizes` and `names`."""

    force_share: bool = flag("U", "force-share")
    format: str | None = valued("f")
    target_format: str = valued("O", default="raw")


@lean_dataclass(frozen=True, slots=True)
class _Operands:
    """What stands behind the options.

    Attributes:
        skip, count: blocks; `count` absent: all.
    """

    source: str
    target: str
    block: int
    skip: int
    count: int | None


def _operands(words: tuple[str, ...]) -> _Operands:
    sizes: dict[str, int] = {}
    names: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if separator and name in _SIZES:
            sizes[name] = size(name, value, *_SIZES[name])
        elif separator and name in _NAMES:
            names[name] = value
        else:
            raise ImgError(f"unrecognized operand {name}")
    if len(names) < len(_NAMES):
        raise ImgError("Must specify both input and output files")
    return _Operands(
        names["if"],
        names["of"],
        sizes.get("bs", _BLOCK_SIZE),
        sizes.get("skip", 0),
        sizes.get("count"),
    )


async def run(session: Session, args: Dd) -> int:
    """Copy."""
    operands = _operands(args.words)
    source = await session.open(
        operands.source, args.format, image_opts=args.image_opts, force_share=args.force_share
    )
    drivers = session.graph.drivers
    if args.target_format not in drivers:
        raise ImgError("Unknown file format")
    image = NewImage(session.graph, operands.target, args.target_format)
    end = source.length
    if operands.count is not None:
        end = min(end, operands.count * operands.block)
    start = operands.skip * operands.block
    session.unfinished.append(operands.target)
    try:
        image.options.set("size", max(end - start, 0))
        await image.create()
    except (ConfigError, BlockError) as error:
        raise ImgError(
            f"{operands.target}: error while creating output image: {reason(error)}"
        ) from None
    target = await session.open(operands.target, args.target_format, writable=True)
    if start > end:
        session.complain(f"{operands.source}: cannot skip to specified offset")
    else:
        await _copy(source, start, end, target)
    await session.close(target)
    session.unfinished.clear()
    return 0


async def _copy(source: BlockBackend, start: int, end: int, target: BlockBackend) -> None:
    buffer = memoryview(bytearray(min(_AT_ONCE, end - start)))
    for offset in range(start, end, _AT_ONCE):
        part = IoVec([buffer[: end - offset]])
        try:
            await source.preadv(offset, part)
        except BlockError as error:
            raise ImgError(
                f"error while reading from input image file: {errno_text(error)}"
            ) from None
        try:
            await target.pwritev(offset - start, part)
        except BlockError as error:
            raise ImgError(
                f"error while writing to output image file: {errno_text(error)}"
            ) from None


COMMAND = Command(Dd, run)
