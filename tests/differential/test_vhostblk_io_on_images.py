"""The same scripts and command lines through vhostblk-io and qemu-io on qcow2 images, whole and damaged: what both
print, and what `qemu-img map` finds afterwards.
"""

from __future__ import annotations

import difflib
import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.differential.tools import Said, ask_qemu_io, ask_vhostblk_io, mask
from tests.qcow2_images import qemu_img, qemu_io
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.testing.requirements import require

Outcome = tuple[int, list[str], list[str]]


@pytest.fixture(autouse=True)
def _said(expect_log: ExpectedLog) -> None:
    """Tools print these; daemons have other words."""
    require("qemu-io")
    for text in (
        "raw was guessed",
        "does not exist",
        "short-form",
        "image is corrupt",
        "deprecated",
    ):
        expect_log.allow(text)


def theirs(words: Sequence[str]) -> Outcome:
    return masked(ask_qemu_io(words))


def ours(words: Sequence[str]) -> Outcome:
    return masked(ask_vhostblk_io(words))


def masked(said: Said) -> Outcome:
    status, out, err = said
    return status, list(mask(out)), list(mask(err))


def layout(image: str) -> Any:
    """What is where, but for places in the file."""
    merged: list[dict[str, Any]] = []
    for extent in json.loads(qemu_img("map", "--output=json", image)):
        kind = {name: extent[name] for name in ("depth", "present", "zero", "data")}
        if merged and merged[-1].items() >= kind.items():
            merged[-1]["length"] += extent["length"]
        else:
            merged.append({"length": extent["length"], **kind})
    return merged


def both(folder: Path, make: Callable[[], None], words: Sequence[str], image: str = "") -> Outcome:
    """Run both on equal images in this folder; fails unless they show the same."""
    shown = []
    for run in (theirs, ours):
        for path in folder.iterdir():
            path.unlink()
        make()
        shown.append((run(words), layout(image) if image else []))
    first, second = (
        (str(status), *out, *err, *map(str, where)) for (status, out, err), where in shown
    )
    difference = "\n".join(difflib.unified_diff(first, second, "theirs", "ours", n=1, lineterm=""))
    assert not difference, difference
    return shown[1][0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------- whole images

CREATED = {
    "plain": (),
    "version 2": ("-o", "compat=0.10"),
    "subclusters": ("-o", "extended_l2=on,cluster_size=32k"),
    "small clusters": ("-o", "cluster_size=512"),
    "raw data file": ("-o", "data_file=data,data_file_raw=on"),
    "preallocated": ("-o", "preallocation=metadata"),
    "lazy": ("-o", "lazy_refcounts=on"),
}
SCRIPT = """
info|length|map|alloc 0 1M|read -v 64k 33|write -c 512k 64k|write -c 0 512|write -c 512 512|read -P 0xcd 512k 64k
write -z 704k 64k|write -zu 64k 64k|write -zn 128k 64k|write -z 100 300|write -z 260k 1k|write -zu 300k 100k|map
discard 64k 64k|discard 100 300|write -f 0 1k|write -q -P 0x11 3 5|write -s nofile 0 10|read -v 0 16|flush|alloc 0 3
write -z 0 2M|write 1M 1|write 1048575 2|readv 1M 1|writev 1048575 2|alloc 1M|alloc 1048575 2|discard 0 2M|map
aio_read 1M 1|aio_write 0 2M|aio_write -z 0 2M|aio_flush|aio_read -P 3 0 64k|aio_flush|read 7E 1|read 0 8E|help foo
truncate 4M|length|write 3M 64k|map|truncate 1M|length|truncate 100|truncate -m foo 8M|length|map|info|? alloc|help
write -b 3 512|read -b 0 3|write -bz 0 512|write -bP 3 1M 64k|read -bP 3 1M 64k|read -b 2M 512|write -x|map 1|nonsense
"""
REOPENED = """
reopen -r|write 0 1|reopen -w|write 0 1|reopen -o foo=bar|reopen -o read-only=on|reopen -o lazy-refcounts=42
reopen -c none|reopen -c foo|reopen -c writeback|reopen -o l2-cache-size=1M|reopen -o l2-cache-entry-size=512
write 0 1M|read -P 0xcd 0 1M|reopen -o cache-size=1M,l2-cache-size=64k,refcount-cache-size=64k|reopen -o driver=raw
reopen -o cache-size=1M,l2-cache-size=2M|reopen -o l2-cache-entry-size=33k|reopen -o refcount-cache-size=256T
reopen -o overlap-check=all|reopen -o overlap-check.template=none|reopen -o overlap-check=blubb|reopen -o file=x
reopen -o overlap-check=constant,overlap-check.template=all|reopen -o cache-clean-interval=-1|reopen -o node-name=a
reopen -o pass-discard-request=off|discard 0 64k|reopen -o discard=foo|reopen -o backing=x|reopen -o backing.foo=1
reopen -o force-share=on|reopen -o detect-zeroes=on|write -P 0 64k 64k|close|reopen -r|open|open -o driver=foo image
open -rU image|write 0 1|close|open -s image|write 0 1M|close|open image|open image|read -P 0xcd 256k 1k|quit|length
"""


def commands(script: str) -> list[str]:
    lines = [command for line in script.split("\n") for command in line.split("|") if command]
    return [word for command in lines for word in ("-c", command)]


@pytest.mark.parametrize("kind", CREATED)
def test_commands_on_an_image(folder: Path, kind: str) -> None:
    def make() -> None:
        qemu_img("create", "-q", "-f", "qcow2", *CREATED[kind], "image", "1M")
        qemu_io(folder / "image", "write -q 256k 128k")

    script, shown = SCRIPT, "image"
    if kind == "preallocated":
        script = script.replace("write -c 512k 64k|", "")  # over what is there: fails in QEMU
    elif kind == "raw data file":
        shown = ""  # QEMU writes tables, too, where they have nothing to say
    both(folder, make, [*commands(script), "image"], shown)


def test_commands_on_an_overlay(folder: Path) -> None:
    def make() -> None:
        qemu_img("create", "-q", "-f", "qcow2", "base", "512k")
        qemu_io(folder / "base", "write -q 192k 128k")
        qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "image", "1M")

    both(folder, make, [*commands(SCRIPT), "image"], "image")


