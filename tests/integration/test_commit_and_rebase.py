"""Layers that are committed and rebased: as by QEMU, by a model, under load, with failures and cancelled (row B32)."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chains import Layer, Scenario, make, shown, with_chain
from tests.disks import REFUSALS
from tests.qcow2_images import MIB, check, contents, create, qemu_img, qemu_io, read
from tests.schedule import HUNT
from vhostblk.block import backing, chain
from vhostblk.block.backend import BlockBackend
from vhostblk.block.commit import commit, commit_all, make_empty
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.no_medium import NoMediumNode
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, Reason, freeze_backing_chain
from vhostblk.block.permissions import Perm
from vhostblk.block.rebase import rebase
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.testing.requirements import require


class BrokenNode(FilterNode):
    """Lets so many requests that change something through, and then fails, or has its user cancelled."""

    driver_name = "broken"
    left = 1 << 30
    victim: asyncio.Task[None] | None = None

    async def _spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            if self.victim is None:
                raise BlockError(errno.EIO)
            if self.left >= -2:  # whoever cleans up is cancelled, too, once
                self.victim.cancel()
                await asyncio.sleep(0)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        await self._spend()
        await self.file.pwritev(offset, iov, flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._spend()
        await self.file.pwrite_zeroes(offset, length, flags)

    async def driver_flush_to_disk(self) -> None:
        await self._spend()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    require("qemu-img")
    require("qemu-io")
    return tmp_path


CHAINS = {
    # top first: size, shape
    "alike": [(MIB, ""), (MIB, ""), (MIB, "")],
    "longer on raw": [(2 * MIB, ""), (MIB, "raw")],
    "shorter on raw": [(MIB, ""), (2 * MIB + 512, "raw")],
    "longer on shorter": [(2 * MIB, "cluster_size=4k"), (MIB, ""), (MIB + 65536, "raw")],
    "shorter on longer": [(MIB, ""), (2 * MIB, "cluster_size=512"), (MIB, "raw")],
    "version 2": [(MIB, "compat=0.10"), (MIB, "compat=0.10"), (MIB // 2, "raw")],
    "subclusters": [(MIB, "extended_l2=on"), (MIB + 512, "extended_l2=on,cluster_size=16k"), (MIB, "")],
    "large clusters": [(4 * MIB, "cluster_size=2M"), (3 * MIB, ""), (5 * MIB, "raw")],
}  # fmt: skip


def make_chain(folder: Path, name: str) -> list[Layer]:
    layers = [
        Layer(f"layer{number}", size, shape) for number, (size, shape) in enumerate(CHAINS[name])
    ]
    make(folder, layers, random.Random(len(name)))
    return layers


@pytest.mark.parametrize("name", CHAINS)
def test_commit_does_what_qemu_does(folder: Path, name: str) -> None:
    layers = make_chain(folder, name)
    theirs = folder / "theirs"
    theirs.mkdir()
    for layer in layers:
        shutil.copy(folder / layer.name, theirs)
    qemu_img("commit", "-q", theirs / "layer0")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        await commit(graph, node)
        base = node.backing
        assert base is not None
        assert base.read_only
        assert not base.op_blockers.reason(OpType.COMMIT_TARGET)

    with_chain(folder / "layer0", scenario, driver="qcow2")
    for number, layer in enumerate(layers):
        ours = contents(folder / layer.name, folder) if layer.driver == "qcow2" else b""
        assert ours == (contents(theirs / layer.name, theirs) if ours else b""), layer.name
        if layer.driver == "qcow2":
            assert check(folder / layer.name) == ""
        elif number:
            bytes_of_raw = (folder / layer.name).read_bytes()
            assert bytes_of_raw == (theirs / layer.name).read_bytes()
    assert contents(folder / "layer0", folder) == shown(layers)
    allocated = qemu_img("map", "--output=json", folder / "layer0")
    assert '"depth": 0' not in allocated.replace('"depth": 0, "present": false', "")


@pytest.mark.parametrize("name", ["alike", "longer on shorter", "shorter on longer", "subclusters"])
def test_commit_into_a_layer_further_down_does_what_qemu_does(folder: Path, name: str) -> None:
    layers = make_chain(folder, name)
    base = layers[-1].name
    theirs = folder / "theirs"
    theirs.mkdir()
    for layer in layers:
        shutil.copy(folder / layer.name, theirs)
    qemu_img("commit", "-q", "-b", base, theirs / "layer0")
    told: list[tuple[int, int]] = []

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        below = chain.find_base(node)
        await commit(graph, node, below, report=lambda done, whole: told.append((done, whole)))
        assert below.read_only
        assert not below.op_blockers.reason(OpType.COMMIT_TARGET)
        assert not node.op_blockers.reason(OpType.COMMIT_SOURCE)
        assert not any(edge.frozen for edge in node.children.values())

    with_chain(folder / "layer0", scenario, driver="qcow2")
    assert told == sorted(told)
    assert told[-1] == (layers[0].size, layers[0].size)
    for layer in layers:
        if layer.driver == "qcow2":
            assert contents(folder / layer.name, folder) == contents(theirs / layer.name, theirs)
            assert check(folder / layer.name) == ""
        else:
            assert (folder / layer.name).read_bytes() == (theirs / layer.name).read_bytes()
    # The image keeps what it has: the layer in between would hide the base.
    assert contents(folder / "layer0", folder) == shown(layers)


def test_commit_over_a_layer_that_others_look_at_is_refused(folder: Path) -> None:
    layers = make_chain(folder, "alike")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        assert node.backing is not None
        reader = BlockBackend(node.backing, "a reader", writable=False, shared=Perm.ALL)
        with pytest.raises(ConfigError, match="a reader uses") as raised:
            await commit(graph, node, chain.find_base(node))
        assert raised.value.errno == errno.EPERM
        await reader.close()
        other = await graph.open_image(str(folder / "layer2"), {"read-only": True})
        with pytest.raises(ConfigError, match="is not below"):
            await commit(graph, node, other)
        assert not node.op_blockers.reason(OpType.COMMIT_SOURCE)

    with_chain(folder / "layer0", scenario, driver="qcow2")
    for number in range(3):
        assert contents(folder / f"layer{number}", folder) == shown(layers[number:])


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("to", ["ancestor", "other", "nothing", "raw"])
def test_rebase_keeps_what_is_shown_as_qemu_does(folder: Path, name: str, to: str) -> None:
    layers = make_chain(folder, name)
    other = [Layer("other", MIB + 4096, "raw" if to == "raw" else "")]
    make(folder, other, random.Random(7))
    new = {"ancestor": layers[-1:], "nothing": []}.get(to, other)
    words = (new[0].name, new[0].driver) if new else ("", "")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        await rebase(graph, node, *words)
        backend = BlockBackend(node, "the test", writable=False)
        assert await read(backend, 0, node.length) == shown(layers)
        await backend.close()
        assert (node.backing is None) == (not new)

    with_chain(folder / "layer0", scenario, driver="qcow2")
    assert contents(folder / "layer0", folder) == shown(layers)
    assert check(folder / "layer0") == ""
    info = qemu_img("info", folder / "layer0")
    assert (f"backing file: {words[0]}" in info) == bool(new)
    assert (f"backing file format: {words[1]}\n" in info) == bool(new)
    # What is in the layers below is as before.
    for number in range(1, len(layers)):
        below = layers[number:]
        if below[0].driver == "qcow2":
            assert contents(folder / below[0].name, folder) == shown(below)


def test_unsafe_rebase_writes_names_only(folder: Path) -> None:
    layers = make_chain(folder, "alike")
    (folder / "layer1").rename(folder / "moved")
    before = (folder / "layer0").read_bytes()[65536:]

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        with pytest.raises(ConfigError, match="backing format must be specified"):
            await rebase(graph, node, "moved", unsafe=True)
        await rebase(graph, node, "moved", "qcow2", unsafe=True)
        assert node.backing is None

    with_chain(folder / "layer0", scenario, driver="qcow2", backing=None)
    assert (folder / "layer0").read_bytes()[65536:] == before
    assert contents(folder / "layer0", folder) == shown(layers)


def test_image_with_snapshots_and_compressed_clusters_is_emptied(folder: Path) -> None:
    create(folder / "base", 2 * MIB)
    qemu_io(folder / "base", "write -P 1 0 1M")
    top = create(folder / "top", 2 * MIB, "-b", "base", "-F", "qcow2")
    qemu_io(top, "write -P 2 64k 128k", "write -c -P 3 512k 64k", "write -P 4 1536k 300k")
    qemu_img("snapshot", "-c", "s", top)
    qemu_io(top, "write -P 5 128k 64k")
    before = contents(top, folder)

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        await commit(graph, node)

    with_chain(top, scenario, driver="qcow2")
    assert check(top) == ""
    assert contents(top, folder) == contents(folder / "base", folder) == before
    qemu_img("snapshot", "-a", "s", top)
    assert check(top) == ""
    assert contents(top, folder)[192 * 1024 :] == before[192 * 1024 :]
    assert contents(top, folder)[128 * 1024 : 192 * 1024] == b"\2" * 65536


def test_emptied_image_without_a_backing_file_reads_as_zeroes(folder: Path) -> None:
    image = create(folder / "i", 2 * MIB, "-o", "cluster_size=512")
    qemu_io(image, "write -P 1 0 2M")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        backend = BlockBackend(node, "the test", writable=True)
        assert await backend.extents(0, MIB)
        await make_empty(node)
        assert await read(backend, 0, 2 * MIB) == bytes(2 * MIB)
        await backend.pwritev(MIB, IoVec.of(b"\2" * 512))
        await backend.close()
        read_only = await graph.open_image(str(folder / "other"), {"read-only": True})
        with pytest.raises(BlockError) as raised:
            await make_empty(read_only)
        assert raised.value.errno == errno.EPERM
        external = await graph.open_image(str(folder / "external"))
        raw = await graph.open_image(None, {"driver": "raw", "file.driver": "null-co"})
        for one in (external, raw):
            with pytest.raises(BlockError) as raised:
                await make_empty(one)
            assert raised.value.errno == errno.ENOTSUP

    create(folder / "other", MIB)
    data_file = f"data_file={folder}/data,data_file_raw=on"
    create(folder / "external", MIB, "-o", data_file)
    with_chain(image, scenario)
    assert check(image) == ""
    assert contents(image, folder) == bytes(MIB) + b"\2" * 512 + bytes(MIB - 512)


# ---------------------------------------------------------------------- what is refused


def test_what_cannot_be_committed_has_its_errno(folder: Path) -> None:
    make_chain(folder, "alike")
    create(folder / "sister", MIB, "-b", "layer1", "-F", "qcow2")

    async def refused(graph: BlockGraph, node: BlockNode, number: int) -> None:
        nodes = list(graph.nodes)
        with pytest.raises(REFUSALS) as raised:
            await commit(graph, node)
        assert raised.value.errno == number
        assert list(graph.nodes) == nodes
        assert all(not edge.frozen for node in graph.nodes.values() for edge in node.parents)

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        _, middle, bottom = chain.layers(node)
        await refused(graph, NoMediumNode(), errno.ENOMEDIUM)
        await refused(graph, bottom, errno.ENOTSUP)
        await refused(graph, middle, errno.EBUSY)  # it backs another
        for at, operation in ((node, OpType.COMMIT_SOURCE), (middle, OpType.COMMIT_TARGET)):
            reason = Reason("a job is at it")
            at.op_blockers.block(reason, [operation])
            await refused(graph, node, errno.EBUSY)
            at.op_blockers.unblock(reason)
        freeze_backing_chain(node, middle)
        with pytest.raises(ConfigError) as raised:
            await commit(graph, node)
        assert raised.value.errno == errno.EPERM
        node.children["backing"].frozen = False
        reader = BlockBackend(middle, "a reader", writable=False)
        await refused(graph, node, errno.EPERM)
        await reader.close()
        options = {"driver": "qcow2", "read-only": True, "file.driver": "file"}
        await graph.add(
            {**options, "file.filename": str(folder / "sister"), "backing": middle.node_name}
        )
        reader = BlockBackend(chain.overlays_of(middle)[1], "a sister's", writable=False)
        await refused(graph, node, errno.EPERM)
        await reader.close()

        async def elsewhere() -> None:
            other = BlockGraph()
            await other.open_image(str(folder / "sister"), {"read-only": True})
            await refused(graph, node, errno.EACCES)
            await other.close_all()

        await elsewhere()
        await commit(graph, node)

    with_chain(folder / "layer0", scenario, driver="qcow2")


def test_guessed_raw_base_does_not_become_another_format_by_a_commit(folder: Path) -> None:
    (folder / "base").write_bytes(bytes(MIB))
    top = create(folder / "top", MIB, "-b", "base", "-F", "raw")
    content = top.read_bytes()[:512]

    async def forget_format(graph: BlockGraph, node: BlockNode) -> None:
        await backing.change_backing_file(graph, node, "base", needs_driver=False)

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        assert node.backing is not None
        assert node.backing.probed
        backend = BlockBackend(node, "the guest", writable=True)
        await backend.pwritev(0, IoVec.of(content))
        with pytest.raises(BlockError) as raised:
            await commit(graph, node)
        assert raised.value.errno == errno.EPERM
        assert await read(backend, 0, 512) == content
        await backend.close()
        # Whoever says the format knows.
        await rebase(graph, node, "base", "raw")
        await backing.set_backing(graph, node, None)
        known = await backing.open_backing(graph, node, "base", "raw")
        await backing.set_backing(graph, node, known)
        await graph.release(known)
        await commit(graph, node)

    with_chain(top, forget_format, driver="qcow2")
    with_chain(top, scenario, driver="qcow2")
    assert (folder / "base").read_bytes()[:512] == content


def test_rebase_that_is_refused_changes_nothing(folder: Path) -> None:
    layers = make_chain(folder, "alike")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        for words, number in (
            (("layer2", ""), errno.EINVAL),
            (("", "raw"), errno.EINVAL),
            (("missing", "raw"), errno.ENOENT),
            (("layer2", "missing"), errno.ENOENT),
        ):
            with pytest.raises(ConfigError) as raised:
                await rebase(graph, node, *words)
            assert raised.value.errno == number
        # It would be its own backing file.
        with pytest.raises(ConfigError):
            await rebase(graph, node, "layer0", "qcow2")
        raw = await graph.open_image(None, {"driver": "raw", "file.driver": "null-co"})
        with pytest.raises(ConfigError, match="to '': Operation not supported"):
            await rebase(graph, raw, "")
        reason = Reason("a job is at it")
        node.op_blockers.block(reason)
        with pytest.raises(ConfigError) as raised:
            await rebase(graph, node, "layer2", "qcow2")
        assert raised.value.errno == errno.EBUSY
        node.op_blockers.unblock(reason)
        assert chain.depth(node) == 2

    with_chain(folder / "layer0", scenario, driver="qcow2")
    assert contents(folder / "layer0", folder) == shown(layers)


def test_all_images_that_are_used_are_committed(folder: Path) -> None:
    layers = make_chain(folder, "alike")
    shutil.copy(folder / "layer0", folder / "unused")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        guest = BlockBackend(node, "the guest", writable=True)
        await commit_all(graph)
        await guest.pwritev(0, IoVec.of(b"\7" * 512))
        assert await read(guest, 0, MIB) == b"\7" * 512 + shown(layers)[512:]
        await guest.close()

    with_chain(folder / "layer0", scenario, driver="qcow2")
    assert contents(folder / "layer1", folder) == shown(layers)


# ---------------------------------------------------------------------- under load


class Guest:
    """Writes and reads without end, and knows what is to be there."""

    def __init__(self, backend: BlockBackend, content: bytes) -> None:
        self.model = bytearray(content)
        self.done = 0
        self._backend = backend
        self._stop = False
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(4)]

    async def _run(self, number: int) -> None:
        rnd, quarter = random.Random(number), len(self.model) // 4
        while not self._stop:
            length = rnd.choice([512, 4096, 40000 // 512 * 512])
            at = number * quarter + rnd.randrange((quarter - length) // 512) * 512
            kind = rnd.choice("rrwwz")
            if kind == "r":
                assert await read(self._backend, at, length) == self.model[at : at + length]
            elif kind == "z":
                await self._backend.pwrite_zeroes(at, length, may_unmap=True)
                self.model[at : at + length] = bytes(length)
            else:
                data = rnd.randbytes(length)
                await self._backend.pwritev(at, IoVec.of(data))
                self.model[at : at + length] = data
            self.done += 1
            await asyncio.sleep(0)

    async def more(self, count: int) -> None:
        """Return when it has done so many more."""
        end = self.done + count
        while True:
            await asyncio.sleep(0)
            if self.done >= end:
                return

    async def stop(self) -> bytes:
        """What is to be there now."""
        self._stop = True
        await asyncio.gather(*self._tasks)
        return bytes(self.model)


@pytest.mark.parametrize("what", ["commit", "rebase"])
def test_guest_notices_nothing(folder: Path, what: str) -> None:
    layers = make_chain(folder, "subclusters")
    expected = b""

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        nonlocal expected
        backend = BlockBackend(node, "the guest", writable=True)
        guest = Guest(backend, shown(layers))
        for turn in range(6):
            await guest.more(30)
            if what == "commit":
                await commit(graph, node)
            else:
                await rebase(graph, node, f"layer{turn % 2 + 1}", "qcow2")
        await guest.more(30)
        expected = await guest.stop()
        await backend.close()

    with_chain(folder / "layer0", scenario, driver="qcow2", discard="unmap")
    for layer in layers:
        assert check(folder / layer.name) == ""
    assert contents(folder / "layer0", folder) == expected


# ---------------------------------------------------------------------- failures and cancellation


@pytest.mark.parametrize("how", ["failure", "cancellation"])
@pytest.mark.parametrize("what", ["commit", "rebase"])
def test_whatever_interrupts_it_the_image_shows_the_same(
    folder: Path, what: str, how: str, expect_log: ExpectedLog
) -> None:
    expect_log.allow("flush at close failed", "stays open for writing")
    pristine = folder / "pristine"
    pristine.mkdir()
    layers = make_chain(pristine, "longer on shorter")
    content = shown(layers)
    for budget in (*range(0, 14, 2), *range(20, 200, 45), 1 << 20):
        for layer in layers:
            shutil.copy(pristine / layer.name, folder)
        top, base = folder / "layer0", folder / "layer1"
        finished = False

        async def scenario(graph: BlockGraph, node: BlockNode, budget: int = budget) -> None:
            nonlocal finished
            assert node.backing is not None
            broken = [node.children["file"].node, node.backing.children["file"].node]
            backend = BlockBackend(node, "the guest", writable=True)
            work = commit(graph, node) if what == "commit" else rebase(graph, node, "", "")
            task = asyncio.create_task(work)
            for below in broken:
                assert isinstance(below, BrokenNode)
                below.left = budget
                below.victim = task if how == "cancellation" else None
            await asyncio.wait([task])
            for below in broken:
                assert isinstance(below, BrokenNode)
                below.left, below.victim = 1 << 30, None
            finished = not task.cancelled() and task.exception() is None
            if how == "failure" and not finished:
                assert isinstance(task.exception(), (BlockError, ConfigError))
            # It goes on, and may be tried again.
            assert await read(backend, 0, node.length) == content
            await backend.pwritev(0, IoVec.of(content[:4096]))
            for edge in node.children.values():
                assert not edge.frozen
            assert not node.op_blockers.reason(OpType.RESIZE)
            assert sum(edge.parent is not node for edge in node.parents) == 1
            await backend.close()

        with_broken_files(top, base, scenario)
        assert contents(top, folder) == content, budget
        for path in (top, base):
            assert "corrupt" not in check(path)
        if finished:
            break
    assert finished


def with_broken_files(top: Path, base: Path, scenario: Scenario) -> None:
    """Two images, whose files may fail."""

    def options(path: Path) -> dict[str, object]:
        file = {"driver": "broken", "file": {"driver": "file", "filename": str(path)}}
        return {"driver": "qcow2", "file": file}

    async def everything() -> None:
        graph = BlockGraph({**DRIVERS, "broken": BrokenNode})
        try:
            below = await graph.add({**options(base), "read-only": True})
            node = await graph.add({**options(top), "backing": below.node_name})
            await scenario(graph, node)
        finally:
            await graph.close_all()

    asyncio.run(everything())


# ---------------------------------------------------------------------- a model

sizes = st.integers(1, 3000).map(lambda sectors: sectors * 512)
shapes = st.sampled_from(
    ["", "cluster_size=512", "cluster_size=4k", "extended_l2=on", "compat=0.10"]
)
chains = st.lists(st.tuples(sizes, shapes), min_size=2, max_size=4)
steps = st.lists(
    st.tuples(st.sampled_from(["write", "zero", "commit", "rebase", "drop"]), st.integers(0, 1 << 16)),
    min_size=1,
    max_size=6,
)  # fmt: skip


@pytest.mark.timeout(120 * HUNT)
@settings(
    max_examples=12 * HUNT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip
@given(shape=chains, raw=st.booleans(), steps=steps, seed=st.integers(0, 1 << 16))
def test_any_chain_is_a_byte_array(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[tuple[int, str]],
    raw: bool,
    steps: list[tuple[str, int]],
    seed: int,
) -> None:
    require("qemu-img")
    require("qemu-io")
    folder = tmp_path_factory.mktemp("chain")
    layers = [Layer(f"layer{number}", *of) for number, of in enumerate(shape)]
    if raw:
        layers[-1] = Layer(layers[-1].name, layers[-1].size, "raw")
    make(folder, layers, random.Random(seed))
    chained = list(layers)

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        backend = BlockBackend(node, "the guest", writable=True)
        model = bytearray(shown(layers))
        for kind, number in steps:
            rnd = random.Random(number)
            nodes = list(chain.layers(node))
            if kind in ("write", "zero"):
                at = rnd.randrange(len(model) // 512) * 512
                length = min(rnd.choice([512, 70000 // 512 * 512]), len(model) - at)
                data = rnd.randbytes(length) if kind == "write" else bytes(length)
                if kind == "write":
                    await backend.pwritev(at, IoVec.of(data))
                else:
                    await backend.pwrite_zeroes(at, length)
                model[at : at + length] = data
            elif kind == "commit" and len(nodes) > 1:
                await commit(graph, node)
                assert nodes[1].length >= len(model)
                below = BlockBackend(nodes[1], "who compares", writable=False, shared=Perm.ALL)
                assert await read(below, 0, len(model)) == model
                await below.close()
            elif kind == "rebase":
                # To any layer there was, or to nothing.
                to = rnd.choice([None, *layers[1:]])
                words = (to.name, to.driver) if to is not None else ("", "")
                await rebase(graph, node, *words)
                chained[1:] = layers[layers.index(to) :] if to is not None else []
            elif kind == "drop" and len(nodes) > 2:
                # What the layer in between has is missed by nobody, when the top has it all.
                await rebase(graph, node, chained[-1].name, chained[-1].driver)
                await rebase(graph, node, chained[1].name, chained[1].driver)
                nodes = list(chain.layers(node))
                await keep_all(backend, model)
                await backing.drop_intermediate(graph, nodes[1], nodes[-1])
                assert len(list(chain.layers(node))) == 2
                chained[1:] = chained[-1:]
            assert await read(backend, 0, len(model)) == model, kind
        await backend.close()
        model_at_end.append(bytes(model))

    model_at_end: list[bytes] = []
    with_chain(folder / "layer0", scenario, driver="qcow2", discard="unmap")
    assert contents(folder / "layer0", folder) == model_at_end[0]
    for layer in layers:
        if layer.driver == "qcow2":
            assert check(folder / layer.name) == ""


async def keep_all(backend: BlockBackend, model: bytearray) -> None:
    """The image has every byte itself."""
    await backend.pwritev(0, IoVec.of(bytes(model)))
