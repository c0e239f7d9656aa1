"""Waiting for an image that another process is about to let go of."""

from __future__ import annotations

import asyncio
import errno

import pytest

from vhostblk.block.lock_wait import LockWait, StoppedError
from vhostblk.errors import ConfigError


class Taken:
    """Somebody else's for so many attempts."""

    def __init__(self, times: int, error: int = errno.EAGAIN) -> None:
        self.times = times
        self.attempts = 0
        self._error = error

    async def take(self) -> str:
        self.attempts += 1
        if self.attempts <= self.times:
            raise ConfigError("Failed to get a lock", self._error)
        return "ours"


def attempt(image: Taken, seconds: float, *, stop: bool = False) -> str:
    async def wait() -> str:
        event = asyncio.Event()
        if stop:
            event.set()
        return await LockWait(seconds, event).attempt(image.take)

    return asyncio.run(wait())


def test_image_is_taken_as_soon_as_its_user_lets_go() -> None:
    image = Taken(3)
    assert attempt(image, 3600) == "ours"
    assert image.attempts == 4


def test_without_a_timeout_the_refusal_comes_at_once_and_as_it_is() -> None:
    image = Taken(1)
    with pytest.raises(ConfigError, match=r"^Failed to get a lock$"):
        attempt(image, 0)
    assert image.attempts == 1


def test_refusal_says_how_long_was_waited() -> None:
    image = Taken(1_000_000)
    with pytest.raises(ConfigError, match=r"^Failed to get a lock \(waited 0\.02 s for it\)$"):
        attempt(image, 0.02)
    assert image.attempts > 1


def test_what_is_no_lock_is_not_waited_for() -> None:
    image = Taken(1, errno.EACCES)
    with pytest.raises(ConfigError, match=r"^Failed to get a lock$"):
        attempt(image, 3600)
    assert image.attempts == 1


def test_images_share_the_time() -> None:
    async def two() -> None:
        locks = LockWait(0.02, asyncio.Event())
        with pytest.raises(ConfigError):
            await locks.attempt(Taken(1_000_000).take)
        late = Taken(1)
        with pytest.raises(ConfigError):
            await locks.attempt(late.take)
        assert late.attempts == 1

    asyncio.run(two())


def test_wait_ends_when_nobody_wants_the_image_any_more() -> None:
    image = Taken(1_000_000)
    with pytest.raises(StoppedError):
        attempt(image, 3600, stop=True)
    assert image.attempts == 1
