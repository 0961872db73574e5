"""The examination: all checks in order, and what they pass on to each other."""

from __future__ import annotations

import asyncio
import secrets
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
from aiohttp import ClientWebSocketResponse

from promptlayer_exec._doctor.exchanges import Exchange, NoResponse, Wire
from promptlayer_exec._doctor.listener import Listener
from promptlayer_exec._doctor.observed_run import CallbackReceiver, ObservedRun
from promptlayer_exec._doctor.recorder import Recorder
from promptlayer_exec._doctor.report import Finding, Secrets, Verdict, failed, skipped
from promptlayer_exec._engine.settings import Settings


@attrs.frozen(kw_only=True)
class Scope:
    """What to examine, from the options of the command.

    Args:
        base_url: the server. None: the one that a session would use.
        database: the URL of a database to check, if any.
        redis: the URL of a Redis server to check, if any.
        workflow: the workflow to run once. None: run nothing, so that nobody pays.
        inputs: the inputs of that run.
        callback_url: where PromptLayer posts that run's callback, if anywhere.
        callback_port: the port of this machine on which to wait for it.
        timeout: the longest time to wait for that run, in seconds.
    """

    base_url: str | None = None
    database: str | None = None
    redis: str | None = None
    workflow: str | None = None
    inputs: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    callback_url: str | None = attrs.field(default=None, repr=False)
    callback_port: int | None = None
    timeout: float = 600.0


@attrs.define(eq=False)
class Examination:
    """One examination: its checks leave here what later checks need.

    Args:
        scope: what to examine.
        resources: what the caller closes afterwards.
        on_started: called with the id of the run as soon as it has one.
        recorder: records all requests, if there is one.

    Attributes:
        private: texts that no report may contain.
        hosts: hosts that a report for an issue may not contain.
        first_contact: the response to the first request, which has no key.
        listed: the response with the list of workflows.
        chosen: the name or id of the workflow to look at.
        workflow_id: its id, once it is known.
        required_inputs: the inputs in its definition, if that names any.
        suffix: of the channel to which PromptLayer pushes the run's completion.
        listener: listens to that channel.
        receiver: waits for the callback.
    """

    scope: Scope
    resources: AsyncExitStack
    on_started: Callable[[int], object] = lambda _: None
    recorder: Recorder | None = None
    private: list[str] = attrs.field(init=False, factory=list, repr=False)
    hosts: list[str] = attrs.field(init=False, factory=list)

    settings: Settings = attrs.field(init=False)
    base_url: str = attrs.field(init=False)
    api_key: str = attrs.field(init=False, repr=False)
    proxy: str | None = attrs.field(init=False, default=None, repr=False)
    wire: Wire = attrs.field(init=False)

    first_contact: Exchange | NoResponse = attrs.field(init=False)
    listed: Exchange = attrs.field(init=False)
    chosen: str | int | None = attrs.field(init=False, default=None)
    workflow_id: int | None = attrs.field(init=False, default=None)
    required_inputs: Mapping[str, str] | None = attrs.field(init=False, default=None)

    suffix: str = attrs.field(init=False, factory=lambda: secrets.token_hex(16))
    token: str = attrs.field(init=False, repr=False)
    channel: str = attrs.field(init=False)
    socket: ClientWebSocketResponse = attrs.field(init=False)
    listener: Listener | None = attrs.field(init=False, default=None)
    receiver: CallbackReceiver | None = attrs.field(init=False, default=None)
    run: ObservedRun = attrs.field(init=False)

    def report_secrets(self) -> Secrets:
        # A shorter one is a test's, and may be an ordinary word.
        always = tuple(secret for secret in self.private if len(secret) >= 6)
        return Secrets(always, tuple(self.hosts))

    def save_recording(self, path: Path) -> int:
        """Write what the server has sent so far, and return the number of requests.

        Raises:
            OSError: the file cannot be written.
        """
        recorder = self.recorder or Recorder()
        given = [*self.private, *self.hosts, self.suffix, *_texts_in(self.scope.inputs)]
        given += [text for text in (self.scope.workflow, self.scope.callback_url) if text]
        recorder.save(path, given)
        return recorder.count


def _texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, and the names in its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)


CheckFunction = Callable[[Examination], Awaitable[Finding]]


@attrs.frozen
class Check:
    """One check.

    Args:
        group: the heading above it in the report.
        name: its name, which no other check has.
        look: makes the check.
        needs: the names of earlier checks that must not have failed.
    """

    group: str
    name: str
    look: CheckFunction
    needs: tuple[str, ...] = ()


async def examine(
    examination: Examination, checks: tuple[Check, ...]
) -> AsyncGenerator[Finding, None]:
    """Make all checks in order, and yield what each has found."""
    unmet: set[str] = set()
    for check in checks:
        missing = next((need for need in check.needs if need in unmet), None)
        if missing is not None:
            finding = skipped(f"the check {missing!r} did not pass")
        else:
            finding = await _look(check, examination)

        if finding.verdict in (Verdict.FAILED, Verdict.SKIPPED):
            unmet.add(check.name)
        yield attrs.evolve(finding, group=check.group, name=check.name)


async def _look(check: Check, examination: Examination) -> Finding:
    try:
        return await check.look(examination)
    except NoResponse as error:
        return failed(f"could not reach the server: {error}", "Check the network, and try again.")
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - the other checks are still of use
        # Its text may contain anything. The place is enough to find the bug.
        place = traceback.extract_tb(error.__traceback__)[-1]
        raised = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
        return failed(f"bug in doctor: {raised}", "Please report it.")
