"""The entry point of checks, for nodes that have one and those that have none."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from vhostblk.block.check import CheckResult, check
from vhostblk.block.flags import CheckMode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.no_medium import NoMediumNode
from vhostblk.errors import BlockError


def test_node_that_cannot_be_checked_says_so() -> None:
    async def run() -> None:
        graph = BlockGraph()
        node = await graph.add("null-co,size=1M")
        for target, fix, expected in (
            (NoMediumNode(), 0, errno.ENOMEDIUM),
            (node, 0, errno.ENOTSUP),
            (await graph.add("null-co,size=1M,read-only=on"), 1, errno.EACCES),
        ):
            with pytest.raises(BlockError) as caught:
                await check(target, CheckMode(fix))
            assert caught.value.errno == expected
        assert not node.quiesced
        await graph.close_all()

    asyncio.run(run())


def test_messages_of_a_check_are_bounded() -> None:
    result = CheckResult()
    for number in range(1000):
        result.say(str(number))
    assert len(result.messages) + result.more_messages == 1000
    assert len(result.messages) < 500


@pytest.mark.parametrize("field", ["corruptions", "leaks", "check_errors"])
def test_anything_that_is_left_is_not_clean(field: str) -> None:
    assert CheckResult(corruptions_fixed=3, leaks_fixed=2).is_clean
    left: dict[str, Any] = {field: 1}
    assert not CheckResult(**left).is_clean
