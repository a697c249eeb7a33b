"""Iterations that never wait for the device, so that a GPU can replay them; and how their losses are told."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aquant_core import reconstruction
from aquant_core.caches import BlockCache, Cache
from aquant_core.capture_model import capture
from aquant_core.config import BorderConfig, Method, QuantizationConfig
from aquant_core.fold import fold_batch_norm
from aquant_core.methods import METHODS, Preset
from aquant_core.model import QuantizedModel, quantize_to_nearest, run_float_block
from aquant_core.partition import Block, partition
from aquant_core.reconstruction import BlockHistory, BlockLearner, Schedule, reconstruct_block
from aquant_core.replay import LossReadings, Replay
from cupy_kernels.ops import reference_only
from cupy_kernels.specification import Bound

CPU = torch.device("cpu")
LEARNED: list[Method] = ["qdrop_refactored", "aquant_no_border", "aquant"]
PRESET = Preset(15, 4, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)
STEPS = (0, 3, 14)
"""The first, which is in the warm-up, the first after it, and the last."""


class Convolutions(nn.Module):
    """One residual block with an ordinary, a depthwise and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.grouped(torch.relu(self.depthwise(torch.relu(self.first(x))))))


class Classifier(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4 * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1))
        return logits


NETS: dict[str, type[nn.Module]] = {"convolutions": Convolutions, "classifier": Classifier}


def setting(net: str, device: torch.device = CPU) -> tuple[QuantizedModel, Block, BlockCache]:
    """A network quantized to nearest, its one block with layers, and what that is learned from."""
    torch.manual_seed(0)
    images = torch.randn(12, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    graph = fold_batch_norm(capture(NETS[net]().eval(), example=images[:2])).to(device)
    config = QuantizationConfig(weight_bits=2, activation_bits=2, first_last_bits=2)
    model, value = quantize_to_nearest(graph, images, config), images.to(device)
    with torch.no_grad():
        for block in partition(graph):
            target = run_float_block(graph, block, value)
            if block.layers:
                break
            value = target
    noised, clean = (Cache.of(tensor, device) for tensor in (value + 0.1 * value.sin(), value))
    return model, block, BlockCache(noised, clean, Cache.of(target, device))


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a GPU would have to be waited for: values read by the host, or sent by it, and sizes that depend
    on values.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1])
        )
        assert not by_mask, f"{func} by a mask"
        assert name not in WAITING, f"{func} waits"
        assert kwargs.get("device") in (None, CPU), f"{func} moves to {kwargs['device']}"
        self.operations += 1
        return func(*args, **kwargs)


WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2",
    "lift_fresh", "bincount", "_pin_memory",
}  # fmt: skip


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: torch.equal(x, x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0, 2.0, 3.0]) + x,
        lambda x: x.to("meta"),
    ],
)
def test_the_test_itself_sees_waiting(waits: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError), NoWaiting():
        waits(torch.rand(3))


def border_configs() -> Iterator[BorderConfig]:
    kinds: list[dict[str, Any]] = [
        {},
        {"alpha": "learned"},
        {"fusion": "none"},
        {"fusion": "none", "granularity": "channel"},
    ]
    for kind, bound, form in itertools.product(kinds, get_args(Bound), ("quadratic", "linear")):
        yield BorderConfig(**kind, bound=bound, form=form)
    yield BorderConfig(input_gradient=False)


