"""`aquant keys` and `aquant owners`: for who runs the service, on its database and not through its API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aquant_core.run_options import AsJson

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from service.jobs.records import KeyRecord
    from service.settings import Settings

keys = typer.Typer(name="keys", help="API keys, in the database that the settings name.", no_args_is_help=True)
owners = typer.Typer(name="owners", help="What each owner of keys uses, and may use.", no_args_is_help=True)

OWNER = r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}"

DataDir = Annotated[Path | None, typer.Option(help="That of `aquant up` (default ./data).")]


def _named(value: str) -> str:
    import re

    if not re.fullmatch(OWNER, value):
        raise typer.BadParameter("1 to 64 letters, digits and . _ @ + -, the first a letter or digit")
    return value


Owner = Annotated[str, typer.Option("--owner", callback=_named, help="Whose jobs and files the key is for.")]
OwnerName = Annotated[str, typer.Argument(callback=_named, help="The owner.")]


@keys.command()
def create(
    name: Annotated[str, typer.Argument(callback=_named, help="What the key is called, to be told from others.")],
    owner: Owner,
    expires_in: Annotated[int | None, typer.Option(min=1, metavar="DAYS", help="Days it is good for.")] = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="For GET /metrics, and nothing else.")] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="The owner gets the jobs and uploads that nobody has.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it, once: it is not kept. With the first, the service asks everybody for one."""
    with _database(data_dir) as (session, _):
        from service.jobs import uploads
        from service.jobs.keys import KeyRepository
        from service.jobs.owners import OwnerRepository
        from service.jobs.repository import now

        expires_at = None if expires_in is None else now() + timedelta(days=expires_in)
        repository = KeyRepository(session)
        first = not repository.any()
        key, token = repository.create(name, owner, "metrics" if metrics else "jobs", expires_at)
        jobs, files = (OwnerRepository(session).adopt(owner), uploads.adopt(session, owner)) if adopt else (0, 0)
        where = session.get_bind().engine.url.render_as_string()
    typer.echo(f"Key {key.id} ({name}) of {owner}; this is the only time it is shown:", err=True)
    typer.echo(token)
    if first:
        typer.echo(
            f"It is the first in {where}: from now on every request needs a key, where the service has this database.",
            err=True,
        )
    if adopt:
        typer.echo(f"{owner} now has the {jobs} jobs and {files} uploads that nobody had.", err=True)


@keys.command("list")
def list_keys(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List all keys, also those that are revoked or have expired."""
    with _database(data_dir) as (session, _):
        from service.jobs.keys import KeyRepository

        found = KeyRepository(session).all()
    if as_json:
        typer.echo(json.dumps([_document(key) for key in found], indent=2))
        return
    for key in found:
        typer.echo(_line(key))


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="NAME_OR_ID", help="As `aquant keys list` shows it.")],
    data_dir: DataDir = None,
) -> None:
    """Make a key worthless, from the next request on."""
    with _database(data_dir) as (session, _):
        from service.jobs.keys import KeyRepository, KeyUnknownError

        try:
            revoked = KeyRepository(session).revoke(key)
        except KeyUnknownError as error:
            raise typer.BadParameter(str(error), param_hint="NAME_OR_ID") from error
    typer.echo(f"revoked {revoked.id} ({revoked.name}) of {revoked.owner}")


@owners.command("list")
def list_owners(data_dir: DataDir = None) -> None:
    """Print each owner's use and limits, as JSON; the owner "" is who came while there were no keys."""
    from dataclasses import asdict

    with _database(data_dir) as (session, settings):
        from service.jobs.owners import Account, OwnerRepository

        found = {}
        for name in OwnerRepository(session).names():
            account = Account(session, settings, name or None)
            found[name] = {"used": asdict(account.usage()), "limits": asdict(account.limits())}
    typer.echo(json.dumps(found, indent=2))


@owners.command("limit")
def limit_owner(
    owner: OwnerName,
    jobs_queued: Annotated[int | None, typer.Option(min=0, help="Jobs that may wait.")] = None,
    jobs_running: Annotated[int | None, typer.Option(min=1, help="Jobs that may run at a time.")] = None,
    stored_bytes: Annotated[int | None, typer.Option(min=0, help="Bytes of all files.")] = None,
    upload_bytes: Annotated[int | None, typer.Option(min=1, help="Bytes of one upload.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Where none is given, those of the settings.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Set an owner's limits, in place of those of the settings (AQUANT_MAX_...)."""
    given = {
        "max_jobs_queued": jobs_queued,
        "max_jobs_running": jobs_running,
        "max_stored_bytes": stored_bytes,
        "max_upload_bytes": upload_bytes,
    }
    with _database(data_dir) as (session, _):
        from service.jobs.owners import OwnerRepository, OwnerUnknownError

        limits = {name: value for name, value in given.items() if reset or value is not None}
        try:
            OwnerRepository(session).set_limits(owner, **limits)
        except OwnerUnknownError as error:
            raise typer.BadParameter(str(error), param_hint="OWNER") from error


@contextmanager
def _database(data_dir: Path | None) -> Iterator[tuple[Session, Settings]]:
    """A transaction on the database of the settings; errors meant for the operator end the command."""
    from service.settings import Settings

    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    try:
        from service.jobs.database import (
            DatabaseMissingError,
            DatabaseUnusableError,
            UnsupportedDatabaseError,
            migrate,
            require_made,
            session_on,
        )
    except ImportError as error:
        typer.echo(
            f"This needs the server's extra ({error.name} not found): pip install 'aquant-service[server]'.", err=True
        )
        raise typer.Exit(1) from error
    try:
        require_made(settings)  # keys in a database that no service reads would protect nothing
        migrate(settings)
    except (DatabaseMissingError, DatabaseUnusableError, UnsupportedDatabaseError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    with session_on(settings) as session, session.begin():
        yield session, settings


def _document(key: KeyRecord) -> dict[str, str | None]:
    times = {name: getattr(key, name) for name in ("created_at", "expires_at", "revoked_at", "last_used_at")}
    return {
        **{name: getattr(key, name) for name in ("id", "name", "owner", "scope")},
        **{name: None if at is None else at.isoformat() for name, at in times.items()},
    }


def _line(key: KeyRecord) -> str:
    from service.jobs.repository import now

    state = "good"
    if key.revoked_at is not None:
        state = f"revoked {key.revoked_at:%Y-%m-%d}"
    elif key.expires_at is not None:
        state = f"{'expired' if key.expires_at <= now() else 'until'} {key.expires_at:%Y-%m-%d}"
    used = "never used" if key.last_used_at is None else f"last used {key.last_used_at:%Y-%m-%d %H:%M}"
    return f"{key.id}  {key.owner:<16} {key.name:<16} {key.scope:<8} {state:<18} {used}"
