"""Who may call what from where (rows B01 and B27)."""

from __future__ import annotations

import asyncio
import threading

import pytest

from vhostblk.block.graph import BlockGraph
from vhostblk.errors import StateError


def test_changing_the_graph_from_another_loop_fails_loudly() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        await graph.add("null-co,node-name=n")
        found: list[BaseException] = []

        def intruder() -> None:
            try:
                asyncio.run(graph.add("null-co,node-name=m"))
            except StateError as error:
                found.append(error)

        thread = threading.Thread(target=intruder)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert "outside of its control loop" in str(found[0])
        assert list(graph.nodes) == ["n"]
        await graph.close_all()

    asyncio.run(scenario())


def test_sync_call_from_another_thread_runs_on_the_control_loop() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        await graph.add("null-co,node-name=n")
        added = await asyncio.to_thread(
            lambda: graph.control.run_sync(graph.add("null-co,node-name=m"), 10)
        )
        assert graph.find("m") is added
        await graph.close_all()

    asyncio.run(scenario())


def test_sync_call_from_the_control_loop_itself_is_refused_rather_than_waiting_for_ever() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        await graph.add("null-co,node-name=n")
        with pytest.raises(StateError, match="would never end"):
            graph.control.run_sync(graph.add("null-co,node-name=m"))
        await graph.close_all()

    asyncio.run(scenario())


def test_changes_of_the_graph_are_made_one_at_a_time() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        order: list[str] = []

        async def change(name: str) -> None:
            async with graph.changing():
                order.append(f"{name} begins")
                await asyncio.sleep(0)
                order.append(f"{name} ends")

        await asyncio.gather(change("a"), change("b"))
        assert order == ["a begins", "a ends", "b begins", "b ends"]

    asyncio.run(scenario())
