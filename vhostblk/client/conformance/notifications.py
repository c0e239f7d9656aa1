"""Checks of notifications, both ways: none is lost, and none is sent that was asked not to be.

VIRTIO 1.2 §2.7.7 and §2.7.10. What a device MUST send is waited for as long as for anything else;
that it sends nothing is concluded after a moment.
"""

from __future__ import annotations

import os

from vhostblk.client.conformance.check import Check, Level, check, collect, expect
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.rig import Rig
from vhostblk.virtio.features import Feature
from vhostblk.virtio.split import AVAIL_F_NO_INTERRUPT

__all__ = ["CHECKS"]

_EVENT_IDX = Feature.VIRTIO_F_EVENT_IDX
_CALLS = "VIRTIO 1.2 §2.7.7.2"
_KICKS = "VIRTIO 1.2 §2.7.10.2"


@check("notify.no-call-lost", "a driver that sleeps is woken for every completion", _CALLS)
def no_call_lost(rig: Rig) -> str:
    return _sleep_often(rig, 0)


@check(
    "notify.no-call-lost-flags",
    "without EVENT_IDX, too, a driver that sleeps is woken for every completion",
    _CALLS,
)
def no_call_lost_flags(rig: Rig) -> str:
    return _sleep_often(rig, _EVENT_IDX)


def _sleep_often(rig: Rig, without: int) -> str:
    with rig.guest(without=without) as guest:
        for i in range(300):
            guest.wait_told(guest.identify(1 + i % 3))
        return f"{guest.queue().calls} wake-ups for 300 waits"


@check(
    "notify.event-reached",
    "EVENT_IDX: a call comes when used_event is reached",
    _CALLS,
    features=_EVENT_IDX,
)
def event_reached(rig: Rig) -> None:
    with rig.guest() as guest:
        guest.quiet()
        for ahead in (0, 1, 4, 0):
            _reach_event(guest, ahead)


def _reach_event(guest: Guest, ahead: int) -> None:
    driver = guest.driver()
    driver.write_used_event(driver.used_idx + ahead)
    for _ in range(ahead):
        guest.finish(guest.identify())
    guest.calls()
    # VIRTIO 1.2 §2.7.7.2: this element is placed where used_event points.
    guest.finish(guest.identify())
    expect(guest.wait_call(), f"no call for the element that used_event names, {ahead} ahead")


@check(
    "notify.event-not-reached",
    "EVENT_IDX: no call comes before used_event is reached, and none after it",
    _CALLS,
    features=_EVENT_IDX,
    level=Level.SHOULD,
)
def event_not_reached(rig: Rig) -> None:
    with rig.guest() as guest:
        guest.quiet()
        driver = guest.driver()
        driver.write_used_event(driver.used_idx + 4)
        for number in range(4):
            guest.finish(guest.identify())
            expect(guest.calls() == 0, f"a call for completion {number + 1}, the 5th was asked for")
        guest.finish(guest.identify())
        expect(guest.calls() > 0, "no call for completion 5")
        guest.finish(guest.identify(3))
        expect(guest.calls() == 0, "a call after used_event was passed")


@check(
    "notify.event-in-a-batch",
    "EVENT_IDX: a batch that passes used_event is told of",
    _CALLS,
    features=_EVENT_IDX,
)
def event_in_a_batch(rig: Rig) -> None:
    with rig.guest() as guest:
        guest.quiet()
        for inside in (0, 5, 15):
            guest.driver().write_used_event(guest.driver().used_idx + inside)
            guest.finish(guest.identify(16))
            expect(guest.wait_call(), f"no call for a batch of 16, element {inside} asked for")
            guest.calls()


@check(
    "notify.event-wraps",
    "EVENT_IDX: a call comes for used_event behind the wrap of the indices",
    _CALLS,
    features=_EVENT_IDX,
)
def event_wraps(rig: Rig) -> None:
    with rig.guest() as guest:
        guest.client.stop_queue(0)
        guest.driver().set_indices(65533)
        guest.client.start_queue(0)
        guest.quiet()
        guest.driver().write_used_event(1)
        for _ in range(3):
            guest.finish(guest.identify())
        guest.calls()
        guest.finish(guest.identify())
        expect(guest.wait_call(), "no call for element 1 behind the wrap")


