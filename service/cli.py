"""The command line: `aquant up` runs the service, other commands talk to one, others come with other packages."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import typer
from pydantic import ValidationError

from aquant_core.config_reading import faults_of
from service.administration import keys, owners
from service.commands import jobs, results, stack
from service.commands.exit_codes import ExitCode

COMMAND_GROUP = "aquant.commands"
"""Entry points of this group are commands of other packages: a function, named as the command is."""

app = typer.Typer(
    name="aquant",
    help="Post-training quantization of CNNs to 2-8 bits with an adaptive rounding border.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(stack.up)
app.command()(stack.check)
app.command()(stack.migrate)
app.command()(jobs.submit)
app.command("watch")(jobs.watch_job)
app.command("list")(jobs.list_jobs)
app.command()(jobs.show)
app.command()(results.report)
app.command()(results.download)
app.command()(jobs.cancel)
app.command()(jobs.delete)
app.add_typer(keys)
app.add_typer(owners)


def main() -> None:
    """Run the command line; errors meant for the user are printed without a traceback."""
    from service.client import errors

    for entry in entry_points(group=COMMAND_GROUP):
        try:
            app.command(entry.name)(entry.load())
        except ImportError as error:
            _add_missing(entry.name, error.name or str(error))
    try:
        app()
    except (errors.AddressMalformedError, errors.JobIdMalformedError) as error:
        typer.echo(str(error), err=True)
        sys.exit(ExitCode.USAGE)
    except (
        errors.DigestMismatchError,
        errors.KeyMalformedError,
        errors.ServiceProblemError,
        errors.ServiceUnreachableError,
    ) as error:
        typer.echo(str(error), err=True)
        sys.exit(ExitCode.FAILED)
    except ValidationError as error:
        if error.title == "Settings":
            faults = faults_of(error, "settings", named=lambda field: f"AQUANT_{field.upper()}")
            typer.echo(f"The settings are not valid: {faults}. docs/operations.md tells of them.", err=True)
            sys.exit(ExitCode.USAGE)
        typer.echo(f"The configuration is not valid: {faults_of(error)}. {_remedy(error)}", err=True)
        sys.exit(ExitCode.USAGE)


def _remedy(error: ValidationError) -> str:
    """What to do about a configuration that is not valid."""
    if any(fault["type"] == "missing" and str(fault["loc"][-1]).endswith("_bits") for fault in error.errors()):
        return "Give --weight-bits and --activation-bits, or --target."
    return "Change what is named; the README has every key, --help the options."


def _add_missing(name: str, module: str) -> None:
    """Keep a command whose dependencies are absent in the list, to say what it needs."""

    def missing() -> None:
        typer.echo(f"`aquant {name}` needs {module}: pip install 'aquant-service[core]'.", err=True)
        raise typer.Exit(ExitCode.FAILED)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    app.command(name, help="(not installed: pip install 'aquant-service[core]')", context_settings=settings)(missing)


if __name__ == "__main__":
    main()
