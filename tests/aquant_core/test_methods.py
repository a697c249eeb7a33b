"""The table of methods and presets agrees with the configuration's names and with the paper."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from aquant_core.config import Method, PresetName
from aquant_core.methods import METHODS, PRESETS


def test_every_configurable_name_has_settings_and_no_other() -> None:
    assert set(METHODS) == set(get_args(Method))
    assert set(PRESETS) == set(get_args(PresetName))


def test_what_learns_nothing() -> None:
    assert [name for name, settings in METHODS.items() if not settings.reconstruct] == ["nearest", "a_rounding"]


def test_only_aquant_learns_borders() -> None:
    assert [name for name, settings in METHODS.items() if settings.border] == ["aquant"]


def test_where_quantization_is_dropped() -> None:
    dropping = {name: (m.drop_input, m.drop_inside, m.rounding_schedule) for name, m in METHODS.items()}
    assert dropping["qdrop_refactored"] == (0.5, 0.5, False)
    assert dropping["aquant_no_border"] == (0.5, 0.0, True)
    assert dropping["aquant"] == (0.5, 0.0, True)


def test_weight_rounding_of_appendix_c() -> None:
    aquant, plain = METHODS["aquant"], METHODS["aquant_no_border"]
    assert (aquant.regulariser_weight, aquant.first_beta, aquant.last_beta) == (0.05, 16.0, 2.0)
    assert (plain.regulariser_weight, plain.first_beta, plain.last_beta) == (0.01, 20.0, 2.0)


def test_paper_preset_is_section_5s() -> None:
    paper = PRESETS["paper"]
    assert (paper.iterations, paper.batch_size) == (20_000, 32)
    assert (paper.border_rate, paper.scale_rate, paper.rounding_rate) == (1e-3, 4e-5, 3e-3)


def test_presets_rise_in_cost() -> None:
    assert PRESETS["smoke"].iterations < PRESETS["fast"].iterations < PRESETS["paper"].iterations


def test_tables_cannot_be_changed_by_a_run() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["fast"].iterations = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHODS["aquant"].border = False  # type: ignore[misc]
