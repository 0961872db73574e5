"""Requests are checked before they use up a key, and encoded where nobody waits for it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import pytest

from promptlayer_exec import InvalidInputs, Session, StartRequest
from promptlayer_exec.dbos import Batch
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

GOOD = StartRequest("typed", {"topic": "otters"}, key="a")
MISSPELT = StartRequest("typed", {"topik": "otters"}, key="b")


@pytest.fixture
def checking(sim: Simulator, batch_of: Callable[..., Batch]) -> Callable[..., Batch]:
    """Return a function that makes a batch whose session checks inputs."""
    scenario = Scenario([SimNode("Answer", 1, is_output_node=True)])
    sim.add_workflow("typed", scenario, inputs={"topic": "string"})
    return partial(batch_of, check_inputs=True)


async def test_a_misspelt_input_is_found_before_anything_is_added(
    sim: Simulator, checking: Callable[..., Batch]
) -> None:
    """The key is not used up: the corrected request can have it."""
    batch = checking()
    with pytest.raises(
        InvalidInputs, match=r"item 'b': .*'topik' \(did you mean 'topic'"
    ) as caught:
        await batch.add([GOOD, MISSPELT])
    assert caught.value.missing == ("topic",)
    assert (await batch.status()).total == 0
    assert await batch.add([GOOD, StartRequest("typed", {"topic": "newts"}, key="b")]) == 2


async def test_a_definition_is_read_once_for_many_items(
    sim: Simulator, checking: Callable[..., Batch]
) -> None:
    """However many there are, and with however different values."""
    batch = checking()
    await batch.add(StartRequest("typed", {"topic": f"{n}"}, key=f"{n}") for n in range(50))
    assert sim.request_count == 1


async def test_items_that_are_there_are_not_checked_again(
    sim: Simulator, batch_of: Callable[..., Batch], checking: Callable[..., Batch]
) -> None:
    """Their workflow may require more by now, and a batch must be able to go on."""
    await batch_of().add([MISSPELT])
    assert await checking().add([MISSPELT]) == 0
    assert sim.request_count == 0


async def test_what_comes_asynchronously_is_checked_as_it_comes(
    checking: Callable[..., Batch],
) -> None:
    """A portion with a misspelt input is not added."""

    async def requests() -> AsyncIterator[StartRequest]:
        yield GOOD
        yield MISSPELT

    with pytest.raises(InvalidInputs, match="item 'b'"):
        await checking().add(requests())
    assert (await checking().status()).total == 0


@pytest.mark.parametrize("settings", [{"check_inputs": False}, {"api_key": ""}], ids=repr)
async def test_without_a_check_nothing_is_asked(
    sim: Simulator,
    checking: Callable[..., Batch],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Items can be added without a key, too."""
    monkeypatch.delenv("PROMPTLAYER_API_KEY", raising=False)
    if "api_key" in settings:
        settings = {"session": partial(Session, base_url=sim.base_url)}
    assert await checking(**settings).add([MISSPELT]) == 1
    assert sim.request_count == 0


async def test_a_definition_that_cannot_be_read_stops_nobody(
    sim: Simulator, checking: Callable[..., Batch]
) -> None:
    """The inputs are checked when the item is started."""
    sim.inject(Fault.status(503))
    assert await checking().add([MISSPELT]) == 1
    assert (await checking().work()).failed == 1


async def test_adding_uses_the_session_that_works(
    sim: Simulator, checking: Callable[..., Batch], open_session: Callable[..., Session]
) -> None:
    """And leaves it open."""
    session = open_session(check_inputs=True)
    batch = checking(session=session)
    assert await batch.add([GOOD]) == 1
    assert (await batch.work()).succeeded == 1
    assert (await session.definition("typed")).name == "typed"


async def test_requests_are_encoded_outside_the_event_loop(batch: Batch) -> None:
    """A few at a time: what is long for a thousand is short for each."""
    loop_thread = threading.get_ident()
    threads: list[int] = []

    class Inputs(dict[str, Any]):
        def items(self) -> Any:
            threads.append(threading.get_ident())
            return super().items()

    taken: list[int] = []

    def requests() -> Iterator[StartRequest]:
        for n in range(100):
            taken.append(len(threads))
            yield StartRequest("echo", Inputs(n=n), key=f"{n}")

    assert await batch.add(requests()) == 100
    assert threads
    assert loop_thread not in threads
    assert taken[-1] > 50  # most were encoded before the last was asked for
