"""What an image is like changes, as with `qemu-img amend` (row B35.8)."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.qcow2_images import (
    MIB,
    check,
    contents,
    create,
    qemu_img,
    qemu_io,
    scribble,
    used_by_qemu,
)
from vhostblk.block.amend import amend
from vhostblk.block.graph import BlockGraph
from vhostblk.errors import BlockError, ConfigError

SIZE = 4 * MIB


def amend_image(image: Path, *changes: str, **options: Any) -> list[tuple[int, int]]:
    """One after the other; gives the progress."""
    progress: list[tuple[int, int]] = []

    async def scenario() -> None:
        graph = BlockGraph()
        try:
            node = await graph.open_image(str(image), {"driver": "qcow2", **options})
            for change in changes:
                await amend(graph, node, change, lambda *done: progress.append(done))
        finally:
            await graph.close_all()

    asyncio.run(scenario())
    return progress


def facts(image: Path) -> dict[str, Any]:
    found = json.loads(qemu_img("info", "--output=json", image))
    names = ("virtual-size", "cluster-size", "format-specific", "backing-filename", "snapshots")
    return {name: found.get(name) for name in names}


CHANGES = [
    ("", "compat=0.10"),
    ("compat=0.10", "compat=1.1"),
    ("cluster_size=4k", "compat=0.10"),
    ("lazy_refcounts=on", "lazy_refcounts=off"),
    ("compat=0.10", "compat=1.1,lazy_refcounts=on"),
    ("cluster_size=4k,refcount_bits=8", "refcount_bits=16,compat=0.10"),
    ("", "refcount_bits=64"),
    ("cluster_size=512", "refcount_bits=1"),
    ("cluster_size=512,refcount_bits=64", "refcount_bits=2,size=6M"),
    ("extended_l2=on", "refcount_bits=8,size=1M,lazy_refcounts=on"),
    ("compression_type=zstd", "compat=0.10"),
    ("compat=0.10", "size=9M"),
    ("data_file=disk.data", "data_file=other.data,refcount_bits=32"),
    ("data_file=disk.data", "data_file="),
]


@pytest.mark.parametrize(
    ("made", "change", "backing"),
    [*((*change, False) for change in CHANGES), *((*CHANGES[n], True) for n in (0, 1, 7, -1))],
)
def test_amended_image_is_like_the_one_that_qemu_amends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, change: str, backing: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").write_bytes(os.urandom(3 * MIB))
    words = ["-o", made] if made else []
    if backing:
        words += ["-b", "base", "-F", "raw"]
    ours, theirs = Path("ours"), Path("theirs")
    create(ours, SIZE, *words)
    scribble(ours, SIZE, len(made), times=25)
    if made == "data_file=disk.data" and "other" in change:
        os.link("disk.data", "other.data")
    expected = contents(ours, tmp_path)
    theirs.write_bytes(ours.read_bytes())
    words = ["--image-opts", "driver=qcow2,file.filename=theirs,data-file.filename=disk.data"]
    options = {}
    if "data_file" in change:
        options = {"data-file.driver": "file", "data-file.filename": "disk.data"}
        qemu_img("amend", "-o", change, *words)
    else:
        qemu_img("amend", "-f", "qcow2", "-o", change, theirs)
    progress = amend_image(ours, change, **options)
    assert progress == [(n, progress[-1][0]) for n in range(len(progress))]
    if change == "data_file=":
        assert "data-file" not in facts(ours)["format-specific"]["data"]
        return
    assert check(ours) == ""
    assert facts(ours) == facts(theirs)
    size = facts(ours)["virtual-size"]
    assert contents(ours, tmp_path) == expected[:size].ljust(size, b"\0")


@pytest.mark.parametrize(
    ("made", "change", "message"),
    [
        ("", "cluster_size=4k", "Invalid parameter 'cluster_size'"),
        ("", "preallocation=full", "Invalid parameter 'preallocation'"),
        ("", "color=red", "Invalid parameter 'color'"),
        ("", "compat=0.9", "Unknown compatibility level 0.9"),
        ("", "refcount_bits=7", "Refcount width must be a power of two"),
        ("compat=0.10", "refcount_bits=8", "Refcount widths other than 16 bits require"),
        ("", "compat=0.10,lazy_refcounts=on", "Lazy refcounts only supported with"),
        ("refcount_bits=8", "compat=0.10", "compat=0.10 requires refcount_bits=16"),
        ("extended_l2=on", "compat=0.10", "incompatible features 0x10 set"),
        ("data_file=disk.data", "compat=0.10", "Cannot downgrade an image with a data file"),
        ("", "data_file=x", "data-file can only be set for images that use an external"),
        ("data_file=disk.data", "data_file_raw=on", "data-file-raw cannot be set on existing"),
        ("", "backing_file=x", "Cannot amend the backing file"),
        ("", "backing_fmt=raw", "Cannot amend the backing file"),
        ("", "encryption=on", "Invalid parameter 'encryption'"),
    ],
)
def test_what_cannot_be_amended_is_refused_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, change: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    image = create(Path("disk"), SIZE, *(["-o", made] if made else []))
    before = image.read_bytes()
    with pytest.raises(ConfigError) as caught:
        amend_image(image, change)
    assert message in str(caught.value)
    assert image.read_bytes() == before


def test_counts_that_do_not_fit_into_the_new_width_stay_as_they_are(tmp_path: Path) -> None:
    image = create(tmp_path / "disk", SIZE)
    qemu_io(image, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "one", image)
    before = contents(image, tmp_path)
    with pytest.raises(ConfigError, match=r"to 1 bits: Cluster at offset 0x.* has a refcount of 2"):
        amend_image(image, "refcount_bits=1")
    amend_image(image, "refcount_bits=2")
    assert check(image) == ""
    assert contents(image, tmp_path) == before


def test_snapshots_and_versions(tmp_path: Path) -> None:
    """Version 2 need not know the size of a snapshot; if it is another one, nobody may forget it."""
    image = create(tmp_path / "disk", SIZE, "-o", "compat=0.10")
    scribble(image, SIZE, 3)
    qemu_img("snapshot", "-c", "one", image)
    before = contents(image, tmp_path)
    amend_image(image, "compat=1.1", "compat=0.10", "compat=1.1,size=5M")
    assert check(image) == ""
    with pytest.raises(ConfigError, match="Internal snapshots prevent downgrade of image"):
        amend_image(image, "compat=0.10")
    amend_image(image, "compat=0.10,size=4M")
    qemu_io(image, "write -P 77 0 4M")
    qemu_img("snapshot", "-a", "one", image)
    assert check(image) == ""
    assert contents(image, tmp_path) == before


@pytest.mark.parametrize("backing", [False, True])
def test_zeroes_of_snapshots_that_version_2_does_not_have_are_written_or_forgotten(
    tmp_path: Path, backing: bool
) -> None:
    """Tables that several snapshots share, zero clusters that keep a place, data that another one has there."""
    (tmp_path / "base").write_bytes(os.urandom(SIZE))
    words = ["-b", tmp_path / "base", "-F", "raw"] if backing else []
    image = create(tmp_path / "disk", SIZE, "-o", "cluster_size=4k", *words)
    qemu_io(image, "write -P 1 0 1M", "write -z 3M 64k")
    qemu_img("snapshot", "-c", "data", image)
    qemu_io(image, "write -z 0 64k", "write -z -u 128k 64k")
    qemu_img("snapshot", "-c", "one", image)
    qemu_img("snapshot", "-c", "two", image)
    qemu_io(image, "write -P 2 0 32k", "write -P 3 3M 32k", "write -z 2M 4k")
    expected = {"": contents(image, tmp_path)}
    for name in ("data", "one", "two"):
        expected[name] = shown(image, name, tmp_path)
    amend_image(image, "compat=0.10")
    assert check(image) == ""
    assert facts(image)["format-specific"]["data"]["compat"] == "0.10"
    assert contents(image, tmp_path) == expected.pop("")
    for name, content in expected.items():
        assert shown(image, name, tmp_path) == content
    for name in ("one", "two", "data"):
        qemu_img("snapshot", "-d", name, image)
        assert check(image) == ""


def shown(image: Path, name: str, folder: Path) -> bytes:
    """What a snapshot has."""
    qemu_img("convert", "-O", "raw", "-l", name, image, folder / "shown")
    return (folder / "shown").read_bytes()


def test_snapshot_whose_l1_table_cannot_be_prevents_version_2(tmp_path: Path) -> None:
    image = create(tmp_path / "disk", SIZE)
    qemu_img("snapshot", "-c", "one", image)
    data = bytearray(image.read_bytes())
    at = int.from_bytes(data[64:72])
    data[at + 8 : at + 12] = (1 << 28).to_bytes(4)
    image.write_bytes(data)
    with pytest.raises(BlockError, match="Snapshot L1 table too large"):
        amend_image(image, "compat=0.10")
    assert image.read_bytes() == data


def test_compressed_clusters_that_version_2_does_not_have_are_refused(tmp_path: Path) -> None:
    other = create(tmp_path / "other", SIZE, "-o", "compression_type=zstd")
    qemu_io(other, "write -c -P 1 0 1M")
    with pytest.raises(ConfigError, match="zstd compression type and existing compressed"):
        amend_image(other, "compat=0.10")
    assert check(other) == ""


def test_image_that_somebody_writes_or_that_is_read_only_is_not_amended(tmp_path: Path) -> None:
    image = create(tmp_path / "disk", SIZE)
    with pytest.raises(BlockError, match="read-only"):
        amend_image(image, "lazy_refcounts=on", **{"read-only": "on"})
    with used_by_qemu(image), pytest.raises(ConfigError, match="lock"):
        amend_image(image, "lazy_refcounts=on")


def test_driver_that_cannot_says_so(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))

    async def scenario() -> None:
        graph = BlockGraph()
        try:
            node = await graph.open_image(str(tmp_path / "disk"), {"driver": "raw"})
            with pytest.raises(ConfigError, match="'raw' does not support option amendment"):
                await amend(graph, node, "size=1M")
        finally:
            await graph.close_all()

    asyncio.run(scenario())
