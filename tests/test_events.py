"""Events, and how observers are told."""

import logging
import pickle

import attrs
import pytest

from promptlayer_exec._events import (
    Event,
    ExecutionStarted,
    Polled,
    RequestRetried,
    Throttled,
    WatchEnded,
    WatchStarted,
    broadcast,
    logger,
)
from promptlayer_exec._models import Node, Snapshot, StartRequest

EVENTS = [
    WatchStarted(787),
    Polled(787, Snapshot(787, False, {"a": Node("a", "QUEUED")}), 0.1, 0.0, 12),
    RequestRetried(787, TimeoutError("slow"), 0.5),
    Throttled(None, 2.0),
    WatchEnded(787, 3, 1.5, None),
    ExecutionStarted(787, StartRequest("a/b"), abandoned=True),
]
each_event = pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)


def test_every_observer_hears_every_event_in_order():
    """Each observer is told of each event, in the order of observers and events."""
    heard = []
    emit = broadcast(
        [lambda event: heard.append((1, event)), lambda event: heard.append((2, event))]
    )
    emit(EVENTS[0])
    emit(EVENTS[1])
    assert heard == [(1, EVENTS[0]), (2, EVENTS[0]), (1, EVENTS[1]), (2, EVENTS[1])]


def test_a_raising_observer_is_logged_and_the_others_hear(caplog):
    """What an observer raises is logged with its traceback, and reaches nobody else."""
    heard = []

    def broken(event):
        raise KeyError("oops")

    emit = broadcast([heard.append, broken, heard.append])
    with caplog.at_level(logging.DEBUG, "promptlayer_exec"):
        emit(EVENTS[0])
        emit(EVENTS[1])
    assert heard == [EVENTS[0], EVENTS[0], EVENTS[1], EVENTS[1]]
    assert [(record.name, record.levelname) for record in caplog.records] == [
        ("promptlayer_exec", "ERROR"),
        ("promptlayer_exec", "ERROR"),
    ]
    assert "broken" in caplog.records[0].getMessage()
    assert "WatchStarted" in caplog.records[0].getMessage()
    assert caplog.records[0].exc_info[0] is KeyError


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_swallowed(exception):
    """What is no error, such as Ctrl-C, passes through."""

    def interrupted(event):
        raise exception

    with pytest.raises(exception):
        broadcast([interrupted])(EVENTS[0])


def test_without_observers_nothing_happens(caplog):
    """An event that nobody listens to is no matter."""
    broadcast([])(EVENTS[0])
    assert not caplog.records


def test_observers_are_taken_at_once():
    """Observers may come from an iterator, and a list that grows later changes nothing."""
    heard = []
    observers = [heard.append]
    emit = broadcast(observers)
    observers.append(heard.append)
    emit(EVENTS[0])
    broadcast(iter([heard.append]))(EVENTS[1])
    assert heard == EVENTS[:2]


@each_event
def test_events_are_frozen(event):
    """An event is frozen, has slots, is an Event, and names its execution first."""
    assert isinstance(event, Event)
    assert attrs.fields(type(event))[0].name == "execution_id"
    assert not hasattr(event, "__dict__")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.execution_id = 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.extra = 1


@each_event
def test_events_pickle(event):
    """An event pickles, so that an observer can send it elsewhere."""
    twin = pickle.loads(pickle.dumps(event))
    assert type(twin) is type(event)
    assert repr(twin) == repr(event)


def test_no_event_is_forgotten():
    """Every event of the package is in the list here."""
    assert {type(event) for event in EVENTS} == {
        cls for cls in Event.__subclasses__() if cls.__module__.startswith("promptlayer_exec")
    }


def test_fields():
    """Events carry what the contract names."""
    names = {type(event).__name__: attrs.fields(type(event))[1:] for event in EVENTS}
    assert {name: [field.name for field in fields] for name, fields in names.items()} == {
        "WatchStarted": [],
        "Polled": ["snapshot", "duration", "lateness", "body_bytes"],
        "RequestRetried": ["error", "delay"],
        "Throttled": ["delay"],
        "WatchEnded": ["polls", "elapsed", "error"],
        "ExecutionStarted": ["request", "abandoned", "duration"],
    }


def test_the_logger_is_quiet_by_default():
    """The logger is `promptlayer_exec` and prints nothing unless the user wants it."""
    assert logger.name == "promptlayer_exec"
    assert any(isinstance(handler, logging.NullHandler) for handler in logger.handlers)
    assert logger.level == logging.NOTSET
