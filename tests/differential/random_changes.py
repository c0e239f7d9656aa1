"""Random command lines of qemu-img that change images, look at them through filters, or copy parts of them: rows like
those of `random_rows.py`, about images of more kinds.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from random import Random

from tests.differential.img_matrix import Row
from tests.differential.random_rows import KIB, MIB, OUTPUT, Image, Maker

__all__ = ["random_change"]

Words = Sequence[object]

_BLOCKS = ("512", "513", "1000", "4k", "64k", "100k", "1M")
_AMENDED = (
    *("compat=0.10", "compat=1.1", "compat=v3", "lazy_refcounts=on", "lazy_refcounts=off"),
    # Stock qemu-img may never end with narrower counts.
    *("refcount_bits=16", "refcount_bits=64", "backing_file=", "size={size}"),
    *("cluster_size=64k", "preallocation=off", "extended_l2=on", "data_file_raw=on"),
)


class _Changes(Maker):
    """With images that have their data in another file, or another version."""

    def qcow2(self, name: str, backing: Image | None = None, size: int = 0) -> Image:
        image = super().qcow2(name, backing, size)
        if self.chance(0.15) and not image.has_snapshot and not image.has_bitmaps:
            self.external(image)
        return image

    def external(self, image: Image) -> None:
        """Put another one in its place, whose data are in a file."""
        options = {"cluster_size": str(image.cluster), "data_file": f"{image.name}.data"}
        if self.chance(0.3) and image.backing is None:
            options["data_file_raw"] = "on"
        below = image.backing
        words = () if below is None else ("-b", below.name, "-F", below.format)
        self.say("rm", image.name)
        made = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", self.joined(options))
        self.say(*made, *words, image.name, image.size)
        image.options = options
        self.write(image)

    def any_size(self, image: Image) -> str:
        """Larger or smaller, absolute or not, whole sectors or not."""
        random = self.random
        by = random.choice((1, 511, 512, 4096, image.cluster, 3 * image.cluster, MIB))
        return random.choice((f"+{by}", f"-{by}", str(image.size + by), str(random.randrange(MIB))))


def random_change(random: Random) -> Row:
    """A command line, and what makes the images that it is about."""
    maker = _Changes(random)
    kind = random.choice(tuple(_KINDS))
    image = maker.chain("a")
    command = shlex.join(map(str, (kind, *_KINDS[kind](maker, image))))
    # What reads as zeroes has a place more often in stock qemu-img, but not always.
    is_loose = kind in ("commit", "rebase", "resize") or " -n " in command
    return Row(command, given=maker.commands, is_loose=is_loose)


def _qcow2(maker: _Changes, image: Image) -> Image:
    return image if image.format == "qcow2" else maker.qcow2("top", image)


def _rebase(maker: _Changes, image: Image) -> Words:
    top = _qcow2(maker, image)
    new = maker.chain("b") if maker.chance(0.5) else top.backing and top.backing.backing
    words: list[object] = ["-u"] if maker.chance(0.2) else []
    if new is None:
        return [*words, "-b", "", "-f", "qcow2", top.name]
    return [*words, "-b", new.name, "-F", new.format, "-f", "qcow2", top.name]


def _commit(maker: _Changes, image: Image) -> Words:
    top = _qcow2(maker, image)
    words: list[object] = ["-d"] if maker.chance(0.3) else []
    if top.backing is not None and top.backing.backing is not None and maker.chance(0.5):
        words += ["-b", top.backing.backing.name]
    return [*words, "-f", "qcow2", top.name]


def _resize(maker: _Changes, image: Image) -> Words:
    words: list[object] = ["--shrink"] if maker.chance(0.7) else []
    if maker.chance(0.3):
        words.append(f"--preallocation={maker.random.choice(('metadata', 'falloc', 'full'))}")
    return [*words, "-f", image.format, image.name, maker.any_size(image)]


def _amend(maker: _Changes, image: Image) -> Words:
    size = image.size + maker.random.choice((0, 512, MIB))
    # One alone: stock qemu-img has done what comes before the one that it refuses.
    options = maker.random.choice(_AMENDED).format(size=size)
    return ["-f", image.format, "-o", options, image.name]


def _snapshot(maker: _Changes, image: Image) -> Words:
    image = _qcow2(maker, image)
    if not image.has_snapshot and "data_file" not in image.options:
        maker.say("qemu-img", "snapshot", "-c", "then", image.name)
        maker.write(image)
    if "data_file" in image.options:
        return ["-l", image.name]
    what = maker.random.choice((("-l",), ("-a", "then"), ("-d", "then"), ("-c", "now")))
    return [*what, image.name]


def _bitmap(maker: _Changes, image: Image) -> Words:
    random = maker.random
    image = _qcow2(maker, image)
    if not image.has_bitmaps and maker.chance(0.8):
        maker.say("qemu-img", "bitmap", "--add", "-g", "64k", image.name, "dirty")
        maker.write(image)
    words: list[object] = []
    for _ in range(random.choice((1, 1, 2))):
        words.append(random.choice(("--add", "--remove", "--clear", "--enable", "--disable")))
    if "--add" in words and maker.chance(0.5):
        words += ["-g", random.choice(("512", "4k", "1M", "2M"))]
    if maker.chance(0.2):
        words += ["--merge", "dirty"]
    return [*words, "-f", "qcow2", image.name, random.choice(("dirty", "dirty", "new"))]


def _dd(maker: _Changes, image: Image) -> Words:
    random = maker.random
    words: list[object] = ["-f", image.format, "-O", random.choice(("raw", "qcow2"))]
    if maker.chance(0.8):
        words.append(f"bs={random.choice(_BLOCKS)}")
    if maker.chance(0.4):
        words.append(f"count={random.randrange(40)}")
    if maker.chance(0.4):
        words.append(f"skip={random.randrange(40)}")
    return [*words, f"if={image.name}", f"of={OUTPUT}"]


def _measure(maker: _Changes, image: Image) -> Words:
    random = maker.random
    words: list[object] = ["-O", random.choice(("raw", "qcow2", "qcow2"))]
    options = [f"cluster_size={random.choice(('512', '4k', '64k', '2M'))}"]
    more = ("extended_l2=on", "preallocation=full", "refcount_bits=1", "compat=0.10", "size=3G")
    options += random.sample(more, random.choice((0, 1, 2)))
    if "qcow2" in words and maker.chance(0.7):
        words += ["-o", ",".join(options)]
    if maker.chance(0.5):
        words.append("--output=json")
    if maker.chance(0.2):
        return [*words, "--size", maker.size(512)]
    if image.has_snapshot and maker.chance(0.5):
        words += ["-l", "then"]
    return [*words, *_named(maker, image)]


def _info(maker: _Changes, image: Image) -> Words:
    words: list[object] = ["--backing-chain"] if maker.chance(0.4) else []
    words += ["-U"] if maker.chance(0.2) else []
    # What is said of a backing file that is not opened is an error in stock qemu-img.
    image = Image(image.name, image.format, image.size)
    return [*words, *_named(maker, image)]


def _map(maker: _Changes, image: Image) -> Words:
    words: list[object] = ["--output=json"] if maker.chance(0.7) else []
    words += ["-U"] if maker.chance(0.2) else []
    return [*words, *_named(maker, image)]


def _compare(maker: _Changes, image: Image) -> Words:
    other = maker.chain("b") if maker.chance(0.5) else image
    words: list[object] = ["-s"] if maker.chance(0.3) else []
    options = [_options(maker, one) for one in (image, other)]
    return [*words, "--image-opts", *options]


def _convert(maker: _Changes, image: Image) -> Words:
    random = maker.random
    words: list[object] = ["-S", random.choice(("0", "4k"))] if maker.chance(0.2) else []
    sources: list[object] = [_options(maker, image)]
    total = image.size
    if maker.chance(0.3):
        other = maker.chain("b")
        sources.append(_options(maker, other))
        total += other.size
    if maker.chance(0.4):
        target = maker.qcow2(OUTPUT, size=total + random.choice((0, 512, 64 * KIB)))
        aim = ["-n", "--target-image-opts", *sources, _options(maker, target, is_target=True)]
        return ["--image-opts", *words, *aim]
    return ["--image-opts", *words, "-O", random.choice(("raw", "qcow2")), *sources, OUTPUT]


def _check(maker: _Changes, image: Image) -> Words:
    image = maker.qcow2("top", image)
    if not image.has_snapshot:
        maker.damage(image)
    # Stock qemu-img forgets snapshots when it repairs an image with bitmaps.
    words: list[object] = []
    if not image.has_snapshot:
        words += ["-r", maker.random.choice(("leaks", "all"))]
    words += ["--output=json"] if maker.chance(0.5) else []
    return [*words, "-f", "qcow2", image.name]


def _named(maker: _Changes, image: Image) -> Words:
    if maker.chance(0.5):
        return ["--image-opts", _options(maker, image)]
    return ["-f", image.format, image.name]


def _options(maker: _Changes, image: Image, is_target: bool = False) -> str:
    """The image, perhaps through filters, or only a part of it."""
    random = maker.random
    options = {"driver": image.format, "file.driver": "file", "file.filename": image.name}
    if not is_target and maker.chance(0.3):
        if image.format == "raw":
            options["offset"] = str(random.randrange(0, image.size, 512))
            if maker.chance(0.5):
                most = image.size - int(options["offset"])
                options["size"] = str(max(most - random.choice((0, 512, 4096)), 0) // 512 * 512)
        elif image.backing is not None:
            below = random.choice((image.backing.name, ""))
            options |= {"backing.file.filename": below, "backing.driver": image.backing.format}
            if not below:
                options = {"driver": "qcow2", "file.filename": image.name, "backing": ""}
    if maker.chance(0.3):
        filters = ("copy-on-read", "blkdebug", "compress") if not is_target else ("blkdebug",)
        key, name = "file", random.choice(filters)
        if name == "blkdebug":
            key = "image"
        options = {f"{key}.{option}": value for option, value in options.items()}
        options["driver"] = name
    return maker.joined(options)


_KINDS: dict[str, Callable[[_Changes, Image], Words]] = {
    "amend": _amend,
    "bitmap": _bitmap,
    "check": _check,
    "commit": _commit,
    "compare": _compare,
    "convert": _convert,
    "dd": _dd,
    "info": _info,
    "map": _map,
    "measure": _measure,
    "rebase": _rebase,
    "resize": _resize,
    "snapshot": _snapshot,
}
