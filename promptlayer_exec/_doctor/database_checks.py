"""The database of batches and starts, and Redis."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptlayer_exec._doctor.examination import Examination
from promptlayer_exec._doctor.network_checks import brief
from promptlayer_exec._doctor.report import Finding, broken_rule, differs, failed, ok, skipped
from promptlayer_exec._install import install_hint
from promptlayer_exec._values.errors import ConfigurationError

if TYPE_CHECKING:
    import sqlalchemy as sa

    from promptlayer_exec._database.database import Database

_PATIENCE = 10.0
_TABLES = {"promptlayer_batch": "batches", "promptlayer_exec_starts": "starts"}


async def check_database(examination: Examination) -> Finding:
    given = examination.scope.database
    if given is None:
        return skipped("no --db")

    try:
        from promptlayer_exec._database.location import check_url, shown  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        return failed("the extra is not installed", f"It needs {install_hint('starts')}.")
    try:
        url = check_url(given)
    except ConfigurationError as error:
        return failed(broken_rule(error), "Correct --db or PROMPTLAYER_EXEC_DB.")

    place = shown(url)
    if (finding := _judge_new_file(url, place)) is not None:
        return finding
    examination.hosts += [url.host] if url.host else []
    examination.private += [str(url.password)] if url.password else []
    return await _look_into(url, place)


def _judge_new_file(url: sa.URL, place: str) -> Finding | None:
    """Judge the place of a SQLite file that does not exist. Connecting would create it."""
    path = Path(url.database or "")
    if url.get_backend_name() != "sqlite" or path.exists():
        return None

    directory = path.absolute().parent
    if directory.is_dir() and os.access(directory, os.W_OK):
        return ok("SQLite, no file yet: the first use creates it", place=place)
    return failed(
        "SQLite, no file yet, and its directory is not writable",
        "Make the directory, or name another file with --db.",
        place=place,
    )


async def _look_into(url: sa.URL, place: str) -> Finding:
    """Connect as batches and the start store do, but once. Read which tables there are."""
    from sqlalchemy import exc  # noqa: PLC0415 - an extra

    from promptlayer_exec._database.database import (  # noqa: PLC0415 - an extra
        Database,
        DatabaseLimits,
        reason_of,
    )

    limits = DatabaseLimits(retry_for=_PATIENCE, locked_file=2.0, connections=1, threads=1)
    database = Database(url, limits)
    advice = "Check --db, and that the database server is running and reachable from here."
    try:
        async with asyncio.timeout(_PATIENCE):
            system, encoding, tables = await database.in_thread(_read, database)
    except TimeoutError:
        return failed(f"no response within {_PATIENCE:g} s", advice, place=place)
    except exc.SQLAlchemyError as error:
        # The quoted parts are names of users and databases. Hosts come before the last "failed".
        reason = re.sub(r".* failed: | Is the server running.*", "", reason_of(error))
        reason = re.sub(r"([\"']).*?\1", "...", reason)
        return failed(f"could not use it: {reason[:200]}", advice, place=place)
    finally:
        database.close()

    if encoding != "UTF8":
        remedy = "`createdb -T template0 -E UTF8` makes a usable one."
        return differs("a database with the encoding UTF8", encoding, remedy)
    present = [what for table, what in _TABLES.items() if table in tables]
    text = "no tables yet: the first use creates them"
    if present:
        text = f"with the tables of {' and '.join(present)}"
    return ok(f"{system}, {text}", place=place)


def _read(database: Database) -> tuple[str, str, set[str]]:
    """Return the database's system and version, its encoding, and the names of its tables."""
    import sqlalchemy as sa  # noqa: PLC0415 - an extra

    with database.engine.connect() as connection:
        tables = set(sa.inspect(connection).get_table_names())
        version = ".".join(map(str, connection.dialect.server_version_info or ()))
        if database.is_sqlite:
            return f"SQLite {version}", "UTF8", tables
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        return f"PostgreSQL {version}", str(encoding), tables


async def check_redis(examination: Examination) -> Finding:
    given = examination.scope.redis
    if given is None:
        return skipped("no --redis")

    try:
        from redis.asyncio import Redis  # noqa: PLC0415 - an extra
        from redis.asyncio.retry import Retry  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.exceptions import NoPermissionError, RedisError  # noqa: PLC0415
    except ModuleNotFoundError:
        return failed("the extra is not installed", f"It needs {install_hint('redis')}.")

    waits: dict[str, Any] = {"socket_connect_timeout": 3.0, "socket_timeout": 3.0}
    try:
        client: Any = Redis.from_url(given, retry=Retry(NoBackoff(), 0), **waits)
    except ValueError:
        return failed("not a Redis URL", "Write it like redis://host:6379/0.")

    options = client.connection_pool.connection_kwargs
    host, password = options.get("host"), options.get("password")
    examination.hosts += [host] if host else []
    examination.private += [str(password)] if password else []
    place = str(host or options.get("path") or "")

    loop = asyncio.get_running_loop()
    try:
        await client.ping()  # the first one includes connecting
        began = loop.time()
        await client.ping()
        latency = brief(loop.time() - began)
        await client.eval("return 1", 0)  # a backplane's leases are scripts
        server: dict[str, Any] = {}
        with suppress(NoPermissionError):  # nothing needs the version but this report
            server = await client.info("server")
    except RedisError as error:
        return failed(
            f"could not use it: {_redis_reason(error)}",
            "Check --redis, and that Redis is running and reachable from here.",
            place=place,
        )
    finally:
        await client.aclose()

    name = str(server.get("server_name", "redis")).capitalize()
    version = server.get("valkey_version") or server.get("redis_version") or "(version hidden)"
    return ok(f"{name} {version}, PING in {latency}", place=place)


def _redis_reason(error: Exception) -> str:
    """Return why Redis is unusable. The client's own text shows the host."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return f"no TLS connection: {getattr(cause, 'verify_message', None) or cause.reason}"
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
            return os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__

    match type(error).__name__:
        case "TimeoutError":
            return "no response within 3 s"
        case "AuthenticationError" | "AuthenticationWrongNumberOfArgsError":
            return "it refused the user or the password"
        case "NoPermissionError":
            return "the user may not run PING and EVAL"
        case name:
            return name
