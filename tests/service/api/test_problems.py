"""Whatever goes wrong, the answer is a problem document."""

from __future__ import annotations

import re

import pytest
from fastapi import FastAPI
from httpx import Client
from servers import DATABASES

from service.jobs.problem_kinds import KINDS

in_the_folder = pytest.mark.parametrize("storage", DATABASES[:1], indirect=True)


@in_the_folder
@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("PUT", "/jobs", 405, "method_not_allowed"),
        ("GET", "/jobs/none", 404, "job_not_found"),
        ("GET", "/jobs?limit=0", 422, "request_invalid"),
        ("GET", "/jobs/none?wait=99", 422, "request_invalid"),
        ("POST", "/jobs", 415, "content_type_unsupported"),
    ],
)
def test_framework_errors_are_problems(web: Client, method: str, path: str, status: int, code: str) -> None:
    answer = web.request(method, path)
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert {"type", "title", "detail", "remedy"} <= problem.keys()
    if status == 405:
        assert answer.headers["allow"]


@in_the_folder
def test_unforeseen_error_tells_nothing_of_the_inside(web: Client, application: FastAPI) -> None:
    application.state.parts = "broken"
    answer = web.get("/jobs")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "broken" not in answer.text


@in_the_folder
def test_the_type_of_a_problem_leads_to_its_explanation(web: Client) -> None:
    problem = web.get("/jobs/none").json()
    assert problem["type"] == "/errors#job_not_found"
    page = web.get(problem["type"].partition("#")[0])
    assert page.headers["content-type"].startswith("text/html")
    assert {f'id="{code}"' for code in KINDS} <= set(re.findall(r'id="\w+"', page.text))
    assert "http://" not in page.text
    assert "https://" not in page.text


@in_the_folder
def test_documentation_names_what_there_is(web: Client) -> None:
    document = web.get("/openapi.json").json()
    expected = {"/jobs", "/jobs/{job_id}", "/jobs/{job_id}/checkpoint", "/jobs/{job_id}/onnx", "/health/ready"}
    assert expected <= document["paths"].keys()
    schemas = document["components"]["schemas"]
    for path in document["paths"].values():
        for operation in path.values():
            for reference in _references(operation):
                assert reference.removeprefix("#/components/schemas/") in schemas
    assert "HTTPValidationError" not in str(document["paths"])
    assert web.get("/docs").status_code == 200


def _references(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [found for value in node.values() for found in _references(value)]
    if isinstance(node, list):
        return [found for value in node for found in _references(value)]
    return []
