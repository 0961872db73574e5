"""The location of the database of batches."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import platformdirs
import sqlalchemy as sa
from sqlalchemy import exc

from promptlayer_exec._install import install_hint
from promptlayer_exec._values.errors import ConfigurationError

_VARIABLE = "PROMPTLAYER_EXEC_DB"


def database_url(given: str | None) -> sa.URL:
    """Return the URL of a database: the given one, or from the environment, or the default."""
    if text := given or os.environ.get(_VARIABLE):
        return check_url(text)
    return sa.URL.create("sqlite", database=str(_default_path()))


def shown_database_url(given: str | None = None) -> str:
    """Return the URL of the database that `Batch` uses, without its password, for messages.

    Args:
        given: the same as `database_url` of `Batch`.

    Raises:
        ConfigurationError: it, or the environment variable `PROMPTLAYER_EXEC_DB`, is malformed.
    """
    return shown(database_url(given))


def shown(url: sa.URL) -> str:
    """Return a URL for messages: in its original form, but without the password."""
    return url.set(drivername=url.get_backend_name()).render_as_string(hide_password=True)


def prepare_default(url: sa.URL) -> None:
    """Make the directory of the default database, if the URL is the default.

    Raises:
        ConfigurationError: making the directory failed.
    """
    path = _default_path()
    if url.database != str(path):
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"could not make the directory {path.parent} for the database of batches:"
            f" {error.strerror or error}",
            advice=f"Set {_VARIABLE} to another database.",
            setting="database_url",
        ) from error


def _default_path() -> Path:
    return platformdirs.user_state_path("promptlayer-exec", appauthor=False) / "batches.sqlite"


def check_url(database_url: str) -> sa.URL:
    """Return the URL of a SQLite file or a PostgreSQL database as SQLAlchemy and DBOS take it."""
    try:
        url = sa.make_url(database_url)
    except (exc.ArgumentError, ValueError):
        raise ConfigurationError(
            "database_url is not a URL",
            advice="Use sqlite:///batches.sqlite or postgresql://user@host/database.",
            setting="database_url",
        ) from None

    backend = url.get_backend_name()
    if backend in ("postgres", "postgresql"):
        if find_spec("psycopg") is None:
            raise ConfigurationError(f"PostgreSQL needs {install_hint('starts')}")
        return url.set(drivername="postgresql+psycopg")

    if backend != "sqlite":
        raise ConfigurationError(
            "database_url must be sqlite or postgresql", setting="database_url", got=backend
        )
    if url.host is not None:
        raise ConfigurationError(
            "a SQLite file needs three slashes, such as sqlite:///batches.sqlite",
            setting="database_url",
            got=f"sqlite://{url.host}/{url.database or ''}",
        )
    if url.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "database_url must name a file: a SQLite database in memory is lost with its process",
            setting="database_url",
        )

    # Without this, lone surrogates and malformed query values would fail only in a connection.
    try:
        url.database.encode()
        url.get_dialect()().create_connect_args(url)
    except ValueError as error:
        rule = "database_url must be a URL that its driver accepts"
        got = f"the error: {error}"
        raise ConfigurationError(rule, setting="database_url", got=got) from error
    return url
