"""External data files of qcow2 images: a raw one shows the disk at any time, to whoever reads it without the image."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.qcow2_images import (
    MIB,
    check,
    contents,
    create,
    no_worse_than_leaks,
    qemu_img,
    qemu_io,
    read,
    scribble,
    with_image,
)
from vhostblk.block.backend import BlockBackend
from vhostblk.block.iov import IoVec
from vhostblk.errors import ConfigError

SIZE = 4 * MIB + 1536


def with_data_file(folder: Path, *words: str, size: int = SIZE) -> tuple[Path, Path]:
    """An image and its data file."""
    data = folder / "data"
    options = ",".join((f"data_file={data}", *words))
    return create(folder / "i.qcow2", size, "-o", options), data


def raw(data: Path) -> bytes:
    """What is in a data file; QEMU makes them as long as whole clusters."""
    return data.read_bytes()[:SIZE]


async def random_request(backend: BlockBackend, rnd: random.Random) -> None:
    length = rnd.choice([1, 512, 4096, 65536, 300 * 1024])
    offset = rnd.randrange(0, SIZE - length + 1)
    if rnd.random() < 0.6:
        offset = offset // 65536 * 65536
    kind = rnd.choice("wwzudf")
    if kind == "w":
        await backend.pwritev(offset, IoVec.of(bytes([rnd.randrange(1, 256)]) * length))
    elif kind == "d":
        await backend.pdiscard(offset, length)
    elif kind == "f":
        await backend.flush()
    else:
        await backend.pwrite_zeroes(offset, length, kind == "u")


@pytest.mark.parametrize("shape", ["cluster_size=64k", "extended_l2=on", "cluster_size=4k"])
@pytest.mark.parametrize("discard", ["unmap", "ignore"])
def test_raw_data_file_shows_the_disk_after_every_request(
    tmp_path: Path, shape: str, discard: str
) -> None:
    image, data = with_data_file(tmp_path, "data_file_raw=on", shape)
    # QEMU leaves clusters that its tables call zero; those have to be written anew.
    scribble(image, SIZE, seed=2, times=15)
    assert raw(data) == contents(image, tmp_path)
    rnd = random.Random(len(shape))

    async def scenario(backend: BlockBackend) -> None:
        for number in range(60):
            await random_request(backend, rnd)
            assert raw(data) == await read(backend, 0, SIZE)
            if number % 20 == 19:
                # As if everything were killed now: the image is sound.
                await backend.flush()
                no_worse_than_leaks(image, "-U")

    with_image(image, scenario, discard=discard)
    assert check(image) == ""
    assert contents(image, tmp_path) == raw(data)
    assert "data file raw: true" in qemu_img("info", image)


def test_zeroes_and_discards_of_a_raw_data_file_give_back_room(tmp_path: Path) -> None:
    image, data = with_data_file(tmp_path, "data_file_raw=on")

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(b"\x01" * SIZE))
        await backend.flush()
        full = data.stat().st_blocks
        await backend.pdiscard(0, MIB)
        await backend.pwrite_zeroes(MIB, MIB, may_unmap=True)
        await backend.pwrite_zeroes(2 * MIB, MIB)
        assert data.stat().st_blocks <= full - 2 * MIB // 512
        assert await read(backend, 0, 3 * MIB) == bytes(3 * MIB)

    with_image(image, scenario, discard="unmap")
    assert raw(data) == bytes(3 * MIB) + b"\x01" * (SIZE - 3 * MIB)


def test_zeroes_and_discards_of_a_data_file_that_is_not_raw_give_back_room(tmp_path: Path) -> None:
    image, data = with_data_file(tmp_path)

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(b"\x01" * SIZE))
        await backend.flush()
        full = data.stat().st_blocks
        await backend.pdiscard(0, MIB)
        await backend.pwrite_zeroes(MIB, MIB, may_unmap=True)
        await backend.pwrite_zeroes(2 * MIB, MIB)
        assert data.stat().st_blocks <= full - 2 * MIB // 512
        assert await read(backend, 0, 4 * MIB) == (bytes(3 * MIB)).ljust(4 * MIB, b"\x01")

    with_image(image, scenario, discard="unmap")
    assert check(image) == ""
    # Only what may not be unmapped has a place, as in QEMU.
    shown = json.loads(qemu_img("map", "--output=json", image))
    assert [(run["start"], run.get("offset")) for run in shown[:3]] == [
        (0, None),
        (2 * MIB, 2 * MIB),
        (3 * MIB, 3 * MIB),
    ]
    qemu_io(image, "read -P 0 0 3M", "read -P 1 3M 1M")


@pytest.mark.parametrize("kind", ["data_file_raw=on", "data_file_raw=off"])
def test_data_file_grows_with_its_disk_and_what_is_new_are_zeroes(
    tmp_path: Path, kind: str
) -> None:
    image, data = with_data_file(tmp_path, kind)
    with data.open("r+b") as file:
        file.seek(SIZE)
        file.write(b"\x07" * 1000)  # of no disk

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(SIZE - 100, IoVec.of(b"\x01" * 100))
        await backend.truncate(3 * SIZE)
        assert await read(backend, SIZE - 100, 2 * SIZE) == (b"\x01" * 100).ljust(2 * SIZE, b"\0")
        await backend.pwritev(3 * SIZE - 512, IoVec.of(b"\x02" * 512))

    with_image(image, scenario)
    assert check(image) == ""
    expected = (bytes(SIZE - 100) + b"\x01" * 100).ljust(3 * SIZE - 512, b"\0") + b"\x02" * 512
    assert data.read_bytes()[: 3 * SIZE] == contents(image, tmp_path) == expected


def test_raw_data_file_and_backing_file_contradict_each_other(tmp_path: Path) -> None:
    image, _ = with_data_file(tmp_path, "data_file_raw=on")
    base = create(tmp_path / "base", SIZE)
    header = bytearray(image.read_bytes()[:4096])
    name = str(base).encode()
    header[8:20] = (2048).to_bytes(8) + len(name).to_bytes(4)
    header[2048 : 2048 + len(name)] = name
    with image.open("r+b") as file:
        file.write(header)

    async def nothing(backend: BlockBackend) -> None:
        pass

    with pytest.raises(ConfigError, match="raw external data file cannot have a backing file"):
        with_image(image, nothing)
