"""Checks of the session: features, protocol features, acknowledgements, messages nobody knows.

vhost-user, "Communication", "Protocol features", "REPLY_ACK"; VIRTIO 1.2 §2.2 and §6.
"""

from __future__ import annotations

import struct

from vhostblk.client.client import FEATURES
from vhostblk.client.conformance.check import Check, Level, check, collect, expect
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.control import PROTOCOL_FEATURES, Control
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.message import U64, Message, MessageFlag, ProtocolFeature, Request, VringState
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.features import Feature, feature_names

__all__ = ["CHECKS"]

_P, _F = ProtocolFeature, Feature
_UNKNOWN = 9999
_ASK = MessageFlag.VERSION | MessageFlag.NEED_REPLY


@check(
    "session.version-1",
    "VIRTIO_F_VERSION_1 and protocol features are offered",
    "VIRTIO 1.2 §6.2; vhost-user, Feature negotiation",
)
def version_1(rig: Rig) -> None:
    wanted = int(_F.VIRTIO_F_VERSION_1 | _F.VHOST_USER_F_PROTOCOL_FEATURES)
    missing = wanted & ~rig.offer.features
    expect(not missing, f"{feature_names(missing)} not offered")


@check(
    "session.features-again",
    "GET_FEATURES and GET_PROTOCOL_FEATURES answer the same twice",
    "vhost-user, Front-end message types",
)
def features_again(rig: Rig) -> None:
    control = rig.control()
    try:
        features = control.negotiate_protocol()
        expect(features == rig.offer.features, f"{features:#x}, before {rig.offer.features:#x}")
        control.ask(control.frontend.get_features())
        control.ask(control.frontend.get_protocol_features())
        again = control.frontend.features_offered
        expect(again == features, f"{again:#x}, before {features:#x}")
        protocol = control.frontend.protocol_offered
        before = rig.offer.protocol_features
        expect(protocol == before, f"{protocol:#x}, before {before:#x}")
    finally:
        control.close()


@check(
    "session.feature-dependencies",
    "no feature is offered without those it needs",
    "VIRTIO 1.2 §2.2.2, §5.2.5.2",
)
def feature_dependencies(rig: Rig) -> None:
    offered = rig.offer.features
    needs = (
        (_F.VIRTIO_BLK_F_CONFIG_WCE, _F.VIRTIO_BLK_F_FLUSH),
        (_F.VIRTIO_F_NOTIF_CONFIG_DATA, _F.VIRTIO_F_NOTIFICATION_DATA),
    )
    for feature, needed in needs:
        expect(
            not offered & feature or offered & needed,
            f"{feature_names(feature)} is offered, {feature_names(needed)} is not",
        )
    protocol = rig.offer.protocol_features
    expect(
        not offered & _F.VIRTIO_BLK_F_MQ or protocol & _P.MQ,
        "VIRTIO_BLK_F_MQ is offered, the protocol's MQ is not",
    )


@check(
    "session.flush-offered",
    "FLUSH is offered, so that a guest can make data safe",
    "VIRTIO 1.2 §5.2.5.2",
    level=Level.SHOULD,
)
def flush_offered(rig: Rig) -> None:
    expect(rig.offer.features & _F.VIRTIO_BLK_F_FLUSH, "not offered")


@check(
    "session.reply-header",
    "replies have version 1, the reply flag, and the request's number",
    "vhost-user, Header",
)
def reply_header(rig: Rig) -> None:
    control = rig.control()
    try:
        for request in (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES):
            control.send_raw(request)
            reply = control.receive()
            expect(
                reply.request == request, f"{request.name}: request {reply.request} in the reply"
            )
            wanted = MessageFlag.VERSION | MessageFlag.REPLY
            expect(reply.flags & 7 == wanted, f"{request.name}: flags {reply.flags:#x}")
            expect(len(reply.payload.pack()) == 8, f"{request.name}: payload is not 8 bytes")
    finally:
        control.close()


@check(
    "session.messages-at-once",
    "messages sent together are answered one by one, in order",
    "vhost-user, Communication",
)
def messages_at_once(rig: Rig) -> None:
    control = rig.control()
    try:
        order = (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_FEATURES)
        data = b"".join(Message(request).encode() for request in order)
        control.connection.send_bytes(data)
        came = [control.receive().request for _ in order]
        expect(came == list(order), f"answers to {came}")
    finally:
        control.close()


@check(
    "session.byte-by-byte",
    "a message that comes byte by byte is served",
    "vhost-user, Communication (a stream socket)",
    level=Level.SHOULD,
)
def byte_by_byte(rig: Rig) -> None:
    control = rig.control()
    try:
        for byte in Message(Request.GET_FEATURES).encode():
            control.connection.send_bytes(bytes([byte]))
        expect(control.receive().request == Request.GET_FEATURES, "another answer")
    finally:
        control.close()


