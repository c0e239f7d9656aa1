"""The same writes give the same qcow2 file, byte by byte: clusters, tables and blocks are where QEMU puts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.tools import ask_qemu_io, ask_vhostblk_io
from tests.qcow2_images import check, qemu_img
from vhostblk.testing.requirements import require

CASES = {
    "blocks of counts are behind what needs them": (
        "cluster_size=1024,refcount_bits=64",
        "60000k",
        ("write 51066880 65536", "write 14089728 2048000", "write 26159104 2048000"),
    ),
    "several blocks at once": (
        "cluster_size=512,refcount_bits=64",
        "64M",
        ("write 0 300k", "write 1M 1M"),
    ),
    "what was given up": (
        "cluster_size=65536",
        "64M",
        ("write 1M 3M", "write 8M 1M", "discard 1M 1M", "flush", "write 16M 1M", "write 32M 1M"),
    ),
    "subclusters": (
        "cluster_size=16384,extended_l2=on",
        "64M",
        ("write 5k 3k", "write 1M 512k", "write 9k 40k", "write -z 1M 4k", "write 63M 1M"),
    ),
}


@pytest.mark.parametrize(("options", "size", "commands"), CASES.values(), ids=list(CASES))
def test_file_is_the_same(
    options: str, size: str, commands: tuple[str, ...], tmp_path: Path
) -> None:
    require("qemu-img", "qemu-io")
    words = [word for command in commands for word in ("-c", command)]
    files = []
    for name, ask in (("theirs", ask_qemu_io), ("ours", ask_vhostblk_io)):
        image = tmp_path / name
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, size)
        status, _, err = ask([*words, "-f", "qcow2", str(image)])
        assert (status, err) == (0, "")
        files.append(image.read_bytes())
    assert check(tmp_path / "ours") == ""
    assert files[0] == files[1]
