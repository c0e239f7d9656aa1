"""`resize`: make a disk longer or shorter."""

from __future__ import annotations

from collections.abc import Sequence

from vhostblk.block.flags import Preallocation
from vhostblk.block.image_options import read_size_option
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.cli.img.arguments import ImageArguments, ImgError, UsageError, flag, valued
from vhostblk.cli.img.session import Session
from vhostblk.cli.img.table import Command

_SHRINKING = (
    "Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an operation, "
    "make sure there is no important data there."
)


def _preallocation(text: str) -> Preallocation:
    try:
        return Preallocation(text)
    except ValueError:
        raise ImgError(f"Invalid preallocation mode '{text}'") from None


@lean_dataclass(slots=True)
class Resize(ImageArguments):
    """Its options."""

    format: str | None = valued("f")
    quiet: bool = flag("q")
    preallocation: Preallocation = valued(
        "", "preallocation", _preallocation, default=Preallocation.OFF
    )
    shrink: bool = flag("", "shrink")

    @classmethod
    def prepare(cls, words: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
        """The last word is the size, even if it begins as an option does.

        Raises:
            ImgError: there are not enough words.
        """
        if len(words) < 2:
            raise UsageError("Not enough arguments")
        return words[:-1], (words[-1],)

    def check(self) -> None:
        """See `Arguments.check`."""
        if len(self.words) != 2:
            raise UsageError("Expecting image file name and size")


def _as_int64(value: int) -> int:
    """As C counts: what is too large is negative."""
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


async def run(session: Session, args: Resize) -> int:
    """Do it."""
    session.quiet = args.quiet
    name, text = args.words
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    wanted = read_size_option("size", text[1:] if sign else text)
    image = await session.open(
        name, args.format, image_opts=args.image_opts, writable=True, resize=True
    )
    length = _as_int64(image.length + sign * wanted if sign else wanted)
    if length <= 0:
        raise ImgError("New image size must be positive")
    if length <= image.length and args.preallocation is not Preallocation.OFF:
        raise ImgError("Preallocation can only be used for growing images")
    if length < image.length and not args.shrink:
        session.complain("Use the --shrink option to perform a shrink operation.")
        session.warn(_SHRINKING)
        return 1
    await image.truncate(length, args.preallocation)
    session.print("Image resized.")
    return 0


COMMAND = Command(Resize, run)