@check(
    "session.minimal",
    "a driver that takes VIRTIO_F_VERSION_1 and nothing else is served",
    "VIRTIO 1.2 §2.2.2",
    protocol=_P.CONFIG,
)
def minimal(rig: Rig) -> None:
    features = _F.VIRTIO_F_VERSION_1 | _F.VHOST_USER_F_PROTOCOL_FEATURES
    with rig.guest(features=features, protocol_features=_P.CONFIG) as guest:
        guest.read(0, rig.block)


@check(
    "session.without-protocol-features",
    "rings are enabled from the start where protocol features were not acknowledged",
    "vhost-user, Ring states",
)
def without_protocol_features(rig: Rig) -> None:
    features = FEATURES & ~_F.VHOST_USER_F_PROTOCOL_FEATURES
    with rig.guest(features=features, protocol_features=_P.NONE) as guest:
        guest.read(0, rig.block)


@check(
    "session.each-feature-left-out",
    "every feature of the ring and the device may be left out",
    "VIRTIO 1.2 §2.2.2",
)
def each_feature_left_out(rig: Rig) -> str:
    left = [
        1 << bit
        for bit in range(64)
        if rig.offer.features & int(FEATURES) & 1 << bit
        and 1 << bit not in (_F.VIRTIO_F_VERSION_1, _F.VHOST_USER_F_PROTOCOL_FEATURES)
    ]
    for feature in left:
        # What is needed by another feature is left out together with it.
        also = _F.VIRTIO_BLK_F_CONFIG_WCE if feature == _F.VIRTIO_BLK_F_FLUSH else 0
        try:
            with rig.guest(without=feature | also) as guest:
                guest.read(0, rig.block)
        except (PeerError, TimeoutError) as error:
            raise PeerError(f"without {feature_names(feature)}: {error}") from error
    return f"{len(left)} features"


@check(
    "session.set-features-again",
    "SET_FEATURES may come again before a ring starts",
    "vhost-user, Front-end message types",
)
def set_features_again(rig: Rig) -> None:
    with rig.guest(queues=0) as guest:
        client = guest.client
        agreed = client.control.features
        for features in (agreed, agreed & ~_F.VIRTIO_F_EVENT_IDX, agreed):
            client.control.set_features(features)
        client.make_queues(1, 64)
        client.start_queue(0)
        guest.read(0, rig.block)


@check(
    "session.features-not-offered",
    "SET_FEATURES with a bit that was not offered is refused",
    "VIRTIO 1.2 §2.2.2",
    level=Level.SHOULD,
)
def features_not_offered(rig: Rig) -> str | None:
    bit = next(1 << n for n in (63, 62, 61, 60) if not rig.offer.features & 1 << n)
    with rig.guest(queues=0) as guest:
        return _refused(guest, guest.control.frontend.set_features(guest.control.features | bit))


@check(
    "session.reply-ack",
    "every request is acknowledged when it asks for it",
    "vhost-user, VHOST_USER_PROTOCOL_F_REPLY_ACK",
    protocol=_P.REPLY_ACK,
)
def reply_ack(rig: Rig) -> str:
    with rig.guest(queues=0) as guest:
        client, frontend = guest.client, guest.control.frontend
        client.make_queues(1, 64)
        driver, queue = client.queues[0].driver, client.queues[0]
        memory = client.memory
        region = memory.regions[0]
        desc, avail, used = (
            memory.uva(driver.gpa + offset)
            for offset in (driver.desc_offset, driver.avail_offset, driver.used_offset)
        )
        messages = [
            frontend.request(Request.SET_OWNER),
            frontend.set_features(guest.control.features),
            frontend.set_mem_table([region.description], [region.fd]),
            frontend.set_vring_num(0, driver.size),
            frontend.set_vring_base(0, 0),
            frontend.set_vring_addr(0, desc=desc, avail=avail, used=used),
            frontend.set_vring_fd(0, VringFd.ERR, queue.err_fd),
            frontend.set_vring_fd(0, VringFd.CALL, queue.call_fd),
            frontend.set_vring_fd(0, VringFd.KICK, queue.kick_fd),
            frontend.set_vring_enable(0, True),
        ]
        # They were all made, and expect their answers; now each is sent when the one before was answered.
        for message in messages:
            guest.control.connection.send(message)
            _answered(guest.control, message)
        guest.read(0, rig.block)
        return f"{len(messages)} kinds of requests"


