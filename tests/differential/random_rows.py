"""Random images, and command lines of qemu-img about them: rows like those of the matrix (`img_matrix.py`).

Images are made by stock tools: chains of raw files with holes and of qcow2 images with clusters of all sizes, which
have data, zeroes, compressed clusters and such without a place, subclusters, snapshots and bitmaps, and end anywhere.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from tests.differential.img_matrix import Row

__all__ = ["KIB", "MIB", "OUTPUT", "Image", "Maker", "random_row"]

KIB, MIB = 1 << 10, 1 << 20
#: What `convert` makes.
OUTPUT = "made"
_CLUSTER_BITS = (9, 10, 12, 12, 14, 16, 16, 16, 17, 19, 21)
_SPARSE = ("0", "512", "1k", "8k", "12k", "64k", "1M", "2M")


@dataclass
class Image:
    name: str
    format: str
    size: int
    cluster: int = 64 * KIB
    options: dict[str, str] = field(default_factory=dict)
    backing: Image | None = None
    has_snapshot: bool = False
    has_bitmaps: bool = False


class Maker:
    """Keeps the commands that make what it was asked for."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.commands: list[str] = []

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def say(self, *words: object) -> None:
        self.commands.append(shlex.join(map(str, words)))

    @staticmethod
    def joined(options: dict[str, str]) -> str:
        return ",".join(f"{name}={value}" for name, value in options.items())

    def chain(self, name: str) -> Image:
        image = self.raw(f"{name}0") if self.chance(0.3) else self.qcow2(f"{name}0")
        for layer in range(1, self.random.choice((1, 1, 1, 2, 3))):
            image = self.qcow2(f"{name}{layer}", image)
        return image

    def size(self, cluster: int) -> int:
        most = max(self.random.choice((64 * KIB, MIB, 3 * MIB, 9 * MIB)), 4 * cluster)
        unit = self.random.choice((cluster, 4096, 512))
        return max(self.random.randrange(most) // unit * unit, 512)

    def raw(self, name: str) -> Image:
        image = Image(name, "raw", self.size(64 * KIB))
        self.say("truncate", "-s", image.size, name)
        self.write(image)
        return image

    def qcow2(self, name: str, backing: Image | None = None, size: int = 0) -> Image:
        random = self.random
        bits = random.choice(_CLUSTER_BITS)
        options = {"cluster_size": str(1 << bits)}
        if bits >= 14 and self.chance(0.2):
            options["extended_l2"] = "on"
        if self.chance(0.2):
            options["refcount_bits"] = random.choice(("8", "32", "64"))
        if backing is None and self.chance(0.15):
            options["preallocation"] = "metadata"
        if backing is not None and self.chance(0.4):
            size = backing.size
        image = Image(name, "qcow2", size or self.size(1 << bits), 1 << bits, options, backing)
        below = () if backing is None else ("-b", backing.name, "-F", backing.format)
        self.say(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            self.joined(options),
            *below,
            name,
            image.size,
        )
        if self.chance(0.15):
            self.say("qemu-img", "bitmap", "--add", "-g", "64k", name, "dirty")
            image.has_bitmaps = True
        if "preallocation" not in options:
            self.compress(image)
        self.write(image)
        if self.chance(0.2):
            self.say("qemu-img", "snapshot", "-c", "then", name)
            image.has_snapshot = True
            self.write(image)
        return image

    def compress(self, image: Image) -> None:
        """Some clusters; before any other write, because QEMU compresses none that has a place."""
        clusters = -(-image.size // image.cluster)
        found = self.random.sample(range(clusters), min(clusters, self.random.choice((0, 0, 1, 9))))
        self._io(
            image,
            [
                f"write -q -c -P {self.random.randrange(256)} {self._whole(image, at)}"
                for at in found
            ],
        )

    def write(self, image: Image) -> None:
        """Some writes of other kinds."""
        self._io(image, [self._one(image) for _ in range(self.random.choice((0, 1, 3, 12)))])

    def _io(self, image: Image, commands: list[str]) -> None:
        if commands:
            words = [word for command in commands for word in ("-c", command)]
            self.say("qemu-io", "-d", "unmap", "-f", image.format, *words, image.name)

    def _whole(self, image: Image, cluster: int) -> str:
        start = cluster * image.cluster
        return f"{start} {min(image.cluster, image.size - start)}"

    def _one(self, image: Image) -> str:
        random = self.random
        unit = random.choice((512, 4096, image.cluster, image.cluster))
        offset = random.randrange(image.size) // unit * unit
        length = min(random.choice((1, 1, 2, 3, 8, 40)) * unit, image.size - offset, 3 * MIB)
        write = f"write -q -P {random.randrange(256)}"
        how = random.choice((write, write, write, "write -q -z", "write -q -zu", "discard -q"))
        return f"{how} {offset} {length}"

    def damage(self, image: Image) -> None:
        """Entries of the first L2 table, and counts, as a new image has them."""
        random = self.random
        if (
            image.cluster < 4096
            or "preallocation" in image.options
            or image.options.get("refcount_bits")
        ):
            return
        for _ in range(random.choice((0, 1, 3))):
            cluster = random.randrange(12)
            if self.chance(0.5):
                self.say(
                    "poke",
                    image.name,
                    2 * image.cluster + 2 * cluster,
                    f"{random.randrange(4):04x}",
                )
            else:
                entry = random.choice((0, 1 << 63)) | cluster * image.cluster
                at = 4 * image.cluster + 8 * random.randrange(8)
                self.say("poke", image.name, at, f"{entry:016x}")


def random_row(random: Random) -> Row:
    """A command line, and what makes the images that it is about."""
    maker = Maker(random)
    kind = random.choice(
        ("convert", "convert", "convert", "convert", "map", "check", "compare", "measure")
    )
    image = maker.chain("a")
    words: Sequence[object]
    match kind:
        case "map":
            window = ("-s", random.randrange(image.size)) if maker.chance(0.3) else ()
            length = ("-l", random.randrange(1, image.size + 512)) if maker.chance(0.3) else ()
            output = ("--output=json",) if maker.chance(0.7) else ()
            words = (*output, *window, *length, "-f", image.format, image.name)
        case "check":
            image = maker.qcow2("top", image)
            maker.damage(image)
            words = ("-f", "qcow2", image.name)
        case "compare":
            other = maker.chain("b")
            words = ("-f", image.format, "-F", other.format, image.name, other.name)
        case "measure":
            words = ("-O", "qcow2", "--output=json", "-f", image.format, image.name)
        case _:
            words = _convert(maker, image)
    return Row(shlex.join(map(str, (kind, *words))), given=maker.commands)


def _convert(maker: Maker, image: Image) -> list[object]:
    random = maker.random
    words: list[object] = []
    if maker.chance(0.35):
        words += ["-S", random.choice(_SPARSE)]
    if maker.chance(0.2):
        words += ["-m", random.choice((1, 3, 16))]
    if maker.chance(0.2):
        words.append("-W")
    if image.has_snapshot and maker.chance(0.4):
        words += ["-l", "then"]
    target = random.choice(("raw", "qcow2", "qcow2"))
    if maker.chance(0.25):
        words.append("-n")
        if target == "qcow2":
            maker.qcow2(OUTPUT, size=image.size + random.choice((0, 512, 64 * KIB)))
        else:
            maker.say("truncate", "-s", image.size + random.choice((0, 512, 64 * KIB)), OUTPUT)
    elif target == "qcow2":
        bits = random.choice(_CLUSTER_BITS)
        options = {"cluster_size": str(1 << bits)}
        if bits >= 14 and maker.chance(0.5):
            options["extended_l2"] = "on"
        words += ["-o", maker.joined(options)]
        if maker.chance(0.2):
            words.append("-c")
        if image.has_bitmaps and maker.chance(0.5):
            words.append("--bitmaps")
        if image.backing is not None and maker.chance(0.5):
            words += ["-B", image.backing.name, "-F", image.backing.format]
    return [*words, "-O", target, "-f", image.format, image.name, OUTPUT]