@check(
    "notify.event-ignores-flag",
    "EVENT_IDX: NO_INTERRUPT in avail.flags means nothing",
    _CALLS,
    features=_EVENT_IDX,
)
def event_ignores_flag(rig: Rig) -> None:
    with rig.guest() as guest:
        guest.quiet()
        driver = guest.driver()
        driver.write_avail_flags(AVAIL_F_NO_INTERRUPT)
        driver.write_used_event(driver.used_idx)
        guest.finish(guest.identify())
        expect(guest.wait_call(), "no call")


@check("notify.flag-clear", "without EVENT_IDX every completion is told of", _CALLS)
def flag_clear(rig: Rig) -> None:
    with rig.guest(without=_EVENT_IDX) as guest:
        guest.quiet()
        guest.driver().write_avail_flags(0)
        guest.driver().write_used_event(12345)  # means nothing here
        for number in range(5):
            guest.finish(guest.identify())
            expect(guest.wait_call(), f"no call for completion {number + 1}")
            guest.calls()


@check(
    "notify.flag-set",
    "without EVENT_IDX NO_INTERRUPT in avail.flags suppresses calls",
    _CALLS,
    level=Level.SHOULD,
)
def flag_set(rig: Rig) -> None:
    with rig.guest(without=_EVENT_IDX) as guest:
        guest.quiet()
        guest.driver().write_avail_flags(AVAIL_F_NO_INTERRUPT)
        guest.finish(guest.identify(8))
        expect((count := guest.calls()) == 0, f"{count} calls")
        guest.driver().write_avail_flags(0)
        guest.finish(guest.identify())
        expect(guest.wait_call(), "no call after the flag was cleared")


@check(
    "notify.kick-when-asked",
    "kicks are needed only when avail_event asks for them",
    _KICKS,
    features=_EVENT_IDX,
)
def kick_when_asked(rig: Rig) -> str:
    return _kick_when_asked(rig, 0)


@check(
    "notify.kick-when-asked-flags",
    "without EVENT_IDX kicks are needed only while used.flags does not say NO_NOTIFY",
    _KICKS,
)
def kick_when_asked_flags(rig: Rig) -> str:
    return _kick_when_asked(rig, _EVENT_IDX)


def _kick_when_asked(rig: Rig, without: int) -> str:
    with rig.guest(without=without, queue_size=256) as guest:
        queue = guest.queue()
        batches = 0
        for i in range(300):
            # One after the other, and sometimes the next before the first is done.
            pending = []
            for _ in range(1 + i % 3):
                pending += guest.identify(1 + i % 5, notify=False)
                queue.notify()
                batches += 1
            guest.finish(pending)
        return f"{queue.kicks} kicks for {batches} batches"


@check(
    "notify.idle-asks-for-kick",
    "an idle device asks to be kicked for the very next request",
    _KICKS,
)
def idle_asks_for_kick(rig: Rig) -> None:
    for without in (0, _EVENT_IDX):
        with rig.guest(without=without, queue_size=256) as guest:
            driver = guest.driver()
            for count in (1, 3, 50):
                guest.finish(guest.identify(count))
                driver.kick_needed()  # for what was kicked without asking
                if driver.event_idx:
                    guest.eventually(
                        lambda: guest.avail_event() == driver.avail_idx,  # noqa: B023
                        f"avail_event to name the next request after {count}",
                    )
                else:
                    guest.eventually(lambda: not guest.used_flags() & 1, "NO_NOTIFY to go")
                pending = guest.identify(notify=False)
                driver.publish()
                expect(driver.kick_needed(), "it did not ask")
                guest.queue().kick()
                guest.finish(pending)


@check(
    "notify.needless-kicks",
    "kicks that nobody needs do no harm",
    "vhost-user, VHOST_USER_SET_VRING_KICK",
)
def needless_kicks(rig: Rig) -> None:
    with rig.guest() as guest:
        for _ in range(200):
            guest.queue().kick()
        # Nearly all an eventfd can hold: those above may not have been read yet, and one more comes.
        os.eventfd_write(guest.queue().kick_fd, 2**64 - 1000)
        guest.client.wait(guest.identify())


CHECKS: tuple[Check, ...] = collect(globals())
