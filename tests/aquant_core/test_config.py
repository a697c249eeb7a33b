"""A configuration is either meaningful or refused with the key and the value."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from aquant_core.config import (
    FLOAT_BITS,
    PROTOCOLS,
    BorderConfig,
    LayerOverride,
    Method,
    Protocol,
    ProtocolName,
    QuantizationConfig,
    Target,
)

ALLOWED_BITS = {2, 3, 4, 5, 6, 7, 8, 32}
W2A2 = {"weight_bits": 2, "activation_bits": 2}


def test_only_the_bit_widths_are_required() -> None:
    config = QuantizationConfig.model_validate(W2A2)
    assert config.method == "aquant"
    assert config.first_last_bits == 8
    assert config.preset == "fast"
    assert config.iterations is None
    assert config.seed == 0
    assert config.border == BorderConfig(fusion="none")
    assert (config.protocol, config.compare) == ("paper", [])
    assert config.layers == {}
    for key in W2A2:
        with pytest.raises(ValidationError, match=f"{key}\n  Field required"):
            QuantizationConfig.model_validate({k: v for k, v in W2A2.items() if k != key})


@given(bits=st.integers(-100, 100), key=st.sampled_from(["weight_bits", "activation_bits", "first_last_bits"]))
def test_bit_widths_are_two_to_eight_or_float(bits: int, key: str) -> None:
    document = W2A2 | {key: bits}
    if bits in ALLOWED_BITS:
        assert getattr(QuantizationConfig.model_validate(document), key) == bits
    else:
        with pytest.raises(ValidationError, match=rf"{key}\n.*must be 2 to 8, or 32 for float; got {bits}\b"):
            QuantizationConfig.model_validate(document)


def test_the_schema_offers_the_same_bit_widths() -> None:
    schema = QuantizationConfig.model_json_schema()["properties"]["weight_bits"]
    assert set(schema["enum"]) == ALLOWED_BITS
    assert FLOAT_BITS in schema["enum"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_bits", 2.5),
        ("weight_bits", None),
        ("activation_bits", "two"),
        ("method", "gptq"),
        ("preset", "slow"),
        ("iterations", 0),
        ("iterations", 1_000_001),
        ("seed", -1),
        ("seed", 2**63),
        ("protocol", "mqbench"),
        ("protocol_switches", "float"),
        ("compare", "qdrop"),
        ("architecture", "x" * 65),
        ("layers", ["conv1"]),
        ("border", "quadratic"),
        ("colour", "red"),
    ],
)
def test_a_refusal_names_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        QuantizationConfig.model_validate(W2A2 | {key: value})
    (error,) = refused.value.errors()
    assert error["loc"][0] == key
    assert error["input"] == value
    assert key in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("form", "cubic"),
        ("bound", "tanh"),
        ("fusion", "sum"),
        ("alpha", "free"),
        ("granularity", "tensor"),
        ("input_gradient", "perhaps"),
        ("slope", 3),
    ],
)
def test_a_refusal_inside_the_border_names_its_path(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=rf"border\.{key}\n(.*\n)*.*{re.escape(repr(value))}"):
        QuantizationConfig.model_validate(W2A2 | {"border": {key: value}})


@pytest.mark.parametrize(
    ("border", "remedy"),
    [
        ({"granularity": "channel", "fusion": "channel_mean"}, 'set border.fusion to "none"'),
        ({"granularity": "channel", "alpha": "learned"}, 'set border.alpha to "fixed"'),
        ({"granularity": "channel", "alpha": "learned", "fusion": "none"}, 'set border.alpha to "fixed"'),
        ({"alpha": "learned", "fusion": "none"}, 'set border.fusion to "channel_mean"'),
    ],
)
def test_meaningless_borders_are_refused(border: dict[str, str], remedy: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(remedy)):
        QuantizationConfig.model_validate(W2A2 | {"border": border})


@pytest.mark.parametrize(
    "border",
    [
        {"granularity": "channel", "fusion": "none"},
        {"alpha": "learned"},
        {"alpha": "learned", "form": "linear", "bound": "clip", "input_gradient": False},
        {"fusion": "none"},
        {"granularity": "channel"},
    ],
)
def test_meaningful_borders_are_taken(border: dict[str, Any]) -> None:
    config = QuantizationConfig.model_validate(W2A2 | {"border": border})
    assert border.items() <= config.border.model_dump().items()


def test_layer_overrides() -> None:
    config = QuantizationConfig.model_validate(W2A2 | {"layers": {"conv1": {"weight_bits": 4}, "fc": {}}})
    assert config.layers == {"conv1": LayerOverride(weight_bits=4), "fc": LayerOverride()}
    with pytest.raises(ValidationError, match=r"layers\.conv1\.weight_bits\n.*got 9"):
        QuantizationConfig.model_validate(W2A2 | {"layers": {"conv1": {"weight_bits": 9}}})
    with pytest.raises(ValidationError, match=r"layers\.conv1\.bits\n.*not permitted"):
        QuantizationConfig.model_validate(W2A2 | {"layers": {"conv1": {"bits": 4}}})
    with pytest.raises(ValidationError, match=r"layers\n.*at most 4096"):
        QuantizationConfig.model_validate(W2A2 | {"layers": {f"layer{i}": {} for i in range(4097)}})


def test_a_configuration_survives_json_and_does_not_change() -> None:
    config = QuantizationConfig.model_validate(
        W2A2 | {"method": "nearest", "seed": 2**63 - 1, "iterations": 7, "border": {"alpha": "learned"},
                "layers": {"fc": {"activation_bits": 32}}}
    )  # fmt: skip
    assert QuantizationConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


FUSED, NOT_FUSED = "channel_mean", "none"
FUSION: list[tuple[dict[str, Any], str]] = [
    ({}, NOT_FUSED),
    ({"preset": "smoke"}, NOT_FUSED),
    ({"preset": "fast"}, NOT_FUSED),
    ({"preset": "paper"}, FUSED),
    ({"preset": "paper", "border": {"form": "linear"}}, FUSED),
    ({"preset": "fast", "border": {"bound": "clip"}}, NOT_FUSED),
    ({"preset": "fast", "border": {"alpha": "learned"}}, FUSED),
    ({"preset": "paper", "border": {"alpha": "learned"}}, FUSED),
    ({"preset": "paper", "border": {"granularity": "channel"}}, NOT_FUSED),
    ({"preset": "fast", "border": {"granularity": "channel"}}, NOT_FUSED),
    ({"preset": "paper", "border": {"fusion": NOT_FUSED}}, NOT_FUSED),
    ({"preset": "fast", "border": {"fusion": FUSED}}, FUSED),
    ({"preset": "paper", "border": {"fusion": FUSED}}, FUSED),
]


@pytest.mark.parametrize(("changes", "fusion"), FUSION)
def test_where_nothing_is_said_of_fusion_the_preset_decides(changes: dict[str, Any], fusion: str) -> None:
    document = W2A2 | changes
    before = {key: dict(value) if isinstance(value, dict) else value for key, value in document.items()}
    config = QuantizationConfig.model_validate(document)
    assert config.border.fusion == fusion
    assert document == before
    said = {key: value for key, value in changes.get("border", {}).items() if key != "fusion"}
    assert config.border.model_dump() == BorderConfig(fusion=fusion, **said).model_dump()  # type: ignore[arg-type]


@pytest.mark.parametrize(("changes", "fusion"), FUSION)
def test_a_border_may_be_given_as_such(changes: dict[str, Any], fusion: str) -> None:
    switches = changes.get("border", {})
    if switches.get("granularity") == "channel":
        switches = switches | {"fusion": NOT_FUSED}  # by itself it is refused
    config = QuantizationConfig(**W2A2 | changes | {"border": BorderConfig(**switches)})
    assert config == QuantizationConfig.model_validate(W2A2 | changes)
    assert config.border.fusion == fusion


@pytest.mark.parametrize(("changes", "fusion"), FUSION)
def test_a_stored_configuration_reads_as_it_was(changes: dict[str, Any], fusion: str) -> None:
    config = QuantizationConfig.model_validate(W2A2 | changes)
    stored = config.model_dump_json()
    again = QuantizationConfig.model_validate_json(stored)
    assert again == config
    assert again.model_dump_json() == stored
    assert QuantizationConfig.model_validate(config.model_dump(mode="json")) == config
    # Stored is what was chosen: with another preset it would be what it is.
    other = config.model_dump() | {"preset": "paper" if config.preset != "paper" else "fast"}
    assert QuantizationConfig.model_validate(other).border.fusion == fusion


PROTOCOL_TABLE = {  # docs/method.md
    "paper": ("high", "high", "high", "low", "float"),
    "qdrop": ("high", "float", "high", "low", "low"),
    "brecq": ("high", "float", "low", "high", "low"),
    "all-low-bit": ("low", "low", "low", "low", "low"),
}


def test_protocols_are_the_documented_ones() -> None:
    assert set(PROTOCOLS) == set(get_args(ProtocolName))
    assert {name: tuple(protocol.model_dump().values()) for name, protocol in PROTOCOLS.items()} == PROTOCOL_TABLE
    assert tuple(Protocol.model_fields) == (
        "first_last_weights", "model_input", "last_layer_input", "second_layer_input", "shortcut",
    )  # fmt: skip


@pytest.mark.parametrize("protocol", get_args(ProtocolName))
def test_switches_go_over_the_protocol(protocol: ProtocolName) -> None:
    plain = QuantizationConfig.model_validate(W2A2 | {"protocol": protocol})
    assert plain.resolved_protocol == PROTOCOLS[protocol]
    for switch, value in PROTOCOLS[protocol].model_dump().items():
        other = next(choice for choice in ("low", "high", "float") if choice != value and switch_takes(switch, choice))
        config = QuantizationConfig.model_validate(W2A2 | {"protocol": protocol, "protocol_switches": {switch: other}})
        assert config.resolved_protocol == PROTOCOLS[protocol].model_copy(update={switch: other})
        unsaid = QuantizationConfig.model_validate(W2A2 | {"protocol": protocol, "protocol_switches": {switch: None}})
        assert unsaid.resolved_protocol == PROTOCOLS[protocol]


def switch_takes(switch: str, value: str) -> bool:
    return value in get_args(Protocol.model_fields[switch].annotation)


@pytest.mark.parametrize(
    ("switches", "path"),
    [
        ({"shortcut": "high"}, "protocol_switches.shortcut"),
        ({"first_last_weights": "float"}, "protocol_switches.first_last_weights"),
        ({"images": "float"}, "protocol_switches.images"),
    ],
)
def test_a_refused_switch_is_named(switches: dict[str, str], path: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(path)):
        QuantizationConfig.model_validate(W2A2 | {"protocol_switches": switches})


def test_methods_to_compare() -> None:
    others = [method for method in get_args(Method) if method != "aquant"]
    assert QuantizationConfig.model_validate(W2A2 | {"compare": others}).compare == others
    assert QuantizationConfig.model_validate(W2A2 | {"method": "qdrop", "compare": ["aquant"]}).method == "qdrop"
    with pytest.raises(ValidationError, match=r"compare\.1\n.*'gptq'"):
        QuantizationConfig.model_validate(W2A2 | {"compare": ["qdrop", "gptq"]})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"compare": ["aquant"]}, "aquant"),
        ({"method": "brecq", "compare": ["qdrop", "brecq"]}, "brecq"),
        ({"compare": ["qdrop", "nearest", "qdrop"]}, "qdrop"),
    ],
)
def test_no_method_runs_twice(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError, match=f'compare: "{name}" would run twice'):
        QuantizationConfig.model_validate(W2A2 | changes)


def test_borders_are_stored_in_16_bits_or_8() -> None:
    assert BorderConfig().bits == 16
    assert BorderConfig(bits=8).bits == 8
    with pytest.raises(ValidationError, match="bits"):
        BorderConfig(bits=4)


def test_a_target_stands_in_for_the_widths() -> None:
    target = {"max_accuracy_drop": 0.5}
    config = QuantizationConfig.model_validate({"target": target})
    assert (config.weight_bits, config.activation_bits) == (2, 2)
    assert config.target == Target(max_accuracy_drop=0.5)
    assert QuantizationConfig.model_validate({"target": target, "weight_bits": 3}).weight_bits == 3
    assert QuantizationConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match=r"weight_bits\n.*required"):
        QuantizationConfig.model_validate({"target": None})
    schema = QuantizationConfig.model_json_schema()
    assert schema["anyOf"] == [{"required": ["weight_bits", "activation_bits"]}, {"required": ["target"]}]
    assert not {"weight_bits", "activation_bits"} & set(schema["required"])


@pytest.mark.parametrize("drop", [-0.1, 100.5, "little", None, float("nan"), float("inf")])
def test_a_drop_is_a_percentage(drop: Any) -> None:
    with pytest.raises(ValidationError, match=r"target\.max_accuracy_drop"):
        QuantizationConfig.model_validate({"target": {"max_accuracy_drop": drop}})


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"compare": ["qdrop"]}, 'compare: methods are compared at given widths, which "target" is to find'),
        ({"weight_bits": 32}, 'target: with "weight_bits" 32 no width would make the network smaller'),
    ],
)
def test_what_makes_no_sense_with_a_target_is_refused(changes: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(refusal)):
        QuantizationConfig.model_validate({"target": {"max_accuracy_drop": 1}} | changes)
    QuantizationConfig.model_validate({"target": {"max_accuracy_drop": 1}, "activation_bits": 32})


def test_lists_of_json_are_taken_where_nothing_else_is_coerced() -> None:
    preprocess = {"size": [8, 9], "crop": [8, 8], "mean": [0.5], "std": [0.25]}
    text = json.dumps({"weight_bits": 2, "activation_bits": 2, "preprocess": preprocess})
    read = QuantizationConfig.model_validate_json(text, strict=True)
    assert read == QuantizationConfig.model_validate_json(text)
    assert read.preprocess is not None
    assert (read.preprocess.size, read.preprocess.mean) == ((8, 9), (0.5,))
    with pytest.raises(ValidationError, match="dry_run"):
        QuantizationConfig.model_validate_json(text[:-1] + ', "dry_run": "yes"}', strict=True)
