"""The formats of Python, of the engine's header and of the kernel's headers are the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.requirements import require
from vhostblk import native
from vhostblk.native import binding, constants, disk, host_io, queues, thread
from vhostblk.virtio import blk, chain, split

pytestmark = pytest.mark.skipif(not native.available, reason="the engine is not built")

ENUMS = {
    "VB_": (constants.MessageType, constants.QueueFd),
    "VB_EXTENT_": (constants.ExtentFlag,),
    "VB_BROKEN_": (constants.Broken,),
    "VB_IO_": (constants.IOOp,),
    "VB_OP_": (constants.Op,),
    "VB_REQUEST_": (constants.RequestFlag,),
}


@pytest.mark.parametrize(
    ("prefix", "member"),
    [
        (prefix, member)
        for prefix, enums in ENUMS.items()
        for enum in enums
        if enum is not constants.QueueFd
        for member in enum
    ],
    ids=str,
)
def test_number_is_that_of_the_header(prefix: str, member: Any) -> None:
    assert getattr(binding.lib, f"{prefix}{member.name}") == member


@pytest.mark.parametrize(
    ("c_enum", "enum"),
    [
        ("enum vb_message_type", constants.MessageType),
        ("enum vb_extent_flag", constants.ExtentFlag),
        ("enum vb_broken", constants.Broken),
        ("enum vb_queue_fd", constants.QueueFd),
        ("enum vb_io_op", constants.IOOp),
        ("enum vb_request_flag", constants.RequestFlag),
    ],
)
def test_enum_has_all_numbers_of_the_header(c_enum: str, enum: Any) -> None:
    assert sorted(binding.ffi.typeof(c_enum).elements) == sorted(enum)


def test_reference_breaks_queues_for_the_reasons_of_the_engine() -> None:
    assert {m.name: m.value for m in chain.Broken} == {m.name: m.value for m in native.Broken}


def test_flush_targets_are_those_of_the_header() -> None:
    assert native.FLUSH_MISS == binding.lib.VB_FLUSH_MISS
    assert native.FLUSH_NOTHING == binding.lib.VB_FLUSH_NOTHING
    assert native.SUSPENDED == binding.lib.VB_SUSPENDED
    assert native.LATENCY_BUCKETS == binding.lib.VB_LATENCY_BUCKETS


def test_packed_completion_is_a_message_with_these_fields() -> None:
    cookie, status, written = 2**63 + 5, 1, 2**33 + 7
    complete = int(native.MessageType.COMPLETE)
    assert native.packed_completion(cookie, written, status) == native.packed(
        (complete, 0, 0, cookie, 0, 0, written, 0, 0, status, 0)
    )


def test_slice_of_the_address_space_is_the_memory_at_that_address() -> None:
    buffer = bytearray(b"0123456789")
    address = native.address_of(buffer)
    view = binding.ADDRESS_SPACE[address + 2 : address + 5]
    assert view.tobytes() == b"234"
    view[0] = ord("x")
    assert buffer == b"01x3456789"


@pytest.mark.parametrize(
    ("c_struct", "packer"),
    [
        ("struct vb_message", thread._MESSAGE),
        ("struct vb_extent", disk._EXTENT),
        ("struct vb_iov", binding.IOV),
        ("struct vb_segment", queues._SEGMENT),
        ("struct vb_io_part", host_io._IO_PART),
        ("struct vb_io_request", host_io._IO_REQUEST),
        ("struct vb_io_result", host_io._IO_RESULT),
    ],
)
def test_packed_struct_is_that_of_the_header(c_struct: str, packer: Any) -> None:
    ffi = binding.ffi
    assert packer.size == ffi.sizeof(c_struct)
    fields = ffi.typeof(c_struct).fields
    values = [n + 1 for n in range(len(fields))]
    struct = ffi.from_buffer(f"{c_struct} *", bytearray(packer.pack(*values)))

    assert [getattr(struct, name) for name, _ in fields] == values


def test_statistics_have_the_size_that_shared_memory_needs() -> None:
    assert binding.ffi.sizeof("struct vb_queue_stats") == native.QueueStats.SIZE


KERNEL = """
#include <stddef.h>
#include <stdio.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#define SIZE(type) printf("\\"%s\\": %zu,", #type, sizeof(struct type))
#define AT(type, field) printf("\\"%s.%s\\": %zu,", #type, #field, offsetof(struct type, field))
#define VALUE(name) printf("\\"%s\\": %u,", #name, (unsigned)name)
int main(void)
{
    printf("{");
    SIZE(vring_desc); AT(vring_desc, len); AT(vring_desc, flags); AT(vring_desc, next);
    SIZE(vring_used_elem); AT(vring_used_elem, len);
    AT(vring_avail, idx); AT(vring_avail, ring); AT(vring_used, idx); AT(vring_used, ring);
    SIZE(virtio_blk_outhdr); AT(virtio_blk_outhdr, ioprio); AT(virtio_blk_outhdr, sector);
    SIZE(virtio_blk_discard_write_zeroes);
    AT(virtio_blk_discard_write_zeroes, num_sectors); AT(virtio_blk_discard_write_zeroes, flags);
    AT(virtio_blk_config, capacity); AT(virtio_blk_config, size_max);
    AT(virtio_blk_config, seg_max); AT(virtio_blk_config, blk_size);
    AT(virtio_blk_config, physical_block_exp); AT(virtio_blk_config, alignment_offset);
    AT(virtio_blk_config, min_io_size); AT(virtio_blk_config, opt_io_size);
    AT(virtio_blk_config, num_queues); AT(virtio_blk_config, max_discard_sectors);
    AT(virtio_blk_config, max_discard_seg); AT(virtio_blk_config, discard_sector_alignment);
    AT(virtio_blk_config, max_write_zeroes_sectors); AT(virtio_blk_config, max_write_zeroes_seg);
    AT(virtio_blk_config, write_zeroes_may_unmap);
    printf("\\"virtio_blk_config.writeback\\": %zu,", offsetof(struct virtio_blk_config, wce));
    VALUE(VIRTIO_BLK_T_IN); VALUE(VIRTIO_BLK_T_OUT); VALUE(VIRTIO_BLK_T_FLUSH);
    VALUE(VIRTIO_BLK_T_GET_ID); VALUE(VIRTIO_BLK_T_DISCARD); VALUE(VIRTIO_BLK_T_WRITE_ZEROES);
    VALUE(VIRTIO_BLK_T_SECURE_ERASE);
    VALUE(VIRTIO_BLK_S_OK); VALUE(VIRTIO_BLK_S_IOERR); VALUE(VIRTIO_BLK_S_UNSUPP);
    VALUE(VRING_DESC_F_NEXT); VALUE(VRING_DESC_F_WRITE); VALUE(VRING_DESC_F_INDIRECT);
    VALUE(VRING_USED_F_NO_NOTIFY); VALUE(VRING_AVAIL_F_NO_INTERRUPT); VALUE(VIRTIO_BLK_ID_BYTES);
    printf("\\"end\\": 0}");
    return 0;
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the compiler says of the kernel's headers."""
    compiler = require("gcc", group="compiler")
    folder: Path = tmp_path_factory.mktemp("layout")
    source = folder / "layout.c"
    source.write_text(KERNEL)
    subprocess.run([compiler, "-o", folder / "layout", source], check=True, timeout=60)
    text = subprocess.run([folder / "layout"], capture_output=True, check=True, timeout=10).stdout
    values: dict[str, int] = json.loads(text)
    return values


def test_ring_formats_are_those_of_the_kernel(kernel: dict[str, int]) -> None:
    assert split.DESC.size == kernel["vring_desc"]
    assert split.USED_ELEM.size == kernel["vring_used_elem"]
    # The order of the fields: each value read back from where the kernel has it.
    raw = split.DESC.pack(1, 2, 3, 4)
    assert raw[kernel["vring_desc.len"]] == 2
    assert raw[kernel["vring_desc.flags"]] == 3
    assert raw[kernel["vring_desc.next"]] == 4
    assert split.USED_ELEM.pack(1, 2)[kernel["vring_used_elem.len"]] == 2
    for ring in ("vring_avail", "vring_used"):
        assert kernel[f"{ring}.idx"] == 2 * split.IDX
        assert kernel[f"{ring}.ring"] == 2 * split.ENTRIES
    assert kernel["VRING_DESC_F_NEXT"] == split.DESC_F_NEXT
    assert kernel["VRING_DESC_F_WRITE"] == split.DESC_F_WRITE
    assert kernel["VRING_DESC_F_INDIRECT"] == split.DESC_F_INDIRECT
    assert kernel["VRING_USED_F_NO_NOTIFY"] == split.USED_F_NO_NOTIFY
    assert kernel["VRING_AVAIL_F_NO_INTERRUPT"] == split.AVAIL_F_NO_INTERRUPT


def test_request_formats_are_those_of_the_kernel(kernel: dict[str, int]) -> None:
    assert blk.HEADER.size == kernel["virtio_blk_outhdr"]
    header = blk.HEADER.pack(1, 2, 3)
    assert header[kernel["virtio_blk_outhdr.ioprio"]] == 2
    assert header[kernel["virtio_blk_outhdr.sector"]] == 3
    assert blk.SEGMENT.size == kernel["virtio_blk_discard_write_zeroes"]
    segment = blk.SEGMENT.pack(1, 2, 3)
    assert segment[kernel["virtio_blk_discard_write_zeroes.num_sectors"]] == 2
    assert segment[kernel["virtio_blk_discard_write_zeroes.flags"]] == 3
    assert kernel["VIRTIO_BLK_ID_BYTES"] == blk.ID_BYTES


@pytest.mark.parametrize(
    "field",
    [
        "capacity",
        "size_max",
        "seg_max",
        "blk_size",
        "physical_block_exp",
        "alignment_offset",
        "min_io_size",
        "opt_io_size",
        "writeback",
        "num_queues",
        "max_discard_sectors",
        "max_discard_seg",
        "discard_sector_alignment",
        "max_write_zeroes_sectors",
        "max_write_zeroes_seg",
        "write_zeroes_may_unmap",
    ],
)
def test_config_field_is_where_the_kernel_has_it(kernel: dict[str, int], field: str) -> None:
    space = blk.BlkConfig(**{field: 1}).to_bytes()

    assert space.index(1) == kernel[f"virtio_blk_config.{field}"]


def test_request_types_and_statuses_are_those_of_the_kernel(kernel: dict[str, int]) -> None:
    types = {name: value for name, value in kernel.items() if name.startswith("VIRTIO_BLK_T_")}
    statuses = {name: value for name, value in kernel.items() if name.startswith("VIRTIO_BLK_S_")}

    assert {f"VIRTIO_BLK_T_{t.name}": t.value for t in blk.RequestType}.items() >= types.items()
    assert {f"VIRTIO_BLK_S_{s.name}": s.value for s in blk.Status} == statuses
