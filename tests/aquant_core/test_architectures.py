"""The catalogue of networks: names, sizes, and weights that fit or are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aquant_core.architectures import architecture_names, build, build_from_state_dict
from aquant_core.errors import ModelFormatError, UnknownArchitectureError, WeightsMismatchError

SMALL = "squeezenet1_1"


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def state_of(name: str, classes: int = 1000) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(build(name, classes).state_dict())


def test_the_papers_networks_are_in_the_catalogue() -> None:
    names = architecture_names()
    assert names == sorted(set(names))
    paper = {"resnet18", "resnet50", "mobilenet_v2", "regnet_x_600mf", "regnet_x_3_2gf", "mnasnet2_0"}
    assert paper <= set(names)


@pytest.mark.parametrize(
    ("name", "millions"),
    # Published sizes: torchvision's table; RegNetX-600MF from Radosavovic et al. 2020, table 4.
    [("resnet18", 11.7), ("mobilenet_v2", 3.5), ("regnet_x_600mf", 6.2), ("regnet_x_3_2gf", 15.3)],
)
def test_sizes(name: str, millions: float) -> None:
    model = build(name)
    assert not model.training
    assert round(parameters(model) / 1e6, 1) == millions


def test_regnet_x_600mf_has_the_published_widths_and_depths() -> None:
    state = build("regnet_x_600mf").state_dict()
    widths = [state[f"trunk_output.block{i}.block{i}-0.proj.0.weight"].shape[0] for i in range(1, 5)]
    depths = [len({k.split(".")[2] for k in state if k.startswith(f"trunk_output.block{i}.")}) for i in range(1, 5)]
    assert widths == [48, 96, 240, 528]
    assert depths == [1, 3, 5, 7]


def test_mnasnet2_0_doubles_the_widths() -> None:
    state = build("mnasnet2_0").state_dict()
    assert state["layers.0.weight"].shape == (64, 3, 3, 3)
    assert state["classifier.1.weight"].shape == (1000, 1280)


def test_the_number_of_classes_can_be_chosen() -> None:
    assert build("resnet18", 7).state_dict()["fc.weight"].shape == (7, 512)


def test_an_unknown_name_offers_its_neighbours() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"'resnet_18' is not known.*resnet18"):
        build("resnet_18")
    with pytest.raises(UnknownArchitectureError, match="submit ONNX"):
        build("zzzz")


@pytest.mark.parametrize("classes", [1000, 10])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_taken_whatever_the_classes_and_the_wrapper(classes: int, prefix: str) -> None:
    state = state_of("resnet18", classes)
    model = build_from_state_dict("resnet18", {prefix + key: value for key, value in state.items()})
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_files_order_does_not_matter() -> None:
    state = state_of("resnet18", 10)
    model = build_from_state_dict("resnet18", dict(reversed(state.items())))
    assert torch.equal(model.state_dict()["fc.weight"], state["fc.weight"])


def test_the_norms_batch_counters_may_be_missing() -> None:
    state = {k: v for k, v in state_of("resnet18").items() if not k.endswith("num_batches_tracked")}
    build_from_state_dict("resnet18", state)


def test_a_network_whose_classifier_is_a_convolution() -> None:
    state = state_of(SMALL, 10)
    assert torch.equal(
        build_from_state_dict(SMALL, state).state_dict()["classifier.1.weight"], state["classifier.1.weight"]
    )


def test_missing_extra_and_reshaped_weights_are_named() -> None:
    state = state_of(SMALL)
    lacking = {key: value for key, value in state.items() if key != "features.0.bias"}
    with pytest.raises(WeightsMismatchError, match=r"do not fit squeezenet1_1: 1 missing: features\.0\.bias\."):
        build_from_state_dict(SMALL, lacking)
    with pytest.raises(WeightsMismatchError, match="1 unexpected: ema"):
        build_from_state_dict(SMALL, state | {"ema": torch.zeros(1)})
    reshaped = state | {"features.0.weight": torch.zeros(64, 1, 3, 3)}
    with pytest.raises(
        WeightsMismatchError, match=r"features\.0\.weight is \(64, 1, 3, 3\) instead of \(64, 3, 3, 3\)"
    ):
        build_from_state_dict(SMALL, reshaped)


def test_another_networks_weights_are_refused_in_a_short_message() -> None:
    with pytest.raises(WeightsMismatchError, match=r"missing: .*, \.\.\.; .*unexpected: ") as refused:
        build_from_state_dict("resnet18", state_of(SMALL))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("state", [{"model": {"fc.weight": 1}}, {"epoch": 3}, {3: torch.zeros(1)}])
def test_a_training_checkpoint_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ModelFormatError, match="something other than tensors"):
        build_from_state_dict("resnet18", state)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_are_built_without_them(name: str) -> None:
    assert not [key for key in build(name).state_dict() if "aux" in key.lower()]


def test_a_network_that_asks_for_its_layouts_version_takes_plain_tensors() -> None:
    # As a file has them: MNASNet looks for the version that its own state_dict() carries.
    state = dict(build("mnasnet2_0").state_dict())
    taken = build_from_state_dict("mnasnet2_0", state).state_dict()
    assert all(torch.equal(tensor, taken[name]) for name, tensor in state.items())