COPIED = {
    "the image itself": ["-C"],
    "below a filter": [
        *("--object", "throttle-group,id=tg", "--image-opts"),
        "driver=copy-on-read,file.driver=throttle,file.throttle-group=tg,file.file.driver=qcow2,file.file.file.filename=image",
    ],
}


@pytest.mark.parametrize("words", COPIED.values(), ids=COPIED)
def test_reads_that_copy_what_they_lack_copy_whole_clusters(folder: Path, words: list[str]) -> None:
    """What is asked for may be there although a part of its cluster is not: there are subclusters."""

    def make() -> None:
        qemu_img("create", "-q", "-f", "qcow2", "base", "256k")
        qemu_io(folder / "base", "write -q 0 256k")
        more = ("-o", "extended_l2=on,cluster_size=32k")
        qemu_img("create", "-q", "-f", "qcow2", *more, "-b", "base", "-F", "qcow2", "image", "256k")
        qemu_io(folder / "image", "write -q -P 1 4k 2k", "write -q -P 1 128k 16k")

    image = [] if "--image-opts" in words else ["image"]
    for script in (
        "read -P 1 4k 2k",
        "read 40k 1",
        "read 60k 40k",
        "read -P 1 129k 5",
    ):
        both(folder, make, [*words, *commands(script), *image], "image")


def test_options_that_change_while_an_image_is_open(folder: Path) -> None:
    def make() -> None:
        qemu_img("create", "-q", "-f", "qcow2", "image", "1M")

    status, _, complaints = both(folder, make, [*commands(REOPENED), "image"], "image")
    assert status == 1
    assert len(complaints) > 20


# ---------------------------------------------------------------------- images that are not whole

