"""What is known about images is what `qemu-img info` knows, in its words: as text, and as JSON."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.qcow2_images import qemu_img, qemu_io
from vhostblk.block.flags import OpenFlag
from vhostblk.block.graph import BlockGraph
from vhostblk.block.image_info import ImageInfo, query_image_info
from vhostblk.block.qjson import format_json
from vhostblk.cli.image_info_text import image_info_text, snapshot_table

IMAGES = {
    "raw": (["create", "-f", "raw", "{image}", "1000001536"],),
    "an empty file": (["create", "-f", "raw", "{image}", "0"],),
    "qcow2": (["create", "-f", "qcow2", "{image}", "1536M"],),
    "version 2": (["create", "-f", "qcow2", "-o", "compat=v2", "{image}", "999k"],),
    "options": (
        [
            *("create", "-f", "qcow2", "-o"),
            "cluster_size=2M,lazy_refcounts=on,refcount_bits=1,compression_type=zstd,preallocation=metadata",
            *("{image}", "3G"),
        ],
    ),
    "extended L2 entries": (
        ["create", "-f", "qcow2", "-o", "extended_l2=on,preallocation=full", "{image}", "1000k"],
    ),
    "backing file": (
        ["create", "-f", "raw", "{folder}/base", "1M"],
        ["create", "-f", "qcow2", "-b", "base", "-F", "raw", "{image}"],
    ),
    "backing file by its whole name": (
        ["create", "-f", "qcow2", "{folder}/base", "1M"],
        ["create", "-f", "qcow2", "-b", "{folder}/base", "-F", "qcow2", "{image}"],
    ),
    "backing file as options": (
        ["create", "-f", "raw", "{folder}/base", "1M"],
        [
            *("create", "-f", "qcow2", "-F", "raw", "-b"),
            'json:{{"driver":"raw","file":{{"driver":"file","filename":"{folder}/base"}}}}',
            *("{image}", "2M"),
        ],
    ),
    "data file": (["create", "-f", "qcow2", "-o", "data_file={folder}/data", "{image}", "1M"],),
    "raw data file": (
        [
            *("create", "-f", "qcow2", "-o"),
            *("data_file={folder}/data,data_file_raw=on", "{image}", "1M"),
        ],
    ),
    "bitmaps": (
        ["create", "-f", "qcow2", "{image}", "1M"],
        ["bitmap", "--add", "{image}", "one"],
        ["bitmap", "--add", "--disable", "-g", "512", "{image}", "two"],
        ["bitmap", "--add", "{image}", "größe"],
    ),
    "snapshots": (
        ["create", "-f", "qcow2", "{image}", "1M"],
        ["snapshot", "-c", "a", "{image}"],
        ["snapshot", "-c", "a name that is longer than its column", "{image}"],
        ["snapshot", "-c", "größe", "{image}"],
    ),
}


async def ours(image: str, driver: str = "") -> ImageInfo:
    graph = BlockGraph()
    try:
        options: dict[str, Any] = {"read-only": True, "force-share": True}
        if driver:
            options["driver"] = driver
        return await query_image_info(
            await graph.open_image(image, options, flags=OpenFlag.NO_BACKING | OpenFlag.NO_IO)
        )
    finally:
        await graph.close_all()


@pytest.mark.parametrize("kind", IMAGES)
def test_what_is_known_about_an_image_is_what_qemu_img_says(kind: str, tmp_path: Path) -> None:
    image = str(tmp_path / "image")
    for command in IMAGES[kind]:
        qemu_img(*(word.format(image=image, folder=tmp_path) for word in command))
    if kind == "qcow2":
        qemu_io(Path(image), "write 0 77k", "write -c 1M 64k")
    info = asyncio.run(ours(image))
    assert image_info_text(info) == qemu_img("info", image)
    assert format_json(info.to_qmp(), pretty=True) + "\n" == qemu_img(
        "info", "--output=json", image
    )
    if info.snapshots:
        lines = ["Snapshot list:", *snapshot_table(info.snapshots)]
        assert "".join(f"{line}\n" for line in lines) == qemu_img("snapshot", "-l", image)
