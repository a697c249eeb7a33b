"""Opens the database, SQLite or PostgreSQL by its URL, and brings its schema up to date."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError, TimeoutError
from sqlalchemy.orm import Session

from service.settings import Settings

MIGRATIONS = Path(__file__).parent.parent / "migrations"

DATABASE_DOWN = (OperationalError, InterfaceError, TimeoutError)
"""What is raised when the database cannot be reached, or gives no connection in time."""

_POSTGRESQL = "postgresql+psycopg"
_CONNECTING = {
    "application_name": "aquant",
    "connect_timeout": 5,
    # A server that vanished without a word is noticed in about 20 seconds, not after the system's hours.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,
}
"""libpq's parameters, where the URL's query does not say otherwise."""

_MIGRATION_LOCK = 0x61717561_6E740001
"""Number of PostgreSQL's advisory lock on the schema: "aquant" and 1."""


class UnsupportedDatabaseError(ValueError):
    """The database's URL is of a kind this version does not serve."""


class DatabaseUnusableError(Exception):
    """The database could not be reached, or brought up to date, at the start."""


class DatabaseMissingError(Exception):
    """There is no database yet where the settings say that it is."""


def open_database(settings: Settings) -> Engine:
    """An engine for the configured database; it connects when it is first used.

    Raises:
        UnsupportedDatabaseError: the URL is neither SQLite's nor PostgreSQL's.
    """
    url = _database_url(settings)
    return _open_sqlite(url) if _is_sqlite(url) else _open_postgresql(url)


@contextmanager
def session_on(settings: Settings) -> Iterator[Session]:
    """One session on the configured database, for a program that has one thing to ask or to do.

    Raises:
        UnsupportedDatabaseError: the URL is neither SQLite's nor PostgreSQL's.
    """
    engine = open_database(settings)
    try:
        with Session(engine, expire_on_commit=False) as session:
            yield session
    finally:
        engine.dispose()


def require_made(settings: Settings) -> None:
    """Raise unless there is a database with a schema, of whatever revision; looking makes none.

    Raises:
        DatabaseMissingError: there is none.
        UnsupportedDatabaseError: the URL is neither SQLite's nor PostgreSQL's.
        DatabaseUnusableError: the server does not answer, or does not let this user in.
    """
    url = _database_url(settings)
    if not _is_sqlite(url) or (url.database and Path(url.database).is_file()):
        engine = open_database(settings)
        try:
            with _saying_why(engine):
                if inspect(engine).has_table("alembic_version"):
                    return
        finally:
            engine.dispose()
    raise DatabaseMissingError(
        f"There is no database at {url.render_as_string(hide_password=True)}. `aquant up` makes it when it starts, "
        "`aquant migrate` without starting. If the service has its data elsewhere, name the folder with --data-dir "
        "(`aquant up` prints the command), or the database with AQUANT_DATABASE_URL."
    )


def migrate(settings: Settings) -> None:
    """Bring the schema to the newest revision; safe to call from several processes at once.

    Raises:
        UnsupportedDatabaseError: the URL is neither SQLite's nor PostgreSQL's.
        DatabaseUnusableError: there is no such database, or it does not let this user in or change the schema.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    engine = open_database(settings)
    try:
        with _saying_why(engine), _alone(engine, settings) as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


@contextmanager
def _saying_why(engine: Engine) -> Iterator[None]:
    """A database that is down is named, with the reason."""
    try:
        yield
    except DATABASE_DOWN as error:
        reason = " ".join(str(error.orig if isinstance(error, OperationalError) else error).split()).rstrip(".?")
        raise DatabaseUnusableError(
            f"The database {engine.url.render_as_string(hide_password=True)} cannot be used: {reason}. "
            "Check AQUANT_DATABASE_URL, and that the server runs and has this database and user."
        ) from error


@contextmanager
def _alone(engine: Engine, settings: Settings) -> Iterator[Connection]:
    """A transaction for a migration, one at a time: API and worker start together, on one machine or on several."""
    if not _is_sqlite(engine.url):
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MIGRATION_LOCK})
            yield connection
        return
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    # SQLite has no lock that spans a whole migration.
    with (settings.data_dir / "migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with engine.begin() as connection:
            yield connection


def _database_url(settings: Settings) -> URL:
    remedy = (
        "Set AQUANT_DATABASE_URL to postgresql://user:password@host/name or sqlite:////folder/file, "
        "or leave it out for SQLite in AQUANT_DATA_DIR."
    )
    try:
        url = make_url(settings.database)
    except (ArgumentError, ValueError):
        raise UnsupportedDatabaseError(
            f"The database's URL cannot be read. {remedy}"
        ) from None  # it may hold a password
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername=_POSTGRESQL)
    if url.drivername not in (_POSTGRESQL, "sqlite", "sqlite+pysqlite"):
        raise UnsupportedDatabaseError(f"{url.drivername!r} is not a kind of database served here. {remedy}")
    return url


def _is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _open_postgresql(url: URL) -> Engine:
    return create_engine(
        url,
        # The guarded UPDATEs count on it, whatever the server's or the user's default.
        isolation_level="READ COMMITTED",
        connect_args={name: value for name, value in _CONNECTING.items() if name not in url.query},
        pool_pre_ping=True,
        pool_recycle=1800,
        pool_size=5,
        max_overflow=10,
        pool_timeout=10,
    )


def _open_sqlite(url: URL) -> Engine:
    """It waits for its lock and keeps foreign keys."""
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA busy_timeout = 15000")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    return engine
