"""What a session remembers from one opening to the next."""

from __future__ import annotations

from functools import partial

import attrs

from promptlayer_exec._api.runs import NodeMapReader
from promptlayer_exec._engine.callbacks import CallbackLog
from promptlayer_exec._engine.expiring import ExpiringDict
from promptlayer_exec._engine.retry import RecentRuns
from promptlayer_exec._values.events import Emit, WakeSource
from promptlayer_exec._values.policies import RetryPolicy


@attrs.frozen(kw_only=True)
class Memory:
    """What outlives a client, so that a session which closes and reopens forgets nothing."""

    recent_runs: RecentRuns
    callbacks: CallbackLog
    node_maps: NodeMapReader = attrs.field(factory=NodeMapReader)
    # For executions that nobody follows yet. Each is kept for ten minutes.
    early_wake_ups: ExpiringDict[int, WakeSource] = attrs.field(
        factory=partial(ExpiringDict, 600.0)
    )

    @classmethod
    def empty(cls, retry: RetryPolicy, emit: Emit) -> Memory:
        recent_runs = RecentRuns(retry.not_found_grace)
        return cls(recent_runs=recent_runs, callbacks=CallbackLog(emit, recent_runs))
