"""Chains of images: what layers are called, how they are linked, and layers that go (row B32)."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.chains import with_chain
from tests.disks import REFUSALS
from tests.qcow2_images import (
    MIB,
    check,
    contents,
    create,
    qemu_img,
    qemu_io,
    read,
    scribble,
)
from vhostblk.block import backing, chain
from vhostblk.block.backend import BlockBackend
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.introspection import exact_filename, filename, full_options
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, HostExtent
from vhostblk.block.op_blockers import (
    OpType,
    check_op,
    freeze_backing_chain,
    unfreeze_backing_chain,
)
from vhostblk.block.pipeline import host_extent
from vhostblk.block.surgery import insert_filter
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.requirements import require


class ClearNode(FilterNode):
    """A filter that lets extents through."""

    driver_name = "clear"

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        return await host_extent(self.file.node, offset, length)


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until it holds; the test's deadline is the deadline."""
    while True:
        await asyncio.sleep(0)
        if condition():
            return


def info(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(qemu_img("info", "-U", "--output=json", path))
    return found


def names_of(path: Path) -> list[str]:
    """What QEMU finds when it follows a chain: the last parts of the names."""
    found = json.loads(qemu_img("info", "-U", "--backing-chain", "--output=json", path))
    return [Path(layer["filename"]).name for layer in found]


@pytest.fixture
def tools() -> None:
    require("qemu-img")
    require("qemu-io")


@pytest.fixture
def folder(tmp_path: Path, tools: None) -> Path:
    return tmp_path


def make_chain(folder: Path, *names: str, size: int = 4 * MIB) -> list[Path]:
    """Images with something in each, the base first; relative names."""
    paths = []
    for number, name in enumerate(names):
        words = ["-b", names[number - 1], "-F", "qcow2"] if number else []
        paths.append(create(folder / name, size, *words))
        scribble(paths[-1], size, number, 12)
    return paths


# ---------------------------------------------------------------------- names and queries


def test_chain_of_five_with_mixed_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, absolute, with a protocol and by JSON; found under the names that images in the chain would say."""
    (folder / "sub").mkdir()
    (folder / "sub" / "deeper").mkdir()
    (folder / "raw").write_bytes(random.Random(1).randbytes(MIB))
    create(folder / "sub" / "d", MIB, "-b", "../raw", "-F", "raw")
    create(folder / "sub" / "deeper" / "c", MIB, "-b", folder / "sub" / "d", "-F", "qcow2")
    create(folder / "b", MIB, "-b", f"file:{folder}/sub/deeper/c", "-F", "qcow2")
    described = {"driver": "qcow2", "file": {"driver": "file", "filename": str(folder / "b")}}
    create(folder / "a", MIB, "-b", f"json:{json.dumps(described)}", "-F", "qcow2")
    monkeypatch.chdir(folder / "sub")

    async def scenario(graph: BlockGraph, a: BlockNode) -> None:
        a_, b, c, d, raw = chain.layers(a)
        assert a_ is a
        assert chain.depth(a) == 4
        assert chain.find_base(a) is raw
        assert chain.find_overlay(a, None) is raw
        assert [chain.find_overlay(a, node) for node in (a, b, c, d, raw)] == [None, a, b, c, d]
        assert chain.find_overlay(c, b) is None
        assert chain.contains(a, raw)
        assert not chain.contains(c, b)
        assert not chain.contains(None, a)
        assert not chain.contains(a, None)
        expected = {
            "../raw": raw,
            str(folder / "raw"): raw,
            f"{folder}/sub/../raw": raw,
            # Seen from `c`, not from the working directory; `sub/d` would be there.
            str(folder / "sub" / "d"): d,
            f"file:{folder}/sub/deeper/c": c,
            a.recorded_backing().filename: b,
            "d": None,  # of `d`'s own folder, but nobody there says it
            "raw": None,
            "file:raw": None,
            "": None,
        }
        for name, layer in expected.items():
            assert await chain.find_backing_image(a, name) is layer, name
        assert await chain.find_backing_image(d, str(folder / "sub" / "d")) is None
        assert exact_filename(a) == "../a"
        assert filename(c) == str(folder / "sub" / "deeper" / "c")
        backend = BlockBackend(a, "the test", writable=False)
        assert await read(backend, 0, MIB) == (folder / "raw").read_bytes()
        await backend.close()

    with_chain("../a", scenario)


def test_filters_are_no_layers(folder: Path) -> None:
    _, _, top = make_chain(folder, "base", "mid", "top")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        _, mid, base = chain.layers(node)
        above_base = await insert_filter(graph, base, {"driver": "clear"})
        on_top = await insert_filter(graph, node, {"driver": "clear"})
        assert list(chain.layers(on_top)) == [node, mid, base]
        assert chain.find_overlay(on_top, above_base) is mid
        assert chain.find_base(on_top) is base
        assert chain.contains(on_top, above_base)
        assert chain.depth(on_top) == 2
        assert chain.overlays_of(base) == [mid]
        assert chain.next_layer(mid) is base

    with_chain(top, scenario, ClearNode)


def test_name_of_an_image_is_plain_unless_options_replace_what_it_says(folder: Path) -> None:
    base, top = make_chain(folder, "base", "top")
    other = create(folder / "other", 4 * MIB)

    async def as_it_says(graph: BlockGraph, node: BlockNode) -> None:
        assert filename(node) == str(top)
        assert "backing" not in full_options(node)

    async def overridden(graph: BlockGraph, node: BlockNode) -> None:
        assert filename(node).startswith("json:")
        assert full_options(node)["backing"]["file"]["filename"] == str(other)
        again = await graph.open_image(filename(node), {"read-only": True, "force-share": True})
        assert full_options(again) == full_options(node)
        assert exact_filename(again.children["backing"].node) == str(other)

    async def removed(graph: BlockGraph, node: BlockNode) -> None:
        assert full_options(node)["backing"] is None

    with_chain(top, as_it_says)
    with_chain(top, as_it_says, **{"backing.driver": "qcow2", "backing.file.filename": str(base)})
    with_chain(top, overridden, **{"backing.driver": "qcow2", "backing.file.filename": str(other)})
    with_chain(top, removed, backing=None)


def test_chain_of_128_images_is_opened_flushed_and_shortened(folder: Path) -> None:
    first = create(folder / "0", MIB)
    qemu_io(first, "write -P 1 0 64k")
    for number in range(1, 128):
        create(folder / str(number), MIB, "-u", "-b", str(number - 1), "-F", "qcow2")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        assert chain.depth(node) == 127
        backend = BlockBackend(node, "the test", writable=True)
        assert await read(backend, 0, 512) == b"\1" * 512
        await backend.pwritev(512, IoVec.of(b"\2" * 512))
        await backend.flush()
        below = list(chain.layers(node))
        await backing.drop_intermediate(graph, below[1], below[-1])
        assert chain.depth(node) == 1
        assert await read(backend, 0, 1024) == b"\1" * 512 + b"\2" * 512
        await backend.close()

    with_chain(folder / "127", scenario)
    assert names_of(folder / "127") == ["127", "0"]


def test_chain_of_20_images_is_open_after_less_than_300_ms_of_cpu_time(folder: Path) -> None:
    create(folder / "0", 1 << 30)
    for number in range(1, 20):
        create(folder / str(number), 1 << 30, "-u", "-b", str(number - 1), "-F", "qcow2")

    async def scenario() -> float:
        graph = BlockGraph()
        began = time.process_time()
        node = await graph.open_image(str(folder / "19"), {"driver": "qcow2"})
        took = time.process_time() - began
        assert chain.depth(node) == 19
        await graph.close_all()
        return took

    assert min(asyncio.run(scenario()) for _ in range(3)) < 0.3


# ---------------------------------------------------------------------- what images say


def test_image_says_another_backing_file(folder: Path) -> None:
    base, top = make_chain(folder, "base", "top")
    described = "json:" + json.dumps(
        {"driver": "qcow2", "file": {"driver": "file", "filename": str(base)}}
    )
    before = contents(top, folder)
    for name in ("base", f"./{'sub/../' * 20}base", str(base), f"file:{base}", described):
        (folder / "sub").mkdir(exist_ok=True)

        async def scenario(graph: BlockGraph, node: BlockNode, name: str = name) -> None:
            await backing.change_backing_file(graph, node, name, "qcow2")
            assert node.recorded_backing().filename == name

        with_chain(top, scenario, **{"read-only": len(name) > 100})
        assert info(top)["backing-filename"] == name
        assert info(top)["backing-filename-format"] == "qcow2"
        assert contents(top, folder) == before
        assert check(top) == ""

    async def nothing(graph: BlockGraph, node: BlockNode) -> None:
        await backing.change_backing_file(graph, node, "")
        assert node.backing is not None  # what is read now stays the same

    with_chain(top, nothing)
    assert "backing-filename" not in info(top)


def test_what_an_image_cannot_say_has_its_errno(folder: Path) -> None:
    _, top = make_chain(folder, "base", "top")
    small = create(folder / "small", MIB, "-o", "cluster_size=512,compat=0.10")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        for name, driver, number in (
            ("", "qcow2", errno.EINVAL),
            ("base", "", errno.EINVAL),  # whoever opens it next would have to guess
            ("x" * 1024, "raw", errno.EINVAL),
        ):
            with pytest.raises(REFUSALS) as raised:
                await backing.change_backing_file(graph, node, name, driver)
            assert raised.value.errno == number
        await backing.change_backing_file(graph, node, "base", needs_driver=False)
        raw = await graph.open_image(str(folder / "raw"), {"driver": "raw"})
        with pytest.raises(BlockError) as raised:
            await backing.change_backing_file(graph, raw, "base", "qcow2")
        assert raised.value.errno == errno.ENOTSUP
        tight = await graph.open_image(str(small), {"driver": "qcow2"})
        with pytest.raises(BlockError) as raised:
            await backing.change_backing_file(graph, tight, "x" * 500, "qcow2")
        assert raised.value.errno == errno.ENOSPC

    (folder / "raw").write_bytes(bytes(MIB))
    with_chain(top, scenario)
    assert info(top)["backing-filename"] == "base"
    assert "backing-filename-format" not in info(top)
    assert check(small) == ""


# ---------------------------------------------------------------------- the live link


def test_backing_file_is_exchanged_and_removed_and_given_under_requests(folder: Path) -> None:
    """The bytes below change all at once: no request sees an extent, or a zero, of what was below before."""
    for name, pattern in (("one", 1), ("two", 2)):
        qemu_io(create(folder / name, MIB), f"write -P {pattern} 0 1M")
    top = create(folder / "top", MIB, "-b", "one", "-F", "qcow2")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        backend = BlockBackend(node, "the guest", writable=True)
        seen: list[int] = []
        stop = asyncio.Event()
        held: list[object] = []

        async def revoke(offset: int, length: int) -> None:
            held.clear()

        backend.attach(revoke=revoke)

        async def guest() -> None:
            while not stop.is_set():
                held.extend(await backend.extents(0, MIB))
                data = await read(backend, random.Random(len(seen)).randrange(2000) * 512, 512)
                assert len(set(data)) == 1
                seen.append(data[0])
                await asyncio.sleep(0)

        async def seeing(pattern: int) -> None:
            seen.clear()
            await until(lambda: seen[-5:] == [pattern] * 5)

        task = asyncio.create_task(guest())
        two = await graph.open_image(str(folder / "two"), {"read-only": True})
        await seeing(1)
        (one,) = [below for below in chain.layers(node) if below is not node]
        await backing.set_backing(graph, node, two)
        await seeing(2)
        assert one.node_name not in graph.nodes
        with pytest.raises(ConfigError, match="it is used by") as raised:
            check_op(two, OpType.RESIZE)
        assert raised.value.errno == errno.EBUSY
        await backing.set_backing(graph, node, None)
        await seeing(0)
        check_op(two, OpType.RESIZE)
        # A discarded range, and what is zeroed, know that nothing is below now, and that there is again.
        await backend.pwrite_zeroes(MIB // 2, 4096)
        await backing.set_backing(graph, node, two)
        await seeing(2)
        await backing.set_backing(graph, node, two)
        stop.set()
        await task
        await backend.close()

    with_chain(top, scenario, discard="unmap")


def test_link_that_cannot_change_does_not(folder: Path) -> None:
    *_, top = make_chain(folder, "base", "mid", "top")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        _, middle, bottom = chain.layers(node)
        freeze_backing_chain(node, bottom)
        for change in (
            backing.set_backing(graph, node, None),
            backing.set_backing(graph, node, bottom),
            backing.drop_intermediate(graph, middle, bottom),
        ):
            with pytest.raises(ConfigError, match="frozen") as raised:
                await change
            assert raised.value.errno == errno.EPERM
        unfreeze_backing_chain(node, bottom)
        with pytest.raises(ConfigError, match="cycle"):
            await backing.set_backing(graph, bottom, node)
        raw = await graph.open_image(None, {"driver": "raw", "file.driver": "null-co"})
        with pytest.raises(ConfigError, match="does not support backing files"):
            await backing.set_backing(graph, raw, bottom)
        assert list(chain.layers(node)) == [node, middle, bottom]

    with_chain(top, scenario)
    assert names_of(top) == ["top", "mid", "base"]


# ---------------------------------------------------------------------- dropping layers


def test_layer_is_dropped_under_load(folder: Path) -> None:
    """Layers that have nothing of their own go while the guest writes; what images say is what is open."""
    base, top = folder / "base", folder / "top"
    base.write_bytes(random.Random(3).randbytes(MIB))
    create(folder / "m1", MIB, "-b", "base", "-F", "raw")
    create(folder / "m2", MIB, "-b", folder / "m1", "-F", "qcow2")
    create(folder / "m3", MIB, "-b", "m2", "-F", "qcow2")
    create(top, MIB, "-b", "m3", "-F", "qcow2")
    model = bytearray(base.read_bytes())

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        backend = BlockBackend(node, "the guest", writable=True)
        stop = asyncio.Event()
        written = 0

        async def guest(number: int) -> None:
            nonlocal written
            rnd = random.Random(number)
            while not stop.is_set():
                at = rnd.randrange(number * 64, number * 64 + 60) * 4096
                data = rnd.randbytes(rnd.randrange(1, 5) * 512)
                await backend.pwritev(at, IoVec.of(data))
                model[at : at + len(data)] = data
                where = rnd.randrange(number * 64, number * 64 + 60) * 4096
                assert await read(backend, where, 4096) == model[where : where + 4096]
                written += 1
                await asyncio.sleep(0)

        def have_written(count: int) -> bool:
            return written > count

        tasks = [asyncio.create_task(guest(number)) for number in range(4)]
        _, m3, m2, m1, bottom = chain.layers(node)
        for upper, lower, left in ((m3, m2, 3), (m2, bottom, 1)):
            await until(partial(have_written, written + 50))
            await backing.drop_intermediate(graph, upper, lower)
            assert chain.depth(node) == left
            assert upper.node_name not in graph.nodes
        await backing.drop_intermediate(graph, bottom, bottom)
        assert m1.node_name not in graph.nodes
        assert node.backing is bottom
        assert bottom.inherits_from is node
        with pytest.raises(ConfigError) as raised:
            check_op(bottom, OpType.RESIZE)
        assert raised.value.errno == errno.EBUSY
        stop.set()
        await asyncio.gather(*tasks)
        await backend.close()

    with_chain(top, scenario)
    assert names_of(top) == ["top", "base"]
    assert info(top)["backing-filename"] == "base"
    assert info(top)["backing-filename-format"] == "raw"
    assert contents(top, folder) == model
    assert check(top) == ""


def test_every_overlay_of_a_dropped_layer_says_the_name_that_is_right_where_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sub").mkdir()
    create(folder / "base", MIB)
    create(folder / "mid", MIB, "-b", "base", "-F", "qcow2")
    near = create(folder / "near", MIB, "-b", "mid", "-F", "qcow2")
    far = create(folder / "sub" / "far", MIB, "-b", "../mid", "-F", "qcow2")
    monkeypatch.chdir(folder)

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        _, mid, base = chain.layers(node)
        graph.hold(mid)
        options = {"driver": "qcow2", "read-only": True, "backing": mid.node_name}
        other = await graph.add({**options, "file.driver": "file", "file.filename": "sub/far"})
        await backing.drop_intermediate(graph, mid, base)
        assert other.read_only
        assert other.backing is base
        assert node.backing is base
        assert mid.node_name in graph.nodes  # somebody holds it
        await graph.release(mid)
        assert mid.node_name not in graph.nodes

    with_chain("near", scenario)
    assert info(near)["backing-filename"] == "base"
    assert info(far)["backing-filename"] == str(folder / "base")


def test_layer_that_cannot_be_dropped_stays_in_every_chain(folder: Path) -> None:
    *_, top = make_chain(folder, "base", "mid", "top")
    second = create(folder / "second", 4 * MIB, "-b", "mid", "-F", "qcow2")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        _, middle, bottom = chain.layers(node)
        for upper, lower in ((bottom, middle), (node, bottom), (node, middle)):
            with pytest.raises(ConfigError) as raised:
                await backing.drop_intermediate(graph, upper, lower)
            assert raised.value.errno == errno.EIO
        options = {"driver": "qcow2", "file.driver": "file", "file.filename": str(second)}
        other = await graph.add({**options, "backing": middle.node_name})

        async def fail(filename: str, driver: str) -> None:
            raise BlockError(errno.ENOSPC)

        other.driver_change_backing = fail  # type: ignore[method-assign]
        with pytest.raises(BlockError) as failed:
            await backing.drop_intermediate(graph, middle, bottom)
        assert failed.value.errno == errno.ENOSPC
        assert other.backing is middle
        assert node.backing is middle
        assert node.recorded_backing().filename == "mid"

    with_chain(top, scenario)
    assert names_of(top) == ["top", "mid", "base"]
    assert names_of(second) == ["second", "mid", "base"]
