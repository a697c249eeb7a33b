"""A captured torch module computes what the module computes; what cannot be captured is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquant_core.architectures import build
from aquant_core.capture_torch import capture_module
from aquant_core.errors import ModelFormatError, NonFiniteError, UnsupportedOperatorError, memory_is_full


def images(count: int = 3, channels: int = 4, size: int = 9, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A convolution of 4 channels, then ``body`` on its value, then whatever ``body`` leaves."""

    def __init__(self, body: Callable[[Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x))


def assert_reproduced(model: nn.Module, count: int = 3, size: int = 9) -> list[str]:
    """Captures on one batch, compares on another of another length; gives the operators back."""
    model.eval()
    captured = capture_module(model, images(3, size=size))
    fresh = images(count + 2, size=size, seed=7)
    with torch.inference_mode():
        expected = model(fresh.clone())
    torch.testing.assert_close(captured(fresh), expected)
    assert captured.input_shape == (4, size, size)
    return [node.op for node in captured.nodes]


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Hardswish(),
        nn.Hardsigmoid(), nn.LeakyReLU(0.3), nn.ELU(0.7), nn.GELU(), nn.GELU("tanh"), nn.Softmax(dim=1),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d((2, 3), dilation=(1, 2)), nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d((2, 3)), nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((None, 3)), nn.Flatten(), nn.Flatten(2), nn.Dropout(), nn.Identity(),
        nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False, eps=0.1),
        nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.Conv2d(4, 8, (3, 2), padding=(2, 1), dilation=2, groups=4),
        nn.Conv2d(4, 4, (3, 5), padding="same", dilation=(2, 1)), nn.Conv2d(4, 4, 2, padding="valid"),
        nn.Linear(9, 5), nn.Linear(9, 5, bias=False),
    ],
    ids=repr,
)  # fmt: skip
def test_modules(module: nn.Module) -> None:
    if isinstance(module, nn.BatchNorm2d):
        assert module.running_mean is not None
        assert module.running_var is not None
        module.running_mean.uniform_(-1, 1)
        module.running_var.uniform_(0.5, 2)
    assert_reproduced(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), module))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: F.relu(x, inplace=True),
    "torch_relu": torch.relu,
    "method_relu": lambda x: x.relu(),
    "relu6": F.relu6,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "softmax": lambda x: F.softmax(x, dim=1),
    "method_softmax": lambda x: x.softmax(1),
    "clamp": lambda x: torch.clamp(x, -0.1, 0.2),
    "clamp_min": lambda x: x.clamp(min=-0.1),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1, False, False),
    "avg_pool2d_divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (2, 2)),
    "flatten": lambda x: torch.flatten(x, 1),
    "method_flatten": lambda x: x.flatten(start_dim=2),
    "view": lambda x: x.view(x.size(0), -1),
    "view_of_shape": lambda x: x.view(x.shape[0], 2, -1),
    "reshape": lambda x: torch.reshape(x, (-1, 4 * 81)),
    "mean": lambda x: x.mean([2, 3]),
    "mean_keepdim": lambda x: torch.mean(x, dim=(2, 3), keepdim=True),
    "mean_of_one": lambda x: x.mean(-1),
    "add": lambda x: x + F.relu(x),
    "torch_add": lambda x: torch.add(x, F.relu(x)),
    "subtract": lambda x: x - F.relu(x),
    "multiply": lambda x: x * torch.sigmoid(x),
    "divide": lambda x: x / (1 + torch.sigmoid(x)),
    "in_place": lambda x: x.mul(2).add(1),
    "constants": lambda x: 2 * x / 3 - 1,
    "concat": lambda x: torch.cat([x, F.relu(x), x], 1),
    "concat_dim": lambda x: torch.cat((x, F.relu(x)), dim=3),
    "transpose": lambda x: x.transpose(1, 3),
    "permute": lambda x: torch.permute(x, (0, 2, 3, 1)),
    "method_permute": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "chunk": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], 1),
    "pad": lambda x: F.pad(x, (0, 1, 2, 1)),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "shuffle": lambda x: x.view(x.size(0), 2, 2, 9, 9).transpose(1, 2).contiguous().view(x.size(0), 4, 9, 9),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    assert_reproduced(Net(FUNCTIONS[name]))


def test_values_nobody_reads_are_left_out() -> None:
    def body(x: Tensor) -> Tensor:
        F.max_pool2d(x, 2)
        return F.relu(x)

    assert assert_reproduced(Net(body)) == ["conv2d", "relu"]


def test_a_module_used_twice_is_two_nodes_with_the_same_weights() -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    captured = capture_module(nn.Sequential(shared, nn.ReLU(), shared).eval(), images())
    first, second = captured.layers
    assert first.name != second.name
    assert torch.equal(captured.weights[first.name]["weight"], captured.weights[second.name]["weight"])


def test_layers_keep_their_module_paths() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Flatten(), nn.Linear(4 * 81, 2))
    assert [node.name for node in capture_module(model, images()).layers] == ["0.0", "2"]


