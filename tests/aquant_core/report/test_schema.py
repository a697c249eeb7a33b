"""The schema against real reports: every key is known, and every key is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import reports
from old_reports import old_report
from pydantic import BaseModel, TypeAdapter

from aquant_core.report import FORMAT
from aquant_core.report.schema import Report

ROOT = Path(__file__).parents[3]


def round_trip(report: dict[str, Any]) -> None:
    assert Report.model_validate(report).model_dump(mode="json") == report


def test_no_key_is_missing_and_none_unknown(report: dict[str, Any]) -> None:
    assert report["format"] == FORMAT
    round_trip(report)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "brecq", "labels": False},
        {"method": "a_rounding"},
        {"method": "nearest", "activation_bits": 32, "sensitivity": False},
        {"target": {"max_accuracy_drop": 5}},
        {"weight_bits": 32, "border": {"granularity": "channel"}},
        {"border": {"alpha": "learned"}, "protocol_switches": {"shortcut": "low"}},
    ],
)
def test_reports_of_every_kind(changes: dict[str, Any]) -> None:
    round_trip(reports.run(**changes))


def test_a_report_before_this_format_is_still_read() -> None:
    assert "format" not in old_report()
    document = Report.model_validate(old_report())
    assert document.format is document.gap is document.layers[0].sqnr_db is None
    assert [block.name for block in document.blocks][:2] == ["conv1", "layer1.0"]


def test_the_json_schema_is_for_any_language() -> None:
    schema = TypeAdapter(Report).json_schema()
    assert schema["properties"]["accuracy"]["anyOf"][0] == {"$ref": "#/$defs/AccuracyTable"}
    assert set(schema["$defs"]["AccuracyTable"]["properties"]) == {"float", "nearest", "quantized"}


def test_the_page_of_documentation_names_every_key() -> None:
    text = (ROOT / "docs" / "report.md").read_text()
    told = set(re.findall(r"`([a-z0-9_]+)`", text))
    pending: list[type[BaseModel]] = [Report]
    seen: set[type[BaseModel]] = set()
    while pending:
        model = pending.pop()
        if model in seen or model.__module__ != Report.__module__:
            continue
        seen.add(model)
        assert set(model.model_fields) <= told, (model.__name__, set(model.model_fields) - told)
        for field in model.model_fields.values():
            pending += [each for each in _types_in(field.annotation) if issubclass(each, BaseModel)]
    assert len(seen) > 20


def _types_in(annotation: Any) -> list[type]:
    found = [annotation] if isinstance(annotation, type) else []
    return found + [each for part in getattr(annotation, "__args__", ()) for each in _types_in(part)]
