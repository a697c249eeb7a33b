"""The OpenAPI document says all there is to say, and the pages in docs/ say the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import TypeAdapter
from servers import PAIRS

from aquant_core.config import QuantizationConfig
from service.api.problems import FRAMEWORK
from service.jobs.problem_kinds import KINDS
from service.jobs.schemas import Health, JobDocument, JobPage, JobRequest, Problem, UploadDocument

in_a_folder = pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def document(application: FastAPI) -> dict[str, Any]:
    return application.openapi()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_those_of_the_code(generate: ModuleType) -> None:
    for name, text in generate.pages().items():
        assert (DOCS / name).read_text() == text, f"{name} is out of date: run python docs/generate.py"


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


@in_a_folder
def test_every_operation_is_described_to_its_last_error(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    told: set[str] = set()
    for name, operation in operations(document):
        assert operation.get("description"), name
        assert "500" in operation["responses"], name
        for status, response in operation["responses"].items():
            assert status.isdecimal(), f"{name}: {status} is no status"
            assert response["description"], f"{name} {status}"
            if status < "400":
                continue
            content = response["content"]["application/problem+json"]
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
            for code, example in content["examples"].items():
                problem = Problem.model_validate(example["value"])
                assert (problem.code, str(problem.status)) == (code, status)
                told.add(code)
    of_the_framework = {code for code, _ in FRAMEWORK.values()} | {"http_error"}
    assert told | of_the_framework == {code for code, kind in KINDS.items() if kind.status is not None}


@in_a_folder
def test_operations_have_ids_of_their_own(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(ids)) == len(ids)


@in_a_folder
def test_examples_are_valid(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for model in (JobDocument, JobPage, UploadDocument, Health):
        for example in schemas[model.__name__]["examples"]:
            TypeAdapter(model).validate_python(example)
    body = document["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        JobRequest.model_validate(example["value"])


@in_a_folder
def test_a_request_may_leave_out_what_has_a_default(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["QuantizationConfig-Input"]
    assert schema.get("required", []) == []
    assert schema["anyOf"] == [{"required": ["weight_bits", "activation_bits"]}, {"required": ["target"]}]
    assert schema["properties"].keys() == QuantizationConfig.model_fields.keys()
