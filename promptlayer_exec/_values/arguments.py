"""Checks arguments before any I/O. Each error names the argument."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from promptlayer_exec._values.errors import ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])

MAX_ID = 2**63 - 1

# Argument names in other clients, such as the vendor's SDK and API, with a hint for each.
_OTHER_NAMES = {
    "workflow_name": "it is workflow= here",
    "workflow_id": "it is workflow= here",
    "workflow_id_or_name": "it is workflow= here",
    "input_variables": "it is inputs= here",
    "workflow_label_name": "it is label= here",
    "workflow_version": "it is version= here",
    "workflow_version_number": "it is version= here",
    "return_all_outputs": "start the run: execution.wait() returns a snapshot with raw",
    "timeout": "Session has wait_timeout= for a wait, and request_timeout= for one HTTP attempt",
    "throw_on_error": "errors are always raised here",
    "cache_ttl_seconds": "there is no cache of prompt templates here",
    "enable_tracing": "see promptlayer_exec.opentelemetry",
    "tracer_provider": "see promptlayer_exec.opentelemetry",
    "tracing_providers": "see promptlayer_exec.opentelemetry",
    "session": "it is http= here",
    "retries": "it is retry=RetryPolicy(...) here",
    "max_retries": "it is retry=RetryPolicy(...) here",
}


def check_execution_id(value: Any) -> int:
    """Return an execution id as an int.

    It may be any value with `__index__` except a bool, or a string of decimal digits, which is how
    this package writes ids in JSON.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    return positive_int64("execution id", value, "an int or a string of its digits")


def positive_int64(name: str, value: Any, expected: str) -> int:
    """Return an argument that must be an int from 1 to 2**63-1."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be {expected}, got {value!r:.100}")
    number = operator.index(value)
    if not 1 <= number <= MAX_ID:
        raise ValueError(f"{name} must be between 1 and 2**63-1, got {number}")
    return number


def optional_str(name: str, value: Any) -> str | None:
    """Return an argument that must be a string or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a str or None, got {value!r:.100}")
    return value


def check_count(name: str, value: Any) -> int:
    """Return a setting that must be an int of at least 1, or raise `ConfigurationError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        rule = f"{name} must be an int of at least 1"
        raise ConfigurationError(rule, setting=name, got=f"{value!r:.100}")
    return value


def unexpected_argument(function: str, unknown: Iterable[str]) -> TypeError:
    """Return the error for unknown arguments. If another client has them, it names ours."""
    unknown = list(unknown)
    known = [f"{name}=: {_OTHER_NAMES[name]}" for name in unknown if name in _OTHER_NAMES]
    if known:
        return TypeError(f"unexpected argument {'; '.join(known)}")
    return TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")


def hiding_unknown(function: F) -> F:
    """Hide `**_unknown` from a function's signature: it is there only to explain the error.

    A decorator that calls the function could explain it as well, but would add its frame to the
    traceback of every other error.
    """
    signature = inspect.signature(function)
    known = [it for it in signature.parameters.values() if it.kind is not it.VAR_KEYWORD]
    cast(Any, function).__signature__ = signature.replace(parameters=known)
    return function
