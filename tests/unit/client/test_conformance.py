"""The registry of checks and the runner that judges them, without a back-end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vhostblk.client.conformance.check import (
    Check,
    CheckFailedError,
    Level,
    check,
    collect,
    expect,
    skip,
)
from vhostblk.client.conformance.offer import Offer, read_offer
from vhostblk.client.conformance.registry import ALL_CHECKS
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.conformance.runner import (
    Outcome,
    Result,
    reason_to_skip,
    run_checks,
    select,
)
from vhostblk.errors import SessionError
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.virtio.blk import BlkConfig
from vhostblk.virtio.features import Feature

FOLDER = Path(__file__).resolve().parents[3] / "vhostblk" / "client" / "conformance"


class AliveRig(Rig):
    """Whose back-end serves as long as it is said to."""

    alive = True
    looked = 0

    def still_serves(self) -> None:
        self.looked += 1
        if not self.alive:
            raise SessionError("nobody there")


def rig(offer: Offer | None = None, **options: Any) -> AliveRig:
    offer = offer or Offer(0, config=BlkConfig(capacity=1 << 20))
    return AliveRig("/nowhere", offer, **options)


def make(name: str = "area.name", **columns: Any) -> Check:
    return check(name, "title", "spec", **columns)(lambda rig: None)


# ---------------------------------------------------------------- the registry


def test_every_check_has_an_id_of_its_own_a_title_and_a_section() -> None:
    ids = [row.id for row in ALL_CHECKS]
    assert len(set(ids)) == len(ids)
    for row in ALL_CHECKS:
        assert re.fullmatch(r"[a-z-]+\.[a-z0-9-]+", row.id), row.id
        assert row.title
        assert re.match(r"VIRTIO 1\.2 §\d|vhost-user, ", row.spec), row.spec
        assert len(row.title) < 100


def test_every_module_of_checks_is_in_the_registry() -> None:
    others = {"check", "guest", "offer", "registry", "rig", "runner", "__init__"}
    modules = {path.stem for path in FOLDER.glob("*.py")} - others
    registry = (FOLDER / "registry.py").read_text()
    assert modules == set(re.findall(r"\*(\w+)\.CHECKS", registry))


def test_hostile_checks_are_the_last() -> None:
    hostile = [row.hostile for row in ALL_CHECKS]
    assert hostile == sorted(hostile)
    assert {row.area for row in ALL_CHECKS if row.hostile} == {"guest", "front-end"}


def test_every_area_that_was_promised_is_there() -> None:
    areas = {row.area for row in ALL_CHECKS}
    assert areas >= {"session", "config", "request", "write", "discard", "zeroes", "framing"}
    assert areas >= {"indirect", "ring", "notify", "state", "memory", "queues", "reconnect"}


def test_checks_that_change_the_disk_say_so() -> None:
    for row in ALL_CHECKS:
        if row.area in ("write", "discard", "zeroes"):
            assert row.writes, row.id


def test_collect_keeps_the_order_of_definition() -> None:
    a, b = make("area.b"), make("area.a")
    assert collect({"x": a, "other": 5, "y": b}) == (a, b)


# ---------------------------------------------------------------- what is run


@pytest.mark.parametrize(
    ("only", "skipped", "left"),
    [
        ([], [], ["a.one", "a.two", "b.one"]),
        (["a"], [], ["a.one", "a.two"]),
        (["*.one"], [], ["a.one", "b.one"]),
        (["a", "b.*"], ["*.two"], ["a.one", "b.one"]),
        ([], ["a"], ["b.one"]),
        (["a.o?e"], [], ["a.one"]),
        (["one"], [], []),
    ],
)
def test_patterns_choose_checks(only: list[str], skipped: list[str], left: list[str]) -> None:
    checks = [make(name) for name in ("a.one", "a.two", "b.one")]
    assert [row.id for row in select(checks, only, skipped)] == left


MIB = BlkConfig(capacity=2048)
RO = Feature.VIRTIO_BLK_F_RO


@pytest.mark.parametrize(
    ("columns", "offer", "options", "reason"),
    [
        ({}, Offer(0), {}, None),
        ({"hostile": True}, Offer(0), {}, "only with --hostile"),
        ({"hostile": True}, Offer(0), {"hostile": True}, None),
        ({"writes": True}, Offer(0, config=MIB), {}, "only with --destructive"),
        ({"writes": True}, Offer(0, config=MIB), {"destructive": True}, None),
        ({"writes": True}, Offer(RO, config=MIB), {"destructive": True}, "the disk is read-only"),
        ({"writes": True, "features": RO}, Offer(RO, config=MIB), {"destructive": True}, None),
        (
            {"writes": True},
            Offer(0, config=BlkConfig(capacity=2047)),
            {"destructive": True},
            "the disk has less than 1048576 bytes",
        ),
        (
            {"features": Feature.VIRTIO_BLK_F_FLUSH | RO},
            Offer(RO),
            {},
            "needs FLUSH",
        ),
        ({"without": RO}, Offer(RO), {}, "RO is offered"),
        (
            {"protocol": ProtocolFeature.MQ | ProtocolFeature.CONFIG},
            Offer(0, ProtocolFeature.MQ),
            {},
            "needs CONFIG",
        ),
        ({"queues": 2}, Offer(0), {}, "needs 2 queues"),
        ({"queues": 2}, Offer(0, queues=2), {}, None),
    ],
)
def test_checks_that_cannot_be_run_say_why(
    columns: dict[str, Any], offer: Offer, options: dict[str, bool], reason: str | None
) -> None:
    assert reason_to_skip(make(**columns), rig(offer, **options)) == reason


# ---------------------------------------------------------------- judgement


def run_one(verdict: object, here: AliveRig | None = None, **columns: object) -> Result:
    def body(rig: Rig) -> str | None:
        if isinstance(verdict, BaseException):
            raise verdict
        assert verdict is None or isinstance(verdict, str)
        return verdict

    (result,) = run_checks(here or rig(), [check("a.b", "t", "s", **columns)(body)])
    return result


def test_a_check_that_returns_has_passed() -> None:
    assert (run_one(None).outcome, run_one(None).detail) == (Outcome.OK, "")
    assert run_one("so it is").detail == "so it is"


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (CheckFailedError("not so"), "not so"),
        (SessionError("the back-end\nleft"), "the back-end left"),
        (TimeoutError("timed out"), "TimeoutError: timed out"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_a_check_that_raises_has_failed_whatever_it_raised(error: Exception, detail: str) -> None:
    here = rig()
    result = run_one(error, here)
    assert (result.outcome, result.detail) == (Outcome.FAIL, detail)
    assert here.looked == 1


def test_what_only_should_be_so_is_a_warning() -> None:
    assert run_one(CheckFailedError("no"), level=Level.SHOULD).outcome is Outcome.WARN


def test_a_check_can_find_that_there_is_nothing_to_check() -> None:
    def nothing(rig: Rig) -> None:
        skip("no such thing")

    here = rig()
    (result,) = run_checks(here, [check("a.b", "t", "s")(nothing)])
    assert (result.outcome, result.detail) == (Outcome.SKIP, "no such thing")
    assert here.looked == 0


def test_after_a_hostile_check_the_back_end_must_serve() -> None:
    here = rig(hostile=True)
    assert run_one("endured", here, hostile=True).outcome is Outcome.OK
    assert here.looked == 1
    here.alive = False
    result = run_one("ended the session", here, hostile=True)
    assert result.outcome is Outcome.FAIL
    assert result.is_gone
    assert result.detail == "back end gone: nobody there (after: ended the session)"


@pytest.mark.parametrize("level", Level)
def test_nothing_is_run_after_the_back_end_is_gone(level: Level) -> None:
    here = rig()
    here.alive = False

    def fails(rig: Rig) -> None:
        expect(False, "wrong")

    checks = [make("a.a"), check("a.b", "t", "s", level=level)(fails), make("a.c")]
    results = list(run_checks(here, checks))
    assert [result.outcome for result in results] == [Outcome.OK, Outcome.FAIL]
    assert results[-1].is_gone


# ---------------------------------------------------------------- the offer


def test_fields_are_those_whose_features_are_offered() -> None:
    config = BlkConfig(capacity=8, seg_max=126, blk_size=4096, writeback=1)
    assert Offer(0, config=config).fields() == {"capacity": 8}
    offer = Offer(Feature.VIRTIO_BLK_F_SEG_MAX | Feature.VIRTIO_BLK_F_CONFIG_WCE, config=config)
    assert offer.fields() == {"capacity": 8, "seg_max": 126, "writeback": 1}
    assert offer.block == 512
    assert Offer(Feature.VIRTIO_BLK_F_BLK_SIZE, config=config).block == 4096
    assert offer.capacity == 4096


def test_an_offer_names_what_is_known_and_numbers_what_is_not() -> None:
    offer = Offer(1 << 62 | Feature.VIRTIO_BLK_F_FLUSH, ProtocolFeature.MQ | 1 << 40)
    report = offer.to_json()
    assert report["features"] == ["FLUSH", "bit 62"]
    assert report["protocol_features"] == ["MQ", "bit 40"]


def test_nobody_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_offer(str(tmp_path / "none"), timeout=0.1)
