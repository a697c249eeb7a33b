"""What a client raises, and the reading of an answer that is an error."""

from __future__ import annotations

import httpx

from service.jobs.schemas import Problem


class ServiceProblemError(Exception):
    """The service refused, with a problem document; ``problem.code`` is stable."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.detail} {problem.remedy}")
        self.problem = problem


class ServiceUnreachableError(Exception):
    """Nothing answers at the service's address, or not as the service would."""


class KeyMalformedError(ValueError):
    """The API key given is none."""


class DigestMismatchError(Exception):
    """What arrived is not what was sent, or a file changed while it was being sent."""


def checked(response: httpx.Response) -> httpx.Response:
    """The response, unless it is an error.

    Raises:
        ServiceProblemError: it is, and says what was wrong.
        ServiceUnreachableError: it is, in a way that is not the service's.
    """
    if not response.is_error:
        return response
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        raise ServiceProblemError(Problem.model_validate_json(response.content))
    raise ServiceUnreachableError(
        f"{response.url} answered {response.status_code} without a problem document; is it an AQuant service?"
    )
