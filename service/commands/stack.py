"""`aquant up`, `check`, `migrate`: the service itself."""

from __future__ import annotations

import json
import signal
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aquant_core.run_options import AsJson
from service.commands.exit_codes import ExitCode
from service.commands.options import DEFAULT_URL, Key, Url, open_client

if TYPE_CHECKING:
    from service.client import Client
    from service.jobs.schemas import Problem


DataDir = Annotated[Path | None, typer.Option(help="Folder of everything kept (default ./data).")]


def check(as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Tell whether the service is ready: every part answers, a worker is alive, the key is good; exit with 1 if not."""
    with open_client(url, key) as client:
        health = client.health()
        # With a part away nobody can tell, and the client would wait for it.
        refusal = _refusal(client) if health.status == "ok" else None
    ready = health.status == "ok" and health.workers_alive != 0 and refusal is None
    here = version("aquant-service")
    if as_json:
        refused = None if refusal is None else refusal.model_dump(mode="json")
        found = {"url": url, "ready": ready, "client_version": here, "refused": refused}
        found |= health.model_dump(mode="json")
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(f"{'service':<10} {url}  version {health.version or 'unknown'} (this command: {here})")
        for name, state in health.checks.items():
            typer.echo(f"{name:<10} {state}")
        for worker in health.workers:
            alive = "alive" if worker.alive else "gone"
            seen = f"seen {worker.seconds_since_seen:.0f} s ago"
            typer.echo(f"{'worker':<10} {worker.name}  {alive}, {seen}  {worker.device}: {worker.detail}")
        if refusal is not None:
            typer.echo(f"{'refused':<10} {refusal.detail} {refusal.remedy}")
        typer.echo("ready" if ready else "not ready")
    if not ready:
        raise typer.Exit(ExitCode.FAILED)


def up(
    host: Annotated[
        str | None, typer.Option(help="Address of the API (default 127.0.0.1); any other needs API keys.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API; 0 takes a free one.")] = None,
    data_dir: DataDir = None,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="How many; else one for each GPU, or one.")] = None,
) -> None:
    """Start broker, API and workers on this machine; Ctrl-C stops them all."""
    from service.local import DataDirTakenError, MissingExtraError, OpenToStrangersError, keys_command, local_stack
    from service.local_components import StackError
    from service.settings import Settings

    given = {"host": host, "port": port, "data_dir": data_dir, "workers": workers}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    for end in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with Ctrl-C ignored
        signal.signal(end, _interrupt)
    try:
        with local_stack(
            settings, lambda part: typer.echo(f"{part.name:<9} {part.address}  (log: {part.log})")
        ) as stack:
            if stack.url != DEFAULT_URL:
                typer.echo(f"client    export AQUANT_URL={stack.url}")
            typer.echo(f"keys      {keys_command(settings)}")
            typer.echo(f"ready     {stack.url}  (Ctrl-C stops it; API: {stack.url}/docs)")
            stack.watch(typer.echo)
    except KeyboardInterrupt:
        typer.echo("stopped")
    except (DataDirTakenError, MissingExtraError, OpenToStrangersError, StackError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(ExitCode.FAILED) from error


def migrate(data_dir: DataDir = None) -> None:
    """Bring the database's schema up to date, and make the S3 bucket if it is missing."""
    try:
        from service.artifacts import ArtifactsDownError, open_artifacts
        from service.jobs import database
        from service.s3 import UnsupportedStoreError
    except ImportError as error:
        typer.echo(f"`aquant migrate` needs {error.name}: pip install 'aquant-service[server]'.", err=True)
        raise typer.Exit(ExitCode.FAILED) from error
    from service.settings import Settings

    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    try:
        database.migrate(settings)
        open_artifacts(settings.artifacts).create()
    except (
        database.DatabaseUnusableError,
        database.UnsupportedDatabaseError,
        ArtifactsDownError,
        UnsupportedStoreError,
    ) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(ExitCode.FAILED) from error
    typer.echo("The database's schema is up to date, and the artifact store is there.")


def _refusal(client: Client) -> Problem | None:
    """Why the service does nothing for who asks, if so: its health is told to everybody."""
    from service.client import ServiceProblemError

    try:
        client.list(limit=1)
    except ServiceProblemError as error:
        if error.problem.status in (401, 403):
            return error.problem
        raise
    return None


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