def assert_no_step_waits(net: str, method: Method, border: BorderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step as a GPU would do it: by plain torch, and without Adam, which on a CPU reads its rates."""
    model, block, cache = setting(net)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: None)
    with reference_only():
        learner = BlockLearner(model, block, cache, Schedule(METHODS[method], PRESET, border), torch.Generator())
        for step in STEPS:
            with NoWaiting() as mode:
                learner.step(step)
            assert mode.operations > 30  # it was listening


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", LEARNED)
def test_no_method_waits(method: Method, net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_no_step_waits(net, method, BorderConfig(), monkeypatch)


@pytest.mark.parametrize(
    "border", list(border_configs()), ids=lambda border: border.model_dump_json(exclude_defaults=True)
)
def test_no_border_waits(border: BorderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_no_step_waits("convolutions", "aquant", border, monkeypatch)


@pytest.mark.parametrize("method", LEARNED)
def test_parameters_and_loss_keep_their_addresses(method: Method) -> None:
    """A captured graph writes to where they were."""
    model, block, cache = setting("convolutions")
    learner = BlockLearner(model, block, cache, Schedule(METHODS[method], PRESET, BorderConfig()), torch.Generator())
    parameters = [parameter for layer in model.layers_of(block) for parameter in layer.parameters()]
    assert len(parameters) == (9 if method == "aquant" else 6)
    kept = [tensor.data_ptr() for tensor in (*parameters, learner.loss)]
    losses = set()
    for step in range(PRESET.iterations):
        learner.step(step)
        losses.add(float(learner.loss))
        now = [parameter for layer in model.layers_of(block) for parameter in layer.parameters()]
        assert [tensor.data_ptr() for tensor in (*now, learner.loss)] == kept
    assert len(losses) == PRESET.iterations


@pytest.mark.parametrize("method", LEARNED)
def test_a_learner_is_gone_when_nobody_holds_it(method: Method) -> None:
    """Nothing in it leads back to it, so that its graphs' memory is free for the next block."""
    model, block, cache = setting("convolutions")
    learner = BlockLearner(model, block, cache, Schedule(METHODS[method], PRESET, BorderConfig()), torch.Generator())
    learner._replay = Eager(learner._optimizer, torch.Generator())  # type: ignore[assignment]
    learner.step(0)
    gone = weakref.ref(learner)
    gc.disable()
    try:
        del learner
        assert gone() is None
    finally:
        gc.enable()


def test_losses_on_a_cpu_are_told_at_once_and_in_order() -> None:
    told: list[tuple[int, float]] = []
    loss = torch.zeros(())
    readings = LossReadings(loss, lambda *seen: told.append(seen))
    expected = []
    for step, value in ((0, 2.5), (10, 1.25), (14, 0.5)):
        loss.fill_(value)
        readings.take(step)
        expected.append((step, value))
        assert told == expected
    readings.finish()
    assert told == expected


def test_an_exception_of_the_told_ends_it() -> None:
    def stop(step: int, _: float) -> None:
        raise InterruptedError(step)

    with pytest.raises(InterruptedError):
        LossReadings(torch.zeros(()), stop).take(3)


class Eager:
    """In place of ``Replay``: each iteration launched operation by operation."""

    def __init__(self, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        del optimizer, generator

    def run(self, iterate: Callable[[], None], phase: Hashable) -> None:
        del phase
        iterate()


def learn_on_gpu(net: str, method: Method, border: BorderConfig) -> tuple[dict[str, Tensor], BlockHistory]:
    """What the block has become, on the CPU."""
    device = torch.device("cuda")
    model, block, cache = setting(net, device)
    schedule = Schedule(METHODS[method], PRESET, border)
    generator = torch.Generator(device).manual_seed(5)
    told: list[int] = []
    history = reconstruct_block(model, block, cache, schedule, generator, lambda step, _: told.append(step))
    assert told == history.iterations == [0, 10, 14]
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}, history


GPU_CASES: list[tuple[str, Method, BorderConfig]] = [
    ("convolutions", "qdrop_refactored", BorderConfig()),
    ("convolutions", "aquant_no_border", BorderConfig()),
    ("convolutions", "aquant", BorderConfig()),
    ("convolutions", "aquant", BorderConfig(alpha="learned")),
    ("convolutions", "aquant", BorderConfig(fusion="none", form="linear", bound="clip")),
    ("classifier", "aquant", BorderConfig(fusion="none", granularity="channel")),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("net", "method", "border"), GPU_CASES)
def test_replayed_iterations_are_the_eager_ones(
    net: str, method: Method, border: BorderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed, history = learn_on_gpu(net, method, border)
    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "Replay", Eager)
        eager, expected = learn_on_gpu(net, method, border)
    assert history.losses == pytest.approx(expected.losses, rel=1e-3)
    assert replayed.keys() == eager.keys()
    for name, wanted in eager.items():
        if name.endswith("codes"):  # a weight between two codes may fall to either side
            assert float((replayed[name] != wanted).float().mean()) < 0.01
        else:
            torch.testing.assert_close(replayed[name], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_graph_that_becomes_garbage_during_a_capture_does_not_end_it() -> None:
    """Python collects cycles when it likes; freeing another graph's memory then would invalidate the capture."""
    parameter = torch.ones(8, device="cuda", requires_grad=True)
    doomed = [cycle_with_a_graph() for _ in range(5)]

    def iterate() -> None:
        doomed.pop()
        if gc.isenabled():
            gc.collect()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    optimizer = torch.optim.Adam([parameter], lr=torch.tensor(0.5, device="cuda"), fused=True, capturable=True)
    replay = Replay(optimizer, torch.Generator("cuda"))
    for _ in range(2):
        replay.run(iterate, "phase")
    assert len(doomed) == 1  # three eager steps and one capture
    torch.testing.assert_close(parameter.detach(), torch.zeros(8, device="cuda"), rtol=0, atol=1e-5)


def cycle_with_a_graph() -> list[Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held: list[Any] = [graph, torch.ones(1 << 20, device="cuda")]
    held.append(held)
    return held


@pytest.mark.gpu
@pytest.mark.parametrize(("net", "method", "border"), GPU_CASES)
def test_a_second_run_on_a_gpu_gives_the_same_bytes(net: str, method: Method, border: BorderConfig) -> None:
    (first, first_history), (second, second_history) = (learn_on_gpu(net, method, border) for _ in range(2))
    assert first_history == second_history
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
