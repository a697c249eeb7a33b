"""The schema that the migrations make is the one the records declare."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from servers import DATABASES, PostgreSQL
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from service.jobs.database import (
    MIGRATIONS,
    DatabaseUnusableError,
    UnsupportedDatabaseError,
    _alone,
    migrate,
    open_database,
)
from service.jobs.events import JobEvents, is_last
from service.jobs.records import Record
from service.settings import Settings

on_postgresql = pytest.mark.parametrize("storage", DATABASES[1:], indirect=True)
every_database = pytest.mark.parametrize("storage", DATABASES, indirect=True)


@every_database
def test_migrations_make_the_declared_schema(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": False})
        assert compare_metadata(context, Record.metadata) == []


@every_database
def test_processes_may_migrate_at_once(settings: Settings) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, [settings] * 4))
    migrate(settings)


@pytest.mark.parametrize("storage", DATABASES[:1], indirect=True)
def test_sqlite_is_set_up_for_several_processes(engine: Engine) -> None:
    with engine.connect() as connection:
        values = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "foreign_keys", "busy_timeout")
        }
    assert values == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 15000}


def opened(url: str) -> Engine:
    return open_database(Settings(database_url=url))


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_pasted_urls_mean_psycopg_3(scheme: str) -> None:
    assert opened(f"{scheme}://user:secret@host/name").url.drivername == "postgresql+psycopg"


@pytest.mark.parametrize("url", ["mysql://user:secret@host/name", "postgresql+psycopg2://user:secret@host/x", "secret"])
def test_other_databases_are_refused_by_name(url: str) -> None:
    with pytest.raises(UnsupportedDatabaseError, match="Set AQUANT_DATABASE_URL to postgresql://") as caught:
        opened(url)
    assert "secret" not in str(caught.value)


def test_absent_server_is_named_without_its_password(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url="postgresql://user:secret@127.0.0.1:1/name")
    with pytest.raises(
        DatabaseUnusableError, match=r"user:\*\*\*@127.0.0.1:1/name cannot be used: .*refused"
    ) as caught:
        migrate(settings)
    assert "secret" not in str(caught.value)


def test_absent_database_is_named(postgresql: PostgreSQL, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url=postgresql.url().replace("/postgres", "/nowhere"))
    with pytest.raises(DatabaseUnusableError, match='database "nowhere" does not exist'):
        migrate(settings)
    assert list(tmp_path.iterdir()) == []


@on_postgresql
def test_transactions_are_read_committed_whatever_the_user_has_set(settings: Settings, engine: Engine) -> None:
    with engine.connect() as connection:
        assert connection.execute(text("SHOW transaction_isolation")).scalar_one() == "read committed"
    strict = settings.model_copy(
        update={"database_url": f"{settings.database_url}%20-cdefault_transaction_isolation%3Dserializable"}
    )
    other = open_database(strict)
    with other.connect() as connection:
        assert connection.execute(text("SHOW default_transaction_isolation")).scalar_one() == "serializable"
        assert connection.execute(text("SHOW transaction_isolation")).scalar_one() == "read committed"
    other.dispose()


@on_postgresql
def test_url_may_say_otherwise_how_to_connect(settings: Settings, engine: Engine) -> None:
    named = open_database(settings.model_copy(update={"database_url": f"{settings.database_url}&application_name=me"}))
    for which, name in ((engine, "aquant"), (named, "me")):
        with which.connect() as connection:
            assert connection.execute(text("SHOW application_name")).scalar_one() == name
    named.dispose()


@on_postgresql
def test_a_migration_waits_for_that_of_another_machine(settings: Settings, engine: Engine, tmp_path: Path) -> None:
    elsewhere = settings.model_copy(update={"data_dir": tmp_path / "elsewhere"})  # no lock file in common
    with _alone(engine, settings) as connection, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(migrate, elsewhere)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        connection.rollback()
        waiting.result(timeout=10)


@on_postgresql
def test_connections_that_the_server_closed_are_replaced(engine: Engine, postgresql: PostgreSQL) -> None:
    with engine.connect() as connection:
        number = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    with psycopg.connect(postgresql.url()) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [number])
    with engine.connect() as connection:
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() != number


@every_database
def test_jobs_of_before_get_an_event_to_begin_with(settings: Settings) -> None:
    engine = open_database(settings)
    with _alone(engine, settings) as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0004_keys")
        connection.execute(
            text(
                "INSERT INTO jobs (id, state, config, error, created_at, attempt) "
                "VALUES ('old', 'failed', '{}', '{\"code\": \"x\"}', '2026-01-31 12:00:00+00:00', 3)"
            )
        )
    migrate(settings)
    with Session(engine) as session:
        (event,) = JobEvents(session).after("old", 0, 10)
    assert (event.number, event.kind, event.at.year) == (1, "state", 2026)
    assert event.data == {"state": "failed", "stage": None, "attempt": 3, "error": {"code": "x"}}
    assert is_last(event)
    engine.dispose()
