"""Configurations as people write them, and what is said of those that are not valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from aquant_core.config import QuantizationConfig
from aquant_core.config_reading import faults_of, read_configuration, repeated_key


def test_options_go_over_what_is_given_as_text_or_as_a_file(tmp_path: Path) -> None:
    text = '{"weight_bits": 2, "seed": 1}'
    (tmp_path / "config.json").write_text(text)
    options = {"seed": 5, "method": None}
    for source in (text, "  " + text, str(tmp_path / "config.json")):
        assert read_configuration(source, options) == {"weight_bits": 2, "seed": 5}
    assert read_configuration(None, options) == {"seed": 5}
    for wrong in ("[1]", "{", str(tmp_path), str(tmp_path / "absent")):
        with pytest.raises(ValueError, match="neither JSON nor a file of it"):
            read_configuration(wrong, options)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        read_configuration(str(tmp_path / "config.json"), options)
    with pytest.raises(ValueError, match=r'names "border.form" twice: say it once'):
        read_configuration('{"border": {"form": "linear", "bits": 8, "form": "quadratic"}}', options)
    with pytest.raises(ValueError, match="neither JSON nor a file of it"):
        read_configuration('{"layers":' * 5_000, options)


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ('{"seed": 1, "seed": 1}', "seed"),
        (b'{"border": {"form": 1}, "layers": {"fc": {"bits": 1, "bits": 2}}}', "layers.fc.bits"),
        ('[{"a": 1}, {"b": 1, "b": null}]', "1.b"),
        ('{"a": {"b": 1}, "b": {"a": 1}, "c": [1, 1, {}, {}]}', None),
        ('{"a": ' + "9" * 5_000 + ', "a": NaN}', "a"),
        ('"a"', None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_first_key_that_stands_twice_is_found(document: str | bytes, place: str | None) -> None:
    assert repeated_key(document) == place


def test_json_nested_without_end_is_told_in_words() -> None:
    with pytest.raises(ValueError, match=r"neither JSON nor a file of it: it is nested too deeply$"):
        read_configuration('{"layers":' * 200_000, {})


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)))
def test_what_json_writes_names_nothing_twice(document: Any) -> None:
    assert repeated_key(json.dumps(document)) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"weight_bits": 9}, "weight_bits: must be 2 to 8, or 32 for float; got 9"),
        ({"weight_bits": None}, "weight_bits: Input should be a valid integer, not null"),
        ({"method": "gptq" * 30}, "'aquant', not \"gptq" + "gptq" * 13 + "gpt..."),
        ({"preset": "quick"}, "preset: Input should be 'smoke', 'fast' or 'paper', not \"quick\""),
        ({"weigth_bits": 2}, "weigth_bits: unknown key (did you mean weight_bits?)"),
        ({"config": {"seed": 1}}, "config: unknown key (there are method, weight_bits, "),
        ({"target": {"drop": 1}}, "target.max_accuracy_drop: missing; target.drop: unknown key (there are max_accu"),
        ({"layers": {"fc": {"bits": 4}}}, "layers.fc.bits: unknown key (there are weight_bits, activation_bits)"),
        ({"compare": ["aquant"]}, 'config: compare: "aquant" would run twice'),
    ],
    ids=str,
)
def test_faults_name_place_value_and_what_is_allowed(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        QuantizationConfig.model_validate({"weight_bits": 2, "activation_bits": 2} | changes)
    assert told in faults_of(refused.value)


def test_of_many_faults_the_first_are_told_and_keys_are_listed_once() -> None:
    many = {f"{index}": 1 for index in range(500)}
    document = {"weight_bits": 2, "activation_bits": 2, "border": many, "x" * 900_000: 1, **many}
    with pytest.raises(ValidationError) as refused:
        QuantizationConfig.model_validate(document)
    told = faults_of(refused.value)
    assert told.startswith("border.0: unknown key (there are form, ")
    assert told.endswith("; border.19: unknown key; and 981 more")
    assert told.count("(there are ") == 1

    del document["border"], document["0"]
    with pytest.raises(ValidationError) as refused:
        QuantizationConfig.model_validate(document)
    told = faults_of(refused.value)
    assert told.startswith(f"{'x' * 100}...: unknown key (there are method, ")
    assert told.endswith("; 19: unknown key; and 480 more")
    assert len(told) < 1_000


def test_a_document_with_secrets_keeps_its_values_to_itself() -> None:
    class Hook(BaseModel, extra="forbid"):
        secret: int

    with pytest.raises(ValidationError) as refused:
        Hook.model_validate({"secret": "whsec_hush", "hush": "hush"})
    told = faults_of(refused.value, values=False)
    assert told.startswith("secret: Input should be a valid integer")
    assert told.endswith("; hush: unknown key")
    assert "whsec" not in told
