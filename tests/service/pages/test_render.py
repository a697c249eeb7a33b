"""What a job is called, so that it can be told from others."""

from __future__ import annotations

from typing import Any

import pytest

from aquant_core.config import QuantizationConfig
from service.pages.render import title_of


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "AQuant, W2A4"),
        ({"layers": {"conv1": {"weight_bits": 4}}}, "AQuant, W2A4, conv1 at 4/4"),
        ({"layers": {"conv1": {"weight_bits": 2}, "fc": {}}}, "AQuant, W2A4"),
        ({"layers": {"a": {"weight_bits": 4}, "b": {"activation_bits": 32}}}, "AQuant, W2A4, 2 layers at other bits"),
        ({"layers": {"a": {"activation_bits": 32}}}, "AQuant, W2A4, a at 2/float"),
        ({"layers": {"l" * 50: {"weight_bits": 4}}}, f"AQuant, W2A4, {'l' * 40}… at 4/4"),
        ({"seed": 3, "dry_run": True, "method": "qdrop"}, "QDrop, W2A4, seed 3, dry run"),
        ({"target": {"max_accuracy_drop": 1}}, "AQuant, bits by target"),
    ],
)
def test_a_title_says_what_differs_from_the_usual(changes: dict[str, Any], title: str) -> None:
    config = QuantizationConfig.model_validate({"weight_bits": 2, "activation_bits": 4, **changes})
    assert title_of(config) == title