def _answered(control: Control, message: Message) -> None:
    try:
        control.frontend.receive(control.receive())
    except TimeoutError:
        raise PeerError(f"{message.name()} was not acknowledged") from None


@check(
    "session.no-reply-unasked",
    "what does not ask for an acknowledgement gets none",
    "vhost-user, VHOST_USER_PROTOCOL_F_REPLY_ACK",
    protocol=_P.REPLY_ACK,
)
def no_reply_unasked(rig: Rig) -> None:
    with rig.guest(queues=0) as guest:
        control = guest.control
        request = control.frontend.request
        for index in (0, 0):
            control.connection.send(
                request(Request.SET_VRING_NUM, VringState(index, 64), need_reply=False)
            )
        control.connection.send(request(Request.SET_VRING_BASE, VringState(0, 0), need_reply=False))
        control.ask(control.frontend.get_features())


@check(
    "session.no-reply-without-feature",
    "no acknowledgement is sent where REPLY_ACK was not negotiated",
    "vhost-user, VHOST_USER_PROTOCOL_F_REPLY_ACK",
)
def no_reply_without_feature(rig: Rig) -> None:
    with rig.guest(queues=0, protocol_features=PROTOCOL_FEATURES & ~_P.REPLY_ACK) as guest:
        control = guest.control
        control.send_raw(Request.SET_VRING_NUM, struct.pack("=II", 0, 64), flags=_ASK)
        control.ask(control.frontend.get_features())


@check(
    "session.unknown-request",
    "a request that does not exist is refused, or ends the session",
    "vhost-user, VHOST_USER_PROTOCOL_F_REPLY_ACK",
    protocol=_P.REPLY_ACK,
)
def unknown_request(rig: Rig) -> str | None:
    with rig.guest() as guest:
        message = guest.control.frontend.raw(_UNKNOWN, _ASK, bytes(8))
        return _refused(guest, message)


@check(
    "session.protocol-feature-not-negotiated",
    "a request whose protocol feature was not negotiated is not served",
    "vhost-user, Protocol features",
    protocol=_P.CONFIG | _P.REPLY_ACK,
    level=Level.SHOULD,
)
def protocol_feature_not_negotiated(rig: Rig) -> str | None:
    with rig.guest(queues=0, protocol_features=_P.REPLY_ACK) as guest:
        control = guest.control
        control.send_raw(Request.GET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8), flags=_ASK)
        try:
            reply = control.receive()
        except (SessionError, ConnectionError):
            guest.client.abandon()
            return "ended the session"
        data = reply.payload.pack()
        expect(len(data) < 12 + 8, "GET_CONFIG was answered")
        return "refused"


@check(
    "session.backend-channel",
    "SET_BACKEND_REQ_FD is accepted, also a second time",
    "vhost-user, VHOST_USER_SET_BACKEND_REQ_FD",
    protocol=_P.BACKEND_REQ,
)
def backend_channel(rig: Rig) -> None:
    with rig.guest() as guest:
        guest.control.open_channel()
        guest.read(0, rig.block)


@check(
    "session.reset-device",
    "after RESET_DEVICE the device can be set up again, and serves",
    "vhost-user, VHOST_USER_RESET_DEVICE",
    protocol=_P.RESET_DEVICE,
)
def reset_device(rig: Rig) -> None:
    with rig.guest() as guest:
        before = guest.read(0, rig.block)
        guest.client.reset_device()
        guest.client.make_queues(1, 64)
        guest.client.start_queue(0, 0)
        expect(guest.read(0, rig.block) == before, "other data than before")


@check(
    "session.reset-device-in-flight",
    "RESET_DEVICE with requests in flight ends in a device that can be set up again",
    "vhost-user, VHOST_USER_RESET_DEVICE",
    protocol=_P.RESET_DEVICE,
)
def reset_device_in_flight(rig: Rig) -> None:
    with rig.guest() as guest:
        for _ in range(32):
            guest.submit(0, 0, room=rig.block)
        guest.client.reset_device()
        guest.client.make_queues(1, 64)
        guest.client.start_queue(0, 0)
        guest.read(0, rig.block)


def _refused(guest: Guest, message: Message) -> str:
    """Send what must not succeed; an answer that says it did fails the check."""
    control = guest.control
    control.connection.send(message)
    try:
        reply = control.receive()
    except (SessionError, ConnectionError):
        guest.client.abandon()
        return "ended the session"
    guest.client.abandon()
    expect(reply.payload.pack() != U64(0).pack(), f"{message.name()} was acknowledged as done")
    return "refused"


CHECKS: tuple[Check, ...] = collect(globals())
