"""Every code that is used is explained, and every one that is explained is used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import aquant_core
import service
import worker
from service.api.error_page import where
from service.api.problems import FRAMEWORK
from service.jobs.problem_kinds import KINDS, address_of
from service.jobs.schemas import Problem

CATCH_ALL = {"ServiceError", "AQuantError"}
"""Roots of the named errors; nobody raises them."""


def codes(tree: ast.AST) -> Iterator[str]:
    """Codes in a module: of classes of errors, and first arguments of what makes a problem."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name not in CATCH_ALL:
            for statement in node.body:
                match statement:
                    case ast.Assign(targets=[ast.Name(id="code")], value=ast.Constant(value=str(code))):
                        yield code
        match node:
            case ast.Call(
                func=ast.Name(id="problem") | ast.Attribute(attr="of_job"), args=[ast.Constant(value=str(code)), *_]
            ):
                yield code


def test_codes_are_those_of_the_source() -> None:
    found = {code for code, _ in FRAMEWORK.values()} | {"http_error"}
    for package in (aquant_core, service, worker):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            found |= set(codes(ast.parse(path.read_text())))
    assert found == KINDS.keys()


def test_every_kind_says_where_it_is_met() -> None:
    assert [code for code, kind in KINDS.items() if where(kind) == "an exception of the library"] == [
        "dry_run_requested",
        "device_unavailable",
    ]
    assert where(KINDS["worker_lost"]) == "the error of a failed job"
    assert where(KINDS["not_found"]) == "HTTP 404"
    assert where(KINDS["model_invalid"]) == "HTTP 422 and the error of a failed job"


def test_a_failed_job_says_where_its_error_is_explained() -> None:
    problem = Problem.of_job("worker_lost", "It is gone.", "Try again.")
    assert (problem.type, problem.title, problem.status) == (address_of("worker_lost"), "Worker lost", None)
