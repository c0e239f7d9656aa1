"""Transcripts: waiting for words with a deadline, and streams that end."""

from __future__ import annotations

import os
import threading
import time

from vhostblk.testing.console import Transcript, pump


def soon() -> float:
    return time.monotonic() + 10


def test_words_that_arrive_in_pieces_are_found() -> None:
    transcript = Transcript()
    found: list[int | None] = []
    waiter = threading.Thread(
        target=lambda: found.append(transcript.wait_for(b"ready", start=0, deadline=soon()))
    )
    waiter.start()
    for byte in b"not yet rea":
        transcript.append(bytes([byte]))
    transcript.append(b"dy, go")
    waiter.join(10)
    assert found == [len("not yet ready")]


def test_words_before_the_start_do_not_count() -> None:
    transcript = Transcript()
    transcript.append(b"ready")
    assert transcript.wait_for(b"ready", start=1, deadline=time.monotonic()) is None
    assert transcript.wait_for(b"ready", start=0, deadline=time.monotonic()) == 5


def test_waiting_ends_when_the_stream_ends() -> None:
    transcript = Transcript()
    ender = threading.Thread(target=transcript.end)
    ender.start()
    began = time.monotonic()
    assert transcript.wait_for(b"never", start=0, deadline=began + 60) is None
    ender.join()
    assert time.monotonic() - began < 30
    assert transcript.ended


def test_waiting_ends_at_the_deadline() -> None:
    assert Transcript().wait_for(b"x", start=0, deadline=time.monotonic() + 0.01) is None


def test_pump_reads_several_streams_until_each_has_ended() -> None:
    pipes = [os.pipe(), os.pipe()]
    transcripts = [Transcript(), Transcript()]
    streams = {pipes[0][0]: transcripts[0], pipes[1][0]: transcripts[1]}
    thread = pump(streams, "test-pump")
    os.write(pipes[0][1], b"first")
    os.close(pipes[0][1])
    assert transcripts[0].wait_for(b"first", start=0, deadline=soon()) == 5
    os.write(pipes[1][1], b"second")
    assert transcripts[1].wait_for(b"second", start=0, deadline=soon()) == 6
    os.close(pipes[1][1])
    thread.join(10)
    assert not thread.is_alive()
    assert all(transcript.ended for transcript in transcripts)
    for read, _ in pipes:
        os.close(read)


def test_text_survives_bytes_that_are_no_utf8() -> None:
    transcript = Transcript()
    transcript.append(b"a\xffb")
    assert transcript.text() == "a\N{REPLACEMENT CHARACTER}b"
    assert transcript.text(2) == "b"
