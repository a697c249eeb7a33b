"""The table of methods and presets agrees with the configuration's names and with the paper."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from aquant_core.config import Method, PresetName
from aquant_core.methods import METHODS, PRESETS, MethodSettings, settings_of

COLUMNS = ("learn_weights", "learn_scale", "border", "a_rounding", "placement", "unit", "drop_input", "drop_inside")
# DESIGN, section 3, row by row; what learns nothing has no unit.
TABLE: dict[Method, tuple[object, ...]] = {
    "nearest": (False, False, False, False, "input", "block", 0.0, 0.0),
    "a_rounding": (False, False, False, True, "input", "block", 0.0, 0.0),
    "adaround": (True, False, False, False, "output", "layer", 0.0, 0.0),
    "brecq": (True, True, False, False, "output", "block", 0.0, 0.0),
    "qdrop": (True, True, False, False, "output", "block", 0.5, 0.5),
    "qdrop_refactored": (True, True, False, False, "input", "block", 0.5, 0.5),
    "aquant_no_border": (True, True, False, False, "input", "block", 0.5, 0.0),
    "aquant": (True, True, True, False, "input", "block", 0.5, 0.0),
}


def test_every_configurable_name_has_settings_and_no_other() -> None:
    assert set(METHODS) == set(get_args(Method))
    assert set(PRESETS) == set(get_args(PresetName))


@pytest.mark.parametrize("method", get_args(Method))
def test_each_method_is_its_row_of_the_table(method: Method) -> None:
    settings = METHODS[method]
    assert dict(zip(COLUMNS, TABLE[method], strict=True)) == {name: getattr(settings, name) for name in COLUMNS}
    # The rounding schedule is the paper's own (appendix Eq. 2), and in what isolates the border.
    assert settings.rounding_schedule == method.startswith("aquant")
    assert settings.reconstruct == (method not in ("nearest", "a_rounding"))


def test_weight_rounding_of_appendix_c() -> None:
    aquant, plain = METHODS["aquant"], METHODS["aquant_no_border"]
    assert (aquant.regulariser_weight, aquant.first_beta, aquant.last_beta) == (0.05, 16.0, 2.0)
    assert (plain.regulariser_weight, plain.first_beta, plain.last_beta) == (0.01, 20.0, 2.0)


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop", "qdrop_refactored"])
def test_weight_rounding_of_the_methods_before(method: Method) -> None:
    settings = METHODS[method]
    assert (settings.regulariser_weight, settings.first_beta, settings.last_beta) == (0.01, 20.0, 2.0)


def test_paper_preset_is_section_5s() -> None:
    paper = PRESETS["paper"]
    assert (paper.iterations, paper.batch_size) == (20_000, 32)
    assert (paper.border_rate, paper.scale_rate, paper.rounding_rate) == (1e-3, 4e-5, 3e-3)


@pytest.mark.parametrize("preset", ["paper", "smoke"])
def test_these_presets_run_every_method_as_the_table_has_it(preset: PresetName) -> None:
    settings = PRESETS[preset]
    assert settings.changes == {}
    assert not settings.border_decays
    assert {method: settings_of(method, settings) for method in METHODS} == METHODS


def changed(method: Method, preset: PresetName) -> dict[str, object]:
    before, after = vars(METHODS[method]), vars(settings_of(method, PRESETS[preset]))
    return {name: value for name, value in after.items() if value != before[name]}


def test_the_fast_preset_drops_nothing_and_regularises_less() -> None:
    assert PRESETS["fast"].border_decays
    by_method = {method: changed(method, "fast") for method in METHODS if changed(method, "fast")}
    assert by_method == {
        "aquant": {"drop_input": 0.0, "regulariser_weight": 0.01, "first_beta": 20.0},
        "aquant_no_border": {"drop_input": 0.0},
    }
    # What isolates the border differs in the border alone.
    aquant, plain = (settings_of(method, PRESETS["fast"]) for method in ("aquant", "aquant_no_border"))
    assert aquant == dataclasses.replace(plain, border=True)


def test_a_preset_may_change_what_it_likes_and_the_table_stays() -> None:
    preset = dataclasses.replace(PRESETS["paper"], changes={"qdrop": {"regulariser_weight": 0.1}})
    assert settings_of("qdrop", preset) == dataclasses.replace(METHODS["qdrop"], regulariser_weight=0.1)
    assert settings_of("brecq", preset) == METHODS["brecq"]
    assert METHODS["qdrop"].regulariser_weight == 0.01
    with pytest.raises(TypeError, match="speed"):
        settings_of("qdrop", dataclasses.replace(preset, changes={"qdrop": {"speed": 1}}))


def test_what_learns_anything_is_reconstructed() -> None:
    nothing = MethodSettings(learn_weights=False, learn_scale=False)
    assert not nothing.reconstruct
    for part in ("learn_weights", "learn_scale", "border"):
        assert dataclasses.replace(nothing, **{part: True}).reconstruct


def test_presets_rise_in_cost() -> None:
    assert PRESETS["smoke"].iterations < PRESETS["fast"].iterations < PRESETS["paper"].iterations


def test_tables_cannot_be_changed_by_a_run() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["fast"].iterations = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHODS["aquant"].border = False  # type: ignore[misc]
