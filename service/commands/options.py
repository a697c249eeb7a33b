"""What the commands that talk to a service have in common: its address, the key, the job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.client import Client

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="AQUANT_URL", help="Address of the service.")]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="AQUANT_API_KEY", help="API key; the variable keeps it out of the list of processes."),
]


def _said(job_id: str) -> str:
    """A job's id; a script whose submission failed gives an empty one."""
    if not job_id.strip():
        raise typer.BadParameter("it is empty; `aquant submit` prints it, `aquant list` lists them")
    return job_id


JobId = Annotated[str, typer.Argument(help="The job's id.", callback=_said)]
Timeout = Annotated[
    float | None, typer.Option(min=0, metavar="SECONDS", help="Follow it for so long at most; then exit with 5.")
]


def open_client(url: str, key: str | None) -> Client:
    """A client of the service; httpx is imported when there is something to ask."""
    from service.client import Client

    return Client(url, key=key)
