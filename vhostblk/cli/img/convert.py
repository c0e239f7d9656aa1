"""`convert`: copy images, one behind the other, into another one; how is in `block/convert.py`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from vhostblk.block import foreign_formats
from vhostblk.block.backend import BlockBackend
from vhostblk.block.convert import (
    LARGEST_BUFFER,
    MOST_WORKERS,
    Conversion,
    ConvertOptions,
    What,
)
from vhostblk.block.create import NewImage, help_on_options
from vhostblk.block.flags import Req
from vhostblk.block.image_options import ImageOptions, wants_help
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.limits import SECTOR_SIZE
from vhostblk.block.modes import CacheMode, parse_cache_mode
from vhostblk.block.permissions import Perm
from vhostblk.cli.img.arguments import (
    ImageArguments,
    ImgError,
    flag,
    listed,
    option_list,
    valued,
)
from vhostblk.cli.img.numbers import integer, size
from vhostblk.cli.img.progress import Progress
from vhostblk.cli.img.session import Session, errno_text, reason
from vhostblk.cli.img.snapshot_param import SnapshotParam, read_snapshot_param, show_snapshot
from vhostblk.cli.img.table import Command
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.dirty_bitmap import DirtyBitmap


def _sparse_size(text: str) -> int:
    value = size("buffer size for sparse output", text)
    if value % SECTOR_SIZE or value > LARGEST_BUFFER:
        raise ImgError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of "
            f"{SECTOR_SIZE} up to {LARGEST_BUFFER}. Select 0 to disable sparse detection "
            "(fully allocates output)."
        )
    return value


def _workers(text: str) -> int:
    try:
        value = integer(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MOST_WORKERS:
        raise ImgError(
            "Invalid number of coroutines. Allowed number of coroutines is between 1 and "
            f"{MOST_WORKERS}"
        )
    return value


@lean_dataclass(slots=True)
class Convert(ImageArguments):
    """Its options."""

    target_image_opts: bool = flag("", "target-image-opts")
    target_is_zero: bool = flag("", "target-is-zero")
    salvage: bool = flag("", "salvage")
    bitmaps: bool = flag("", "bitmaps")
    skip_broken_bitmaps: bool = flag("", "skip-broken-bitmaps")
    force_share: bool = flag("U", "force-share")
    format: str | None = valued("f")
    target_format: str | None = valued("O")
    backing_file: str | None = valued("B")
    backing_format: str | None = valued("F")
    offload: bool = flag("C")
    compress: bool = flag("c")
    options: tuple[str, ...] = listed("o", read=option_list)
    snapshot: SnapshotParam | None = valued("l", read=read_snapshot_param)
    sparse_size: int | None = valued("S", read=_sparse_size)
    progress: bool = flag("p")
    cache: str = valued("t", default="unsafe")
    source_cache: str = valued("T", default="writeback")
    quiet: bool = flag("q")
    is_there: bool = flag("n")
    workers: int = valued("m", read=_workers, default=8)
    out_of_order: bool = flag("W")
    rate: int = valued("r", read=lambda text: size("rate limit", text), default=0)

    @property
    def output(self) -> str:
        """The name of the target."""
        return self.words[-1]

    def check(self) -> None:
        """See `Arguments.check`."""
        if self.target_format is None and not self.target_image_opts:
            self.target_format = "raw"
        for applies, message in (
            (
                self.skip_broken_bitmaps and not self.bitmaps,
                "Use of --skip-broken-bitmaps requires --bitmaps",
            ),
            (self.compress and self.offload, "Cannot enable copy offloading when -c is used"),
            (
                self.sparse_size is not None and self.offload,
                "Cannot enable copy offloading when -S is used",
            ),
            (self.offload and self.salvage, "Cannot use copy offloading in salvaging mode"),
            (
                self.target_image_opts and not self.is_there,
                "--target-image-opts requires use of -n flag",
            ),
            (
                self.is_there and bool(self.options),
                "-o has no effect when skipping image creation",
            ),
            (
                self.target_is_zero and not self.is_there,
                "--target-is-zero requires use of -n flag",
            ),
        ):
            if applies:
                raise ImgError(message)


async def run(session: Session, args: Convert) -> int:
    """Copy."""
    session.quiet = args.quiet
    if wants_help(",".join(args.options)):
        assert args.target_format is not None
        name = args.output if len(args.words) > 1 else None
        sys.stdout.write(help_on_options(session.graph.drivers, args.target_format, name))
        return 0
    if len(args.words) < 2:
        raise ImgError("Must specify image file name")
    source_cache = parse_cache_mode(args.source_cache, "source cache")
    with Progress(args.progress and not args.quiet) as progress:
        await _Run(session, args, progress).run(source_cache)
        progress.update(1.0)
    return 0


class _Run:
    """One conversion, and what it says of itself."""

    def __init__(self, session: Session, args: Convert, progress: Progress) -> None:
        self._session = session
        self._args = args
        self._progress = progress
        # Of the first source, and whether they record: its node has none any more if it shows a snapshot of another
        # size, to which none fits.
        self._bitmaps: list[tuple[DirtyBitmap, bool]] = []

    async def run(self, source_cache: CacheMode) -> None:
        """In the order in which qemu-img finds what is wrong."""
        session, args = self._session, self._args
        if args.format in foreign_formats.NAMES and not args.is_there:
            # Nobody here can open the source, so this is all that would be found wrong after that.
            self._new_image(0)
        sources = [
            await session.open(
                name,
                args.format,
                image_opts=args.image_opts,
                cache=source_cache,
                force_share=args.force_share,
                shared=Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED,
            )
            for name in args.words[:-1]
        ]
        found = sources[0].node.bitmaps
        self._bitmaps = [(bitmap, bitmap.enabled) for bitmap in found if bitmap.persistent]
        await self._load_snapshot(sources)
        total = sum(source.length for source in sources)
        image = None if args.is_there else self._new_image(total)
        said: ImageOptions | dict[str, Any] = image.options if image is not None else {}
        backing = said.get("backing_file") or args.backing_file
        if args.target_is_zero and backing is not None:
            raise ImgError(
                "Cannot use --target-is-zero when the destination image has a backing file"
            )
        if len(sources) > 1 and backing is not None:
            raise ImgError(
                "Having a backing file for the target makes no sense when concatenating "
                "multiple input images"
            )
        if "backing_file" in said and "backing_fmt" not in said:
            raise ImgError("Use of backing file requires explicit backing format")
        if args.compress:
            self._check_compression(said)
        if args.bitmaps:
            self._check_bitmaps(sources)
        session.unfinished.append(args.output)
        if image is not None:
            try:
                driver = said.get("backing_fmt")
                if driver is not None and driver not in session.graph.drivers:
                    raise ConfigError(f"Parameter 'backing-fmt' does not accept value '{driver}'")
                await image.create()
            except (ConfigError, BlockError) as error:
                raise ImgError(
                    f"{args.output}: error while converting {args.target_format}: {reason(error)}"
                ) from None
        target = await self._open_target(total, said)
        await self._copy(sources, target, has_backing=backing is not None)
        if args.bitmaps:
            await self._copy_bitmaps(target)
        await session.close(target)
        session.unfinished.clear()

    async def _load_snapshot(self, sources: list[BlockBackend]) -> None:
        wanted = self._args.snapshot
        if wanted is not None and wanted.either is not None and len(sources) > 1:
            raise ImgError("No support for concatenating multiple snapshot")
        await show_snapshot(self._session, sources[0].node, wanted)

    # ------------------------------------------------------------------ the target

    def _new_image(self, total: int) -> NewImage:
        """The image that is to be made; whatever was said of its size is not so."""
        args = self._args
        assert args.target_format is not None
        image = NewImage(self._session.graph, args.output, args.target_format)
        image.options.say(",".join(args.options))
        image.options.set("size", total)
        image.say("", backing_file=args.backing_file, backing_format=args.backing_format)
        return image

    def _check_compression(self, said: ImageOptions | dict[str, Any]) -> None:
        args = self._args
        if not args.is_there:
            assert args.target_format is not None
            driver = self._session.graph.drivers[args.target_format]
            if not driver.supported_write_flags & Req.WRITE_COMPRESSED:
                raise ImgError("Compression not supported for this file format")
        if said.get("encryption") or "encrypt.format" in said:
            raise ImgError("Compression and encryption not supported at the same time")
        if said.get("preallocation") not in (None, "off"):
            raise ImgError("Compression and preallocation not supported at the same time")

    async def _open_target(self, total: int, said: ImageOptions | dict[str, Any]) -> BlockBackend:
        args = self._args
        more = {name: said[name] for name in said if name.endswith("key-secret")}
        if args.sparse_size != 0:
            more["discard"] = "unmap"
        cache = parse_cache_mode(args.cache)
        target = await self._session.open(
            args.output,
            args.target_format,
            image_opts=args.target_image_opts,
            writable=True,
            # O_DIRECT may have to make the file longer, up to a whole block.
            resize=cache.direct,
            cache=cache,
            more=more,
        )
        driver = target.node.driver_name
        if args.bitmaps and not target.node.keeps_bitmaps():
            raise ImgError(f"Format driver '{driver}' does not support bitmaps")
        if args.compress and not target.node.supported_write_flags & Req.WRITE_COMPRESSED:
            raise ImgError("Compression not supported for this file format")
        if args.is_there and target.length < total:
            raise ImgError("output file is smaller than input file")
        return target

    # ------------------------------------------------------------------ copying

    async def _copy(
        self, sources: list[BlockBackend], target: BlockBackend, *, has_backing: bool
    ) -> None:
        args = self._args
        options = ConvertOptions(
            min_sparse=4096 if args.sparse_size is None else args.sparse_size,
            compressed=args.compress,
            offload=args.offload,
            salvage=args.salvage,
            in_order=not args.out_of_order,
            workers=args.workers,
            rate=args.rate,
            is_new=not args.is_there,
            has_backing=has_backing,
            is_zero=args.target_is_zero,
        )
        try:
            conversion = Conversion(sources, target, options, self)
        except BlockError as error:
            raise ImgError(reason(error)) from None
        try:
            await conversion.run()
        except BlockError:
            raise ImgError from None  # it has been said already

    def progress(self, done: float) -> None:
        """See `block.convert.Listener`."""
        self._progress.update(done)

    def failed(self, what: What, offset: int, error: BlockError) -> None:
        """See `block.convert.Listener`."""
        where = "offset" if what is What.STATUS else "byte"
        self._session.complain(f"error while {what.value} at {where} {offset}: {errno_text(error)}")

    def lost(self, what: What, offset: int, error: BlockError) -> None:
        """See `block.convert.Listener`."""
        if not self._args.quiet:
            where = "at offset" if what is What.STATUS else "offset"
            self._session.warn(f"error while {what.value} {where} {offset}: {errno_text(error)}")

    # ------------------------------------------------------------------ bitmaps

    def _check_bitmaps(self, sources: list[BlockBackend]) -> None:
        if len(sources) > 1:
            raise ImgError("Copying bitmaps only possible with single source")
        if not sources[0].node.keeps_bitmaps():
            raise ImgError("Source lacks bitmap support")
        for bitmap, _ in self._bitmaps:
            if bitmap.inconsistent and not self._args.skip_broken_bitmaps:
                raise ImgError(
                    f"Cannot copy inconsistent bitmap '{bitmap.name}'",
                    hint="Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it\n",
                )

    async def _copy_bitmaps(self, target: BlockBackend) -> None:
        from vhostblk.block.dirty_bitmap import add_bitmap, merge_bitmaps, remove_bitmap

        graph = self._session.graph
        for bitmap, enabled in self._bitmaps:
            if bitmap.inconsistent and self._args.skip_broken_bitmaps:
                self._session.warn(f"Skipping inconsistent bitmap '{bitmap.name}'")
                continue
            try:
                new = await add_bitmap(
                    graph,
                    target.node,
                    bitmap.name,
                    bitmap.granularity,
                    persistent=True,
                    enabled=enabled,
                )
            except (ConfigError, BlockError) as error:
                raise ImgError(f"Failed to create bitmap {bitmap.name}: {reason(error)}") from None
            try:
                merge_bitmaps(new, [bitmap])
            except ConfigError as error:
                await remove_bitmap(graph, new)
                raise ImgError(f"Failed to populate bitmap {bitmap.name}: {error}") from None


COMMAND = Command(Convert, run)
