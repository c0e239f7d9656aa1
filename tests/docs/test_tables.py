"""Tables of the documentation and the code say the same."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.docs.documents import DOCS, ROOT, read, table
from vhostblk import native
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.foreign_formats import NAMES
from vhostblk.block.leaky_bucket import ThrottleLimits
from vhostblk.block.limits import MAX_BOUNCING, MAX_REQUEST
from vhostblk.block.node import BlockSizes
from vhostblk.block.options import NodeOptions, describe_options
from vhostblk.cli import storage_daemon
from vhostblk.client.conformance.registry import ALL_CHECKS
from vhostblk.daemon import MAX_OWN_THREADS
from vhostblk.export import options as export_options
from vhostblk.export.blk_device import SEG_MAX, BlkDevice
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.options import DEFAULT_QUEUES, ExportConfig
from vhostblk.vhost.message import (
    FRONTEND_TABLE,
    MAX_PAYLOAD,
    MAX_TABLE_REGIONS,
    ProtocolFeature,
    Request,
    Ring,
)
from vhostblk.vhost.negotiation import PROTOCOL_FEATURES
from vhostblk.vhost.session import MAX_MEM_SLOTS, MAX_QUEUES
from vhostblk.vhost.vring import MAX_RING_SIZE
from vhostblk.virtio import blk_request
from vhostblk.virtio.blk import CONFIG_SIZE, ID_BYTES, BlkConfig, RequestType
from vhostblk.virtio.features import Feature

# ---------------------------------------------------------------- storage-daemon.md

OPTION_SETS: list[tuple[str, type[Any]]] = [
    ("Options of every node", NodeOptions),
    ("Exports", export_options._Options),
    *(
        (name, driver.options_type)
        for name, driver in DRIVERS.items()
        if dataclasses.fields(driver.options_type)
    ),
]


@pytest.mark.parametrize(("heading", "options_type"), OPTION_SETS, ids=[s[0] for s in OPTION_SETS])
def test_options_have_the_names_values_and_defaults_of_the_code(
    heading: str, options_type: type[Any]
) -> None:
    rows = table(read("docs/storage-daemon.md"), heading)
    documented = [(row["option"], row["values"]) for row in rows]
    assert documented == [(name, values) for name, values, _ in describe_options(options_type)]


def test_iothread_has_its_options() -> None:
    (kind, *rows) = table(read("docs/storage-daemon.md"), "Objects")
    assert (kind["option"], kind["values"]) == ("qom-type", "iothread (required)")
    documented = [(row["option"], row["values"]) for row in rows]
    expected = describe_options(storage_daemon._IOThreadOptions)
    assert documented == [(name, values) for name, values, _ in expected]


def test_throttle_group_has_its_limits() -> None:
    rows = table(read("docs/storage-daemon.md"), "Throttle groups")
    assert [(row["option"], row["values"]) for row in rows] == [
        (name, values) for name, values, _ in describe_options(ThrottleLimits)
    ]


# ---------------------------------------------------------------- block-nodes.md


def test_every_driver_is_described() -> None:
    assert {row["driver"] for row in table(read("docs/block-nodes.md"), "Block nodes")} == set(
        DRIVERS
    )
    assert f"largest\ntransfer is {MAX_REQUEST} bytes" in read("docs/block-nodes.md")


# ---------------------------------------------------------------- vhost-user.md


def test_protocol_features_are_offered_as_the_table_says() -> None:
    rows = table(read("docs/vhost-user.md"), "Protocol features")
    assert [(1 << int(row["bit"]), row["feature"]) for row in rows] == [
        (feature.value, feature.name) for feature in ProtocolFeature
    ]
    offered = {row["feature"] for row in rows if row[""] == "offered"}
    assert offered == {f.name for f in ProtocolFeature if f & PROTOCOL_FEATURES}


def test_served_messages_are_the_rows_of_the_code() -> None:
    documented = [
        (row["message"], row["fds"], row["feature"], row["ring"])
        for row in table(read("docs/vhost-user.md"), "Messages that are served")
    ]
    expected = []
    for row in FRONTEND_TABLE.values():
        fewest, most = row.fds
        expected.append(
            (
                row.request.name,
                str(fewest) if fewest == most else f"{fewest}-{most}",
                f"{row.feature.name} {row.gate.name.lower()}" if row.feature else "",
                "" if row.ring is Ring.NONE else row.ring.name.lower(),
            )
        )
    assert documented == expected


def test_every_other_message_is_in_the_table_of_refused_ones() -> None:
    documented = [row["message"] for row in table(read("docs/vhost-user.md"), "Refused messages")]
    assert documented == [request.name for request in Request if request not in FRONTEND_TABLE]


def test_numbers_in_the_text_are_those_of_the_code() -> None:
    text = read("docs/vhost-user.md")
    assert f"Up to {MAX_MEM_SLOTS} regions; SET_MEM_TABLE can carry {MAX_TABLE_REGIONS}." in text
    assert f"in the {CONFIG_SIZE} bytes of the configuration space" in text
    assert f"a payload of more than {MAX_PAYLOAD} bytes" in text


# ---------------------------------------------------------------- virtio-blk.md


class FakeBackend(BlockBackend):
    """As much of a backend as the device asks when it decides what to offer."""

    def __init__(self, *, writable: bool, discards: bool) -> None:
        self.writable = writable
        self.write_cache = True
        self._discards = discards

    @property
    def can_discard(self) -> bool:
        return self._discards

    @property
    def block_sizes(self) -> BlockSizes:
        return BlockSizes(512, 4096, 4096, 0)


def offered(*, writable: bool, discards: bool) -> int:
    device = BlkDevice(
        FakeBackend(writable=writable, discards=discards),
        serial="",
        num_queues=1,
        max_segments=1,
        logical_block_size=None,
        errors=ErrorLog(logging.LoggerAdapter(logging.getLogger(__name__), {})),
    )
    return device.offered_features


def test_features_are_offered_when_the_table_says_so() -> None:
    rows = {row["feature"]: row["offered"] for row in table(read("docs/virtio-blk.md"), "Features")}
    not_virtios = Feature.VHOST_USER_F_PROTOCOL_FEATURES | Feature.VHOST_F_LOG_ALL
    assert list(rows) == [f.name for f in Feature if not f & not_virtios]
    for writable, discards in ((True, True), (True, False), (False, False)):
        conditions = {
            "always": True,
            "never": False,
            "read-only": not writable,
            "writable": writable,
            "writable, and discards reach the storage": writable and discards,
        }
        expected = 0
        for name, when in rows.items():
            if when.startswith(("always", "never")):
                when = when[:6].rstrip(":,")
            expected |= Feature[name] if conditions[when] else 0
        assert offered(writable=writable, discards=discards) == expected


def test_configuration_space_has_the_fields_of_the_table() -> None:
    rows = table(read("docs/virtio-blk.md"), "Configuration space")
    assert [row["field"] for row in rows] == [field.name for field in dataclasses.fields(BlkConfig)]
    value = {row["field"]: row["value"] for row in rows}
    set_by_us = re.findall(r"(\w+)=", inspect.getsource(BlkDevice.config))
    assert {name for name, text in value.items() if text != "0"} == set(set_by_us)
    assert value["seg_max"] == str(SEG_MAX)
    assert value["num_queues"] == str(DEFAULT_QUEUES)
    segments = f"{export_options.DEFAULT_SEGMENTS} or {export_options.QEMU_SEGMENTS}"
    assert value["max_discard_seg"] == value["max_write_zeroes_seg"] == segments
    assert f"{CONFIG_SIZE} bytes" in read("docs/virtio-blk.md")


def test_requests_are_served_as_the_table_says() -> None:
    rows = table(read("docs/virtio-blk.md"), "Requests")
    assert [row["type"] for row in rows] == [kind.name for kind in RequestType]
    served = {row["type"] for row in rows if row["served"] == "yes"}
    assert served == {RequestType(kind).name for kind in blk_request._IMPLEMENTED}


# ---------------------------------------------------------------- limits.md


def _c_constant(header: str, name: str) -> int:
    source = read(f"vhostblk/native/src/{header}")
    found = re.search(rf"^#define {name} (\d+)", source, re.MULTILINE)
    assert found is not None
    return int(found[1])


LIMITS: dict[str, int] = {
    "front-ends for each export at a time": 1,
    "queues of an export": MAX_QUEUES,
    "entries of a queue": MAX_RING_SIZE,
    "requests of a queue at a time": _c_constant("queue.h", "QUEUE_REQUESTS"),
    "queues of an engine thread": _c_constant("message_ring.h", "MESSAGE_RING_SIZE") // 4,
    "engine threads of exports that name no iothread": MAX_OWN_THREADS,
    "bounce buffers of a disk at a time, of 1 MiB": MAX_BOUNCING,
    "memory regions": MAX_MEM_SLOTS,
    "memory regions of all front-ends together": _c_constant("sigbus.c", "GUARD_SLOTS"),
    "data segments of a request (seg_max)": SEG_MAX,
    "ranges of a discard or write-zeroes request": export_options._MAX_SEGMENTS,
    "bytes of the serial number": ID_BYTES,
    "bytes of a vhost-user message's payload": MAX_PAYLOAD,
    "entries of an engine thread's extent map for one disk": inspect.signature(native.Disk.__init__)
    .parameters["max_extents"]
    .default,
    "bytes of the largest request of the block layer": MAX_REQUEST,
}


def test_limits_are_those_of_the_code() -> None:
    rows = {row["limit"]: int(row["value"]) for row in table(read("docs/limits.md"), "Numbers")}
    assert rows == LIMITS
    assert ExportConfig("", "").max_segments == export_options.DEFAULT_SEGMENTS


def test_formats_that_serve_refuses_are_in_its_manual_page() -> None:
    page = read("docs/man/vhostblk-serve.1")
    # Those that say it in their first bytes.
    assert f"({', '.join(sorted({'luks', 'qcow2', *NAMES} - {'dmg'}))})" in page


# ---------------------------------------------------------------- hostile.md


@pytest.mark.parametrize("document", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_every_test_that_is_named_exists(document: Path) -> None:
    named = re.findall(r"`(\w+\.(?:py|c))::(\w+)`", document.read_text())
    assert len(named) > 40 or document.name != "hostile.md"
    missing = [f"{file}::{test}" for file, test in named if not _exists(file, test)]
    assert missing == []


def test_every_row_names_a_test() -> None:
    for heading in ("Rings", "Requests", "Messages", "Memory, fds, connections", "The host's side"):
        for row in table(read("docs/hostile.md"), heading):
            assert "::" in row["shown by"], row["case"]


def _exists(file: str, test: str) -> bool:
    pattern = rf"^TEST\({test}\)$" if file.endswith(".c") else rf"^(?:async )?def {test}\("
    return any(
        re.search(pattern, path.read_text(), re.MULTILINE) for path in (ROOT / "tests").rglob(file)
    )


# ---------------------------------------------------------------- links


@pytest.mark.parametrize(
    "document", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target


# ---------------------------------------------------------------- check.md


def test_areas_have_as_many_checks_as_the_table_says() -> None:
    rows = table(read("docs/check.md"), "Areas")
    documented = {row["area"]: int(row["checks"]) for row in rows}
    assert documented == Counter(check.area for check in ALL_CHECKS)


def test_transcripts_show_lines_of_checks_that_exist() -> None:
    known = {check.id: check for check in ALL_CHECKS}
    shown = re.findall(r"^(?:FAIL|warn)  (\S+) +(.*?)  \[(.*?)\]  ", read("docs/check.md"), re.M)
    assert len(shown) == 17
    for name, title, spec in shown:
        assert (title, spec) == (known[name].title, known[name].spec), name
