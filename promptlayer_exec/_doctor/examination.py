"""The examination: all checks in order, and what they pass on to each other."""

from __future__ import annotations

import asyncio
import secrets
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
from aiohttp import ClientWebSocketResponse

from promptlayer_exec._doctor.exchanges import Exchange, NoResponse, Wire
from promptlayer_exec._doctor.listener import Listener
from promptlayer_exec._doctor.observed_run import CallbackReceiver, ObservedRun
from promptlayer_exec._doctor.report import Finding, Secrets, Verdict, failed, skipped
from promptlayer_exec._settings import Settings


@attrs.frozen(kw_only=True)
class Wishes:
    """What an examination is to look at, beyond the server.

    Args:
        base_url: the server; None: as a session finds it.
        database: the URL of a database; None: none is checked.
        redis: the URL of a Redis server; None: none is checked.
        workflow: the workflow to run once; None: nothing is run, and nothing is paid.
        inputs: the inputs of that run.
        callback_url: where that run's callback goes; None: nowhere.
        callback_port: the port of this machine on which to wait for it; None: it cannot be seen.
        timeout: seconds that the run may take.
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
    """One examination, and what its checks have found for those that follow.

    Args:
        wishes: what to look at.
        resources: what is closed at the end.
        on_started: called with the id of the run, as soon as there is one.
    """

    wishes: Wishes
    resources: AsyncExitStack
    on_started: Callable[[int], object] = lambda _: None
    private: list[str] = attrs.field(init=False, factory=list, repr=False)
    hosts: list[str] = attrs.field(init=False, factory=list)

    settings: Settings = attrs.field(init=False)
    base_url: str = attrs.field(init=False)
    api_key: str = attrs.field(init=False, repr=False)
    proxy: str | None = attrs.field(init=False, default=None, repr=False)
    wire: Wire = attrs.field(init=False)

    # What came of the first request, without the key.
    first_contact: Exchange | NoResponse = attrs.field(init=False)
    listed: Exchange = attrs.field(init=False)
    # The name or id of the workflow to look at, and its id as soon as it is known.
    chosen: str | int | None = attrs.field(init=False, default=None)
    workflow_id: int | None = attrs.field(init=False, default=None)

    suffix: str = attrs.field(init=False, factory=lambda: secrets.token_hex(16))
    token: str = attrs.field(init=False, repr=False)
    channel: str = attrs.field(init=False)
    socket: ClientWebSocketResponse = attrs.field(init=False)
    listener: Listener | None = attrs.field(init=False, default=None)
    receiver: CallbackReceiver | None = attrs.field(init=False, default=None)
    run: ObservedRun = attrs.field(init=False)

    def report_secrets(self) -> Secrets:
        # A shorter one is a test's, and may be a word of ordinary texts.
        always = tuple(secret for secret in self.private if len(secret) >= 6)
        return Secrets(always, tuple(self.hosts))


CheckFunction = Callable[[Examination], Awaitable[Finding]]


@attrs.frozen
class Check:
    """One check.

    Args:
        group: under which heading it is reported.
        name: its name, unique within all checks.
        look: finds something; what it raises is a failure of the check itself.
        needs: the names of the earlier checks whose result it uses.
    """

    group: str
    name: str
    look: CheckFunction
    needs: tuple[str, ...] = ()


async def examine(
    examination: Examination, checks: tuple[Check, ...]
) -> AsyncGenerator[Finding, None]:
    """Yield the finding of each check, in order."""
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
        return failed(f"could not reach the server: {error}", "Try again; check the network.")
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - the other checks are still of use
        # Its text may have anything in it; where it was raised is enough to find out.
        place = traceback.extract_tb(error.__traceback__)[-1]
        raised = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
        return failed(f"the check itself broke: {raised}", "Please report this bug.")
