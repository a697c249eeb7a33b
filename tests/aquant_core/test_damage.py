"""What one quantized layer does to the logits: against a network quantized by other means, and its order."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from aquant_core.capture_model import capture
from aquant_core.config import LayerOverride, Method, QuantizationConfig
from aquant_core.damage import damages
from aquant_core.evaluation import logits_of
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import CapturedModel
from aquant_core.methods import PRESETS, settings_of
from aquant_core.model import quantize_to_nearest
from aquant_core.reconstruction import Schedule
from aquant_core.resources import Resources
from aquant_core.widths import Widths, choices


class Net(nn.Module):
    """A stem, a residual block, and a classifier behind a block without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


LAYERS = ["stem", "first", "second", "fc"]
IMAGES = torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def graph() -> CapturedModel:
    torch.manual_seed(0)
    return fold_batch_norm(capture(Net().eval(), example=IMAGES[:2]))


def measured(
    graph: CapturedModel, offered: dict[str, list[Widths]], method: Method = "aquant", seed: int = 0
) -> dict[str, list[float]]:
    preset = PRESETS["fast"]
    schedule = Schedule(
        settings_of(method, preset), preset, QuantizationConfig(weight_bits=2, activation_bits=2).border
    )
    return damages(graph, offered, IMAGES, schedule, seed, Resources(), "memory", lambda *_: None)


@pytest.mark.parametrize("method", ["nearest", "a_rounding"])
@pytest.mark.parametrize("layer", LAYERS)
def test_without_learning_it_is_the_error_of_a_network_with_one_quantized_layer(
    graph: CapturedModel, layer: str, method: Method
) -> None:
    override = LayerOverride(weight_bits=2, activation_bits=3)
    config = QuantizationConfig(weight_bits=32, activation_bits=32, layers={layer: override})
    model = quantize_to_nearest(graph, IMAGES, config)
    model.layers[layer].a_rounding = method == "a_rounding"
    exact = logits_of(graph, IMAGES)
    error = (logits_of(model, IMAGES) - exact).double().square().sum() / exact.double().square().sum()
    (damage,) = measured(graph, {layer: [(2, 3)]}, method)[layer]
    assert damage == pytest.approx(float(error), rel=1e-4)
    assert damage > 1e-4


def test_more_bits_do_less_damage_and_learning_takes_some_away(graph: CapturedModel) -> None:
    offered = {name: choices((2, 2)) for name in LAYERS}
    learned, nearest = measured(graph, offered), measured(graph, offered, "nearest")
    assert list(learned) == LAYERS
    for name in LAYERS:
        assert learned[name] == sorted(learned[name], reverse=True)
        assert learned[name][-1] < 1e-3
    at_two_bits = [sum(found[name][0] for name in LAYERS) for found in (learned, nearest)]
    assert at_two_bits[0] < 0.9 * at_two_bits[1]


def test_a_float_layer_does_none(graph: CapturedModel) -> None:
    assert measured(graph, {"first": [(32, 32)], "fc": []}) == {"first": [0.0], "fc": []}


def test_a_layer_is_measured_alike_whoever_is_measured_beside_it(graph: CapturedModel) -> None:
    together = measured(graph, {name: [(2, 2), (4, 4)] for name in LAYERS})
    assert measured(graph, {"second": [(4, 4)]})["second"] == together["second"][1:]
    assert measured(graph, {"second": [(2, 2)]}, seed=1)["second"] != together["second"][:1]


def test_it_tells_of_every_try_and_can_be_stopped(graph: CapturedModel) -> None:
    told: list[tuple[int, int]] = []

    def tell(stop: int, begun: int, tries: int) -> None:
        told.append((begun, tries))
        if begun == stop:
            raise InterruptedError

    preset = PRESETS["fast"]
    border = QuantizationConfig(weight_bits=2, activation_bits=2).border
    schedule = Schedule(settings_of("nearest", preset), preset, border)
    offered: dict[str, list[Widths]] = {"stem": [(2, 2)], "first": [(2, 2), (3, 3)], "second": [(2, 2)]}
    with pytest.raises(InterruptedError):
        damages(graph, offered, IMAGES, schedule, 0, Resources(), "memory", partial(tell, 3))
    assert told == [(1, 4), (2, 4), (3, 4)]
