"""Images in formats that have no driver: they are called by their names, and never taken for raw bytes."""

from __future__ import annotations

import asyncio
import errno
import subprocess
from pathlib import Path

import pytest

from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.foreign_formats import NAMES, foreign_format
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.registry import DriverRegistry
from vhostblk.cli.img.program import main
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.testing.requirements import require

_DESCRIPTOR = b"# Disk DescriptorFile\nversion=1\nCID=12345678\n"
BEGINNINGS = {
    "vmdk": b"KDMV\1\0\0\0",
    "vdi": b"<<< QEMU VM Virtual Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe",
    "vhdx": b"vhdxfile",
    "vpc": b"conectix\0\0\0\2",
    "qed": b"QED\0",
    "qcow": b"QFI\xfb\0\0\0\1",
    "parallels": b"WithoutFreeSpace\2\0\0\0",
    "bochs": b"Bochs Virtual HD Image\0",
    "cloop": b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0",
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_format_is_known_by_its_beginning(name: str) -> None:
    beginning = BEGINNINGS[name]
    assert foreign_format(beginning.ljust(512, b"\0")) == name
    assert foreign_format(beginning[:3]) == ""
    assert name in NAMES


@pytest.mark.parametrize(
    ("beginning", "name"),
    [
        (_DESCRIPTOR, "vmdk"),
        (b"version=3\r\n", "vmdk"),
        (b"#\n\n  \n# comment\nversion=2\n", "vmdk"),
        (b"version=4\n", ""),
        (b"version=12\n", ""),
        (b"# version=1", ""),
        (b"COWD", "vmdk"),
        (b"LUKS\xba\xbe\0\1", ""),  # one of ours
        (b"LUKS\xba\xbe\0\2", ""),  # a guest's own, as in QEMU
        (b"QFI\xfb\0\0\0\3", ""),
        (b"", ""),
        (b"\0" * 512, ""),
    ],
)
def test_what_only_looks_like_one_is_none(beginning: bytes, name: str) -> None:
    assert foreign_format(beginning) == name


def test_format_with_its_signature_at_the_end_is_known_by_its_file_name() -> None:
    assert foreign_format(bytes(512), "some.dmg") == "dmg"
    assert foreign_format(bytes(512), "some.dmg.raw") == ""


@pytest.mark.parametrize("name", BEGINNINGS)
def test_image_is_refused_by_the_name_of_its_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    image = tmp_path / "disk"
    image.write_bytes(BEGINNINGS[name].ljust(4096, b"\0"))

    async def scenario() -> None:
        graph = BlockGraph()
        with pytest.raises(ConfigError, match=f"Image is in {name} format") as refused:
            await graph.open_image(str(image))
        assert refused.value.errno == errno.ENOTSUP
        node = await graph.open_image(str(image), {"driver": "raw"})
        assert node.length == 4096
        await graph.close_all()

    asyncio.run(scenario())
    assert main(["map", str(image)], "qemu-img") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qemu-img: Could not open '{image}': Image is in {name} format, ")
    assert said.count("\n") == 1
    assert main(["map", "-f", name, str(image)], "qemu-img") == 1
    said = capsys.readouterr().err
    assert f"Could not open '{image}': Unknown driver '{name}': images of this format are" in said


def test_version_of_qcow2_that_is_not_known_is_not_raw() -> None:
    drivers = DriverRegistry(DRIVERS)
    for version in (2, 3, 4, 1 << 24):
        found = drivers.probe(b"QFI\xfb" + version.to_bytes(4, "big"), "")
        assert found is not None
        assert found.driver_name == "qcow2"


@pytest.mark.parametrize("beginning", [*BEGINNINGS.values(), _DESCRIPTOR])
def test_guest_cannot_make_a_guessed_raw_disk_look_like_one(
    tmp_path: Path, expect_log: ExpectedLog, beginning: bytes
) -> None:
    expect_log.allow("nobody said which format")
    image = tmp_path / "disk"
    image.write_bytes(bytes(4096))
    content = beginning.ljust(512, b"\0")

    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.open_image(str(image))
        guest = BlockBackend(node, "a guest", writable=True)
        with pytest.raises(BlockError) as refused:
            await guest.pwritev(0, IoVec.of(content))
        assert refused.value.errno == errno.EPERM
        await guest.pwritev(512, IoVec.of(content))
        await guest.close()
        await graph.close_all()

    asyncio.run(scenario())
    assert image.read_bytes()[:512] == bytes(512)


@pytest.mark.parametrize("name", ["vmdk", "vdi", "vhdx", "vpc", "qed", "qcow", "parallels"])
def test_images_that_qemu_img_makes_are_recognised(tmp_path: Path, name: str) -> None:
    require("qemu-img")
    image = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", name, image, "8M"], check=True)
    with image.open("rb") as file:
        assert foreign_format(file.read(512)) == name
