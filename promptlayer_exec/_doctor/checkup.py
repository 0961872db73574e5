"""All checks, in the order in which they are made."""

from __future__ import annotations

from promptlayer_exec._doctor import (
    database_checks,
    network_checks,
    push_checks,
    run_checks,
    setup_checks,
    workflow_checks,
)
from promptlayer_exec._doctor.examination import Check, Examination
from promptlayer_exec._doctor.report import Finding, skipped


async def _no_run(_: Examination) -> Finding:
    return skipped("no --workflow, so doctor starts no run, and you pay nothing")


_READING = (
    Check("Setup", "versions", setup_checks.check_versions),
    Check("Setup", "extras", setup_checks.check_extras),
    Check("Setup", "environment", setup_checks.check_environment),
    Check("Connection", "base URL", network_checks.check_base_url),
    Check("Connection", "proxy", network_checks.check_proxy, ("environment", "base URL")),
    Check("Connection", "name resolution", network_checks.check_name, ("proxy",)),
    Check("Connection", "TLS", network_checks.check_tls, ("name resolution",)),
    Check("Connection", "response", network_checks.check_response, ("name resolution",)),
    Check("API", "API key", workflow_checks.check_key, ("response",)),
    Check("API", "workflows", workflow_checks.check_workflows, ("API key",)),
    Check("API", "definition", workflow_checks.check_definition, ("API key",)),
    Check("Push", "token", push_checks.check_token, ("API key",)),
    Check("Push", "WebSocket", push_checks.check_websocket, ("token",)),
    Check("Push", "subscription", push_checks.check_subscription, ("WebSocket",)),
    Check("Databases", "database", database_checks.check_database),
    Check("Databases", "Redis", database_checks.check_redis),
)
_RUNNING = (
    Check("Run", "start", run_checks.check_start, ("API key",)),
    Check("Run", "warning", run_checks.check_warning, ("start",)),
    Check("Run", "completion", run_checks.check_completion, ("start",)),
    Check("Run", "first polls", run_checks.check_first_polls, ("start",)),
    Check("Run", "node map", run_checks.check_node_map, ("start",)),
    Check("Run", "statuses", run_checks.check_statuses, ("start",)),
    Check("Run", "running output", run_checks.check_running_output, ("start",)),
    Check("Run", "main output", run_checks.check_output, ("start",)),
    Check("Run", "pushed message", run_checks.check_message, ("start",)),
    Check("Run", "callback", run_checks.check_callback, ("start",)),
)


def all_checks(*, has_run: bool) -> tuple[Check, ...]:
    """Return the checks that read alone, and those of one run if there is to be one."""
    if has_run:
        return _READING + _RUNNING
    return (*_READING, Check("Run", "start", _no_run))
