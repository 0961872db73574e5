"""Events, and how they reach observers."""

import logging
import pickle

import attrs
import pytest

from promptlayer_exec._values.events import (
    CallEnded,
    CallStarted,
    Event,
    ExecutionStarted,
    Polled,
    RequestRetried,
    StartFailed,
    Throttled,
    WatchEnded,
    WatchStarted,
    WatchWoken,
    broadcast,
    logger,
)
from promptlayer_exec._values.models import Node, Snapshot, StartRequest

EVENTS = [
    WatchStarted(787),
    Polled(787, Snapshot(787, False, {"a": Node("a", "QUEUED")}), 0.1, 0.0, 12),
    RequestRetried(787, TimeoutError("slow"), 0.5),
    Throttled(None, 2.0),
    WatchEnded(787, 3, 1.5, None),
    WatchWoken(787, "push"),
    CallStarted(None, "a/b", "order-42"),
    CallEnded(787, "a/b", "order-42", 1.5, TimeoutError("slow")),
    ExecutionStarted(787, StartRequest("a/b"), abandoned=True),
    StartFailed(None, StartRequest("a/b"), TimeoutError("slow")),
]
each_event = pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)


def test_an_exception_of_an_observer_is_logged(caplog):
    """It is logged with its traceback, and the other observers get the event."""
    received = []

    def broken(event):
        raise KeyError("oops")

    emit = broadcast([received.append, broken, received.append])
    with caplog.at_level(logging.DEBUG, "promptlayer_exec"):
        emit(EVENTS[0])
        emit(EVENTS[1])
    assert received == [EVENTS[0], EVENTS[0], EVENTS[1], EVENTS[1]]
    assert [(record.name, record.levelname) for record in caplog.records] == [
        ("promptlayer_exec", "ERROR"),
        ("promptlayer_exec", "ERROR"),
    ]
    assert "broken" in caplog.records[0].getMessage()
    assert "WatchStarted" in caplog.records[0].getMessage()
    assert caplog.records[0].exc_info[0] is KeyError


@each_event
def test_events_are_frozen(event):
    """An event is frozen, has slots, is an Event, and has the execution id as first field."""
    assert isinstance(event, Event)
    assert attrs.fields(type(event))[0].name == "execution_id"
    assert not hasattr(event, "__dict__")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.execution_id = 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.extra = 1


@each_event
def test_events_pickle(event):
    """An event pickles, so that an observer can send it to another process."""
    other = pickle.loads(pickle.dumps(event))
    assert type(other) is type(event)
    assert repr(other) == repr(event)


def test_every_event_is_tested():
    """Each event class of the package is in the list here."""
    assert {type(event) for event in EVENTS} == {
        cls for cls in Event.__subclasses__() if cls.__module__.startswith("promptlayer_exec")
    }


def test_the_logger_is_the_application_s_to_configure():
    """It is called `promptlayer_exec`, and has no handler and no level of its own."""
    assert logger is logging.getLogger("promptlayer_exec")
    assert logger.handlers == []
    assert logger.level == logging.NOTSET
