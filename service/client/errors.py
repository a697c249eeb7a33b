"""What a client raises, and the reading of an answer that is an error."""

from __future__ import annotations

from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.jobs.schemas import Problem

M = TypeVar("M", bound=BaseModel)


class ServiceProblemError(Exception):
    """The service refused, with a problem document; ``problem.code`` is stable."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.detail} {problem.remedy}")
        self.problem = problem


class ServiceUnreachableError(Exception):
    """Nothing answers at the service's address, or not as the service would."""


class AddressMalformedError(ValueError):
    """The address given is none of a service."""


class KeyMalformedError(ValueError):
    """The API key given is none."""


class JobIdMalformedError(ValueError):
    """The id given is none of a job: nothing was asked."""


class DigestMismatchError(Exception):
    """What arrived is not what was sent, or a file changed while it was being sent."""


def checked(response: httpx.Response) -> httpx.Response:
    """The response, unless it is an error.

    Raises:
        ServiceProblemError: it is, and says what was wrong.
        ServiceUnreachableError: it is, in a way that is not the service's.
    """
    if response.is_success or response.status_code == httpx.codes.NOT_MODIFIED:
        return response
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        raise ServiceProblemError(read(response, Problem))
    if response.has_redirect_location:
        raise ServiceUnreachableError(
            f"{response.url} sends on to {response.headers['location']}. "
            "Name the service's own address with --url or AQUANT_URL."
        )
    raise ServiceUnreachableError(
        f"{response.url} answered {response.status_code} without a problem document; is it an AQuant service?"
    )


def read(response: httpx.Response, kind: type[M]) -> M:
    """The document that an answer holds.

    Raises:
        ServiceUnreachableError: it holds something else.
    """
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise not_the_service(response, f"something else than a {kind.__name__}") from error


def not_the_service(response: httpx.Response, answered: str) -> ServiceUnreachableError:
    """What is raised where something answers, but not as the service would."""
    return ServiceUnreachableError(f"{response.url} answered with {answered}; is it an AQuant service?")
