"""The commands that repeat a run say what the run was told, whatever that was."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquant_core.config import QuantizationConfig
from aquant_core.report.commands import Sources, brief, repeat
from service.client.exchanges import DEFAULT_URL

CONFIGS = st.fixed_dictionaries(
    {"weight_bits": st.sampled_from([2, 4, 8, 32]), "activation_bits": st.sampled_from([2, 3, 32])},
    optional={
        "preset": st.sampled_from(["smoke", "fast", "paper"]),
        "seed": st.integers(0, 2**63 - 1),
        "border": st.sampled_from(
            [{"fusion": "channel_mean"}, {"fusion": "none"}, {"alpha": "learned"}, {"granularity": "channel"}]
        ),
        "layers": st.sampled_from([{"it's": {"weight_bits": 4}}]),
        "protocol_switches": st.sampled_from([{"shortcut": "low"}]),
        "compare": st.sampled_from([["qdrop"], ["nearest", "brecq"]]),
        "sensitivity": st.booleans(),
    },
)


@given(CONFIGS)
def test_they_hold_the_same_configuration(values: dict[str, Any]) -> None:
    config = QuantizationConfig.model_validate(values)
    assert QuantizationConfig.model_validate(brief(config)) == config
    commands = repeat(config, Sources())
    words = shlex.split(commands["command"])
    assert QuantizationConfig.model_validate_json(words[words.index("--config") + 1]) == config
    fields = [word for word in shlex.split(commands["curl"]) if word.startswith("config=")]
    assert QuantizationConfig.model_validate_json(fields[0].removeprefix("config=")) == config


def test_what_was_not_said_is_not_repeated() -> None:
    config = QuantizationConfig(weight_bits=2, activation_bits=4, border={"fusion": "channel_mean"})  # type: ignore[arg-type]
    assert brief(config) == {
        "method": "aquant", "preset": "fast", "seed": 0, "weight_bits": 2, "activation_bits": 4,
        "border": {"fusion": "channel_mean"},
    }  # fmt: skip


@pytest.mark.parametrize("evaluation", [None, "my images.npz"])
def test_files_are_named_and_quoted(evaluation: str | None) -> None:
    config = QuantizationConfig(weight_bits=2, activation_bits=2)
    commands = repeat(config, Sources("a b.onnx", "c;d.npz", evaluation))
    words = shlex.split(commands["command"])
    expected = ["aquant", "quantize", "a b.onnx", "--calibration", "c;d.npz"]
    assert words[:5] == expected
    assert ("--evaluation" in words) == (evaluation is not None)
    form = shlex.split(commands["curl"])
    assert "model=@a b.onnx" in form
    assert ("evaluation=@my images.npz" in form) == (evaluation is not None)
    assert json.loads(form[2].removeprefix("config="))["weight_bits"] == 2


@pytest.mark.parametrize("url", [None, "https://quant.example.org"])
def test_the_request_goes_where_the_command_line_asks(url: str | None) -> None:
    curl = repeat(QuantizationConfig(weight_bits=2, activation_bits=2), Sources("it's.onnx"))["curl"]
    environment = {"PATH": os.environ["PATH"]} | ({} if url is None else {"AQUANT_URL": url})
    program = ["sh", "-c", f'curl() {{ printf "%s\\n" "$@"; }}; {curl}']
    words = subprocess.run(program, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert words[-1] == f"{url or DEFAULT_URL}/jobs"
    assert "model=@it's.onnx" in words