# What is written where, in an image whose header, L1 and L2 table are where QEMU puts them.
DAMAGE: dict[str, tuple[int, bytes]] = {
    "no magic": (0, b"XFI"),
    "a version from the future": (4, struct.pack(">I", 9)),
    "clusters too large": (20, struct.pack(">I", 64)),
    "an unknown feature": (72, struct.pack(">Q", 1 << 8)),
    "marked corrupt": (72, struct.pack(">Q", 2)),
    "not closed": (72, struct.pack(">Q", 1)),
}


@pytest.mark.parametrize("modes", [[], ["-r"], ["-f", "qcow2"]], ids=["rw", "ro", "qcow2"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_image(folder: Path, kind: str, modes: list[str]) -> None:
    def make() -> None:
        qemu_img("create", "-q", "-f", "qcow2", "image", "1M")
        with (folder / "image").open("r+b") as file:
            offset, data = DAMAGE[kind]
            file.seek(offset)
            file.write(data)

    both(folder, make, [*modes, *commands("info|read 0 1|map"), "image"])


@pytest.mark.parametrize("length", [0, 100, 200 << 10])
def test_image_that_was_cut(folder: Path, length: int) -> None:
    def make() -> None:
        qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "image", "1M")
        os.truncate("image", length)

    both(folder, make, ["-r", "-f", "qcow2", *commands("info|read 0 1"), "image"])


# ---------------------------------------------------------------------- command lines

LINES = """
-x|--foo|--foo=3 image|--c|--cmd|-c|--read-only=1|-f|a b|-f raw --image-opts x y|--image-opts -f raw raw
-t foo --bad|--bad -t foo|-i foo|-d foo|-T foo -c quit|-T foo,bar=1|-T -foo -c quit|--object|--object foo,id=x
--object id=3|--object throttle-group|--object throttle-group,id=a,foo=b|--object throttle-group,id=1
-c quit -c length image|--object throttle-group,id=a -c quit|--im image|--image-opts nofoo,x|--image-opts x=
--image-opts ,,|-f foo image|--image-opts filename=image|--image-opts file.filename=image -c length
--image-opts driver=raw|-f qcow2 raw|nofile|--image-opts driver=qcow2,file.filename=image,foo.bar=3
--image-opts driver=qcow2,file.filename=nofile|-r nofile|--image-opts driver=qcow2,file.driver=foo
--image-opts driver=qcow2,file.driver=file|-f raw nofile|foo:bar|file:raw -c map
--image-opts driver=qcow2,file.driver=file,file.filename=image,file.x=y|-U raw|-rU raw -c length|-C -r image
-k image|--image-opts driver=qcow2,file.filename=image,lazy-refcounts=foo
--cache=none --disc unmap -f raw raw -c length|--image-opts driver=qcow2,file.filename=image,discard=foo
--image-opts driver=file|json:{}|json:{"driver":"qcow2"}
--image-opts driver=qcow2,file.filename=image,l2-cache-size=foo|--image-opts driver=raw,file.filename=raw,offset=2M
--image-opts driver=qcow2,file.filename=image,node-name=1|--image-opts driver=raw,file.filename=raw,size=2M
raw -c map|--image-opts driver=qcow2,file.filename=image,backing=x|--image-opts driver=throttle,file.filename=raw
image -c info|--image-opts driver=qcow2,file.filename=image,overlap-check=foo|-s image -c info|-kn image -c length
-n image -c info
"""


def _without_help(lines: list[str]) -> list[str]:
    """The help of the program is in words of its own."""
    return lines[:0] if lines and lines[0].lower().startswith("usage: ") else lines


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images that no command line changes."""
    folder = tmp_path_factory.mktemp("images")
    qemu_img("create", "-q", "-f", "qcow2", folder / "image", "1M")
    (folder / "raw").write_bytes(bytes(1 << 20))
    return folder


@pytest.mark.parametrize("line", LINES.strip().replace("\n", "|").split("|"))
def test_command_line(images: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(images)
    shown = []
    for run in (theirs, ours):
        status, out, err = run(line.split(" "))
        shown.append((status, _without_help(out), err))
    assert shown[1] == shown[0]