def test_the_captured_weights_are_copies_in_float32() -> None:
    model = nn.Sequential(nn.Conv2d(4, 2, 1)).double()
    captured = capture_module(model, images())
    before = captured.weights["0"]["weight"].clone()
    with torch.no_grad():
        model[0].weight.zero_()
    assert captured.weights["0"]["weight"].dtype == torch.float32
    assert torch.equal(captured.weights["0"]["weight"], before)


def test_the_modules_modes_are_put_back() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    model.train()
    model[1].eval()
    assert [n.op for n in capture_module(model, images()).nodes] == ["conv2d", "batch_norm"]
    assert [module.training for module in model] == [True, False, True]


def test_an_optional_second_input_keeps_its_default() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return self.first(x) * scale

    assert_reproduced(Optional())


def lively(name: str, size: int) -> nn.Module:
    """A network whose norms have the statistics and the spread of a trained one, so that outputs are not 0."""
    torch.manual_seed(0)
    model = build(name, num_classes=20)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.uniform_(module.bias, -0.5, 0.5)
        module.momentum = 1.0
        module.train()
    with torch.no_grad():
        model(torch.randn(8, 3, size, size))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32), ("mobilenet_v2", 32), ("densenet121", 32), ("googlenet", 32),
        ("shufflenet_v2_x1_0", 32), ("efficientnet_b0", 32), ("mnasnet0_5", 32), ("regnet_x_400mf", 32),
        ("regnet_y_400mf", 32), ("mobilenet_v3_small", 32), ("squeezenet1_1", 48),
    ],
)  # fmt: skip
def test_architectures_are_reproduced(name: str, size: int) -> None:
    model = lively(name, size)
    captured = capture_module(model, images(2, 3, size))
    fresh = images(3, 3, size, seed=5)
    with torch.inference_mode():
        expected = model(fresh)
    assert expected.std() > 1e-3  # otherwise the comparison would say nothing
    torch.testing.assert_close(captured(fresh), expected, rtol=1e-4, atol=1e-5)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(captured.layers) == len(layers)


def branching(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), r"Operator ConvTranspose2d at '0'"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), r"Operator GroupNorm at '1'"),
        (nn.Sequential(nn.Conv2d(4, 4, 1, padding_mode="reflect", padding=1)), "padding_mode 'reflect'"),
        (nn.Sequential(nn.Conv2d(4, 4, 2, padding="same")), "padding 'same' and an even kernel at '0'"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), "without running statistics"),
        (Net(lambda x: x.sort(1)[0]), "Operator sort at 'sort'"),
        (Net(lambda x: F.adaptive_max_pool2d(x, 1)), "Operator adaptive_max_pool2d"),
        (Net(lambda x: x[:, 0]), "Operator getitem"),
        (Net(lambda x: torch.add(x, x, alpha=2)), "Operator add"),
        (Net(lambda x: 1 - x), "sub with a constant on the left"),
        (Net(lambda x: F.pad(x, (1, 1, 1, 1), value=1.0)), "Operator pad"),
        (Net(lambda x: F.pad(x, (1, 1, 1, 1), "reflect")), "Operator pad"),
        (Net(branching), "Net cannot be traced"),
        (Net(lambda x: (x, x)), "returns tuple, not one tensor"),  # type: ignore[arg-type, return-value]
        (Net(lambda x: x.view(-1, 81)), r"mixes images of a batch \(of 3\)"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), "no convolution and no linear layer"),
        (nn.Sequential(nn.Identity()), "output has shape"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(0)), r"output has shape \(972,\) for 3 images"),
        (nn.Bilinear(4, 4, 4), "more than one input"),
    ],
)
def test_what_cannot_be_captured_is_named(model: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=reason):
        capture_module(model, images())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[2].bias[1] = bad
    with pytest.raises(NonFiniteError, match=r"Weight 2\.bias holds NaN"):
        capture_module(model, images())


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "conv2d '0'"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(400, 2)), "linear '2'"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(20)), "max_pool2d '1'"),
        (Net(lambda x: x.view(-1, 400)), "reshape 'view'"),
    ],
)
def test_images_that_do_not_fit_name_the_operator_and_the_shape(model: nn.Module, place: str) -> None:
    with pytest.raises(ModelFormatError, match=rf"{place} cannot take inputs of shape \[\(3, .*images have the shape"):
        capture_module(model, images())


def test_a_full_memory_is_no_matter_of_the_images() -> None:
    with pytest.raises(RuntimeError) as caught:
        capture_module(Net(lambda x: F.pad(x, [1 << 20] * 4)), images())
    assert memory_is_full(caught.value)


def test_an_example_that_is_no_batch_is_refused() -> None:
    with pytest.raises(ModelFormatError, match=r"not of shape \(4, 9, 9\)"):
        capture_module(nn.Sequential(nn.Conv2d(4, 4, 1)), images()[0])
