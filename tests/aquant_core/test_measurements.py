"""What is measured of a finished network, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aquant_core.config import BorderConfig
from aquant_core.evaluation import logits_digest, logits_of
from aquant_core.graph import CapturedModel, Node
from aquant_core.measurements import BORDER_SLOTS, HISTOGRAM_BINS, clipped_shares, measure, measured_images
from aquant_core.model import QuantizedModel
from aquant_core.partition import partition
from aquant_core.quantizers import UniformGrid, WeightRounding

X = torch.tensor([[[[0.4, 1.6]], [[5.0, 0.0]]]])  # (1, 2, 1, 2)
GEOMETRY = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
CLIP = BorderConfig(form="linear", bound="clip", fusion="none")


def network(
    weight: Tensor, padding: int = 0, bits: int = 2, scale: float = 1.0, zero_point: int = 0
) -> tuple[QuantizedModel, CapturedModel]:
    """One convolution whose input is quantized."""
    node = Node("conv", "conv2d", ("input",), GEOMETRY | {"padding": [padding, padding]})
    graph = CapturedModel([node], {"conv": {"weight": weight}})
    model = QuantizedModel(graph)
    grid = UniformGrid(torch.tensor(scale), torch.tensor(zero_point), 2**bits - 1)
    model.layers["conv"].quantize_activation(grid, bits)
    return model, graph


def measured(model: QuantizedModel, images: Tensor) -> tuple[dict, dict, list[float]]:
    seen = measure(model, partition(model.graph), images)
    return seen.layers["conv"], seen.inputs["conv"], seen.block_errors


def test_one_convolution_by_hand() -> None:
    model, _ = network(torch.tensor([0.9, -0.6]).reshape(1, 2, 1, 1))
    layer = model.layers["conv"]
    grid = UniformGrid(torch.tensor([[0.5]]), torch.tensor([[1.0]]), 3)
    layer.weight, layer.weight_bits = WeightRounding.nearest(layer.float_weight, grid), 2  # 1.0 and -0.5
    of_layer, of_input, errors = measured(model, X)
    # 2 windows of 2 inputs. Weights: 1.17 over 0.02. Outputs -2.64 and 1.44 became -1.5 and 2: 9.0432 over 1.6132.
    assert of_layer == {"macs": 4, "weight_sqnr_db": 17.672, "output_sqnr_db": 7.486}
    assert errors == [pytest.approx(1.6132 / 2, rel=1e-5)]
    # Codes 0, 2, 3 (of 5.0, beyond 3.5) and 0: 27.72 over 0.16 + 0.16 + 4.
    assert of_input["sqnr_db"] == 8.073
    assert of_input["clipped_share"] == 0.25
    assert of_input["dead_channels"] == {"float": 0, "quantized": 0}
    assert (of_input["border_shift"], of_input["border_evaluations"]) == (None, 0)
    assert of_input["distribution"]["edges"] == [0.5, 1.5, 2.5]
    assert (of_input["distribution"]["low"], of_input["distribution"]["high"]) == (0, 3)
    assert clipped_shares(model, X) == {"conv": 0.25}


def test_a_border_by_hand() -> None:
    model, _ = network(torch.ones(1, 2, 1, 1))
    border = model.layers["conv"].add_border(CLIP)
    with torch.no_grad():
        border.coefficients.copy_(torch.tensor([0.25, -0.5])[:, None, None].expand(2, 2, 1))
    of_input = measured(model, X)[1]
    # B - 1/2 = 1/4 - u / 2 at u = 0.4 / 3, 1.6 / 3, 1 (clipped) and 0: 0.18333, -0.01667, -0.25 and 0.25.
    assert of_input["border_shift"] == {"mean": 0.0416667, "std": pytest.approx(0.1949, abs=2e-6)}
    assert of_input["border_evaluations"] == 4
    assert of_input["distribution"]["edges"] == pytest.approx([0.68333, 1.48333, 2.5], abs=1e-5)
    shift = of_input["distribution"]["shift"]
    assert len(shift["mean"]) == len(shift["std"]) == 24
    known = {index: value for index, value in enumerate(shift["mean"]) if value is not None}
    assert known == {3: pytest.approx(0.183333, abs=1e-6), 12: pytest.approx(-0.0166667, abs=1e-6)}  # 0.4 and 1.6 by 8


def test_padded_slots_do_not_count_as_activations() -> None:
    model, _ = network(torch.ones(1, 1, 3, 3), padding=1)
    border = model.layers["conv"].add_border(CLIP)
    with torch.no_grad():
        border.coefficients.zero_()
        border.coefficients[0] = 0.4
        border.coefficients[0, 0, 4] = 0.25  # the only position of the window that sees the one pixel
    of_input = measured(model, torch.tensor([[[[0.7]]]]))[1]
    assert of_input["border_shift"] == {"mean": 0.25, "std": 0.0}
    assert of_input["border_evaluations"] == 9
    assert of_input["sqnr_db"] == pytest.approx(0.0)  # 0.7 is below B = 3/4


def test_channels_that_quantization_kills() -> None:
    model, _ = network(torch.ones(1, 3, 1, 1))
    x = torch.tensor([[0.2, 0.3], [0.2, 2.0], [0.0, 0.0]]).reshape(1, 3, 1, 2)
    assert measured(model, x)[1]["dead_channels"] == {"float": 1, "quantized": 2}


def test_histogram_counts_every_input_once() -> None:
    model, _ = network(torch.ones(1, 1, 3, 3), padding=1, scale=0.5, zero_point=1)
    x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2
    x[0] = 0
    of_input = measured(model, x)[1]
    distribution = of_input["distribution"]
    beyond = (x < -0.75) | (x > 1.25)  # codes 0 to 3 stand for -0.5 to 1
    assert of_input["clipped_share"] == pytest.approx(float(beyond.float().mean()), abs=1e-6)
    assert (distribution["low"], distribution["high"]) == (-0.5, 1.0)
    histogram = distribution["histogram"]
    assert (histogram["low"], histogram["high"]) == (-1.0, 2.0)  # t from -1 to 5
    assert len(histogram["counts"]) == HISTOGRAM_BINS
    edges = torch.linspace(-1, 2, HISTOGRAM_BINS + 1)
    expected = torch.histogram(x[x != 0], edges).hist.tolist()
    assert sum(abs(a - b) for a, b in zip(histogram["counts"], expected, strict=True)) <= 2  # on an edge
    assert (histogram["zeros"], histogram["below"], histogram["above"]) == (36, int((x < -1).sum()), int((x > 2).sum()))


@pytest.mark.parametrize(("bits", "bins", "edges"), [(2, 24, 3), (3, 21, 7), (4, 30, 15), (8, 24, 0)])
def test_the_size_of_what_is_told_does_not_grow_with_the_bits(bits: int, bins: int, edges: int) -> None:
    model, _ = network(torch.ones(1, 2, 1, 1), bits=bits, scale=1 / 2**bits)
    model.layers["conv"].add_border(CLIP)
    distribution = measured(model, X)[1]["distribution"]
    assert (len(distribution["shift"]["mean"]), len(distribution["edges"])) == (bins, edges)


def test_what_is_measured_is_bounded() -> None:
    assert len(measured_images(torch.empty(5000, 1, 32, 32, device="meta"))) == 64
    assert len(measured_images(torch.empty(5000, 3, 224, 224, device="meta"))) == 8
    model, _ = network(torch.ones(1, 4, 3, 3), padding=1)
    model.layers["conv"].add_border(CLIP)
    x = torch.rand(64, 4, 60, 60, generator=torch.Generator().manual_seed(0))
    of_input = measured(model, x)[1]
    assert of_input["border_evaluations"] == 4 * 9 * 3600
    assert of_input["border_evaluations"] * 64 > 10 * BORDER_SLOTS  # so not all of it went into the shift
    total = sum(of_input["distribution"]["histogram"][key] for key in ("below", "above", "zeros"))
    assert total + sum(of_input["distribution"]["histogram"]["counts"]) == x.numel()


def test_a_float_network_has_no_noise_and_nothing_is_changed() -> None:
    node = Node("fc", "linear", ("input",))
    model = QuantizedModel(CapturedModel([node], {"fc": {"weight": torch.eye(3)}}))
    x = torch.rand(5, 3)
    seen = measure(model, partition(model.graph), x[:, :, None, None].expand(5, 3, 1, 3))
    assert seen.layers["fc"] == {"macs": 27, "weight_sqnr_db": None, "output_sqnr_db": 200.0}
    assert seen.inputs == {}
    conv, _ = network(torch.ones(1, 2, 1, 1))
    before = logits_digest(logits_of(conv, X))
    measured(conv, X)
    assert logits_digest(logits_of(conv, X)) == before
