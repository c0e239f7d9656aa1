"""The same writes above QEMU's copy-before-write and ours leave the same bytes on the disk and in the target."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.testing.requirements import require

SIZE = (2 << 20) + 1536
Command = tuple[str, int, int]


def commands(choice: random.Random) -> list[Command]:
    found: list[Command] = []
    for _ in range(12):
        kind = choice.choice(["write -P 7", "write -P 7", "write -z", "discard"])
        offset = choice.randrange(SIZE // 512) * 512
        length = min(choice.choice([512, 4096, 65536, 200_192]), SIZE - offset)
        found.append((kind, offset, length))
    return found


def prepare(folder: Path, choice: random.Random) -> None:
    """Data, a hole in the middle, data; and a target that nobody has written yet."""
    folder.mkdir()
    with (folder / "disk").open("wb") as disk:
        disk.write(choice.randbytes(SIZE // 3))
        disk.seek(SIZE * 2 // 3 // 512 * 512)
        disk.write(choice.randbytes(SIZE - disk.tell()))
    (folder / "target").write_bytes(b"\xee" * SIZE)


def options(folder: Path, **more: Any) -> dict[str, Any]:
    def file(name: str) -> dict[str, Any]:
        return {"driver": "file", "filename": str(folder / name), "discard": "unmap"}

    node = {"driver": "copy-before-write", "discard": "unmap", "file": file("disk")}
    target = file("target")
    if "inject-error" in more:
        target = {"driver": "blkdebug", "image": target, "inject-error": more.pop("inject-error")}
    return {**node, "target": target, **more}


def with_qemu(node: dict[str, Any], wanted: list[Command]) -> list[bool]:
    """Whether each command has succeeded."""
    outcomes = []
    words = [word for kind, *where in wanted for word in ("-c", " ".join(map(str, (kind, *where))))]
    done = subprocess.run(
        ["qemu-io", *words, f"json:{json.dumps(node)}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith(("wrote", "discard")):
            outcomes.append(" failed" not in line)
        elif "failed:" in line:
            outcomes.append(False)
    return outcomes


def with_ours(node: dict[str, Any], wanted: list[Command]) -> list[bool]:
    """The same."""

    async def run() -> list[bool]:
        outcomes = []
        graph = BlockGraph()
        user = BlockBackend(await graph.add(node), "test", writable=True)
        for kind, offset, length in wanted:
            try:
                if kind == "discard":
                    await user.pdiscard(offset, length)
                elif kind == "write -z":
                    await user.pwrite_zeroes(offset, length)
                else:
                    await user.pwritev(offset, IoVec.of(b"\x07" * length))
                outcomes.append(True)
            except BlockError:
                outcomes.append(False)
        await user.close()
        await graph.close_all()
        return outcomes

    return asyncio.run(run())


FAULTS: dict[str, dict[str, Any]] = {
    "no faults": {},
    "write fails": {"inject-error": [{"event": "none", "iotype": "write", "sector": 512}]},
    "snapshot is lost": {
        "inject-error": [{"event": "none", "iotype": "write", "sector": 512}],
        "on-cbw-error": "break-snapshot",
    },
}


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize("seed", range(5))
def test_disk_and_target_have_the_same_bytes(
    tmp_path: Path, seed: int, faults: str, expect_log: ExpectedLog
) -> None:
    require("qemu-io")
    if faults == "snapshot is lost":
        expect_log.expect("the snapshot is lost")
    wanted = [("write -P 7", 250_880, 20_480), *commands(random.Random(seed))]
    ways = {"qemu": with_qemu, "ours": with_ours}
    for name in ways:
        prepare(tmp_path / name, random.Random(100 + seed))
    outcomes = {
        name: way(options(tmp_path / name, **FAULTS[faults]), wanted) for name, way in ways.items()
    }
    assert outcomes["qemu"] == outcomes["ours"]
    assert all(outcomes["ours"]) == (faults != "write fails")
    for file in ("disk", "target"):
        theirs, ours = ((tmp_path / name / file).read_bytes() for name in ways)
        differing = [at for at in range(0, SIZE, 512) if theirs[at:][:512] != ours[at:][:512]]
        assert (len(theirs), differing) == (len(ours), [])
